//! What to know and to do, most useful first.

mod gpu;
mod limits;
mod rdma;

use std::fmt;

use serde::{Deserialize, Serialize};

use super::facts::Facts;
use super::failure::Failure;
use super::trials::Trials;
pub use rdma::port_down;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something does not work because of it.
    Blocks,
    /// Something works, but not for all sizes, users or speeds.
    Limits,
    /// Worth knowing.
    Note,
}

/// Declares the findings in the order in which they are told, with their names and what they mean.
macro_rules! findings {
    ($($(#[doc = $doc:literal])* $name:ident: $severity:ident,)*) => {
        /// A finding's name, the same in every release. docs/doctor.md explains each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Id {
            $($(#[doc = $doc])* $name,)*
        }

        impl Id {
            #[cfg(test)]
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// How much it matters usually.
            pub fn severity(self) -> Severity {
                match self {
                    $(Self::$name => Severity::$severity,)*
                }
            }
        }
    };
}

findings! {
    /// The kernel has no RDMA device here.
    NoDevice: Blocks,
    /// ib_uverbs does not have the device.
    UverbsMissing: Blocks,
    /// The device's node is not in /dev/infiniband, or leads nowhere.
    NodeMissing: Blocks,
    /// This user or this container may not open the device's node.
    NodeForbidden: Blocks,
    /// libibverbs has no provider for the device.
    ProviderMissing: Blocks,
    /// A seccomp filter may have refused a system call.
    Seccomp: Blocks,
    /// A verbs object could not be made.
    DeviceFailed: Blocks,
    /// The port carries no traffic.
    PortDown: Blocks,
    /// The port has no GID that this process can use.
    NoGid: Blocks,
    /// No path of the device imports dma-bufs.
    ImportUnsupported: Blocks,
    /// The answer of a probe is neither yes nor no.
    ProbeUnclear: Blocks,
    /// The device lacks something that connections need.
    Unavailable: Blocks,
    /// Memory registers, but does not transfer.
    DeadRegistration: Blocks,
    /// Transfers move other bytes.
    WrongBytes: Blocks,
    /// A transfer failed for another reason.
    TransferFailed: Blocks,
    /// The device does not take memory without struct pages.
    MemoryWithoutPages: Blocks,
    /// A registration was refused for another reason.
    Refused: Blocks,
    /// RLIMIT_MEMLOCK is low.
    Memlock: Limits,
    /// Few file descriptors are free, or permitted.
    OpenFiles: Limits,
    /// An exporter's device is not there.
    ExporterMissing: Limits,
    /// This user may not open an exporter's device.
    ExporterForbidden: Limits,
    /// There is too little memory.
    OutOfMemory: Limits,
    /// The cgroup limits memory.
    CgroupMemory: Limits,
    /// An exporter makes no buffer.
    ExporterFailed: Limits,
    /// udmabuf permits only small buffers.
    UdmabufLimit: Limits,
    /// The user-space provider has no ibv_reg_dmabuf_mr.
    ProviderLacksImport: Limits,
    /// All GIDs are link-local.
    LinkLocalGids: Limits,
    /// The connection manager cannot be used.
    Manager: Limits,
    /// A GPU runtime is not installed.
    RuntimeMissing: Note,
    /// A GPU runtime is too old to export dma-bufs.
    RuntimeTooOld: Note,
    /// A GPU runtime shows no device.
    RuntimeNoDevice: Note,
    /// This user may not use the GPU.
    RuntimeForbidden: Note,
    /// A GPU runtime does not start.
    RuntimeFailed: Note,
    /// NVIDIA's kernel modules are not the open ones.
    NvidiaClosed: Limits,
    /// The GPU's driver does not export its memory.
    NotExportable: Limits,
    /// A NIC reaches only a part of the GPU's memory.
    SmallBar: Limits,
    /// DMA cannot go to a GPU's memory.
    BarUnusable: Limits,
    /// A GPU and its nearest NIC are on two sockets.
    TwoSockets: Limits,
    /// ACS sends traffic between GPU and NIC through the root complex.
    AcsRedirect: Limits,
    /// Traffic between GPU and NIC passes the root complex.
    RootComplex: Limits,
    /// Whether ACS redirects needs root to read.
    AcsUnknown: Note,
    /// The kernel was built without peer-to-peer DMA.
    P2pdmaOff: Limits,
    /// The IOMMU translates what the GPU or the NIC sends.
    IommuTranslates: Note,
    /// The kernel is too old for something.
    OldKernel: Limits,
    /// The MTU of RoCE is below 4096.
    SmallMtu: Note,
    /// The device executes no atomics.
    NoAtomics: Note,
    /// There was no time for some pairs.
    Untried: Note,
    /// Connections on iWARP are by IP address only.
    Iwarp: Note,
    /// soft-RoCE may refuse large regions of host memory.
    LargeHostRegions: Note,
    /// No huge page is free.
    HugePages: Note,
    /// memfds get no transparent huge pages.
    ShmemHugePages: Note,
    /// /sys or /proc is hidden.
    FilesHidden: Note,
    /// Physical addresses are hidden from this user.
    FramesHidden: Note,
    /// The module dma_sg is not loaded.
    DmaSgMissing: Note,
    /// PCI BARs cannot be exported through VFIO.
    VfioUnavailable: Note,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A cause with its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub id: Id,
    pub severity: Severity,
    pub cause: String,
    pub remedy: String,
    /// What it concerns: devices, exporters, pairs.
    pub affects: Vec<String>,
}

impl Finding {
    fn new(id: Id, affects: &str, cause: String, remedy: impl Into<String>) -> Self {
        let affects = vec![affects.to_owned()];
        Self { id, severity: id.severity(), cause, remedy: remedy.into(), affects }
    }

    fn with(self, severity: Severity) -> Self {
        Self { severity, ..self }
    }
}

/// All findings. `trials` is `None` for a copy of another machine's files.
pub fn find(facts: &Facts, trials: Option<&Trials>) -> Vec<Finding> {
    let mut all = Vec::new();
    if let Some(trials) = trials {
        all.extend(failures(trials).map(|failure| {
            let Failure { id, what, cause, remedy, .. } = failure.clone();
            Finding::new(id, &what, cause, remedy)
        }));
    }
    rdma::find(facts, trials, &mut all);
    limits::find(facts, &mut all);
    gpu::find(facts, &mut all);
    merged(all)
}

fn failures(trials: &Trials) -> impl Iterator<Item = &Failure> {
    let of_devices = trials.devices.iter().flat_map(|device| &device.failures);
    let of_exporters = trials.exporters.iter().filter_map(|exporter| exporter.failure.as_ref());
    let of_pairs = trials.pairs.iter().filter_map(|pair| pair.failure.as_ref());
    trials.listing.iter().chain(of_devices).chain(of_exporters).chain(of_pairs).chain(&trials.manager)
}

/// One finding for each cause, most useful first.
fn merged(all: Vec<Finding>) -> Vec<Finding> {
    let mut merged: Vec<Finding> = Vec::new();
    for finding in all {
        let same = |known: &&mut Finding| known.id == finding.id && known.cause == finding.cause;
        match merged.iter_mut().find(same) {
            Some(known) => {
                known.severity = known.severity.min(finding.severity);
                let new = finding.affects.into_iter().filter(|one| !known.affects.contains(one));
                known.affects.extend(new.collect::<Vec<_>>());
            }
            None => merged.push(finding),
        }
    }
    merged.sort_by_key(|finding| (finding.severity, finding.id));
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(name: &str) -> String {
        std::fs::read_to_string(format!("{}/../docs/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    /// An error of the library is announced by a finding, or the page says why not.
    #[test]
    fn the_page_names_every_error() {
        let (ours, errors) = (page("doctor.md"), page("errors.md") + &page("errors-memory.md"));
        let headings = errors.lines().filter_map(|line| line.strip_prefix("### `"));
        let names = headings.filter_map(|line| line.split('`').next());
        let missing: Vec<_> = names.filter(|name| !ours.contains(&format!("{name}`"))).collect();
        assert!(missing.is_empty(), "docs/doctor.md says nothing of {missing:?}");
    }

    #[test]
    fn the_page_explains_every_finding() {
        let page = page("doctor.md");
        let rows = |id: &Id| page.lines().filter(|line| line.starts_with(&format!("| `{id}` |"))).count();
        let wrong: Vec<_> = Id::ALL.iter().filter(|id| rows(id) != 1).map(ToString::to_string).collect();
        assert!(wrong.is_empty(), "docs/doctor.md needs one row for each of {wrong:?}");
    }
}
