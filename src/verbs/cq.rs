//! A completion queue, with a completion channel that lets a thread sleep until the next completion.

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

use super::error::{Error, Result};
use super::{Completion, Context, check};
use crate::observe::Process;

/// Maximum number of completions that one call of [`CompletionQueue::poll`] returns.
const POLL_BATCH: usize = 16;

/// Longest sleep on the channel: another thread may consume the event that this one waits for.
const MAX_SLEEP: Duration = Duration::from_millis(50);

/// A completion queue. Clones share one `ibv_cq`; dropping the last one destroys it.
#[derive(Clone)]
#[doc(alias = "ibv_cq")]
pub struct CompletionQueue {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<ffi::ibv_cq>,
    /// `None` for a foreign queue, whose channel belongs to its owner.
    channel: Option<NonNull<ffi::ibv_comp_channel>>,
    creator: Process,
    // Last, so that it is dropped after the queue and its channel are destroyed.
    context: Context,
}

// SAFETY: libibverbs completion queues and channels may be used from any thread: the provider locks them, or the
// caller of `from_raw` ensured one thread at a time.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(channel) = self.channel.filter(|_| self.creator.is_current()) else { return };
        // SAFETY: queue and channel are ours, and the queue pairs that used them held this object and are
        // gone. Every event was acknowledged when it was received, so destroying does not block.
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
    /// Creates a queue for at least `depth` completions, with a completion channel.
    ///
    /// # Errors
    /// - [`Error::Device`]: `EINVAL` for a depth of 0 or above the device's
    ///   [`max_cqe`](super::Limits::max_cqe); `ENOMEM`; `EMFILE` for the channel.
    /// - [`Error::Unavailable`] (`EOPNOTSUPP`): the device notifies of no completions, such as an older efa.
    #[doc(alias("ibv_create_cq", "ibv_create_comp_channel"))]
    pub fn new(context: &Context, depth: u32) -> Result<Self> {
        // SAFETY: the context is open.
        let channel = unsafe { ffi::ibv_create_comp_channel(context.as_raw().as_ptr()) };
        let Some(channel) = NonNull::new(channel) else {
            return Err(context.failed("create a completion channel")(io::Error::last_os_error()));
        };
        // Non-blocking, so that receiving an event does not sleep if another thread received it first.
        let created = set_nonblocking(channel).and_then(|()| {
            let depth = i32::try_from(depth).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            // SAFETY: context and channel are live, and the queue's context value is null.
            let raw = unsafe {
                ffi::ibv_create_cq(context.as_raw().as_ptr(), depth, null_mut(), channel.as_ptr(), 0)
            };
            NonNull::new(raw).ok_or_else(io::Error::last_os_error)
        });
        match created {
            Ok(raw) => Ok(Self::wrap(raw, Some(channel), context.clone())),
            Err(source) => {
                // SAFETY: the channel was created above, and no queue uses it.
                unsafe { ffi::ibv_destroy_comp_channel(channel.as_ptr()) };
                if source.raw_os_error() == Some(libc::EOPNOTSUPP) {
                    return Err(Error::Unavailable {
                        device: context.device_name().into(),
                        operation: "notification of completions",
                        needs: "a NIC and a driver with it (an older efa can only be polled)",
                        source: Some(source.into()),
                    });
                }
                Err(context.failed(format!("create a completion queue of {depth} entries"))(source))
            }
        }
    }

    fn wrap(
        raw: NonNull<ffi::ibv_cq>,
        channel: Option<NonNull<ffi::ibv_comp_channel>>,
        context: Context,
    ) -> Self {
        Self { inner: Arc::new(Inner { raw, channel, creator: Process::current(), context }) }
    }

    /// Wraps a completion queue that another library created. It is never destroyed here. Its channel, if any,
    /// stays with its owner, so [`wait`](Self::wait) polls in a loop instead of sleeping.
    ///
    /// # Safety
    /// `raw` points to a live `ibv_cq` of an open context. Both stay so while a clone of the result, or any object
    /// created from one, lives. Its provider [locks](super#providers-without-locks), or one thread at a time uses them.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_cq>) -> Self {
        // SAFETY: the caller guarantees a live queue, which points to its open context.
        let context = unsafe {
            let context = NonNull::new((*raw.as_ptr()).context).expect("an ibv_cq has a context");
            Context::from_raw(context)
        };
        Self::wrap(raw, None, context)
    }

    /// The libibverbs object, for calls that this crate lacks. Do not destroy it.
    pub fn as_raw(&self) -> NonNull<ffi::ibv_cq> {
        self.inner.raw
    }

    /// The kernel's handle of the queue, as in
    /// [`AsyncEvent::CompletionQueueError`](super::AsyncEvent::CompletionQueueError). It names the queue in its context.
    pub fn handle(&self) -> u32 {
        // SAFETY: the queue is live while `self` is.
        unsafe { (*self.inner.raw.as_ptr()).handle }
    }

    /// The context of the queue.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }

    /// Returns the completions that are in the queue, at most 16, without waiting.
    ///
    /// # Errors
    /// [`Error::Device`]: `EIO` if the queue overran, or the errno of the provider.
    #[doc(alias = "ibv_poll_cq")]
    pub fn poll(&self) -> Result<impl Iterator<Item = Completion> + use<>> {
        let mut batch = [ffi::ibv_wc::default(); POLL_BATCH];
        let count = self.poll_into(&mut batch)?;
        Ok(batch.into_iter().take(count).map(Completion::from))
    }

    /// Returns the next completion, and sleeps on the channel until there is one.
    ///
    /// # Errors
    /// - [`Error::Timeout`]: no completion within `timeout`.
    /// - [`Error::Device`]: `EIO` if the queue overran, or the errno of the provider.
    pub fn wait(&self, timeout: Duration) -> Result<Completion> {
        let deadline = Instant::now().checked_add(timeout);
        let mut armed = false;
        loop {
            let mut one = [ffi::ibv_wc::default()];
            if self.poll_into(&mut one)? == 1 {
                return Ok(one[0].into());
            }
            let left = match deadline.map(|end| end.checked_duration_since(Instant::now())) {
                Some(None) => return Err(Error::Timeout { timeout }),
                Some(Some(left)) => left,
                None => Duration::MAX,
            };
            match self.inner.channel {
                // Armed before the last poll, so the next completion raises an event.
                Some(channel) if armed => armed = self.wait_event(channel, left.min(MAX_SLEEP))?,
                Some(_) => {
                    self.arm()?;
                    armed = true;
                }
                None => std::thread::yield_now(),
            }
        }
    }

    /// The descriptor of the completion channel, for poll, epoll or an async runtime; `None` for a foreign queue.
    /// It becomes readable when an [armed](Self::arm) queue gets a completion, and it is non-blocking.
    #[doc(alias = "ibv_comp_channel")]
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.inner.channel.map(channel_fd)
    }

    /// Requests one event for the next completion. A completion that is in the queue already raises none, so poll
    /// once more between arming and sleeping.
    ///
    /// # Errors
    /// [`Error::Device`], with the errno of the provider.
    #[doc(alias = "ibv_req_notify_cq")]
    pub fn arm(&self) -> Result<()> {
        self.request_event(false)
    }

    /// Like [`arm`](Self::arm), for the next completion that is [solicited](super::WorkRequest::solicited) by the peer
    /// or has failed.
    ///
    /// # Errors
    /// [`Error::Device`], with the errno of the provider.
    #[doc(alias = "ibv_req_notify_cq")]
    pub fn arm_solicited(&self) -> Result<()> {
        self.request_event(true)
    }

    fn request_event(&self, solicited_only: bool) -> Result<()> {
        // SAFETY: the queue is live.
        let armed = check(unsafe { inline::req_notify_cq(self.inner.raw.as_ptr(), solicited_only) });
        // Format the message only on failure: this runs before every sleep.
        armed.map_err(|source| self.inner.context.failed("arm the completion queue")(source))
    }

    /// Sleeps until an event, for at most `timeout` and at most 50 ms, and consumes the event. Returns whether the
    /// queue is still armed. Without a channel, for a foreign queue, it only yields the CPU.
    ///
    /// # Errors
    /// [`Error::Device`]: the event cannot be read from the channel.
    #[doc(alias = "ibv_get_cq_event")]
    pub fn sleep_armed(&self, timeout: Duration) -> Result<bool> {
        match self.inner.channel {
            Some(channel) => self.wait_event(channel, timeout.min(MAX_SLEEP)),
            None => {
                std::thread::yield_now();
                Ok(true)
            }
        }
    }

    /// Consumes an event of the channel. Returns whether there was one.
    pub(crate) fn consume_event(&self) -> Result<bool> {
        self.inner.channel.map_or(Ok(false), |channel| self.take_event(channel))
    }

    /// Fills `into` with completions from the front and returns how many; see [`poll`](Self::poll).
    pub(crate) fn poll_into(&self, into: &mut [ffi::ibv_wc]) -> Result<usize> {
        // SAFETY: the queue is live, and `into` has room for `into.len()` completions.
        let count = unsafe { inline::poll_cq(self.inner.raw.as_ptr(), into.len() as i32, into.as_mut_ptr()) };
        match usize::try_from(count) {
            Ok(count) if count <= into.len() => Ok(count),
            // Negative if the queue overran. For a provider without the operation libibverbs returns
            // EOPNOTSUPP, a positive errno.
            _ => {
                let source = io::Error::from_raw_os_error(if count > 0 { count } else { libc::EIO });
                Err(self.inner.context.failed("poll the completion queue")(source))
            }
        }
    }

    /// Sleeps until an event, for at most `timeout`. Returns whether the queue is still armed.
    fn wait_event(&self, channel: NonNull<ffi::ibv_comp_channel>, timeout: Duration) -> Result<bool> {
        let fd = channel_fd(channel);
        let timeout =
            PollTimeout::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX);
        // EINTR counts as a wake-up without an event: the caller polls the queue again.
        if poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap_or(0) == 0 {
            return Ok(true);
        }
        // Another thread may have taken the event, which disarmed the queue all the same.
        self.take_event(channel)?;
        Ok(false)
    }

    /// Takes an event from the channel. Returns whether there was one.
    fn take_event(&self, channel: NonNull<ffi::ibv_comp_channel>) -> Result<bool> {
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is live, and both pointers are local variables. An event that was received is
        // acknowledged once, on the queue that it names, which is ours.
        unsafe {
            if ffi::ibv_get_cq_event(channel.as_ptr(), &mut queue, &mut context) == 0 {
                ffi::ibv_ack_cq_events(queue, 1);
                return Ok(true);
            }
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            error => Err(self.inner.context.failed("receive a completion event")(error)),
        }
    }
}

fn channel_fd<'c>(channel: NonNull<ffi::ibv_comp_channel>) -> BorrowedFd<'c> {
    // SAFETY: callers pass the channel of a queue that they borrow, or that `new` is creating, which keeps
    // it open.
    unsafe { BorrowedFd::borrow_raw((*channel.as_ptr()).fd) }
}

fn set_nonblocking(channel: NonNull<ffi::ibv_comp_channel>) -> io::Result<()> {
    let fd = channel_fd(channel);
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
