//! What a transfer and a block cost natively, against a provider that does nothing but count: `cargo xtask bench post`.
//!
//! The peer is the same work posted by hand: chains of 32 requests in an array that is reused, at most 128 in flight,
//! the last of each chain signaled.

use std::hint::black_box;
use std::time::Instant;

use super::*;
use crate::tests::common::{Pair, Peer, Result, Rows, Spread, pairs, stay_on_one_processor};

const PAIRS: usize = 201;
const BLOCKS: usize = 4096;
const BLOCK: u64 = 4096;

/// Posts the blocks by hand, and polls for the completions.
fn by_hand(pair: *mut ffi::ibv_qp, queue: *mut ffi::ibv_cq, pages: &[(u64, u64)], next: &mut u64) {
    let mut requests = [ffi::ibv_send_wr::default(); 32];
    let mut elements = [ffi::ibv_sge::default(); 32];
    let (mut in_flight, mut completions) = (0, [ffi::ibv_wc::default(); 16]);
    for chain in pages.chunks(32) {
        for (at, (local, remote)) in chain.iter().enumerate() {
            elements[at] = ffi::ibv_sge { addr: *local, length: BLOCK as u32, lkey: 7 };
            let request = &mut requests[at];
            (request.wr_id, request.num_sge, request.send_flags) = (*next, 1, 0);
            request.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE;
            request.sg_list = &mut elements[at];
            request.wr.rdma.remote_addr = *remote;
            request.wr.rdma.rkey = 9;
            *next += 1;
        }
        let last = chain.len() - 1;
        requests[last].send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        let first = requests.as_mut_ptr();
        for at in 0..last {
            // SAFETY: both are in the array.
            unsafe { (*first.add(at)).next = first.add(at + 1) };
        }
        requests[last].next = std::ptr::null_mut();
        // SAFETY: the provider is ours, and the chain is valid.
        unsafe { rdma_sys_ext::verbs::post_send(pair, first, &mut std::ptr::null_mut()) };
        in_flight += chain.len();
        while in_flight > 96 {
            // SAFETY: the provider is ours, and there is room for 16.
            let taken = unsafe { rdma_sys_ext::verbs::poll_cq(queue, 16, completions.as_mut_ptr()) };
            in_flight -= taken as usize * 32;
        }
    }
    while in_flight > 0 {
        // SAFETY: as above.
        let taken = unsafe { rdma_sys_ext::verbs::poll_cq(queue, 16, completions.as_mut_ptr()) };
        in_flight -= taken as usize * 32;
    }
}

#[test]
#[ignore = "a benchmark: cargo xtask bench post"]
fn post() -> Result<()> {
    stay_on_one_processor()?;
    let domain = domain();
    let (library, _) = connection(&domain, options().window(128).chain(32));
    let (hand, _) = connection(&domain, options().window(128).chain(32));
    let length = BLOCKS as u64 * BLOCK;
    let region = fake::region_of(&domain, crate::dmabuf::BufferId::UNKNOWN, 0..length, Access::REMOTE);
    // A permutation on each side, so that nothing merges.
    let order = |factor: usize| (0..BLOCKS).map(move |at| at * factor % BLOCKS);
    let table = region.slice(..)?.strided(BLOCK, BLOCK, BLOCKS)?;
    let remote = RemoteSlice::from(region.remote()).strided(BLOCK, BLOCK, BLOCKS)?;
    let (from, to) = (table.select(order(1027))?, remote.select(order(2053))?);
    let pages: Vec<_> =
        order(1027).zip(order(2053)).map(|(a, b)| (a as u64 * BLOCK, b as u64 * BLOCK)).collect();
    let (pair, queue) = (hand.shared().pair.as_raw().as_ptr(), hand.engine().completions.as_raw().as_ptr());
    let mut next = 0;
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        Ok(start.elapsed().as_nanos() as f64)
    };
    let mut rows = Rows::new()?;
    let each = |turns: Vec<Pair>, count: usize| -> Vec<Pair> {
        let part = |value: f64| value / count as f64;
        turns.into_iter().map(|turn| Pair { library: part(turn.library), bare: part(turn.bare) }).collect()
    };
    let turns = pairs(
        PAIRS,
        || time(&mut || drop(black_box(write(&library, &from, &to).wait()))),
        || time(&mut || by_hand(pair, queue, &pages, &mut next)),
    )?;
    let turns = each(turns, BLOCKS);
    let of = |turns: &[Pair]| Spread::of(turns.iter().map(|turn| turn.library));
    rows.add("a block", "ns", of(&turns), Some(Peer::of(&turns)), Some("value <= 60"))?;

    // One transfer of one block, from the call to its result.
    let (local, place) = (region.slice(..8)?, region.remote().slice(8..16)?);
    let one = [(0, 8)];
    let turns = pairs(
        PAIRS,
        || time(&mut || (0..100).for_each(|_| drop(black_box(write(&library, &local, &place).wait())))),
        || time(&mut || (0..100).for_each(|_| by_hand_one(pair, queue, one[0], &mut next))),
    )?;
    let turns = each(turns, 100);
    rows.add("a transfer of 8 bytes", "ns", of(&turns), Some(Peer::of(&turns)), None)?;

    let slice = region.slice(..)?;
    let turns = pairs(
        PAIRS,
        || time(&mut || drop(black_box(slice.strided(64, 64, 100_000)))),
        || time(&mut || drop(black_box(order(3).collect::<Vec<_>>()))),
    )?;
    rows.add("a strided table of 100,000 blocks", "ns", of(&turns), None, Some("value <= 1000000"))
}

/// One request and its completion.
fn by_hand_one(pair: *mut ffi::ibv_qp, queue: *mut ffi::ibv_cq, (local, remote): (u64, u64), next: &mut u64) {
    let mut element = ffi::ibv_sge { addr: local, length: 8, lkey: 7 };
    let mut request = ffi::ibv_send_wr {
        wr_id: *next,
        sg_list: &mut element,
        num_sge: 1,
        opcode: ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE,
        send_flags: ffi::ibv_send_flags::IBV_SEND_SIGNALED.0,
        ..Default::default()
    };
    request.wr.rdma.remote_addr = remote;
    request.wr.rdma.rkey = 9;
    *next += 1;
    let mut completion = ffi::ibv_wc::default();
    // SAFETY: the provider is ours, the request is valid, and there is room for one completion.
    unsafe {
        rdma_sys_ext::verbs::post_send(pair, &mut request, &mut std::ptr::null_mut());
        while rdma_sys_ext::verbs::poll_cq(queue, 1, &mut completion) == 0 {}
    }
}
