//! A connection that transfers ranges of any length.

use std::sync::Arc;

use super::error::Result;
use super::options::max_message_size;
use super::shared::{Link, Shared, Side};
use super::work_queue::WorkQueue;
use super::{ConnectionOptions, Request, Transfer, Transferred};
use crate::mr::{RegionSlice, RemoteSlice};
use crate::verbs::{CompletionQueue, Depth, Endpoint, ProtectionDomain, QueuePair, QueuePairOptions};

/// A reliable connection for any number of transfers, one at a time in each direction.
///
/// Create it, exchange [`endpoint`](Self::endpoint)s with the peer, and [`connect`](Self::connect); or connect by
/// IP address with [`cm`](crate::cm). [`split`](Self::split) gives its two directions to two threads or tasks. It
/// holds its protection domain, and a transfer holds its memory.
///
/// After a failed transfer the queue pair is in the error state and the connection is unusable;
/// [`failure`](Self::failure) returns the reason. Create a new one.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
}

/// The direction of a connection that writes, reads, sends and executes atomics; from [`Connection::split`].
#[derive(Debug)]
pub struct Sender {
    queue: WorkQueue,
    options: ConnectionOptions,
}

/// The direction of a connection that receives; from [`Connection::split`].
#[derive(Debug)]
pub struct Receiver {
    queue: WorkQueue,
    options: ConnectionOptions,
}

impl Connection {
    /// Creates a queue pair and a completion queue for each direction.
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), as [`QueuePair::new`] and [`CompletionQueue::new`].
    pub fn new(domain: &ProtectionDomain, options: ConnectionOptions) -> Result<Self> {
        let context = domain.context();
        let limits = context.limits()?;
        let options = options.within(limits.max_qp_wr.min(limits.max_cqe), limits.max_sge);
        // Each direction has its own completion queue, which is as deep and so cannot overrun.
        let completion_queue = || CompletionQueue::new(context, options.window);
        let (sends, receives) = (completion_queue()?, completion_queue()?);
        let pair = QueuePair::new(domain, &sends, &receives, options.queue_pair)?;
        let max_message_size = max_message_size(context.port(options.queue_pair.port)?.max_message_size);
        let queues = [sends.clone(), receives.clone()];
        let shared =
            Arc::new(Shared::new(pair, domain.clone(), options.queue_pair, max_message_size, queues));
        let sender = Sender { queue: WorkQueue::new(Side::Send, shared.clone(), sends, &options), options };
        let receiver = Receiver { queue: WorkQueue::new(Side::Recv, shared, receives, &options), options };
        Ok(Self { sender, receiver })
    }

    /// The description that the peer needs to connect. Send it by any means.
    pub fn endpoint(&self) -> Endpoint {
        self.pair().endpoint().expect("a connection creates its queue pair")
    }

    /// Connects to the peer's endpoint. The peer must connect to this one too.
    ///
    /// # Errors
    /// [`Error::Verbs`](super::Error::Verbs), as [`QueuePair::connect`].
    pub fn connect(&self, peer: &Endpoint) -> Result<()> {
        Ok(self.pair().connect(peer)?)
    }

    /// The protection domain. Local memory must be registered in it.
    pub fn domain(&self) -> &ProtectionDomain {
        &self.sender.queue.shared.domain
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

    /// Ends the connection: flushes what is in flight, and notifies a peer that is connected by IP address. Dropping
    /// the connection, or both of its halves, does the same.
    #[doc(alias = "rdma_disconnect")]
    pub fn disconnect(&mut self) {
        self.sender.disconnect();
    }

    /// Splits the connection into owned halves, for use by two threads or tasks at once. The connection ends when
    /// both are dropped.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// Sets the length of a message in bytes for later transfers; see [`ConnectionOptions::message_size`].
    pub fn set_message_size(&mut self, bytes: u64) {
        self.sender.set_message_size(bytes);
        self.receiver.set_message_size(bytes);
    }

    /// Checks a request and returns its transfer; see [`Sender::start`].
    ///
    /// # Errors
    /// As [`Sender::start`].
    pub fn start(&mut self, request: Request) -> Result<Transfer<'_>> {
        self.sender.start(request)
    }

    /// Starts a receive of as many bytes as `local` has; see [`Receiver::start`].
    ///
    /// # Errors
    /// As [`Receiver::start`].
    pub fn start_recv(&mut self, local: impl Into<RegionSlice>) -> Result<Transfer<'_>> {
        self.receiver.start(local)
    }

    /// Writes local bytes into the peer's memory. Returns when the peer has acknowledged all of them.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_RDMA_WRITE")]
    pub fn write(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
    ) -> Result<Transferred> {
        self.sender.write(local, remote)
    }

    /// Like [`write`](Self::write); the peer's next receive completes with the immediate data, after all bytes are
    /// in its memory.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_RDMA_WRITE_WITH_IMM")]
    pub fn write_with_imm(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        imm: u32,
    ) -> Result<Transferred> {
        self.sender.write_with_imm(local, remote, imm)
    }

    /// Reads the peer's bytes into local memory.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_RDMA_READ")]
    pub fn read(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
    ) -> Result<Transferred> {
        self.sender.read(local, remote)
    }

    /// Sends local bytes to a peer that receives the same number of bytes with the same message size.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_SEND")]
    pub fn send(&mut self, local: impl Into<RegionSlice>) -> Result<Transferred> {
        self.sender.send(local)
    }

    /// Receives as many bytes as `local` has, from a peer that sends as many with the same message size.
    ///
    /// # Errors
    /// As [`Receiver::start`] and [`Transfer::wait`].
    #[doc(alias = "ibv_post_recv")]
    pub fn recv(&mut self, local: impl Into<RegionSlice>) -> Result<Transferred> {
        self.receiver.recv(local)
    }

    /// Waits for the immediate data of a peer's [`write_with_imm`](Self::write_with_imm), which
    /// [`Transferred::imm`] returns.
    ///
    /// # Errors
    /// As [`Receiver::start`] and [`Transfer::wait`].
    pub fn recv_imm(&mut self) -> Result<Transferred> {
        self.receiver.recv_imm()
    }

    /// Adds to a u64 of the peer at a multiple of 8, and returns its previous value in 8 local bytes.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_ATOMIC_FETCH_AND_ADD")]
    pub fn fetch_add(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        add: u64,
    ) -> Result<Transferred> {
        self.sender.fetch_add(local, remote, add)
    }

    /// Replaces a u64 of the peer at a multiple of 8 if it equals `compare`, and returns its previous value in 8
    /// local bytes.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_ATOMIC_CMP_AND_SWP")]
    pub fn compare_swap(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        compare: u64,
        swap: u64,
    ) -> Result<Transferred> {
        self.sender.compare_swap(local, remote, compare, swap)
    }

    /// The queue pair.
    pub(crate) fn pair(&self) -> &QueuePair {
        &self.sender.queue.shared.pair
    }

    /// The options of the queue pair.
    pub(crate) fn options(&self) -> QueuePairOptions {
        self.sender.options.queue_pair
    }

    /// READs and atomics at once, in each direction.
    pub(crate) fn depth(&self) -> Depth {
        self.pair().depth().expect("a connection creates its queue pair")
    }

    /// Holds the connection manager's side of the connection.
    pub(crate) fn set_link(&mut self, link: Box<dyn Link>) {
        // Never set twice: the queue pair refuses to connect a second time.
        let _ = self.sender.queue.shared.link.set(link);
    }
}

/// The methods that both halves have.
macro_rules! half {
    ($half:ident) => {
        impl $half {
            /// The protection domain. Local memory must be registered in it.
            pub fn domain(&self) -> &ProtectionDomain {
                &self.queue.shared.domain
            }

            /// Whether the connection is connected and has not failed; see [`Connection::is_usable`].
            pub fn is_usable(&self) -> bool {
                self.failure().is_none()
            }

            /// Why the connection is unusable: the first reason; `None` while it is usable.
            pub fn failure(&self) -> Option<&str> {
                self.queue.shared.failure()
            }

            /// Ends the connection for both halves; see [`Connection::disconnect`].
            pub fn disconnect(&mut self) {
                self.queue.shared.fail(|| "it was disconnected".into());
                if let Some(link) = self.queue.shared.link.get() {
                    link.disconnect();
                }
            }

            /// Sets the length of a message in bytes for later transfers; see
            /// [`ConnectionOptions::message_size`].
            pub fn set_message_size(&mut self, bytes: u64) {
                self.options.message_size = bytes;
            }
        }
    };
}

half!(Sender);
half!(Receiver);

impl Sender {
    /// Checks a request and returns its transfer. The first [`wait`](Transfer::wait) or [`poll`](Transfer::poll)
    /// posts its work requests.
    ///
    /// # Errors
    /// Nothing is posted after any of these:
    /// - [`Error::LengthMismatch`]: the local and the remote slice differ in length.
    /// - [`Error::RemoteAccessMissing`]: the peer's memory is not registered for the operation.
    /// - [`Error::LocalWriteMissing`]: the operation writes local memory without LOCAL_WRITE.
    /// - [`Error::RemoteWriteMissing`]: a READ on iWARP into local memory without REMOTE_WRITE.
    /// - [`Error::ForeignRegion`]: a local region is in another protection domain than the connection.
    /// - [`Error::TooScattered`]: a message needs more elements than
    ///   [`max_sge`](QueuePairOptions::max_sge).
    /// - [`Error::Verbs`] with [`verbs::Error::InvalidAtomic`]: an atomic on other than 8 bytes at a multiple of 8;
    ///   with [`verbs::Error::Unavailable`]: a READ or an atomic, and one side has
    ///   [`rd_atomic`](QueuePairOptions::rd_atomic) 0.
    /// - [`Error::Unusable`]: the connection failed earlier or is not connected, or an earlier transfer in flight was
    ///   forgotten.
    /// - [`Error::PortDown`]: the port is down before the first transfer. Later transfers do not look at it until they
    ///   fail.
    ///
    /// [`Error::LengthMismatch`]: super::Error::LengthMismatch
    /// [`Error::RemoteAccessMissing`]: super::Error::RemoteAccessMissing
    /// [`Error::LocalWriteMissing`]: super::Error::LocalWriteMissing
    /// [`Error::RemoteWriteMissing`]: super::Error::RemoteWriteMissing
    /// [`Error::ForeignRegion`]: super::Error::ForeignRegion
    /// [`Error::TooScattered`]: super::Error::TooScattered
    /// [`Error::Unusable`]: super::Error::Unusable
    /// [`Error::PortDown`]: super::Error::PortDown
    /// [`Error::Verbs`]: super::Error::Verbs
    /// [`verbs::Error::InvalidAtomic`]: crate::verbs::Error::InvalidAtomic
    /// [`verbs::Error::Unavailable`]: crate::verbs::Error::Unavailable
    pub fn start(&mut self, request: Request) -> Result<Transfer<'_>> {
        self.queue.admit(request, self.options.message_size)?;
        Ok(Transfer::new(&mut self.queue, &self.options))
    }

    /// Writes local bytes into the peer's memory. Returns when the peer has acknowledged all of them.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn write(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
    ) -> Result<Transferred> {
        self.start(Request::write(local, remote))?.wait()
    }

    /// Like [`write`](Self::write); the peer's next receive completes with the immediate data, after all bytes are
    /// in its memory.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn write_with_imm(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        imm: u32,
    ) -> Result<Transferred> {
        self.start(Request::write_with_imm(local, remote, imm))?.wait()
    }

    /// Reads the peer's bytes into local memory.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn read(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
    ) -> Result<Transferred> {
        self.start(Request::read(local, remote))?.wait()
    }

    /// Sends local bytes to a peer that receives the same number of bytes with the same message size.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn send(&mut self, local: impl Into<RegionSlice>) -> Result<Transferred> {
        self.start(Request::send(local))?.wait()
    }

    /// Adds to a u64 of the peer at a multiple of 8, and returns its previous value in 8 local bytes.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn fetch_add(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        add: u64,
    ) -> Result<Transferred> {
        self.start(Request::fetch_add(local, remote, add))?.wait()
    }

    /// Replaces a u64 of the peer at a multiple of 8 if it equals `compare`, and returns its previous value in 8
    /// local bytes.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn compare_swap(
        &mut self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        compare: u64,
        swap: u64,
    ) -> Result<Transferred> {
        self.start(Request::compare_swap(local, remote, compare, swap))?.wait()
    }
}

impl Receiver {
    /// Starts a receive of as many bytes as `local` has. It posts receives at once, so that the peer may send. The
    /// connection need not be connected yet.
    ///
    /// A receive that timed out or was cancelled before its first message stays posted, and this direction keeps its
    /// memory. Start it again with the same memory and message size to go on waiting; a message that came meanwhile
    /// is delivered then.
    ///
    /// # Errors
    /// - As [`Sender::start`], without [`Error::PortDown`](super::Error::PortDown).
    /// - [`Error::ReceivePosted`](super::Error::ReceivePosted): another receive is still posted, as above.
    /// - [`Error::Verbs`](super::Error::Verbs): the provider refused a receive; the connection is unusable.
    pub fn start(&mut self, local: impl Into<RegionSlice>) -> Result<Transfer<'_>> {
        self.begin(Request::recv(local))
    }

    /// Starts a receive for the immediate data of a peer's [`write_with_imm`](Sender::write_with_imm).
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_imm(&mut self) -> Result<Transfer<'_>> {
        self.begin(Request::recv_imm())
    }

    /// Receives as many bytes as `local` has, from a peer that sends as many with the same message size.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn recv(&mut self, local: impl Into<RegionSlice>) -> Result<Transferred> {
        self.start(local)?.wait()
    }

    /// Waits for the immediate data of a peer's [`write_with_imm`](Sender::write_with_imm), which
    /// [`Transferred::imm`] returns.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`Transfer::wait`].
    pub fn recv_imm(&mut self) -> Result<Transferred> {
        self.start_imm()?.wait()
    }

    fn begin(&mut self, request: Request) -> Result<Transfer<'_>> {
        self.queue.admit(request, self.options.message_size)?;
        let mut transfer = Transfer::new(&mut self.queue, &self.options);
        transfer.post()?;
        Ok(transfer)
    }
}
