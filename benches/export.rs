//! Exporting device memory as a dma-buf, and finding the runtime of a pointer: this library on the tests' stub
//! libraries, against the driver's own calls alone. `src/mr/tests/pointer_bench.rs` measures a hit of the cache.
//!
//! Both sides run in this process and take turns in pairs, A B then B A, on one processor; see
//! `register.rs`. The driver's own calls are those that a correct export cannot omit: looking up the pointer,
//! making its context current, the export, setting SYNC_MEMOPS (CUDA), and closing the descriptor. The library adds a check of the
//! descriptor (fstat and fcntl), a duplicate where the runtime keeps its own descriptor, and its own code. The
//! difference is the median over the pairs, not that of two medians.
//!
//! The stubs return descriptors of one dma-buf here. In an emulated guest every call right after a dma-buf is
//! made takes longer, fstat four times as long, and that would count against the library.
//!
//! Needs /dev/udmabuf. Rows go to stdout and, as lines of JSON, into the file that `BENCH_ROWS` names.

#[path = "common/mod.rs"]
mod common;

use std::ffi::{c_int, c_void};
use std::time::Instant;

use common::{Pair, Peer, Result, Rows, Spread, pairs, stay_on_one_processor, steps};
use dmabuf_rdma::exporter::{Cuda, Hsa, LevelZero, Runtime, Runtimes};
use gpu_stubs::Stub;
use rdma_sys_ext::hsa::PointerInfo;
use rdma_sys_ext::level_zero::{
    AllocProperties, EXTERNAL_DMA_BUF, ExportFd, STYPE_ALLOC_PROPERTIES, STYPE_EXPORT_FD,
};

const PAIRS: usize = 4001;
const TIMES: u32 = 16;

fn main() -> Result<()> {
    stay_on_one_processor()?;
    let stubs = ["libcuda.so.1", "libhsa-runtime64.so.1", "libze_loader.so.1"].map(Stub::load);
    stubs.iter().for_each(|stub| stub.share(true));
    let mut rows = Rows::new()?;
    let (cuda, hsa, ze) = (Cuda::load()?, Hsa::load()?, LevelZero::load()?);

    // The smallest size, so that udmabuf's time for each page does not count. CUDA's driver allocates single
    // pages, but `device_memory` does not, so the stub is called directly.
    let (of_hsa, of_ze) = (hsa.device_memory(4096)?, ze.device_memory(4096)?);
    let memory = [cuda_page(&stubs[0]), of_hsa.address(), of_ze.address()];
    let owners = Runtimes::loaded()?;
    let host = Box::new(0_u64);
    let find = |rows: &mut Rows, what: &str, address: u64| -> Result<()> {
        let timed = || {
            let start = Instant::now();
            for _ in 0..1000 {
                std::hint::black_box(owners.find(std::hint::black_box(address))?);
            }
            Ok::<_, Box<dyn std::error::Error>>(start.elapsed().as_nanos() as f64 / 1e6)
        };
        let values = (0..301).map(|_| timed()).collect::<Result<Vec<_>>>()?;
        let of = Spread::of(values.into_iter());
        rows.add(&format!("find the owner of {what}, of 3"), "us", of, None, Some("value <= 5"))
    };
    find(&mut rows, "CUDA's memory", memory[0])?;
    find(&mut rows, "Level Zero's memory", memory[2])?;
    find(&mut rows, "host memory", (&raw const *host) as u64)?;

    // For comparison: a system call that does nothing.
    let nothing = (0..301).map(|_| {
        timed(|| {
            std::hint::black_box(nix::unistd::getppid());
            Ok(())
        })
    });
    let nothing = Spread::of(nothing.collect::<Result<Vec<_>>>()?.into_iter());
    rows.add("a system call that does nothing", "us", nothing, None, None)?;

    let runtimes: [&dyn Runtime; 3] = [&cuda, &hsa, &ze];
    for ((runtime, address), stub) in runtimes.into_iter().zip(memory).zip(&stubs) {
        let size = 4096;
        let bare = bare(runtime.name(), stub, address, size);
        let library = || timed(|| runtime.export_at(address, size).map(drop).map_err(Into::into));
        let pairs = pairs(PAIRS, library, || timed(&bare))?;
        let over = |value: fn(&Pair) -> f64| Spread::of(pairs.iter().map(value));
        let row = format!("export of an allocation, {}", runtime.name());
        rows.add(&row, "us", over(|pair| pair.library), Some(Peer::of(&pairs)), None)?;
        let row = format!("added to the driver's calls, {}", runtime.name());
        rows.add(&row, "us", over(|pair| pair.library - pair.bare), None, Some("value <= 1"))?;
        // Instructions of both, without those of the counting.
        let count = |call: &dyn Fn() -> Result<()>| -> Result<f64> {
            let times = |times| steps::count(|| (0..times).for_each(|_| call().expect("it just did")));
            Ok((times(30)? - times(10)?) as f64 / 20.0)
        };
        let library = || runtime.export_at(address, size).map(drop).map_err(Into::into);
        let added = count(&library)? - count(&bare)?;
        let exact = Spread { min: added, median: added, max: added };
        rows.add(&format!("instructions added, {}", runtime.name()), "", exact, None, None)?;
    }
    Ok(())
}

/// Allocates one page from the stub, in the primary context, which stays current.
fn cuda_page(stub: &Stub) -> u64 {
    let mut context = std::ptr::null_mut();
    let mut address = 0;
    // SAFETY: the types of cuda.h; each writes one word.
    unsafe {
        type Retain = unsafe extern "C" fn(*mut *mut c_void, c_int) -> u32;
        let retain = stub.function::<Retain>("cuDevicePrimaryCtxRetain");
        assert_eq!(retain(&raw mut context, 100), 0);
        let push = stub.function::<unsafe extern "C" fn(*mut c_void) -> u32>("cuCtxPushCurrent_v2");
        assert_eq!(push(context), 0);
        let alloc = stub.function::<unsafe extern "C" fn(*mut u64, usize) -> u32>("cuMemAlloc_v2");
        assert_eq!(alloc(&raw mut address, 4096), 0);
    }
    address
}

/// Microseconds per call.
fn timed(call: impl Fn() -> Result<()>) -> Result<f64> {
    call()?;
    let start = Instant::now();
    for _ in 0..TIMES {
        call()?;
    }
    Ok(start.elapsed().as_nanos() as f64 / 1e3 / f64::from(TIMES))
}

/// The driver's own calls alone, up to closing or returning the descriptor.
fn bare(runtime: &str, stub: &Stub, address: u64, size: u64) -> Box<dyn Fn() -> Result<()>> {
    match runtime {
        "CUDA" => cuda(stub, address, size),
        "ROCm" => hsa(stub, address, size),
        _ => level_zero(stub, address),
    }
}

fn check(code: u32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(format!("the stub answers {code:#x}").into()) }
}

fn cuda(stub: &Stub, address: u64, size: u64) -> Box<dyn Fn() -> Result<()>> {
    type Attributes = unsafe extern "C" fn(u32, *const c_int, *const *mut c_void, u64) -> u32;
    type Set = unsafe extern "C" fn(*const c_void, u32, u64) -> u32;
    type Export = unsafe extern "C" fn(*mut c_void, u64, usize, u32, u64) -> u32;
    // SAFETY: the types of cuda.h.
    let (attributes, push, set, export, pop) = unsafe {
        (
            stub.function::<Attributes>("cuPointerGetAttributes"),
            stub.function::<unsafe extern "C" fn(*mut c_void) -> u32>("cuCtxPushCurrent_v2"),
            stub.function::<Set>("cuPointerSetAttribute"),
            stub.function::<Export>("cuMemGetHandleForAddressRange"),
            stub.function::<unsafe extern "C" fn(*mut *mut c_void) -> u32>("cuCtxPopCurrent_v2"),
        )
    };
    // The attributes context, memory type, buffer id, managed, pool, ordinal, base and size.
    const NAMES: [c_int; 8] = [1, 2, 7, 8, 17, 9, 11, 12];
    Box::new(move || {
        let mut words = [0_u64; 8];
        let places = words.each_mut().map(|word| std::ptr::from_mut(word).cast::<c_void>());
        let (sync, mut fd, mut popped) = (1_u32, -1, std::ptr::null_mut());
        // SAFETY: each place has room for its attribute, and the context is the memory's. The export writes one
        // descriptor, which only this closes.
        unsafe {
            check(attributes(NAMES.len() as u32, NAMES.as_ptr(), places.as_ptr(), address))?;
            check(push(words[0] as *mut c_void))?;
            check(export((&raw mut fd).cast(), address, size as usize, 1, 0))?;
            check(set((&raw const sync).cast(), 6, address))?;
            check(pop(&raw mut popped))?;
            libc::close(fd);
        }
        Ok(())
    })
}

fn hsa(stub: &Stub, address: u64, size: u64) -> Box<dyn Fn() -> Result<()>> {
    type Info =
        unsafe extern "C" fn(*const c_void, *mut PointerInfo, *mut c_void, *mut u32, *mut *mut c_void) -> u32;
    type Export = unsafe extern "C" fn(*const c_void, usize, *mut c_int, *mut u64) -> u32;
    // SAFETY: the types of hsa_ext_amd.h.
    let (info, export, close) = unsafe {
        (
            stub.function::<Info>("hsa_amd_pointer_info"),
            stub.function::<Export>("hsa_amd_portable_export_dmabuf"),
            stub.function::<unsafe extern "C" fn(c_int) -> u32>("hsa_amd_portable_close_dmabuf"),
        )
    };
    Box::new(move || {
        let mut found = std::mem::MaybeUninit::<PointerInfo>::zeroed();
        let (mut fd, mut offset) = (-1, 0);
        let (none, nobody) = (std::ptr::null_mut(), std::ptr::null_mut());
        let address = address as *const c_void;
        // SAFETY: the struct carries its size, and the calls write to the places passed. The descriptor goes
        // back to the runtime.
        unsafe {
            (*found.as_mut_ptr()).size = size_of::<PointerInfo>() as u32;
            check(info(address, found.as_mut_ptr(), none, std::ptr::null_mut(), nobody))?;
            check(export(address, size as usize, &raw mut fd, &raw mut offset))?;
            check(close(fd))
        }
    })
}

fn level_zero(stub: &Stub, address: u64) -> Box<dyn Fn() -> Result<()>> {
    type Properties =
        unsafe extern "C" fn(*mut c_void, *const c_void, *mut AllocProperties, *mut *mut c_void) -> u32;
    type Range = unsafe extern "C" fn(*mut c_void, *const c_void, *mut *mut c_void, *mut usize) -> u32;
    // SAFETY: the types of ze_api.h; the stub's first context is the one that the library made.
    let (properties, range, context) = unsafe {
        (
            stub.function::<Properties>("zeMemGetAllocProperties"),
            stub.function::<Range>("zeMemGetAddressRange"),
            stub.function::<unsafe extern "C" fn() -> *mut c_void>("stub_context")(),
        )
    };
    let described =
        |next| AllocProperties { stype: STYPE_ALLOC_PROPERTIES, next, memory_type: 0, id: 0, page_size: 0 };
    let context = context as usize;
    Box::new(move || {
        let next = std::ptr::null();
        let mut export = ExportFd { stype: STYPE_EXPORT_FD, next, flags: EXTERNAL_DMA_BUF, fd: -1 };
        let (mut found, mut exported) =
            (described(std::ptr::null_mut()), described((&raw mut export).cast()));
        let (context, nothing) = (context as *mut c_void, std::ptr::null_mut());
        let (mut device, mut base, mut size) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        let address = address as *const c_void;
        // SAFETY: the structs carry their types. The runtime keeps its descriptor, and only this closes the
        // duplicate.
        unsafe {
            check(properties(context, address, &raw mut found, &raw mut device))?;
            check(range(context, address, &raw mut base, &raw mut size))?;
            check(properties(context, base, &raw mut exported, nothing))?;
            libc::close(libc::fcntl(export.fd, libc::F_DUPFD_CLOEXEC, 3));
        }
        Ok(())
    })
}
