//! Registering a set, all or nothing.

use std::sync::Mutex;

use super::chunks::{Chunk, plan};
use super::{RegionSet, deregister};
use crate::dmabuf::DmaBuf;
use crate::error::RegistrationError;
use crate::exporter::Backing;
use crate::mr::path::IMPORT;
use crate::mr::{Access, MemoryRegion, Path, parallel};
use crate::umem::{Iova, Umem, check_range, page_size};
use crate::verbs::ProtectionDomain;
use crate::{Error, Result};

/// A region that a device refuses although its limit allows it is cut into chunks of this size: some
/// drivers allocate their list of pages in one piece.
const SMALLER: u64 = 1 << 30;

/// Which descriptors a set's chunks are registered through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FdPolicy {
    /// The buffer's own for all, and none is held afterwards: a region needs no descriptor. The default.
    #[default]
    Shared,
    /// A duplicate for each chunk, held as long as the set ([`RegionSet::descriptor`]): for handing
    /// chunks on one by one, to another process or library. Counts against RLIMIT_NOFILE.
    PerChunk,
}

/// How far a registration has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that are registered, over all devices.
    pub done: u64,
    /// Bytes in all, over all devices.
    pub total: u64,
}

/// A set to be; see [`RegionSet::builder`].
#[derive(Clone, Copy)]
#[must_use = "nothing is registered until `register` is called"]
pub struct RegionSetBuilder<'a> {
    buffers: &'a [DmaBuf],
    range: Option<(u64, u64)>,
    iova: Option<Iova>,
    access: Access,
    chunk_size: Option<u64>,
    threads: Option<usize>,
    fds: FdPolicy,
    paths: &'a [Path],
    backings: &'a [Backing],
    progress: Option<&'a (dyn Fn(Progress) + Sync)>,
}

impl std::fmt::Debug for RegionSetBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { buffers, range, iova, access, chunk_size, threads, fds, paths, .. } = self;
        f.debug_struct("RegionSetBuilder")
            .field("buffers", buffers)
            .field("range", range)
            .field("iova", iova)
            .field("access", access)
            .field("chunk_size", chunk_size)
            .field("threads", threads)
            .field("fds", fds)
            .field("paths", paths)
            .finish_non_exhaustive()
    }
}

/// A registered chunk, with its descriptor where it has one.
struct Registered {
    region: MemoryRegion,
    descriptor: Option<DmaBuf>,
}

/// One device's share of the work.
struct Share<'a> {
    domain: &'a ProtectionDomain,
    /// Most bytes a chunk.
    limit: u64,
    chunks: Vec<Chunk>,
}

/// A chunk that was refused.
struct Refused {
    share: usize,
    chunk: usize,
    error: Error,
}

impl<'a> RegionSetBuilder<'a> {
    pub(super) fn new(buffers: &'a [DmaBuf]) -> Self {
        Self {
            buffers,
            range: None,
            iova: None,
            access: Access::empty(),
            chunk_size: None,
            threads: None,
            fds: FdPolicy::default(),
            paths: IMPORT,
            backings: &[],
            progress: None,
        }
    }

    /// Registers `length` bytes from `offset` of the buffer, or of all buffers together, instead of all.
    pub fn range(self, offset: u64, length: u64) -> Self {
        Self { range: Some((offset, length)), ..self }
    }

    /// Addresses the range from `iova`, instead of from its offset. It must equal the offset modulo the
    /// page size.
    pub fn iova(self, iova: Iova) -> Self {
        Self { iova: Some(iova), ..self }
    }

    /// What the set may be used for.
    pub fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// Cuts the range into chunks of at most `bytes`, a multiple of the page size. By default each buffer
    /// is one region where the device takes it, and is cut by the device's largest region otherwise.
    /// Chunks of one dma-buf cost a mapping of all of it each: see `docs/registration.md`.
    pub fn chunk_size(self, bytes: u64) -> Self {
        Self { chunk_size: Some(bytes), ..self }
    }

    /// Uses at most so many threads, the caller's among them. By default one for each processor, 8 at
    /// most.
    pub fn threads(self, threads: usize) -> Self {
        Self { threads: Some(threads.max(1)), ..self }
    }

    /// Which descriptors the chunks are registered through. By default [`FdPolicy::Shared`].
    pub fn fd_policy(self, fds: FdPolicy) -> Self {
        Self { fds, ..self }
    }

    /// Tries only these importing paths, as
    /// [`MemoryRegionBuilder::paths`](crate::mr::MemoryRegionBuilder::paths).
    pub fn paths(self, paths: &'a [Path]) -> Self {
        Self { paths, ..self }
    }

    /// Permits [`Path::HostMapping`], after the importing paths, for the buffers that these host pages
    /// are behind.
    pub fn host_mapping(self, backings: &'a [Backing]) -> Self {
        Self { backings, ..self }
    }

    /// Calls this after each chunk, from whichever thread registered it, one call at a time.
    pub fn progress(self, progress: &'a (dyn Fn(Progress) + Sync)) -> Self {
        Self { progress: Some(progress), ..self }
    }

    /// Registers all chunks, or none.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::OutOfRange`], [`Error::IovaOverflow`],
    ///   [`Error::IovaNotCongruent`], [`Error::AccessNotPermitted`], [`Error::LocalWriteMissing`],
    ///   [`Error::ReadOnlyBuffer`], [`RegistrationError::ChunkSize`],
    ///   [`RegistrationError::NothingToRegister`]: before anything is registered.
    /// - [`RegistrationError::Chunk`]: a chunk was refused, with what
    ///   [`MemoryRegionBuilder::register`](crate::mr::MemoryRegionBuilder::register) said, or with
    ///   [`Error::Inspect`] (`EMFILE`) where it was to have a descriptor of its own. Of several the first.
    /// - [`Error::Verbs`]: the device's limits cannot be read.
    pub fn register(self, domain: &ProtectionDomain) -> Result<RegionSet> {
        let mut sets = self.register_on(std::slice::from_ref(domain))?;
        Ok(sets.pop().expect("a set for each domain"))
    }

    /// Registers the range in each of these domains, which may be of several devices, all in parallel; a
    /// set for each, in their order. All or none.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub fn register_on(self, domains: &[ProtectionDomain]) -> Result<Vec<RegionSet>> {
        let nothing = |what| Err(RegistrationError::NothingToRegister { what }.into());
        if self.buffers.is_empty() {
            return nothing("buffer");
        }
        if domains.is_empty() {
            return nothing("protection domain");
        }
        let (offset, length) = self.checked_range()?;
        let sizes: Vec<u64> = self.buffers.iter().map(DmaBuf::size).collect();
        let share = |domain| -> Result<Share<'_>> {
            let limit = self.limit(domain)?;
            Ok(Share { domain, limit, chunks: plan(&sizes, offset, length, limit, page_size()) })
        };
        let mut shares = domains.iter().map(share).collect::<Result<Vec<_>>>()?;
        self.check_first(&shares[0].chunks[0], length)?;
        loop {
            let refused = match self.attempt(&shares) {
                Ok(sets) => return Ok(sets),
                Err(refused) => refused,
            };
            let share = &mut shares[refused.share];
            if self.chunk_size.is_none() && is_too_long(&refused.error, share.chunks[refused.chunk].length) {
                let device = share.domain.context().device_name();
                tracing::info!(device, bytes = SMALLER, "refused as one region, cut into chunks");
                share.limit = SMALLER;
                share.chunks = plan(&sizes, offset, length, SMALLER, page_size());
                continue;
            }
            let Chunk { start, length, .. } = share.chunks[refused.chunk];
            return Err(RegistrationError::Chunk {
                device: share.domain.context().device_name().into(),
                chunk: refused.chunk,
                chunks: share.chunks.len(),
                offset: offset + start,
                length,
                source: Box::new(refused.error),
            }
            .into());
        }
    }

    /// The range, inside the buffers, with access that all of them allow.
    fn checked_range(&self) -> Result<(u64, u64)> {
        let overflow = |total, length| crate::error::AddressError::TotalOverflow { total, length };
        let size = self.buffers.iter().try_fold(0_u64, |total, buffer| {
            total.checked_add(buffer.size()).ok_or_else(|| overflow(total, buffer.size()))
        })?;
        let (offset, length) = self.range.unwrap_or((0, size));
        check_range(offset, length, size)?;
        self.buffers.iter().try_for_each(|buffer| self.access.check(buffer))?;
        Ok((offset, length))
    }

    /// The addresses of all chunks follow from that of the first.
    fn check_first(&self, first: &Chunk, length: u64) -> Result<()> {
        let iova = self.first_iova(first);
        if iova.0.checked_add(length).is_none() {
            return Err(Error::IovaOverflow { iova, length });
        }
        Umem::new(&self.buffers[first.buffer], first.offset, first.length, iova).map(drop)
    }

    fn first_iova(&self, first: &Chunk) -> Iova {
        let before: u64 = self.buffers[..first.buffer].iter().map(DmaBuf::size).sum();
        self.iova.unwrap_or(Iova(before + first.offset))
    }

    /// Most bytes a chunk on this device.
    fn limit(&self, domain: &ProtectionDomain) -> Result<u64> {
        let page_size = page_size();
        let largest = domain.context().limits()?.max_mr_size / page_size * page_size;
        // A device that states no limit has one that the registration will tell.
        let largest = if largest == 0 { u64::MAX / page_size * page_size } else { largest };
        match self.chunk_size {
            Some(size) if size == 0 || !size.is_multiple_of(page_size) || size > largest => {
                Err(RegistrationError::ChunkSize { size, page_size, largest }.into())
            }
            size => Ok(size.unwrap_or(largest)),
        }
    }

    /// Registers every chunk of every device, or gives the first refusal and leaves nothing.
    fn attempt(&self, shares: &[Share<'_>]) -> Result<Vec<RegionSet>, Refused> {
        let chunks_of = |share: usize| (0..shares[share].chunks.len()).map(move |chunk| (share, chunk));
        let jobs: Vec<(usize, usize)> = (0..shares.len()).flat_map(chunks_of).collect();
        let threads = self.threads.unwrap_or_else(parallel::default_threads);
        let total = shares.iter().flat_map(|share| &share.chunks).map(|chunk| chunk.length).sum();
        let done = Mutex::new(0);
        let answers: Vec<Mutex<Option<Result<Registered>>>> = jobs.iter().map(|_| Mutex::new(None)).collect();
        parallel::each(jobs.len(), threads, |job| {
            let (share, chunk) = jobs[job];
            let (share, chunk) = (&shares[share], &shares[share].chunks[chunk]);
            let answer = self.register_chunk(share.domain, &share.chunks[0], chunk);
            let registered = answer.is_ok();
            *answers[job].lock().unwrap_or_else(|poison| poison.into_inner()) = Some(answer);
            if let (true, Some(progress)) = (registered, self.progress) {
                let mut done = done.lock().unwrap_or_else(|poison| poison.into_inner());
                *done += chunk.length;
                progress(Progress { done: *done, total });
            }
            registered
        });
        let (mut sets, mut refused): (Vec<Vec<Registered>>, Option<Refused>) = (Vec::new(), None);
        sets.resize_with(shares.len(), Vec::new);
        for (answer, (share, chunk)) in answers.into_iter().zip(jobs) {
            match answer.into_inner().unwrap_or_else(|poison| poison.into_inner()) {
                Some(Ok(registered)) => sets[share].push(registered),
                Some(Err(error)) if refused.is_none() => refused = Some(Refused { share, chunk, error }),
                // Another refusal, or a chunk that was not begun after one.
                _ => {}
            }
        }
        if let Some(refused) = refused {
            let all = sets.into_iter().flatten().map(|registered| registered.region).collect();
            // Such as stand are tried once more as they are dropped, and logged.
            drop(deregister(all, threads));
            return Err(refused);
        }
        Ok(sets.into_iter().zip(shares).map(|(registered, share)| share.set(registered, threads)).collect())
    }

    fn register_chunk(&self, domain: &ProtectionDomain, first: &Chunk, chunk: &Chunk) -> Result<Registered> {
        let buffer = &self.buffers[chunk.buffer];
        let descriptor = match self.fds {
            FdPolicy::Shared => None,
            FdPolicy::PerChunk => Some(buffer.try_clone()?),
        };
        let iova = Iova(self.first_iova(first).0 + chunk.start);
        let builder = MemoryRegion::builder(domain, descriptor.as_ref().unwrap_or(buffer))
            .range(chunk.offset, chunk.length)
            .iova(iova)
            .access(self.access)
            .paths(self.paths);
        let region = match self.backings.iter().find(|backing| backing.buffer() == buffer.id()) {
            Some(backing) => builder.host_mapping(backing).register()?,
            None => builder.register()?,
        };
        Ok(Registered { region, descriptor })
    }
}

impl Share<'_> {
    /// All chunks are there: the set covers the range.
    fn set(&self, registered: Vec<Registered>, threads: usize) -> RegionSet {
        debug_assert_eq!(registered.len(), self.chunks.len());
        let length = self.chunks.iter().map(|chunk| chunk.length).sum();
        let starts = self.chunks.iter().map(|chunk| chunk.start).collect();
        let (chunks, descriptors): (Vec<_>, Vec<_>) =
            registered.into_iter().map(|each| (each.region, each.descriptor)).unzip();
        let descriptors = descriptors.into_iter().flatten().collect();
        RegionSet { chunks, starts, descriptors, length, threads }
    }
}

/// Whether shorter chunks may do: the kernel found no room for a list of pages, or the device has a limit
/// that it did not state. RLIMIT_MEMLOCK is an error of its own.
fn is_too_long(error: &Error, length: u64) -> bool {
    let Error::Register { source, .. } = error else { return false };
    let errno = source.raw_os_error();
    length > SMALLER && matches!(errno, Some(libc::ENOMEM | libc::EINVAL | libc::E2BIG | libc::EFBIG))
}
