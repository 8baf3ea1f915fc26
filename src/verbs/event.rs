//! An asynchronous event, copied out of libibverbs' struct.
//!
//! `unsafe` is here to read the union of that struct, and the object that it points to.

use std::fmt;

use ibverbs_sys as ffi;

/// An asynchronous event of a device context. The numbers name the object that it is about: a port (from 1), a queue
/// pair by [`QueuePair::number`](super::QueuePair::number), a completion queue by
/// [`CompletionQueue::handle`](super::CompletionQueue::handle), a shared receive queue or work queue by the `handle`
/// of its C struct.
///
/// Source: `enum ibv_event_type` in `infiniband/verbs.h`, and `ibv_get_async_event(3)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[doc(alias("ibv_async_event", "ibv_event_type"))]
#[allow(missing_docs)] // each variant's one field is the object above
pub enum AsyncEvent {
    /// The device failed or was removed: nothing in this context works any more.
    DeviceFatal,
    /// A queue pair failed and is in the error state.
    QueuePairFatal { qp_num: u32 },
    /// A queue pair received an invalid request, and is in the error state.
    QueuePairRequestError { qp_num: u32 },
    /// A queue pair received a request that its memory does not permit, and is in the error state.
    QueuePairAccessError { qp_num: u32 },
    /// The first packet arrived on a queue pair that is not in RTS yet.
    CommunicationEstablished { qp_num: u32 },
    /// The last request in flight completed after a queue pair was brought to SQD.
    SendQueueDrained { qp_num: u32 },
    /// A queue pair moved to its alternate path.
    PathMigrated { qp_num: u32 },
    /// A queue pair could not move to its alternate path.
    PathMigrationError { qp_num: u32 },
    /// A queue pair in the error state has taken its last receive from its shared receive queue.
    LastWorkRequestReached { qp_num: u32 },
    /// A completion queue overran or failed: its completions are lost.
    CompletionQueueError { cq: u32 },
    /// A shared receive queue failed.
    SharedReceiveQueueError { srq: u32 },
    /// A shared receive queue has fewer receives than its limit.
    SharedReceiveQueueLimit { srq: u32 },
    /// A work queue failed.
    WorkQueueFatal { wq: u32 },
    /// The port carries traffic again.
    PortActive { port: u8 },
    /// The port is down. Requests in flight are retried until their retries are used up.
    PortError { port: u8 },
    /// The subnet manager changed the LID of the port.
    LidChange { port: u8 },
    /// The P_Key table of the port changed.
    PkeyChange { port: u8 },
    /// The GID table of the port changed, for example because an address was added to its network interface.
    GidChange { port: u8 },
    /// Another subnet manager took over.
    SubnetManagerChange { port: u8 },
    /// The subnet manager asks to register again for its services.
    ClientReregister { port: u8 },
    /// A type that this library does not know, as `ibv_event_type` numbers it.
    Other { event_type: u32 },
    /// The reader did not take its events: this many, the oldest, were dropped.
    Dropped { count: u64 },
}

impl AsyncEvent {
    /// Whether the object of the event is unusable from now on: the whole device, a queue pair, a completion queue,
    /// a shared receive queue or a work queue.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::DeviceFatal
                | Self::QueuePairFatal { .. }
                | Self::QueuePairRequestError { .. }
                | Self::QueuePairAccessError { .. }
                | Self::CompletionQueueError { .. }
                | Self::SharedReceiveQueueError { .. }
                | Self::WorkQueueFatal { .. }
        )
    }

    /// Copies what the event says out of libibverbs' struct, which points to the object.
    ///
    /// # Safety
    /// `ibv_get_async_event` filled `raw` in, and it is not acknowledged yet: until then its object is not freed.
    pub(super) unsafe fn of(raw: &ffi::ibv_async_event) -> Self {
        let ffi::ibv_async_event { element, event_type } = *raw;
        // SAFETY: libibverbs writes the field of the union that belongs to the type, and the object lives.
        let qp_num = || unsafe { element.qp.as_ref() }.map_or(0, |qp| qp.qp_num);
        // SAFETY: as above.
        let srq = || unsafe { element.srq.as_ref() }.map_or(0, |srq| srq.handle);
        // SAFETY: as above; for all types without an object libibverbs writes the port.
        let port = || unsafe { element.port_num } as u8;
        match event_type {
            ffi::IBV_EVENT_DEVICE_FATAL => Self::DeviceFatal,
            ffi::IBV_EVENT_QP_FATAL => Self::QueuePairFatal { qp_num: qp_num() },
            ffi::IBV_EVENT_QP_REQ_ERR => Self::QueuePairRequestError { qp_num: qp_num() },
            ffi::IBV_EVENT_QP_ACCESS_ERR => Self::QueuePairAccessError { qp_num: qp_num() },
            ffi::IBV_EVENT_COMM_EST => Self::CommunicationEstablished { qp_num: qp_num() },
            ffi::IBV_EVENT_SQ_DRAINED => Self::SendQueueDrained { qp_num: qp_num() },
            ffi::IBV_EVENT_PATH_MIG => Self::PathMigrated { qp_num: qp_num() },
            ffi::IBV_EVENT_PATH_MIG_ERR => Self::PathMigrationError { qp_num: qp_num() },
            ffi::IBV_EVENT_QP_LAST_WQE_REACHED => Self::LastWorkRequestReached { qp_num: qp_num() },
            ffi::IBV_EVENT_CQ_ERR => {
                // SAFETY: as above.
                Self::CompletionQueueError { cq: unsafe { element.cq.as_ref() }.map_or(0, |cq| cq.handle) }
            }
            ffi::IBV_EVENT_SRQ_ERR => Self::SharedReceiveQueueError { srq: srq() },
            ffi::IBV_EVENT_SRQ_LIMIT_REACHED => Self::SharedReceiveQueueLimit { srq: srq() },
            ffi::IBV_EVENT_WQ_FATAL => {
                // SAFETY: as above.
                Self::WorkQueueFatal { wq: unsafe { element.wq.as_ref() }.map_or(0, |wq| wq.handle) }
            }
            ffi::IBV_EVENT_PORT_ACTIVE => Self::PortActive { port: port() },
            ffi::IBV_EVENT_PORT_ERR => Self::PortError { port: port() },
            ffi::IBV_EVENT_LID_CHANGE => Self::LidChange { port: port() },
            ffi::IBV_EVENT_PKEY_CHANGE => Self::PkeyChange { port: port() },
            ffi::IBV_EVENT_GID_CHANGE => Self::GidChange { port: port() },
            ffi::IBV_EVENT_SM_CHANGE => Self::SubnetManagerChange { port: port() },
            ffi::IBV_EVENT_CLIENT_REREGISTER => Self::ClientReregister { port: port() },
            event_type => Self::Other { event_type },
        }
    }
}

impl fmt::Display for AsyncEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeviceFatal => f.write_str("the device failed or was removed"),
            Self::QueuePairFatal { qp_num } => write!(f, "queue pair {qp_num} failed"),
            Self::QueuePairRequestError { qp_num } => {
                write!(f, "queue pair {qp_num} received an invalid request")
            }
            Self::QueuePairAccessError { qp_num } => {
                write!(f, "queue pair {qp_num} received a request that its memory does not permit")
            }
            Self::CommunicationEstablished { qp_num } => {
                write!(f, "the first packet arrived on queue pair {qp_num}")
            }
            Self::SendQueueDrained { qp_num } => write!(f, "queue pair {qp_num} has drained its send queue"),
            Self::PathMigrated { qp_num } => write!(f, "queue pair {qp_num} moved to its alternate path"),
            Self::PathMigrationError { qp_num } => {
                write!(f, "queue pair {qp_num} could not move to its alternate path")
            }
            Self::LastWorkRequestReached { qp_num } => {
                write!(f, "queue pair {qp_num} has taken its last receive from its shared receive queue")
            }
            Self::CompletionQueueError { cq } => write!(f, "completion queue {cq} overran or failed"),
            Self::SharedReceiveQueueError { srq } => write!(f, "shared receive queue {srq} failed"),
            Self::SharedReceiveQueueLimit { srq } => {
                write!(f, "shared receive queue {srq} has fewer receives than its limit")
            }
            Self::WorkQueueFatal { wq } => write!(f, "work queue {wq} failed"),
            Self::PortActive { port } => write!(f, "port {port} is active"),
            Self::PortError { port } => write!(f, "port {port} is down"),
            Self::LidChange { port } => write!(f, "the LID of port {port} changed"),
            Self::PkeyChange { port } => write!(f, "the P_Key table of port {port} changed"),
            Self::GidChange { port } => write!(f, "the GID table of port {port} changed"),
            Self::SubnetManagerChange { port } => {
                write!(f, "another subnet manager took over at port {port}")
            }
            Self::ClientReregister { port } => {
                write!(f, "the subnet manager at port {port} asks to register again")
            }
            Self::Other { event_type } => write!(f, "an event of the unknown type {event_type}"),
            Self::Dropped { count } => write!(f, "{count} events were dropped, because nobody took them"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What libibverbs returns for each type, with objects that have the numbers below.
    #[test]
    fn every_type_is_copied_with_its_object() {
        let (mut qp, mut cq) = (ffi::ibv_qp::default(), ffi::ibv_cq::default());
        let (mut srq, mut wq) = (ffi::ibv_srq::default(), ffi::ibv_wq::default());
        (qp.qp_num, cq.handle, srq.handle, wq.handle) = (17, 3, 4, 5);
        let of = |event_type, element| {
            // SAFETY: the element is that of the type, and its object lives.
            unsafe { AsyncEvent::of(&ffi::ibv_async_event { element, event_type }) }
        };
        type Element = ffi::ibv_async_event__bindgen_ty_1;
        let of_pair = [1, 2, 3, 4, 5, 6, 7, 16].map(|event_type| of(event_type, Element { qp: &mut qp }));
        let qp_num = 17;
        assert_eq!(
            of_pair,
            [
                AsyncEvent::QueuePairFatal { qp_num },
                AsyncEvent::QueuePairRequestError { qp_num },
                AsyncEvent::QueuePairAccessError { qp_num },
                AsyncEvent::CommunicationEstablished { qp_num },
                AsyncEvent::SendQueueDrained { qp_num },
                AsyncEvent::PathMigrated { qp_num },
                AsyncEvent::PathMigrationError { qp_num },
                AsyncEvent::LastWorkRequestReached { qp_num },
            ]
        );
        assert_eq!(of(0, Element { cq: &mut cq }), AsyncEvent::CompletionQueueError { cq: 3 });
        assert_eq!(of(14, Element { srq: &mut srq }), AsyncEvent::SharedReceiveQueueError { srq: 4 });
        assert_eq!(of(15, Element { srq: &mut srq }), AsyncEvent::SharedReceiveQueueLimit { srq: 4 });
        assert_eq!(of(19, Element { wq: &mut wq }), AsyncEvent::WorkQueueFatal { wq: 5 });
        let of_port =
            [8, 9, 10, 11, 12, 13, 17, 18].map(|event_type| of(event_type, Element { port_num: 2 }));
        let port = 2;
        assert_eq!(
            of_port,
            [
                AsyncEvent::DeviceFatal,
                AsyncEvent::PortActive { port },
                AsyncEvent::PortError { port },
                AsyncEvent::LidChange { port },
                AsyncEvent::PkeyChange { port },
                AsyncEvent::SubnetManagerChange { port },
                AsyncEvent::ClientReregister { port },
                AsyncEvent::GidChange { port },
            ]
        );
        assert_eq!(of(77, Element { port_num: 2 }), AsyncEvent::Other { event_type: 77 });
        assert!(of_pair.iter().chain(&of_port).all(|event| !event.to_string().is_empty()));
    }
}
