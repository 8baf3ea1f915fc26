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
    /// Tasks that wait for the next one.
    pub wakers: Vec<Waker>,
}

impl Arrivals {
    pub(super) fn push(&mut self, notification: Notification) {
        *self.counts.entry(notification.id).or_default() += 1;
        self.queue.push_back(notification);
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
            arrivals.push(Notification { id, payload: vec![at as u8], qp_num: 1 });
        }
        assert_eq!((arrivals.count(7), arrivals.count(1)), (3, 0));
        assert_eq!((arrivals.take_of(7, 2), arrivals.take_of(1, 1)), (2, 0));
        let rest: Vec<_> = std::iter::from_fn(|| arrivals.take()).map(|left| left.payload[0]).collect();
        assert_eq!(rest, [1, 3, 4]);
        assert!(arrivals.counts.is_empty() && arrivals.len() == 0);
    }
}
