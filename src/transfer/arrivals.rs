//! The notifications of a queue pair that nobody has taken.

use std::collections::VecDeque;
use std::task::Waker;

use rustc_hash::FxHashMap;

use super::Notification;

#[derive(Default)]
pub(super) struct Arrivals {
    queue: VecDeque<Notification>,
    /// How many of each id are in the queue.
    counts: FxHashMap<u32, u64>,
    /// Whether one was dropped.
    overrun: bool,
    /// Tasks that wait for the next one.
    pub waiters: Waiters,
}

/// Tasks that wait for a notification, each with the number of its [`Waiter`](super::notifications::Waiter).
#[derive(Default)]
pub(super) struct Waiters(FxHashMap<u64, Waker>);

impl Waiters {
    /// Returns the waker that this one replaces.
    pub(super) fn add(&mut self, number: u64, waker: &Waker) -> Option<Waker> {
        self.0.insert(number, waker.clone())
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<Waker> {
        self.0.remove(&number)
    }

    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Waker> {
        self.0.drain().map(|(_, waker)| waker)
    }
}

impl Arrivals {
    /// Maximum number, so that a peer cannot fill the memory.
    pub(super) const MAX: usize = 1 << 20;

    /// Whether there was room for this and all before it.
    #[must_use]
    pub(super) fn push(&mut self, notification: Notification) -> bool {
        self.overrun |= self.queue.len() >= Self::MAX;
        if !self.overrun {
            *self.counts.entry(notification.id).or_default() += 1;
            self.queue.push_back(notification);
        }
        !self.overrun
    }

    pub(super) fn count(&self, id: u32) -> u64 {
        self.counts.get(&id).copied().unwrap_or(0)
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// The oldest one.
    pub(super) fn take(&mut self) -> Option<Notification> {
        let notification = self.queue.pop_front()?;
        self.forget(notification.id, 1);
        Some(notification)
    }

    /// Takes the oldest ones of an id, at most `count`. Returns how many.
    pub(super) fn take_of(&mut self, id: u32, count: u64) -> u64 {
        let taken = self.count(id).min(count);
        let mut left = taken;
        if taken == 1 {
            // Most often it is near the front.
            let at = self.queue.iter().position(|notification| notification.id == id);
            at.and_then(|at| self.queue.remove(at));
        } else if taken > 0 {
            self.queue.retain(|notification| {
                let take = left > 0 && notification.id == id;
                left -= u64::from(take);
                !take
            });
        }
        self.forget(id, taken);
        taken
    }

    fn forget(&mut self, id: u32, count: u64) {
        if let Some(counted) = self.counts.get_mut(&id) {
            *counted -= count;
            if *counted == 0 {
                self.counts.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_notification_is_taken_once_and_in_order() {
        let mut arrivals = Arrivals::default();
        for (at, id) in [7, 8, 7, 7, 9].into_iter().enumerate() {
            assert!(arrivals.push(Notification { id, payload: vec![at as u8], qp_num: 1 }));
        }
        assert_eq!((arrivals.count(7), arrivals.count(1)), (3, 0));
        assert_eq!((arrivals.take_of(7, 2), arrivals.take_of(1, 1)), (2, 0));
        let rest: Vec<_> = std::iter::from_fn(|| arrivals.take()).map(|left| left.payload[0]).collect();
        assert_eq!(rest, [1, 3, 4]);
        assert!(arrivals.counts.is_empty() && arrivals.len() == 0);
    }

    #[test]
    fn a_peer_cannot_fill_the_memory() {
        let mut arrivals = Arrivals::default();
        let mut push = |id| arrivals.push(Notification { id, payload: Vec::new(), qp_num: 1 });
        assert!((0..Arrivals::MAX as u32).all(|at| push(at % 2)));
        assert!(!push(7));
        assert_eq!((arrivals.len(), arrivals.count(7)), (Arrivals::MAX, 0));
        // Nothing comes after a gap.
        arrivals.take();
        assert!(!arrivals.push(Notification { id: 7, payload: Vec::new(), qp_num: 1 }));
    }
}
