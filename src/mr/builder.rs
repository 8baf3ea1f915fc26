//! Checking and carrying out a registration.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use rdma_sys_ext::symbols;

use super::path::{self, IMPORT, NEWER, Path, Registered, Request};
use super::probe::{self, probe};
use super::region::Kept;
use super::{Access, DmaHandle, MemoryRegion, Refusal, RefusalReason};
use crate::dmabuf::DmaBuf;
use crate::error::RegistrationError;
use crate::exporter::Backing;
use crate::observe;
use crate::umem::{Iova, Umem, page_size};
use crate::verbs::ProtectionDomain;
use crate::{Error, Result};

/// A registration to be; see [`MemoryRegion::builder`].
#[derive(Debug, Clone, Copy)]
#[must_use = "nothing is registered until `register` is called"]
pub struct MemoryRegionBuilder<'a> {
    domain: &'a ProtectionDomain,
    buffer: &'a DmaBuf,
    range: Option<(u64, u64)>,
    iova: Option<Iova>,
    access: Access,
    paths: &'a [Path],
    backing: Option<&'a Backing>,
    handle: Option<&'a DmaHandle>,
}

impl<'a> MemoryRegionBuilder<'a> {
    pub(super) fn new(domain: &'a ProtectionDomain, buffer: &'a DmaBuf) -> Self {
        Self {
            domain,
            buffer,
            range: None,
            iova: None,
            access: Access::empty(),
            paths: IMPORT,
            backing: None,
            handle: None,
        }
    }

    /// Registers `length` bytes from `offset` of the buffer, instead of all. Neither need be a multiple
    /// of the page size.
    pub fn range(self, offset: u64, length: u64) -> Self {
        Self { range: Some((offset, length)), ..self }
    }

    /// Addresses the range from `iova`, instead of from its offset in the buffer. It must equal the
    /// offset modulo the page size.
    pub fn iova(self, iova: Iova) -> Self {
        Self { iova: Some(iova), ..self }
    }

    /// What the region may be used for.
    pub fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// Tries only these importing paths (`&[]` for none), in the order in which [`Path`] lists them. For
    /// a test of one path, to have a fall-back refused, or for a newer path, which is taken only when it
    /// is named. Takes back a [`dma_handle`](Self::dma_handle) and [`data_direct`](Self::data_direct).
    pub fn paths(self, paths: &'a [Path]) -> Self {
        Self { paths, handle: None, ..self }
    }

    /// Registers with a DMA handle, by [`Path::VerbsEx`] and no other.
    #[doc(alias = "ibv_reg_mr_ex")]
    pub fn dma_handle(self, handle: &'a DmaHandle) -> Self {
        Self { paths: &[Path::VerbsEx], handle: Some(handle), ..self }
    }

    /// Registers for the data-direct function of an mlx5 device, by [`Path::DataDirect`] and no other.
    #[doc(alias = "mlx5dv_reg_dmabuf_mr")]
    pub fn data_direct(self) -> Self {
        Self { paths: &[Path::DataDirect], handle: None, ..self }
    }

    /// Permits [`Path::HostMapping`], after the importing paths, on the host pages behind the buffer.
    pub fn host_mapping(self, backing: &'a Backing) -> Self {
        Self { backing: Some(backing), ..self }
    }

    /// Checks everything that can be checked, then registers.
    ///
    /// # Errors
    /// Before the system call:
    /// - [`Error::ZeroLength`], [`Error::OutOfRange`], [`Error::IovaOverflow`],
    ///   [`Error::IovaNotCongruent`]: the range, as of [`Umem::new`].
    /// - [`Error::AccessNotPermitted`], [`Error::LocalWriteMissing`], [`Error::ReadOnlyBuffer`]: the
    ///   access flags.
    /// - [`Error::NoPath`], [`Error::ForeignBacking`], [`RegistrationError::ForeignDmaHandle`]: the paths.
    ///
    /// After it:
    /// - [`Error::ImportUnsupported`] (`EOPNOTSUPP`, `EPROTONOSUPPORT`): no path of this device imports
    ///   dma-bufs.
    /// - [`Error::MemoryWithoutPages`] (`EOPNOTSUPP`, `ENOSYS`): the device does, but not this one.
    /// - [`Error::MemlockLimit`] (`ENOMEM`): on the HostMapping path.
    /// - [`RegistrationError::Unavailable`] (`EOPNOTSUPP`, `EPROTONOSUPPORT`, or no such function): a newer
    ///   path that was asked for.
    /// - [`Error::Register`]: anything else that the kernel or the provider answered.
    #[inline]
    pub fn register(self) -> Result<MemoryRegion> {
        if observe::listening() { self.register_in_a_span() } else { self.carry_out() }
    }

    #[cold]
    #[inline(never)]
    fn register_in_a_span(self) -> Result<MemoryRegion> {
        let (offset, length) = self.whole_or_range();
        let about = observe::About { device: self.device(), buffer: self.buffer.id(), offset, length };
        observe::span(true, about, |span| {
            let region = self.carry_out()?;
            span.record("path", tracing::field::display(region.path())).record("lkey", region.lkey().0);
            tracing::debug!(iova = region.iova().0, "registered a dma-buf");
            Ok(region)
        })
    }

    #[inline]
    fn whole_or_range(&self) -> (u64, u64) {
        self.range.unwrap_or((0, self.buffer.size()))
    }

    // Always, since the two who call it would otherwise share one that is called.
    #[inline(always)]
    fn carry_out(self) -> Result<MemoryRegion> {
        let (offset, length) = self.whole_or_range();
        let iova = self.iova.unwrap_or(Iova(offset));
        let umem = Umem::new(self.buffer, offset, length, iova)?;
        self.access.check(self.buffer)?;
        if self.backing.is_some_and(|backing| backing.buffer() != umem.buffer()) {
            return Err(Error::ForeignBacking);
        }
        let request = Request { offset, length, iova, access: self.access };
        if let Some(registered) = self.try_kernel(&request) {
            let domain = self.domain.clone();
            return Ok(MemoryRegion::new(registered, Path::Uverbs, self.access, umem, domain, Kept::Nothing));
        }
        let (registered, path) = self.try_each(request)?;
        let kept = match path {
            Path::HostMapping => self.backing.cloned().map_or(Kept::Nothing, Kept::Backing),
            Path::VerbsEx => self.handle.cloned().map_or(Kept::Nothing, Kept::Handle),
            _ => Kept::Nothing,
        };
        Ok(MemoryRegion::new(registered, path, self.access, umem, self.domain.clone(), kept))
    }

    /// The usual case where the provider imports nothing: straight to the kernel's command. Anything
    /// but success is for `try_each` to explain.
    #[inline]
    fn try_kernel(self, request: &Request) -> Option<Registered> {
        let domain = self.domain;
        let ask = move || probe::provider_imports(domain);
        if domain.context().provider_imports(ask) || !self.paths.contains(&Path::Uverbs) {
            return None;
        }
        path::register_uverbs(domain, self.buffer.as_fd().as_raw_fd(), request).ok()
    }

    /// The first path that does not say that it does not import dma-bufs.
    #[inline(never)]
    fn try_each(self, request: Request) -> Result<(Registered, Path)> {
        let mut refusals = Vec::new();
        if let Some(handle) = self.handle {
            handle.check(self.domain.context())?;
        }
        for &path in IMPORT.iter().chain(NEWER).filter(|path| self.paths.contains(path)) {
            match self.import(path, &request) {
                Ok(Ok(registered)) => return Ok((registered, path)),
                Ok(Err(refusal)) => refusals.push(refusal),
                Err(source) => return Err(self.refused(path, &request, source)),
            }
        }
        if let Some(backing) = self.backing {
            let path = Path::HostMapping;
            return path::register_host(self.domain, backing, &request)
                .map(|registered| (registered, path))
                .map_err(|source| self.refused(path, &request, source));
        }
        Err(self.unsupported(refusals))
    }

    fn import(&self, path: Path, request: &Request) -> io::Result<Result<Registered, Refusal>> {
        let fd = self.buffer.as_fd().as_raw_fd();
        let missing = |missing| Ok(Err(Refusal { path, reason: RefusalReason::MissingSymbol(missing) }));
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
            Path::Uverbs | Path::HostMapping => path::register_uverbs(self.domain, fd, request),
        };
        match answer {
            Ok(registered) => Ok(Ok(registered)),
            Err(error) => Refusal::from_errno(path, &error).map(Err).ok_or(error),
        }
    }

    /// All paths said "not supported". A driver says the same of memory that it cannot use, so the
    /// device is asked without a buffer which it is.
    fn unsupported(&self, refusals: Vec<Refusal>) -> Error {
        match refusals[..] {
            [] => return Error::NoPath,
            [Refusal { path, reason }] => {
                if let Some((operation, needs)) = path.needs() {
                    let (device, source) = (self.device().into(), reason.source());
                    return RegistrationError::Unavailable { device, operation, needs, source }.into();
                }
            }
            _ => {}
        }
        match probe(self.domain.context()) {
            Ok(support) if self.paths.iter().any(|path| support.allows(*path)) => {
                self.without_pages(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
            }
            Ok(_) => Error::ImportUnsupported { device: self.device().into(), refusals },
            Err(error) => error,
        }
    }

    fn refused(&self, path: Path, request: &Request, source: io::Error) -> Error {
        let Request { offset, length, .. } = *request;
        match (path, source.raw_os_error()) {
            // The exporter has no pages to list (drm_gem_map_dma_buf of a driver without get_sg_table).
            (Path::Verbs | Path::Uverbs | Path::VerbsEx | Path::DataDirect, Some(libc::ENOSYS)) => {
                return self.without_pages(source);
            }
            (Path::HostMapping, Some(libc::ENOMEM)) => {
                // Whole pages are charged.
                let page_size = page_size();
                let needed = (offset % page_size + length).next_multiple_of(page_size);
                if let Some(limit) = memlock_exceeded(needed) {
                    return Error::MemlockLimit { limit, needed, source };
                }
            }
            _ => {}
        }
        let (device, exporter) = (self.device().into(), self.exporter());
        Error::Register { device, path, exporter, offset, length, source }
    }

    fn without_pages(&self, source: io::Error) -> Error {
        Error::MemoryWithoutPages { device: self.device().into(), exporter: self.exporter(), source }
    }

    fn device(&self) -> &str {
        self.domain.context().device_name()
    }

    fn exporter(&self) -> String {
        self.buffer.exporter_name().unwrap_or_default()
    }
}

/// The soft RLIMIT_MEMLOCK in bytes if pinning `needed` bytes more goes over it.
///
/// What is pinned already and whether this thread may ignore the limit are in its /proc status, as
/// `ib_umem_get` of `drivers/infiniband/core/umem.c` looks at them.
fn memlock_exceeded(needed: u64) -> Option<u64> {
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    if limit == RLIM_INFINITY {
        return None;
    }
    exceeds(&fs::read_to_string("/proc/thread-self/status").ok()?, needed, limit).then_some(limit)
}

fn exceeds(status: &str, needed: u64, limit: u64) -> bool {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let pinned_kib = field("VmPin:").and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
    let capabilities = field("CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok());
    let pinned = pinned_kib.unwrap_or(0) * 1024;
    capabilities.unwrap_or(0) & CAP_IPC_LOCK == 0 && pinned.saturating_add(needed) > limit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memlock_counts_what_is_pinned_and_spares_the_privileged() {
        let status = |capabilities: &str| format!("Name:\tx\nVmPin:\t    1024 kB\nCapEff:\t{capabilities}\n");
        let user = status("0000000000000000");
        assert!(exceeds(&user, (1 << 20) + 1, 2 << 20));
        assert!(!exceeds(&user, 1 << 20, 2 << 20));
        assert!(exceeds(&user, u64::MAX, 2 << 20));
        assert!(!exceeds(&status("000001ffffffffff"), 1 << 40, 2 << 20));
    }
}
