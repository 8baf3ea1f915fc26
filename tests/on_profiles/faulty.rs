//! Devices on which a registration means less than it says.

use dmabuf_rdma::RegionCache;
use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, RegisterError, SelfCheckError, probe};
use dmabuf_rdma::transfer::{self, ConnectionOptions};
use dmabuf_rdma::verbs::{self, CompletionStatus, Device};
use dmabuf_rdma::{ErrorKind, RegionSet};

use super::connected;
use crate::assert_refused;
use crate::common::buffers::{heap, udmabuf};
use crate::common::census::Census;
use crate::common::profile::Profile;
use crate::common::{assert_same, contents, pattern};

/// As memory that a NIC registers for a PCIe path on which it cannot reach it: the self-check finds it, and a
/// transfer names the key and changes nothing.
#[test]
fn a_registration_that_does_not_transfer_is_found() {
    let census = Census::take();
    {
        let profile = Profile::new("dead-keys");
        let domain = profile.domain();
        let (ours, theirs) = (heap(8192), heap(8192));
        theirs.map().unwrap().write(0, &pattern(8192, 1)).unwrap();
        let register = |buffer, path| {
            let builder = MemoryRegion::builder(&domain, buffer).access(Access::REMOTE);
            builder.paths(&[path]).register().unwrap()
        };
        // Only the provider's registrations are dead.
        let [[source, dead_source], [target, dead_target]] =
            [&ours, &theirs].map(|buffer| [Path::Uverbs, Path::Verbs].map(|path| register(buffer, path)));
        source.self_check().unwrap();
        for region in [&dead_source, &dead_target] {
            let message = assert_refused!(
                region.self_check(),
                SelfCheckError::Transfer { path: Path::Verbs, step: "reading", offset: 0, source, .. }
                    if matches!(**source, verbs::Error::Completion { .. })
            );
            assert!(message.contains("the device does not reach this memory"), "{message}");
        }
        let set = RegionSet::builder(&ours).access(Access::REMOTE).register(&domain).unwrap();
        assert_refused!(set.self_check(), SelfCheckError::Transfer { .. });

        // rxe reports a failure of its own side as WR_FLUSH_ERR, where other devices say LOC_PROT_ERR.
        let writes = [
            (&source, &dead_target, CompletionStatus::REM_ACCESS_ERR, "the remote key"),
            (&dead_source, &target, CompletionStatus::WR_FLUSH_ERR, "no failed request was seen"),
        ];
        for (from, to, expected, part) in writes {
            let [connection, _peer] = connected(&domain, ConnectionOptions::default());
            let message = assert_refused!(
                connection.write(from, to.remote()).and_then(|transfer| transfer.wait()),
                transfer::Error::Failed { status, done: 0, .. } if *status == expected
            );
            assert!(message.contains(part), "{message}");
        }
        assert_same(&contents(&theirs), &pattern(8192, 1), "a write that failed");
    }
    census.assert_unchanged();
}

/// The kernel's internal errno 524, which NVIDIA's exporter leaks: the probe cannot see it, since it has no buffer.
#[test]
fn the_kernels_internal_errno_is_named() {
    let census = Census::take();
    {
        let profile = Profile::new("errno-524");
        let (domain, allocation) = (profile.domain(), udmabuf(PageKind::Base, 8192));
        assert_eq!(probe(domain.context()).unwrap(), Path::Verbs);
        let builder = MemoryRegion::builder(&domain, &allocation.dmabuf).access(Access::REMOTE);
        for paths in [&[Path::Verbs][..], &[Path::Uverbs], &[Path::Verbs, Path::Uverbs]] {
            let refused = builder.paths(paths).register();
            let message = assert_refused!(
                refused,
                RegisterError::Refused { path, source, .. }
                    if *path == paths[0] && source.raw_os_error() == Some(524)
            );
            assert!(message.contains("524 is the kernel's internal ENOTSUPP"), "{message}");
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
        }
        let cache = RegionCache::default();
        assert_refused!(
            cache.get(&domain, &allocation.dmabuf, .., Access::REMOTE),
            RegisterError::Refused { .. }
        );
        // The host pages behind it are ordinary memory.
        let mapped =
            builder.paths(&[]).host_mapping(allocation.backing.as_ref().unwrap()).register().unwrap();
        mapped.self_check().unwrap();
    }
    census.assert_unchanged();
}

#[test]
fn a_profile_that_does_not_exist_opens_no_device() {
    let _profile = Profile::new("no-such-device");
    let refused = Device::by_name("rxe0").unwrap().open();
    assert_refused!(refused, verbs::Error::Device { source, .. } if source.raw_os_error() == Some(libc::EINVAL));
}
