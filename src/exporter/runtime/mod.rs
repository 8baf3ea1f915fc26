//! From a pointer to the dma-buf behind it, by the runtime that allocated the memory.
//!
//! ```no_run
//! use dmabuf_rdma::exporter::{Runtime, Runtimes};
//! use dmabuf_rdma::mr::MemoryRegion;
//! # use dmabuf_rdma::verbs::ProtectionDomain;
//! # fn register(domain: &ProtectionDomain, address: u64, length: u64) -> dmabuf_rdma::Result<()> {
//! for part in Runtimes::loaded()?.export_at(address, length)? {
//!     let region = MemoryRegion::builder(domain, &part.dmabuf).range(part.range()).register()?;
//! }
//! # Ok(())
//! # }
//! ```

mod exported;
mod info;

use std::fmt;

use super::{Error, PointerError};
#[cfg(any(feature = "hsa", feature = "level-zero"))]
use crate::dmabuf::DmaBuf;

#[cfg(feature = "cuda")]
pub(super) use exported::Witness;
pub use exported::{ExportOptions, ExportedRange, Extent};
pub use info::{MemoryKind, PointerInfo};

type Result<T, E = PointerError> = std::result::Result<T, E>;

/// A runtime that allocates device memory and identifies an allocation by a pointer into it.
///
/// An address is one that the runtime's allocator returned, or any inside the allocation. Nothing is read
/// or written through it.
pub trait Runtime: fmt::Debug + Send + Sync {
    /// The runtime's name: `CUDA`, `ROCm`, `Level Zero`.
    fn name(&self) -> &'static str;

    /// Looks up an address; `None` if the runtime has no allocation there.
    ///
    /// # Errors
    /// - [`PointerError::NullPointer`].
    /// - [`PointerError::RuntimeCall`]: the runtime failed. An unknown address is not a failure.
    fn find(&self, address: u64) -> Result<Option<PointerInfo>>;

    /// Exports `length` bytes from the address that was looked up: usually one range; without gaps and in order if the
    /// driver exports each mapping by itself.
    ///
    /// # Errors
    /// - [`PointerError::Range`], [`PointerError::PastAllocation`]: `length` is 0, or too long.
    /// - [`PointerError::WrongKind`]: host and managed memory is not exported.
    /// - [`PointerError::Freed`]: the allocation is no longer the one that was looked up.
    /// - [`PointerError::NotExportable`]: the device or its driver does not export this memory.
    /// - [`PointerError::OutOfDescriptors`] (`EMFILE`, `ENFILE`).
    /// - [`PointerError::InvalidAnswer`]: the runtime returned success with numbers that cannot be true.
    /// - [`PointerError::RuntimeCall`]: the runtime failed otherwise.
    fn export(&self, info: &PointerInfo, length: u64, options: ExportOptions) -> Result<Vec<ExportedRange>>;

    /// Makes what NICs have written into the memory visible to work that the device starts afterwards, with the
    /// runtime's own call. False if the runtime has none for this device; then
    /// [`Receiver::flush`](crate::transfer::Receiver::flush) does it through the NIC.
    ///
    /// # Errors
    /// [`PointerError::RuntimeCall`]: the runtime failed.
    fn flush(&self, info: &PointerInfo) -> Result<bool> {
        let _ = info;
        Ok(false)
    }

    /// Looks up an address that has to be the runtime's.
    ///
    /// # Errors
    /// [`PointerError::ForeignPointer`]: the runtime has no allocation there. Otherwise as [`find`](Self::find).
    fn locate(&self, address: u64) -> Result<PointerInfo> {
        let foreign = || PointerError::ForeignPointer { runtime: self.name(), address };
        self.find(address)?.ok_or_else(foreign)
    }

    /// Looks up an address and exports `length` bytes from it, with the default options.
    ///
    /// # Errors
    /// As [`locate`](Self::locate) and [`export`](Self::export).
    fn export_at(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>> {
        self.export(&self.locate(address)?, length, ExportOptions::default())
    }
}

/// All runtimes that may have allocated a pointer.
#[derive(Debug, Default)]
pub struct Runtimes {
    all: Vec<Box<dyn Runtime>>,
}

impl Runtimes {
    /// The runtimes of the features `cuda`, `hsa` and `level-zero` whose library this process has loaded.
    ///
    /// A runtime that is not loaded cannot have allocated a pointer, so this loads none. A runtime without
    /// a device is left out.
    ///
    /// # Errors
    /// As the `load` functions of the runtimes.
    pub fn loaded() -> Result<Self, Error> {
        #[allow(unused_mut)]
        let mut all: Vec<Box<dyn Runtime>> = Vec::new();
        #[cfg(feature = "cuda")]
        Self::add(&mut all, super::Cuda::if_loaded())?;
        #[cfg(feature = "hsa")]
        Self::add(&mut all, super::Hsa::if_loaded())?;
        #[cfg(feature = "level-zero")]
        Self::add(&mut all, super::LevelZero::if_loaded())?;
        Ok(Self { all })
    }

    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    fn add<R: Runtime + 'static>(
        all: &mut Vec<Box<dyn Runtime>>,
        runtime: Result<Option<R>, Error>,
    ) -> Result<(), Error> {
        match runtime {
            Ok(runtime) => all.extend(runtime.map(|runtime| Box::new(runtime) as Box<dyn Runtime>)),
            // Without a device it has no memory that a pointer could be in.
            Err(Error::Pointer(PointerError::NoDevice { .. })) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// These runtimes, asked in this order. They may be implemented outside this crate.
    pub fn new(all: Vec<Box<dyn Runtime>>) -> Self {
        Self { all }
    }

    /// The names of the runtimes, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.all.iter().map(|runtime| runtime.name())
    }

    fn named(&self, name: &str) -> Option<&dyn Runtime> {
        self.all.iter().map(AsRef::as_ref).find(|runtime| runtime.name() == name)
    }
}

/// Each function asks the runtime that allocated the memory.
impl Runtime for Runtimes {
    /// Stands for all of them; [`PointerInfo::runtime`] is the name of one.
    fn name(&self) -> &'static str {
        "every loaded runtime"
    }

    /// Looks up an address; `None` if no runtime has an allocation there, as for ordinary host memory.
    fn find(&self, address: u64) -> Result<Option<PointerInfo>> {
        not_null(address)?;
        for runtime in &self.all {
            if let Some(info) = runtime.find(address)? {
                return Ok(Some(info));
            }
        }
        Ok(None)
    }

    fn export(&self, info: &PointerInfo, length: u64, options: ExportOptions) -> Result<Vec<ExportedRange>> {
        let (runtime, address) = (info.runtime, info.address);
        let foreign = || PointerError::ForeignPointer { runtime, address };
        self.named(runtime).ok_or_else(foreign)?.export(info, length, options)
    }

    fn flush(&self, info: &PointerInfo) -> Result<bool> {
        self.named(info.runtime).map_or(Ok(false), |runtime| runtime.flush(info))
    }

    /// # Errors
    /// [`PointerError::WrongKind`]: no runtime has an allocation there, so it is host memory.
    fn locate(&self, address: u64) -> Result<PointerInfo> {
        let host = || PointerError::WrongKind { runtime: None, address, kind: MemoryKind::Host };
        self.find(address)?.ok_or_else(host)
    }
}

/// A runtime that can export what it has just looked up, without asking again whether it is alive.
#[cfg(any(feature = "hsa", feature = "level-zero"))]
pub(super) trait ExportFound: Runtime {
    /// Exports memory that was looked up, and checked, a moment ago.
    fn export_found(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>>;

    /// [`Runtime::export`] for a look-up of any age. Such runtimes export whole allocations, in one way.
    fn export_checked(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>> {
        info.check(length)?;
        info.check_alive(self.find(info.address)?)?;
        self.export_found(info, length)
    }

    /// [`Runtime::export_at`] with one look-up.
    fn find_and_export(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>> {
        let info = self.locate(address)?;
        info.check(length)?;
        self.export_found(&info, length)
    }
}

/// A range of a dma-buf of a whole allocation, in which the runtime reports the address at `offset`.
#[cfg(any(feature = "hsa", feature = "level-zero"))]
pub(super) fn allocation_in(
    info: &PointerInfo,
    dmabuf: DmaBuf,
    offset: u64,
    length: u64,
    call: &'static str,
) -> Result<ExportedRange> {
    let size = dmabuf.size();
    let impossible = |_| {
        let what = format!("offset {offset} in a dma-buf of {size} bytes for {length} bytes");
        PointerError::InvalidAnswer { runtime: info.runtime, call, what }
    };
    let range = ExportedRange::new(dmabuf, offset..offset.saturating_add(length)).map_err(impossible)?;
    // `PointerInfo::check` has compared the address with the base.
    let start = offset.saturating_sub(info.address - info.base);
    range.with_memory(start..start.saturating_add(info.size).min(size)).map_err(impossible)
}

pub(super) fn not_null(address: u64) -> Result<()> {
    if address == 0 { Err(PointerError::NullPointer) } else { Ok(()) }
}

/// The whole pages around `length` bytes from `address`: their first byte and length. CUDA exports whole
/// pages of the host, which may be 64 KiB.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) fn pages_around(address: u64, length: u64, page: u64) -> Option<(u64, u64)> {
    let start = address - address % page;
    let end = address.checked_add(length)?.checked_next_multiple_of(page)?;
    Some((start, end - start))
}

#[cfg(test)]
mod tests {
    use dma_sg::RangeError;

    use super::*;

    const INFO: PointerInfo = PointerInfo {
        runtime: "test",
        address: 0x7f00_0010_2000,
        base: 0x7f00_0010_0000,
        size: 1 << 20,
        kind: MemoryKind::Device,
        id: Some(7),
        device: None,
    };

    #[test]
    fn exports_are_of_whole_pages_of_any_size() {
        assert_eq!(pages_around(0x10_0200, 0x200, 4096), Some((0x10_0000, 4096)));
        assert_eq!(pages_around(0x10_0000, 0x1000, 4096), Some((0x10_0000, 4096)));
        assert_eq!(pages_around(0x10_fe00, 0x400, 4096), Some((0x10_f000, 8192)));
        assert_eq!(pages_around(0x11_1200, 0x200, 64 << 10), Some((0x11_0000, 64 << 10)));
        assert_eq!(pages_around(0x11_f000, 0x2000, 64 << 10), Some((0x11_0000, 128 << 10)));
        assert_eq!(pages_around(u64::MAX - 10, 100, 4096), None);
    }

    #[test]
    fn ranges_end_inside_the_allocation() {
        assert!(INFO.check((1 << 20) - 0x2000).is_ok());
        assert_error!(INFO.check((1 << 20) - 0x1fff), PointerError::PastAllocation { size: 0x10_0000, .. });
        assert_error!(INFO.check(u64::MAX), PointerError::PastAllocation { .. });
        assert_error!(INFO.check(0), PointerError::Range(RangeError::Empty { offset: 0x2000 }));
        let host = PointerInfo { kind: MemoryKind::Host, ..INFO };
        let refused = host.check(1);
        assert_error!(refused, PointerError::WrongKind { runtime: Some("test"), kind: MemoryKind::Host, .. });
        let managed = PointerInfo { kind: MemoryKind::Managed, ..INFO };
        assert_error!(managed.check(1), PointerError::WrongKind { kind: MemoryKind::Managed, .. });
    }

    /// A driver may answer anything.
    #[test]
    fn numbers_that_cannot_be_true_are_named() {
        for (base, size) in [(INFO.address + 1, 4096), (INFO.base, 0), (INFO.base, 0x2000), (0, 4096)] {
            let error = PointerInfo { base, size, ..INFO }.check(1).unwrap_err();
            assert!(matches!(error, PointerError::InvalidAnswer { runtime: "test", .. }), "{error:?}");
            assert!(error.to_string().contains(&format!("{size} bytes from {base:#x}")), "{error}");
        }
    }

    /// What passes the check can be subtracted and added without overflow.
    #[test]
    fn any_numbers_of_a_runtime_are_accepted_or_refused() {
        let edges = [0, 1, 2, 4095, 4096, 1 << 63, u64::MAX - 1, u64::MAX];
        for address in edges {
            for base in edges {
                for size in edges {
                    for length in edges {
                        let info = PointerInfo { address, base, size, ..INFO };
                        let inside = length > 0
                            && address >= base
                            && u128::from(address - base) + u128::from(length) <= size.into()
                            && address.checked_add(length).is_some();
                        let answer = info.check(length);
                        assert_eq!(answer.is_ok(), inside, "{info:?}, {length}: {answer:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn another_allocation_at_the_same_address_is_another() {
        assert!(INFO.check_alive(Some(INFO)).is_ok());
        let other = PointerInfo { id: Some(8), ..INFO };
        assert_error!(INFO.check_alive(Some(other)), PointerError::Freed { .. });
        assert_error!(INFO.check_alive(None), PointerError::Freed { .. });
    }

    #[test]
    fn an_address_of_no_runtime_is_host_memory() {
        let none = Runtimes::new(Vec::new());
        assert_eq!(none.find(0x1000).unwrap(), None);
        assert_error!(none.find(0), PointerError::NullPointer);
        let error = none.export_at(0x1000, 1).unwrap_err().to_string();
        assert!(error.contains("0x1000 is host memory, which") && error.contains("udmabuf"), "{error}");
    }
}
