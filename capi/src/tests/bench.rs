//! What a call costs above the same in Rust: `cargo xtask bench c`.
//!
//! What needs no device is called as C calls it. The start of a transfer takes three handles and returns one; its part of the
//! C library is measured around an operation that does nothing but make a value of the size of a `Transfer`.

use std::hint::black_box;
use std::ptr::null_mut;
use std::time::Instant;

use dmabuf_rdma::dmabuf::BufferId;
use dmabuf_rdma::mr::{Access, RemoteRun};
use dmabuf_rdma::verbs::Rkey;
use dmabuf_rdma::{Iova, RemoteRegion, RemoteSlice, Transfer};

use self::common::{Pair, Result, Rows, Spread, pairs, stay_on_one_processor};
use super::{Handle, Table, test_handle};
use crate::arguments::store;
use crate::handle::{self, get};
use crate::remote::{drdma_remote, drdma_remote_length, drdma_remote_slice, drdma_remote_unref};
use crate::status::{call, drdma_status};

#[path = "../../../benches/common/mod.rs"]
#[allow(dead_code)]
mod common;

const PAIRS: usize = 301;
const CALLS: usize = 1000;
/// Handles that are held at once.
const HELD: usize = 50;

/// As large as a transfer.
type Moved = [u8; size_of::<Transfer>()];

test_handle!(moved, 11, Moved);

/// As `drdma_write`, without the write.
unsafe extern "C" fn start(
    connection: *mut drdma_remote,
    local: *mut drdma_remote,
    remote: *mut drdma_remote,
    transfer: *mut *mut moved,
) -> drdma_status {
    call(|| {
        // SAFETY: the caller has references, and the place is valid.
        unsafe {
            let (connection, local, remote) = (get(connection)?, get(local)?, get(remote)?);
            store(transfer, || Ok(nothing(connection, local, remote)))
        }
    })
}

#[inline(never)]
fn nothing(connection: &RemoteSlice, local: &RemoteSlice, remote: &RemoteSlice) -> Moved {
    black_box((connection, local, remote));
    black_box([7; size_of::<Transfer>()])
}

/// What it costs to make so many handles, and to release them, beside making and dropping the objects.
fn two_rows<H, T>(
    mut make: impl FnMut(&mut *mut H),
    mut release: impl FnMut(*mut H),
    mut object: impl FnMut() -> T,
) -> Result<(Vec<Pair>, Vec<Pair>)> {
    let (mut handles, mut objects) = ([null_mut(); HELD], Vec::with_capacity(HELD));
    let (mut made, mut released) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let mut sums = [0.0; 4];
        for _ in 0..CALLS / HELD {
            let (start, count) = (Instant::now(), HELD as f64);
            handles.iter_mut().for_each(&mut make);
            let after_make = Instant::now();
            handles.iter().rev().for_each(|&handle| release(handle));
            let after_release = Instant::now();
            objects.extend((0..HELD).map(|_| black_box(object())));
            let after_objects = Instant::now();
            objects.clear();
            let end = Instant::now();
            let times = [
                after_make - start,
                after_release - after_make,
                after_objects - after_release,
                end - after_objects,
            ];
            sums.iter_mut().zip(times).for_each(|(sum, time)| *sum += time.as_nanos() as f64 / count);
        }
        let each = |at: usize| sums[at] / (CALLS / HELD) as f64;
        made.push(Pair { library: each(0), bare: each(2) });
        released.push(Pair { library: each(1), bare: each(3) });
    }
    Ok((made, released))
}

/// Nanoseconds of a call.
fn time(mut work: impl FnMut()) -> Result<f64> {
    let start = Instant::now();
    (0..CALLS).for_each(|_| work());
    Ok(start.elapsed().as_nanos() as f64 / CALLS as f64)
}

#[test]
#[ignore = "a benchmark: cargo xtask bench c"]
fn calls() -> Result<()> {
    stay_on_one_processor()?;
    let mut rows = Rows::new()?;
    // The median of what a pair of measurements differs by.
    let mut add = |name: &str, turns: Vec<Pair>| {
        let above = Spread::of(turns.iter().map(|turn| turn.library - turn.bare));
        rows.add(name, "ns above Rust", above, None, Some("value <= 20"))
    };
    let run = RemoteRun { iova: Iova(4096), length: 1 << 20, rkey: Rkey(7) };
    let slice = RemoteSlice::from(RemoteRegion::new([run], Access::REMOTE, BufferId::UNKNOWN)?);
    let remote = handle::new::<drdma_remote>(slice.clone()).ok().ok_or("no handle")?;

    let length = || {
        // SAFETY: the handle has a reference.
        black_box(unsafe { drdma_remote_length(black_box(remote)) });
    };
    let turns = pairs(
        PAIRS,
        || time(length),
        || {
            time(|| {
                black_box(black_box(&slice).len());
            })
        },
    )?;
    add("drdma_remote_length", turns)?;

    // SAFETY: the handle has a reference, and the place is valid.
    let slice_of = |part: &mut _| unsafe { drdma_remote_slice(black_box(remote), 64, 64, part) };
    let (made, released) = two_rows(
        |part| assert_eq!(slice_of(part), drdma_status::DRDMA_OK),
        |part| assert_eq!(drdma_remote_unref(part), drdma_status::DRDMA_OK),
        || black_box(&slice).slice(64..128).unwrap(),
    )?;
    add("drdma_remote_slice", made)?;
    add("drdma_remote_unref", released)?;

    // SAFETY: the handles have references, and the place is valid.
    let start_at = |transfer: &mut _| unsafe { start(black_box(remote), remote, remote, transfer) };
    let (started, released) = two_rows(
        |transfer| assert_eq!(start_at(transfer), drdma_status::DRDMA_OK),
        |transfer| assert_eq!(call(|| handle::release(transfer)), drdma_status::DRDMA_OK),
        || nothing(&slice, &slice, &slice),
    )?;
    add("the start of a transfer", started)?;
    add("the release of its handle", released)?;
    drop(handle::release(remote));
    Ok(())
}
