//! Region sets: coverage, bytes, rollback, several devices.

use std::sync::Mutex;

use dma_sg::RangeError;
use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{Access, Buffer, DeregisterError, RegionSlice, RegisterError, SetError};
use dmabuf_rdma::verbs::{Device, Operation, ProtectionDomain};
use dmabuf_rdma::{DmaBuf, Iova, RegionSet, dmabuf};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap, udmabuf};
use crate::common::census::{Census, dma_bufs, fds, regions};
use crate::common::faults::{Command, Fault};
use crate::common::link::Link;
use crate::common::peers::{Peers, domain, import_path};
use crate::common::{assert_same, contents, pattern};

const CHUNK: u64 = 256 << 10;

/// Writes all of a set to the same offsets of another one, one element of one run at a time.
#[track_caller]
fn write(peers: &Peers, from: &RegionSet, to: &RegionSet) {
    let (remote, mut at) = (to.remote(), 0);
    for run in remote.runs() {
        for element in from.slice(at..at + run.length).unwrap().sges() {
            let end = at + u64::from(element.len());
            let place = remote.slice(at..end).unwrap().addr().unwrap();
            peers.ours.succeed(Operation::Write { remote: place }, &[element]);
            at = end;
        }
    }
    assert_eq!(at, from.len());
}

/// Checks that the chunks cover the set without a gap.
#[track_caller]
fn assert_covered(set: &RegionSet) {
    let mut at = 0;
    for chunk in set.chunks() {
        assert_eq!(chunk.iova(), Iova(set.iova().0 + at));
        for offset in [at, at + chunk.len() - 1] {
            let byte = set.slice(offset..=offset).unwrap();
            assert_eq!((byte.region().rkey(), byte.iova()), (chunk.rkey(), Iova(set.iova().0 + offset)));
        }
        at += chunk.len();
    }
    let in_elements: u64 = RegionSlice::from(set).sges().iter().map(|sge| u64::from(sge.len())).sum();
    assert_eq!((at, in_elements, set.remote().len()), (set.len(), set.len(), set.len()));
    assert_refused!(set.slice(at..=at), RangeError::OutOfRange { .. });
}

#[test]
fn every_byte_of_every_exporter_moves_in_chunks() {
    let census = Census::take();
    {
        let peers = Peers::new();
        let kinds = every_kind();
        for kind in &kinds {
            let subject = (kind.allocate)(2 << 20).dmabuf;
            let source = heap(subject.size());
            let bytes = pattern(subject.size() as usize, 3);
            source.map().unwrap().write(0, &bytes).unwrap();
            let set = RegionSet::builder(&subject).access(Access::REMOTE).chunk_size(CHUNK);
            let set = set.register(&peers.domain).unwrap();
            assert_eq!((set.chunks().len() as u64, set.path()), (set.len() / CHUNK, import_path()));
            assert_covered(&set);
            // The chunks of the two sets end at different offsets.
            let from = RegionSet::builder(&source).chunk_size(3 * CHUNK).register(&peers.domain).unwrap();
            write(&peers, &from, &set);
            assert_same(&contents(&subject), &bytes, kind.name);
            from.deregister().unwrap();
            set.deregister().unwrap();
        }
    }
    census.assert_unchanged();
}

#[test]
fn a_set_without_a_chunk_size_is_one_region() {
    let (domain, buffer) = (domain(), heap(4 << 20));
    let before = regions();
    let set = RegionSet::builder(&buffer).register(&domain).unwrap();
    assert_eq!((set.chunks().len(), regions()), (1, before + 1));
    assert_covered(&set);
}

#[test]
fn an_odd_range_with_its_own_iova() {
    let peers = Peers::new();
    let buffer = heap(2 << 20);
    let before = pattern(2 << 20, 5);
    buffer.map().unwrap().write(0, &before).unwrap();
    let (offset, length, iova) = (0x1a37, 1_200_001, Iova(0x7f00_dead_0000_0a37));
    let set = RegionSet::builder(&buffer).range(offset..offset + length).iova(iova).access(Access::REMOTE);
    let set = set.chunk_size(CHUNK).register(&peers.domain).unwrap();
    assert_eq!((set.len(), set.iova()), (length, iova));
    assert_covered(&set);
    let source = heap(2 << 20);
    let sent = pattern(length as usize, 6);
    source.map().unwrap().write(0, &sent).unwrap();
    let from = RegionSet::builder(&source).range(..length).register(&peers.domain).unwrap();
    write(&peers, &from, &set);
    let mut expected = before;
    expected[offset as usize..][..length as usize].copy_from_slice(&sent);
    assert_same(&contents(&buffer), &expected, "an odd range in chunks");
}

#[test]
fn several_buffers_form_one_set() {
    let census = Census::take();
    {
        let peers = Peers::new();
        let buffers = [heap(64 << 10), udmabuf(PageKind::Base, 128 << 10).dmabuf, heap(4096)];
        let total: u64 = buffers.iter().map(DmaBuf::size).sum();
        let range = 100..total - 100;
        let set = RegionSet::of_buffers(&buffers).range(range.clone()).access(Access::REMOTE);
        let set = set.register(&peers.domain).unwrap();
        assert_eq!(set.chunks().len(), 3);
        assert_covered(&set);
        let source = heap(total);
        let sent = pattern(total as usize, 9);
        source.map().unwrap().write(0, &sent).unwrap();
        let from = RegionSet::builder(&source).range(range.clone()).register(&peers.domain).unwrap();
        write(&peers, &from, &set);
        let seen: Vec<u8> = buffers.iter().flat_map(contents).collect();
        let (start, end) = (range.start as usize, range.end as usize);
        assert_same(&seen[start..end], &sent[start..end], "three buffers");
        assert!(seen[..start].iter().chain(&seen[end..]).all(|byte| *byte == 0), "outside the range");
    }
    census.assert_unchanged();
}

#[test]
fn invalid_sets_are_refused() {
    let (domain, buffer) = (domain(), heap(1 << 20));
    for size in [0, 4097, u64::MAX] {
        let refused = RegionSet::builder(&buffer).chunk_size(size).register(&domain);
        let message = assert_refused!(refused, SetError::ChunkSize { page_size: 4096, .. });
        assert!(message.contains("choose a multiple of the page size of 4096"), "{message}");
    }
    let no_buffer = RegionSet::of_buffers([] as [Buffer<'_>; 0]).register(&domain);
    assert_refused!(no_buffer, SetError::NothingToRegister { what: "buffer" });
    let no_domain = RegionSet::builder(&buffer).register_on(&[]);
    assert_refused!(no_domain, SetError::NothingToRegister { what: "protection domain" });
    let builder = || RegionSet::builder(&buffer);
    for range in [1..(1 << 20) + 1, 1 << 20..(1 << 20) + 1] {
        assert_refused!(
            builder().range(range).register(&domain),
            SetError::Register(RegisterError::Range(RangeError::OutOfRange { .. }))
        );
    }
    assert_refused!(
        builder().range(5..5).register(&domain),
        SetError::Register(RegisterError::Range(RangeError::Empty { offset: 5 }))
    );
    assert_refused!(
        builder().iova(Iova(!0xfff)).register(&domain),
        SetError::Register(RegisterError::IovaOverflow { .. })
    );
    assert_refused!(
        builder().iova(Iova(1)).register(&domain),
        SetError::Register(RegisterError::IovaNotCongruent { .. })
    );
    assert_refused!(
        builder().access(Access::REMOTE_WRITE).register(&domain),
        SetError::Register(RegisterError::LocalWriteMissing { .. })
    );
}

#[test]
fn any_refused_chunk_leaves_nothing_registered() {
    let (domain, buffer) = (domain(), heap(2 << 20));
    let (census, open) = (Census::take(), fds());
    for threads in [1, 2] {
        for own_descriptors in [false, true] {
            let chunks = if own_descriptors { vec![0, 4, 7] } else { vec![0, 1, 2, 3, 4, 5, 6, 7] };
            for kth in chunks {
                let fault = Fault::at(Command::Register, kth, libc::EDQUOT);
                let builder = RegionSet::builder(&buffer).chunk_size(CHUNK).threads(threads);
                let builder = if own_descriptors { builder.own_descriptors() } else { builder };
                let refused = builder.register(&domain);
                assert!(fault.happened());
                drop(fault);
                let Err(SetError::Chunk { chunk, chunks, offset, length, source, .. }) = &refused else {
                    panic!("expected Chunk, got {refused:?}");
                };
                assert!(matches!(**source, RegisterError::Refused { .. }), "{source:?}");
                // With one thread, call k registers chunk k.
                assert!(threads > 1 || *chunk == kth, "{chunk}, not {kth}");
                assert_eq!((*chunks, *offset, *length), (8, *chunk as u64 * CHUNK, CHUNK));
                assert_eq!(refused.unwrap_err().errno(), Some(libc::EDQUOT));
                assert_eq!(fds(), open, "descriptors after chunk {kth} of {threads} threads");
            }
            census.assert_unchanged();
        }
    }
}

#[test]
fn a_region_too_long_for_the_device_is_cut() {
    let (domain, buffer) = (domain(), heap((1 << 30) + 4096));
    for errno in [libc::ENOMEM, libc::EINVAL] {
        let fault = Fault::at(Command::Register, 0, errno);
        let set = RegionSet::builder(&buffer).register(&domain).unwrap();
        assert!(fault.happened());
        let lengths: Vec<u64> = set.chunks().iter().map(|chunk| chunk.len()).collect();
        assert_eq!(lengths, [1 << 30, 4096]);
        assert_covered(&set);
    }
    // An error that has nothing to do with the length is final.
    let _fault = Fault::at(Command::Register, 0, libc::EACCES);
    let refused = RegionSet::builder(&buffer).register(&domain);
    assert_refused!(refused, SetError::Chunk { chunk: 0, chunks: 1, .. });
}

#[test]
fn chunks_have_their_own_descriptors_only_on_request() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(1 << 20));
        let before = (fds(), dma_bufs());
        let builder = || RegionSet::builder(&buffer).chunk_size(CHUNK);
        let shared = builder().register(&domain).unwrap();
        assert_eq!((fds(), dma_bufs()), before);
        assert!(shared.descriptor(0).is_none());
        let own = builder().own_descriptors().register(&domain).unwrap();
        assert_eq!((fds(), dma_bufs()), (before.0 + 4, before.1));
        for chunk in 0..4 {
            let descriptor = own.descriptor(chunk).unwrap().try_clone_to_owned().unwrap();
            assert_eq!(DmaBuf::from_fd(descriptor).unwrap().id(), buffer.id());
        }
        assert!(own.descriptor(4).is_none());
        own.deregister().unwrap();
        assert_eq!((fds(), dma_bufs()), before);
    }
    census.assert_unchanged();
}

/// Limits the number of descriptors until dropped.
struct Descriptors(u64, u64);

impl Descriptors {
    fn limited_to(count: usize) -> Self {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, count as u64, hard).unwrap();
        Self(soft, hard)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.0, self.1).unwrap();
    }
}

#[test]
fn at_the_descriptor_limit_a_shared_one_works_and_own_ones_are_refused() {
    let (domain, buffer) = (domain(), heap(2 << 20));
    let census = Census::take();
    let builder = || RegionSet::builder(&buffer).chunk_size(CHUNK).threads(1);
    let (refused, shared) = {
        let _limit = Descriptors::limited_to(256);
        let all = || std::iter::from_fn(|| std::fs::File::open("/dev/null").ok());
        let mut taken: Vec<_> = all().collect();
        // Three are free.
        taken.truncate(taken.len() - 3);
        let refused = builder().own_descriptors().register(&domain);
        taken.extend(all());
        (refused, builder().register(&domain))
    };
    assert_refused!(
        refused,
        SetError::Descriptor {
            chunk: 3,
            chunks: 8,
            source: dmabuf::Error::Inspect { property: "second descriptor", .. },
        }
    );
    assert_eq!(refused.unwrap_err().errno(), Some(libc::EMFILE));
    shared.unwrap().deregister().unwrap();
    census.assert_unchanged();
}

#[test]
fn progress_counts_every_chunk() {
    let (domain, buffer) = (domain(), heap(1 << 20));
    let seen = Mutex::new(Vec::new());
    let note = |done, total| {
        assert_eq!(total, 1 << 20);
        seen.lock().unwrap().push(done);
    };
    let set = RegionSet::builder(&buffer).chunk_size(CHUNK).threads(2).progress(&note);
    set.register(&domain).unwrap();
    assert_eq!(seen.into_inner().unwrap(), [CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK]);
}

#[test]
fn several_devices_at_once() {
    let census = Census::take();
    let link = Link::new();
    {
        let buffer = heap(1 << 20);
        let ours = || ProtectionDomain::new(&Device::by_name("rxe0").unwrap().open().unwrap()).unwrap();
        let domains = [ours(), link.domain(), ours()];
        let before = regions();
        let builder = || RegionSet::builder(&buffer).access(Access::REMOTE).chunk_size(CHUNK);
        let sets = builder().register_on(&domains).unwrap();
        assert_eq!(regions(), before + 12);
        for (set, domain) in sets.iter().zip(&domains) {
            assert_eq!(set.domain().as_raw(), domain.as_raw());
            assert_covered(set);
            set.self_check().unwrap();
            assert_eq!((set.remote().buffer(), set.remote().runs().len()), (buffer.id(), 4));
        }
        drop(sets);
        // A refusal on one device leaves nothing on the others.
        for kth in [0, 5, 11] {
            let _fault = Fault::at(Command::Register, kth, libc::ENOSPC);
            let refused = builder().threads(1).register_on(&domains);
            let device = ["rxe0", "going", "rxe0"][kth / 4];
            assert_refused!(
                refused,
                SetError::Chunk { device: named, chunk, .. } if *named == device && *chunk == kth % 4
            );
            assert_eq!(regions(), before);
        }
    }
    link.deleted(link.delete());
    census.assert_unchanged();
}

#[test]
fn a_chunk_that_the_kernel_keeps_comes_back_with_the_reason() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(1 << 20));
        let before = regions();
        let set = RegionSet::builder(&buffer).chunk_size(CHUNK).threads(1).register(&domain).unwrap();
        let key = set.chunks()[2].lkey();
        let fault = Fault::at(Command::Deregister, 2, libc::EBUSY);
        let refused = set.deregister().unwrap_err();
        assert!(fault.happened());
        assert_eq!(refused.to_string(), "1 of 4 chunks of the set stay registered");
        assert_eq!(refused.errno(), Some(libc::EBUSY));
        let DeregisterError::Chunks { source, others, chunks: 4 } = refused else { panic!("{refused:?}") };
        assert!(others.is_empty(), "{others:?}");
        let DeregisterError::Refused { region, .. } = *source else { panic!("{source:?}") };
        assert_eq!((region.lkey(), regions()), (key, before + 1));
        drop(fault);
        region.deregister().unwrap();
        assert_eq!(regions(), before);
    }
    census.assert_unchanged();
}

#[test]
fn any_drop_order_leaves_nothing() {
    let census = Census::take();
    let make = || {
        let (domain, buffer) = (domain(), heap(1 << 20));
        let set = RegionSet::builder(&buffer).chunk_size(CHUNK).own_descriptors();
        let set = set.register(&domain).unwrap();
        (domain, buffer, set)
    };
    type Order = fn((ProtectionDomain, DmaBuf, RegionSet));
    let orders: [Order; 3] = [
        |(domain, buffer, set)| {
            drop(buffer);
            drop(domain);
            set.self_check().unwrap();
            drop(set);
        },
        |(domain, buffer, set)| {
            drop(set);
            drop(domain);
            drop(buffer);
        },
        |(domain, buffer, set)| {
            drop(domain);
            set.deregister().unwrap();
            drop(buffer);
        },
    ];
    for order in orders {
        order(make());
        census.assert_unchanged();
    }
}

#[test]
fn deleting_the_device_while_a_set_lives() {
    let census = Census::take();
    let link = Link::new();
    let domain = link.domain();
    let buffer = heap(1 << 20);
    let set = RegionSet::builder(&buffer).access(Access::REMOTE).chunk_size(CHUNK).register(&domain).unwrap();
    let delete = link.delete();
    std::thread::sleep(std::time::Duration::from_millis(300));
    set.deregister().unwrap();
    drop((domain, buffer));
    link.deleted(delete);
    census.assert_unchanged();
}
