//! Lengths around multiples of the message size, here 4 KiB; and what a transfer allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use dmabuf_rdma::Connection;
use dmabuf_rdma::transfer::ConnectionOptions;

use crate::common::wire::Wire;
use crate::common::{assert_same, contents, pattern};

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends has destroyed its count.
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
fn lengths_around_multiples_of_the_message_size() {
    const MESSAGE: u64 = 4096;
    const SIZE: u64 = 64 * MESSAGE;
    let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(MESSAGE).window(4));
    let (ours, source) = near.filled(SIZE, 1);
    let from = contents(&ours);
    // One message, a chain, a window and more; and one byte less and one more than each.
    for messages in [1, 2, 4, 5, 8, 32] {
        for length in [messages * MESSAGE - 1, messages * MESSAGE, messages * MESSAGE + 1] {
            let (theirs, target) = far.filled(SIZE, messages);
            let remote = target.remote();
            let place = remote.slice(13..13 + length).unwrap();
            near.connection.write(source.slice(7..7 + length).unwrap(), &place).unwrap().wait().unwrap();
            let mut expected = pattern(SIZE as usize, messages);
            let end = 13 + length as usize;
            expected[13..end].copy_from_slice(&from[7..7 + length as usize]);
            assert_same(&contents(&theirs), &expected, &format!("{length} bytes written"));
            let (back, into) = near.filled(SIZE, 99);
            near.connection.read(into.slice(21..21 + length).unwrap(), &place).unwrap().wait().unwrap();
            let mut expected = pattern(SIZE as usize, 99);
            expected[21..21 + length as usize].copy_from_slice(&from[7..7 + length as usize]);
            assert_same(&contents(&back), &expected, &format!("{length} bytes read"));
        }
    }
}

/// A transfer allocates nothing after the first, whether it has one work request or a thousand.
#[test]
fn work_requests_allocate_nothing() {
    let options = ConnectionOptions::default().message_size(1024).window(16);
    let Wire { mut near, far } = Wire::with(options);
    let ((_ours, source), (_theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let remote = target.remote();
    let write = |connection: &mut Connection, length: u64| {
        connection
            .write(source.slice(..length).unwrap(), remote.slice(..length).unwrap())
            .unwrap()
            .wait()
            .unwrap();
    };
    write(&mut near.connection, 1024);
    let one = allocations(|| write(&mut near.connection, 1024));
    let thousand = allocations(|| write(&mut near.connection, 1 << 20));
    assert_eq!((one, thousand), (0, 0));
}
