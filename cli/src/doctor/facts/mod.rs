//! What there is: kernel, process, limits, libraries, nodes, devices, GPUs. Nothing is tried here.

mod devices;
mod kernel;
mod libraries;
mod limits;
mod nodes;
mod pci;
mod process;
mod runtimes;

use serde::{Deserialize, Serialize};

pub use devices::{Device, Port};
pub use kernel::Kernel;
pub use libraries::Libraries;
pub use limits::{Limits, SoftHard};
pub use nodes::Node;
pub use pci::{Gpu, Iommu, PciPlace};
pub use process::Process;
pub use runtimes::{Problem, Runtime};

use super::look::{Fact, Look};

/// What doctor knows of the machine, the container and the user.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub host: Fact<String>,
    pub kernel: Kernel,
    pub process: Process,
    pub limits: Limits,
    pub libraries: Libraries,
    pub nodes: Vec<Node>,
    pub devices: Vec<Device>,
    pub gpus: Fact<Vec<Gpu>>,
    pub iommu: Iommu,
    pub runtimes: Vec<Runtime>,
}

impl Facts {
    pub fn gather(look: &Look) -> Self {
        let devices = devices::gather(look);
        let gpus = pci::gpus(look);
        Self {
            host: look.text("/proc/sys/kernel/hostname"),
            kernel: Kernel::gather(look),
            process: Process::gather(look),
            limits: Limits::gather(look),
            libraries: Libraries::gather(look),
            nodes: nodes::gather(look),
            runtimes: runtimes::gather(look),
            iommu: pci::iommu(look),
            gpus,
            devices,
        }
    }
}
