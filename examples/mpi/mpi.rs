//! The few functions of Open MPI that this example needs. They are loaded at run time, so that building the
//! examples needs no MPI; a real MPI program has bindings.
//!
//! `unsafe` loads and calls C functions.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;

type Result<T> = std::result::Result<T, String>;

/// Open MPI 3 and 4. Their header defines MPI_COMM_WORLD and MPI_BYTE as addresses of objects.
const LIBRARY: &CStr = c"libmpi.so.40";

pub struct Mpi {
    library: *mut c_void,
    world: *mut c_void,
    byte: *mut c_void,
}

impl Mpi {
    pub fn init() -> Result<Self> {
        // Open MPI's plug-ins need its symbols to be global.
        // SAFETY: the name ends in NUL; the library stays loaded.
        let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if library.is_null() {
            return Err("libmpi.so.40 is missing: install Open MPI (Debian: openmpi-bin)".into());
        }
        let mut mpi = Self { library, world: null_mut(), byte: null_mut() };
        mpi.world = mpi.symbol(c"ompi_mpi_comm_world")?;
        mpi.byte = mpi.symbol(c"ompi_mpi_byte")?;
        let init = mpi.symbol(c"MPI_Init")?;
        // SAFETY: the type is `int MPI_Init(int *, char ***)`; both may be null.
        check("MPI_Init", unsafe {
            let init: unsafe extern "C" fn(*mut c_int, *mut c_void) -> c_int = std::mem::transmute(init);
            init(null_mut(), null_mut())
        })?;
        Ok(mpi)
    }

    fn symbol(&self, name: &CStr) -> Result<*mut c_void> {
        // SAFETY: the library is loaded, and the name ends in NUL.
        let address = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        if address.is_null() {
            Err(format!("libmpi.so.40 has no symbol {name:?}: is it Open MPI?"))
        } else {
            Ok(address)
        }
    }

    pub fn rank(&self) -> Result<usize> {
        self.number(c"MPI_Comm_rank")
    }

    pub fn size(&self) -> Result<usize> {
        self.number(c"MPI_Comm_size")
    }

    fn number(&self, name: &CStr) -> Result<usize> {
        let (function, mut number) = (self.symbol(name)?, 0);
        // SAFETY: MPI_Comm_rank and MPI_Comm_size have the type `int (MPI_Comm, int *)`.
        let code = unsafe {
            let function: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int =
                std::mem::transmute(function);
            function(self.world, &mut number)
        };
        check(&name.to_string_lossy(), code)?;
        usize::try_from(number).map_err(|_| format!("{name:?} returned {number}"))
    }

    pub fn barrier(&self) -> Result<()> {
        let barrier = self.symbol(c"MPI_Barrier")?;
        // SAFETY: the type is `int MPI_Barrier(MPI_Comm)`.
        check("MPI_Barrier", unsafe {
            let barrier: unsafe extern "C" fn(*mut c_void) -> c_int = std::mem::transmute(barrier);
            barrier(self.world)
        })
    }

    /// The bytes of all ranks, in their order. All ranks pass the same number of bytes.
    pub fn all_gather(&self, ours: &[u8]) -> Result<Vec<u8>> {
        type AllGather = unsafe extern "C" fn(
            *const c_void,
            c_int,
            *mut c_void,
            *mut c_void,
            c_int,
            *mut c_void,
            *mut c_void,
        ) -> c_int;
        let gather = self.symbol(c"MPI_Allgather")?;
        let mut all = vec![0; ours.len() * self.size()?];
        let count = ours.len() as c_int;
        // SAFETY: MPI_Allgather has this type; the send buffer has `count` bytes, and the receive buffer has
        // `count` bytes for each rank.
        let code = unsafe {
            let gather: AllGather = std::mem::transmute(gather);
            let (from, to) = (ours.as_ptr().cast(), all.as_mut_ptr().cast());
            gather(from, count, self.byte, to, count, self.byte, self.world)
        };
        check("MPI_Allgather", code)?;
        Ok(all)
    }

    pub fn finalize(self) -> Result<()> {
        let finalize = self.symbol(c"MPI_Finalize")?;
        // SAFETY: the type is `int MPI_Finalize(void)`.
        check("MPI_Finalize", unsafe {
            let finalize: unsafe extern "C" fn() -> c_int = std::mem::transmute(finalize);
            finalize()
        })
    }
}

fn check(function: &str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(format!("{function} failed with code {code}")) }
}
