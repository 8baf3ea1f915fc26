//! The runtimes of GPUs: whether their libraries load, and which devices they show.

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
use dmabuf_rdma::exporter::{Error, PointerError};
use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look};

/// A runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    pub name: String,
    /// Its devices, by their PCI addresses where it tells them; or why it cannot be used.
    pub devices: Fact<Vec<String>>,
    pub version: Option<String>,
    /// What each device can do, where the runtime tells.
    pub attributes: Vec<Attributes>,
    /// What is wrong, if it cannot be used.
    pub problem: Option<Problem>,
}

/// What a driver says of a device; `None` if it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    pub exports_dmabufs: Option<bool>,
    pub does_gpu_direct: Option<bool>,
}

/// Why a runtime cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    Missing,
    TooOld,
    NoDevice,
    NotPermitted,
    Failed,
}

pub fn gather(look: &Look) -> Vec<Runtime> {
    if !look.here {
        return Vec::new();
    }
    Vec::from([
        #[cfg(feature = "cuda")]
        cuda(),
        #[cfg(feature = "hsa")]
        runtime("ROCm", dmabuf_rdma::exporter::Hsa::load().map(|hsa| addresses(hsa.devices()))),
        #[cfg(feature = "level-zero")]
        runtime("Level Zero", dmabuf_rdma::exporter::LevelZero::load().map(|zero| addresses(zero.devices()))),
    ])
}

#[cfg(feature = "cuda")]
fn cuda() -> Runtime {
    use dmabuf_rdma::exporter::Cuda;
    let loaded = Cuda::load();
    let version = loaded.as_ref().ok().and_then(Cuda::version);
    let version = version.map(|(major, minor)| format!("{major}.{minor}"));
    let of_each = |cuda: &Cuda| -> Vec<Attributes> {
        let devices = (0..cuda.devices().len()).filter_map(|ordinal| cuda.clone().with_device(ordinal).ok());
        let of_one = |gpu: Cuda| Attributes {
            exports_dmabufs: gpu.exports_dmabufs(),
            does_gpu_direct: gpu.does_gpu_direct(),
        };
        devices.map(of_one).collect()
    };
    let attributes = loaded.as_ref().map(of_each).unwrap_or_default();
    Runtime { version, attributes, ..runtime("CUDA", loaded.map(|cuda| addresses(cuda.devices()))) }
}

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
fn addresses(devices: impl Iterator<Item = Option<dma_sg::pci::PciAddress>>) -> Vec<String> {
    devices.map(|address| address.map_or("not on PCI".into(), |address| address.to_string())).collect()
}

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
fn runtime(name: &str, loaded: Result<Vec<String>, Error>) -> Runtime {
    let problem = loaded.as_ref().err().map(|error| match error {
        Error::Pointer(PointerError::RuntimeMissing { .. }) => Problem::Missing,
        Error::Pointer(PointerError::RuntimeTooOld { .. }) => Problem::TooOld,
        Error::Pointer(PointerError::NoDevice { .. }) => Problem::NoDevice,
        Error::NotPermitted { .. } => Problem::NotPermitted,
        _ => Problem::Failed,
    });
    let (version, attributes) = (None, Vec::new());
    Runtime { name: name.into(), devices: Fact::from(loaded), version, attributes, problem }
}
