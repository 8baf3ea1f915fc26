//! Whether a device really reaches what it registered: a few bytes, over a queue pair that is connected to
//! itself.
//!
//! `unsafe` is here for a page of scratch memory: it is mapped and registered here, and read and written
//! with volatile access only, since the device does so too.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::time::Duration;

use ibverbs_sys as ffi;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::{Access, Lkey, MemoryRegion, Rkey};
use crate::error::RegistrationError;
use crate::transfer::RemoteAddr;
use crate::umem::page_size;
use crate::verbs::{CompletionQueue, Operation, ProtectionDomain, QueuePair, QueuePairOptions, Sge};
use crate::{Error, Result};

/// Longest time that one byte takes, retries included.
const LIMIT: Duration = Duration::from_secs(10);

/// Checks the first and the last byte of each region, all of which are in this domain.
pub(super) fn check(domain: &ProtectionDomain, regions: &[MemoryRegion]) -> Result<()> {
    let loopback = Loopback::new(domain)?;
    for region in regions {
        loopback.check_byte(region, 0)?;
        if region.len() > 1 {
            loopback.check_byte(region, region.len() - 1)?;
        }
    }
    Ok(())
}

/// A queue pair connected to itself, and one byte for its other end.
struct Loopback {
    // Destroyed before the scratch memory goes.
    pair: QueuePair,
    queue: CompletionQueue,
    scratch: Scratch,
}

impl Loopback {
    fn new(domain: &ProtectionDomain) -> Result<Self> {
        let scratch = Scratch::new(domain)?;
        let queue = CompletionQueue::new(domain.context(), 4)?;
        let options = QueuePairOptions { send_depth: 4, recv_depth: 1, max_sge: 1, ..Default::default() };
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
        // Also when that was not what it should be.
        let restored = self.write(region, offset, before);
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
        Err(RegistrationError::SelfCheckMismatch { device, path, offset, wrote, read }.into())
    }

    /// By the region's remote key where that permits it, else by its local one.
    fn read(&self, region: &MemoryRegion, offset: u64) -> Result<u8> {
        self.scratch.set(0);
        let ended = if region.access().contains(Access::REMOTE_READ) {
            self.transfer(Operation::Read { remote: region.remote().at(offset, 1)? }, self.scratch.sge())
        } else {
            self.transfer(Operation::Write { remote: self.scratch.remote() }, region.sge(offset, 1)?)
        };
        ended.map_err(failed(region, "reading", offset))?;
        Ok(self.scratch.get())
    }

    fn write(&self, region: &MemoryRegion, offset: u64, value: u8) -> Result<()> {
        self.scratch.set(value);
        let ended = if region.access().contains(Access::REMOTE_WRITE) {
            self.transfer(Operation::Write { remote: region.remote().at(offset, 1)? }, self.scratch.sge())
        } else {
            self.transfer(Operation::Read { remote: self.scratch.remote() }, region.sge(offset, 1)?)
        };
        ended.map_err(failed(region, "writing", offset))
    }

    fn transfer(&self, operation: Operation, element: Sge<'_>) -> Result<()> {
        self.pair.post(0, operation, &[element], true)?;
        self.queue.wait(LIMIT)?.success().map(drop)
    }
}

fn failed(region: &MemoryRegion, step: &'static str, offset: u64) -> impl FnOnce(Error) -> Error {
    let (device, path) = (region.domain().context().device_name().into(), region.path());
    move |error| RegistrationError::SelfCheck { device, path, step, offset, source: Box::new(error) }.into()
}

/// A page of our own, registered.
struct Scratch {
    page: NonNull<u8>,
    size: NonZeroUsize,
    region: NonNull<ffi::ibv_mr>,
    // Dropped after the region.
    domain: ProtectionDomain,
}

impl Scratch {
    fn new(domain: &ProtectionDomain) -> Result<Self> {
        let failed = |source: io::Error| Error::Verbs {
            device: domain.context().device_name().into(),
            operation: "register a page for the self-check".into(),
            source,
        };
        let size = NonZeroUsize::new(page_size() as usize).expect("pages have bytes");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE) }
            .map_err(|errno| failed(errno.into()))?;
        let access = (Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE).bits();
        let (raw, address) = (domain.as_raw().as_ptr(), page.as_ptr().addr() as u64);
        // SAFETY: the domain is live and the page is mapped until the region is gone.
        let region = unsafe { ffi::ibv_reg_mr_iova2(raw, page.as_ptr(), size.get(), address, access) };
        let Some(region) = NonNull::new(region) else {
            let error = io::Error::last_os_error();
            // SAFETY: the mapping is ours, and nothing was registered of it.
            let _ = unsafe { munmap(page, size.get()) };
            return Err(failed(error));
        };
        Ok(Self { page: page.cast(), size, region, domain: domain.clone() })
    }

    fn keys(&self) -> (Lkey, Rkey) {
        // SAFETY: the region is live as long as `self` is.
        unsafe { (Lkey((*self.region.as_ptr()).lkey), Rkey((*self.region.as_ptr()).rkey)) }
    }

    fn sge(&self) -> Sge<'_> {
        Sge::new(self.page.as_ptr().addr() as u64, 1, self.keys().0)
    }

    fn remote(&self) -> RemoteAddr {
        RemoteAddr { addr: self.page.as_ptr().addr() as u64, rkey: self.keys().1 }
    }

    fn get(&self) -> u8 {
        // SAFETY: the page is mapped; the device may write it, hence volatile.
        unsafe { self.page.as_ptr().read_volatile() }
    }

    fn set(&self, value: u8) {
        // SAFETY: as above.
        unsafe { self.page.as_ptr().write_volatile(value) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the region is live, deregistered here only, and of this page, which goes after it; where
        // it stands the page stays too.
        unsafe {
            if ffi::ibv_dereg_mr(self.region.as_ptr()) == 0 {
                let _ = munmap(self.page.cast(), self.size.get());
            } else {
                let device = self.domain.context().device_name();
                tracing::warn!(device, "the page of a self-check stays registered");
            }
        }
    }
}
