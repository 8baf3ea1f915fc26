//! The descriptors on which the events of an engine arrive: the completion channel, the connection managers' and
//! the device's asynchronous events.
//!
//! A thread that waits sleeps on them and on a counter, by which others wake it. Event loops have one descriptor, an
//! epoll instance of these and of another counter, which tells them what a thread has taken.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Maximum number of descriptors that one look finds. Others stay readable.
const BATCH: usize = 8;

/// What is readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Completions,
    /// Another thread wants the one that sleeps to look again.
    Kick,
    /// Asynchronous events of the device.
    Device,
    /// The connection manager of the queue pair with this key.
    Link(usize),
}

pub(super) struct Events {
    /// For the thread that sleeps.
    inner: Epoll,
    kick: EventFd,
    /// Whether the counter is to be read.
    kicked: AtomicBool,
    /// For event loops.
    outer: Epoll,
    notice: EventFd,
    /// As `kicked`.
    noticed: AtomicBool,
    /// Whether another reader of the context has found an event of a queue pair here.
    reported: AtomicBool,
}

impl Events {
    pub(super) fn new(completions: BorrowedFd<'_>) -> io::Result<Self> {
        let counter = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let epoll = || Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC);
        let events = Self {
            inner: epoll()?,
            kick: counter()?,
            kicked: AtomicBool::new(false),
            outer: epoll()?,
            notice: counter()?,
            noticed: AtomicBool::new(false),
            reported: AtomicBool::new(false),
        };
        events.watch(completions, Source::Completions)?;
        events.watch(events.kick.as_fd(), Source::Kick)?;
        for fd in [events.inner.0.as_fd(), events.notice.as_fd()] {
            events.outer.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        Ok(events)
    }

    /// Adds a descriptor.
    pub(super) fn watch(&self, fd: BorrowedFd<'_>, source: Source) -> io::Result<()> {
        let data = match source {
            Source::Completions => 0,
            Source::Kick => 1,
            Source::Device => 2,
            Source::Link(key) => 3 + key as u64,
        };
        Ok(self.inner.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, data))?)
    }

    /// Removes a descriptor, before its key is given to another one.
    pub(super) fn unwatch(&self, fd: BorrowedFd<'_>) {
        // Fails only if it could not be added.
        let _ = self.inner.delete(fd);
    }

    /// Wakes the thread that sleeps.
    pub(super) fn kick(&self) {
        // Fails only if the counter is full, and then the thread wakes anyway.
        let _ = self.kick.write(1);
        // Last, so that a kick that is not seen yet is ended later.
        self.kicked.store(true, Ordering::Release);
    }

    /// Ends the kicks. Called while no thread sleeps, or it might sleep on.
    pub(super) fn end_kicks(&self) {
        // Read first: this runs after every sleep.
        if self.kicked.load(Ordering::Relaxed) && self.kicked.swap(false, Ordering::AcqRel) {
            let _ = self.kick.read();
        }
    }

    /// Whether there is an asynchronous event that another reader has found.
    pub(super) fn take_reported(&self) -> bool {
        // Read first: this runs after every sleep.
        self.reported.load(Ordering::Relaxed) && self.reported.swap(false, Ordering::AcqRel)
    }

    /// Makes the descriptor of event loops readable.
    pub(super) fn notify(&self) {
        let _ = self.notice.write(1);
        self.noticed.store(true, Ordering::Release);
    }

    /// Ends the notification; an event loop is looking.
    pub(super) fn looked(&self) {
        if self.noticed.load(Ordering::Relaxed) && self.noticed.swap(false, Ordering::AcqRel) {
            let _ = self.notice.read();
        }
    }

    /// Waits until something is readable, for at most `timeout`, and says what. A signal counts as a wake-up.
    pub(super) fn wait(&self, timeout: Duration) -> io::Result<impl Iterator<Item = Source> + use<>> {
        let timeout =
            EpollTimeout::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(EpollTimeout::MAX);
        let mut ready = [EpollEvent::empty(); BATCH];
        let count = match self.inner.wait(&mut ready, timeout) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        if count == BATCH {
            // An event loop that is told of changes only looks again.
            self.notify();
        }
        let source = |event: EpollEvent| match event.data() {
            0 => Source::Completions,
            1 => Source::Kick,
            2 => Source::Device,
            key => Source::Link(key as usize - 3),
        };
        Ok(ready.into_iter().take(count).map(source))
    }
}

/// Another reader of the context has found an asynchronous event of a queue pair here.
impl Wake for Events {
    fn wake(self: Arc<Self>) {
        self.reported.store(true, Ordering::Release);
        self.kick();
        self.notify();
    }
}

impl AsFd for Events {
    /// The descriptor of event loops.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.outer.0.as_fd()
    }
}
