//! Findings about GPUs, their runtimes, and their routes to the NICs.

use super::{Finding, Id, Severity};
use crate::doctor::facts::{Facts, Gpu, Problem, Runtime};
use crate::ui::bytes;

pub fn find(facts: &Facts, all: &mut Vec<Finding>) {
    facts.runtimes.iter().for_each(|runtime| of_runtime(runtime, facts, all));
    if facts.kernel.nvidia_open == Some(false) {
        all.push(Finding::new(
            Id::NvidiaClosed,
            "CUDA",
            "NVIDIA's kernel modules are the closed ones, which do not export GPU memory as dma-bufs".into(),
            "install the open kernel modules (Turing or later), or use nvidia_peermem with ibv_reg_mr",
        ));
    }
    let gpus = facts.gpus.known().map(Vec::as_slice).unwrap_or_default();
    for gpu in gpus.iter().filter(|gpu| gpu.vendor.is_some()) {
        of_gpu(gpu, all);
    }
    let known = gpus.iter().any(|gpu| gpu.vendor.is_some());
    // NVIDIA's driver maps its memory by itself.
    let needs = |gpu: &Gpu| gpu.vendor.as_deref().is_some_and(|vendor| vendor != "NVIDIA");
    if gpus.iter().any(needs) && facts.kernel.option("CONFIG_PCI_P2PDMA") == Some("n") {
        all.push(Finding::new(
            Id::P2pdmaOff,
            "GPUs",
            "the kernel was built without CONFIG_PCI_P2PDMA: amdgpu and xe map no GPU's memory for a NIC"
                .into(),
            "use a kernel that has it (Debian from 7.x, Ubuntu from 22.04, RHEL from 9)",
        ));
    }
    let nics = facts.devices.iter().filter_map(|device| Some((&device.name, device.pci.as_ref()?)));
    let on_gpus = gpus.iter().filter(|gpu| gpu.vendor.is_some()).map(|gpu| (&gpu.place.address, &gpu.place));
    let translated: Vec<&str> = nics
        .chain(on_gpus)
        .filter(|(_, place)| place.iommu_domain.as_deref().is_some_and(|domain| domain.starts_with("DMA")))
        .map(|(name, _)| name.as_str())
        .collect();
    if known && !translated.is_empty() {
        let finding = Finding::new(
            Id::IommuTranslates,
            "GPUs",
            format!(
                "the IOMMU translates the addresses of {}, which slows peer-to-peer traffic or blocks it",
                translated.join(", ")
            ),
            "boot with iommu=pt, if the devices need no isolation",
        );
        all.push(finding);
    }
}

fn of_runtime(runtime: &Runtime, facts: &Facts, all: &mut Vec<Finding>) {
    let name = &runtime.name;
    for (at, attributes) in runtime.attributes.iter().enumerate() {
        if attributes.exports_dmabufs == Some(false) {
            all.push(Finding::new(
                Id::NotExportable,
                name,
                format!(
                    "{name} device {at} does not export dma-bufs (CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED is 0)"
                ),
                "install the open kernel modules of NVIDIA's driver; the GPU must be Turing or later",
            ));
        }
    }
    let (Some(problem), Some(why)) = (runtime.problem, runtime.devices.why()) else { return };
    let (vendor, nodes, variables) = match name.as_str() {
        "CUDA" => ("NVIDIA", "/dev/nvidia", &["CUDA_", "NVIDIA_"]),
        "ROCm" => ("AMD", "/dev/kfd", &["ROCR_", "HIP_"]),
        _ => ("Intel", "/dev/dri/renderD", &["ZE_", "ONEAPI_"]),
    };
    let on_pci = |gpu: &Gpu| gpu.vendor.as_deref() == Some(vendor);
    let has_node = vendor != "Intel" && facts.nodes.iter().any(|node| node.path.starts_with(nodes));
    let is_here = has_node || facts.gpus.known().is_some_and(|gpus| gpus.iter().any(on_pci));
    let its = |set: &&String| variables.iter().any(|start| set.starts_with(start));
    let hiding: Vec<&str> = facts.process.hiding.iter().filter(its).map(String::as_str).collect();
    let (cause, remedy) = crate::doctor::failure::split(why);
    let id = match problem {
        Problem::Missing => Id::RuntimeMissing,
        Problem::TooOld => Id::RuntimeTooOld,
        Problem::NoDevice => Id::RuntimeNoDevice,
        Problem::NotPermitted => Id::RuntimeForbidden,
        Problem::Failed => Id::RuntimeFailed,
    };
    // Without such a GPU nobody needs the runtime.
    let hidden = problem == Problem::NoDevice && !hiding.is_empty();
    let severity = if is_here || hidden { Severity::Limits } else { Severity::Note };
    let set = if hidden { format!(" ({})", hiding.join(", ")) } else { String::new() };
    all.push(Finding::new(id, name, format!("{cause}{set}"), remedy).with(severity));
}

fn of_gpu(gpu: &Gpu, all: &mut Vec<Finding>) {
    let address = &gpu.place.address;
    if let Some(bar) = gpu.largest_bar.known().filter(|bar| (1..=256 << 20).contains(*bar)) {
        all.push(Finding::new(
            Id::SmallBar,
            address,
            format!(
                "the GPU {address} shows only {} of its memory on the bus, which is all that a NIC reaches",
                bytes(*bar)
            ),
            "switch on \"Above 4G decoding\" and \"Resizable BAR\" in the firmware",
        ));
    }
    if let Some(problem) = &gpu.bar_problem {
        let (cause, remedy) = crate::doctor::failure::split(problem);
        let cause = format!("no NIC reaches the memory of the GPU {address}: {cause}");
        all.push(Finding::new(Id::BarUnusable, address, cause, remedy));
    }
    let Some(nearest) = gpu.routes.known().and_then(|routes| routes.first()) else { return };
    let pair = format!("the GPU {address} and its nearest NIC, {}, are {}", nearest.nic, nearest.through);
    let ports = nearest.acs.join(";");
    let finding = match nearest.below_root {
        Some(true) => return,
        None => Finding::new(
            Id::AcsUnknown,
            address,
            format!("{pair}; only root can read whether ACS of {ports} redirects their traffic"),
            "run doctor as root",
        ),
        Some(false) if nearest.two_sockets => Finding::new(
            Id::TwoSockets,
            address,
            format!(
                "{pair}: traffic crosses the link between the sockets, which is slow or does not forward it"
            ),
            "use a GPU and a NIC of one socket",
        ),
        Some(false) if !nearest.acs.is_empty() => Finding::new(
            Id::AcsRedirect,
            address,
            format!("{pair}, but ACS of {ports} sends their traffic through the root complex"),
            format!("if they need no isolation from each other: boot with pci=disable_acs_redir={ports}"),
        ),
        Some(false) => Finding::new(
            Id::RootComplex,
            address,
            format!(
                "{pair}: traffic passes the root complex, which the kernel permits only for host bridges known to forward it"
            ),
            "prefer a GPU and a NIC below one switch; without one, expect less than the link's rate",
        ),
    };
    all.push(finding);
}
