//! Asynchronous events of a context.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dmabuf_rdma::ErrorKind;
use dmabuf_rdma::verbs::{
    AsyncEvent, AsyncEvents, CompletionQueue, Context, Error, Operation, ProtectionDomain, QueuePair,
    QueuePairOptions, WorkRequest,
};
use nix::poll::{PollFd, PollFlags, poll};
use std::os::fd::AsFd;

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::link::Link;
use crate::common::peers::{TIMEOUT, domain};
use crate::common::system::run;

/// Waits for an event, and skips others.
#[track_caller]
fn expect(events: &AsyncEvents, wanted: AsyncEvent) {
    let end = Instant::now() + TIMEOUT;
    let mut others = Vec::new();
    while let Some(event) = events.wait(end.saturating_duration_since(Instant::now())).unwrap() {
        if event == wanted {
            return;
        }
        others.push(event);
    }
    panic!("no {wanted:?} among {others:?}");
}

fn is_readable(events: &AsyncEvents) -> bool {
    poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], 0_u8).unwrap() == 1
}

#[test]
fn every_reader_learns_of_the_port_and_its_gids() {
    let census = Census::take();
    let link = Link::new();
    {
        let domain = link.domain();
        let (first, second) = (domain.context().events().unwrap(), domain.context().events().unwrap());
        // Another context has a queue of its own.
        let other = link.domain();
        let third = other.context().events().unwrap();
        let all = [&first, &second, &third];
        for events in all {
            while events.try_next().is_some() {}
            assert_eq!(events.wait(Duration::from_millis(20)).unwrap(), None);
            assert!(!is_readable(events));
        }
        run("ip", &["link", "set", "going0", "down"]);
        // The second reader finds its descriptor readable after the first one has read from the device.
        expect(&first, AsyncEvent::PortError { port: 1 });
        assert!(is_readable(&second) && is_readable(&third));
        expect(&second, AsyncEvent::PortError { port: 1 });
        expect(&third, AsyncEvent::PortError { port: 1 });
        run("ip", &["link", "set", "going0", "up"]);
        all.into_iter().for_each(|events| expect(events, AsyncEvent::PortActive { port: 1 }));
        run("ip", &["address", "add", "10.99.0.2/24", "dev", "going0"]);
        all.into_iter().for_each(|events| expect(events, AsyncEvent::GidChange { port: 1 }));
        let sleeper = std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| second.wait(TIMEOUT).unwrap());
            std::thread::sleep(Duration::from_millis(100));
            run("ip", &["address", "delete", "10.99.0.2/24", "dev", "going0"]);
            sleeper.join().unwrap()
        });
        assert_eq!(sleeper, Some(AsyncEvent::GidChange { port: 1 }));
    }
    link.deleted(link.delete());
    census.assert_unchanged();
}

/// A queue pair whose completion queue has room for fewer completions than its requests give.
fn overrunning(domain: &ProtectionDomain) -> (CompletionQueue, CompletionQueue, [QueuePair; 2]) {
    let small = CompletionQueue::new(domain.context(), 1).unwrap();
    let receives = CompletionQueue::new(domain.context(), 64).unwrap();
    let options = QueuePairOptions::default();
    let ours = QueuePair::new(domain, &small, &receives, options).unwrap();
    let theirs = QueuePair::new(domain, &receives, &receives, options).unwrap();
    ours.connect(&theirs.endpoint().unwrap()).unwrap();
    theirs.connect(&ours.endpoint().unwrap()).unwrap();
    (small, receives, [ours, theirs])
}

fn overrun([ours, theirs]: &[QueuePair; 2]) {
    for number in 0..32 {
        theirs.post_recv(number, &[]).unwrap();
        ours.post(WorkRequest::new(number, Operation::Send, &[]).signaled()).unwrap();
    }
}

#[test]
fn a_queue_that_overruns_is_named() {
    let domain = domain();
    let events = domain.context().events().unwrap();
    let (small, receives, pairs) = overrunning(&domain);
    assert_ne!(small.handle(), receives.handle());
    overrun(&pairs);
    let event = AsyncEvent::CompletionQueueError { cq: small.handle() };
    expect(&events, event);
    assert!(event.is_fatal());
}

/// `ibv_destroy_qp` and `ibv_destroy_cq` wait for the acknowledgement of each event that was read. Here nobody reads,
/// or another thread reads all the time.
#[test]
fn objects_with_events_are_destroyed_at_once() {
    let census = Census::take();
    for reads in [false, true] {
        let domain = domain();
        let events = domain.context().events().unwrap();
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = 0;
                while reads && !done.load(Ordering::Relaxed) {
                    seen += usize::from(events.try_next().is_some());
                }
                seen
            });
            let start = Instant::now();
            for _ in 0..20 {
                let objects = overrunning(&domain);
                overrun(&objects.2);
                drop(objects);
            }
            assert!(start.elapsed() < TIMEOUT, "{:?}", start.elapsed());
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert_eq!(seen > 0, reads);
        drop((events, domain));
    }
    census.assert_unchanged();
}

/// The owner of a foreign context reads its events: this library takes none, for its connections neither.
#[test]
fn a_foreign_context_keeps_its_events() {
    let domain = domain();
    // SAFETY: the context lives until the end of this function.
    let foreign = unsafe { Context::from_raw(domain.context().as_raw()) };
    let refused = foreign.events();
    let message = assert_refused!(refused, Error::Unavailable { .. });
    assert!(message.contains("the owner of a foreign one reads its events"), "{message}");
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
}
