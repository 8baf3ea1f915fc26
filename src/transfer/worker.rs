//! What connections share that make progress together.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use super::engine::Engine;
use super::error::Result;
use super::events::Events;
use super::pool::Pool;
use super::{Connection, ConnectionOptions, Notifications, WorkerOptions};
use crate::verbs::{self, CompletionQueue, ProtectionDomain};

/// Connections that share a completion queue, a lock and a descriptor: whoever waits for a transfer of one makes
/// progress for all.
///
/// A server with many clients watches one descriptor and polls one queue. [`Connection::new`] gives a connection a worker
/// of its own, so that connections of different threads do not contend. Clones are handles of the same worker. It lives
/// as long as one of them, a connection, or a transfer.
#[derive(Clone)]
pub struct Worker {
    pub(super) engine: Arc<Engine>,
}

impl Worker {
    /// Creates a completion queue, and the descriptors to sleep on: five.
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), as [`CompletionQueue::new`]; `EMFILE` if no descriptor is free;
    /// [`verbs::Error::InvalidOption`] if the notifications leave no room for connections.
    pub fn new(domain: &ProtectionDomain, options: WorkerOptions) -> Result<Self> {
        let most = domain.context().limits()?.max_cqe.max(1);
        Self::with(domain, options.completions(options.completions.clamp(1, most)))
    }

    /// Like [`new`](Self::new). The kernel decides about the number of completions.
    pub(super) fn with(domain: &ProtectionDomain, options: WorkerOptions) -> Result<Self> {
        let context = domain.context();
        let WorkerOptions { completions: room, notifications } = options;
        if notifications >= room {
            return Err(verbs::Error::InvalidOption {
                device: context.device_name().into(),
                option: "notifications",
                value: notifications.to_string(),
                allowed: format!("less than the completions of the worker, {room}"),
            }
            .into());
        }
        let pool = match notifications {
            0 => None,
            depth => Some(Pool::new(domain, depth)?),
        };
        let completions = CompletionQueue::new(context, room)?;
        let channel = completions.channel().expect("a new completion queue has a channel");
        let failed = context.failed("create the descriptors of a worker");
        let events = Arc::new(Events::new(channel).map_err(failed)?);
        let left = room - notifications;
        let mut engine = Engine::new(domain.clone(), completions, left, events, pool);
        engine.listen()?;
        Ok(Self { engine: Arc::new(engine) })
    }

    /// Creates a queue pair on this worker.
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), as [`QueuePair::new`](crate::verbs::QueuePair::new); `ENOSPC` if twice the
    /// [`window`](ConnectionOptions::window) does not fit into what is left of
    /// [`WorkerOptions::completions`]; [`verbs::Error::InvalidOption`] if the options ask for notifications and the
    /// worker has none.
    pub fn connection(&self, options: ConnectionOptions) -> Result<Connection> {
        if options.notifications > 0 && self.engine.receives.is_none() {
            return Err(verbs::Error::InvalidOption {
                device: self.domain().context().device_name().into(),
                option: "notifications",
                value: options.notifications.to_string(),
                allowed: "0 on a worker without notifications; set WorkerOptions::notifications".into(),
            }
            .into());
        }
        Connection::on(&self.engine, options)
    }

    /// The notifications of all its connections, each with the number of its queue pair. It receives some if
    /// [`WorkerOptions::notifications`] is set. It does not tell that one connection has ended;
    /// [`Connection::notifications`] does, for the notifications of that connection only. Each notification is taken
    /// once, here or there.
    pub fn notifications(&self) -> Notifications {
        Notifications::of(&self.engine, None)
    }

    /// The protection domain of its connections.
    pub fn domain(&self) -> &ProtectionDomain {
        &self.engine.domain
    }

    /// Makes progress for all connections; see [`Connection::process_events`].
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), with the errno of the provider. All connections have failed.
    pub fn process_events(&self) -> Result<Option<Instant>> {
        self.engine.process_events()
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Worker").field(&self.engine.completions).finish()
    }
}

impl AsFd for Worker {
    /// The descriptor of all its connections; see [`Connection::process_events`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.engine.events.as_fd()
    }
}

impl AsRawFd for Worker {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
