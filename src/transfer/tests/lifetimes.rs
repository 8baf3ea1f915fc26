//! Queue pairs that come and go on one completion queue, whose completions the test chooses.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::task::Wake;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::verbs::CompletionStatus;

#[derive(Default)]
pub(super) struct Provider {
    /// Identifiers of the requests that were posted.
    pub posted: Vec<u64>,
    /// What is to be polled: identifier, status, and queue pair number.
    pub completions: VecDeque<(u64, u32, u32)>,
}

pub(super) type Fake = Mutex<Provider>;

unsafe extern "C" fn post_send(
    pair: *mut ffi::ibv_qp,
    mut wr: *mut ffi::ibv_send_wr,
    _bad: *mut *mut ffi::ibv_send_wr,
) -> c_int {
    // SAFETY: the provider is leaked, and the caller's chain is valid during the call.
    unsafe {
        let provider = &*(*pair).qp_context.cast::<Fake>();
        while let Some(request) = wr.as_ref() {
            provider.lock().unwrap().posted.push(request.wr_id);
            wr = request.next;
        }
    }
    0
}

unsafe extern "C" fn poll_cq(queue: *mut ffi::ibv_cq, count: c_int, into: *mut ffi::ibv_wc) -> c_int {
    // SAFETY: as above.
    let provider = unsafe { &*(*queue).cq_context.cast::<Fake>() };
    let completions = &mut provider.lock().unwrap().completions;
    let taken = completions.len().min(count as usize);
    for (at, (wr_id, status, qp_num)) in completions.drain(..taken).enumerate() {
        // SAFETY: the caller has room for `count` completions, whose first fields are the identifier and the status.
        unsafe {
            let wc = into.add(at);
            wc.write_bytes(0, 1);
            wc.cast::<u64>().write(wr_id);
            wc.cast::<u32>().add(2).write(status);
            (*wc).qp_num = qp_num;
        }
    }
    taken as c_int
}

unsafe extern "C" fn req_notify_cq(_queue: *mut ffi::ibv_cq, _solicited: c_int) -> c_int {
    0
}

pub(super) struct Setup {
    domain: ProtectionDomain,
    pub engine: Arc<Engine>,
    pub provider: &'static Fake,
    context: *mut ffi::ibv_context,
    region: MemoryRegion,
}

impl Setup {
    pub(super) fn new(room: u32) -> Self {
        let (domain, provider) = (domain(), &*Box::leak(Box::new(Fake::default())));
        let mut context = ffi::ibv_context::default();
        context.ops.post_send = Some(post_send);
        context.ops.poll_cq = Some(poll_cq);
        context.ops.req_notify_cq = Some(req_notify_cq);
        // SAFETY: the domain's context lives, and only its device is taken from it.
        context.device = unsafe { (*domain.context().as_raw().as_ptr()).device };
        let context = Box::into_raw(Box::new(context));
        let cq_context = (&raw const *provider).cast_mut().cast();
        let queue = Box::leak(Box::new(ffi::ibv_cq { context, cq_context, ..Default::default() }));
        // SAFETY: the queue is leaked, and the provider has the functions that are called.
        let completions = unsafe { CompletionQueue::from_raw(NonNull::from(queue)) };
        // Nobody sleeps on it.
        let channel = EventFd::new().unwrap();
        let events = Arc::new(Events::new(channel.as_fd()).unwrap());
        let engine = Arc::new(Engine::new(domain.clone(), completions, room, events, None));
        let region = fake::region_of(&domain, crate::dmabuf::BufferId::UNKNOWN, 0..1 << 20, Access::REMOTE);
        Self { domain, engine, provider, context, region }
    }

    pub(super) fn pair(&self, number: u32) -> Arc<Pair> {
        let options = options().busy_poll(false).window(4).chain(1);
        let options = options.queue_pair(options.queue_pair.max_sge(40)).within(u32::MAX, u32::MAX);
        let pair = fake_queue_pair(&self.domain);
        // SAFETY: the queue pair is leaked and nobody else uses it.
        unsafe {
            let raw = &mut *pair.as_raw().as_ptr();
            raw.context = self.context;
            raw.qp_context = (&raw const *self.provider).cast_mut().cast();
            raw.qp_num = number;
        }
        let shared = Shared::ready(pair, self.domain.clone(), options.queue_pair, 1 << 30);
        Arc::new(Pair::new(self.engine.clone(), shared, &options, 8).unwrap())
    }

    pub(super) fn write(&self, pair: &Arc<Pair>) -> Transfer {
        write(pair, &self.region, self.region.remote())
    }

    fn complete(&self, wr_id: u64, status: CompletionStatus, qp_num: u32) {
        self.provider.lock().unwrap().completions.push_back((wr_id, status.0, qp_num));
    }

    fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.engine.events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }
}

/// A key is used again, so the other queue pair of a connection forgets it.
#[test]
fn a_queue_pair_does_not_fail_together_with_a_later_one() {
    let setup = Setup::new(100);
    let (first, messages) = (setup.pair(1), setup.pair(2));
    first.join(&messages);
    let key = first.key();
    drop(first);
    let other = setup.pair(3);
    assert_eq!(other.key(), key);
    messages.shared().set_failed("the peer disconnected");
    messages.engine().lock().touch(messages.key());
    let mut state = setup.engine.lock();
    assert_eq!(state.pair(messages.key()).twin, None);
    setup.engine.drain(&mut state);
    assert!(!state.pair(messages.key()).touched);
}

/// A completion of a queue pair that is gone may come under a number that another one has got.
#[test]
fn a_late_completion_is_of_no_later_queue_pair() {
    let setup = Setup::new(100);
    let first = setup.pair(5);
    drop(setup.write(&first));
    drop(first);
    let second = setup.pair(5);
    let transfer = setup.write(&second);
    let posted = setup.provider.lock().unwrap().posted.clone();
    setup.complete(posted[0], CompletionStatus::SUCCESS, 5);
    assert!(transfer.try_wait().unwrap().is_none(), "the device still has its memory");
    setup.complete(posted[1], CompletionStatus::SUCCESS, 5);
    assert_eq!(transfer.try_wait().unwrap().unwrap().bytes, 1 << 20);
}

/// Room is given back only when the queue has it.
#[test]
fn no_completion_of_a_queue_pair_that_is_gone_is_left() {
    let setup = Setup::new(5000);
    let pair = setup.pair(5);
    (0..4990).for_each(|_| setup.complete(7, CompletionStatus::WR_FLUSH_ERR, 9));
    drop(pair);
    assert_eq!(setup.provider.lock().unwrap().completions.len(), 0);
}

/// Nothing is due on a connection that has failed and was flushed, or the task of a runtime would not sleep.
#[test]
fn a_flushed_connection_sets_no_timer() {
    let setup = Setup::new(100);
    let pair = setup.pair(5);
    let transfer = setup.write(&pair);
    pair.shared().set_failed("it was disconnected");
    setup.engine.lock().touch(pair.key());
    assert!(setup.engine.process_events().unwrap().is_some(), "the flush has a limit");
    let posted = setup.provider.lock().unwrap().posted[0];
    setup.complete(posted, CompletionStatus::WR_FLUSH_ERR, 5);
    assert_eq!(setup.engine.process_events().unwrap(), None);
    transfer.try_wait().unwrap_err();
}

/// Another reader of the device's events found one of a queue pair here.
#[test]
fn a_report_makes_the_descriptor_readable_once() {
    let setup = Setup::new(100);
    setup.engine.process_events().unwrap();
    assert!(!setup.is_readable());
    setup.engine.events.clone().wake();
    assert!(setup.is_readable());
    setup.engine.process_events().unwrap();
    assert!(!setup.is_readable());
}

/// The task of a runtime takes what an event loop waits for.
#[cfg(feature = "tokio")]
#[test]
fn an_event_loop_is_told_of_what_a_task_has_taken() {
    let setup = Setup::new(100);
    let pair = setup.pair(5);
    let transfer = setup.write(&pair);
    assert!(transfer.try_wait().unwrap().is_none());
    assert!(!setup.is_readable());
    let posted = setup.provider.lock().unwrap().posted[0];
    setup.complete(posted, CompletionStatus::SUCCESS, 5);
    // The task looks again, because the descriptor is readable.
    for _ in 0..2 {
        setup.engine.process_events_for_tasks().unwrap();
    }
    assert!(setup.is_readable());
    assert_eq!(transfer.try_wait().unwrap().unwrap().bytes, 1 << 20);
    assert!(!setup.is_readable());
}

/// A transfer that was started after the event loop had looked, and that a thread takes up.
#[test]
fn an_event_loop_is_told_of_an_earlier_timeout() {
    let setup = Setup::new(100);
    let pair = setup.pair(5);
    assert_eq!(setup.engine.process_events().unwrap(), None);
    let transfer = setup.write(&pair);
    assert!(!setup.is_readable());
    // A thread has slept.
    setup.engine.reschedule(&mut setup.engine.lock());
    assert!(setup.is_readable());
    assert!(setup.engine.process_events().unwrap().is_some());
    assert!(!setup.is_readable());
    let posted = setup.provider.lock().unwrap().posted[0];
    setup.complete(posted, CompletionStatus::SUCCESS, 5);
    transfer.try_wait().unwrap().unwrap();
}
