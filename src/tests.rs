//! The threads that may use each public type.

use crate::*;

/// Of the benchmarks that run natively as unit tests.
#[path = "../benches/common/mod.rs"]
#[allow(dead_code)]
pub(crate) mod common;

/// Fails to compile for a type that two threads may not share.
#[allow(clippy::extra_unused_type_parameters)] // the bounds are the test
fn shared<T: Send + Sync>(path: &'static str) -> &'static str {
    path
}

macro_rules! shared {
    ($($type:ty),* $(,)?) => { vec![$(shared::<$type>(stringify!($type))),*] };
}

/// The paths of all public types.
fn types() -> Vec<&'static str> {
    let mut types = shared![
        cm::Error,
        cm::Incoming,
        cm::Listener,
        cm::Outgoing,
        dmabuf::BufferId,
        dmabuf::CpuAccess,
        dmabuf::CpuGuard<'static>,
        dmabuf::DmaBuf,
        dmabuf::Error,
        dmabuf::Mapping,
        exporter::Allocation,
        exporter::Backing,
        exporter::CaptureDevice,
        exporter::DmaHeap,
        exporter::Error,
        exporter::PageKind,
        exporter::PointerError,
        exporter::PointerInfo,
        exporter::Runtimes,
        exporter::Udmabuf,
        exporter::VfioDevice,
        exporter::VfioError,
        exporter::runtime::ExportOptions,
        exporter::runtime::ExportedRange,
        exporter::runtime::Extent,
        exporter::runtime::MemoryKind,
        exporter::v4l2::Frame,
        host::Error,
        host::HostBuffer,
        mr::Access,
        mr::Blocks<mr::RegionSlice>,
        mr::Buffer<'static>,
        mr::CacheOptions,
        mr::DeregisterError,
        mr::Growth,
        mr::MemoryRegion,
        mr::MemoryRegionBuilder<'static>,
        mr::Path,
        mr::Refusal,
        mr::RegionCache,
        mr::RegionSet,
        mr::RegionSetBuilder<'static>,
        mr::RegionSlice,
        mr::RegisterError,
        mr::SliceError,
        mr::RemoteRegion,
        mr::RemoteRun,
        mr::RemoteSlice,
        mr::SelfCheckError,
        mr::SetError,
        mr::Umem,
        observe::CacheGauges,
        observe::Gauges,
        observe::RegionGauges,
        transfer::Connection,
        transfer::ConnectionOptions,
        transfer::Error,
        transfer::Notification,
        transfer::Notifications,
        transfer::Receiver,
        transfer::RequestError,
        transfer::Sender,
        transfer::Transfer,
        transfer::Transferred,
        transfer::Worker,
        transfer::WorkerOptions,
        verbs::AsyncEvent,
        verbs::AsyncEvents,
        verbs::Completion,
        verbs::CompletionQueue,
        verbs::CompletionStatus,
        verbs::Context,
        verbs::Device,
        verbs::DmaHandle,
        verbs::DmaHandleOptions,
        verbs::Endpoint,
        verbs::Error,
        verbs::GidEntry,
        verbs::Limits,
        verbs::Lkey,
        verbs::Opcode,
        verbs::Operation,
        verbs::Port,
        verbs::ProtectionDomain,
        verbs::QueuePair,
        verbs::QueuePairOptions,
        verbs::RemoteAddr,
        verbs::Rkey,
        verbs::Sge<'static>,
        verbs::WorkRequest<'static>,
        Error,
        ErrorKind,
    ];
    #[cfg(feature = "cuda")]
    types.extend(shared![exporter::Cuda]);
    #[cfg(feature = "drm")]
    types.extend(shared![exporter::DumbBuffers]);
    #[cfg(feature = "gbm")]
    types.extend(shared![exporter::Gbm]);
    #[cfg(feature = "hsa")]
    types.extend(shared![exporter::Hsa]);
    #[cfg(feature = "level-zero")]
    types.extend(shared![exporter::LevelZero]);
    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    types.extend(shared![exporter::DeviceMemory]);
    #[cfg(feature = "vulkan")]
    types.extend(shared![exporter::Vulkan, exporter::VulkanBuffer]);
    types
}

#[test]
fn every_type_may_be_used_by_any_thread() {
    let types = types();
    assert!(types.len() > 70);
    if !cfg!(all(
        feature = "cuda",
        feature = "drm",
        feature = "gbm",
        feature = "hsa",
        feature = "level-zero",
        feature = "vulkan"
    )) {
        return;
    }
    // The list above is complete: docs/api has all features.
    let last = |path: &str| path.rsplit("::").next().unwrap_or(path).to_owned();
    for line in include_str!("../docs/api/dmabuf-rdma.txt").lines() {
        let line = line.trim_start_matches("#[non_exhaustive] ");
        let item =
            line.strip_prefix("pub struct dmabuf_rdma::").or(line.strip_prefix("pub enum dmabuf_rdma::"));
        let Some(path) = item.and_then(|item| item.split(['<', '(', ' ', '{']).next()) else { continue };
        let mut plain = types.iter().map(|path| path.split('<').next().unwrap_or(path).trim());
        // Every module has a type of the name Error; all other names are unique.
        let found = plain.any(|listed| match last(path).as_str() {
            "Error" => listed == path,
            name => last(listed) == name,
        });
        assert!(found, "{path} is missing in this list");
    }
}
