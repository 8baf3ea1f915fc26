//! Two connected queue pairs of one device, and regions to move bytes between.

use std::time::Duration;

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::{
    Completion, CompletionQueue, CompletionStatus, Context, Device, Operation, ProtectionDomain, QueuePair,
    QueuePairOptions, Sge, devices,
};

/// Longest time that a message takes under emulation, and then some.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Largest message: rxe's is 2 GiB, but one completion a few MiB shows progress sooner.
const MESSAGE: u64 = 8 << 20;

/// The device that the tests use; none fails the test.
#[track_caller]
pub fn device() -> Device {
    let all = devices().expect("list devices");
    all.into_iter().next().expect("these tests need an RDMA device: run them by `cargo xtask test`")
}

/// A fresh protection domain on a fresh context.
#[track_caller]
pub fn domain() -> ProtectionDomain {
    ProtectionDomain::new(&device().open().expect("open")).expect("protection domain")
}

/// One side: a queue pair with a completion queue of its own.
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

    /// Posts one request and waits for its end, whatever that is.
    #[track_caller]
    pub fn complete(&self, operation: Operation, elements: &[Sge<'_>]) -> Completion {
        self.pair.post(77, operation, elements, true).expect("post");
        let completion = self.queue.wait(LIMIT).expect("a completion");
        assert_eq!(completion.wr_id, 77);
        completion
    }

    /// Posts one request and waits for its success.
    #[track_caller]
    pub fn succeed(&self, operation: Operation, elements: &[Sge<'_>]) -> Completion {
        let completion = self.complete(operation, elements);
        assert_eq!(completion.status, CompletionStatus::SUCCESS, "{operation:?} {elements:?}");
        completion
    }
}

/// Two sides in one protection domain, connected to each other.
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

    /// A region of a whole buffer with every access.
    #[track_caller]
    pub fn register(&self, buffer: &DmaBuf) -> MemoryRegion {
        MemoryRegion::builder(&self.domain, buffer).access(Access::REMOTE).register().expect("register")
    }

    /// RDMA-WRITEs all of `from` to the same offsets of `to`.
    #[track_caller]
    pub fn write(&self, from: &MemoryRegion, to: &MemoryRegion) {
        self.each_message(from, to, |remote| Operation::Write { remote });
    }

    /// RDMA-READs all of `from` into the same offsets of `to`.
    #[track_caller]
    pub fn read(&self, from: &MemoryRegion, to: &MemoryRegion) {
        self.each_message(to, from, |remote| Operation::Read { remote });
    }

    #[track_caller]
    fn each_message(
        &self,
        local: &MemoryRegion,
        remote: &MemoryRegion,
        operation: impl Fn(dmabuf_rdma::transfer::RemoteAddr) -> Operation,
    ) {
        let total = local.len();
        assert_eq!(total, remote.len());
        for offset in (0..total).step_by(MESSAGE as usize) {
            let length = MESSAGE.min(total - offset);
            let element = local.sge(offset, length).expect("local range");
            let place = remote.remote().at(offset, length).expect("remote range");
            self.ours.succeed(operation(place), &[element]);
        }
    }
}
