//! Devices that people have.

use dmabuf_rdma::RegionCache;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, RegisterError, SelfCheckError, SetError, probe};
use dmabuf_rdma::transfer::{self, ConnectionOptions};
use dmabuf_rdma::verbs::{self, CompletionQueue, CompletionStatus, QueuePair, QueuePairOptions};
use dmabuf_rdma::{Connection, ErrorKind, RegionSet};

use super::{READ_AND_WRITE, bytes_move, connected};
use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::profile::Profile;

fn reads(count: u8) -> ConnectionOptions {
    ConnectionOptions::default().queue_pair(QueuePairOptions::default().rd_atomic(count))
}

/// mlx5/main.c `get_atomic_caps` reports no atomics; mlx5/qp.c `set_qpc_atomic_flags` then refuses a queue pair that
/// permits them with EOPNOTSUPP, and registrations permit them all the same.
#[test]
fn mlx5_without_atomics_connects_and_moves_bytes() {
    let census = Census::take();
    {
        let profile = Profile::new("mlx5-without-atomics");
        let domain = profile.domain();
        assert!(!domain.context().limits().unwrap().atomics);
        let [mut connection, _peer] = connected(&domain, reads(255));
        assert_eq!(connection.endpoint().rd_atomic, 16);
        bytes_move(&domain, &mut connection, 3 << 20, true);

        let buffer = heap(4096);
        let region = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register().unwrap();
        region.self_check().unwrap();
        let remote = region.remote();
        let refused = connection
            .fetch_add(region.slice(..8).unwrap(), remote.slice(8..16).unwrap(), 1)
            .and_then(|transfer| transfer.wait());
        let message = assert_refused!(
            refused,
            transfer::Error::Failed { status: CompletionStatus::REM_INV_REQ_ERR, .. }
        );
        assert!(message.contains("atomics need a device that has them"), "{message}");
    }
    census.assert_unchanged();
}

/// efa has no RC (providers/efa/verbs.c `efa_create_qp`), and efa/efa_verbs.c `efa_alloc_mr` answers EOPNOTSUPP to
/// access flags that it does not support, before it looks at the dma-buf.
#[test]
fn efa_registers_without_atomics_and_has_no_reliable_connection() {
    let census = Census::take();
    {
        let profile = Profile::new("efa");
        let domain = profile.domain();
        let (buffer, cache) = (heap(8192), RegionCache::default());
        assert_eq!(probe(domain.context()).unwrap(), Path::Verbs);
        let builder = MemoryRegion::builder(&domain, &buffer);
        let region = builder.access(READ_AND_WRITE | Access::RELAXED_ORDERING).register().unwrap();
        assert_eq!(region.path(), Path::Verbs);

        let message = assert_refused!(
            builder.access(Access::REMOTE).register(),
            RegisterError::AccessNotPermitted {
                flags: Access::REMOTE_ATOMIC,
                device: Some(_),
                source: Some(_)
            }
        );
        assert!(
            message.contains("rxe0 imports dma-bufs, but does not support the access flags"),
            "{message}"
        );
        let set = RegionSet::builder(&buffer).access(Access::REMOTE).register(&domain);
        assert!(
            matches!(&set, Err(SetError::Chunk { source, .. })
                if matches!(**source, RegisterError::AccessNotPermitted { .. })),
            "{set:?}"
        );
        let cached = cache.get(&domain, &buffer, .., Access::REMOTE);
        assert_refused!(cached, RegisterError::AccessNotPermitted { .. });
        cache.get(&domain, &buffer, .., READ_AND_WRITE).unwrap();

        let refused = Connection::new(&domain, ConnectionOptions::default());
        let message = assert_refused!(
            refused,
            transfer::Error::Verbs(verbs::Error::Unavailable {
                operation: "reliable connected (RC) queue pairs",
                ..
            })
        );
        assert!(message.contains("efa has only SRD and UD"), "{message}");
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
        let refused = region.self_check();
        assert_refused!(refused, SelfCheckError::Setup(verbs::Error::Unavailable { .. }));
    }
    census.assert_unchanged();
}

/// The first efa devices do not write remotely (efa/efa_verbs.c `efa_alloc_mr`) and notify of no completions
/// (providers/efa/verbs.c `create_cq`).
#[test]
fn the_first_efa_is_read_only_for_peers_and_can_only_be_polled() {
    let profile = Profile::new("efa-first");
    let (domain, buffer) = (profile.domain(), heap(4096));
    let builder = MemoryRegion::builder(&domain, &buffer);
    builder.access(Access::LOCAL_WRITE | Access::REMOTE_READ).register().unwrap();
    let unsupported = Access::REMOTE_WRITE | Access::REMOTE_ATOMIC;
    assert_refused!(
        builder.access(Access::REMOTE).register(),
        RegisterError::AccessNotPermitted { flags, .. } if *flags == unsupported
    );
    let message = assert_refused!(
        CompletionQueue::new(domain.context(), 16),
        verbs::Error::Unavailable { operation: "notification of completions", .. }
    );
    assert!(message.contains("an older efa can only be polled"), "{message}");
}

/// irdma/verbs.c: `irdma_query_device` has 127 READs as the target and 255 in flight, `irdma_modify_qp_roce` refuses
/// more, `irdma_validate_qp_attrs` more than 13 elements. Remote atomics are registered (`irdma_get_mr_access`
/// ignores them).
#[test]
fn irdma_limits_reads_of_each_direction_and_elements() {
    let profile = Profile::new("irdma");
    let domain = profile.domain();
    let limits = domain.context().limits().unwrap();
    assert_eq!((limits.max_rd_atomic, limits.max_init_rd_atomic, limits.max_sge_read), (127, 255, 13));
    let options = reads(255);
    let many = options.queue_pair(options.queue_pair.max_sge(64));
    let [mut connection, _peer] = connected(&domain, many);
    assert_eq!(connection.endpoint().rd_atomic, 127);
    bytes_move(&domain, &mut connection, 3 << 20, true);

    let queue = CompletionQueue::new(domain.context(), 16).unwrap();
    let pair =
        |elements| QueuePair::new(&domain, &queue, &queue, QueuePairOptions::default().max_sge(elements));
    pair(13).unwrap();
    let message = assert_refused!(pair(14), verbs::Error::Device { source, .. } if source.raw_os_error() == Some(libc::EINVAL));
    assert!(message.contains("14 elements"), "{message}");
    let buffer = heap(4096);
    MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register().unwrap().self_check().unwrap();
}

/// bnxt_re/ib_verbs.c `bnxt_re_modify_qp` refuses a queue pair that serves more READs than the device keeps in
/// flight, and `bnxt_re_query_device` may report fewer of those.
#[test]
fn bnxt_re_serves_no_more_reads_than_it_initiates() {
    let profile = Profile::new("bnxt_re");
    let domain = profile.domain();
    let limits = domain.context().limits().unwrap();
    assert_eq!((limits.max_rd_atomic, limits.max_init_rd_atomic), (126, 64));
    let [mut connection, _peer] = connected(&domain, reads(255));
    assert_eq!(connection.endpoint().rd_atomic, 64);
    bytes_move(&domain, &mut connection, 3 << 20, true);
    // 512 GiB is the longest region; a set of any length needs no smaller chunks here.
    let buffer = heap(8 << 20);
    let set = RegionSet::builder(&buffer).access(Access::REMOTE).register(&domain).unwrap();
    assert_eq!(set.chunks().len(), 1);
    set.self_check().unwrap();
    let chunk = RegionSet::builder(&buffer).chunk_size(1 << 40).register(&domain);
    assert_refused!(chunk, SetError::ChunkSize { largest: 0x80_0000_0000, .. });
}

/// mana/mr.c of Linux 7.3, `mana_ib_reg_user_mr_dmabuf`: EOPNOTSUPP for REMOTE_ATOMIC.
#[test]
fn mana_registers_and_connects_without_atomics() {
    let profile = Profile::new("mana");
    let domain = profile.domain();
    let [mut connection, _peer] = connected(&domain, reads(255));
    assert_eq!(connection.endpoint().rd_atomic, 32);
    bytes_move(&domain, &mut connection, 3 << 20, true);
    let buffer = heap(4096);
    let message = assert_refused!(
        MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register(),
        RegisterError::AccessNotPermitted { flags: Access::REMOTE_ATOMIC, .. }
    );
    assert!(message.contains("register without them"), "{message}");
}
