//! Allocations beyond the machine's memory or the cgroup's limit. Without a check the kernel kills this program.

use std::fs;

use dmabuf_rdma::exporter::{Error, Exporter, PageKind, Udmabuf};

use crate::assert_refused;
use crate::common::buffers::{heap, memfd, udmabuf};
use crate::common::cgroup::Cgroup;

#[test]
fn a_udmabuf_keeps_to_the_limit_of_its_cgroup() {
    let device = Udmabuf::open().unwrap();
    let _cgroup = Cgroup::new(64 << 20);
    drop(udmabuf(PageKind::Base, 16 << 20));
    let refused = device.allocate(96 << 20);
    let message = assert_refused!(
        refused,
        Error::OutOfMemory { requested, available: Some(left), limit: Some(_), .. }
            if *requested == 96 << 20 && *left <= 64 << 20
    );
    assert!(message.contains("are left by /sys/fs/cgroup/limited/memory.max"), "{message}");
    // The kernel allocates the pages of a memfd that nobody has written yet.
    let refused = device.from_memfds([(memfd(96 << 20), 0..96 << 20)]);
    assert_refused!(refused, Error::OutOfMemory { limit: Some(_), .. });
    // A heap's memory is charged to no cgroup.
    assert_eq!(heap(96 << 20).size(), 96 << 20);
}

#[test]
fn a_udmabuf_keeps_to_the_memory_of_the_machine() {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total: u64 = total.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    let size = (total << 10).next_multiple_of(1 << 20);
    for pages in [PageKind::Base, PageKind::Transparent] {
        let refused = Udmabuf::open().unwrap().with_pages(pages).allocate(size);
        let message = assert_refused!(refused, Error::OutOfMemory { limit: None, available: Some(_), .. });
        assert!(message.starts_with("udmabuf"), "{message}");
    }
    let refused = Udmabuf::open().unwrap().from_memfds([(memfd(size), 0..size)]);
    assert_refused!(refused, Error::OutOfMemory { limit: None, .. });
}
