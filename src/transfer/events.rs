//! The descriptors on which a connection's events arrive: the completion channel and the connection manager's events.
//!
//! A thread that waits sleeps on them and on a counter, by which others wake it. Event loops have one descriptor, an
//! epoll instance of both and of another counter, which tells them what a thread has taken from the first two.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub(super) struct Events {
    /// For event loops.
    epoll: Epoll,
    notice: EventFd,
    /// For the thread that sleeps.
    kick: EventFd,
}

impl Events {
    pub(super) fn new(completions: BorrowedFd<'_>) -> io::Result<Self> {
        let counter = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (notice, kick) = (counter()?, counter()?);
        let events = Self { epoll, notice, kick };
        events.watch(completions)?;
        events.watch(events.notice.as_fd())?;
        Ok(events)
    }

    /// Adds a descriptor to those that event loops watch.
    pub(super) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?)
    }

    /// Wakes the thread that sleeps, or the next one that would.
    pub(super) fn kick(&self) {
        // Fails only if the counter is full, and then the thread wakes anyway.
        let _ = self.kick.write(1);
    }

    /// Makes the descriptor of event loops readable.
    pub(super) fn notify(&self) {
        let _ = self.notice.write(1);
    }

    /// Ends the notification; an event loop is looking.
    pub(super) fn looked(&self) {
        // There may be none.
        let _ = self.notice.read();
    }

    /// Sleeps until a kick or until one of `fds`, at most two, is readable, for at most `timeout`. A signal counts as a wake-up.
    pub(super) fn sleep<'f>(
        &self,
        fds: impl Iterator<Item = BorrowedFd<'f>>,
        timeout: Duration,
    ) -> io::Result<()> {
        let timeout =
            PollTimeout::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX);
        let watched = |fd| PollFd::new(fd, PollFlags::POLLIN);
        // An absent descriptor leaves the kick in its place.
        let mut all = [watched(self.kick.as_fd()), watched(self.kick.as_fd()), watched(self.kick.as_fd())];
        all.iter_mut().skip(1).zip(fds).for_each(|(place, fd)| *place = watched(fd));
        match poll(&mut all, timeout) {
            Err(Errno::EINTR) => {}
            result => drop(result?),
        }
        let _ = self.kick.read();
        Ok(())
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
