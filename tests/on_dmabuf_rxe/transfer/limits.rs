//! The boundaries that 32-bit lengths have, with a message limit of 4 KiB in the place of 2 GiB; and what
//! a request may cost.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use dmabuf_rdma::transfer::{Connection, ConnectionOptions, LocalRange, Request};

use crate::common::wire::Wire;
use crate::common::{assert_same, contents, pattern};

/// Counts what this thread allocates.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is the system's allocator; the count is a plain number of this thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no count any more.
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps to the rules of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps to the rules of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(action: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    action();
    COUNT.get() - before
}

#[test]
fn lengths_around_every_power_of_two_of_messages() {
    const LIMIT: u64 = 4096;
    const SIZE: u64 = 64 * LIMIT;
    let Wire { mut near, far } =
        Wire::with(ConnectionOptions { message: LIMIT, window: 4, ..Default::default() });
    let (ours, source) = near.filled(SIZE, 1);
    let from = contents(&ours);
    // One message, two, the window, the window and a list, and all of these and one byte off.
    for messages in [1, 2, 4, 5, 8, 32] {
        for length in [messages * LIMIT - 1, messages * LIMIT, messages * LIMIT + 1] {
            let (theirs, target) = far.filled(SIZE, messages);
            let remote = target.remote();
            let range = |at: u64| LocalRange::from(&source).range(at, length).unwrap();
            near.connection.write(range(7), remote.range(13, length).unwrap()).unwrap();
            let mut expected = pattern(SIZE as usize, messages);
            let end = 13 + length as usize;
            expected[13..end].copy_from_slice(&from[7..7 + length as usize]);
            assert_same(&contents(&theirs), &expected, &format!("{length} bytes written"));
            let (back, into) = near.filled(SIZE, 99);
            let local = LocalRange::from(&into).range(21, length).unwrap();
            near.connection.read(local, remote.range(13, length).unwrap()).unwrap();
            let mut expected = pattern(SIZE as usize, 99);
            expected[21..21 + length as usize].copy_from_slice(&from[7..7 + length as usize]);
            assert_same(&contents(&back), &expected, &format!("{length} bytes read"));
        }
    }
}

/// A transfer of a thousand requests allocates as little as one of one.
#[test]
fn requests_are_not_allocated() {
    let options = ConnectionOptions { message: 1024, window: 16, ..Default::default() };
    let Wire { mut near, far } = Wire::with(options);
    let ((_ours, source), (_theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let remote = target.remote();
    let moves = |connection: &mut Connection, length: u64| {
        let local = LocalRange::from(&source).range(0, length).unwrap();
        let request = Request::write(local, remote.range(0, length).unwrap());
        connection.start(request).unwrap().wait().unwrap();
    };
    moves(&mut near.connection, 1024);
    let one = allocations(|| moves(&mut near.connection, 1024));
    let thousand = allocations(|| moves(&mut near.connection, 1 << 20));
    assert_eq!((one, thousand), (0, 0));
}
