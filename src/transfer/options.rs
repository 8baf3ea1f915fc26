//! Options of a connection, and how they fit into the limits of a device.

use std::time::Duration;

use crate::verbs::QueuePairOptions;

/// Longest message in bytes. soft-RoCE reports 2 GiB but fails a message of that length, because it counts the
/// remaining bytes in a C int (`copy_data` in drivers/infiniband/sw/rxe/rxe_mr.c).
const MAX_MESSAGE_SIZE: u64 = 1 << 30;

/// Bounds of what a connection allocates, whatever a device reports as its limits: messages in flight, messages
/// in a chain, and elements of a message.
const MAX_WINDOW: u32 = 1 << 16;
const MAX_CHAIN: u32 = 1 << 10;
const MAX_SGE: u32 = 1 << 8;

/// Options of a connection. The defaults suit streams of large messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionOptions {
    /// Options of the queue pair. The connection sets its depths to `window`, and limits `max_sge` to 256 and to the
    /// device's maximum. Default: those of [`QueuePairOptions`].
    pub queue_pair: QueuePairOptions,
    /// Length of a message in bytes, at least 1, at most 1 GiB and the port's limit. Both sides of a `send` and
    /// `recv` need the same. Default 1 MiB.
    pub message_size: u64,
    /// Maximum number of messages in flight in each direction, 1 to 65536. Default 128.
    pub window: u32,
    /// Maximum number of messages in a work request chain, which is posted with one call and signaled once. A chain
    /// also ends after 4 MiB. At least 1, at most half the window rounded up and 1024. Default 16.
    pub chain: u32,
    /// Whether to poll for completions in a loop instead of sleeping on the completion channel: some microseconds
    /// faster, but it occupies a CPU. Default `false`.
    pub busy_poll: bool,
    /// Number of receives that are posted ahead for the peer's notifications; 0 for none. A connection of a
    /// [`Worker`](super::Worker) ignores this option and takes from [`WorkerOptions::notifications`]. Default 0.
    pub notifications: u32,
    /// Longest time without a completed message before a transfer fails. It does not count while a receive waits
    /// for its first message. Default 30 s.
    pub stall_timeout: Duration,
}

impl Default for ConnectionOptions {
    fn default() -> Self {
        Self {
            queue_pair: QueuePairOptions::default(),
            message_size: 1 << 20,
            window: 128,
            chain: 16,
            busy_poll: false,
            notifications: 0,
            stall_timeout: Duration::from_secs(30),
        }
    }
}

setters!(ConnectionOptions {
    queue_pair: QueuePairOptions,
    message_size: u64,
    window: u32,
    chain: u32,
    busy_poll: bool,
    notifications: u32,
    stall_timeout: Duration,
});

impl ConnectionOptions {
    /// The options within the limits of a device: entries of a queue and elements of a work request. A limit of 0
    /// counts as 1, and the kernel decides.
    pub(super) fn within(mut self, max_entries: u32, max_sge: u32) -> Self {
        self.window = self.window.min(max_entries).clamp(1, MAX_WINDOW);
        // At most half the window, so that a chain is posted while another is in flight.
        self.chain = self.chain.clamp(1, self.window.div_ceil(2).min(MAX_CHAIN));
        let pair = &mut self.queue_pair;
        (pair.send_depth, pair.recv_depth) = (self.window, self.window);
        pair.max_sge = pair.max_sge.min(max_sge).clamp(1, MAX_SGE);
        self
    }
}

/// The longest message of a port that reports this limit; 0 stands for none.
pub(super) fn max_message_size(port: u32) -> u64 {
    match port {
        0 => MAX_MESSAGE_SIZE,
        limit => MAX_MESSAGE_SIZE.min(limit.into()),
    }
}

/// Options of a [`Worker`](super::Worker).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerOptions {
    /// Room in the completion queue. A connection takes twice its [`window`](ConnectionOptions::window), so the queue
    /// cannot overrun. At least 1, at most the device's [`max_cqe`](crate::verbs::Limits::max_cqe). Default 16384.
    pub completions: u32,
    /// Number of receives that are posted ahead for notifications of all connections, which take from the completions
    /// too. 0 for none; at most the device's `max_srq_wr`. A peer that is further ahead than this many waits until the
    /// worker has made progress, at most its [`stall_timeout`](ConnectionOptions::stall_timeout). Default 0.
    pub notifications: u32,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self { completions: 16384, notifications: 0 }
    }
}

setters!(WorkerOptions { completions: u32, notifications: u32 });

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_limit() -> impl Strategy<Value = u32> {
        prop_oneof![Just(0), Just(1), Just(2), Just(u32::MAX - 1), Just(u32::MAX), any::<u32>()]
    }

    proptest! {
        #[test]
        fn no_limit_and_no_option_panics(
            (window, chain, elements) in (any_limit(), any_limit(), any_limit()),
            (entries, max_sge, port) in (any_limit(), any_limit(), any_limit())
        ) {
            let pair = QueuePairOptions::default().max_sge(elements);
            let options = ConnectionOptions::default().window(window).chain(chain).queue_pair(pair);
            let ConnectionOptions { window: fitted, chain, queue_pair, .. } = options.within(entries, max_sge);
            prop_assert!(fitted >= 1 && fitted <= window.max(1) && fitted <= entries.max(1));
            prop_assert!(chain >= 1 && chain <= fitted.div_ceil(2));
            prop_assert!(queue_pair.max_sge >= 1 && queue_pair.max_sge <= max_sge.max(1));
            prop_assert_eq!((queue_pair.send_depth, queue_pair.recv_depth), (fitted, fitted));
            // What is allocated: records of 16 bytes, and elements of 16 bytes.
            prop_assert!(u64::from(fitted) <= 1 << 16);
            prop_assert!(u64::from(chain) * u64::from(queue_pair.max_sge) <= 1 << 18);
            let longest = max_message_size(port);
            prop_assert!((1..=1 << 30).contains(&longest));
        }
    }

    #[test]
    fn options_within_the_limits_stay() {
        let options = ConnectionOptions::default().within(16384, 30);
        assert_eq!((options.window, options.chain, options.queue_pair.max_sge), (128, 16, 4));
        assert_eq!(max_message_size(1 << 31), 1 << 30);
    }
}
