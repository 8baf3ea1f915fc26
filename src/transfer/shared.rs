//! The state that both directions of a connection share: the queue pair, and why it is unusable.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::error::{Error, Result};
use crate::verbs::{
    self, Completion, CompletionQueue, CompletionStatus, GidEntry, ProtectionDomain, QueuePair,
    QueuePairOptions, ffi, vendor,
};

/// Maximum number of completions that one poll returns.
pub(super) const POLL_BATCH: usize = 16;

/// The reason of a connection whose queue pair is not in RTS yet.
pub(super) const NOT_CONNECTED: &str = "it is not connected";

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
}

/// A direction of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Send,
    Recv,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Send => Self::Recv,
            Self::Recv => Self::Send,
        }
    }
}

/// The completion queue of a direction.
struct Completions {
    queue: CompletionQueue,
    /// Completions that the other direction took out while it looked for the cause of a failure.
    kept: Mutex<VecDeque<ffi::ibv_wc>>,
}

impl Completions {
    /// Locked while completions are taken out of the queue, so that they stay in order.
    fn lock(&self) -> MutexGuard<'_, VecDeque<ffi::ibv_wc>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Shared {
    /// Set for a connection by IP address. First, so that it is dropped first and notifies the peer.
    pub link: OnceLock<Box<dyn Link>>,
    pub pair: QueuePair,
    pub domain: ProtectionDomain,
    pub options: QueuePairOptions,
    pub max_message_size: u64,
    /// Why the connection is unusable; empty while it is usable.
    failed: OnceLock<String>,
    /// The first completion of either direction that failed and was not only flushed.
    cause: OnceLock<Completion>,
    /// Whether the queue pair was reset: what was in flight has no completions.
    discarded: AtomicBool,
    /// Whether the queue pair and its port were found ready for the first transfer.
    ready: AtomicBool,
    queues: [Completions; 2],
}

impl Shared {
    pub(super) fn new(
        pair: QueuePair,
        domain: ProtectionDomain,
        options: QueuePairOptions,
        max_message_size: u64,
        [sends, receives]: [CompletionQueue; 2],
    ) -> Self {
        let completions = |queue| Completions { queue, kept: Mutex::default() };
        Self {
            link: OnceLock::new(),
            pair,
            domain,
            options,
            max_message_size,
            failed: OnceLock::new(),
            cause: OnceLock::new(),
            discarded: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            queues: [completions(sends), completions(receives)],
        }
    }

    /// Takes completions of a direction.
    pub(super) fn poll(&self, side: Side, into: &mut [ffi::ibv_wc; POLL_BATCH]) -> verbs::Result<usize> {
        let Completions { queue, .. } = &self.queues[side as usize];
        let mut kept = self.queues[side as usize].lock();
        if kept.is_empty() {
            let count = queue.poll_into(into)?;
            self.note_failure(&into[..count]);
            return Ok(count);
        }
        let count = kept.len().min(into.len());
        into.iter_mut().zip(kept.drain(..count)).for_each(|(place, completion)| *place = completion);
        Ok(count)
    }

    fn note_failure(&self, completions: &[ffi::ibv_wc]) {
        let cause = |completion: &&ffi::ibv_wc| {
            completion.error().is_some_and(|(status, _)| status != CompletionStatus::WR_FLUSH_ERR.0)
        };
        if let Some(completion) = completions.iter().find(cause) {
            self.cause.get_or_init(|| Completion::from(*completion));
        }
    }

    /// Why the requests of `side` were flushed, if it is known. The failed request may be one of the other
    /// direction whose completion nobody has taken yet.
    pub(super) fn reason_of_flush(&self, side: Side) -> Option<String> {
        if let Some(reason) = self.failed.get() {
            return Some(reason.clone());
        }
        let Completions { queue, .. } = &self.queues[side.other() as usize];
        let mut kept = self.queues[side.other() as usize].lock();
        let mut batch = [ffi::ibv_wc::default(); POLL_BATCH];
        while self.cause.get().is_none()
            && let Ok(count @ 1..) = queue.poll_into(&mut batch)
        {
            self.note_failure(&batch[..count]);
            kept.extend(&batch[..count]);
        }
        drop(kept);
        let Completion { status, vendor_err, .. } = *self.cause.get()?;
        // The other direction may have given its reason meanwhile, which says more.
        let reason = || format!("a request completed with {status}{}", vendor(vendor_err));
        Some(self.failed.get_or_init(reason).clone())
    }

    /// Whether the peer is known to have disconnected.
    pub(super) fn peer_disconnected(&self) -> bool {
        self.link.get().is_some_and(|link| link.peer_disconnected())
    }

    pub(super) fn is_failed(&self) -> bool {
        self.failed.get().is_some()
    }

    /// Fails with the first reason if the connection failed earlier, after `done` bytes of a transfer.
    pub(super) fn check_usable(&self, done: u64) -> Result<()> {
        match self.failed.get() {
            Some(reason) => Err(Error::Unusable { reason: reason.clone(), done }),
            None => Ok(()),
        }
    }

    /// Checks that requests can be posted: the queue pair is connected, and its port is up. Asks the device only
    /// until both were so once.
    pub(super) fn check_ready(&self) -> Result<()> {
        if self.ready.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(reason) = self.failure() {
            return Err(Error::Unusable { reason: reason.into(), done: 0 });
        }
        if let Some((device, port, interface)) = self.port_down() {
            return Err(Error::PortDown { device, port, interface });
        }
        self.ready.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Why the connection is unusable, as far as it is known or the device says.
    pub(super) fn failure(&self) -> Option<&str> {
        use ffi::ibv_qp_state as State;
        if !self.is_failed() && self.peer_disconnected() {
            self.fail(|| "the peer disconnected".into());
        }
        if !self.is_failed() {
            match self.pair.state() {
                Ok(State::IBV_QPS_RTS) => return None,
                Ok(State::IBV_QPS_RESET | State::IBV_QPS_INIT | State::IBV_QPS_RTR) => {
                    return Some(NOT_CONNECTED);
                }
                Ok(_) => {
                    let cause = self.reason_of_flush(Side::Recv);
                    let cause = cause.or_else(|| self.reason_of_flush(Side::Send));
                    self.fail(|| {
                        cause.unwrap_or_else(|| format!("its queue pair is in the error state: {NO_CAUSE}"))
                    });
                }
                Err(error) => self.fail(|| error.to_string()),
            }
        }
        self.failed.get().map(String::as_str)
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

    /// Discards what is in flight in both directions, without completions.
    pub(super) fn discard(&self) {
        if let Err(error) = self.pair.reset() {
            tracing::debug!(%error, "cannot reset a queue pair");
        }
        self.discarded.store(true, Ordering::Release);
    }

    pub(super) fn is_discarded(&self) -> bool {
        self.discarded.load(Ordering::Acquire)
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
