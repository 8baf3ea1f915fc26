//! Devices that report 0, 1 or the largest value for every limit.

use dmabuf_rdma::mr::{Access, MemoryRegion, SelfCheckError};
use dmabuf_rdma::transfer::{self, ConnectionOptions};
use dmabuf_rdma::verbs::{self, QueuePairOptions};
use dmabuf_rdma::{Connection, RegionSet};

use super::{bytes_move, connected};
use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::profile::Profile;

/// 0 stands for no stated limit, except for READs, of which there are none.
#[test]
fn limits_of_zero_leave_the_decision_to_the_kernel() {
    let census = Census::take();
    {
        let profile = Profile::new("limits-zero");
        let domain = profile.domain();
        let [mut connection, _peer] = connected(&domain, ConnectionOptions::default());
        bytes_move(&domain, &mut connection, 100_000, false);
        let buffer = heap(2 << 20);
        let set = RegionSet::builder(&buffer).access(Access::REMOTE).register(&domain).unwrap();
        assert_eq!(set.chunks().len(), 1);
        let message = assert_refused!(
            connection.read(&set, set.remote()).and_then(|transfer| transfer.wait()),
            transfer::Error::Verbs(verbs::Error::Unavailable { .. })
        );
        assert!(message.contains("READ"), "{message}");
        let region = MemoryRegion::builder(&domain, &buffer).access(Access::LOCAL_WRITE).register().unwrap();
        // The check would READ into it, and says nothing about the memory.
        assert_refused!(region.self_check(), SelfCheckError::Setup(verbs::Error::Unavailable { .. }));
    }
    census.assert_unchanged();
}

/// One message of one byte in flight.
#[test]
fn limits_of_one_move_bytes_one_by_one() {
    let census = Census::take();
    {
        let profile = Profile::new("limits-one");
        let domain = profile.domain();
        let [mut connection, _peer] = connected(&domain, ConnectionOptions::default());
        assert_eq!(connection.endpoint().rd_atomic, 1);
        bytes_move(&domain, &mut connection, 200, true);
        let buffer = heap(2 << 20);
        RegionSet::builder(&buffer).access(Access::REMOTE).register(&domain).unwrap();
    }
    census.assert_unchanged();
}

/// What a connection allocates does not grow with the limits, and what the device then refuses is named.
#[test]
fn the_largest_limits_are_not_taken_at_their_word() {
    let census = Census::take();
    {
        let profile = Profile::new("limits-largest");
        let domain = profile.domain();
        let [mut connection, _peer] = connected(&domain, ConnectionOptions::default());
        bytes_move(&domain, &mut connection, 3 << 20, true);
        let buffer = heap(2 << 20);
        let set = RegionSet::builder(&buffer).access(Access::REMOTE).register(&domain).unwrap();
        assert_eq!(set.chunks().len(), 1);
        set.self_check().unwrap();

        let greedy = ConnectionOptions::default().window(u32::MAX);
        let message = assert_refused!(
            Connection::new(&domain, greedy),
            transfer::Error::Verbs(verbs::Error::Device { source, .. })
                if source.raw_os_error() == Some(libc::EINVAL)
        );
        assert!(message.contains("a completion queue of 131072 entries"), "{message}");
        let elements = ConnectionOptions::default().queue_pair(QueuePairOptions::default().max_sge(u32::MAX));
        let message = assert_refused!(
            Connection::new(&domain, elements),
            transfer::Error::Verbs(verbs::Error::Device { .. })
        );
        assert!(message.contains("256 elements"), "{message}");
    }
    census.assert_unchanged();
}
