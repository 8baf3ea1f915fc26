//! A child of `fork` has copies of its parent's handles, and must not deregister the parent's regions.
//!
//! `unsafe` is here for forking a program that has threads.

use std::panic::{self, AssertUnwindSafe};

use dmabuf_rdma::RegionSet;
use dmabuf_rdma::mr::{Access, MemoryRegion, RegionCache};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::common::buffers::heap;
use crate::common::census::{Census, regions};
use crate::common::peers::Peers;
use crate::common::{assert_same, contents, pattern};

/// Forks, gives the child's copy of a value to `action`, and waits for the child. Returns the parent's value;
/// fails if the action panics.
#[track_caller]
pub fn in_a_child<T>(value: T, action: impl FnOnce(T)) -> T {
    // SAFETY: the child allocates, frees and starts threads, which glibc permits after a fork of a program
    // whose other threads hold no lock of the library's. It ends by `_exit`.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // What the test harness captures is lost with the child.
            panic::set_hook(Box::new(|panic| {
                let _ = nix::unistd::write(std::io::stderr(), format!("in the child: {panic}\n").as_bytes());
            }));
            let ended = panic::catch_unwind(AssertUnwindSafe(|| action(value)));
            // SAFETY: the call takes a number and does not return.
            unsafe { libc::_exit(ended.is_err().into()) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0), "the child failed");
            value
        }
    }
}

#[test]
fn a_child_that_drops_its_handles_deregisters_nothing() {
    let census = Census::take();
    {
        let peers = Peers::new();
        let (from, to) = (heap(64 << 10), heap(64 << 10));
        let region = MemoryRegion::builder(&peers.domain, &from).access(Access::REMOTE).register().unwrap();
        let set = RegionSet::builder(&to).access(Access::REMOTE).chunk_size(16 << 10);
        let set = set.register(&peers.domain).unwrap();
        let cache = RegionCache::default();
        let hit = cache.get(&peers.domain, &to, .., Access::REMOTE).unwrap();
        let before = regions();
        let handles = (region, set, hit, cache);
        let (region, set, hit, cache) = in_a_child(handles, |(region, set, hit, cache)| {
            region.deregister().unwrap();
            cache.clear();
            drop((set, hit, cache));
        });
        assert_eq!(regions(), before, "the child deregistered its parent's regions");
        let bytes = pattern(64 << 10, 8);
        from.map().unwrap().write(0, &bytes).unwrap();
        peers.write(&region, hit.region());
        assert_same(&contents(&to), &bytes, "after the fork");
        set.self_check().unwrap();
        assert!(cache.get(&peers.domain, &to, 1..2, Access::REMOTE).is_ok());
        assert_eq!(cache.gauges().hits, 1);
    }
    census.assert_unchanged();
}
