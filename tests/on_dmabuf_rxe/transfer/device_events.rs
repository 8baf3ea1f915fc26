//! Transfers that end because the device reports a failure, or is removed.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::{Duration, Instant};

use dmabuf_rdma::ErrorKind;
use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::transfer::{ConnectionOptions, Error, Transferred, Worker, WorkerOptions};
use dmabuf_rdma::verbs::AsyncEvent;
use nix::poll::{PollFd, PollFlags, poll};

use crate::assert_refused;
use crate::common::census::{Census, regions};
use crate::common::link::Link;
use crate::common::peers::TIMEOUT;
use crate::common::system::{Setting, again, is_child, run};
use crate::common::wire::End;

/// What the child prints when the device may go.
const READY: &str = "the receive waits";

/// rxe has no event for its removal, and the deletion waits until every process has closed the device. librdmacm keeps
/// it open until the process ends, so the connections are in another process. The connection manager announces the
/// removal.
#[test]
fn a_device_that_is_removed_ends_a_wait_of_a_connection_by_address() {
    if is_child() {
        return ends_by_removal();
    }
    let census = Census::take();
    let link = Link::new();
    let mut child = again(&[]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains(READY)), "the child ended early");
    let delete = link.delete();
    let rest: Vec<_> = lines.collect();
    assert!(child.wait().unwrap().success(), "{rest:#?}");
    link.deleted(delete);
    census.assert_unchanged();
}

fn ends_by_removal() {
    let listener = Listener::bind(SocketAddr::from(([10, 99, 0, 1], 0))).unwrap();
    let new = || End::new("going", ConnectionOptions::default());
    let (mut near, mut far) = (new(), new());
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            listener.accept_request(TIMEOUT).unwrap().accept(&mut far.connection, &[], TIMEOUT).unwrap();
        });
        let outgoing = Outgoing::resolve(listener.local_addr(), None, TIMEOUT).unwrap();
        outgoing.connect(&mut near.connection, &[], TIMEOUT).unwrap();
        server.join().unwrap();
    });
    let (_buffer, into) = near.filled(4096, 1);
    let receive = near.connection.recv(&into).unwrap();
    println!("{READY}");
    let start = Instant::now();
    let ended = receive.wait();
    let message = assert_refused!(
        ended,
        Error::DeviceEvent { event: AsyncEvent::DeviceFatal, done: 0, length: 4096, .. }
    );
    assert!(message.starts_with("going: the device failed or was removed; 0 of 4096 bytes"), "{message}");
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::DeviceGone);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    // Later transfers are refused by the same name.
    let later = near.connection.recv(&into);
    assert_refused!(later, Error::DeviceEvent { event: AsyncEvent::DeviceFatal, .. });
    assert!(near.connection.failure().unwrap().contains("going: the device failed"));
}

/// Two connected ends on the device `going`, which the kernel removes although they use it, as a NIC that is
/// unplugged.
fn on_an_unpluggable_device() -> (Link, End, End) {
    let _unplug = Setting::new("/sys/module/rdma_rxe/parameters/unplug", "Y");
    let link = Link::new();
    let new = || End::new("going", ConnectionOptions::default());
    let (near, far) = (new(), new());
    near.connection.connect(&far.connection.endpoint()).unwrap();
    far.connection.connect(&near.connection.endpoint()).unwrap();
    (link, near, far)
}

#[track_caller]
fn assert_gone(ended: Result<Transferred, Error>) -> u64 {
    let Err(Error::DeviceEvent { device, event: AsyncEvent::DeviceFatal, done, .. }) = &ended else {
        panic!("{ended:?}");
    };
    assert_eq!(device, "going");
    let done = *done;
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::DeviceGone);
    done
}

#[test]
fn an_unplugged_device_ends_what_is_in_flight_and_what_waits_at_once() {
    let before = regions();
    let (link, near, far) = on_an_unpluggable_device();
    let (events, more) = (near.domain.context().events().unwrap(), far.domain.context().events().unwrap());
    let ((_ours, source), (_theirs, target)) = (near.filled(256 << 20, 1), far.filled(256 << 20, 2));
    let write = near.connection.write(&source, target.remote()).unwrap();
    // A sleeping thread, one that polls the descriptor, and a future nobody polls until it is woken.
    let receive = far.connection.recv(&target).unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || (receive.wait(), Instant::now()));
        while write.progress() == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let start = Instant::now();
        link.deleted(link.delete());
        let deleted = start.elapsed();
        let done = assert_gone(write.wait());
        assert!(done > 0 && done < source.len(), "{done}");
        let (ended, at) = waiter.join().unwrap();
        assert_gone(ended);
        assert!(at - start < Duration::from_secs(10) + deleted, "{:?} {deleted:?}", at - start);
    });
    for events in [&events, &more] {
        let mut seen = std::iter::from_fn(|| events.wait(Duration::from_secs(5)).unwrap());
        assert!(seen.any(|event| event == AsyncEvent::DeviceFatal));
        // And the descriptor is quiet again.
        while events.try_next().is_some() {}
        assert_eq!(events.wait(Duration::from_millis(50)).unwrap(), None);
    }
    // Nothing starts any more, and nothing blocks.
    let refused = near.connection.write(&source, target.remote()).and_then(|transfer| transfer.wait());
    assert_gone(refused);
    let start = Instant::now();
    drop((source, target, near, far, events, more));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(regions(), before);
}

#[test]
fn an_event_loop_and_a_busy_poller_learn_of_an_unplugged_device() {
    let _unplug = Setting::new("/sys/module/rdma_rxe/parameters/unplug", "Y");
    let link = Link::new();
    let new = |busy_poll| End::new("going", ConnectionOptions::default().busy_poll(busy_poll));
    let ends = [new(false), new(true)];
    for end in &ends {
        end.connection.connect(&end.connection.endpoint()).unwrap();
    }
    let memory = ends.each_ref().map(|end| end.filled(4096, 1));
    let [looped, busy] = [0, 1].map(|at| ends[at].connection.recv(&memory[at].1).unwrap());
    assert!(looped.try_wait().unwrap().is_none());
    ends[0].connection.process_events().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || busy.wait());
        link.deleted(link.delete());
        let end = Instant::now() + TIMEOUT;
        let outcome = loop {
            assert!(Instant::now() < end, "the event loop learned nothing");
            let mut ready = [PollFd::new(ends[0].connection.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut ready, 10_000_u16).unwrap(), 1, "the descriptor is quiet");
            match looped.try_wait() {
                Ok(None) => {}
                Ok(Some(moved)) => break Ok(moved),
                Err(error) => break Err(error),
            }
        };
        assert_gone(outcome);
        assert_gone(waiter.join().unwrap());
    });
}

/// Nobody but the worker reads the events of its device, and its descriptor does not stay readable.
#[test]
fn a_worker_without_a_connection_reads_the_events_of_its_device() {
    let census = Census::take();
    let link = Link::new();
    {
        let worker = Worker::new(&link.domain(), WorkerOptions::default().notifications(4)).unwrap();
        let readable =
            |timeout: u16| poll(&mut [PollFd::new(worker.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 1;
        let quiet = || {
            let mut looks = 0;
            while readable(50) {
                worker.process_events().unwrap();
                looks += 1;
                assert!(looks < 50, "the descriptor stays readable");
            }
        };
        worker.process_events().unwrap();
        quiet();
        run("ip", &["link", "set", "going0", "down"]);
        assert!(readable(20_000), "the port went down");
        quiet();
    }
    link.deleted(link.delete());
    census.assert_unchanged();
}
