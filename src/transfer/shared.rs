//! What all transfers of a connection share: the queue pair, and why it is unusable.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::engine::Engine;
use super::error::{Error, Result};
use crate::kind::ErrorKind;
use crate::verbs::{
    AsyncEvent, CompletionStatus, Concerns, GidEntry, Inbox, Opcode, ProtectionDomain, QueuePair,
    QueuePairOptions, SharedReceiveQueue, ffi,
};

/// The reason of a connection whose queue pair is not in RTS yet.
pub(super) const NOT_CONNECTED: &str = "it is not connected";

const DISCONNECTED: &str = "the peer disconnected";

/// What is said of flushed requests without a known cause. A device that refuses a request of the peer has no
/// completion for it.
const NO_CAUSE: &str =
    "no failed request was seen on this side, so look at the peer's error, or whether the device failed";

/// The connection manager's side of a connection by IP address, which `cm` implements.
pub(crate) trait Link: Send + Sync {
    /// Whether the peer has disconnected.
    fn peer_disconnected(&self) -> bool;
    /// Notifies the peer of the end of the connection.
    fn disconnect(&self);
    /// Whether the device is being removed, as far as `peer_disconnected` has looked.
    fn device_removed(&self) -> bool;
    /// Readable when `peer_disconnected` may have changed.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// What a peer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// It receives notifications, and messages on a second queue pair.
    Notified,
    /// It receives messages only.
    Messages,
    /// A program of another library: one queue pair, with receives of its own.
    Foreign,
}

impl Peer {
    /// By the number of its second queue pair; 0 if it has none.
    pub(crate) fn with_messages(qp_num: u32) -> Self {
        if qp_num == 0 { Self::Messages } else { Self::Notified }
    }
}

pub(super) struct Shared {
    /// Set for a connection by IP address. First, so that it is dropped first and notifies the peer.
    pub link: OnceLock<Box<dyn Link>>,
    pub pair: QueuePair,
    pub domain: ProtectionDomain,
    pub options: QueuePairOptions,
    pub max_message_size: u64,
    /// Empty until it is connected.
    pub peer: OnceLock<Peer>,
    /// Why the connection is unusable; empty while it is usable.
    failed: OnceLock<String>,
    /// The asynchronous event that made it unusable, if one did.
    event: OnceLock<AsyncEvent>,
    /// The fatal events of the device, the queue pair and its completion queue. `None` for a foreign context, whose
    /// owner reads its events.
    inbox: Option<Arc<Inbox>>,
    /// Whether the queue pair and its port were found ready for the first transfer.
    ready: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        pair: QueuePair,
        domain: ProtectionDomain,
        options: QueuePairOptions,
        max_message_size: u64,
    ) -> Self {
        Self {
            link: OnceLock::new(),
            pair,
            domain,
            options,
            max_message_size,
            peer: OnceLock::new(),
            failed: OnceLock::new(),
            event: OnceLock::new(),
            inbox: None,
            ready: AtomicBool::new(false),
        }
    }

    /// For a queue pair that libibverbs must not see.
    #[cfg(test)]
    pub(super) fn ready(
        pair: QueuePair,
        domain: ProtectionDomain,
        options: QueuePairOptions,
        max_message_size: u64,
    ) -> Self {
        Self { ready: AtomicBool::new(true), ..Self::new(pair, domain, options, max_message_size) }
    }

    /// For a queue pair that libibverbs must not see.
    #[cfg(test)]
    pub(super) fn set_failed(&self, reason: &str) {
        let _ = self.failed.set(reason.to_owned());
    }

    /// Why the connection is unusable, if it is known to be.
    pub(super) fn reason(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Notices that the peer has disconnected, which ends the connection. The completions before were taken. Events are
    /// read also after a failure, or they would keep the descriptor readable.
    pub(super) fn check_link(&self) {
        let Some(link) = self.link.get().filter(|link| link.peer_disconnected()) else { return };
        if self.is_failed() {
            return;
        }
        if link.device_removed() {
            self.fail_by(AsyncEvent::DeviceFatal);
        } else {
            self.fail(|| DISCONNECTED.into());
        }
    }

    /// Has the fatal events of this queue pair reported to its engine, unless the context is foreign.
    pub(super) fn listen(&mut self, engine: &Engine) -> Result<()> {
        let context = self.domain.context();
        if context.reads_events() {
            let concerns = Concerns::Fatal {
                qp_num: Some(self.pair.number()),
                cq: engine.completions.handle(),
                srq: engine.receives.as_ref().map(SharedReceiveQueue::handle),
            };
            self.inbox = Some(context.subscribe(concerns, engine.events.clone().into())?);
        }
        Ok(())
    }

    /// The event that made the connection unusable, if one did.
    pub(super) fn event(&self) -> Option<AsyncEvent> {
        self.event.get().copied()
    }

    /// Takes the event that ends the connection, if there is one.
    pub(super) fn fatal_event(&self) -> Option<AsyncEvent> {
        let inbox = self.inbox.as_ref()?;
        self.domain.context().dispatch_events();
        inbox.pop()
    }

    /// What the device says about a failure: the event that ends the connection, or that it is gone. The kernel flushes
    /// the queues of a device that is removed before it reports that.
    pub(super) fn cause(&self) -> Option<AsyncEvent> {
        self.inbox.as_ref()?;
        let gone = || {
            let error = self.pair.state().err()?;
            (error.kind() == ErrorKind::DeviceGone).then_some(AsyncEvent::DeviceFatal)
        };
        self.fatal_event().or_else(gone)
    }

    /// Fails because of an event, unless the connection has failed before.
    pub(super) fn fail_by(&self, event: AsyncEvent) {
        let reason = || {
            self.event.get_or_init(|| event);
            format!("{}: {event}", self.domain.context().device_name())
        };
        match event {
            // The device stops the queue pair once it has answered the peer (class C of the InfiniBand specification). If
            // it is stopped before, the peer gets no answer: soft-RoCE reports the event first.
            AsyncEvent::QueuePairRequestError { .. } | AsyncEvent::QueuePairAccessError { .. } => {
                self.failed.get_or_init(reason);
            }
            _ => self.fail(reason),
        }
    }

    /// The error of a transfer that such an event ended.
    pub(super) fn event_error(&self, opcode: Opcode, done: u64, length: u64) -> Option<Error> {
        let event = self.event()?;
        let device = self.domain.context().device_name().into();
        Some(Error::DeviceEvent { device, event, opcode, done, length })
    }

    /// Whether the peer's disconnect ended the connection.
    pub(super) fn is_disconnected(&self) -> bool {
        self.failed.get().is_some_and(|reason| reason == DISCONNECTED)
    }

    pub(super) fn is_failed(&self) -> bool {
        self.failed.get().is_some()
    }

    /// Refuses a transfer of `length` bytes with the first reason if the connection has failed.
    pub(super) fn check_usable(&self, opcode: Opcode, length: u64) -> Result<()> {
        match self.failed.get() {
            Some(_) if self.is_disconnected() => Err(Error::PeerDisconnected { opcode, done: 0, length }),
            Some(reason) => Err(self
                .event_error(opcode, 0, length)
                .unwrap_or_else(|| Error::Unusable { reason: reason.clone(), done: 0 })),
            None => Ok(()),
        }
    }

    /// Whether the queue pair and its port were found ready.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Checks that the port of a connected queue pair is up. Later transfers do not ask again.
    pub(super) fn check_port(&self) -> Result<()> {
        if let Some((device, port, interface)) = self.port_down() {
            return Err(Error::PortDown { device, port, interface });
        }
        self.ready.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the queue pair is connected, as the device says.
    ///
    /// # Errors
    /// Why it is unusable.
    pub(super) fn is_connected(&self) -> Result<bool, String> {
        use ffi::ibv_qp_state as State;
        match self.pair.state() {
            Ok(State::IBV_QPS_RTS) => Ok(true),
            Ok(State::IBV_QPS_RESET | State::IBV_QPS_INIT | State::IBV_QPS_RTR) => Ok(false),
            Ok(_) => Err(format!("its queue pair is in the error state: {NO_CAUSE}")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Brings the queue pair to the error state. Keeps the first reason.
    pub(super) fn fail(&self, reason: impl FnOnce() -> String) {
        self.failed.get_or_init(reason);
        if !self.pair.is_own() {
            // A child of `fork`: the queue pair is the parent's.
            return;
        }
        if let Err(error) = self.pair.stop() {
            // The device was removed, and the requests with it.
            tracing::debug!(%error, "cannot stop a queue pair");
        }
    }

    /// Discards what is in flight in both directions, without completions. Returns whether the device is done with it.
    pub(super) fn discard(&self) -> bool {
        let reset = self.pair.reset();
        if let Err(error) = &reset {
            tracing::warn!(%error, "cannot reset a queue pair");
        }
        reset.is_ok()
    }

    /// What is known about a failure besides its status; `None` stands for a timeout.
    pub(super) fn hint(&self, status: Option<CompletionStatus>) -> String {
        let port = self.port_down().map(|(device, port, interface)| {
            format!("{} is down", port_name(&device, port, interface.as_deref()))
        });
        let status = status.filter(|&status| port.is_none() || status != CompletionStatus::WR_FLUSH_ERR);
        let status = status.and_then(|status| status_hint(status, &self.options));
        status.into_iter().chain(port).collect::<Vec<_>>().join("; ")
    }

    /// Device, port and network interface of the connection if its port is down.
    fn port_down(&self) -> Option<(String, u8, Option<String>)> {
        let (context, number) = (self.domain.context(), self.options.port);
        let device = context.device_name();
        match context.port(number) {
            Ok(port) if !port.active => {
                let used = |entry: &GidEntry| Some(entry.index) == self.pair.gid_index();
                let gids = context.gids(number).unwrap_or_default();
                let interface = gids.into_iter().find(used).and_then(|entry| entry.netdev);
                Some((device.to_owned(), number, interface))
            }
            // An error means that the device is gone, which the status says better.
            _ => None,
        }
    }
}

/// A port in words.
pub(super) fn port_name(device: &str, port: u8, interface: Option<&str>) -> String {
    let interface = interface.map_or(String::new(), |name| format!(" (network interface {name})"));
    format!("port {port} of {device}{interface}")
}

/// The options that decided about a status, with their values.
fn status_hint(status: CompletionStatus, options: &QueuePairOptions) -> Option<String> {
    let QueuePairOptions { timeout, retry_count, rnr_retry, .. } = options;
    match status {
        CompletionStatus::RETRY_EXC_ERR => {
            Some(format!("timeout {timeout} ({}), retry_count {retry_count}", ack_timeout(*timeout)))
        }
        CompletionStatus::RNR_RETRY_EXC_ERR => Some(format!("rnr_retry {rnr_retry}")),
        CompletionStatus::WR_FLUSH_ERR => Some(NO_CAUSE.into()),
        CompletionStatus::LOC_QP_OP_ERR | CompletionStatus::REM_OP_ERR => Some(
            "a message may be longer than its receive: send and receive the same lengths with the same message size"
                .into(),
        ),
        CompletionStatus::REM_INV_REQ_ERR => Some(
            "the peer's queue pair does not permit this operation; atomics need a device that has them"
                .into(),
        ),
        _ => None,
    }
}

/// The time that an exponent of [`QueuePairOptions::timeout`] stands for.
fn ack_timeout(exponent: u8) -> String {
    let nanos = 4096_u64 << exponent.min(31);
    match (exponent, nanos) {
        (0, _) => "no limit".into(),
        (_, ..1_000_000) => format!("{} µs", nanos / 1000),
        (_, ..1_000_000_000) => format!("{} ms", (nanos + 500_000) / 1_000_000),
        _ => format!("{:.1} s", nanos as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_timeout_is_in_words() {
        let words: Vec<_> = [0, 1, 14, 17, 20, 31, 255].map(ack_timeout).into();
        assert_eq!(words, ["no limit", "8 µs", "67 ms", "537 ms", "4.3 s", "8796.1 s", "8796.1 s"]);
    }

    #[test]
    fn a_status_names_the_options_behind_it() {
        let hint = |status| status_hint(status, &QueuePairOptions::default());
        let retries = hint(CompletionStatus::RETRY_EXC_ERR);
        assert_eq!(retries.as_deref(), Some("timeout 17 (537 ms), retry_count 6"));
        assert_eq!(hint(CompletionStatus::RNR_RETRY_EXC_ERR).as_deref(), Some("rnr_retry 7"));
        assert!(hint(CompletionStatus::WR_FLUSH_ERR).unwrap().starts_with("no failed request was seen"));
        assert_eq!(hint(CompletionStatus::REM_ACCESS_ERR), None);
    }

    #[test]
    fn a_port_is_named_with_its_interface() {
        assert_eq!(port_name("rxe0", 1, Some("wire0")), "port 1 of rxe0 (network interface wire0)");
        assert_eq!(port_name("mlx5_0", 2, None), "port 2 of mlx5_0");
    }
}
