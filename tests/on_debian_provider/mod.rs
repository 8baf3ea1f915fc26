//! A provider without `ibv_reg_dmabuf_mr`, as Debian's for soft-RoCE. The guest also runs the tests of
//! `on_dmabuf_rxe` that register.

use dmabuf_rdma::mr::{MemoryRegion, Path, RegisterError, probe, probe_path};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::peers::{device, domain};

#[test]
fn the_probe_finds_uverbs_and_says_what_the_provider_lacks() {
    let context = device().open().unwrap();
    assert_eq!(probe(&context).unwrap(), Path::Uverbs);
    let refusal = probe_path(&context, Path::Verbs).unwrap().unwrap();
    assert_eq!((refusal.path(), refusal.errno()), (Path::Verbs, Some(libc::EOPNOTSUPP)));
}

#[test]
fn a_path_that_the_provider_lacks_is_refused_by_name() {
    let (domain, buffer) = (domain(), heap(4096));
    let refused = MemoryRegion::builder(&domain, &buffer).paths(&[Path::Verbs]).register();
    let message =
        assert_refused!(refused, RegisterError::ImportUnsupported { refusals, .. } if refusals.len() == 1);
    assert!(message.contains("Verbs: EOPNOTSUPP, the user-space provider has no reg_dmabuf_mr"), "{message}");
}
