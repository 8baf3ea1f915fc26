//! The five functions of MPI that a start-up needs, of Open MPI, loaded at run time so that building the
//! examples needs no MPI. A program that uses MPI already has them by its own bindings.
//!
//! `unsafe` is here for loading and calling them.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;

type Result<T> = std::result::Result<T, String>;

/// Open MPI 3 and 4; what its header makes of MPI_COMM_WORLD and MPI_BYTE are addresses of objects.
const LIBRARY: &CStr = c"libmpi.so.40";

pub struct Mpi {
    library: *mut c_void,
    world: *mut c_void,
    byte: *mut c_void,
}

impl Mpi {
    pub fn init() -> Result<Self> {
        // SAFETY: the name ends in NUL; the library stays loaded. Its plug-ins want its symbols global.
        let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if library.is_null() {
            return Err("libmpi.so.40 is not there: install Open MPI (Debian: openmpi-bin)".into());
        }
        let mut mpi = Self { library, world: null_mut(), byte: null_mut() };
        mpi.world = mpi.symbol(c"ompi_mpi_comm_world")?;
        mpi.byte = mpi.symbol(c"ompi_mpi_byte")?;
        let init = mpi.symbol(c"MPI_Init")?;
        // SAFETY: `int MPI_Init(int *, char ***)`, which takes null for both.
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
            Err(format!("this MPI has no {name:?}: is it Open MPI?"))
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
        // SAFETY: both are `int f(MPI_Comm, int *)`.
        let code = unsafe {
            let function: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int =
                std::mem::transmute(function);
            function(self.world, &mut number)
        };
        check(&name.to_string_lossy(), code)?;
        usize::try_from(number).map_err(|_| format!("{name:?} is {number}"))
    }

    pub fn barrier(&self) -> Result<()> {
        let barrier = self.symbol(c"MPI_Barrier")?;
        // SAFETY: `int MPI_Barrier(MPI_Comm)`.
        check("MPI_Barrier", unsafe {
            let barrier: unsafe extern "C" fn(*mut c_void) -> c_int = std::mem::transmute(barrier);
            barrier(self.world)
        })
    }

    /// What every rank gave, one after the other; all give as many bytes.
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
        // SAFETY: MPI_Allgather has this type; the send buffer has `count` bytes and the receive buffer as
        // many for each rank.
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
        // SAFETY: `int MPI_Finalize(void)`.
        check("MPI_Finalize", unsafe {
            let finalize: unsafe extern "C" fn() -> c_int = std::mem::transmute(finalize);
            finalize()
        })
    }
}

fn check(what: &str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(format!("{what} answers {code}")) }
}
