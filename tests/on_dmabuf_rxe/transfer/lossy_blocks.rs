//! Thousands of blocks, many queued transfers and their notifications on a wire with faults, and with a peer that goes.

use std::time::Duration;

use dmabuf_rdma::mr::{RegionSlice, RemoteSlice};
use dmabuf_rdma::transfer::{ConnectionOptions, Error, Transfer};

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::wire::{Fault, Wire, counted};
use crate::common::{contents, pattern};

const BLOCK: u64 = 1024;
/// Blocks of a transfer, and transfers in flight at once.
const BLOCKS: usize = 200;
const TRANSFERS: usize = 15;
const ALL: usize = BLOCKS * TRANSFERS;
const TIMEOUT: Duration = Duration::from_secs(120);

fn options() -> ConnectionOptions {
    let mut options = ConnectionOptions::default().window(64).notifications(64);
    options.queue_pair.timeout = 12; // 17 ms
    options.stall_timeout(Duration::from_secs(60))
}

/// Where a block of a transfer goes: a permutation in which no two neighbours adjoin.
fn place(block: usize) -> usize {
    block * 1009 % ALL
}

/// Starts all transfers at once. Each notifies with its number.
fn start(near: &dmabuf_rdma::Connection, source: &RegionSlice, target: &RemoteSlice) -> Vec<Transfer> {
    let ours = source.strided(BLOCK, BLOCK, ALL).unwrap();
    let theirs = target.strided(BLOCK, BLOCK, ALL).unwrap();
    let each = |at: usize| {
        let blocks = at * BLOCKS..(at + 1) * BLOCKS;
        let to = theirs.select(blocks.clone().map(place)).unwrap();
        near.write_notify(ours.select(blocks).unwrap(), to, at as u32).unwrap()
    };
    (0..TRANSFERS).map(each).collect()
}

/// Every block of a transfer is there when its notification comes, and each notification comes once and in order.
#[track_caller]
fn blocks_arrive_before_their_notification(fault: &str, noticed: &str) {
    let before = counted(noticed);
    let Wire { near, far } = Wire::with(options());
    let size = ALL as u64 * BLOCK;
    let ((_ours, source), (theirs, target)) = (near.filled(size, 1), far.filled(size, 2));
    let sent = pattern(size as usize, 1);
    let block = |bytes: &[u8], at: usize| bytes[at * BLOCK as usize..][..BLOCK as usize].to_vec();
    let fault = Fault::new(fault);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let transfers = start(&near.connection, &(&source).into(), &target.remote().into());
            for transfer in &transfers {
                assert_eq!(transfer.wait().unwrap().bytes, BLOCKS as u64 * BLOCK);
            }
        });
        for at in 0..TRANSFERS {
            assert_eq!(far.connection.notifications().take_timeout(TIMEOUT).unwrap().id, at as u32);
            let received = contents(&theirs);
            for moved in at * BLOCKS..(at + 1) * BLOCKS {
                assert!(block(&received, place(moved)) == block(&sent, moved), "block {moved} of {at}");
            }
        }
    });
    assert_eq!(far.connection.notifications().try_take().unwrap(), None, "none comes twice");
    drop(fault);
    assert!(counted(noticed) > before, "{noticed} stayed {before}");
}

#[test]
fn blocks_under_loss_of_one_in_a_hundred() {
    blocks_arrive_before_their_notification("loss 1%", "out_of_seq_request");
}

#[test]
fn blocks_under_loss_of_one_in_twenty() {
    blocks_arrive_before_their_notification("loss 5%", "out_of_seq_request");
}

#[test]
fn blocks_that_are_reordered() {
    blocks_arrive_before_their_notification("delay 1ms reorder 75% 50%", "out_of_seq_request");
}

#[test]
fn blocks_that_are_duplicated() {
    blocks_arrive_before_their_notification("duplicate 10%", "duplicate_request");
}

/// The peer goes while all are queued: each transfer says what it moved, and what was notified is there.
#[test]
fn a_peer_that_goes_leaves_whole_transfers_or_named_errors() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::with(options());
        let size = ALL as u64 * BLOCK;
        let ((_ours, source), (theirs, target)) = (near.filled(size, 1), far.filled(size, 2));
        let transfers = start(&near.connection, &(&source).into(), &target.remote().into());
        transfers[1].wait().unwrap();
        let first = far.connection.notifications().take_timeout(TIMEOUT).unwrap();
        assert_eq!(first.id, 0);
        drop(far.connection);
        let (mut failed, mut complete) = (0, 0);
        for transfer in &transfers {
            match transfer.wait() {
                Ok(done) => {
                    assert_eq!((done.bytes, failed), (BLOCKS as u64 * BLOCK, 0), "in order");
                    complete += 1;
                }
                Err(Error::Failed { done, .. } | Error::Unusable { done, .. }) => {
                    assert!(done % BLOCK == 0 && done < BLOCKS as u64 * BLOCK, "{done}");
                    failed += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        assert!(complete >= 2 && failed > 0, "{complete} complete, {failed} failed");
        let (received, sent) = (contents(&theirs), pattern(size as usize, 1));
        for moved in 0..complete * BLOCKS {
            let at = |block: usize| block * BLOCK as usize..(block + 1) * BLOCK as usize;
            assert!(received[at(place(moved))] == sent[at(moved)], "block {moved}");
        }
        assert_refused!(near.connection.notify(1, &[]), Error::Unusable { .. });
    }
    census.assert_unchanged();
}

/// One bad block among a million is refused before anything is posted.
#[test]
fn one_bad_block_in_a_million() {
    let Wire { near, far } = Wire::new();
    let ((_ours, source), (theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let offsets = |bad: u64| (0..1_000_000_u64).map(move |at| if at == 765_432 { bad } else { at });
    let remote = RemoteSlice::from(target.remote());
    let error = remote.blocks(8, offsets((1 << 20) - 7)).unwrap_err().to_string();
    assert!(error.contains("765432"), "{error}");
    let ours = RegionSlice::from(&source).blocks(8, offsets(0)).unwrap();
    let error = ours.select((0..1_000_000).map(|at| if at == 9 { 1_000_000 } else { at })).unwrap_err();
    assert!(error.to_string().contains("1000000"), "{error}");
    assert!(contents(&theirs) == pattern(1 << 20, 2), "nothing moved");
    assert!(near.connection.is_usable());
}
