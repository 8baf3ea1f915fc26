//! Two connected queue pairs of one device, and transfers between regions.

use std::ops::Range;
use std::time::Duration;

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, probe};
use dmabuf_rdma::verbs::{
    Completion, CompletionQueue, CompletionStatus, Context, Device, Operation, ProtectionDomain, QueuePair,
    QueuePairOptions, RemoteAddr, Sge, WorkRequest, devices,
};

/// Timeout for a message, generous for emulation.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Message size. rxe allows up to 2 GiB, but smaller messages complete within the timeout.
const MESSAGE: u64 = 8 << 20;

/// The first RDMA device; the test fails if there is none.
#[track_caller]
pub fn device() -> Device {
    let all = devices().expect("list devices");
    all.into_iter().next().expect("no RDMA device; run these tests with `cargo xtask test`")
}

/// A new protection domain on a new context.
#[track_caller]
pub fn domain() -> ProtectionDomain {
    ProtectionDomain::new(&device().open().expect("open")).expect("protection domain")
}

/// The path that registers a dma-buf here by default. `cargo xtask` states the provider; on a machine's own device
/// the probe decides.
#[track_caller]
pub fn import_path() -> Path {
    match std::env::var("DMABUF_RDMA_PROVIDER").as_deref() {
        Ok("dmabuf") => Path::Verbs,
        Ok("debian") => Path::Uverbs,
        _ => probe(&device().open().expect("open")).expect("a device that imports dma-bufs"),
    }
}

/// The place of a byte range of a region, as its peer names it.
#[track_caller]
pub fn remote_addr(region: &MemoryRegion, range: Range<u64>) -> RemoteAddr {
    region.remote().slice(range).expect("a range of the region").addr().expect("one run")
}

/// One side: a queue pair with its own completion queue.
pub struct Side {
    pub queue: CompletionQueue,
    pub pair: QueuePair,
}

impl Side {
    #[track_caller]
    pub fn new(domain: &ProtectionDomain, options: QueuePairOptions) -> Self {
        let queue = CompletionQueue::new(domain.context(), 64).expect("completion queue");
        let pair = QueuePair::new(domain, &queue, &queue, options).expect("queue pair");
        Self { queue, pair }
    }

    /// Posts one request and waits for its completion, with any status.
    #[track_caller]
    pub fn complete(&self, operation: Operation, elements: &[Sge<'_>]) -> Completion {
        self.pair.post(WorkRequest::new(77, operation, elements).signaled()).expect("post");
        let completion = self.queue.wait(TIMEOUT).expect("a completion");
        assert_eq!(completion.wr_id, 77);
        completion
    }

    /// Posts one request and waits for its successful completion.
    #[track_caller]
    pub fn succeed(&self, operation: Operation, elements: &[Sge<'_>]) -> Completion {
        let completion = self.complete(operation, elements);
        assert_eq!(completion.status, CompletionStatus::SUCCESS, "{operation:?} {elements:?}");
        completion
    }
}

/// Two connected sides in one protection domain.
pub struct Peers {
    pub domain: ProtectionDomain,
    pub ours: Side,
    pub theirs: Side,
}

impl Peers {
    #[track_caller]
    pub fn new() -> Self {
        Self::with(QueuePairOptions::default())
    }

    #[track_caller]
    pub fn with(options: QueuePairOptions) -> Self {
        let domain = domain();
        let (ours, theirs) = (Side::new(&domain, options), Side::new(&domain, options));
        ours.pair.connect(&theirs.pair.endpoint().expect("ours")).expect("connect");
        theirs.pair.connect(&ours.pair.endpoint().expect("ours")).expect("connect");
        Self { domain, ours, theirs }
    }

    pub fn context(&self) -> &Context {
        self.domain.context()
    }

    /// Registers a whole buffer with every access.
    #[track_caller]
    pub fn register(&self, buffer: &DmaBuf) -> MemoryRegion {
        MemoryRegion::builder(&self.domain, buffer).access(Access::REMOTE).register().expect("register")
    }

    /// Copies all of `from` to `to` by RDMA WRITE.
    #[track_caller]
    pub fn write(&self, from: &MemoryRegion, to: &MemoryRegion) {
        self.each_message(from, to, |remote| Operation::Write { remote });
    }

    /// Copies all of `from` to `to` by RDMA READ.
    #[track_caller]
    pub fn read(&self, from: &MemoryRegion, to: &MemoryRegion) {
        self.each_message(to, from, |remote| Operation::Read { remote });
    }

    #[track_caller]
    fn each_message(
        &self,
        local: &MemoryRegion,
        remote: &MemoryRegion,
        operation: impl Fn(RemoteAddr) -> Operation,
    ) {
        let total = local.len();
        assert_eq!(total, remote.len());
        for offset in (0..total).step_by(MESSAGE as usize) {
            let range = offset..total.min(offset + MESSAGE);
            let element = local.sge(range.clone()).expect("local range");
            self.ours.succeed(operation(remote_addr(remote, range)), &[element]);
        }
    }
}
