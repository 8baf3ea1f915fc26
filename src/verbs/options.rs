//! Options of a queue pair.

use std::net::IpAddr;

/// Options of a queue pair. The defaults suit one stream of large messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueuePairOptions {
    /// Port of the device, from 1. Default 1.
    pub port: u8,
    /// Index of the port's GID. Default `None`: [`Context::best_gid`](super::Context::best_gid) chooses, before
    /// the peer is known. [`Context::gids`](super::Context::gids) lists the GIDs, and
    /// [`Context::gid_for`](super::Context::gid_for) chooses one towards the peer's address. Connections by IP
    /// address ([`cm`](crate::cm)) take the GID of their route instead.
    pub gid_index: Option<u8>,
    /// The port's GID by its IP address, or by the GID itself in the form of an IPv6 address. With `gid_index` both
    /// must name the same. Default `None`.
    pub gid_address: Option<IpAddr>,
    /// The partition: a P_Key of the port's table ([`Context::pkeys`](super::Context::pkeys)). Without an equal one, the
    /// entry of the same partition with the other membership. Default `None`: `pkey_index`, or the entry at index 0.
    /// Connections by IP address take that of their route, and refuse another.
    pub pkey: Option<u16>,
    /// Index in the port's P_Key table. With `pkey` both must name the same. Default `None`.
    pub pkey_index: Option<u16>,
    /// Service level of InfiniBand, 0 to 15. Default `None`: that of the route, or 0.
    pub service_level: Option<u8>,
    /// Traffic class: on RoCE v2 the DS field of the IP header, DSCP × 4 + ECN. An administrator's setting of the
    /// device may replace it (`/sys/class/infiniband/*/tc` of mlx5). Default `None`: that of the route, or 0.
    pub traffic_class: Option<u8>,
    /// Flow label, 20 bits, by which switches and the device spread flows over paths. On RoCE v2 the UDP source port
    /// derives from it (`rdma_get_udp_sport` in `include/rdma/ib_verbs.h`). Default `None`: the device chooses.
    pub flow_label: Option<u32>,
    /// Hop limit, 1 to 255. On RoCE the kernel replaces it with that of the IP route (`ip route … hoplimit N`;
    /// `ib_resolve_unicast_gid_dmac` in `drivers/infiniband/core/verbs.c`). Default `None`: that of the route, or 64.
    pub hop_limit: Option<u8>,
    /// Static rate: the most that this queue pair sends, in Mbit/s. A value of `ibv_rate_to_mbps(3)` up to the
    /// port's rate; a device without a limiter ignores it, as soft-RoCE does. Default `None`: the port's.
    pub static_rate: Option<u32>,
    /// Maximum number of bytes that a work request carries [inline](super::WorkRequest::inline). A device has a
    /// limit, and may permit more than asked for. Default 0.
    pub max_inline: u32,
    /// Maximum number of work requests in flight. Default 128.
    pub send_depth: u32,
    /// Maximum number of posted receives. Default 128.
    pub recv_depth: u32,
    /// Maximum number of scatter/gather elements in a work request. A device may take fewer in a READ
    /// ([`Limits::max_sge_read`](super::Limits::max_sge_read)). Default 4.
    pub max_sge: u32,
    /// Maximum number of READs and atomics in flight, and of those served for the peer. Each is limited to the
    /// device's maximum. With 0 on either side, READs and atomics are refused. Default 16.
    pub rd_atomic: u8,
    /// Time to wait for an acknowledgement, as an exponent from 0 to 31: 4.096 µs × 2^`timeout`. 0 waits without
    /// limit. A device may wait up to four times as long. Default 17 (537 ms).
    pub timeout: u8,
    /// Retries after such a timeout, 0 to 7. With the defaults a request to a dead peer fails after 7 timeouts, 3.8 s,
    /// and after at most 15 s on a device that waits longer. soft-RoCE retries without limit at 7, and would never
    /// notice a dead peer. Default 6.
    pub retry_count: u8,
    /// Retries while the peer has no receive posted, 0 to 6; 7 retries without limit. Default 7.
    pub rnr_retry: u8,
}

impl Default for QueuePairOptions {
    fn default() -> Self {
        Self {
            port: 1,
            gid_index: None,
            gid_address: None,
            pkey: None,
            pkey_index: None,
            service_level: None,
            traffic_class: None,
            flow_label: None,
            hop_limit: None,
            static_rate: None,
            max_inline: 0,
            send_depth: 128,
            recv_depth: 128,
            max_sge: 4,
            rd_atomic: 16,
            // Long enough for a peer that serves 16 others on a loaded machine.
            timeout: 17,
            retry_count: 6,
            rnr_retry: 7,
        }
    }
}

setters!(QueuePairOptions {
    port: u8,
    gid_index: Option<u8>,
    gid_address: Option<IpAddr>,
    pkey: Option<u16>,
    pkey_index: Option<u16>,
    service_level: Option<u8>,
    traffic_class: Option<u8>,
    flow_label: Option<u32>,
    hop_limit: Option<u8>,
    static_rate: Option<u32>,
    max_inline: u32,
    send_depth: u32,
    recv_depth: u32,
    max_sge: u32,
    rd_atomic: u8,
    timeout: u8,
    retry_count: u8,
    rnr_retry: u8,
});
