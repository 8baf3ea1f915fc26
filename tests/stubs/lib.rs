//! The stub libraries: where they are, and what a test can ask of them beside the runtime's own functions.
//!
//! Each checks every argument strictly and hands out udmabufs. `unsafe` is here for calling into them.

use std::ffi::{CStr, CString, c_char, c_int};

use libloading::os::unix::Library;

/// The folder with the libraries, for LD_LIBRARY_PATH.
pub const FOLDER: &str = concat!(env!("OUT_DIR"), "/now");
/// The same as they were before they exported dma-bufs.
pub const OLD_FOLDER: &str = concat!(env!("OUT_DIR"), "/old");

/// A stub, loaded for good: whoever loads the runtime by its name now gets it.
#[derive(Debug)]
pub struct Stub {
    library: &'static Library,
}

impl Stub {
    /// Loads `libcuda.so.1` or another.
    ///
    /// # Panics
    /// When it is not there.
    pub fn load(name: &str) -> Self {
        let path = format!("{FOLDER}/{name}");
        // SAFETY: their constructors only open a device.
        let library = unsafe { Library::new(&path) }.unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { library: Box::leak(Box::new(library)) }
    }

    /// A function of the stub.
    ///
    /// # Panics
    /// When there is none of that name.
    ///
    /// # Safety
    /// `F` is the type of a pointer to it.
    pub unsafe fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: says the caller; the library is never unloaded.
        *unsafe { self.library.get::<F>(name) }.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Has the next call of a function answer `code`.
    pub fn refuse(&self, call: &str, code: i64) {
        let call = CString::new(call).expect("a name");
        // SAFETY: the type in stub.h; the name is copied.
        unsafe {
            self.function::<unsafe extern "C" fn(*const c_char, i64)>("stub_refuse")(call.as_ptr(), code)
        };
    }

    /// Objects that nobody has given back: allocations, contexts, descriptors, …
    pub fn live(&self) -> i32 {
        // SAFETY: the type in stub.h.
        unsafe { self.function::<unsafe extern "C" fn() -> c_int>("stub_live")() }
    }

    /// Whether exports of one range are descriptors of one dma-buf, or each makes its own as drivers do.
    pub fn share(&self, sharing: bool) {
        // SAFETY: the type in stub.h.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("stub_share")(sharing.into()) };
    }

    /// The first wrong argument that the stub was given, in words.
    pub fn misuse(&self) -> Option<String> {
        // SAFETY: the type in stub.h; a static string or null.
        unsafe {
            let text = self.function::<unsafe extern "C" fn() -> *const c_char>("stub_misuse")();
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    }
}
