//! Functions that an installed libibverbs or libmlx5 may be too old to have, found at run time.
//!
//! A program that calls `ibv_reg_dmabuf_mr` directly does not start on rdma-core 33, one that calls
//! `ibv_reg_mr_ex` does not even link on Debian 12. Each function here returns a function pointer
//! instead, or the value [`MissingSymbol`].
//!
//! | symbol | version | rdma-core |
//! |---|---|---|
//! | `ibv_reg_dmabuf_mr` | IBVERBS_1.12 | 34 |
//! | `ibv_reg_mr_ex`, `ibv_alloc_dmah`, `ibv_dealloc_dmah` | IBVERBS_1.15 | 59 |
//! | `ibv_dm_export_dmabuf_fd` | IBVERBS_1.16 | 62 |
//! | `ibv_alloc_buf`, `ibv_free_buf`, `ibv_reg_buf_mr` | IBVERBS_1.17 | 64 |
//! | `ibv_export_buf_dmabuf_fd` | IBVERBS_1.18 | 65 |
//! | `mlx5dv_reg_dmabuf_mr` | MLX5_1.25 | 54 |
//!
//! The library is in the process already (libibverbs, by linking `ibverbs-sys`) or is loaded by the
//! first question about it (libmlx5), and stays. An answer is kept in an atomic without a lock, so
//! any thread may ask, and a child of `fork` too.
//!
//! A function that is there says nothing about the device: a provider or kernel without the operation
//! makes it fail with EOPNOTSUPP.

use ibverbs_sys::{ibv_context, ibv_dm, ibv_mr, ibv_pd};
use std::error::Error;
use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A symbol that the installed library does not have in the version asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingSymbol {
    /// The symbol's name.
    pub symbol: &'static str,
    /// Its version in the library's map.
    pub version: &'static str,
    /// The first release that has it, such as `rdma-core 59`.
    pub needs: &'static str,
}

impl fmt::Display for MissingSymbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MissingSymbol { symbol, version, needs } = self;
        let library = match version.split_once('_') {
            Some(("MLX5", _)) => "libmlx5",
            Some(("RDMACM", _)) => "librdmacm",
            _ => "libibverbs",
        };
        write!(f, "{symbol}@{version} is not in this {library}; needs {needs}")
    }
}

impl Error for MissingSymbol {}

/// Of the library to be asked, the name that its soname link has.
const LIBIBVERBS: &CStr = c"libibverbs.so.1";
const LIBMLX5: &CStr = c"libmlx5.so.1";

/// A symbol and what is known of it: null before the first question, then its address or [`ABSENT`].
pub(crate) struct Symbol {
    library: &'static CStr,
    name: &'static CStr,
    version: &'static CStr,
    needs: &'static str,
    address: AtomicPtr<c_void>,
}

/// Stands for "looked for and not there" in [`Symbol::address`].
const ABSENT: *mut c_void = ptr::dangling_mut::<u8>().cast();

impl Symbol {
    pub(crate) const fn new(
        library: &'static CStr,
        name: &'static CStr,
        version: &'static CStr,
        needs: &'static str,
    ) -> Self {
        Symbol { library, name, version, needs, address: AtomicPtr::new(ptr::null_mut()) }
    }

    pub(crate) fn resolve(&self) -> Result<*mut c_void, MissingSymbol> {
        let mut address = self.address.load(Ordering::Acquire);
        if address.is_null() {
            // Two threads may both get here; they find the same.
            address = self.look_up();
            self.address.store(address, Ordering::Release);
        }
        if address == ABSENT {
            return Err(MissingSymbol {
                symbol: self.name.to_str().unwrap_or_default(),
                version: self.version.to_str().unwrap_or_default(),
                needs: self.needs,
            });
        }
        Ok(address)
    }

    fn look_up(&self) -> *mut c_void {
        // SAFETY: both strings end in NUL. The libraries named here have no constructors beyond
        // registering themselves with libibverbs, and are never unloaded, so neither is an address
        // found in them ever stale.
        let address = unsafe {
            let library = libc::dlopen(self.library.as_ptr(), libc::RTLD_NOW);
            if library.is_null() {
                return ABSENT;
            }
            libc::dlvsym(library, self.name.as_ptr(), self.version.as_ptr())
        };
        if address.is_null() { ABSENT } else { address }
    }
}

/// For each symbol the type of its function and the function that finds it.
macro_rules! symbols {
    ($(
        $(#[$doc:meta])*
        $library:ident $version:literal $needs:literal:
        fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?, $pointer:ident;
    )*) => {$(
        #[doc = concat!("The type of `", stringify!($name), "`.")]
        pub type $pointer = unsafe extern "C" fn($($arg: $type),*) $(-> $result)?;

        $(#[$doc])*
        ///
        /// # Errors
        #[doc = concat!("[`MissingSymbol`] without version ", $version, " of the symbol (", $needs, ").")]
        pub fn $name() -> Result<$pointer, MissingSymbol> {
            const fn c_str(bytes: &'static [u8]) -> &'static CStr {
                match CStr::from_bytes_with_nul(bytes) {
                    Ok(string) => string,
                    Err(_) => panic!("at compile time only: a NUL inside a literal"),
                }
            }
            static SYMBOL: Symbol = Symbol::new(
                $library,
                const { c_str(concat!(stringify!($name), "\0").as_bytes()) },
                const { c_str(concat!($version, "\0").as_bytes()) },
                $needs,
            );
            // SAFETY: a symbol of this name and version has this type: versions exist so that
            // neither library can change it.
            SYMBOL.resolve().map(|address| unsafe {
                std::mem::transmute::<*mut c_void, $pointer>(address)
            })
        }
    )*};
}

pub(crate) use symbols;

symbols! {
    /// Registers `length` bytes of the dma-buf `fd` from `offset` on, through the provider.
    ///
    /// The result is null with errno set on failure: EOPNOTSUPP where the provider lacks it. Its
    /// `addr` field is `offset`, not `iova`: keep the iova yourself.
    LIBIBVERBS "IBVERBS_1.12" "rdma-core 34":
    fn ibv_reg_dmabuf_mr(
        pd: *mut ibv_pd, offset: u64, length: usize, iova: u64, fd: c_int, access: c_int
    ) -> *mut ibv_mr, RegDmabufMrFn;

    /// Registers memory or a dma-buf as described by [`ibv_mr_init_attr`].
    ///
    /// The result is null with errno set on failure. For a dma-buf its `addr` field is the offset,
    /// not the iova.
    LIBIBVERBS "IBVERBS_1.15" "rdma-core 59":
    fn ibv_reg_mr_ex(pd: *mut ibv_pd, attr: *mut ibv_mr_init_attr) -> *mut ibv_mr, RegMrExFn;

    /// Allocates a DMA handle: TPH processing hints for the registrations that name it.
    ///
    /// The result is null with errno set on failure; [`ibv_dealloc_dmah`] frees it.
    LIBIBVERBS "IBVERBS_1.15" "rdma-core 59":
    fn ibv_alloc_dmah(
        context: *mut ibv_context, attr: *mut ibv_dmah_init_attr
    ) -> *mut ibv_dmah, AllocDmahFn;

    /// Frees a DMA handle. The result is 0 or an errno.
    LIBIBVERBS "IBVERBS_1.15" "rdma-core 59":
    fn ibv_dealloc_dmah(dmah: *mut ibv_dmah) -> c_int, DeallocDmahFn;

    /// Exports device memory as a dma-buf.
    ///
    /// The result is a new descriptor that the caller owns, or -1 with errno set.
    LIBIBVERBS "IBVERBS_1.16" "rdma-core 62":
    fn ibv_dm_export_dmabuf_fd(dm: *mut ibv_dm) -> c_int, DmExportDmabufFdFn;

    /// Allocates a buffer in the way the protection domain's provider prefers.
    ///
    /// The result is its page-aligned address, or null with errno set; `*buf` is the handle for
    /// [`ibv_free_buf`].
    LIBIBVERBS "IBVERBS_1.17" "rdma-core 64":
    fn ibv_alloc_buf(
        pd: *mut ibv_pd, size: usize, buf: *mut *mut ibv_buf
    ) -> *mut c_void, AllocBufFn;

    /// Frees a buffer of [`ibv_alloc_buf`].
    LIBIBVERBS "IBVERBS_1.17" "rdma-core 64":
    fn ibv_free_buf(buf: *mut ibv_buf), FreeBufFn;

    /// Registers `length` bytes from `addr` on, inside a buffer of [`ibv_alloc_buf`].
    ///
    /// The result is null with errno set on failure.
    LIBIBVERBS "IBVERBS_1.17" "rdma-core 64":
    fn ibv_reg_buf_mr(
        pd: *mut ibv_pd, buf: *mut ibv_buf, addr: *mut c_void, length: usize, access: c_int
    ) -> *mut ibv_mr, RegBufMrFn;

    /// Exports a buffer of [`ibv_alloc_buf`] as a dma-buf.
    ///
    /// The result is a new descriptor that the caller owns, or -1 with errno set.
    LIBIBVERBS "IBVERBS_1.18" "rdma-core 65":
    fn ibv_export_buf_dmabuf_fd(buf: *mut ibv_buf) -> c_int, ExportBufDmabufFdFn;

    /// Registers a dma-buf on an mlx5 device with flags of its own
    /// ([`MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT`]).
    ///
    /// The result is null with errno set on failure. The protection domain must be of an mlx5
    /// device. The question loads libmlx5.so.1.
    LIBMLX5 "MLX5_1.25" "rdma-core 54":
    fn mlx5dv_reg_dmabuf_mr(
        pd: *mut ibv_pd, offset: u64, length: usize, iova: u64, fd: c_int, access: c_int,
        mlx5_access: c_int
    ) -> *mut ibv_mr, Mlx5dvRegDmabufMrFn;
}

/// For [`mlx5dv_reg_dmabuf_mr`]: use the device's data-direct PCI function.
pub const MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT: c_int = 1 << 0;

/// [`ibv_mr_init_attr::iova`] is set.
pub const IBV_REG_MR_MASK_IOVA: u64 = 1 << 0;
/// [`ibv_mr_init_attr::addr`] is set.
pub const IBV_REG_MR_MASK_ADDR: u64 = 1 << 1;
/// [`ibv_mr_init_attr::fd`] is set.
pub const IBV_REG_MR_MASK_FD: u64 = 1 << 2;
/// [`ibv_mr_init_attr::fd_offset`] is set.
pub const IBV_REG_MR_MASK_FD_OFFSET: u64 = 1 << 3;
/// [`ibv_mr_init_attr::dmah`] is set.
pub const IBV_REG_MR_MASK_DMAH: u64 = 1 << 4;
/// [`ibv_mr_init_attr::buf`] is set (rdma-core 64).
pub const IBV_REG_MR_MASK_BUF: u64 = 1 << 5;

/// What [`ibv_reg_mr_ex`] registers: memory (`addr`) or a dma-buf (`fd`, `fd_offset` and `iova`).
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ibv_mr_init_attr {
    /// Bytes.
    pub length: usize,
    /// `ibv_access_flags`.
    pub access: c_int,
    /// `IBV_REG_MR_MASK_*`: which of the fields below are set.
    pub comp_mask: u64,
    /// Address of the first byte in work requests and on the wire.
    pub iova: u64,
    /// First byte of the memory.
    pub addr: *mut c_void,
    /// The dma-buf.
    pub fd: c_int,
    /// First byte of the range in the dma-buf.
    pub fd_offset: u64,
    /// A DMA handle of [`ibv_alloc_dmah`].
    pub dmah: *mut ibv_dmah,
    /// A buffer of [`ibv_alloc_buf`], in which `addr` lies.
    pub buf: *mut ibv_buf,
}

/// A DMA handle, made by [`ibv_alloc_dmah`].
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ibv_dmah {
    /// The device it belongs to.
    pub context: *mut ibv_context,
}

/// [`ibv_dmah_init_attr::cpu_id`] is set.
pub const IBV_DMAH_INIT_ATTR_MASK_CPU_ID: u32 = 1 << 0;
/// [`ibv_dmah_init_attr::ph`] is set.
pub const IBV_DMAH_INIT_ATTR_MASK_PH: u32 = 1 << 1;
/// [`ibv_dmah_init_attr::tph_mem_type`] is set.
pub const IBV_DMAH_INIT_ATTR_MASK_TPH_MEM_TYPE: u32 = 1 << 2;
/// Volatile memory, for [`ibv_dmah_init_attr::tph_mem_type`].
pub const IBV_TPH_MEM_TYPE_VM: u8 = 0;
/// Persistent memory, for [`ibv_dmah_init_attr::tph_mem_type`].
pub const IBV_TPH_MEM_TYPE_PM: u8 = 1;

/// What [`ibv_alloc_dmah`] allocates.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ibv_dmah_init_attr {
    /// `IBV_DMAH_INIT_ATTR_MASK_*`: which of the fields below are set.
    pub comp_mask: u32,
    /// The CPU whose cache the data should go to.
    pub cpu_id: u32,
    /// PCIe processing hint, 0 to 3.
    pub ph: u8,
    /// `IBV_TPH_MEM_TYPE_*`.
    pub tph_mem_type: u8,
}

/// A buffer of [`ibv_alloc_buf`]; libibverbs keeps its contents to itself.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug)]
pub struct ibv_buf {
    _private: [u8; 0],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbol_that_is_there_is_the_one_the_linker_finds() {
        for _ in 0..2 {
            let found = ibv_reg_dmabuf_mr().unwrap();
            let linked: RegDmabufMrFn = ibverbs_sys::ibv_reg_dmabuf_mr;
            assert_eq!(found as usize, linked as usize);
        }
    }

    #[test]
    fn a_version_that_does_not_exist_is_a_value() {
        let symbol = Symbol::new(LIBIBVERBS, c"ibv_reg_mr", c"IBVERBS_9.9", "rdma-core 999");
        let missing = MissingSymbol { symbol: "ibv_reg_mr", version: "IBVERBS_9.9", needs: "rdma-core 999" };
        for _ in 0..2 {
            assert_eq!(symbol.resolve(), Err(missing));
        }
        assert_eq!(
            missing.to_string(),
            "ibv_reg_mr@IBVERBS_9.9 is not in this libibverbs; needs rdma-core 999"
        );
    }

    #[test]
    fn the_version_decides_and_not_the_name_alone() {
        let [old, new] = [c"IBVERBS_1.0", c"IBVERBS_1.1"]
            .map(|version| Symbol::new(LIBIBVERBS, c"ibv_reg_mr", version, "rdma-core 1").resolve().unwrap());
        assert_ne!(old, new);
    }

    #[test]
    fn libmlx5_is_loaded_when_asked_for() {
        let symbol = Symbol::new(LIBMLX5, c"mlx5dv_init_obj", c"MLX5_1.2", "rdma-core 14");
        symbol.resolve().unwrap();
        let symbol = Symbol::new(LIBMLX5, c"mlx5dv_nonsense", c"MLX5_1.25", "rdma-core 54");
        assert_eq!(
            symbol.resolve().unwrap_err().to_string(),
            "mlx5dv_nonsense@MLX5_1.25 is not in this libmlx5; needs rdma-core 54"
        );
    }

    #[test]
    fn a_library_that_is_not_installed_is_a_missing_symbol() {
        let symbol = Symbol::new(c"libnonsense.so.1", c"f", c"V_1", "nothing");
        assert_eq!(symbol.resolve().unwrap_err().symbol, "f");
    }

    #[test]
    fn names_and_versions_of_the_table() {
        // Whatever the installed libraries have: an answer is a function or names itself rightly.
        let missing = [
            ibv_reg_mr_ex().err(),
            ibv_alloc_dmah().err(),
            ibv_dealloc_dmah().err(),
            ibv_dm_export_dmabuf_fd().err(),
            ibv_alloc_buf().err(),
            ibv_free_buf().err(),
            ibv_reg_buf_mr().err(),
            ibv_export_buf_dmabuf_fd().err(),
            mlx5dv_reg_dmabuf_mr().err(),
        ];
        let table = [
            ("ibv_reg_mr_ex", "IBVERBS_1.15", "rdma-core 59"),
            ("ibv_alloc_dmah", "IBVERBS_1.15", "rdma-core 59"),
            ("ibv_dealloc_dmah", "IBVERBS_1.15", "rdma-core 59"),
            ("ibv_dm_export_dmabuf_fd", "IBVERBS_1.16", "rdma-core 62"),
            ("ibv_alloc_buf", "IBVERBS_1.17", "rdma-core 64"),
            ("ibv_free_buf", "IBVERBS_1.17", "rdma-core 64"),
            ("ibv_reg_buf_mr", "IBVERBS_1.17", "rdma-core 64"),
            ("ibv_export_buf_dmabuf_fd", "IBVERBS_1.18", "rdma-core 65"),
            ("mlx5dv_reg_dmabuf_mr", "MLX5_1.25", "rdma-core 54"),
        ];
        for (missing, (symbol, version, needs)) in missing.into_iter().zip(table) {
            let expected = MissingSymbol { symbol, version, needs };
            assert!(missing.is_none_or(|missing| missing == expected));
        }
    }
}
