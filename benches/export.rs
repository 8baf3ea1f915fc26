//! Exporting device memory as a dma-buf, and finding whose a pointer is: this library, on the stub
//! libraries of the tests, against the driver's own call by itself.
//!
//! Both sides run in this process and take turns in pairs, A B then B A, on one processor; see
//! `register.rs`. The driver's own call is that which makes the descriptor, and what closes it again. What
//! the library adds to it is finding the allocation, making its context current, and looking at the
//! descriptor. The difference is the median over the pairs, not that of two medians.
//!
//! Needs /dev/udmabuf. Rows go to stdout and, as lines of JSON, into the file that `BENCH_ROWS` names.

#[path = "common/mod.rs"]
mod common;

use std::ffi::{c_int, c_void};
use std::time::Instant;

use common::{Pair, Peer, Result, Rows, Spread, pairs, stay_on_one_processor};
use dmabuf_rdma::exporter::{Cuda, Hsa, LevelZero, Runtime, Runtimes};
use gpu_stubs::Stub;
use rdma_sys_ext::level_zero::{
    AllocProperties, EXTERNAL_DMA_BUF, ExportFd, STYPE_ALLOC_PROPERTIES, STYPE_EXPORT_FD,
};

const PAIRS: usize = 4001;
const TIMES: u32 = 16;

fn main() -> Result<()> {
    stay_on_one_processor()?;
    let stubs = ["libcuda.so.1", "libhsa-runtime64.so.1", "libze_loader.so.1"].map(Stub::load);
    let mut rows = Rows::new()?;
    let (cuda, hsa, ze) = (Cuda::load()?, Hsa::load()?, LevelZero::load()?);

    // As small as it goes: what udmabuf takes for each page is not of interest. The driver of CUDA, other
    // than `device_memory`, makes allocations of a page.
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

    let runtimes: [&dyn Runtime; 3] = [&cuda, &hsa, &ze];
    for ((runtime, address), stub) in runtimes.into_iter().zip(memory).zip(&stubs) {
        let size = 4096;
        let bare = bare(runtime.name(), stub, address, size);
        let library = || timed(|| runtime.export_at(address, size).map(drop).map_err(Into::into));
        let pairs = pairs(PAIRS, library, || timed(&bare))?;
        let over = |value: fn(&Pair) -> f64| Spread::of(pairs.iter().map(value));
        let row = format!("export of an allocation, {}", runtime.name());
        rows.add(&row, "us", over(|pair| pair.library), Some(Peer::of(&pairs)), None)?;
        let row = format!("added by the library, {}", runtime.name());
        rows.add(&row, "us", over(|pair| pair.library - pair.bare), None, Some("value <= 1"))?;
    }
    Ok(())
}

/// An allocation of the stub's that is a page, in the primary context, which stays current.
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

/// Microseconds a call.
fn timed(call: impl Fn() -> Result<()>) -> Result<f64> {
    call()?;
    let start = Instant::now();
    for _ in 0..TIMES {
        call()?;
    }
    Ok(start.elapsed().as_nanos() as f64 / 1e3 / f64::from(TIMES))
}

/// The driver's own call by itself, with what gives its descriptor back.
fn bare(runtime: &str, stub: &Stub, address: u64, size: u64) -> Box<dyn Fn() -> Result<()>> {
    let check =
        |code: u32| if code == 0 { Ok(()) } else { Err(format!("the stub answers {code:#x}").into()) };
    match runtime {
        "CUDA" => {
            type Export = unsafe extern "C" fn(*mut c_void, u64, usize, u32, u64) -> u32;
            // SAFETY: the type of cuda.h.
            let export = unsafe { stub.function::<Export>("cuMemGetHandleForAddressRange") };
            Box::new(move || {
                let mut fd: c_int = -1;
                // SAFETY: writes one descriptor, which is closed here and nowhere else.
                unsafe {
                    check(export((&raw mut fd).cast(), address, size as usize, 1, 0))?;
                    libc::close(fd);
                }
                Ok(())
            })
        }
        "ROCm" => {
            type Export = unsafe extern "C" fn(*const c_void, usize, *mut c_int, *mut u64) -> u32;
            // SAFETY: the types of hsa_ext_amd.h.
            let (export, close) = unsafe {
                (
                    stub.function::<Export>("hsa_amd_portable_export_dmabuf"),
                    stub.function::<unsafe extern "C" fn(c_int) -> u32>("hsa_amd_portable_close_dmabuf"),
                )
            };
            Box::new(move || {
                let (mut fd, mut offset) = (-1, 0);
                // SAFETY: writes the two, and the descriptor goes back.
                unsafe {
                    check(export(address as *const c_void, size as usize, &raw mut fd, &raw mut offset))?;
                    check(close(fd))
                }
            })
        }
        _ => {
            type Properties = unsafe extern "C" fn(
                *mut c_void,
                *const c_void,
                *mut AllocProperties,
                *mut *mut c_void,
            ) -> u32;
            // SAFETY: the type of ze_api.h; the stub's first context is the library's.
            let (properties, context) = unsafe {
                (
                    stub.function::<Properties>("zeMemGetAllocProperties"),
                    stub.function::<unsafe extern "C" fn() -> *mut c_void>("stub_context")(),
                )
            };
            // The runtime keeps its descriptor, and whoever wants it duplicates and closes that.
            let context = context as usize;
            Box::new(move || {
                let next = std::ptr::null();
                let mut export = ExportFd { stype: STYPE_EXPORT_FD, next, flags: EXTERNAL_DMA_BUF, fd: -1 };
                let mut found = AllocProperties {
                    stype: STYPE_ALLOC_PROPERTIES,
                    next: (&raw mut export).cast(),
                    memory_type: 0,
                    id: 0,
                    page_size: 0,
                };
                let (context, nothing) = (context as *mut c_void, std::ptr::null_mut());
                // SAFETY: the structs say what they are; the duplicate is closed here and nowhere else.
                unsafe {
                    check(properties(context, address as *const c_void, &raw mut found, nothing))?;
                    libc::close(libc::fcntl(export.fd, libc::F_DUPFD_CLOEXEC, 3));
                }
                Ok(())
            })
        }
    }
}
