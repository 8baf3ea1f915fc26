//! Connections on a provider that exists only in this process, which carries requests out at once and checks its caller
//! strictly: the order of the requests, the room in both queues, the elements, the signals. For what a guest is too
//! slow for: many threads, and the cost of a block.
//!
//! `unsafe` is here for the provider, which is a table of C functions.

#[cfg(feature = "tokio")]
mod future_bench;
mod lifetimes;
mod post_bench;

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use ibverbs_sys as ffi;
use nix::sys::eventfd::EventFd;

use super::engine::Engine;
use super::events::Events;
use super::job::Job;
use super::pair::Pair;
use super::request::Request;
use super::shared::Shared;
use super::{ConnectionOptions, Transfer};
use crate::mr::tests::{domain, fake};
use crate::mr::{Access, Blocks, MemoryRegion, RegionSlice, RemoteSlice};
use crate::verbs::{CompletionQueue, Operation, ProtectionDomain, fake_queue_pair};

/// What the provider's device has seen. Its address is in the queue pair's `qp_context` and the queue's `cq_context`.
struct Device {
    depth: usize,
    state: Mutex<Queue>,
    /// Requests and elements carried out.
    requests: AtomicU64,
    elements: AtomicU64,
    doorbells: AtomicU64,
}

#[derive(Default)]
struct Queue {
    /// Requests that are posted and whose completion was not polled: identifier, and whether it is signaled.
    posted: VecDeque<(u64, bool)>,
    next: u64,
}

unsafe extern "C" fn post_send(
    pair: *mut ffi::ibv_qp,
    mut wr: *mut ffi::ibv_send_wr,
    _bad: *mut *mut ffi::ibv_send_wr,
) -> c_int {
    // SAFETY: the queue pair is that of `connection`, whose device lives as long.
    let device = unsafe { &*(*pair).qp_context.cast::<Device>() };
    let mut queue = device.state.lock().unwrap();
    let (mut requests, mut elements, mut signaled) = (0, 0, false);
    // SAFETY: the caller's chain and its elements are valid during the call.
    while let Some(request) = unsafe { wr.as_ref() } {
        assert_eq!(request.wr_id, queue.next, "requests come in order");
        signaled = request.send_flags & ffi::ibv_send_flags::IBV_SEND_SIGNALED.0 != 0;
        queue.posted.push_back((request.wr_id, signaled));
        queue.next += 1;
        assert!(queue.posted.len() <= device.depth, "the queue overruns");
        // SAFETY: as above.
        let list = unsafe { std::slice::from_raw_parts(request.sg_list, request.num_sge as usize) };
        assert!(!list.is_empty() && list.iter().all(|element| element.length > 0));
        (requests, elements) = (requests + 1, elements + list.len() as u64);
        wr = request.next;
    }
    assert!(signaled, "the last request of a chain is signaled");
    device.requests.fetch_add(requests, Ordering::Relaxed);
    device.elements.fetch_add(elements, Ordering::Relaxed);
    device.doorbells.fetch_add(1, Ordering::Relaxed);
    0
}

unsafe extern "C" fn poll_cq(queue: *mut ffi::ibv_cq, count: c_int, into: *mut ffi::ibv_wc) -> c_int {
    // SAFETY: the queue is that of `connection`, whose device lives as long.
    let device = unsafe { &*(*queue).cq_context.cast::<Device>() };
    let (mut state, mut taken) = (device.state.lock().unwrap(), 0);
    while taken < count
        && let Some((wr_id, signaled)) = state.posted.pop_front()
    {
        if signaled {
            // SAFETY: the caller has room for `count` completions.
            unsafe {
                let wc = into.add(taken as usize);
                // All zeros are a success. The identifier is the first field.
                wc.write_bytes(0, 1);
                wc.cast::<u64>().write(wr_id);
            }
            taken += 1;
        }
    }
    taken
}

/// A connection on the provider. It leaks what libibverbs would own.
fn connection(domain: &ProtectionDomain, options: ConnectionOptions) -> (Arc<Pair>, &'static Device) {
    let pair_options = options.queue_pair.max_sge(40);
    let options = options.queue_pair(pair_options).within(u32::MAX, u32::MAX);
    let device: &'static Device = Box::leak(Box::new(Device {
        depth: options.window as usize,
        state: Mutex::default(),
        requests: AtomicU64::new(0),
        elements: AtomicU64::new(0),
        doorbells: AtomicU64::new(0),
    }));
    let state = (&raw const *device).cast_mut().cast::<c_void>();
    let mut context = ffi::ibv_context::default();
    context.ops.post_send = Some(post_send);
    context.ops.poll_cq = Some(poll_cq);
    // SAFETY: the domain's context lives, and only its device is taken from it.
    context.device = unsafe { (*domain.context().as_raw().as_ptr()).device };
    let context = Box::into_raw(Box::new(context));
    let queue = Box::leak(Box::new(ffi::ibv_cq { context, cq_context: state, ..Default::default() }));
    // SAFETY: the queue is leaked, and the provider has the functions that busy-polling calls.
    let completions = unsafe { CompletionQueue::from_raw(NonNull::from(queue)) };
    let pair = fake_queue_pair(domain);
    // SAFETY: the queue pair is leaked and nobody else uses it.
    unsafe { ((*pair.as_raw().as_ptr()).context, (*pair.as_raw().as_ptr()).qp_context) = (context, state) };
    let shared = Shared::ready(pair, domain.clone(), options.queue_pair, 1 << 30);
    // Nobody sleeps on it.
    let channel = EventFd::new().unwrap();
    let events = Arc::new(Events::new(channel.as_fd()).unwrap());
    let room = 2 * options.window;
    let engine = Arc::new(Engine::new(domain.clone(), completions, room, events, None));
    (Arc::new(Pair::new(engine, shared, &options, room).unwrap()), device)
}

fn write(
    pair: &Arc<Pair>,
    local: impl Into<Blocks<RegionSlice>>,
    remote: impl Into<Blocks<RemoteSlice>>,
) -> Transfer {
    let request = Request::one_sided(local, remote, |remote| Operation::Write { remote });
    let (opcode, length) = (request.opcode(), request.len());
    Transfer::new(pair.clone(), None, pair.start(request, 1 << 20).unwrap(), opcode, length)
}

fn options() -> ConnectionOptions {
    ConnectionOptions::default().busy_poll(true)
}

/// Eight threads start, wait for, cancel and drop transfers of one connection. Every block is posted once or cancelled,
/// and at the end the connection holds no memory.
#[test]
fn threads_on_one_connection() {
    const TIMES: u64 = 3000;
    let domain = domain();
    let (pair, device) = connection(&domain, options().window(16).chain(4));
    let region = fake::region_of(&domain, crate::dmabuf::BufferId::UNKNOWN, 0..1 << 20, Access::REMOTE);
    let lost = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (pair, region, lost) = (&pair, &region, &lost);
            scope.spawn(move || {
                let mut kept = VecDeque::new();
                for time in 0..TIMES {
                    let blocks = 1 + (time * 7 + thread) % 40;
                    let local = region.slice(..).unwrap().strided(64, 128, blocks as usize).unwrap();
                    let remote = RemoteSlice::from(region.remote());
                    let transfer = write(pair, &local, remote.strided(64, 128, blocks as usize).unwrap());
                    match (time + thread) % 4 {
                        0 => assert_eq!(transfer.wait().unwrap().bytes, blocks * 64),
                        1 => kept.push_back((transfer, blocks)),
                        2 => drop(transfer),
                        _ => {
                            transfer.cancel();
                            if let Err(error) = transfer.wait() {
                                let super::Error::Cancelled { done, usable: true, .. } = error else {
                                    panic!("{error:?}")
                                };
                                assert!(done.is_multiple_of(64));
                                lost.fetch_add(blocks - done / 64, Ordering::Relaxed);
                            }
                        }
                    }
                    if kept.len() > 5
                        && let Some((transfer, blocks)) = kept.pop_back()
                    {
                        assert_eq!(transfer.wait().unwrap().bytes, blocks * 64);
                    }
                }
                for (transfer, blocks) in kept {
                    assert_eq!(transfer.wait().unwrap().bytes, blocks * 64);
                }
            });
        }
    });
    // What was dropped in flight is carried out too.
    write(&pair, &region, region.remote()).wait().unwrap();
    let asked: u64 =
        (0..8).flat_map(|thread| (0..TIMES).map(move |time| 1 + (time * 7 + thread) % 40)).sum::<u64>() + 1;
    let moved = device.requests.load(Ordering::Relaxed);
    assert_eq!(moved + lost.load(Ordering::Relaxed), asked, "each block once");
    region.deregister().expect("no transfer holds the region any more");
}

/// Chains hold messages of several transfers, and the window is kept.
#[test]
fn blocks_share_doorbells() {
    let domain = domain();
    let (pair, device) = connection(&domain, options().window(128).chain(32));
    let region: MemoryRegion =
        fake::region_of(&domain, crate::dmabuf::BufferId::UNKNOWN, 0..1 << 20, Access::REMOTE);
    let local = region.slice(..).unwrap().strided(64, 128, 4096).unwrap();
    let remote = RemoteSlice::from(region.remote()).strided(64, 128, 4096).unwrap();
    write(&pair, &local, &remote).wait().unwrap();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let seen = (count(&device.requests), count(&device.elements), count(&device.doorbells));
    assert_eq!(seen, (4096, 4096, 128));
    // Neighbours on both sides are one element, neighbours at the peer one request.
    let row = RemoteSlice::from(region.remote()).strided(64, 64, 4096).unwrap();
    write(&pair, region.slice(..).unwrap().strided(64, 64, 4096).unwrap(), &row).wait().unwrap();
    assert_eq!((count(&device.requests), count(&device.elements)), (4097, 4097));
    write(&pair, &local, &row).wait().unwrap();
    // Forty elements a request.
    assert_eq!((count(&device.requests), count(&device.elements)), (4097 + 103, 4097 + 4096));
}

/// The size of a job bounds what a transfer costs to keep.
#[test]
fn a_job_is_small() {
    assert!(size_of::<Job>() <= 552, "{}", size_of::<Job>());
}

/// A child of `fork` is refused, also while another thread of the parent holds the lock.
#[test]
fn a_child_uses_no_connection_of_its_parent() {
    let domain = domain();
    let (pair, device) = connection(&domain, options().window(16).chain(4));
    let region = fake::region_of(&domain, crate::dmabuf::BufferId::UNKNOWN, 0..4096, Access::REMOTE);
    let transfer = write(&pair, &region, region.remote());
    let notifications = super::Notifications::of(pair.engine(), Some(&pair));
    let held = pair.engine().lock();
    let unusable = |result: Result<(), super::Error>| match result {
        Err(super::Error::Unusable { reason, .. }) => reason.contains("the parent of this process"),
        _ => false,
    };
    let refused = crate::observe::in_a_child(|| {
        let request = Request::one_sided(&region, region.remote(), |remote| Operation::Write { remote });
        transfer.cancel();
        unusable(pair.start(request, 1 << 20).map(drop))
            && unusable(transfer.wait().map(drop))
            && transfer.try_wait().is_err()
            && unusable(pair.engine().process_events().map(drop))
            && unusable(notifications.try_take().map(drop))
            && transfer.progress() == 0
    });
    drop(held);
    assert!(refused);
    assert_eq!(transfer.wait().unwrap().bytes, 4096);
    assert_eq!(device.requests.load(Ordering::Relaxed), 1, "nothing is posted by the child");
}
