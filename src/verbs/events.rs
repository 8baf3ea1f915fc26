//! Asynchronous events of a device context.
//!
//! libibverbs has one queue of events for each context, and whoever reads an event takes it from all others. So one
//! place reads: the [`Dispatcher`] of a context. It acknowledges each event at once, because `ibv_destroy_qp` and
//! `ibv_destroy_cq` wait until every event that was read is acknowledged, and copies it to each inbox it concerns.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use ibverbs_sys as ffi;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::Result;
use super::{AsyncEvent, Context};

/// Maximum number of events that wait for one reader. Then the oldest are dropped, and counted.
const MAX_WAITING: usize = 1024;

/// What an inbox gets.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Concerns {
    All,
    /// Only what makes this queue pair unusable, or these queues without one.
    Fatal {
        qp_num: Option<u32>,
        cq: u32,
        srq: Option<u32>,
    },
}

impl Concerns {
    fn contain(self, event: AsyncEvent) -> bool {
        match self {
            Self::All => true,
            Self::Fatal { qp_num: ours, cq: queue, srq: receives } => match event {
                AsyncEvent::DeviceFatal => true,
                AsyncEvent::QueuePairFatal { qp_num }
                | AsyncEvent::QueuePairRequestError { qp_num }
                | AsyncEvent::QueuePairAccessError { qp_num } => Some(qp_num) == ours,
                AsyncEvent::CompletionQueueError { cq } => cq == queue,
                AsyncEvent::SharedReceiveQueueError { srq } => Some(srq) == receives,
                _ => false,
            },
        }
    }
}

/// The events of one reader. Whoever puts some in calls the waker, since another thread may have read them.
pub(crate) struct Inbox {
    concerns: Concerns,
    waiting: Mutex<(VecDeque<AsyncEvent>, u64)>,
    waker: Waker,
}

impl Inbox {
    fn new(concerns: Concerns, waker: Waker) -> Self {
        Self { concerns, waiting: Mutex::default(), waker }
    }

    fn push(&self, event: AsyncEvent) {
        let mut waiting = lock(&self.waiting);
        let (events, dropped) = &mut *waiting;
        if events.len() == MAX_WAITING {
            events.pop_front();
            *dropped += 1;
        }
        events.push_back(event);
    }

    /// Takes the next event; `empty` runs under the lock if there is none.
    fn pop_or(&self, empty: impl FnOnce()) -> Option<AsyncEvent> {
        let mut waiting = lock(&self.waiting);
        let (events, dropped) = &mut *waiting;
        if *dropped > 0 {
            return Some(AsyncEvent::Dropped { count: std::mem::take(dropped) });
        }
        let event = events.pop_front();
        if event.is_none() {
            empty();
        }
        event
    }

    /// Takes the next event.
    pub(crate) fn pop(&self) -> Option<AsyncEvent> {
        self.pop_or(|| ())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the events of one context for all who listen.
#[derive(Default)]
pub(super) struct Dispatcher {
    inboxes: Mutex<Vec<Weak<Inbox>>>,
    /// Whether the kernel said that no event will follow.
    ended: AtomicBool,
}

impl Dispatcher {
    /// Adds a reader. The descriptor becomes non-blocking.
    pub(super) fn subscribe(&self, fd: BorrowedFd<'_>, inbox: Inbox) -> io::Result<Arc<Inbox>> {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let inbox = Arc::new(inbox);
        let mut inboxes = lock(&self.inboxes);
        inboxes.retain(|inbox| inbox.strong_count() > 0);
        inboxes.push(Arc::downgrade(&inbox));
        Ok(inbox)
    }

    /// Reads all events that are there, and gives each to those whom it concerns.
    ///
    /// # Safety
    /// `context` is open and of this process, and nobody else reads its events.
    pub(super) unsafe fn dispatch(&self, context: *mut ffi::ibv_context) {
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        let mut to_wake = Vec::new();
        {
            let inboxes = lock(&self.inboxes);
            let mut deliver = |event: AsyncEvent| {
                for inbox in inboxes.iter().filter_map(Weak::upgrade).filter(|i| i.concerns.contain(event)) {
                    inbox.push(event);
                    to_wake.push(inbox);
                }
            };
            loop {
                let mut raw = ffi::ibv_async_event {
                    element: ffi::ibv_async_event__bindgen_ty_1 { port_num: 0 },
                    event_type: 0,
                };
                // SAFETY: the caller guarantees an open context, and `raw` is a local variable.
                if unsafe { ffi::ibv_get_async_event(context, &mut raw) } != 0 {
                    match Errno::last() {
                        Errno::EAGAIN | Errno::EINTR => {}
                        // The kernel took the device away, and the event of that was read before.
                        errno => {
                            tracing::debug!(%errno, "no more asynchronous events");
                            self.ended.store(true, Ordering::Relaxed);
                        }
                    }
                    break;
                }
                // SAFETY: the event was just read, and is acknowledged once, after it was copied.
                let event = unsafe {
                    let event = AsyncEvent::of(&raw);
                    ffi::ibv_ack_async_event(&mut raw);
                    event
                };
                tracing::debug!(%event, "asynchronous event");
                deliver(event);
            }
        }
        // Unlocked: a waker may do anything.
        to_wake.iter().for_each(|inbox| inbox.waker.wake_by_ref());
    }
}

/// Makes the descriptor of an [`AsyncEvents`] readable.
struct Notice(EventFd);

impl Wake for Notice {
    fn wake(self: Arc<Self>) {
        // Fails only if the counter is full, and then the descriptor is readable anyway.
        let _ = self.0.write(1);
    }
}

/// A reader of the asynchronous events of a [`Context`], from [`Context::events`].
///
/// Every reader gets every event that the kernel reports after the reader was made. Events are acknowledged as they
/// are read, so none keeps an object from being destroyed. Up to 1024 events wait for a reader; then the oldest are
/// dropped, and [`AsyncEvent::Dropped`] says how many.
///
/// The descriptor ([`AsFd`]) is readable when [`try_next`](Self::try_next) may return an event.
#[doc(alias = "ibv_get_async_event")]
pub struct AsyncEvents {
    inbox: Arc<Inbox>,
    epoll: Epoll,
    notice: Arc<Notice>,
    context: Context,
}

impl fmt::Debug for AsyncEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AsyncEvents").field(&self.context.device_name()).finish()
    }
}

impl AsyncEvents {
    pub(super) fn new(context: &Context) -> Result<Self> {
        let failed = || context.failed("create the descriptors for asynchronous events");
        let made = || {
            let notice = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
            Ok((Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, Arc::new(Notice(notice))))
        };
        let (epoll, notice) = made().map_err(|errno: Errno| failed()(errno.into()))?;
        let readable = || EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(&notice.0, readable()).map_err(|errno| failed()(errno.into()))?;
        let inbox = context.subscribe(Concerns::All, notice.clone().into())?;
        epoll.add(context.async_fd(), readable()).map_err(|errno| failed()(errno.into()))?;
        Ok(Self { inbox, epoll, notice, context: context.clone() })
    }

    /// Returns the next event, without waiting; always `None` in a child of `fork`, whose parent gets them.
    pub fn try_next(&self) -> Option<AsyncEvent> {
        if !self.context.is_own() {
            // The descriptors are the parent's too: the child would take a notice away.
            return None;
        }
        self.context.dispatch_events();
        if self.context.dispatcher().is_some_and(|dispatcher| dispatcher.ended.load(Ordering::Relaxed)) {
            // The kernel leaves the descriptor readable.
            let _ = self.epoll.delete(self.context.async_fd());
        }
        self.inbox.pop_or(|| {
            // Those who put an event in notify afterwards.
            let _ = self.notice.0.read();
        })
    }

    /// Returns the next event, and waits for it at most this long; `None` if none came, and at once in a child of
    /// `fork`.
    ///
    /// # Errors
    /// [`Error::Device`](super::Error::Device): the descriptor cannot be polled.
    pub fn wait(&self, timeout: Duration) -> Result<Option<AsyncEvent>> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(event) = self.try_next() {
                return Ok(Some(event));
            }
            let left = deadline.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() || !self.context.is_own() {
                return Ok(None);
            }
            let left = PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.context.failed("wait for asynchronous events")(errno.into())),
            }
        }
    }
}

impl AsFd for AsyncEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl AsRawFd for AsyncEvents {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Context {
    /// A new reader of the asynchronous events of this context: the device or a queue failed, a port went down or
    /// came up, its GIDs changed, … It gets what is reported from now on. Any number of readers may exist, and
    /// connections notice what concerns them with or without a reader.
    ///
    /// The first reader, and the first connection, make the descriptor `async_fd` of the context non-blocking. From
    /// then on do not call `ibv_get_async_event` on [`as_raw`](Self::as_raw): it would take events from the readers.
    ///
    /// # Errors
    /// - [`Error::Unavailable`](super::Error::Unavailable): another library opened the context, and reads its events.
    /// - [`Error::Device`](super::Error::Device): `EMFILE` if no descriptor is free.
    #[doc(alias("ibv_get_async_event", "ibv_ack_async_event"))]
    pub fn events(&self) -> Result<AsyncEvents> {
        AsyncEvents::new(self)
    }

    /// Adds a reader, which `waker` wakes.
    pub(crate) fn subscribe(&self, concerns: Concerns, waker: Waker) -> Result<Arc<Inbox>> {
        let Some(dispatcher) = self.dispatcher() else {
            return Err(super::Error::Unavailable {
                device: self.device_name().into(),
                operation: "asynchronous events for this context",
                needs: "a context that Device::open opened; the owner of a foreign one reads its events",
                source: None,
            });
        };
        dispatcher
            .subscribe(self.async_fd(), Inbox::new(concerns, waker))
            .map_err(self.failed("make async_fd non-blocking"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_what_concerns_it() {
        let ours = Concerns::Fatal { qp_num: Some(17), cq: 3, srq: Some(4) };
        let fatal = [
            AsyncEvent::DeviceFatal,
            AsyncEvent::QueuePairFatal { qp_num: 17 },
            AsyncEvent::QueuePairRequestError { qp_num: 17 },
            AsyncEvent::QueuePairAccessError { qp_num: 17 },
            AsyncEvent::CompletionQueueError { cq: 3 },
            AsyncEvent::SharedReceiveQueueError { srq: 4 },
        ];
        assert!(fatal.into_iter().all(|event| ours.contain(event) && event.is_fatal()));
        let others = [
            AsyncEvent::QueuePairFatal { qp_num: 18 },
            AsyncEvent::CompletionQueueError { cq: 17 },
            AsyncEvent::SharedReceiveQueueError { srq: 3 },
            AsyncEvent::PortError { port: 1 },
            AsyncEvent::LastWorkRequestReached { qp_num: 17 },
        ];
        assert!(others.into_iter().all(|event| !ours.contain(event) && Concerns::All.contain(event)));
    }

    /// The descriptors of a reader are shared with a child of `fork`, where the context is not its own either.
    #[test]
    fn a_process_that_did_not_open_the_context_takes_nothing() {
        let context = crate::mr::tests::domain().context().clone();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let notice = Arc::new(Notice(EventFd::from_flags(flags).unwrap()));
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        epoll.add(&notice.0, EpollEvent::new(EpollFlags::EPOLLIN, 0)).unwrap();
        let inbox = Arc::new(Inbox::new(Concerns::All, notice.clone().into()));
        inbox.waker.wake_by_ref();
        let events = AsyncEvents { inbox, epoll, notice: notice.clone(), context };
        assert_eq!(events.try_next(), None);
        assert_eq!(events.wait(Duration::MAX).unwrap(), None);
        assert_eq!(notice.0.read(), Ok(1), "the notice is still there");
    }

    #[test]
    fn a_reader_that_takes_nothing_learns_how_much_it_missed() {
        let inbox = Inbox::new(Concerns::All, Waker::noop().clone());
        let port = |number: usize| AsyncEvent::PortError { port: number as u8 };
        (0..MAX_WAITING + 2).for_each(|number| inbox.push(port(number)));
        assert_eq!(inbox.pop(), Some(AsyncEvent::Dropped { count: 2 }));
        for number in 2..MAX_WAITING + 2 {
            assert_eq!(inbox.pop(), Some(port(number)));
        }
        assert_eq!(inbox.pop(), None);
    }
}
