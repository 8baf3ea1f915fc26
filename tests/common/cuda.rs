//! Functions of CUDA's driver that the library does not need, for the tests on a real GPU and on the stub.
//!
//! `unsafe` is here to call them, with the types of `cuda.h`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

/// The driver that this process has loaded.
#[derive(Debug, Clone, Copy)]
pub struct Driver {
    library: *mut c_void,
}

/// The properties of physical memory, `CUmemAllocationProp`.
#[repr(C)]
struct Properties {
    kind: c_int,
    handle_types: c_int,
    location: [c_int; 2],
    windows: usize,
    /// compressionType, gpuDirectRDMACapable, usage.
    flags: [u8; 8],
}

impl Properties {
    fn new(ordinal: i32, capable: bool) -> Self {
        let flags = [0, capable.into(), 0, 0, 0, 0, 0, 0];
        // Pinned memory of a device.
        Self { kind: 1, handle_types: 0, location: [1, ordinal], windows: 0, flags }
    }
}

impl Driver {
    /// The library that `Cuda::load` has loaded.
    #[track_caller]
    pub fn loaded() -> Self {
        // SAFETY: loads nothing new.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
        assert!(!library.is_null(), "Cuda::load has loaded the driver");
        Self { library }
    }

    /// # Safety
    /// `F` is the type of a pointer to the function.
    unsafe fn function<F: Copy>(self, name: &str) -> F {
        assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
        let symbol = CString::new(name).unwrap();
        // SAFETY: the library stays loaded.
        let found = unsafe { libc::dlsym(self.library, symbol.as_ptr()) };
        assert!(!found.is_null(), "{name}");
        // SAFETY: the caller's promise.
        unsafe { std::mem::transmute_copy(&found) }
    }

    fn check(call: &str, code: c_int) -> Result<(), String> {
        if code == 0 { Ok(()) } else { Err(format!("{call}: CUDA error {code}")) }
    }

    pub fn version(self) -> i32 {
        let mut version = 0;
        // SAFETY: writes one int.
        let code = unsafe {
            self.function::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDriverGetVersion")(&raw mut version)
        };
        Self::check("cuDriverGetVersion", code).unwrap();
        version
    }

    /// The handle of a device by its ordinal.
    fn device(self, ordinal: i32) -> c_int {
        let mut device = 0;
        type Get = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
        // SAFETY: writes one int.
        let code = unsafe { self.function::<Get>("cuDeviceGet")(&raw mut device, ordinal) };
        Self::check("cuDeviceGet", code).unwrap();
        device
    }

    pub fn name(self, ordinal: i32) -> String {
        let mut name = [0_u8; 256];
        type Name = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
        // SAFETY: writes a string of at most the length passed.
        let code = unsafe {
            let call = self.function::<Name>("cuDeviceGetName");
            call(name.as_mut_ptr().cast(), name.len() as c_int, self.device(ordinal))
        };
        Self::check("cuDeviceGetName", code).unwrap();
        CStr::from_bytes_until_nul(&name).unwrap().to_string_lossy().into_owned()
    }

    /// An attribute of a device, if the driver knows it.
    pub fn attribute(self, ordinal: i32, attribute: i32) -> Option<i32> {
        let mut value = 0;
        type Get = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
        // SAFETY: writes one int.
        let code = unsafe {
            self.function::<Get>("cuDeviceGetAttribute")(&raw mut value, attribute, self.device(ordinal))
        };
        (code == 0).then_some(value)
    }

    /// Runs with the primary context of a device current.
    #[track_caller]
    pub fn inside<T>(self, ordinal: i32, run: impl FnOnce() -> T) -> T {
        let (device, mut context) = (self.device(ordinal), std::ptr::null_mut::<c_void>());
        type Retain = unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int;
        // SAFETY: writes one handle, which is pushed, popped and released below.
        unsafe {
            let retain = self.function::<Retain>("cuDevicePrimaryCtxRetain");
            Self::check("cuDevicePrimaryCtxRetain", retain(&raw mut context, device)).unwrap();
            let push = self.function::<unsafe extern "C" fn(*mut c_void) -> c_int>("cuCtxPushCurrent_v2");
            Self::check("cuCtxPushCurrent", push(context)).unwrap();
        }
        let answer = run();
        // SAFETY: as above.
        unsafe {
            let pop = self.function::<unsafe extern "C" fn(*mut *mut c_void) -> c_int>("cuCtxPopCurrent_v2");
            Self::check("cuCtxPopCurrent", pop(&raw mut context)).unwrap();
            let release =
                self.function::<unsafe extern "C" fn(c_int) -> c_int>("cuDevicePrimaryCtxRelease_v2");
            Self::check("cuDevicePrimaryCtxRelease", release(device)).unwrap();
        }
        answer
    }

    /// Allocates by a function that takes a place for the address, the size and one more argument.
    pub fn allocate(self, function: &str, size: usize, argument: usize) -> Result<u64, String> {
        let mut address = 0;
        type Allocate = unsafe extern "C" fn(*mut u64, usize, usize) -> c_int;
        // SAFETY: the callers name functions of this type, or of two arguments, for which the third is unused.
        let code = unsafe { self.function::<Allocate>(function)(&raw mut address, size, argument) };
        Self::check(function, code).map(|()| address)
    }

    /// Frees by a function that takes the address and one more argument.
    #[track_caller]
    pub fn free(self, function: &str, address: u64) {
        type Free = unsafe extern "C" fn(u64, usize) -> c_int;
        // SAFETY: as in `allocate`.
        Self::check(function, unsafe { self.function::<Free>(function)(address, 0) }).unwrap();
    }

    /// The physical memory at an address, retained and released again.
    pub fn physical(self, address: u64) -> Result<u64, String> {
        let mut handle = 0;
        type Retain = unsafe extern "C" fn(*mut u64, u64) -> c_int;
        // SAFETY: writes one handle.
        let code =
            unsafe { self.function::<Retain>("cuMemRetainAllocationHandle")(&raw mut handle, address) };
        Self::check("cuMemRetainAllocationHandle", code)?;
        self.release(handle);
        Ok(handle)
    }

    fn release(self, handle: u64) {
        // SAFETY: the caller retained or created it.
        let code = unsafe { self.function::<unsafe extern "C" fn(u64) -> c_int>("cuMemRelease")(handle) };
        Self::check("cuMemRelease", code).unwrap();
    }
}

/// Reserved addresses of a device, with as many places for mappings.
pub struct Segment {
    driver: Driver,
    ordinal: i32,
    pub base: u64,
    /// Bytes of a mapping.
    pub granule: u64,
    places: u64,
    mapped: Vec<u64>,
}

impl Segment {
    #[track_caller]
    pub fn reserve(driver: Driver, ordinal: i32, places: u64) -> Self {
        let (mut granule, mut base) = (0_usize, 0);
        type Granularity = unsafe extern "C" fn(*mut usize, *const Properties, c_int) -> c_int;
        type Reserve = unsafe extern "C" fn(*mut u64, usize, usize, u64, u64) -> c_int;
        // SAFETY: the types of cuda.h; each writes one word.
        unsafe {
            let properties = Properties::new(ordinal, true);
            let call = driver.function::<Granularity>("cuMemGetAllocationGranularity");
            Driver::check("cuMemGetAllocationGranularity", call(&raw mut granule, &raw const properties, 0))
                .unwrap();
            let reserve = driver.function::<Reserve>("cuMemAddressReserve");
            let size = places as usize * granule;
            Driver::check("cuMemAddressReserve", reserve(&raw mut base, size, 0, 0, 0)).unwrap();
        }
        Self { driver, ordinal, base, granule: granule as u64, places, mapped: Vec::new() }
    }

    pub fn place(&self, place: u64) -> u64 {
        self.base + place * self.granule
    }

    /// Maps new physical memory, which the device may access.
    pub fn map(&mut self, place: u64, capable: bool) -> Result<(), String> {
        let (mut handle, size, at) = (0, self.granule as usize, self.place(place));
        let properties = Properties::new(self.ordinal, capable);
        // CUmemAccessDesc: a device, readable and writable.
        let access: [c_int; 3] = [1, self.ordinal, 3];
        type Create = unsafe extern "C" fn(*mut u64, usize, *const Properties, u64) -> c_int;
        type Map = unsafe extern "C" fn(u64, usize, usize, u64, u64) -> c_int;
        type Access = unsafe extern "C" fn(u64, usize, *const c_int, usize) -> c_int;
        // SAFETY: the types of cuda.h.
        unsafe {
            let create = self.driver.function::<Create>("cuMemCreate");
            Driver::check("cuMemCreate", create(&raw mut handle, size, &raw const properties, 0))?;
            let mapped = self.driver.function::<Map>("cuMemMap")(at, size, 0, handle, 0);
            self.driver.release(handle);
            Driver::check("cuMemMap", mapped)?;
            self.mapped.push(place);
            let set = self.driver.function::<Access>("cuMemSetAccess");
            Driver::check("cuMemSetAccess", set(at, size, access.as_ptr(), 1))
        }
    }

    #[track_caller]
    pub fn unmap(&mut self, place: u64) {
        self.mapped.retain(|mapped| *mapped != place);
        type Unmap = unsafe extern "C" fn(u64, usize) -> c_int;
        // SAFETY: it is mapped.
        let code =
            unsafe { self.driver.function::<Unmap>("cuMemUnmap")(self.place(place), self.granule as usize) };
        Driver::check("cuMemUnmap", code).unwrap();
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        for place in self.mapped.clone() {
            self.unmap(place);
        }
        type Free = unsafe extern "C" fn(u64, usize) -> c_int;
        let size = (self.places * self.granule) as usize;
        // SAFETY: it is reserved, and nothing is mapped.
        let code = unsafe { self.driver.function::<Free>("cuMemAddressFree")(self.base, size) };
        Driver::check("cuMemAddressFree", code).unwrap();
    }
}
