//! Objects that another library made, used through `from_raw` and left alive.

use std::ptr::{NonNull, null_mut};

use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, RegisterError};
use dmabuf_rdma::verbs::{CompletionQueue, Context, Operation, ProtectionDomain, QueuePair, WorkRequest};
use dmabuf_rdma::{Connection, Iova};
use ibverbs_sys as ffi;

use crate::assert_refused;
use crate::common::buffers::udmabuf;
use crate::common::census::Census;
use crate::common::peers::{Peers, TIMEOUT};
use crate::common::{contents, pattern};

/// What a C program would have made, undone as it would do.
struct Foreign {
    list: *mut *mut ffi::ibv_device,
    context: NonNull<ffi::ibv_context>,
    pd: NonNull<ffi::ibv_pd>,
    cq: NonNull<ffi::ibv_cq>,
}

impl Foreign {
    fn new() -> Self {
        // SAFETY: libibverbs' calls in their documented order; every result is checked.
        unsafe {
            let list = ffi::ibv_get_device_list(null_mut());
            let context = NonNull::new(ffi::ibv_open_device(*list)).expect("open");
            let pd = NonNull::new(ffi::ibv_alloc_pd(context.as_ptr())).expect("pd");
            let cq = ffi::ibv_create_cq(context.as_ptr(), 16, null_mut(), null_mut(), 0);
            Self { list, context, pd, cq: NonNull::new(cq).expect("cq") }
        }
    }

    /// Destroys everything; an object that somebody else destroyed, or still uses, fails this.
    fn destroy(self) {
        // SAFETY: all objects are live, and nothing wraps them any more.
        unsafe {
            assert_eq!(ffi::ibv_destroy_cq(self.cq.as_ptr()), 0);
            assert_eq!(ffi::ibv_dealloc_pd(self.pd.as_ptr()), 0);
            assert_eq!(ffi::ibv_close_device(self.context.as_ptr()), 0);
            ffi::ibv_free_device_list(self.list);
        }
    }
}

#[test]
fn a_foreign_domain_and_queue_serve_and_stay() {
    let census = Census::take();
    let foreign = Foreign::new();
    // SAFETY: the objects live until `destroy`, after everything made of them was dropped.
    let (context, domain, queue) = unsafe {
        (
            Context::from_raw(foreign.context),
            ProtectionDomain::from_raw(foreign.pd),
            CompletionQueue::from_raw(foreign.cq),
        )
    };
    assert_eq!(context.device_name(), domain.context().device_name());

    let allocation = udmabuf(PageKind::Base, 64 << 10);
    let options = Default::default();
    let sides = [(); 2].map(|()| QueuePair::new(&domain, &queue, &queue, options).unwrap());
    sides[0].connect(&sides[1].endpoint().unwrap()).unwrap();
    sides[1].connect(&sides[0].endpoint().unwrap()).unwrap();
    let region = dmabuf_rdma::MemoryRegion::builder(&domain, &allocation.dmabuf)
        .access(dmabuf_rdma::mr::Access::REMOTE)
        .host_mapping(allocation.backing.as_ref().unwrap())
        .register()
        .unwrap();
    let bytes = pattern(4096, 3);
    allocation.dmabuf.map().unwrap().write(0, &bytes).unwrap();
    let remote = region.remote().slice(8192..12288).unwrap().addr().unwrap();
    let elements = [region.sge(..4096).unwrap()];
    sides[0].post(WorkRequest::new(9, Operation::Write { remote }, &elements).signaled()).unwrap();
    assert_eq!(queue.wait(TIMEOUT).unwrap().success().unwrap().wr_id, 9);
    assert_eq!(contents(&allocation.dmabuf)[8192..][..4096], bytes);

    region.deregister().unwrap();
    drop((sides, queue, domain, context, allocation));
    foreign.destroy();
    census.assert_unchanged();
}

#[test]
fn a_foreign_region_serves_and_stays() {
    let census = Census::take();
    let (foreign, mut memory) = (Foreign::new(), pattern(8192, 5));
    let (iova, access) = (Iova(memory.as_ptr() as u64), Access::REMOTE);
    // SAFETY: the memory outlives the region, and is not used while a transfer is under way.
    let raw = unsafe {
        ffi::ibv_reg_mr(foreign.pd.as_ptr(), memory.as_mut_ptr().cast(), 8192, access.bits() as i32)
    };
    let raw = NonNull::new(raw).expect("a region");
    // SAFETY: both live until `destroy`, after everything made of them was dropped.
    let (domain, region) = unsafe {
        (ProtectionDomain::from_raw(foreign.pd), MemoryRegion::from_raw(raw, iova, access).unwrap())
    };
    assert_eq!((region.path(), region.len(), region.iova()), (Path::Foreign, 8192, iova));
    assert_eq!(dmabuf_rdma::observe::gauges().regions().regions, 0, "the library holds none");

    let connection = Connection::new(&domain, Default::default()).unwrap();
    connection.connect(&connection.endpoint()).unwrap();
    let target = region.remote().slice(5000..6000).unwrap();
    connection.write(region.slice(..1000).unwrap(), target).unwrap().wait().unwrap();
    assert_eq!(memory[5000..6000], pattern(8192, 5)[..1000]);

    // SAFETY: as above.
    let refused = |iova, access| unsafe { MemoryRegion::from_raw(raw, iova, access) };
    let high = Iova(u64::MAX - 8191);
    assert_refused!(refused(high, access), RegisterError::IovaOverflow { length: 8192, .. });
    assert_refused!(refused(iova, Access::REMOTE_WRITE), RegisterError::LocalWriteMissing { .. });
    region.deregister().unwrap();
    drop((connection, domain));
    // SAFETY: nobody uses the region any more; it is still registered, or this fails.
    assert_eq!(unsafe { ffi::ibv_dereg_mr(raw.as_ptr()) }, 0);
    foreign.destroy();
    census.assert_unchanged();
}

#[test]
fn a_foreign_queue_pair_is_posted_to_and_stays() {
    let peers = Peers::new();
    // SAFETY: the queue pair lives as long as `peers`, which is dropped last.
    let foreign = unsafe { QueuePair::from_raw(peers.ours.pair.as_raw()).unwrap() };
    assert_eq!((foreign.number(), foreign.endpoint()), (peers.ours.pair.number(), None));
    peers.theirs.pair.post_recv(1, &[]).unwrap();
    foreign.post(WorkRequest::new(2, Operation::Send, &[]).signaled()).unwrap();
    peers.ours.queue.wait(TIMEOUT).unwrap().success().unwrap();
    let refused = foreign.connect(&peers.theirs.pair.endpoint().unwrap());
    assert!(matches!(refused, Err(dmabuf_rdma::verbs::Error::Unavailable { .. })), "{refused:?}");
    drop(foreign);

    // Its owner goes on with it.
    peers.theirs.pair.post_recv(1, &[]).unwrap();
    peers.ours.succeed(Operation::Send, &[]);
}
