//! What tells a receiver that bytes have arrived in its memory.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_core::Stream;

use super::engine::Engine;
use super::error::{Error, Result};
use super::pair::{Pair, QUIET};
use super::state::State;

/// A notification of a peer: by [`write_notify`](super::Connection::write_notify), after all bytes of that write are in
/// this side's memory, or by [`notify`](super::Connection::notify).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Notification {
    /// What the peer chose, such as a layer or a request.
    pub id: u32,
    /// The payload of a [`notify`](super::Connection::notify); else empty.
    pub payload: Vec<u8>,
    /// Number of this side's queue pair that received it, as in
    /// [`Connection::endpoint`](super::Connection::endpoint).
    pub qp_num: u32,
}

/// The notifications that a connection, or any connection of a worker, receives.
///
/// They are received ahead of being asked for, and each is taken once. A notification is received after all bytes that
/// its connection's peer wrote before it. Clones take from the same notifications. A connection fails if its peer sends
/// more than 1,048,576 (2²⁰) that nobody takes.
///
/// As a stream (`futures_core::Stream`; `next` is in `StreamExt` of futures-util or tokio-stream) it ends after the error
/// with which the connection ends. It makes progress as a [`Transfer`](super::Transfer) that is awaited does.
pub struct Notifications {
    /// Of the task that polls the stream.
    waiter: Option<Waiter>,
    engine: Arc<Engine>,
    /// `None` for all connections of the engine.
    pair: Option<Arc<Pair>>,
    /// Whether the stream has ended.
    ended: bool,
}

impl Notifications {
    /// Maximum number of bytes in the payload of a notification.
    pub const MAX_PAYLOAD: usize = 64;

    pub(super) fn of(engine: &Arc<Engine>, pair: Option<&Arc<Pair>>) -> Self {
        Self { waiter: None, engine: engine.clone(), pair: pair.cloned(), ended: false }
    }

    /// Waits until `count` notifications of `id` have come since the last were taken, and takes them: at most 1,048,576, which
    /// is as many as a connection keeps. On an error none is taken. It sleeps, unless the connection's [`busy_poll`](super::ConnectionOptions::busy_poll) is set.
    ///
    /// # Errors
    /// - [`Error::NotificationTimeout`]: not as many within `timeout`; the connection is usable.
    /// - [`Error::NotificationsEnded`]: the connection has failed, and no more come. Of a worker's, only if its
    ///   device failed.
    /// - [`Error::Request`] with [`RequestError::NoNotifications`](super::RequestError::NoNotifications): this side
    ///   receives none.
    /// - [`Error::Verbs`]: the device failed.
    pub fn wait(&self, id: u32, count: u64, timeout: Duration) -> Result<()> {
        self.wait_for(Some(id), count, timeout, |state| self.take_of(state, id, count))
    }

    /// Waits for the next notification, whatever its id, and takes it. It blocks the thread; a task calls
    /// [`recv`](Self::recv).
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn take_timeout(&self, timeout: Duration) -> Result<Notification> {
        self.wait_for(None, 1, timeout, |state| self.take_any(state).ok_or(0))
    }

    /// The next notification if it has come, whatever its id. The descriptor of the connection or worker becomes readable
    /// when the next one comes.
    ///
    /// # Errors
    /// As [`wait`](Self::wait), without the timeout.
    pub fn try_take(&self) -> Result<Option<Notification>> {
        self.engine.check_own()?;
        let mut state = self.engine.lock();
        state.check_pool()?;
        self.engine.look(&mut state)?;
        match self.take_any(&mut state) {
            Some(notification) => Ok(Some(notification)),
            None => self.check_open(&state, None, 1, 0).map(|()| None),
        }
    }

    /// Like [`wait`](Self::wait), for a task, and without a timeout. If the future is dropped, none is taken.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub async fn arrived(&self, id: u32, count: u64) -> Result<()> {
        let mut waiter = None;
        let take = |state: &mut State| self.take_of(state, id, count);
        poll_fn(|context| self.poll(context, &mut waiter, take, Some(id), count)).await
    }

    /// The next notification, whatever its id, for a task. If the future is dropped, none is taken.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub async fn recv(&self) -> Result<Notification> {
        let mut waiter = None;
        poll_fn(|context| self.poll(context, &mut waiter, |state| self.take_any(state).ok_or(0), None, 1))
            .await
    }

    /// Tries `take`, or has the next arrival wake the task.
    fn poll<T>(
        &self,
        context: &mut Context<'_>,
        waiter: &mut Option<Waiter>,
        take: impl Fn(&mut State) -> Result<T, u64>,
        id: Option<u32>,
        count: u64,
    ) -> Poll<Result<T>> {
        #[cfg(feature = "tokio")]
        super::driver::ensure(&self.engine);
        self.engine.check_own()?;
        let mut state = self.engine.lock();
        state.check_pool()?;
        self.engine.look_for_future(&mut state)?;
        match take(&mut state) {
            Ok(taken) => Poll::Ready(Ok(taken)),
            Err(came) => match self.check_open(&state, id, count, came) {
                Ok(()) => {
                    self.wake_later(&mut state, waiter, context);
                    Poll::Pending
                }
                Err(error) => Poll::Ready(Err(error)),
            },
        }
    }

    /// Has the next arrival wake the task. None comes before the state is unlocked.
    fn wake_later(&self, state: &mut State, waiter: &mut Option<Waiter>, context: &Context<'_>) {
        let key = self.pair.as_ref().map(|pair| pair.key());
        let number = waiter.get_or_insert_with(|| Waiter::new(&self.engine, key)).number;
        state.add_waiter(key, number, context.waker());
    }

    /// Takes `count` notifications of an id, or none.
    ///
    /// # Errors
    /// How many have come.
    fn take_of(&self, state: &mut State, id: u32, count: u64) -> Result<(), u64> {
        let came: u64 = self.pairs(state).map(|pair| pair.arrivals.count(id)).sum();
        if came < count {
            return Err(came);
        }
        let mut left = count;
        for pair in self.pairs(state) {
            left -= pair.arrivals.take_of(id, left);
        }
        Ok(())
    }

    fn pairs<'s>(&self, state: &'s mut State) -> impl Iterator<Item = &'s mut super::queues::Queues> {
        let only = self.pair.as_ref().map(|pair| pair.key());
        let all = state.pairs.iter_mut();
        all.filter(move |(key, _)| only.is_none_or(|only| only == *key)).map(|(_, pair)| pair)
    }

    /// The oldest notification of the connection, or of a connection of the worker, in turn.
    fn take_any(&self, state: &mut State) -> Option<Notification> {
        let Some(pair) = &self.pair else { return state.take_in_turn() };
        state.take_of(pair.key())
    }

    /// # Errors
    /// Why no more come.
    fn check_open(&self, state: &State, id: Option<u32>, count: u64, came: u64) -> Result<()> {
        let reason = match &self.pair {
            Some(pair) => pair.shared().reason(),
            None => state.ended(),
        };
        match reason {
            None => Ok(()),
            Some(reason) => {
                let peer_gone = self.pair.as_ref().is_some_and(|pair| pair.shared().is_disconnected());
                Err(Error::NotificationsEnded { id, count, came, reason: reason.into(), peer_gone })
            }
        }
    }

    /// Waits until `take` succeeds; it returns how many have come otherwise.
    fn wait_for<T>(
        &self,
        id: Option<u32>,
        count: u64,
        timeout: Duration,
        mut take: impl FnMut(&mut State) -> Result<T, u64>,
    ) -> Result<T> {
        let (end, engine) = (Instant::now().checked_add(timeout), &self.engine);
        let busy_poll = self.pair.as_ref().is_some_and(|pair| pair.busy_poll());
        let mut looked = Instant::now();
        engine.check_own()?;
        let mut state = engine.lock();
        state.check_pool()?;
        loop {
            let progress = engine.drive(&mut state);
            let came = match take(&mut state) {
                Ok(taken) => {
                    engine.leave(&mut state, busy_poll)?;
                    return Ok(taken);
                }
                Err(came) => came,
            };
            let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            let ended = self.check_open(&state, id, count, came).err();
            let timed_out = || {
                let others =
                    self.pairs(&mut state).map(|pair| pair.arrivals.len() as u64).sum::<u64>() - came;
                Error::NotificationTimeout { id, count, came, others, timeout }
            };
            if let Some(error) = ended.or_else(|| left.is_zero().then(timed_out)) {
                // What came before counts.
                engine.drain(&mut state);
                let taken = take(&mut state);
                engine.leave(&mut state, busy_poll)?;
                return taken.map_err(|_| error);
            }
            if !progress && !busy_poll && !state.has_released() {
                state = engine.sleep(state, left)?;
                looked = Instant::now();
                continue;
            }
            if let Some(pair) = &self.pair
                && looked.elapsed() >= QUIET
            {
                // No completion says that the peer has disconnected.
                engine.check_device(&mut state);
                engine.check_link(&mut state, pair.key());
                looked = Instant::now();
                continue;
            }
            drop(state);
            std::hint::spin_loop();
            state = engine.lock();
        }
    }
}

impl Clone for Notifications {
    fn clone(&self) -> Self {
        Self { waiter: None, engine: self.engine.clone(), pair: self.pair.clone(), ended: self.ended }
    }
}

/// The place of a task among those that wait. A future that is dropped leaves it.
pub(super) struct Waiter {
    engine: Arc<Engine>,
    /// Of its queue pair, or `None` for any.
    key: Option<usize>,
    number: u64,
}

impl Waiter {
    fn new(engine: &Arc<Engine>, key: Option<usize>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { engine: engine.clone(), key, number: NEXT.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.engine.check_own().is_ok() {
            self.engine.lock().remove_waiter(self.key, self.number);
        }
    }
}

impl Stream for Notifications {
    type Item = Result<Notification>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut waiter = self.waiter.take();
        let next = self.poll(context, &mut waiter, |state| self.take_any(state).ok_or(0), None, 1);
        self.waiter = waiter;
        next.map(|next| {
            self.ended = next.is_err();
            Some(next)
        })
    }
}

impl fmt::Debug for Notifications {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.pair.as_ref().map(|pair| &pair.shared().pair);
        f.debug_struct("Notifications").field("of", &of).finish()
    }
}
