//! Exporters by name, for the options `--exporter`.

use dmabuf_rdma::exporter::{DmaHeap, DumbBuffers, Exporter, PageKind, Udmabuf};

use crate::Result;

/// The names, for help and messages.
pub const NAMES: &str =
    "heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER, cuda, hsa, level-zero";

/// The runtimes that this program was built without.
const LEFT_OUT: &[&str] = &[
    #[cfg(not(feature = "cuda"))]
    "cuda",
    #[cfg(not(feature = "hsa"))]
    "hsa",
    #[cfg(not(feature = "level-zero"))]
    "level-zero",
];

/// Opens the exporter of this name. A GPU runtime takes its first GPU, or the one after the colon, as in `cuda:1`.
pub fn by_name(name: &str) -> Result<Box<dyn Exporter>> {
    let (kind, detail) = name.split_once(':').unwrap_or((name, ""));
    Ok(match (kind, detail) {
        ("heap", "") => Box::new(DmaHeap::open("system")?),
        ("heap", heap) => Box::new(DmaHeap::open(heap)?),
        ("udmabuf", "") => Box::new(Udmabuf::open()?),
        ("udmabuf", "thp") => Box::new(Udmabuf::open()?.with_pages(PageKind::Transparent)),
        ("udmabuf", "2M") => Box::new(Udmabuf::open()?.with_pages(PageKind::HUGE_2M)),
        ("drm", driver) => Box::new(DumbBuffers::by_driver(driver)?),
        #[cfg(feature = "cuda")]
        ("cuda", gpu) => Box::new(dmabuf_rdma::exporter::Cuda::load()?.with_device(number(gpu)?)?),
        #[cfg(feature = "hsa")]
        ("hsa", gpu) => Box::new(dmabuf_rdma::exporter::Hsa::load()?.with_device(number(gpu)?)?),
        #[cfg(feature = "level-zero")]
        ("level-zero", gpu) => Box::new(dmabuf_rdma::exporter::LevelZero::load()?.with_device(number(gpu)?)?),
        _ if LEFT_OUT.contains(&kind) => {
            return Err(format!("this program was built without the feature {kind}").into());
        }
        _ => return Err(format!("exporter {name:?} is unknown; use one of {NAMES}").into()),
    })
}

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
fn number(text: &str) -> Result<usize> {
    if text.is_empty() {
        Ok(0)
    } else {
        Ok(text.parse().map_err(|_| format!("{text:?} is no number of a GPU"))?)
    }
}
