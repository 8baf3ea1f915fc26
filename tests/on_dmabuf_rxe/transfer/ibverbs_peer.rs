//! A peer written with the crate `ibverbs`. It shares only the C library with this one.

use std::time::{Duration, Instant};

use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::Endpoint;

use crate::common::wire::End;
use crate::common::{assert_same, contents, pattern};

const SIZE: usize = 256 << 10;
/// Index of the IPv4 address's GID on the wire's devices.
const GID: u32 = 1;
/// `IBV_MTU_4096`.
const MTU_4096: u32 = 5;

#[test]
fn sends_go_to_and_from_a_dma_buf() {
    // The other crate posts one message.
    let options = ConnectionOptions::default().message_size(SIZE as u64);
    let ours = End::new("rxe0", options);
    let (buffer, region) = ours.filled(SIZE as u64, 1);
    let endpoint = ours.connection.endpoint();

    let devices = ibverbs::devices().unwrap();
    let device = devices.iter().find(|device| device.name() == Some(c"rxe1")).expect("rxe1");
    let context = device.open().unwrap();
    let queue = context.create_cq(16, 0).unwrap();
    let domain = context.alloc_pd().unwrap();
    let mut builder = domain.create_qp(&queue, &queue, ibverbs::ibv_qp_type::IBV_QPT_RC);
    builder.set_gid_index(GID).set_path_mtu(MTU_4096).set_rq_psn(endpoint.psn);
    let prepared = builder.build().unwrap();
    let theirs = prepared.endpoint();
    let gid: ibverbs_sys::ibv_gid = theirs.gid.expect("a GID").into();
    // SAFETY: any 16 bytes are valid for `raw`.
    let gid = unsafe { gid.raw };
    let (qp_num, lid) = (theirs.num, theirs.lid);
    let peer =
        Endpoint { qp_num, psn: 0, lid, gid, mtu: 4096, rd_atomic: 1, roce_version: 0, message_qp_num: 0 };
    ours.connection.connect(&peer).unwrap();
    let endpoint = ibverbs::QueuePairEndpoint {
        num: endpoint.qp_num,
        lid: endpoint.lid,
        gid: Some(ibverbs_sys::ibv_gid { raw: endpoint.gid }.into()),
    };
    let mut pair = prepared.handshake(endpoint).unwrap();
    let mut memory = domain.allocate::<u8>(SIZE).unwrap();

    // From the peer to the dma-buf.
    let sent = pattern(SIZE, 2);
    memory.copy_from_slice(&sent);
    let receiving = ours.connection.recv(&region).unwrap();
    // SAFETY: the memory lives until the completion, and nothing touches it before.
    unsafe { pair.post_send(&mut memory, .., 1).unwrap() };
    receiving.wait().unwrap();
    completed(&queue, 1);
    assert_same(&contents(&buffer), &sent, "sent by the peer");

    // From the dma-buf to the peer.
    let sent = pattern(SIZE, 3);
    buffer.map().unwrap().write(0, &sent).unwrap();
    // SAFETY: as above.
    unsafe { pair.post_receive(&mut memory, .., 2).unwrap() };
    ours.connection.send(&region).unwrap().wait().unwrap();
    completed(&queue, 2);
    assert_same(&memory[..], &sent, "received by the peer");
}

/// Waits until this request has completed with success.
fn completed(queue: &ibverbs::CompletionQueue<'_>, wr_id: u64) {
    let end = Instant::now() + Duration::from_secs(20);
    let mut completions = [ibverbs::ibv_wc::default(); 4];
    loop {
        if let [one] = queue.poll(&mut completions).unwrap() {
            assert!(one.is_valid(), "{:?}", one.error());
            assert_eq!(one.wr_id(), wr_id);
            return;
        }
        assert!(Instant::now() < end, "no completion of {wr_id}");
    }
}
