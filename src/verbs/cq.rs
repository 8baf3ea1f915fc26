//! A completion queue, with the channel that lets a thread sleep until something completes.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ibverbs_sys as ffi;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys_ext::verbs as inline;

use super::{Completion, Context, check};
use crate::{Error, Result};

/// Completions that one call takes from the queue.
const BATCH: usize = 16;

/// Longest sleep on the channel, in case another thread took the event that this one slept for.
const NAP: Duration = Duration::from_millis(50);

/// A completion queue. Clones are the same object, destroyed with the last of them.
#[derive(Clone)]
pub struct CompletionQueue {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<ffi::ibv_cq>,
    // None for a foreign queue, whose channel is its owner's.
    channel: Option<NonNull<ffi::ibv_comp_channel>>,
    // Dropped after queue and channel were destroyed.
    context: Context,
}

// SAFETY: libibverbs completion queues and channels may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(channel) = self.channel else { return };
        // SAFETY: queue and channel are ours; the queue pairs that used them held this object and are
        // gone. Every event taken was acknowledged at once, so destroying does not block.
        let destroyed = unsafe {
            check(ffi::ibv_destroy_cq(self.raw.as_ptr()))
                .and_then(|()| check(ffi::ibv_destroy_comp_channel(channel.as_ptr())))
        };
        if let Err(error) = destroyed {
            tracing::warn!(device = self.context.device_name(), %error, "cannot destroy a completion queue");
        }
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CompletionQueue").field(&self.inner.context.device_name()).finish()
    }
}

impl CompletionQueue {
    /// Creates a queue for at least `depth` completions, with a channel to sleep on.
    ///
    /// # Errors
    /// [`Error::Verbs`]: `EINVAL` for a depth of 0 or over the device's `max_cqe`.
    #[doc(alias("ibv_create_cq", "ibv_create_comp_channel"))]
    pub fn new(context: &Context, depth: u32) -> Result<Self> {
        // SAFETY: the context is open.
        let channel = unsafe { ffi::ibv_create_comp_channel(context.as_raw().as_ptr()) };
        let Some(channel) = NonNull::new(channel) else {
            return Err(context.failed("create a completion channel")(io::Error::last_os_error()));
        };
        // Non-blocking, so that taking an event that another thread took first does not sleep.
        let created = set_nonblocking(channel).and_then(|()| {
            let depth = i32::try_from(depth).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            // SAFETY: context and channel are live; there is no context value to keep alive.
            let raw = unsafe {
                ffi::ibv_create_cq(context.as_raw().as_ptr(), depth, null_mut(), channel.as_ptr(), 0)
            };
            NonNull::new(raw).ok_or_else(io::Error::last_os_error)
        });
        match created {
            Ok(raw) => {
                let inner = Inner { raw, channel: Some(channel), context: context.clone() };
                Ok(Self { inner: Arc::new(inner) })
            }
            Err(source) => {
                // SAFETY: the channel was made above and no queue uses it.
                unsafe { ffi::ibv_destroy_comp_channel(channel.as_ptr()) };
                Err(context.failed(format!("create a completion queue of {depth} entries"))(source))
            }
        }
    }

    /// Wraps a completion queue that another library created. It is never destroyed here, and its
    /// channel, if any, stays its owner's: [`wait`](Self::wait) polls.
    ///
    /// # Safety
    /// `raw` is a live `ibv_cq` of an open context, and both stay so as long as a clone of the result,
    /// or anything made of one, lives.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_cq>) -> Self {
        // SAFETY: a live queue points to its open context, says the caller.
        let context = unsafe {
            let context = NonNull::new((*raw.as_ptr()).context).expect("an ibv_cq has a context");
            Context::from_raw(context)
        };
        Self { inner: Arc::new(Inner { raw, channel: None, context }) }
    }

    /// The libibverbs object, for use with other libraries. It stays this object's to destroy.
    pub fn as_raw(&self) -> NonNull<ffi::ibv_cq> {
        self.inner.raw
    }

    /// The context it belongs to.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }

    /// Takes up to 16 completions that are there, without waiting.
    ///
    /// # Errors
    /// [`Error::Verbs`]: the queue overran or the device failed.
    #[doc(alias = "ibv_poll_cq")]
    pub fn poll(&self) -> Result<impl Iterator<Item = Completion> + use<>> {
        let mut batch = [ffi::ibv_wc::default(); BATCH];
        let count = self.take(&mut batch)?;
        Ok(batch.into_iter().take(count).map(Completion::from))
    }

    /// Takes one completion, sleeping until there is one.
    ///
    /// # Errors
    /// - [`Error::CompletionTimeout`]: none within `limit`.
    /// - [`Error::Verbs`]: the queue overran or the device failed.
    pub fn wait(&self, limit: Duration) -> Result<Completion> {
        let deadline = Instant::now().checked_add(limit);
        let mut armed = false;
        loop {
            let mut one = [ffi::ibv_wc::default()];
            if self.take(&mut one)? == 1 {
                return Ok(one[0].into());
            }
            let left = match deadline.map(|end| end.checked_duration_since(Instant::now())) {
                Some(None) => return Err(Error::CompletionTimeout { limit }),
                Some(Some(left)) => left,
                None => Duration::MAX,
            };
            match self.inner.channel {
                // Armed, and still nothing there: an event will come.
                Some(channel) if armed => armed = self.sleep(channel, left.min(NAP))?,
                Some(_) => {
                    self.arm()?;
                    armed = true;
                }
                None => std::thread::yield_now(),
            }
        }
    }

    /// The descriptor that becomes readable when an [armed](Self::arm) queue has a completion, for poll,
    /// epoll or an executor; `None` for a foreign queue. It never blocks.
    #[doc(alias = "ibv_comp_channel")]
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.inner.channel.map(channel_fd)
    }

    /// Asks for one event at the next completion. What is in the queue already gives none, so poll once
    /// more after this and before sleeping.
    ///
    /// # Errors
    /// [`Error::Verbs`]: the device failed.
    #[doc(alias = "ibv_req_notify_cq")]
    pub fn arm(&self) -> Result<()> {
        // SAFETY: the queue is live.
        let armed = check(unsafe { inline::req_notify_cq(self.inner.raw.as_ptr(), false) });
        // The words are put together for a failure only: this is called for every sleep.
        armed.map_err(|source| self.inner.context.failed("arm the completion queue")(source))
    }

    /// Sleeps until an event comes or `limit` is over, and takes the event; whether the queue is still
    /// armed. A foreign queue, which has no channel here, only lets others run.
    ///
    /// # Errors
    /// [`Error::Verbs`]: the channel failed.
    #[doc(alias = "ibv_get_cq_event")]
    pub fn sleep_armed(&self, limit: Duration) -> Result<bool> {
        match self.inner.channel {
            Some(channel) => self.sleep(channel, limit.min(NAP)),
            None => {
                std::thread::yield_now();
                Ok(true)
            }
        }
    }

    /// Takes completions into `into`, as many as are there; see [`poll`](Self::poll).
    #[inline]
    pub(crate) fn take(&self, into: &mut [ffi::ibv_wc]) -> Result<usize> {
        // SAFETY: the queue is live and `into` has room for as many as stated.
        let count = unsafe { inline::poll_cq(self.inner.raw.as_ptr(), into.len() as i32, into.as_mut_ptr()) };
        match usize::try_from(count) {
            Ok(count) if count <= into.len() => Ok(count),
            // Negative when the queue overran; more than asked for where libibverbs stands in for a
            // provider without the operation and returns its errno.
            _ => {
                let source = io::Error::from_raw_os_error(if count > 0 { count } else { libc::EIO });
                Err(self.inner.context.failed("poll the completion queue")(source))
            }
        }
    }

    /// Sleeps until an event or `limit`; whether the queue is still armed.
    fn sleep(&self, channel: NonNull<ffi::ibv_comp_channel>, limit: Duration) -> Result<bool> {
        let fd = channel_fd(channel);
        let timeout = PollTimeout::try_from(limit.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX);
        // An error of poll(2) itself, such as EINTR, ends the nap; the caller looks again.
        if poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap_or(0) == 0 {
            return Ok(true);
        }
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is live, both pointers are places for the answer, and the one event that
        // was taken is acknowledged at once on the queue that it names, which is ours.
        unsafe {
            if ffi::ibv_get_cq_event(channel.as_ptr(), &mut queue, &mut context) == 0 {
                ffi::ibv_ack_cq_events(queue, 1);
                return Ok(false);
            }
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            error => Err(self.inner.context.failed("take a completion event")(error)),
        }
    }
}

fn channel_fd<'c>(channel: NonNull<ffi::ibv_comp_channel>) -> BorrowedFd<'c> {
    // SAFETY: channels are only passed here by their queue, which keeps them open while it is borrowed
    // or, in `new`, is still being made.
    unsafe { BorrowedFd::borrow_raw((*channel.as_ptr()).fd) }
}

fn set_nonblocking(channel: NonNull<ffi::ibv_comp_channel>) -> io::Result<()> {
    let fd = channel_fd(channel);
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
