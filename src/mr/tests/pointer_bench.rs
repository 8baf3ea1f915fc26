//! Measures a hit of the cache by pointer natively: a part of `cargo xtask bench export`. It needs no device: the stub
//! library of CUDA answers, and the entries are fake registrations.
//!
//! The peer is the driver's own look-up of the pointer alone. Both alternate, and what the library adds is the median of
//! the differences.
//!
//! `unsafe` is here to call the stub.

use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::time::Instant;

use gpu_stubs::Stub;

use super::{domain, fake};
use crate::dmabuf::BufferId;
use crate::exporter::{Cuda, DeviceMemory, Runtime};
use crate::mr::{Access, RegionCache};
use crate::tests::common::{Pair, Peer, Processors, Result, Rows, Spread, pairs};

const PAIRS: usize = 301;
const HITS: u64 = 10_000;
const SIZE: u64 = 4 << 20;

#[test]
#[ignore = "a benchmark: cargo xtask bench export"]
fn pointer_hit() -> Result<()> {
    let stub = Stub::load("libcuda.so.1");
    let (cuda, domain, cache) = (Cuda::load()?, domain(), RegionCache::default());
    // Several allocations, as in a real process. The stub finds the first ones sooner.
    let memory: std::result::Result<Vec<DeviceMemory>, _> =
        (0..16).map(|_| cuda.device_memory(SIZE)).collect();
    let memory = memory?;
    for (number, memory) in memory.iter().enumerate() {
        let info = cuda.locate(memory.address())?;
        let buffer = BufferId::from_parts(13, number as u64 + 1);
        let region = fake::region_of(&domain, buffer, 0..SIZE, Access::REMOTE);
        cache.insert_pointer_for_test(&domain, &info, region, Vec::new());
    }
    let base = memory[3].address();
    // Tensors of a pool, 512 bytes apart.
    let tensor = |number: u64| black_box(base + number % (SIZE / 512) * 512);
    let library = || {
        let start = Instant::now();
        for number in 0..HITS {
            let slice = cache.get_pointer(&domain, &cuda, tensor(number), 400, Access::REMOTE)?;
            black_box(slice.len());
        }
        Ok(start.elapsed().as_nanos() as f64 / HITS as f64)
    };
    let driver = look_up(&stub);
    let alone = || {
        let start = Instant::now();
        for number in 0..HITS {
            assert_eq!(black_box(driver(tensor(number))), 0);
        }
        Ok(start.elapsed().as_nanos() as f64 / HITS as f64)
    };
    let (mut rows, processors) = (Rows::new()?, Processors::allowed()?);
    processors.stay_on(0)?;
    let pairs = pairs(PAIRS, library, alone)?;
    processors.all()?;
    let over = |value: fn(&Pair) -> f64| Spread::of(pairs.iter().map(value));
    let of = over(|pair| pair.library);
    rows.add("cache hit by pointer, CUDA's memory", "ns", of, Some(Peer::of(&pairs)), None)?;
    let added = over(|pair| pair.library - pair.bare);
    rows.add("added to the driver's look-up by a hit", "ns", added, None, Some("value <= 150"))?;
    let gauges = cache.gauges();
    assert_eq!((gauges.misses, gauges.entries), (0, 16));
    assert!(gauges.hits >= PAIRS as u64 * HITS);
    Ok(())
}

/// The driver's look-up of a pointer, with the attributes that the library asks for.
fn look_up(stub: &Stub) -> impl Fn(u64) -> c_int {
    const NAMES: [c_int; 8] = [1, 2, 7, 8, 17, 9, 11, 12];
    type Attributes = unsafe extern "C" fn(u32, *const c_int, *const *mut c_void, u64) -> c_int;
    // SAFETY: the type of cuda.h.
    let attributes = unsafe { stub.function::<Attributes>("cuPointerGetAttributes") };
    move |address| {
        let mut words = [0_u64; NAMES.len()];
        let places = words.each_mut().map(|word| std::ptr::from_mut(word).cast::<c_void>());
        // SAFETY: each place has room for its attribute.
        unsafe { attributes(NAMES.len() as u32, NAMES.as_ptr(), places.as_ptr(), address) }
    }
}
