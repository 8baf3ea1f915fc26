//! Registers a set, all of it or nothing.

use std::ops::{Bound, RangeBounds};
use std::sync::Mutex;

use dma_sg::{Iova, page_size, resolve_range};

use super::chunks::{Chunk, plan};
use super::{RegionSet, deregister};
use crate::dmabuf::DmaBuf;
use crate::exporter::Backing;
use crate::mr::path::DEFAULT;
use crate::mr::{Access, Buffer, MemoryRegion, Path, RegisterError, SetError, Umem, parallel};
use crate::verbs::ProtectionDomain;

type Result<T, E = SetError> = std::result::Result<T, E>;

/// Chunk size after a device refused one region that its stated limit permits: some drivers allocate the page
/// list contiguously.
const SMALLER: u64 = 1 << 30;

/// Options of the registration of a set; see [`RegionSet::builder`].
#[derive(Clone)]
#[must_use = "nothing is registered until `register` is called"]
pub struct RegionSetBuilder<'a> {
    buffers: Vec<Buffer<'a>>,
    range: (Bound<u64>, Bound<u64>),
    iova: Option<Iova>,
    access: Access,
    chunk_size: Option<u64>,
    threads: Option<usize>,
    own_descriptors: bool,
    paths: &'a [Path],
    backings: &'a [Backing],
    progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
}

impl std::fmt::Debug for RegionSetBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { buffers, range, iova, access, chunk_size, threads, paths, .. } = self;
        f.debug_struct("RegionSetBuilder")
            .field("buffers", buffers)
            .field("range", range)
            .field("iova", iova)
            .field("access", access)
            .field("chunk_size", chunk_size)
            .field("threads", threads)
            .field("paths", paths)
            .finish_non_exhaustive()
    }
}

/// A registered chunk, with its own descriptor if the caller wants one.
struct Registered {
    region: MemoryRegion,
    descriptor: Option<DmaBuf>,
}

/// The work for one device.
struct Share<'a> {
    domain: &'a ProtectionDomain,
    /// Longest chunk in bytes.
    limit: u64,
    chunks: Vec<Chunk>,
}

/// Why a chunk was not registered.
enum Refusal {
    Register(RegisterError),
    Descriptor(crate::dmabuf::Error),
}

/// A chunk that was not registered.
struct Refused {
    share: usize,
    chunk: usize,
    error: Refusal,
}

impl<'a> RegionSetBuilder<'a> {
    pub(super) fn new(buffers: Vec<Buffer<'a>>) -> Self {
        Self {
            buffers,
            range: (Bound::Unbounded, Bound::Unbounded),
            iova: None,
            access: Access::empty(),
            chunk_size: None,
            threads: None,
            own_descriptors: false,
            paths: DEFAULT,
            backings: &[],
            progress: None,
        }
    }

    /// Registers this byte range of the buffer, or of all buffers in a row. Default: all.
    pub fn range(self, range: impl RangeBounds<u64>) -> Self {
        Self { range: (range.start_bound().cloned(), range.end_bound().cloned()), ..self }
    }

    /// The address of the range's first byte in work requests. It must equal the range's offset modulo the page
    /// size. Default: the offset.
    pub fn iova(self, iova: Iova) -> Self {
        Self { iova: Some(iova), ..self }
    }

    /// Sets the access flags. Default: none, so the device may only read.
    pub fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// Cuts the range into chunks of at most `bytes`, a multiple of the page size. Default: one region for each
    /// buffer, or chunks of the device's largest region if the buffer is longer. Each chunk of a dma-buf costs a
    /// mapping of the whole dma-buf: see `docs/registration.md`.
    pub fn chunk_size(self, bytes: u64) -> Self {
        Self { chunk_size: Some(bytes), ..self }
    }

    /// Uses at most this many threads, including the caller's; 0 counts as 1. Default: one for each CPU, at most
    /// 8.
    pub fn threads(self, threads: usize) -> Self {
        Self { threads: Some(threads.max(1)), ..self }
    }

    /// Registers each chunk of a dma-buf through a duplicate of the buffer's descriptor, which the set holds
    /// ([`RegionSet::descriptor`]), to pass chunks on to another process or library. The descriptors count against
    /// RLIMIT_NOFILE. Default: all chunks share the buffer's descriptor, and the set holds none, because a region
    /// needs no descriptor.
    pub fn own_descriptors(self) -> Self {
        Self { own_descriptors: true, ..self }
    }

    /// Tries only these paths, as in
    /// [`MemoryRegionBuilder::paths`](crate::mr::MemoryRegionBuilder::paths).
    pub fn paths(self, paths: &'a [Path]) -> Self {
        Self { paths, ..self }
    }

    /// Permits [`Path::HostMapping`], after the import paths, for the buffers that consist of these host pages.
    pub fn host_mapping(self, backings: &'a [Backing]) -> Self {
        Self { backings, ..self }
    }

    /// Calls `progress` after each registered chunk with the bytes registered so far and the total, both over all
    /// devices. The thread that registered the chunk calls it, one call at a time.
    pub fn progress(self, progress: &'a (dyn Fn(u64, u64) + Sync)) -> Self {
        Self { progress: Some(progress), ..self }
    }

    /// Registers all chunks, or none.
    ///
    /// # Errors
    /// Before anything is registered:
    /// - [`SetError::NothingToRegister`]: there is no buffer.
    /// - [`SetError::TotalOverflow`]: the total length of the buffers does not fit in 64 bits.
    /// - [`SetError::ChunkSize`]: the chunk size is invalid for this device.
    /// - [`SetError::Register`]: the range, the iova or the access flags are invalid, or the device's limits cannot
    ///   be read.
    ///
    /// Afterwards, with all chunks deregistered again:
    /// - [`SetError::Chunk`]: a chunk was refused, the first one if several were. Its source is the error of
    ///   [`MemoryRegionBuilder::register`](crate::mr::MemoryRegionBuilder::register).
    /// - [`SetError::Descriptor`] (`EMFILE`): with [`own_descriptors`](Self::own_descriptors), a descriptor could
    ///   not be duplicated.
    pub fn register(self, domain: &ProtectionDomain) -> Result<RegionSet> {
        let mut sets = self.register_on(std::slice::from_ref(domain))?;
        Ok(sets.pop().expect("one set for each domain"))
    }

    /// Registers the range in each of these protection domains, in parallel. They may belong to different devices.
    /// Returns one set for each, in the same order; registers all or none.
    ///
    /// # Errors
    /// As [`register`](Self::register); [`SetError::NothingToRegister`] also without a protection domain.
    pub fn register_on(self, domains: &[ProtectionDomain]) -> Result<Vec<RegionSet>> {
        let nothing = |what| Err(SetError::NothingToRegister { what });
        if self.buffers.is_empty() {
            return nothing("buffer");
        }
        if domains.is_empty() {
            return nothing("protection domain");
        }
        let (offset, length) = self.checked_range()?;
        let sizes: Vec<u64> = self.buffers.iter().map(|buffer| buffer.size()).collect();
        let share = |domain| -> Result<Share<'_>> {
            let limit = self.limit(domain)?;
            Ok(Share { domain, limit, chunks: plan(&sizes, offset, length, limit, page_size()) })
        };
        let mut shares = domains.iter().map(share).collect::<Result<Vec<_>>>()?;
        self.check_iovas(&shares[0].chunks, length)?;
        loop {
            let refused = match self.attempt(&shares) {
                Ok(sets) => return Ok(sets),
                Err(refused) => refused,
            };
            let share = &mut shares[refused.share];
            let error = match refused.error {
                Refusal::Register(error) => error,
                Refusal::Descriptor(source) => {
                    let (chunk, chunks) = (refused.chunk, share.chunks.len());
                    return Err(SetError::Descriptor { chunk, chunks, source });
                }
            };
            if self.chunk_size.is_none() && is_too_long(&error, share.chunks[refused.chunk].length) {
                let device = share.domain.context().device_name();
                tracing::info!(device, bytes = SMALLER, "one region was refused: registering chunks instead");
                share.limit = SMALLER;
                share.chunks = plan(&sizes, offset, length, SMALLER, page_size());
                continue;
            }
            let Chunk { start, length, .. } = share.chunks[refused.chunk];
            return Err(SetError::Chunk {
                device: share.domain.context().device_name().into(),
                chunk: refused.chunk,
                chunks: share.chunks.len(),
                offset: offset + start,
                length,
                source: Box::new(error),
            });
        }
    }

    /// The offset and length of the range, after checks of the range and the access flags.
    fn checked_range(&self) -> Result<(u64, u64)> {
        let overflow = |total, length| SetError::TotalOverflow { total, length };
        let size = self.buffers.iter().try_fold(0_u64, |total, buffer| {
            total.checked_add(buffer.size()).ok_or_else(|| overflow(total, buffer.size()))
        })?;
        let range = resolve_range(self.range, size).map_err(RegisterError::from)?;
        self.buffers.iter().try_for_each(|buffer| self.access.check(*buffer))?;
        Ok((range.start, range.end - range.start))
    }

    /// Checks the iovas, each of which follows from the first. They are congruent to the offsets unless host memory
    /// begins or ends inside a page.
    fn check_iovas(&self, chunks: &[Chunk], length: u64) -> Result<()> {
        let iova = self.first_iova(&chunks[0]);
        if iova.0.checked_add(length).is_none() {
            return Err(RegisterError::IovaOverflow { iova, length }.into());
        }
        for chunk in chunks {
            Umem::new(self.buffers[chunk.buffer], chunk.range(), Iova(iova.0 + chunk.start))?;
        }
        Ok(())
    }

    fn first_iova(&self, first: &Chunk) -> Iova {
        let before: u64 = self.buffers[..first.buffer].iter().map(|buffer| buffer.size()).sum();
        self.iova.unwrap_or(Iova(before + self.buffers[first.buffer].page_offset() + first.offset))
    }

    /// Longest chunk on this device, in bytes.
    fn limit(&self, domain: &ProtectionDomain) -> Result<u64> {
        let page_size = page_size();
        let largest = domain.context().limits()?.max_mr_size / page_size * page_size;
        // The device states no limit; the registration will find it.
        let largest = if largest == 0 { u64::MAX / page_size * page_size } else { largest };
        match self.chunk_size {
            Some(size) if size == 0 || !size.is_multiple_of(page_size) || size > largest => {
                Err(SetError::ChunkSize { size, page_size, largest })
            }
            size => Ok(size.unwrap_or(largest)),
        }
    }

    /// Registers every chunk on every device, or returns the first refusal and leaves nothing registered.
    fn attempt(&self, shares: &[Share<'_>]) -> Result<Vec<RegionSet>, Refused> {
        let chunks_of = |share: usize| (0..shares[share].chunks.len()).map(move |chunk| (share, chunk));
        let jobs: Vec<(usize, usize)> = (0..shares.len()).flat_map(chunks_of).collect();
        let threads = self.threads.unwrap_or_else(parallel::default_threads);
        let total = shares.iter().flat_map(|share| &share.chunks).map(|chunk| chunk.length).sum();
        let done = Mutex::new(0);
        let answers: Vec<Mutex<Option<Result<Registered, Refusal>>>> =
            jobs.iter().map(|_| Mutex::new(None)).collect();
        parallel::each(jobs.len(), threads, |job| {
            let (share, chunk) = jobs[job];
            let (share, chunk) = (&shares[share], &shares[share].chunks[chunk]);
            let answer = self.register_chunk(share.domain, &share.chunks[0], chunk);
            let registered = answer.is_ok();
            *answers[job].lock().unwrap_or_else(|poison| poison.into_inner()) = Some(answer);
            if let (true, Some(progress)) = (registered, self.progress) {
                let mut done = done.lock().unwrap_or_else(|poison| poison.into_inner());
                *done += chunk.length;
                progress(*done, total);
            }
            registered
        });
        let (mut sets, mut refused): (Vec<Vec<Registered>>, Option<Refused>) = (Vec::new(), None);
        sets.resize_with(shares.len(), Vec::new);
        for (answer, (share, chunk)) in answers.into_iter().zip(jobs) {
            match answer.into_inner().unwrap_or_else(|poison| poison.into_inner()) {
                Some(Ok(registered)) => sets[share].push(registered),
                Some(Err(error)) if refused.is_none() => refused = Some(Refused { share, chunk, error }),
                // A later refusal, or a chunk that was not started after one.
                _ => {}
            }
        }
        if let Some(refused) = refused {
            let all = sets.into_iter().flatten().map(|registered| registered.region).collect();
            // The error holds a region that stays registered; dropping it tries once more and logs.
            drop(deregister(all, threads));
            return Err(refused);
        }
        Ok(sets.into_iter().zip(shares).map(|(registered, share)| share.set(registered, threads)).collect())
    }

    fn register_chunk(
        &self,
        domain: &ProtectionDomain,
        first: &Chunk,
        chunk: &Chunk,
    ) -> Result<Registered, Refusal> {
        let buffer = self.buffers[chunk.buffer];
        let descriptor = match buffer {
            Buffer::DmaBuf(dmabuf) if self.own_descriptors => {
                Some(dmabuf.try_clone().map_err(Refusal::Descriptor)?)
            }
            _ => None,
        };
        let iova = Iova(self.first_iova(first).0 + chunk.start);
        let builder = MemoryRegion::builder(domain, descriptor.as_ref().map_or(buffer, Buffer::from))
            .range(chunk.range())
            .default_iova(iova)
            .access(self.access)
            .paths(self.paths);
        let builder = if self.iova.is_some() { builder.iova(iova) } else { builder };
        let region = match self.backings.iter().find(|backing| backing.buffer() == buffer.id()) {
            Some(backing) => builder.host_mapping(backing).register(),
            None => builder.register(),
        };
        let region = region.map_err(Refusal::Register)?;
        Ok(Registered { region, descriptor })
    }
}

impl Share<'_> {
    /// The set of all chunks, which cover the range.
    fn set(&self, registered: Vec<Registered>, threads: usize) -> RegionSet {
        debug_assert_eq!(registered.len(), self.chunks.len());
        let (chunks, descriptors): (Vec<_>, Vec<_>) =
            registered.into_iter().map(|each| (each.region, each.descriptor)).unzip();
        RegionSet::new(chunks, descriptors, threads)
    }
}

/// Whether smaller chunks may succeed: the kernel had no room for the page list, or the device has an unstated
/// limit. RLIMIT_MEMLOCK has an error of its own.
fn is_too_long(error: &RegisterError, length: u64) -> bool {
    let RegisterError::Refused { source, .. } = error else { return false };
    let errno = source.raw_os_error();
    length > SMALLER && matches!(errno, Some(libc::ENOMEM | libc::EINVAL | libc::E2BIG | libc::EFBIG))
}
