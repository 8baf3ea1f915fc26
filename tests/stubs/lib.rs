//! Loads the stub libraries and calls their control functions.
//!
//! Each stub checks every argument strictly and exports udmabufs. `unsafe` is here to call the stubs.

use std::ffi::{CStr, CString, c_char, c_int};

use libloading::os::unix::Library;

/// The folder with the libraries, for LD_LIBRARY_PATH.
pub const FOLDER: &str = concat!(env!("OUT_DIR"), "/now");
/// The folder with old versions, which do not export dma-bufs.
pub const OLD_FOLDER: &str = concat!(env!("OUT_DIR"), "/old");

/// A loaded stub, never unloaded. Code that loads the runtime by its name now gets the stub.
#[derive(Debug)]
pub struct Stub {
    library: &'static Library,
}

impl Stub {
    /// Loads a stub by its library name, such as `libcuda.so.1`.
    ///
    /// # Panics
    /// If it cannot be loaded.
    pub fn load(name: &str) -> Self {
        let path = format!("{FOLDER}/{name}");
        // SAFETY: the constructor of a stub only opens a device.
        let library = unsafe { Library::new(&path) }.unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { library: Box::leak(Box::new(library)) }
    }

    /// A function of the stub.
    ///
    /// # Panics
    /// If the stub has no function with this name.
    ///
    /// # Safety
    /// `F` must be the type of a pointer to the function.
    pub unsafe fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: the caller guarantees the type; the library is never unloaded.
        *unsafe { self.library.get::<F>(name) }.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Makes the next call of a function return `code`.
    pub fn refuse(&self, call: &str, code: i64) {
        self.refuse_times(call, code, 1);
    }

    /// Makes the next calls of a function return `code`.
    pub fn refuse_times(&self, call: &str, code: i64, times: i32) {
        let call = CString::new(call).expect("a name");
        type Refuse = unsafe extern "C" fn(*const c_char, i64, c_int);
        // SAFETY: the type is that in stub.h; the stub copies the name.
        unsafe { self.function::<Refuse>("stub_refuse")(call.as_ptr(), code, times) };
    }

    /// Sets what the driver or its devices are like, by a name in the stub's source.
    pub fn set(&self, what: &str, value: usize) {
        let what = CString::new(what).expect("a name");
        // SAFETY: the type is that in the stub's source; the stub does not keep the name.
        unsafe {
            self.function::<unsafe extern "C" fn(*const c_char, usize)>("stub_set")(what.as_ptr(), value)
        };
    }

    /// Makes look-ups and exports succeed with numbers that cannot be true.
    pub fn nonsense(&self, nonsense: Nonsense) {
        // SAFETY: the type is that in stub.h.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("stub_nonsense")(nonsense as c_int) };
    }

    /// The number of look-ups of pointers so far.
    pub fn lookups(&self) -> i32 {
        self.count(c"lookups")
    }

    /// The number of dma-bufs exported so far.
    pub fn exports(&self) -> i32 {
        self.count(c"exports")
    }

    /// The number of flushes so far.
    pub fn flushes(&self) -> i32 {
        self.count(c"flushes")
    }

    fn count(&self, what: &CStr) -> i32 {
        // SAFETY: the type is that in stub.h; the stub does not keep the name.
        unsafe { self.function::<unsafe extern "C" fn(*const c_char) -> c_int>("stub_count")(what.as_ptr()) }
    }

    /// The number of objects not released yet: allocations, contexts, descriptors, …
    pub fn live(&self) -> i32 {
        // SAFETY: the type is that in stub.h.
        unsafe { self.function::<unsafe extern "C" fn() -> c_int>("stub_live")() }
    }

    /// With `sharing`, exports of one range share a dma-buf. Otherwise each makes a new one, as drivers do.
    pub fn share(&self, sharing: bool) {
        // SAFETY: the type is that in stub.h.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("stub_share")(sharing.into()) };
    }

    /// With `reusing`, new memory gets the lowest free addresses. Otherwise addresses are never used again.
    pub fn reuse(&self, reusing: bool) {
        // SAFETY: the type is that in stub.h.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("stub_reuse")(reusing.into()) };
    }

    /// With `bare`, exports report success and make no descriptor.
    pub fn export_nothing(&self, bare: bool) {
        // SAFETY: the type is that in stub.h.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("stub_bare")(bare.into()) };
    }

    /// A description of the first wrong argument that the stub got.
    pub fn misuse(&self) -> Option<String> {
        // SAFETY: the type is that in stub.h; the result is a static string or null.
        unsafe {
            let text = self.function::<unsafe extern "C" fn() -> *const c_char>("stub_misuse")();
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    }
}

/// Success with numbers that cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nonsense {
    /// None.
    No,
    /// An allocation of 0 bytes.
    SizeZero,
    /// An allocation that begins after the address.
    BaseAbove,
    /// A dma-buf of one page.
    ShortBuffer,
    /// A mapping elsewhere.
    RangeElsewhere,
}
