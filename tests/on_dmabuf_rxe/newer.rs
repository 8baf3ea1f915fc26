//! Verbs that this machine's rdma-core or device does not have say so; `src/mr/tests` tests them against
//! a library that has them.

use dmabuf_rdma::Error;
use dmabuf_rdma::error::RegistrationError;
use dmabuf_rdma::mr::{DmaHandle, DmaHandleOptions, MemoryRegion, Path};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::peers::domain;

#[test]
fn newer_verbs_are_unavailable_with_what_they_need() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(4096));
        let builder = MemoryRegion::builder(&domain, &buffer);
        let refused = builder.data_direct().register();
        let message = assert_refused!(
            refused,
            Error::Registration(RegistrationError::Unavailable { operation: "mlx5dv_reg_dmabuf_mr", .. })
        );
        assert!(message.contains("rxe0: it needs rdma-core 54 or later, Linux 6.12 or later"), "{message}");

        let refused = builder.paths(&[Path::VerbsEx]).register();
        let message = assert_refused!(
            refused,
            Error::Registration(RegistrationError::Unavailable { operation: "ibv_reg_mr_ex", .. })
        );
        assert!(message.contains("rdma-core 59 or later, Linux 6.17 or later"), "{message}");

        let refused = DmaHandle::new(domain.context(), DmaHandleOptions::default());
        assert_refused!(
            refused,
            Error::Registration(RegistrationError::Unavailable { operation: "ibv_alloc_dmah", .. })
        );
        // Beside a path that works they are left out.
        let all = builder.paths(&[Path::DataDirect, Path::VerbsEx, Path::Uverbs]).register();
        assert_eq!(all.unwrap().path(), Path::Uverbs);
    }
    census.assert_unchanged();
}
