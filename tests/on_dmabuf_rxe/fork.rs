//! A child of `fork` has copies of regions and handles, and leaves what they stand for alone.
//!
//! `unsafe` is here for forking a program with threads: the child drops what it has and exits.

use dmabuf_rdma::RegionSet;
use dmabuf_rdma::mr::{Access, MemoryRegion, RegionCache};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::common::buffers::heap;
use crate::common::census::{Census, regions};
use crate::common::peers::Peers;
use crate::common::{assert_same, contents, pattern};

#[test]
fn a_child_that_drops_everything_takes_nothing_from_its_parent() {
    let census = Census::take();
    {
        let peers = Peers::new();
        let (from, to) = (heap(64 << 10), heap(64 << 10));
        let region = MemoryRegion::builder(&peers.domain, &from).access(Access::REMOTE).register().unwrap();
        let set = RegionSet::builder(&to).access(Access::REMOTE).chunk_size(16 << 10);
        let set = set.register(&peers.domain).unwrap();
        let cache = RegionCache::default();
        let handle = cache.get(&peers.domain, &to, 0, 64 << 10, Access::REMOTE).unwrap();
        let before = regions();
        // SAFETY: the child calls what allocates, frees and makes threads, which glibc permits after a
        // fork of a program whose other threads hold no lock of ours; it ends by _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                // Also a region that it reports on, and one that leaves the cache with its handle.
                let reported = region.deregister().is_ok();
                cache.clear();
                drop((set, handle, cache));
                // SAFETY: takes a number.
                unsafe { libc::_exit(if reported { 0 } else { 1 }) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
        assert_eq!(regions(), before, "the child deregistered what is its parent's");
        let bytes = pattern(64 << 10, 8);
        from.map().unwrap().write(0, &bytes).unwrap();
        peers.write(&region, handle.region());
        assert_same(&contents(&to), &bytes, "after the fork");
        set.self_check().unwrap();
        assert!(cache.get(&peers.domain, &to, 1, 1, Access::REMOTE).is_ok());
        assert_eq!(cache.gauges().hits, 1);
    }
    census.assert_unchanged();
}
