//! Checks a registration and carries it out.

use std::fs;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::os::fd::{AsFd, AsRawFd};

use dma_sg::{Iova, page_size};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use rdma_sys_ext::symbols;

use super::path::{self, DEFAULT, IMPORT, NEWER, Path, Registered, Request};
use super::probe::{self, Cause};
use super::region::Kept;
use super::{Access, Buffer, MemoryRegion, Refusal, RegisterError, Umem};
use crate::dmabuf::DmaBuf;
use crate::exporter::Backing;
use crate::host::{self, HostBuffer};
use crate::observe;
use crate::verbs::{self, DmaHandle, ProtectionDomain};

type Result<T, E = RegisterError> = std::result::Result<T, E>;

/// Options of a registration; see [`MemoryRegion::builder`].
#[derive(Debug, Clone, Copy)]
#[must_use = "nothing is registered until `register` is called"]
pub struct MemoryRegionBuilder<'a> {
    domain: &'a ProtectionDomain,
    buffer: Buffer<'a>,
    range: (Bound<u64>, Bound<u64>),
    iova: Option<Iova>,
    default_iova: Option<Iova>,
    access: Access,
    paths: &'a [Path],
    backing: Option<&'a Backing>,
    handle: Option<&'a DmaHandle>,
}

impl<'a> MemoryRegionBuilder<'a> {
    pub(super) fn new(domain: &'a ProtectionDomain, buffer: Buffer<'a>) -> Self {
        Self {
            domain,
            buffer,
            range: (Bound::Unbounded, Bound::Unbounded),
            iova: None,
            default_iova: None,
            access: Access::empty(),
            paths: DEFAULT,
            backing: None,
            handle: None,
        }
    }

    /// Registers this byte range of the buffer. Its ends need not be multiples of the page size. Default: all.
    pub fn range(self, range: impl RangeBounds<u64>) -> Self {
        Self { range: (range.start_bound().cloned(), range.end_bound().cloned()), ..self }
    }

    /// The address of the range's first byte in work requests. It must equal the range's offset modulo the page
    /// size. Default: the offset. In host memory that does not begin at a page, both count from that page. On iWARP the
    /// address of host memory cannot be chosen: it is that of its pages.
    pub fn iova(self, iova: Iova) -> Self {
        Self { iova: Some(iova), ..self }
    }

    /// The iova if the caller of [`iova`](Self::iova) chooses none and the device leaves the choice.
    pub(super) fn default_iova(self, iova: Iova) -> Self {
        Self { default_iova: Some(iova), ..self }
    }

    /// Sets the access flags. Default: none, so the device may only read.
    pub fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// Tries only these paths (`&[]` for none), in the order of the variants of [`Path`]. Default: [`Path::Verbs`] and
    /// [`Path::Uverbs`] for a dma-buf, [`Path::HostMemory`] for host memory.
    ///
    /// Use it to test one path, to refuse a fallback, or to choose [`Path::VerbsEx`] or [`Path::DataDirect`], which
    /// are never tried by default. It cancels [`dma_handle`](Self::dma_handle) and
    /// [`data_direct`](Self::data_direct).
    pub fn paths(self, paths: &'a [Path]) -> Self {
        Self { paths, handle: None, ..self }
    }

    /// Registers with a DMA handle, through [`Path::VerbsEx`] only.
    #[doc(alias = "ibv_reg_mr_ex")]
    pub fn dma_handle(self, handle: &'a DmaHandle) -> Self {
        Self { paths: &[Path::VerbsEx], handle: Some(handle), ..self }
    }

    /// Registers for the data-direct function of an mlx5 device, through [`Path::DataDirect`] only.
    #[doc(alias = "mlx5dv_reg_dmabuf_mr")]
    pub fn data_direct(self) -> Self {
        Self { paths: &[Path::DataDirect], handle: None, ..self }
    }

    /// Permits [`Path::HostMapping`] on the host pages behind the buffer, after the import paths. On iWARP the iova is
    /// then the address of these pages.
    pub fn host_mapping(self, backing: &'a Backing) -> Self {
        Self { backing: Some(backing), ..self }
    }

    /// Checks the arguments, then registers.
    ///
    /// # Errors
    /// Before the registration:
    /// - [`RegisterError::Range`], [`RegisterError::IovaOverflow`], [`RegisterError::IovaNotCongruent`]: the range
    ///   or the iova is invalid, as in [`Umem::new`].
    /// - [`RegisterError::AccessNotPermitted`], [`RegisterError::LocalWriteMissing`],
    ///   [`RegisterError::ReadOnlyBuffer`]: the access flags are invalid, or the buffer's descriptor forbids them.
    /// - [`RegisterError::Host`]: host pages of another buffer, or host memory that is gone, as
    ///   [`HostBuffer::read`] says.
    /// - [`RegisterError::NoPath`]: no path is allowed; or the buffer is mapped through the PCIe BAR beside a nearer path
    ///   ([`ExportOptions::pcie`](crate::exporter::ExportOptions::pcie)), and [`Path::DataDirect`] is not allowed.
    /// - [`RegisterError::Verbs`] with [`verbs::Error::ContextMismatch`]: the DMA handle belongs to another context.
    ///
    /// From the kernel or the provider:
    /// - [`RegisterError::ImportUnsupported`] (`EOPNOTSUPP`, `EPROTONOSUPPORT`): the device imports no dma-bufs.
    /// - [`RegisterError::MemoryWithoutPages`] (`EOPNOTSUPP`, `ENOSYS`): the device imports dma-bufs, but not of this
    ///   memory.
    /// - [`RegisterError::MemlockLimit`] (`ENOMEM`, `EPERM`): HostMapping or HostMemory exceeds RLIMIT_MEMLOCK.
    /// - [`RegisterError::Verbs`] with [`verbs::Error::Unavailable`]: the only allowed path is VerbsEx or DataDirect,
    ///   and this system lacks it; or host pages on iWARP with an [`iova`](Self::iova).
    /// - [`RegisterError::AccessNotPermitted`] (`EOPNOTSUPP`): the device imports dma-bufs, but does not support these
    ///   flags.
    /// - [`RegisterError::Verbs`] with [`verbs::Error::Device`]: every path returned "not supported", and a probe without
    ///   the buffer could not tell why.
    /// - [`RegisterError::Refused`]: the kernel or the provider returned any other errno. `EFAULT`: the pages of a file
    ///   cannot be pinned for writing, see [`HostBuffer::map_file`].
    pub fn register(self) -> Result<MemoryRegion> {
        let umem = self.umem();
        if !observe::listening() {
            return self.carry_out(umem?);
        }
        // The span of a refused range has only the error.
        let (offset, length) = umem.as_ref().map_or((0, 0), |umem| (umem.offset(), umem.len()));
        let fields =
            observe::SpanFields { device: self.device(), buffer: self.buffer.id().inode(), offset, length };
        observe::span(true, fields, |span| {
            let region = self.carry_out(umem?)?;
            span.record("path", tracing::field::display(region.path())).record("lkey", region.lkey().0);
            tracing::debug!(iova = region.iova().0, "registered");
            Ok(region)
        })
    }

    fn umem(&self) -> Result<Umem> {
        let range = dma_sg::resolve_range(self.range, self.buffer.size())?;
        let iova = self.iova.or(self.default_iova).unwrap_or(Iova(self.buffer.page_offset() + range.start));
        Umem::new(self.buffer, range, iova)
    }

    fn carry_out(self, umem: Umem) -> Result<MemoryRegion> {
        self.access.check(self.buffer)?;
        if self.backing.is_some_and(|backing| backing.buffer() != umem.buffer()) {
            return Err(host::Error::ForeignBacking.into());
        }
        // Another path may register such a buffer, and its transfers then fail.
        if self.is_mapped_by_pcie() && self.paths != [Path::DataDirect] {
            return self.data_direct_only()?.carry_out(umem);
        }
        let (offset, length, iova) = (umem.offset(), umem.len(), umem.iova());
        self.buffer.check_present(offset + length)?;
        let request = Request { offset, length, iova, access: self.access };
        let (registered, path, iova) = match self.buffer {
            Buffer::Host(host) => self.try_host(host, request)?,
            Buffer::DmaBuf(dmabuf) => match self.try_kernel(dmabuf, &request) {
                Some(registered) => (registered, Path::Uverbs, iova),
                None => self.try_each(dmabuf, request)?,
            },
        };
        let umem = umem.at(iova);
        let kept = match (path, self.buffer) {
            (Path::HostMemory, Buffer::Host(host)) => Kept::Host(host.clone()),
            (Path::HostMapping, _) => self.backing.cloned().map_or(Kept::Nothing, Kept::Backing),
            (Path::VerbsEx, _) => self.handle.cloned().map_or(Kept::Nothing, Kept::Handle),
            _ => Kept::Nothing,
        };
        Ok(MemoryRegion::new(registered, path, self.access, umem, self.domain.clone(), kept))
    }

    fn is_mapped_by_pcie(&self) -> bool {
        matches!(self.buffer, Buffer::DmaBuf(dmabuf) if dmabuf.is_mapped_by_pcie())
    }

    fn data_direct_only(self) -> Result<Self> {
        if !self.paths.contains(&Path::DataDirect) {
            let reason = "the buffer was exported for the PCIe BAR (ExportOptions::pcie), which only DataDirect can use; allow it, or export without";
            return Err(RegisterError::NoPath { reason });
        }
        Ok(Self { paths: &[Path::DataDirect], backing: None, ..self })
    }

    /// Registers with the kernel's command directly if the provider imports no dma-bufs, the usual case.
    /// After any failure [`try_each`](Self::try_each) finds out the reason.
    fn try_kernel(self, dmabuf: &DmaBuf, request: &Request) -> Option<Registered> {
        let domain = self.domain;
        let probe = move || probe::provider_imports(domain);
        if domain.context().provider_imports(probe) || !self.paths.contains(&Path::Uverbs) {
            return None;
        }
        path::register_uverbs(domain, dmabuf.as_fd().as_raw_fd(), request).ok()
    }

    fn try_host(self, host: &HostBuffer, request: Request) -> Result<(Registered, Path, Iova)> {
        let path = Path::HostMemory;
        if !self.paths.contains(&path) {
            let reason = "none of the allowed paths registers host memory; allow HostMemory for host memory";
            return Err(RegisterError::NoPath { reason });
        }
        let request = self.host_request(host.as_ptr(), request)?;
        path::register_host(self.domain, host, &request)
            .map(|registered| (registered, path, request.iova))
            .map_err(|source| self.refused(path, &request, source))
    }

    /// Tries the paths in order, and goes on to the next one only after "not supported".
    fn try_each(self, dmabuf: &DmaBuf, request: Request) -> Result<(Registered, Path, Iova)> {
        let mut refusals = Vec::new();
        if let Some(handle) = self.handle {
            handle.check(self.domain.context())?;
        }
        for &path in IMPORT.iter().chain(NEWER).filter(|path| self.paths.contains(path)) {
            match self.import(dmabuf, path, &request) {
                Ok(Ok(registered)) => return Ok((registered, path, request.iova)),
                Ok(Err(refusal)) => refusals.push(refusal),
                Err(source) => return Err(self.refused(path, &request, source)),
            }
        }
        if let Some(backing) = self.backing {
            let path = Path::HostMapping;
            let request = self.host_request(backing.as_ptr(), request)?;
            return path::register_host_pages(self.domain, backing, &request)
                .map(|registered| (registered, path, request.iova))
                .map_err(|source| self.refused(path, &request, source));
        }
        Err(self.unsupported(refusals))
    }

    /// The request for pages of this process that begin at `start`. siw takes no iova: a region is at the address of
    /// its pages (`siw_reg_user_mr`), which every iWARP device permits.
    fn host_request(&self, start: *mut u8, request: Request) -> Result<Request> {
        if !self.domain.context().is_iwarp() {
            return Ok(request);
        }
        let iova = Iova(start.addr() as u64 + request.offset);
        if self.iova.is_some_and(|chosen| chosen != iova) {
            return Err(RegisterError::Verbs(verbs::Error::Unavailable {
                device: self.device().into(),
                operation: "choice of the iova for host pages",
                needs: "InfiniBand or RoCE; on iWARP leave the iova out, and take it from the region",
                source: None,
            }));
        }
        Ok(Request { iova, ..request })
    }

    fn import(
        &self,
        dmabuf: &DmaBuf,
        path: Path,
        request: &Request,
    ) -> io::Result<Result<Registered, Refusal>> {
        let fd = dmabuf.as_fd().as_raw_fd();
        let missing = |symbol| Refusal::missing(path, symbol).map(Err);
        let answer = match path {
            Path::Verbs => match symbols::ibv_reg_dmabuf_mr() {
                Ok(call) => path::register_verbs(call, self.domain, fd, request),
                Err(symbol) => return missing(symbol),
            },
            Path::VerbsEx => match symbols::ibv_reg_mr_ex() {
                Ok(call) => {
                    let handle = self.handle.map(DmaHandle::as_raw);
                    path::register_extended(call, self.domain, fd, request, handle)
                }
                Err(symbol) => return missing(symbol),
            },
            Path::DataDirect => match symbols::mlx5dv_reg_dmabuf_mr() {
                Ok(call) => path::register_data_direct(call, self.domain, fd, request),
                Err(symbol) => return missing(symbol),
            },
            Path::Uverbs | Path::HostMapping | Path::HostMemory | Path::Foreign => {
                path::register_uverbs(self.domain, fd, request)
            }
        };
        match answer {
            Ok(registered) => Ok(Ok(registered)),
            Err(error) => Refusal::from_errno(path, &error).map(Err).ok_or(error),
        }
    }

    /// The error after every path returned "not supported". A driver returns the same for memory that it cannot
    /// use and for access flags that it does not support, so probes without a buffer tell the cases apart.
    fn unsupported(&self, refusals: Vec<Refusal>) -> RegisterError {
        let errno = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        match probe::cause(self.domain, &refusals, self.access) {
            Ok(Cause::Memory) => return self.without_pages(errno()),
            Ok(Cause::Flags(flags)) => {
                let device = Some(self.device().into());
                return RegisterError::AccessNotPermitted { flags, device, source: Some(errno()) };
            }
            Ok(Cause::Import) => {}
            Err((path, source)) => {
                return probe::unclear(self.device(), path, source);
            }
        }
        match refusals.as_slice() {
            [] => {
                let reason = "none is allowed; allow Verbs, Uverbs, or HostMapping with its backing";
                return RegisterError::NoPath { reason };
            }
            [refusal] => {
                if let Some((operation, needs)) = refusal.path().needs() {
                    let (device, source) = (self.device().into(), Some(refusal.source()));
                    return verbs::Error::Unavailable { device, operation, needs, source }.into();
                }
            }
            _ => {}
        }
        RegisterError::ImportUnsupported { device: self.device().into(), refusals }
    }

    fn refused(&self, path: Path, request: &Request, source: io::Error) -> RegisterError {
        let Request { offset, length, .. } = *request;
        match (path, source.raw_os_error()) {
            // The exporter has no struct pages: drm_gem_map_dma_buf, for a driver without get_sg_table.
            (Path::Verbs | Path::Uverbs | Path::VerbsEx | Path::DataDirect, Some(libc::ENOSYS)) => {
                return self.without_pages(source);
            }
            // EPERM: a limit of 0 (`can_do_mlock`).
            (Path::HostMapping | Path::HostMemory, Some(libc::ENOMEM | libc::EPERM)) => {
                // The kernel charges whole pages.
                let page_size = page_size();
                let skipped = (self.buffer.page_offset() + offset) % page_size;
                let needed = (skipped + length).next_multiple_of(page_size);
                if let Some((limit, pinned)) = memlock_exceeded(needed) {
                    return RegisterError::MemlockLimit { path, limit, pinned, needed, source };
                }
            }
            _ => {}
        }
        let (device, memory) = (self.device().into(), self.buffer.describe());
        RegisterError::Refused { device, path, memory, offset, length, source }
    }

    fn without_pages(&self, source: io::Error) -> RegisterError {
        let exporter = match self.buffer {
            Buffer::DmaBuf(dmabuf) => dmabuf.exporter_name().unwrap_or_default(),
            Buffer::Host(_) => String::new(),
        };
        RegisterError::MemoryWithoutPages { device: self.device().into(), exporter, source }
    }

    fn device(&self) -> &str {
        self.domain.context().device_name()
    }
}

/// The soft RLIMIT_MEMLOCK and the bytes already pinned, if pinning `needed` more bytes would exceed the limit.
///
/// Like `ib_umem_get` in `drivers/infiniband/core/umem.c`, this compares VmPin of the thread's /proc status, and
/// exempts a thread with CAP_IPC_LOCK.
fn memlock_exceeded(needed: u64) -> Option<(u64, u64)> {
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    if limit == RLIM_INFINITY {
        return None;
    }
    let pinned = pinned_if_charged(&fs::read_to_string("/proc/thread-self/status").ok()?);
    pinned.filter(|pinned| pinned.saturating_add(needed) > limit).map(|pinned| (limit, pinned))
}

/// The bytes that a process has pinned; `None` for one that the limit does not bind.
fn pinned_if_charged(status: &str) -> Option<u64> {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let pinned_kib = field("VmPin:").and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
    let capabilities = field("CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok());
    (capabilities.unwrap_or(0) & CAP_IPC_LOCK == 0).then(|| pinned_kib.unwrap_or(0) * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memlock_counts_what_is_pinned_and_spares_the_privileged() {
        let status = |capabilities: &str| format!("Name:\tx\nVmPin:\t    1024 kB\nCapEff:\t{capabilities}\n");
        assert_eq!(pinned_if_charged(&status("0000000000000000")), Some(1 << 20));
        assert_eq!(pinned_if_charged(&status("000001ffffffffff")), None);
        assert_eq!(pinned_if_charged("CapEff:\t0000000000000000\n"), Some(0), "a kernel without VmPin");
    }
}
