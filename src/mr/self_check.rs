//! Checks that the device reaches registered memory, with transfers of single bytes on a queue pair connected to
//! itself. A flush of received bytes uses the same queue pair.
//!
//! `unsafe` is here for a page of scratch memory. It is mapped and registered here, and accessed only with
//! volatile reads and writes, because the device accesses it too.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::time::Duration;

use ibverbs_sys as ffi;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use dma_sg::page_size;

use super::{Access, MemoryRegion, SelfCheckError};
use crate::observe::Process;
use crate::verbs::{
    self, CompletionQueue, Lkey, Operation, ProtectionDomain, QueuePair, QueuePairOptions, RemoteAddr, Rkey,
    Sge, WorkRequest,
};

type Result<T, E = SelfCheckError> = std::result::Result<T, E>;

/// Timeout of one transfer, retries included.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Checks the first and the last byte of each region. All regions are in `domain`.
pub(super) fn check(domain: &ProtectionDomain, regions: &[MemoryRegion]) -> Result<()> {
    let loopback = Loopback::new(domain).map_err(SelfCheckError::Setup)?;
    for region in regions {
        loopback.check_byte(region, 0)?;
        if region.len() > 1 {
            loopback.check_byte(region, region.len() - 1)?;
        }
    }
    Ok(())
}

/// A queue pair connected to itself, and a registered page for the other end of its transfers.
pub(crate) struct Loopback {
    // First, so that it is destroyed before the scratch page is deregistered.
    pair: QueuePair,
    queue: CompletionQueue,
    scratch: Scratch,
}

impl Loopback {
    pub(crate) fn new(domain: &ProtectionDomain) -> verbs::Result<Self> {
        let scratch = Scratch::new(domain)?;
        let context = domain.context();
        let port = first_active(context.limits()?.ports, |port| Ok(context.port(port)?.active))?;
        let options = QueuePairOptions::default().port(port).send_depth(4).recv_depth(1).max_sge(1);
        let queue = CompletionQueue::new(context, 4)?;
        let pair = QueuePair::new(domain, &queue, &queue, options)?;
        if let Some(endpoint) = pair.endpoint() {
            pair.connect(&endpoint)?;
        }
        Ok(Self { pair, queue, scratch })
    }

    fn check_byte(&self, region: &MemoryRegion, offset: u64) -> Result<()> {
        let before = self.read(region, offset)?;
        if !region.access().contains(Access::LOCAL_WRITE) {
            return Ok(());
        }
        let other = !before;
        self.write(region, offset, other)?;
        let seen = self.read(region, offset);
        // Restore the byte even if it did not read back. A failed transfer has stopped the queue pair.
        let restored = match &seen {
            Ok(_) => self.write(region, offset, before),
            Err(_) => {
                Self::new(region.domain()).map_err(SelfCheckError::Setup)?.write(region, offset, before)
            }
        };
        self.compare(region, offset, other, seen?)?;
        restored?;
        self.compare(region, offset, before, self.read(region, offset)?)
    }

    fn compare(&self, region: &MemoryRegion, offset: u64, wrote: u8, read: u8) -> Result<()> {
        if wrote == read {
            return Ok(());
        }
        let device = region.domain().context().device_name().into();
        let path = region.path();
        Err(SelfCheckError::Mismatch { device, path, offset, wrote, read })
    }

    /// Has the device read a byte. After a failure the queue pair is unusable.
    pub(crate) fn touch(&self, region: &MemoryRegion, offset: u64) -> verbs::Result<()> {
        if region.access().contains(Access::REMOTE_READ) {
            self.transfer(Operation::Read { remote: remote_byte(region, offset) }, self.scratch.sge())
        } else {
            self.transfer(Operation::Write { remote: self.scratch.remote() }, local_byte(region, offset))
        }
    }

    /// Reads a byte with the remote key if the region permits that, else with the local key.
    fn read(&self, region: &MemoryRegion, offset: u64) -> Result<u8> {
        self.scratch.set(0);
        self.touch(region, offset).map_err(failed(region, "reading", offset))?;
        Ok(self.scratch.get())
    }

    /// Writes a byte with the remote key if the region permits that, else with the local key.
    fn write(&self, region: &MemoryRegion, offset: u64, value: u8) -> Result<()> {
        self.scratch.set(value);
        let result = if region.access().contains(Access::REMOTE_WRITE) {
            self.transfer(Operation::Write { remote: remote_byte(region, offset) }, self.scratch.sge())
        } else {
            self.transfer(Operation::Read { remote: self.scratch.remote() }, local_byte(region, offset))
        };
        result.map_err(failed(region, "writing", offset))
    }

    fn transfer(&self, operation: Operation, element: Sge<'_>) -> verbs::Result<()> {
        self.pair.post(WorkRequest::new(0, operation, &[element]).signaled())?;
        self.queue.wait(TIMEOUT)?.success().map(drop)
    }
}

/// The first active port; port 1 if none is, whose failure says more.
fn first_active(ports: u8, active: impl Fn(u8) -> verbs::Result<bool>) -> verbs::Result<u8> {
    for port in 1..=ports {
        if active(port)? {
            return Ok(port);
        }
    }
    Ok(1)
}

/// The address of a byte for the peer's side of a transfer.
fn remote_byte(region: &MemoryRegion, offset: u64) -> RemoteAddr {
    RemoteAddr { addr: region.iova().0 + offset, rkey: region.rkey() }
}

/// The element of a byte for the local side of a transfer.
fn local_byte(region: &MemoryRegion, offset: u64) -> Sge<'_> {
    Sge::new(region.domain(), region.iova().0 + offset, 1, region.lkey())
}

fn failed(
    region: &MemoryRegion,
    step: &'static str,
    offset: u64,
) -> impl FnOnce(verbs::Error) -> SelfCheckError {
    let (device, path) = (region.domain().context().device_name().into(), region.path());
    move |source| match source {
        verbs::Error::Completion { .. } | verbs::Error::Timeout { .. } => {
            SelfCheckError::Transfer { device, path, step, offset, source: Box::new(source) }
        }
        // Nothing was transferred, which says nothing about the memory: a device without READs, a full queue.
        source => SelfCheckError::Setup(source),
    }
}

/// A registered page of our own.
struct Scratch {
    page: NonNull<u8>,
    size: NonZeroUsize,
    region: NonNull<ffi::ibv_mr>,
    creator: Process,
    // Last, so that it is dropped after the region is deregistered.
    domain: ProtectionDomain,
}

impl Scratch {
    fn new(domain: &ProtectionDomain) -> verbs::Result<Self> {
        let failed = |source: io::Error| verbs::Error::Device {
            device: domain.context().device_name().into(),
            operation: "register a page for the self-check".into(),
            source,
        };
        let size = NonZeroUsize::new(page_size() as usize).expect("a page is not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let page = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE) }
            .map_err(|errno| failed(errno.into()))?;
        let access = (Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE).bits();
        let (raw, address) = (domain.as_raw().as_ptr(), page.as_ptr().addr() as u64);
        // SAFETY: the domain is live, and the page stays mapped while the region is registered.
        let region = unsafe { ffi::ibv_reg_mr_iova2(raw, page.as_ptr(), size.get(), address, access) };
        let Some(region) = NonNull::new(region) else {
            let error = io::Error::last_os_error();
            // SAFETY: the mapping is ours and is not registered.
            let _ = unsafe { munmap(page, size.get()) };
            return Err(failed(error));
        };
        Ok(Self { page: page.cast(), size, region, creator: Process::current(), domain: domain.clone() })
    }

    fn keys(&self) -> (Lkey, Rkey) {
        // SAFETY: the region is live while `self` is.
        unsafe { (Lkey((*self.region.as_ptr()).lkey), Rkey((*self.region.as_ptr()).rkey)) }
    }

    fn sge(&self) -> Sge<'_> {
        Sge::new(&self.domain, self.page.as_ptr().addr() as u64, 1, self.keys().0)
    }

    fn remote(&self) -> RemoteAddr {
        RemoteAddr { addr: self.page.as_ptr().addr() as u64, rkey: self.keys().1 }
    }

    fn get(&self) -> u8 {
        // SAFETY: the page is mapped. The device may write it, so the access is volatile.
        unsafe { self.page.as_ptr().read_volatile() }
    }

    fn set(&self, value: u8) {
        // SAFETY: as above.
        unsafe { self.page.as_ptr().write_volatile(value) }
    }
}

// SAFETY: any thread may use the page and the region; the page is only accessed as a volatile byte.
unsafe impl Send for Scratch {}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the region is live and is deregistered only here. The page is unmapped only if that
        // succeeded.
        unsafe {
            if !self.creator.is_current() {
                // The parent's, and so is the page.
            } else if ffi::ibv_dereg_mr(self.region.as_ptr()) == 0 {
                let _ = munmap(self.page.cast(), self.size.get());
            } else {
                let device = self.domain.context().device_name();
                tracing::warn!(device, "the page of a self-check stays registered");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_goes_through_a_port_that_carries_traffic() {
        let chosen = |states: &[bool]| {
            first_active(states.len() as u8, |port| Ok(states[usize::from(port) - 1])).unwrap()
        };
        assert_eq!(chosen(&[true, true]), 1);
        assert_eq!(chosen(&[false, true, true]), 2);
        assert_eq!(chosen(&[false, false]), 1);
        assert_eq!(chosen(&[]), 1);
    }
}
