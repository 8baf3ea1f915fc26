//! The two directions of a connection, which two owners may hold.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::Result;
use super::flush::Flush;
use super::pair::Pair;
use super::request::Request;
use super::shared::Peer;
use super::{ConnectionOptions, Notifications, RequestError, Transfer};
use crate::mr::{Blocks, RegionSlice, RemoteSlice};
use crate::verbs::{Operation, ProtectionDomain};

/// The direction of a connection that writes, reads, sends and executes atomics; from [`Connection::split`](super::Connection::split).
pub struct Sender {
    pub(super) pair: Arc<Pair>,
    /// For messages, if `pair` receives notifications.
    pub(super) messages: Option<Arc<Pair>>,
    pub(super) options: ConnectionOptions,
}

/// The direction of a connection that receives; from [`Connection::split`](super::Connection::split).
pub struct Receiver {
    pub(super) pair: Arc<Pair>,
    /// For messages, if `pair` receives notifications.
    pub(super) messages: Option<Arc<Pair>>,
    pub(super) options: ConnectionOptions,
    pub(super) flush: Flush,
}

/// The methods that both halves have.
macro_rules! half {
    ($half:ident) => {
        impl $half {
            /// The protection domain. Local memory must be registered in it.
            pub fn domain(&self) -> &ProtectionDomain {
                &self.pair.shared().domain
            }

            /// Whether the connection is connected and has not failed; see [`Connection::is_usable`](super::Connection::is_usable).
            pub fn is_usable(&self) -> bool {
                self.failure().is_none()
            }

            /// Why the connection is unusable: the first reason; `None` while it is usable.
            pub fn failure(&self) -> Option<&str> {
                self.pair.failure()
            }

            /// Ends the connection for both halves; see [`Connection::disconnect`](super::Connection::disconnect).
            pub fn disconnect(&self) {
                self.pair.disconnect();
            }

            /// Sets the length of a message in bytes for later transfers; see
            /// [`ConnectionOptions::message_size`].
            pub fn set_message_size(&mut self, bytes: u64) {
                self.options.message_size = bytes;
            }

            /// Makes progress for all transfers of the connection; see [`Connection::process_events`](super::Connection::process_events).
            ///
            /// # Errors
            /// [`Error::Verbs`](super::Error::Verbs), with the errno of the provider.
            pub fn process_events(&self) -> Result<Option<Instant>> {
                self.pair.engine().process_events()
            }

            fn start_on(&self, pair: &Arc<Pair>, request: Request) -> Result<Transfer> {
                let (opcode, length) = (request.opcode(), request.len());
                let id = pair.start(request, self.options.message_size)?;
                let twin = match &self.messages {
                    Some(messages) if Arc::ptr_eq(pair, messages) => Some(self.pair.clone()),
                    messages => messages.clone(),
                };
                Ok(Transfer::new(pair.clone(), twin, id, opcode, length))
            }

            /// Starts a send or a receive, on the queue pair for messages.
            fn start_message(&self, request: Request) -> Result<Transfer> {
                let peer = self.pair.shared().peer.get();
                match (&self.messages, peer) {
                    (Some(_), Some(Peer::Messages | Peer::Foreign)) | (None, Some(Peer::Notified)) => {
                        Err(RequestError::NoMessages.into())
                    }
                    (messages, _) => self.start_on(messages.as_ref().unwrap_or(&self.pair), request),
                }
            }
        }

        impl std::fmt::Debug for $half {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_tuple(stringify!($half)).field(&self.pair.shared().pair).finish()
            }
        }

        impl AsFd for $half {
            /// The connection's descriptor; see [`Connection::process_events`](super::Connection::process_events).
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.pair.engine().events.as_fd()
            }
        }

        impl AsRawFd for $half {
            fn as_raw_fd(&self) -> RawFd {
                self.as_fd().as_raw_fd()
            }
        }
    };
}

half!(Sender);
half!(Receiver);

impl Sender {
    fn start(&self, request: Request) -> Result<Transfer> {
        self.start_on(&self.pair, request)
    }

    /// Writes local bytes into the peer's memory: a slice, or each block of a table into the peer's block with the
    /// same index. The transfer completes when the peer has acknowledged all of them.
    ///
    /// # Errors
    /// Nothing is posted after any of these:
    /// - [`RequestError::LengthMismatch`], [`RequestError::CountMismatch`]: the local and the remote blocks differ.
    /// - [`RequestError::RemoteAccessMissing`]: the peer's memory is not registered for the operation.
    /// - [`RequestError::LocalAccessMissing`]: the operation writes local memory without LOCAL_WRITE, or it is a READ on iWARP
    ///   into local memory without REMOTE_WRITE.
    /// - [`RequestError::ForeignRegion`]: a local region is in another protection domain than the connection.
    /// - [`RequestError::TooScattered`]: a message needs more elements than
    ///   [`max_sge`](crate::verbs::QueuePairOptions::max_sge).
    /// - [`Error::Verbs`] with [`verbs::Error::InvalidAtomic`]: an atomic on other than 8 bytes at a multiple of 8;
    ///   with [`verbs::Error::Unavailable`]: a READ or an atomic, and one side has
    ///   [`rd_atomic`](crate::verbs::QueuePairOptions::rd_atomic) 0.
    /// - [`Error::Unusable`]: the connection failed earlier or is not connected.
    /// - [`Error::PortDown`]: the port is down before the first transfer. Later transfers do not look at it until they
    ///   fail.
    ///
    /// [`Error::Verbs`] with [`verbs::Error::Post`]: the provider refused a work request; the connection is unusable.
    ///
    /// [`RequestError::LengthMismatch`]: super::RequestError::LengthMismatch
    /// [`RequestError::CountMismatch`]: super::RequestError::CountMismatch
    /// [`RequestError::RemoteAccessMissing`]: super::RequestError::RemoteAccessMissing
    /// [`RequestError::LocalAccessMissing`]: super::RequestError::LocalAccessMissing
    /// [`RequestError::ForeignRegion`]: super::RequestError::ForeignRegion
    /// [`RequestError::TooScattered`]: super::RequestError::TooScattered
    /// [`Error::Unusable`]: super::Error::Unusable
    /// [`Error::PortDown`]: super::Error::PortDown
    /// [`Error::Verbs`]: super::Error::Verbs
    /// [`verbs::Error::InvalidAtomic`]: crate::verbs::Error::InvalidAtomic
    /// [`verbs::Error::Unavailable`]: crate::verbs::Error::Unavailable
    /// [`verbs::Error::Post`]: crate::verbs::Error::Post
    pub fn write(
        &self,
        local: impl Into<Blocks<RegionSlice>>,
        remote: impl Into<Blocks<RemoteSlice>>,
    ) -> Result<Transfer> {
        self.start(Request::one_sided(local, remote, |remote| Operation::Write { remote }))
    }

    /// Like [`write`](Self::write), and notifies the peer: its [`Notifications`] count one of `id` after all bytes are in
    /// its memory. On the wire `id` is the immediate data of the last message.
    ///
    /// # Errors
    /// As [`write`](Self::write), and [`RequestError::NoNotifications`](super::RequestError::NoNotifications): the peer
    /// receives none.
    pub fn write_notify(
        &self,
        local: impl Into<Blocks<RegionSlice>>,
        remote: impl Into<Blocks<RemoteSlice>>,
        id: u32,
    ) -> Result<Transfer> {
        self.check_notified()?;
        self.start(Request::one_sided(local, remote, |remote| Operation::WriteWithImm { remote, imm: id }))
    }

    /// Notifies the peer, after everything that was written before, with a payload of up to
    /// [`Notifications::MAX_PAYLOAD`] bytes, which may be empty. The payload is copied.
    ///
    /// # Errors
    /// As [`write_notify`](Self::write_notify), and
    /// [`RequestError::PayloadTooLong`](super::RequestError::PayloadTooLong).
    pub fn notify(&self, id: u32, payload: &[u8]) -> Result<Transfer> {
        let limit = Notifications::MAX_PAYLOAD.min(self.pair.shared().pair.max_inline() as usize);
        let length = payload.len();
        if length > limit {
            return Err(RequestError::PayloadTooLong { length, limit }.into());
        }
        self.check_notified()?;
        self.start(Request::notify(id, payload))
    }

    /// # Errors
    /// The peer receives no notifications. One of another library may.
    fn check_notified(&self) -> Result<()> {
        match self.pair.shared().peer.get() {
            Some(Peer::Messages) => Err(RequestError::NoNotifications { side: "the peer" }.into()),
            _ => Ok(()),
        }
    }

    /// Reads the peer's bytes into local memory: a slice, or each block of the peer's table into the local block with
    /// the same index.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn read(
        &self,
        local: impl Into<Blocks<RegionSlice>>,
        remote: impl Into<Blocks<RemoteSlice>>,
    ) -> Result<Transfer> {
        self.start(Request::one_sided(local, remote, |remote| Operation::Read { remote }))
    }

    /// Sends local bytes to a peer that receives the same number of bytes with the same message size.
    ///
    /// # Errors
    /// As [`write`](Self::write), and [`RequestError::NoMessages`](super::RequestError::NoMessages): only one side has
    /// notifications.
    pub fn send(&self, local: impl Into<RegionSlice>) -> Result<Transfer> {
        self.start_message(Request::send(local))
    }

    /// Adds to a u64 of the peer at a multiple of 8, and returns its previous value in 8 local bytes.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn fetch_add(
        &self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        add: u64,
    ) -> Result<Transfer> {
        let (local, remote) = (local.into(), remote.into());
        self.start(Request::one_sided(local, remote, |remote| Operation::FetchAdd { remote, add }))
    }

    /// Replaces a u64 of the peer at a multiple of 8 if it equals `compare`, and returns its previous value in 8
    /// local bytes.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn compare_swap(
        &self,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        compare: u64,
        swap: u64,
    ) -> Result<Transfer> {
        let (local, remote) = (local.into(), remote.into());
        self.start(Request::one_sided(local, remote, |remote| Operation::CompareSwap {
            remote,
            compare,
            swap,
        }))
    }
}

impl Receiver {
    /// Receives as many bytes as `local` has, from a peer that sends as many with the same message size. It posts
    /// receives at once, so that the peer may send. The connection need not be connected yet.
    ///
    /// A receive that timed out, was cancelled or was dropped before its first message stays posted, and the
    /// connection keeps its memory. Receive into the same memory with the same message size to take it up again; a
    /// message that came meanwhile is delivered then.
    ///
    /// # Errors
    /// - As [`Sender::write`], without [`Error::PortDown`](super::Error::PortDown).
    /// - [`RequestError::NoMessages`](super::RequestError::NoMessages): only one side has notifications.
    /// - [`Error::ReceivePosted`](super::Error::ReceivePosted): another receive is still posted, as above.
    pub fn recv(&self, local: impl Into<RegionSlice>) -> Result<Transfer> {
        self.start_message(Request::recv(local))
    }

    /// The notifications of the peer; see [`Connection::notifications`](super::Connection::notifications).
    pub fn notifications(&self) -> Notifications {
        Notifications::of(self.pair.engine(), Some(&self.pair))
    }

    /// Makes what the peer has written into local memory visible to work that a GPU starts after this returns. The
    /// connection's device reads a byte of each region of the slice, over a queue pair that is connected to itself.
    ///
    /// A completion says that the bytes have left the NIC, not that the GPU sees them: they may still be on the PCIe bus.
    /// A read by the same device follows them, and its answer comes only after them (PCI Express Base Specification,
    /// "Transaction Ordering"). NCCL flushes in this way. On machines where the bytes take another bus at the end, such
    /// as NVLink-C2C of GB200, it is the only way known. Memory of the host needs no flush. If several NICs write the
    /// memory, flush it on a receiver of each. Memory registered with
    /// [`Access::RELAXED_ORDERING`](crate::mr::Access::RELAXED_ORDERING) has no such order. [`Runtime::flush`](crate::exporter::Runtime::flush) is the driver's own
    /// call.
    ///
    /// The first call creates the queue pair. Not tried with a GPU.
    ///
    /// # Errors
    /// - [`RequestError::ForeignRegion`]: the slice is in another protection domain.
    /// - [`Error::Verbs`](super::Error::Verbs): the queue pair cannot be created, or the read failed. The connection
    ///   stays usable, and the next call creates another queue pair.
    pub fn flush(&self, slice: &RegionSlice) -> Result<()> {
        self.pair.engine().check_own()?;
        self.flush.read(&self.pair.engine().domain, slice)
    }

    /// Waits for notifications of the peer as [`Notifications::wait`] does, then [flushes](Self::flush) the slice that
    /// they announce: work that a GPU starts afterwards sees the bytes.
    ///
    /// # Errors
    /// As [`Notifications::wait`], and as [`flush`](Self::flush); the notifications are then taken.
    pub fn wait_flushed(&self, id: u32, count: u64, timeout: Duration, slice: &RegionSlice) -> Result<()> {
        self.notifications().wait(id, count, timeout)?;
        self.flush(slice)
    }
}
