//! Newer verbs that this machine's rdma-core or device lacks. `src/mr/tests` tests them against a library that
//! has them.

use dmabuf_rdma::mr::{MemoryRegion, Path, RegisterError};
use dmabuf_rdma::verbs::{self, DmaHandle, DmaHandleOptions};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::peers::domain;

#[test]
fn unavailable_verbs_are_refused_with_what_they_need() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(4096));
        let builder = MemoryRegion::builder(&domain, &buffer);
        let refused = builder.data_direct().register();
        let message = assert_refused!(
            refused,
            RegisterError::Verbs(verbs::Error::Unavailable { operation: "mlx5dv_reg_dmabuf_mr", .. })
        );
        let needs = "rxe0 has no mlx5dv_reg_dmabuf_mr: it needs rdma-core 54 or later, Linux 6.12 or later";
        assert!(message.contains(needs), "{message}");

        let refused = builder.paths(&[Path::VerbsEx]).register();
        let message = assert_refused!(
            refused,
            RegisterError::Verbs(verbs::Error::Unavailable { operation: "ibv_reg_mr_ex", .. })
        );
        assert!(message.contains("rdma-core 59 or later, Linux 6.17 or later"), "{message}");

        let refused = DmaHandle::new(domain.context(), DmaHandleOptions::default());
        assert_refused!(refused, verbs::Error::Unavailable { operation: "ibv_alloc_dmah", .. });
        // With a path that works among them, the others are skipped.
        let all = builder.paths(&[Path::DataDirect, Path::VerbsEx, Path::Uverbs]).register();
        assert_eq!(all.unwrap().path(), Path::Uverbs);
    }
    census.assert_unchanged();
}
