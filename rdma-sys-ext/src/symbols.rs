//! Functions that the installed libibverbs or libmlx5 may be too old to have, looked up at run time.
//!
//! A program that calls `ibv_reg_dmabuf_mr` directly does not start on rdma-core 33. One that calls
//! `ibv_reg_mr_ex` does not even link on Debian 12. Each function here instead returns a function
//! pointer or a [`SymbolError`].
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
//! The process has loaded libibverbs already, since `ibverbs-sys` links it. The first lookup in libmlx5
//! loads that library. Both stay loaded. What a loaded library has or lacks is kept in an atomic, without a
//! lock, so any thread may look up a symbol, and so may a child after `fork`. A load that failed is tried
//! again by the next lookup: its reason may pass.
//!
//! That a function exists says nothing about the device: with a provider or kernel that lacks the
//! operation it fails with EOPNOTSUPP.

use ibverbs_sys::{ibv_context, ibv_dm, ibv_mr, ibv_pd};
use std::error::Error;
use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::fs::File;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Why a function of a library is not available.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SymbolError {
    /// The library is loaded and lacks the symbol in the requested version.
    Missing {
        /// The symbol's name.
        symbol: &'static str,
        /// Its version in the library's version map.
        version: &'static str,
        /// The first release that has the symbol, such as `rdma-core 59`.
        needs: &'static str,
    },
    /// The library cannot be loaded. The next lookup tries again.
    NotLoaded {
        /// The library's soname.
        library: &'static str,
        /// The loader's message.
        reason: String,
        /// `EMFILE` or `ENFILE` if there was no free file descriptor; otherwise `None`, because the loader
        /// does not report the errno.
        errno: Option<i32>,
    },
}

impl fmt::Display for SymbolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { symbol, version, needs } => {
                let library = match version.split_once('_') {
                    Some(("MLX5", _)) => "libmlx5",
                    Some(("RDMACM", _)) => "librdmacm",
                    _ => "libibverbs",
                };
                write!(f, "{symbol}@{version} is not in this {library}; needs {needs}")
            }
            Self::NotLoaded { library, errno: Some(_), .. } => {
                write!(
                    f,
                    "{library} cannot be loaded now: there is no free file descriptor; close some or raise ulimit -n"
                )
            }
            Self::NotLoaded { library, reason, .. } => write!(f, "{library} cannot be loaded: {reason}"),
        }
    }
}

impl Error for SymbolError {}

/// Keeps the errno, if there is one.
impl From<SymbolError> for io::Error {
    fn from(error: SymbolError) -> Self {
        match error {
            SymbolError::NotLoaded { errno: Some(errno), .. } => io::Error::from_raw_os_error(errno),
            other => io::Error::other(other),
        }
    }
}

// Sonames, which exist without the development packages.
const LIBIBVERBS: &CStr = c"libibverbs.so.1";
const LIBMLX5: &CStr = c"libmlx5.so.1";

/// A symbol, with its address, or [`ABSENT`] if its library lacks it; null while its library is not loaded.
pub(crate) struct Symbol {
    library: &'static CStr,
    name: &'static CStr,
    version: &'static CStr,
    needs: &'static str,
    address: AtomicPtr<c_void>,
}

/// [`Symbol::address`] of a symbol that the library lacks.
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

    pub(crate) fn resolve(&self) -> Result<*mut c_void, SymbolError> {
        let mut address = self.address.load(Ordering::Acquire);
        if address.is_null() {
            // Two threads may both look up the symbol; they get the same result.
            address = self.look_up()?;
            self.address.store(address, Ordering::Release);
        }
        if address == ABSENT {
            return Err(SymbolError::Missing {
                symbol: self.name.to_str().unwrap_or_default(),
                version: self.version.to_str().unwrap_or_default(),
                needs: self.needs,
            });
        }
        Ok(address)
    }

    fn look_up(&self) -> Result<*mut c_void, SymbolError> {
        // SAFETY: the name ends in NUL. The constructors of these libraries only register them with libibverbs.
        let library = unsafe { libc::dlopen(self.library.as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return Err(self.not_loaded());
        }
        // SAFETY: both strings end in NUL. The library is never unloaded, so its addresses stay valid.
        let address = unsafe { libc::dlvsym(library, self.name.as_ptr(), self.version.as_ptr()) };
        Ok(if address.is_null() { ABSENT } else { address })
    }

    /// The error for a load that has just failed in this thread.
    fn not_loaded(&self) -> SymbolError {
        // SAFETY: takes nothing.
        let message = unsafe { libc::dlerror() };
        let reason = match message.is_null() {
            // SAFETY: the message is this thread's own and ends in NUL. It lives until the next call of the loader.
            false => unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned(),
            true => String::new(),
        };
        // The message has the errno only in words, which are translated and may be those of another attempt.
        let exhausted = File::open("/dev/null").err().and_then(|error| error.raw_os_error());
        let errno = exhausted.filter(|errno| matches!(*errno, libc::EMFILE | libc::ENFILE));
        SymbolError::NotLoaded { library: self.library.to_str().unwrap_or_default(), reason, errno }
    }
}

/// Defines, for each symbol, its function type and the function that looks it up.
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
        #[doc = concat!("[`SymbolError::Missing`](crate::symbols::SymbolError::Missing): the library is older than ", $needs, " (", $version, ").")]
        /// [`SymbolError::NotLoaded`](crate::symbols::SymbolError::NotLoaded): it cannot be loaded.
        pub fn $name() -> Result<$pointer, $crate::symbols::SymbolError> {
            const fn c_str(bytes: &'static [u8]) -> &'static CStr {
                match CStr::from_bytes_with_nul(bytes) {
                    Ok(string) => string,
                    Err(_) => panic!("compile time: a literal contains a NUL"),
                }
            }
            static SYMBOL: Symbol = Symbol::new(
                $library,
                const { c_str(concat!(stringify!($name), "\0").as_bytes()) },
                const { c_str(concat!($version, "\0").as_bytes()) },
                $needs,
            );
            // SAFETY: a symbol of this name and version has this type; a library that changes the type
            // must change the version.
            SYMBOL.resolve().map(|address| unsafe {
                std::mem::transmute::<*mut c_void, $pointer>(address)
            })
        }
    )*};
}

pub(crate) use symbols;

symbols! {
    /// Registers `length` bytes of the dma-buf `fd`, starting at `offset`, through the provider.
    ///
    /// On failure the result is null with errno set; EOPNOTSUPP: the provider lacks the operation. The
    /// `addr` field of the result is `offset`, not `iova`, so keep the iova yourself.
    LIBIBVERBS "IBVERBS_1.12" "rdma-core 34":
    fn ibv_reg_dmabuf_mr(
        pd: *mut ibv_pd, offset: u64, length: usize, iova: u64, fd: c_int, access: c_int
    ) -> *mut ibv_mr, RegDmabufMrFn;

    /// Registers memory or a dma-buf as described by [`ibv_mr_init_attr`].
    ///
    /// On failure the result is null with errno set. For a dma-buf the `addr` field of the result is the
    /// offset, not the iova.
    LIBIBVERBS "IBVERBS_1.15" "rdma-core 59":
    fn ibv_reg_mr_ex(pd: *mut ibv_pd, attr: *mut ibv_mr_init_attr) -> *mut ibv_mr, RegMrExFn;

    /// Allocates a DMA handle: TPH processing hints for the registrations that name it.
    ///
    /// On failure the result is null with errno set. [`ibv_dealloc_dmah`] frees it.
    LIBIBVERBS "IBVERBS_1.15" "rdma-core 59":
    fn ibv_alloc_dmah(
        context: *mut ibv_context, attr: *mut ibv_dmah_init_attr
    ) -> *mut ibv_dmah, AllocDmahFn;

    /// Frees a DMA handle. The result is 0 or an errno.
    LIBIBVERBS "IBVERBS_1.15" "rdma-core 59":
    fn ibv_dealloc_dmah(dmah: *mut ibv_dmah) -> c_int, DeallocDmahFn;

    /// Exports device memory as a dma-buf.
    ///
    /// The result is a new descriptor, owned by the caller, or -1 with errno set.
    LIBIBVERBS "IBVERBS_1.16" "rdma-core 62":
    fn ibv_dm_export_dmabuf_fd(dm: *mut ibv_dm) -> c_int, DmExportDmabufFdFn;

    /// Allocates a buffer in the way that the protection domain's provider prefers.
    ///
    /// The result is the page-aligned address of the buffer, or null with errno set. `*buf` is the handle
    /// for [`ibv_free_buf`].
    LIBIBVERBS "IBVERBS_1.17" "rdma-core 64":
    fn ibv_alloc_buf(
        pd: *mut ibv_pd, size: usize, buf: *mut *mut ibv_buf
    ) -> *mut c_void, AllocBufFn;

    /// Frees a buffer allocated by [`ibv_alloc_buf`].
    LIBIBVERBS "IBVERBS_1.17" "rdma-core 64":
    fn ibv_free_buf(buf: *mut ibv_buf), FreeBufFn;

    /// Registers `length` bytes at `addr`, inside a buffer allocated by [`ibv_alloc_buf`].
    ///
    /// On failure the result is null with errno set.
    LIBIBVERBS "IBVERBS_1.17" "rdma-core 64":
    fn ibv_reg_buf_mr(
        pd: *mut ibv_pd, buf: *mut ibv_buf, addr: *mut c_void, length: usize, access: c_int
    ) -> *mut ibv_mr, RegBufMrFn;

    /// Exports a buffer allocated by [`ibv_alloc_buf`] as a dma-buf.
    ///
    /// The result is a new descriptor, owned by the caller, or -1 with errno set.
    LIBIBVERBS "IBVERBS_1.18" "rdma-core 65":
    fn ibv_export_buf_dmabuf_fd(buf: *mut ibv_buf) -> c_int, ExportBufDmabufFdFn;

    /// Registers a dma-buf on an mlx5 device with the flags of mlx5
    /// ([`MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT`]).
    ///
    /// On failure the result is null with errno set. The protection domain must belong to an mlx5
    /// device. The lookup loads libmlx5.so.1.
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

/// Arguments of [`ibv_reg_mr_ex`]: memory (`addr`) or a dma-buf (`fd`, `fd_offset` and `iova`).
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ibv_mr_init_attr {
    /// Bytes.
    pub length: usize,
    /// `ibv_access_flags`.
    pub access: c_int,
    /// `IBV_REG_MR_MASK_*`: the fields below that are set.
    pub comp_mask: u64,
    /// Address of the first byte in work requests and on the wire.
    pub iova: u64,
    /// Address of the memory.
    pub addr: *mut c_void,
    /// The dma-buf.
    pub fd: c_int,
    /// Offset of the range in the dma-buf, in bytes.
    pub fd_offset: u64,
    /// A DMA handle allocated by [`ibv_alloc_dmah`].
    pub dmah: *mut ibv_dmah,
    /// The buffer allocated by [`ibv_alloc_buf`] that contains `addr`.
    pub buf: *mut ibv_buf,
}

/// A DMA handle, allocated by [`ibv_alloc_dmah`].
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ibv_dmah {
    /// The device of the handle.
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

/// Arguments of [`ibv_alloc_dmah`].
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ibv_dmah_init_attr {
    /// `IBV_DMAH_INIT_ATTR_MASK_*`: the fields below that are set.
    pub comp_mask: u32,
    /// The CPU into whose cache the data should go.
    pub cpu_id: u32,
    /// PCIe processing hint, 0 to 3.
    pub ph: u8,
    /// `IBV_TPH_MEM_TYPE_*`.
    pub tph_mem_type: u8,
}

/// A buffer allocated by [`ibv_alloc_buf`]; the struct is private to libibverbs.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug)]
pub struct ibv_buf {
    _private: [u8; 0],
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::{CString, OsString};
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    #[test]
    fn a_lookup_gives_the_function_that_the_linker_finds() {
        for _ in 0..2 {
            let found = ibv_reg_dmabuf_mr().unwrap();
            let linked: RegDmabufMrFn = ibverbs_sys::ibv_reg_dmabuf_mr;
            assert_eq!(found as usize, linked as usize);
        }
    }

    #[test]
    fn a_version_that_does_not_exist_is_a_value() {
        let symbol = Symbol::new(LIBIBVERBS, c"ibv_reg_mr", c"IBVERBS_9.9", "rdma-core 999");
        let (name, version, needs) = ("ibv_reg_mr", "IBVERBS_9.9", "rdma-core 999");
        let missing = SymbolError::Missing { symbol: name, version, needs };
        for _ in 0..2 {
            assert_eq!(symbol.resolve(), Err(missing.clone()));
        }
        assert_eq!(
            missing.to_string(),
            "ibv_reg_mr@IBVERBS_9.9 is not in this libibverbs; needs rdma-core 999"
        );
    }

    #[test]
    fn a_lookup_respects_the_version() {
        let [old, new] = [c"IBVERBS_1.0", c"IBVERBS_1.1"]
            .map(|version| Symbol::new(LIBIBVERBS, c"ibv_reg_mr", version, "rdma-core 1").resolve().unwrap());
        assert_ne!(old, new);
    }

    /// The symbol exists once, as in the functions of the table.
    #[test]
    fn a_library_that_appears_is_loaded_by_the_next_lookup() {
        let folder = std::env::temp_dir().join(format!("rdma-sys-ext-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let library = folder.join("libmlx5.so.1");
        let path = CString::new(library.as_os_str().as_bytes()).unwrap().into_boxed_c_str();
        let path: &'static CStr = Box::leak(path);
        let symbol = Symbol::new(path, c"mlx5dv_init_obj", c"MLX5_1.2", "rdma-core 14");
        let absent = Symbol::new(path, c"mlx5dv_nonsense", c"MLX5_1.25", "rdma-core 54");
        for symbol in [&symbol, &absent, &symbol] {
            match symbol.resolve() {
                Err(SymbolError::NotLoaded { reason, errno: None, .. }) => {
                    assert!(reason.contains("libmlx5.so.1"), "{reason}");
                }
                other => panic!("{other:?}"),
            }
        }
        stub(&folder, &library);
        symbol.resolve().unwrap();
        assert_eq!(
            absent.resolve().unwrap_err().to_string(),
            "mlx5dv_nonsense@MLX5_1.25 is not in this libmlx5; needs rdma-core 54"
        );
        std::fs::remove_dir_all(folder).unwrap();
    }

    /// Compiles a library with the function `mlx5dv_init_obj` in version MLX5_1.2.
    fn stub(folder: &Path, library: &Path) {
        let (source, map) = (folder.join("stub.c"), folder.join("stub.map"));
        std::fs::write(&source, "int mlx5dv_init_obj(void) { return 0; }").unwrap();
        std::fs::write(&map, "MLX5_1.2 { global: mlx5dv_init_obj; };").unwrap();
        let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let compiler = cc::Build::new().host(&host).target(&host).opt_level(0).get_compiler();
        let mut command = compiler.to_command();
        command.args(["-shared", "-fPIC", "-o"]).arg(library).arg(&source);
        let mut script = OsString::from("-Wl,--version-script=");
        script.push(&map);
        command.arg(script);
        assert!(command.status().expect("the C compiler starts").success());
    }

    #[test]
    fn an_exhausted_process_is_told_from_a_missing_library() {
        let error = |errno| SymbolError::NotLoaded { library: "libmlx5.so.1", reason: "why".into(), errno };
        assert_eq!(error(None).to_string(), "libmlx5.so.1 cannot be loaded: why");
        let exhausted = error(Some(libc::EMFILE));
        assert!(exhausted.to_string().contains("no free file descriptor"), "{exhausted}");
        assert_eq!(io::Error::from(exhausted).raw_os_error(), Some(libc::EMFILE));
        assert_eq!(io::Error::from(error(None)).to_string(), "libmlx5.so.1 cannot be loaded: why");
    }

    #[test]
    fn names_and_versions_of_the_table() {
        // With any installed library, a lookup gives a function or an error with the right name.
        let errors = [
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
        for (error, (symbol, version, needs)) in errors.into_iter().zip(table) {
            match error {
                None => {}
                Some(SymbolError::NotLoaded { library, .. }) => assert_eq!(library, "libmlx5.so.1"),
                Some(missing) => assert_eq!(missing, SymbolError::Missing { symbol, version, needs }),
            }
        }
    }
}
