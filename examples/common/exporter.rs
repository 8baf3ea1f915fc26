//! Exporters by name, for the option `--exporter`.

use std::error::Error;

use dmabuf_rdma::exporter::{DmaHeap, Exporter, PageKind, Udmabuf};

/// Opens the exporter `heap`, `heap:NAME`, `udmabuf`, `udmabuf:thp`, `udmabuf:2M` or `drm:DRIVER`.
pub fn by_name(name: &str) -> Result<Box<dyn Exporter>, Box<dyn Error>> {
    let (kind, detail) = name.split_once(':').unwrap_or((name, ""));
    Ok(match (kind, detail) {
        ("heap", "") => Box::new(DmaHeap::open("system")?),
        ("heap", heap) => Box::new(DmaHeap::open(heap)?),
        ("udmabuf", "") => Box::new(Udmabuf::open()?),
        ("udmabuf", "thp") => Box::new(Udmabuf::open()?.with_pages(PageKind::Transparent)),
        ("udmabuf", "2M") => Box::new(Udmabuf::open()?.with_pages(PageKind::HUGE_2M)),
        #[cfg(feature = "drm")]
        ("drm", driver) => Box::new(dmabuf_rdma::exporter::DumbBuffers::by_driver(driver)?),
        _ => {
            let known = "heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER";
            return Err(format!("exporter {name:?} is unknown; use one of {known}").into());
        }
    })
}
