//! A connection that moves ranges of any length.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::lane::{Lane, Shared};
use super::{LocalRange, Moved, RemoteRange, Request, Transfer};
use crate::Result;
use crate::cm::Link;
use crate::verbs::{CompletionQueue, Endpoint, ProtectionDomain, QueuePair, QueuePairOptions};

/// Longest message, in bytes. Ports say up to 2 GiB, and soft-RoCE's does: it counts what is left of a
/// message in a C int, and fails one of exactly that length (`copy_data` in drivers/infiniband/sw/rxe/rxe_mr.c).
const MAX_MESSAGE: u64 = 1 << 30;

/// How a connection waits for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wait {
    /// Asleep on the completion channel: leaves the processor to others.
    #[default]
    Sleep,
    /// Looking all the time: some microseconds sooner, and a processor for it.
    Busy,
}

/// What a connection is made for. The defaults suit streams of large messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionOptions {
    /// Of the queue pair, whose depths are made the window. Default as for a queue pair, but for 6 tries.
    pub queue_pair: QueuePairOptions,
    /// Bytes of one message, cut to what the port takes and to 1 GiB. Both sides of `send` and `recv` must
    /// have the same. Default 1 MiB.
    pub message: u64,
    /// Messages under way at once. Default 32.
    pub window: u32,
    /// Messages that are posted with one call and answered with one completion, at most the window.
    /// Default 4.
    pub batch: u32,
    /// How to wait. Default [`Wait::Sleep`].
    pub wait: Wait,
    /// Longest time in which no message ends, since that is all that is known of the bytes. Default 30 s.
    pub stall: Duration,
}

impl Default for ConnectionOptions {
    fn default() -> Self {
        Self {
            // To soft-RoCE 7 is for ever, and a peer that is gone would not be noticed.
            queue_pair: QueuePairOptions { retry_count: 6, ..Default::default() },
            message: 1 << 20,
            window: 32,
            batch: 4,
            wait: Wait::default(),
            stall: Duration::from_secs(30),
        }
    }
}

/// A reliable connection with what is needed to move bytes over it: made, [connected](Self::connect),
/// then used as often as you like.
///
/// It keeps its protection domain alive; the regions are the caller's and are borrowed while a transfer
/// runs. When an operation fails, the queue pair stops, and the connection says so.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
}

/// The half of a connection that sends, writes and reads.
#[derive(Debug)]
pub struct Sender {
    lane: Lane,
    options: ConnectionOptions,
}

/// The half of a connection that receives.
#[derive(Debug)]
pub struct Receiver {
    lane: Lane,
    options: ConnectionOptions,
}

impl Connection {
    /// Makes a queue pair and its completion queues.
    ///
    /// # Errors
    /// As [`QueuePair::new`] and [`CompletionQueue::new`].
    pub fn new(domain: &ProtectionDomain, options: ConnectionOptions) -> Result<Self> {
        let context = domain.context();
        let limits = context.limits()?;
        let mut options = options;
        options.window = options.window.clamp(1, limits.max_qp_wr.min(limits.max_cqe));
        // Half the window at the most, so that the next list is posted while one is under way.
        options.batch = options.batch.clamp(1, options.window.div_ceil(2));
        let of_pair = &mut options.queue_pair;
        (of_pair.send_depth, of_pair.recv_depth) = (options.window, options.window);
        of_pair.max_sge = of_pair.max_sge.clamp(1, limits.max_sge);
        // A queue for each direction, as deep as the direction itself: it cannot overrun.
        let queue = || CompletionQueue::new(context, options.window);
        let (sends, receives) = (queue()?, queue()?);
        let pair = QueuePair::new(domain, &sends, &receives, options.queue_pair)?;
        let port = context.port(options.queue_pair.port)?;
        let max_message = MAX_MESSAGE.min(port.max_message_size.into());
        let shared = Arc::new(Shared {
            link: OnceLock::new(),
            pair,
            domain: domain.clone(),
            max_message,
            max_sge: options.queue_pair.max_sge,
            failed: OnceLock::new(),
        });
        let (window, batch) = (options.window, options.batch);
        let sender = Sender { lane: Lane::sending(shared.clone(), sends, window, batch), options };
        let receiver = Receiver { lane: Lane::receiving(shared, receives, window, batch), options };
        Ok(Self { sender, receiver })
    }

    /// What the peer must know to connect, to be sent by any means.
    pub fn endpoint(&self) -> Endpoint {
        self.pair().endpoint().expect("the queue pair was made here")
    }

    /// Connects to the peer's, which must connect to this one too.
    ///
    /// # Errors
    /// As [`QueuePair::connect`].
    pub fn connect(&self, peer: &Endpoint) -> Result<()> {
        self.pair().connect(peer)
    }

    /// The protection domain, for regions to be moved over it.
    pub fn domain(&self) -> &ProtectionDomain {
        &self.shared().domain
    }

    /// The queue pair.
    pub fn pair(&self) -> &QueuePair {
        &self.shared().pair
    }

    /// Whether it can be used: nothing has failed on it yet. A peer that has gone is noticed by the next
    /// operation.
    pub fn is_usable(&self) -> bool {
        if self.failure().is_none() && self.shared().peer_left() {
            self.shared().fail(&|| "the peer disconnected".into());
        }
        self.failure().is_none()
    }

    /// Ends the connection: what is under way is called back, and a peer that was connected by IP address
    /// is told. Dropping it does the same.
    #[doc(alias = "rdma_disconnect")]
    pub fn disconnect(&mut self) {
        self.shared().fail(&|| "it was disconnected".into());
        if let Some(link) = self.shared().link.get() {
            link.disconnect();
        }
    }

    /// Why it cannot be used any more.
    pub fn failure(&self) -> Option<&str> {
        self.shared().failed.get().map(String::as_str)
    }

    /// Both halves, to be used at once, by two threads or by one.
    pub fn halves(&mut self) -> (&mut Sender, &mut Receiver) {
        (&mut self.sender, &mut self.receiver)
    }

    /// Bytes of one message from here on; see [`ConnectionOptions::message`].
    pub fn set_message(&mut self, message: u64) {
        (self.sender.options.message, self.receiver.options.message) = (message, message);
    }

    /// Starts a request; see [`Sender::start`].
    ///
    /// # Errors
    /// As [`Sender::start`].
    pub fn start<'t>(&'t mut self, request: Request<'t>) -> Result<Transfer<'t>> {
        self.sender.start(request)
    }

    /// Writes local bytes at the peer; returns when all have arrived.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_RDMA_WRITE")]
    pub fn write<'a>(
        &mut self,
        local: impl Into<LocalRange<'a>>,
        remote: impl Into<RemoteRange<'a>>,
    ) -> Result<Moved> {
        self.sender.run(Request::write(local, remote))
    }

    /// As [`write`](Self::write), and the peer's next receive completes with a number.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_RDMA_WRITE_WITH_IMM")]
    pub fn write_with_imm<'a>(
        &mut self,
        local: impl Into<LocalRange<'a>>,
        remote: impl Into<RemoteRange<'a>>,
        imm: u32,
    ) -> Result<Moved> {
        self.sender.run(Request::write_with_imm(local, remote, imm))
    }

    /// Reads the peer's bytes into local ones.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_RDMA_READ")]
    pub fn read<'a>(
        &mut self,
        local: impl Into<LocalRange<'a>>,
        remote: impl Into<RemoteRange<'a>>,
    ) -> Result<Moved> {
        self.sender.run(Request::read(local, remote))
    }

    /// Sends local bytes to a peer that receives as many.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_SEND")]
    pub fn send<'a>(&mut self, local: impl Into<LocalRange<'a>>) -> Result<Moved> {
        self.sender.run(Request::send(local))
    }

    /// Receives as many bytes as `local` has.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "ibv_post_recv")]
    pub fn recv<'a>(&mut self, local: impl Into<LocalRange<'a>>) -> Result<Moved> {
        self.receiver.run(Request::recv(local.into()))
    }

    /// Waits for the number of a [`write_with_imm`](Self::write_with_imm).
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    pub fn recv_imm(&mut self) -> Result<Moved> {
        self.receiver.run(Request::recv_imm())
    }

    /// Adds to the peer's u64 at a multiple of 8; what it was comes into 8 local bytes.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_ATOMIC_FETCH_AND_ADD")]
    pub fn fetch_add<'a>(
        &mut self,
        local: impl Into<LocalRange<'a>>,
        remote: impl Into<RemoteRange<'a>>,
        add: u64,
    ) -> Result<Moved> {
        self.sender.run(Request::fetch_add(local, remote, add))
    }

    /// Replaces the peer's u64 if it is `compare`; what it was comes into 8 local bytes.
    ///
    /// # Errors
    /// As [`Sender::start`] and [`Transfer::wait`].
    #[doc(alias = "IBV_WR_ATOMIC_CMP_AND_SWP")]
    pub fn compare_swap<'a>(
        &mut self,
        local: impl Into<LocalRange<'a>>,
        remote: impl Into<RemoteRange<'a>>,
        compare: u64,
        swap: u64,
    ) -> Result<Moved> {
        self.sender.run(Request::compare_swap(local, remote, compare, swap))
    }

    /// What the queue pair was made for.
    pub(crate) fn options(&self) -> QueuePairOptions {
        self.sender.options.queue_pair
    }

    /// READs and atomics that either side may have under way.
    pub(crate) fn rd_atomic(&self) -> u8 {
        self.endpoint().rd_atomic
    }

    /// Keeps the id that it was connected by.
    pub(crate) fn set_link(&mut self, link: Link) {
        // A connection connects once: the queue pair refuses the second time before this.
        let _ = self.shared().link.set(link);
    }

    fn shared(&self) -> &Shared {
        &self.sender.lane.shared
    }
}

impl Sender {
    /// Checks a request and makes a transfer of it; the first [`wait`](Transfer::wait) or
    /// [`advance`](Transfer::advance) posts.
    ///
    /// # Errors
    /// [`Error::Transfer`](crate::Error::Transfer) with what is found before anything is posted:
    /// `LengthMismatch`, `RemoteAccessMissing`, `LocalWriteMissing`, `ForeignRegion`, `TooScattered`,
    /// `Unusable`. [`Error::InvalidAtomic`](crate::Error::InvalidAtomic).
    pub fn start<'t>(&'t mut self, request: Request<'t>) -> Result<Transfer<'t>> {
        let job = self.lane.admit(&request, self.options.message)?;
        Ok(Transfer::new(&mut self.lane, request, job, &self.options))
    }

    fn run(&mut self, request: Request<'_>) -> Result<Moved> {
        let mut job = self.lane.admit(&request, self.options.message)?;
        // A small message goes out before what is needed to wait for it is put together.
        let posted = self.lane.post_first(&request, &mut job);
        let mut transfer = Transfer::new(&mut self.lane, request, job, &self.options);
        posted.map_err(|error| transfer.abandon(error))?;
        transfer.run()
    }
}

impl Receiver {
    /// Makes a transfer that receives as many bytes as `local` has. What it can it posts at once, so
    /// that the peer may send.
    ///
    /// # Errors
    /// As [`Sender::start`].
    pub fn start<'t>(&'t mut self, local: impl Into<LocalRange<'t>>) -> Result<Transfer<'t>> {
        self.begin(Request::recv(local.into()))
    }

    /// As [`start`](Self::start), for the number of a [`write_with_imm`](Connection::write_with_imm).
    ///
    /// # Errors
    /// As [`Sender::start`].
    pub fn start_imm(&mut self) -> Result<Transfer<'_>> {
        self.begin(Request::recv_imm())
    }

    fn begin<'t>(&'t mut self, request: Request<'t>) -> Result<Transfer<'t>> {
        let job = self.lane.admit(&request, self.options.message)?;
        let mut transfer = Transfer::new(&mut self.lane, request, job, &self.options);
        transfer.post()?;
        Ok(transfer)
    }

    fn run(&mut self, request: Request<'_>) -> Result<Moved> {
        self.begin(request)?.wait()
    }
}
