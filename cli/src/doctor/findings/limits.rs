//! Findings about limits, memory, the kernel and what is hidden.

use super::{Finding, Id, Severity};
use crate::doctor::facts::Facts;
use crate::ui::bytes;

/// Below this, common programs meet the limit.
const FEW_FILES: u64 = 4096;
const LITTLE_MEMORY: u64 = 1 << 30;

pub fn find(facts: &Facts, all: &mut Vec<Finding>) {
    let (limits, process) = (&facts.limits, &facts.process);
    if let Some(memlock) = limits.memlock.known().and_then(|limit| limit.soft)
        && !process.may("CAP_IPC_LOCK")
    {
        let pinned = limits.pinned.known().copied().unwrap_or(0);
        all.push(Finding::new(
            Id::Memlock,
            "host memory",
            format!(
                "RLIMIT_MEMLOCK is {}, and {} are pinned: ibv_reg_mr refuses more host memory, and some NICs their \
                 queues (ENOMEM); dma-bufs are not charged",
                bytes(memlock),
                bytes(pinned)
            ),
            "ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 for a container",
        ));
    }
    if let Some(files) = limits.nofile.known().and_then(|limit| limit.soft)
        && files < FEW_FILES
    {
        let open = limits.open_files.known().copied().unwrap_or(0);
        let severity = if files < open + 64 { Severity::Limits } else { Severity::Note };
        let finding = Finding::new(
            Id::OpenFiles,
            "this process",
            format!("a process may have {files} files open, and each dma-buf is one until it is registered"),
            "ulimit -n 1048576, LimitNOFILE= in a systemd unit, --ulimit nofile= for a container",
        );
        all.push(finding.with(severity));
    }
    if let Some(Some(cgroup)) = limits.cgroup_memory.known() {
        let severity = if cgroup.left < LITTLE_MEMORY { Severity::Limits } else { Severity::Note };
        let finding = Finding::new(
            Id::CgroupMemory,
            "udmabuf, host memory",
            format!(
                "the cgroup permits {} of memory and leaves {} ({})",
                bytes(cgroup.limit),
                bytes(cgroup.left),
                cgroup.file
            ),
            "raise its memory.max (--memory of a container, resources.limits of a pod); a dma-heap's memory is not charged",
        );
        all.push(finding.with(severity));
    }
    if let Some(left) = limits.memory_available.known().filter(|left| **left < LITTLE_MEMORY / 4) {
        let cause = format!("the machine has {} of memory available", bytes(*left));
        all.push(Finding::new(Id::OutOfMemory, "the machine", cause, "end programs, or add memory"));
    }
    udmabuf(facts, all);
    if !limits.huge_pages.is_empty() && limits.huge_pages.iter().all(|pool| pool.free == 0) {
        let sizes: Vec<_> = limits.huge_pages.iter().map(|pool| bytes(pool.bytes)).collect();
        all.push(Finding::new(
            Id::HugePages,
            "udmabuf of huge pages",
            format!("no huge page is free ({})", sizes.join(", ")),
            "echo COUNT > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages, soon after boot",
        ));
    }
    if limits.shmem_huge_pages.known().is_some_and(|chosen| chosen == "never" || chosen == "deny") {
        all.push(Finding::new(
            Id::ShmemHugePages,
            "udmabuf:thp",
            "memfds get no transparent huge pages, so that a udmabuf has a page of 4 KiB for each entry"
                .into(),
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ));
    }
    kernel(facts, all);
    hidden(facts, all);
}

fn udmabuf(facts: &Facts, all: &mut Vec<Finding>) {
    let limits = &facts.limits;
    let size = limits.udmabuf_size_mb.known().filter(|size| **size < 1024);
    let list = limits.udmabuf_list.known().filter(|list| **list <= 1024);
    if size.is_none() && list.is_none() {
        return;
    }
    let shown = |known: Option<&u64>| known.map_or("an unknown number of".to_owned(), u64::to_string);
    all.push(Finding::new(
        Id::UdmabufLimit,
        "udmabuf",
        format!(
            "a udmabuf has at most {} MiB in {} ranges",
            shown(limits.udmabuf_size_mb.known()),
            shown(limits.udmabuf_list.known())
        ),
        "raise size_limit_mb and list_limit in /sys/module/udmabuf/parameters, also at run time",
    ));
}

fn kernel(facts: &Facts, all: &mut Vec<Finding>) {
    let kernel = &facts.kernel;
    let release = kernel.release.known().map_or("unknown", String::as_str);
    for (major, minor, severity, what) in [
        (5, 12, Severity::Blocks, "imports no dma-bufs into RDMA devices"),
        (5, 6, Severity::Limits, "has no dma-heaps"),
        (5, 3, Severity::Limits, "has no dma-buf file system, by which a dma-buf is recognized"),
        (6, 0, Severity::Note, "does not export or import the fences of a dma-buf"),
    ] {
        if kernel.is_before(major, minor) {
            let cause = format!("Linux {release} {what}");
            let remedy = format!("use Linux {major}.{minor} or later");
            all.push(Finding::new(Id::OldKernel, "the kernel", cause, remedy).with(severity));
        }
    }
    let old = kernel.is_before(6, 19);
    let lacks = kernel.option("CONFIG_VFIO_PCI_DMABUF") == Some("n");
    if old || lacks || facts.iommu.units.is_empty() {
        let cause = match (old || lacks, facts.iommu.units.is_empty()) {
            (true, _) => format!("Linux {release} does not export PCI BARs through VFIO"),
            (false, true) => "no IOMMU is on, without which VFIO opens no device".into(),
            (false, false) => return,
        };
        let remedy = "only for exporter::VfioDevice: Linux 6.19 with CONFIG_VFIO_PCI_DMABUF, and an IOMMU (intel_iommu=on, or the firmware)";
        all.push(Finding::new(Id::VfioUnavailable, "PCI BARs", cause, remedy));
    }
}

fn hidden(facts: &Facts, all: &mut Vec<Finding>) {
    for (why, what) in [
        (facts.gpus.why(), "/sys is not there: no PCI topology, link states or modules were seen"),
        (
            facts.limits.memory_total.why(),
            "/proc is not there, or hidden: no limits were seen, and dma-bufs cannot be inspected",
        ),
    ] {
        if let Some(why) = why {
            let cause = format!("{what} ({why})");
            let remedy = "mount -t sysfs sysfs /sys, mount -t proc proc /proc; containers get both unless they are masked";
            all.push(Finding::new(Id::FilesHidden, "this container", cause, remedy));
        }
    }
    if facts.process.capabilities.known().is_some() && !facts.process.may("CAP_SYS_ADMIN") {
        let cause = "without CAP_SYS_ADMIN /proc/self/pagemap hides physical addresses";
        let remedy = "only for `dmabuf-rdma explain`: run it as root";
        all.push(Finding::new(Id::FramesHidden, "explain", cause.into(), remedy));
    }
    if !facts.kernel.has("dma_sg") && facts.kernel.modules.known().is_some() {
        let cause = "the module dma_sg is not loaded, which shows a device's addresses of a dma-buf";
        let remedy = "only for `dmabuf-rdma explain`: build and load kernel/dma_sg";
        all.push(Finding::new(Id::DmaSgMissing, "explain", cause.into(), remedy));
    }
}
