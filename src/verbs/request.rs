//! A work request of the send queue, for callers that post their own.

use ibverbs_sys as ffi;

use super::{Operation, Sge};

/// A work request for [`QueuePair::post`](super::QueuePair::post): an operation with its local memory, and flags.
#[derive(Debug, Clone, Copy)]
#[must_use]
#[doc(alias("ibv_send_wr", "ibv_send_flags"))]
pub struct WorkRequest<'a> {
    pub(super) wr_id: u64,
    pub(super) operation: Operation,
    pub(super) payload: Payload<'a>,
    /// As `ibv_send_flags`.
    pub(super) flags: u32,
}

/// The local memory of a work request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Payload<'a> {
    Elements(&'a [Sge<'a>]),
    /// Copied into the request.
    Inline(&'a [u8]),
}

impl Payload<'_> {
    /// Number of scatter/gather elements.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Elements(elements) => elements.len(),
            Self::Inline(_) => 1,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Elements(elements) => elements.iter().map(|element| u64::from(element.len())).sum(),
            Self::Inline(bytes) => bytes.len() as u64,
        }
    }

    /// Writes the elements to a list with room for them, and returns how many. Inline bytes have been found to be at
    /// most `max_inline`.
    pub(super) fn write(&self, list: &mut [ffi::ibv_sge]) -> i32 {
        match self {
            Self::Elements(elements) => {
                list.iter_mut().zip(*elements).for_each(|(raw, element)| *raw = element.raw());
            }
            // Inline bytes need no key: the CPU copies them during the call.
            Self::Inline(bytes) => {
                list[0] = ffi::ibv_sge { addr: bytes.as_ptr() as u64, length: bytes.len() as u32, lkey: 0 };
            }
        }
        self.count() as i32
    }
}

impl<'a> WorkRequest<'a> {
    /// A request without flags. Its completion carries `wr_id`. The operation uses the bytes of the elements, one
    /// after the other.
    pub fn new(wr_id: u64, operation: Operation, elements: &'a [Sge<'a>]) -> Self {
        Self { wr_id, operation, payload: Payload::Elements(elements), flags: 0 }
    }

    /// A SEND or WRITE of these bytes, which are copied into the request while it is posted, and need no region. Up to
    /// [`max_inline`](super::QueuePairOptions::max_inline) bytes.
    #[doc(alias = "IBV_SEND_INLINE")]
    pub fn inline(wr_id: u64, operation: Operation, bytes: &'a [u8]) -> Self {
        let flags = ffi::ibv_send_flags::IBV_SEND_INLINE.0;
        Self { wr_id, operation, payload: Payload::Inline(bytes), flags }
    }

    /// Asks for a completion also on success. A request that is not signaled completes only if it fails; the next
    /// signaled one shows that it succeeded. Signal at least one of as many as the queue is deep.
    #[doc(alias = "IBV_SEND_SIGNALED")]
    pub fn signaled(self) -> Self {
        self.with(ffi::ibv_send_flags::IBV_SEND_SIGNALED)
    }

    /// The device starts it only after all READs and atomics before it have completed, so it may send the bytes that
    /// they fetched.
    #[doc(alias = "IBV_SEND_FENCE")]
    pub fn fence(self) -> Self {
        self.with(ffi::ibv_send_flags::IBV_SEND_FENCE)
    }

    /// The peer's receive raises an event also if its queue is armed for
    /// [solicited](super::CompletionQueue::arm_solicited) completions only. For SEND, and WRITE with immediate data;
    /// without effect for others.
    #[doc(alias = "IBV_SEND_SOLICITED")]
    pub fn solicited(self) -> Self {
        self.with(ffi::ibv_send_flags::IBV_SEND_SOLICITED)
    }

    fn with(mut self, flag: ffi::ibv_send_flags) -> Self {
        self.flags |= flag.0;
        self
    }
}
