//! The attributes that bring an RC queue pair to its states, as pure functions.

use ibverbs_sys as ffi;

use super::{Endpoint, Fabric, Limits, QueuePairOptions};
use ffi::ibv_qp_attr_mask as Mask;

/// READs and atomics at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Depth {
    /// Those that this side serves for its peer.
    pub responder: u8,
    /// Those that this side keeps in flight.
    pub initiator: u8,
}

impl Depth {
    /// As many as the caller wants and the device can.
    pub(super) fn new(wanted: u8, limits: &Limits) -> Self {
        let Limits { max_rd_atomic, max_init_rd_atomic, .. } = *limits;
        // bnxt_re_modify_qp compares the responder with the initiator's limit; a device that initiates none still
        // serves.
        let of_driver = if max_init_rd_atomic > 0 { max_init_rd_atomic } else { u8::MAX };
        Self {
            responder: wanted.min(max_rd_atomic).min(of_driver),
            initiator: wanted.min(max_init_rd_atomic),
        }
    }
}

/// What a peer may do, as `ibv_access_flags`. The access flags of each region limit it further.
pub(super) fn remote_access(limits: &Limits) -> u32 {
    use ffi::ibv_access_flags as Access;
    let access = Access::IBV_ACCESS_REMOTE_WRITE | Access::IBV_ACCESS_REMOTE_READ;
    match limits.atomics {
        true => (access | Access::IBV_ACCESS_REMOTE_ATOMIC).0,
        // Some drivers refuse the flag if the device has no atomics.
        false => access.0,
    }
}

/// To INIT, with `access` of [`remote_access`].
pub(super) fn init(port: u8, access: u32, pkey_index: u16) -> (ffi::ibv_qp_attr, Mask) {
    let attr = ffi::ibv_qp_attr {
        qp_state: ffi::ibv_qp_state::IBV_QPS_INIT,
        pkey_index,
        port_num: port,
        qp_access_flags: access,
        ..Default::default()
    };
    let mask = Mask::IBV_QP_STATE | Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS;
    (attr, mask)
}

/// To RTR: this side can receive.
pub(super) fn rtr(
    ours: &Endpoint,
    peer: &Endpoint,
    port: u8,
    gid_index: u8,
    fabric: &Fabric,
) -> (ffi::ibv_qp_attr, Mask) {
    let mut attr = ffi::ibv_qp_attr {
        qp_state: ffi::ibv_qp_state::IBV_QPS_RTR,
        // IBV_MTU_256 is 1, IBV_MTU_512 is 2, and so on.
        path_mtu: ours.mtu.min(peer.mtu).ilog2() - 7,
        dest_qp_num: peer.qp_num,
        rq_psn: peer.psn,
        // Not the peer's figure, which is what the peer serves: it keeps as many in flight as we state.
        max_dest_rd_atomic: ours.rd_atomic,
        min_rnr_timer: 12, // 0.64 ms
        ..Default::default()
    };
    attr.ah_attr.port_num = port;
    attr.ah_attr.dlid = peer.lid;
    attr.ah_attr.is_global = 1;
    attr.ah_attr.grh.dgid.raw = peer.gid;
    attr.ah_attr.grh.sgid_index = gid_index;
    attr.ah_attr.grh.hop_limit = 64;
    fabric.apply(&mut attr.ah_attr);
    let mask = Mask::IBV_QP_STATE
        | Mask::IBV_QP_AV
        | Mask::IBV_QP_PATH_MTU
        | Mask::IBV_QP_DEST_QPN
        | Mask::IBV_QP_RQ_PSN
        | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
        | Mask::IBV_QP_MIN_RNR_TIMER;
    (attr, mask)
}

/// To RTS: this side can send, with at most `initiator` READs and atomics in flight.
pub(super) fn rts(psn: u32, options: &QueuePairOptions, initiator: u8) -> (ffi::ibv_qp_attr, Mask) {
    let attr = ffi::ibv_qp_attr {
        qp_state: ffi::ibv_qp_state::IBV_QPS_RTS,
        sq_psn: psn,
        timeout: options.timeout,
        retry_cnt: options.retry_count,
        rnr_retry: options.rnr_retry,
        max_rd_atomic: initiator,
        ..Default::default()
    };
    let mask = Mask::IBV_QP_STATE
        | Mask::IBV_QP_SQ_PSN
        | Mask::IBV_QP_TIMEOUT
        | Mask::IBV_QP_RETRY_CNT
        | Mask::IBV_QP_RNR_RETRY
        | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
    (attr, mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(change: impl FnOnce(&mut ffi::ibv_device_attr)) -> Limits {
        let mut attr = ffi::ibv_device_attr {
            max_qp_rd_atom: 16,
            max_qp_init_rd_atom: 16,
            max_sge: 30,
            max_sge_rd: 30,
            atomic_cap: ffi::IBV_ATOMIC_HCA,
            ..Default::default()
        };
        change(&mut attr);
        Limits::of(&attr)
    }

    #[test]
    fn remote_atomics_are_permitted_only_on_a_device_that_has_them() {
        const READ_AND_WRITE: u32 = 1 << 1 | 1 << 2;
        let access = |cap| remote_access(&limits(|attr| attr.atomic_cap = cap));
        assert_eq!(access(ffi::IBV_ATOMIC_NONE), READ_AND_WRITE);
        assert_eq!(access(ffi::IBV_ATOMIC_HCA), READ_AND_WRITE | 1 << 3);
        assert_eq!(access(ffi::IBV_ATOMIC_GLOB), READ_AND_WRITE | 1 << 3);
        let (attr, mask) = init(2, READ_AND_WRITE, 5);
        assert_eq!((attr.qp_access_flags, attr.port_num, attr.pkey_index), (READ_AND_WRITE, 2, 5));
        assert_eq!(mask.0, 1 | 1 << 3 | 1 << 4 | 1 << 5, "STATE, ACCESS_FLAGS, PKEY_INDEX, PORT");
    }

    #[test]
    fn each_direction_of_reads_has_its_own_limit() {
        let depth = |responder, initiator, wanted| {
            let limits = limits(|attr| {
                (attr.max_qp_rd_atom, attr.max_qp_init_rd_atom) = (responder, initiator);
            });
            let Depth { responder, initiator } = Depth::new(wanted, &limits);
            (responder, initiator)
        };
        assert_eq!(depth(1, 16, 16), (1, 16));
        // A driver may compare the responder with either limit.
        assert_eq!(depth(16, 4, 16), (4, 4));
        assert_eq!(depth(16, 0, 16), (16, 0));
        assert_eq!(depth(128, 4, 2), (2, 2));
        assert_eq!(depth(0, -1, 255), (0, 0));
        assert_eq!(depth(i32::MAX, 300, 255), (255, 255));
    }

    /// Of both ends: what one keeps in flight, the other serves.
    #[test]
    fn an_initiator_never_exceeds_its_responder() {
        let options = QueuePairOptions::default();
        let end = |responder| Endpoint { rd_atomic: responder, ..endpoint() };
        for (ours, theirs) in [((16, 1), (16, 16)), ((1, 16), (16, 16)), ((16, 16), (0, 16))] {
            let served = rtr(&end(ours.0), &end(theirs.0), 1, 0, &Fabric::default()).0.max_dest_rd_atomic;
            let theirs_in_flight = theirs.1.min(ours.0);
            assert!(theirs_in_flight <= served, "{ours:?} {theirs:?}");
            let in_flight = rts(7, &options, ours.1.min(theirs.0)).0.max_rd_atomic;
            assert!(in_flight <= theirs.0 && in_flight <= ours.1, "{ours:?} {theirs:?}");
        }
    }

    #[test]
    fn connecting_sets_what_the_masks_name() {
        let (ours, peer) = (endpoint(), Endpoint { qp_num: 99, psn: 5, mtu: 1024, lid: 3, ..endpoint() });
        let (attr, mask) = rtr(&ours, &peer, 2, 7, &Fabric::default());
        assert_eq!((attr.qp_state, attr.dest_qp_num, attr.rq_psn, attr.path_mtu), (2, 99, 5, 3));
        let ah = attr.ah_attr;
        assert_eq!((ah.port_num, ah.dlid, ah.grh.sgid_index), (2, 3, 7));
        assert_eq!(mask.0, 1 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20);
        let (attr, mask) = rts(11, &QueuePairOptions::default().timeout(9), 4);
        assert_eq!((attr.qp_state, attr.sq_psn, attr.timeout, attr.max_rd_atomic), (3, 11, 9, 4));
        assert_eq!(mask.0, 1 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16);
    }

    fn endpoint() -> Endpoint {
        Endpoint {
            qp_num: 17,
            psn: 1,
            lid: 0,
            gid: [1; 16],
            mtu: 4096,
            rd_atomic: 16,
            roce_version: 2,
            message_qp_num: 0,
        }
    }

    #[test]
    fn reads_have_the_elements_that_the_device_states() {
        let elements = |most, of_read| {
            let limits = limits(|attr| (attr.max_sge, attr.max_sge_rd) = (most, of_read));
            (limits.max_sge, limits.max_sge_read)
        };
        assert_eq!(elements(30, 1), (30, 1));
        assert_eq!(elements(4, 32), (4, 4));
        // Some drivers leave it out.
        assert_eq!(elements(6, 0), (6, 6));
    }
}
