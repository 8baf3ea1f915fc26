//! A connection that transfers ranges of any length.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use super::engine::Engine;
use super::error::Result;
use super::flush::Flush;
use super::options::max_message_size;
use super::pair::Pair;
use super::shared::{Link, Peer, Shared};
use super::{ConnectionOptions, Notifications, Receiver, Sender, Transfer, Worker, WorkerOptions};
use crate::mr::{Blocks, RegionSlice, RemoteSlice};
use crate::verbs::{Depth, Endpoint, ProtectionDomain, QueuePair, QueuePairOptions};

/// A reliable connection for any number of transfers in flight.
///
/// Create it, exchange [`endpoint`](Self::endpoint)s with the peer, and [`connect`](Self::connect); or connect by
/// IP address with [`cm`](crate::cm). Each operation starts a [`Transfer`], which is waited for. Operations take
/// `&self`, so threads may share a connection; [`split`](Self::split) gives its two directions to two owners.
///
/// The queue pair is destroyed when the connection, or both of its halves, and all of its transfers are dropped. After a failed transfer the
/// queue pair is in the error state and the connection is unusable; [`failure`](Self::failure) returns the reason.
/// Create a new one.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
}

impl Connection {
    /// Creates a queue pair on a [`Worker`](super::Worker) of its own: a completion queue, and the descriptors to sleep
    /// on, five.
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), as [`QueuePair::new`] and [`CompletionQueue::new`]; `EMFILE` if no
    /// descriptor is free.
    ///
    /// [`CompletionQueue::new`]: crate::verbs::CompletionQueue::new
    pub fn new(domain: &ProtectionDomain, options: ConnectionOptions) -> Result<Self> {
        let limits = domain.context().limits()?;
        // The completion queue has room for what is in flight in both directions, so it cannot overrun.
        let (pairs, notifications) =
            if options.notifications > 0 { (2, options.notifications) } else { (1, 0) };
        let most = limits.max_cqe.saturating_sub(notifications) / (2 * pairs);
        let options = options.within(limits.max_qp_wr.min(most), limits.max_sge);
        let completions = (2 * pairs * options.window).saturating_add(notifications);
        let worker = WorkerOptions::default().completions(completions).notifications(notifications);
        Worker::with(domain, worker)?.connection(options)
    }

    /// Creates a queue pair on an engine. If it receives notifications, messages have another one, since the device gives
    /// whatever arrives the receive that was posted first.
    pub(super) fn on(engine: &Arc<Engine>, options: ConnectionOptions) -> Result<Self> {
        let (domain, queue) = (&engine.domain, &engine.completions);
        let limits = domain.context().limits()?;
        let options = options.within(limits.max_qp_wr, limits.max_sge);
        let port = domain.context().port(options.queue_pair.port)?;
        let max_message_size = max_message_size(port.max_message_size);
        let create = |max_inline| {
            let pair = options.queue_pair.max_inline(max_inline);
            QueuePair::with_srq(domain, [queue, queue], engine.receives.as_ref(), pair)
        };
        // Room for the payload of a notification; a device with less refuses those that do not fit.
        let (asked, payload) = (options.queue_pair.max_inline, Notifications::MAX_PAYLOAD as u32);
        let mut pair = match create(asked.max(payload)) {
            Err(_) if asked < payload => create(asked)?,
            created => created?,
        };
        let messages = match engine.receives {
            Some(_) => {
                let mut messages = QueuePair::new(domain, queue, queue, options.queue_pair)?;
                messages.set_second_of(&mut pair);
                Some(messages)
            }
            None => None,
        };
        let add = |pair| {
            let mut shared = Shared::new(pair, domain.clone(), options.queue_pair, max_message_size);
            shared.listen(engine)?;
            Pair::new(engine.clone(), shared, &options, 2 * options.window).map(Arc::new)
        };
        let (pair, messages) = (add(pair)?, messages.map(add).transpose()?);
        if let Some(messages) = &messages {
            pair.join(messages);
        }
        let sender = Sender { pair: pair.clone(), messages: messages.clone(), options };
        Ok(Self { sender, receiver: Receiver { pair, messages, options, flush: Flush::default() } })
    }

    /// The description that the peer needs to connect. Send it by any means.
    pub fn endpoint(&self) -> Endpoint {
        self.queue_pair().endpoint().expect("a connection creates its queue pair")
    }

    /// Connects to the peer's endpoint. The peer must connect to this one too.
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), as [`QueuePair::connect`].
    pub fn connect(&self, peer: &Endpoint) -> Result<()> {
        self.queue_pair().connect(peer)?;
        self.set_peer(Peer::with_messages(peer.message_qp_num));
        match &self.sender.messages {
            Some(messages) if peer.message_qp_num != 0 => {
                let peer = Endpoint { qp_num: peer.message_qp_num, ..*peer };
                Ok(messages.shared().pair.connect(&peer)?)
            }
            _ => Ok(()),
        }
    }

    /// The notifications of the peer, which it receives if [`ConnectionOptions::notifications`] or
    /// [`WorkerOptions::notifications`] is set.
    pub fn notifications(&self) -> Notifications {
        self.receiver.notifications()
    }

    /// The protection domain. Local memory must be registered in it.
    pub fn domain(&self) -> &ProtectionDomain {
        &self.sender.pair.shared().domain
    }

    /// Whether the connection is connected and has not failed. Asks the device, which takes a system call. Only a
    /// transfer detects a peer that is gone without having disconnected.
    pub fn is_usable(&self) -> bool {
        self.sender.is_usable()
    }

    /// Why the connection is unusable: the first reason; `None` while it is usable.
    pub fn failure(&self) -> Option<&str> {
        self.sender.failure()
    }

    /// Ends the connection: the device flushes what is in flight, and a peer that is connected by IP address is
    /// notified. Transfers in flight end with [`Error::Unusable`](super::Error::Unusable).
    #[doc(alias = "rdma_disconnect")]
    pub fn disconnect(&self) {
        self.sender.disconnect();
    }

    /// Makes what the peer has written visible to a GPU; see [`Receiver::flush`].
    ///
    /// # Errors
    /// As [`Receiver::flush`].
    pub fn flush(&self, slice: &RegionSlice) -> Result<()> {
        self.receiver.flush(slice)
    }

    /// Splits the connection into owned halves, for use by two threads or tasks at once. The queue pair is destroyed
    /// when both and all transfers are dropped.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// Makes progress for all transfers, and wakes the tasks whose transfers have ended or whose timeout has expired.
    ///
    /// An event loop calls it once to arm the connection's descriptor ([`AsFd`]), then whenever that is readable, and
    /// at the time that it returns, when the next timeout expires if nothing changes before. A transfer that is started
    /// or given a timeout later may expire earlier. Each call takes all events that there are, so the descriptor may be
    /// watched level- or edge-triggered. With `AsyncFd` of tokio, clear the readiness before the call.
    ///
    /// One event loop watches the descriptor at a time: of two, one may consume what the other was to be told. Threads that
    /// wait and tasks of tokio runtimes may use the connection beside it.
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), with the errno of the provider.
    pub fn process_events(&self) -> Result<Option<Instant>> {
        self.sender.process_events()
    }

    /// Sets the length of a message in bytes for later transfers; see [`ConnectionOptions::message_size`].
    pub fn set_message_size(&mut self, bytes: u64) {
        self.sender.set_message_size(bytes);
        self.receiver.set_message_size(bytes);
    }

    /// Writes local bytes into the peer's memory: a slice, or each block of a table into the peer's block with the
    /// same index.
    ///
    /// # Errors
    /// As [`Sender::write`].
    #[doc(alias = "IBV_WR_RDMA_WRITE")]
    pub fn write(
        &self,
        local: impl Into<Blocks<RegionSlice>>,
        remote: impl Into<Blocks<RemoteSlice>>,
    ) -> Result<Transfer> {
        self.sender.write(local, remote)
    }

    /// Like [`write`](Self::write), and notifies the peer: its [`Notifications`] count one of `id` after all bytes are in
    /// its memory.
    ///
    /// # Errors
    /// As [`Sender::write_notify`].
    #[doc(alias = "IBV_WR_RDMA_WRITE_WITH_IMM")]
    pub fn write_notify(
        &self,
        local: impl Into<Blocks<RegionSlice>>,
        remote: impl Into<Blocks<RemoteSlice>>,
        id: u32,
    ) -> Result<Transfer> {
        self.sender.write_notify(local, remote, id)
    }

    /// Notifies the peer, after everything that was written before, with a payload of up to
    /// [`Notifications::MAX_PAYLOAD`] bytes, which may be empty.
    ///
    /// # Errors
    /// As [`Sender::notify`].
    pub fn notify(&self, id: u32, payload: &[u8]) -> Result<Transfer> {
        self.sender.notify(id, payload)
    }

    /// Reads the peer's bytes into local memory.
    ///
    /// # Errors
    /// As [`Sender::write`].
    #[doc(alias = "IBV_WR_RDMA_READ")]
    pub fn read(
        &self,
        local: impl Into<Blocks<RegionSlice>>,
        remote: impl Into<Blocks<RemoteSlice>>,
    ) -> Result<Transfer> {
        self.sender.read(local, remote)
    }

    /// Sends local bytes to a peer that receives the same number of bytes with the same message size.
    ///
    /// # Errors
    /// As [`Sender::write`].
    #[doc(alias = "IBV_WR_SEND")]
    pub fn send(&self, local: impl Into<RegionSlice>) -> Result<Transfer> {
        self.sender.send(local)
    }

    /// Receives as many bytes as `local` has, from a peer that sends as many with the same message size.
    ///
    /// # Errors
    /// As [`Receiver::recv`].
    #[doc(alias = "ibv_post_recv")]
    pub fn recv(&self, local: impl Into<RegionSlice>) -> Result<Transfer> {
        self.receiver.recv(local)
    }

    /// Adds to a u64 of the peer at a multiple of 8, and returns its previous value in 8 local bytes.
    ///
    /// # Errors
    /// As [`Sender::write`].
    #[doc(alias = "IBV_WR_ATOMIC_FETCH_AND_ADD")]
    pub fn fetch_add(
        &self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        add: u64,
    ) -> Result<Transfer> {
        self.sender.fetch_add(local, remote, add)
    }

    /// Replaces a u64 of the peer at a multiple of 8 if it equals `compare`, and returns its previous value in 8
    /// local bytes.
    ///
    /// # Errors
    /// As [`Sender::write`].
    #[doc(alias = "IBV_WR_ATOMIC_CMP_AND_SWP")]
    pub fn compare_swap(
        &self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        compare: u64,
        swap: u64,
    ) -> Result<Transfer> {
        self.sender.compare_swap(local, remote, compare, swap)
    }

    /// The queue pair.
    pub(crate) fn queue_pair(&self) -> &QueuePair {
        &self.sender.pair.shared().pair
    }

    /// The options of the queue pair.
    pub(crate) fn options(&self) -> QueuePairOptions {
        self.sender.options.queue_pair
    }

    /// READs and atomics at once, in each direction.
    pub(crate) fn depth(&self) -> Depth {
        self.queue_pair().depth().expect("a connection creates its queue pair")
    }

    /// The queue pair for messages, if it is another one.
    pub(crate) fn message_queue_pair(&self) -> Option<&QueuePair> {
        self.sender.messages.as_ref().map(|messages| &messages.shared().pair)
    }

    /// Keeps what the peer has.
    pub(crate) fn set_peer(&self, peer: Peer) {
        let _ = self.sender.pair.shared().peer.set(peer);
    }

    /// Makes a connection unusable that its queue pairs have, and the connection manager has not.
    pub(crate) fn fail(&self, reason: &str) {
        self.sender.pair.fail(reason);
    }

    /// Holds the connection manager's side of the connection.
    pub(crate) fn set_link(&mut self, link: Box<dyn Link>) {
        self.sender.pair.set_link(link);
    }
}

impl AsFd for Connection {
    /// The connection's descriptor; see [`process_events`](Self::process_events).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sender.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
