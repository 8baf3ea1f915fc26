//! A step that failed, as a person reads it: the cause, and what to do.

use dmabuf_rdma::exporter::{self, PointerError};
use dmabuf_rdma::mr::RegisterError;
use dmabuf_rdma::{Error, cm, transfer, verbs};
use serde::{Deserialize, Serialize};

use super::facts::Facts;
use super::findings::{Id, port_down};

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The finding that explains it.
    pub id: Id,
    /// What was tried: `udmabuf on rxe0`.
    pub what: String,
    pub cause: String,
    pub remedy: String,
    pub errno: Option<i32>,
}

/// A remedy where the library's message has none.
const REPORT: &str = "see docs/errors.md for the errno; dmesg may say more";

impl Failure {
    /// The failure of an exporter, a device or a registration.
    pub fn of(error: &Error, what: &str, facts: &Facts) -> Self {
        let errno = error.errno();
        let (id, (cause, remedy)) = explained(error, what, facts);
        let cause = with_errno(without_number(&cause, "queue pair "), errno);
        let failure = Self { id, what: what.into(), cause, remedy, errno };
        failure.unless_filtered(facts)
    }

    /// The failure of a transfer with memory that is registered.
    pub fn of_transfer(error: &Error, what: &str, facts: &Facts) -> Self {
        let device = what.rsplit(' ').next().unwrap_or(what);
        let failure = Self::of(error, what, facts);
        let how = match error {
            Error::Transfer(transfer::Error::Failed { status, .. }) => format!("{status:?}"),
            Error::Transfer(transfer::Error::Timeout { .. }) => "they time out".into(),
            _ => return failure,
        };
        Self {
            id: Id::DeadRegistration,
            cause: format!("memory registers with {device}, but its transfers fail ({how})"),
            remedy: format!(
                "do not use this memory with {device}: compare the routes between the devices, switch off ACS \
                 redirection and the IOMMU's translation between them, or update the driver"
            ),
            ..failure
        }
    }

    /// No port of the device carries traffic; `None` if the facts have none that is down.
    pub fn port_down(what: &str, device: &str, facts: &Facts) -> Option<Self> {
        let device = facts.devices.iter().find(|known| known.name == device)?;
        let (cause, remedy) = device.ports.iter().find_map(|port| port_down(device, port))?;
        Some(Self { id: Id::PortDown, what: what.into(), cause, remedy, errno: None })
    }

    /// Transfers succeeded, and moved other bytes.
    pub fn wrong_bytes(what: &str, at: u64, seen: u8, expected: u8) -> Self {
        Self {
            id: Id::WrongBytes,
            what: what.into(),
            cause: format!(
                "{what}: transfers succeed, but byte {at:#x} is {seen:#04x} afterwards instead of {expected:#04x}"
            ),
            remedy: "do not use this memory with the device, and report kernel, driver and exporter".into(),
            errno: None,
        }
    }

    /// iWARP connects by IP address only.
    pub fn iwarp(device: &str) -> Self {
        Self {
            id: Id::Iwarp,
            what: device.into(),
            cause: format!(
                "{device} is on iWARP, which connects by IP address only, so no transfer to itself was tried"
            ),
            remedy: "try two devices: `dmabuf-rdma ping --listen ADDRESS` and `--connect ADDRESS`".into(),
            errno: None,
        }
    }

    /// A system call that a seccomp filter may have refused says so.
    fn unless_filtered(mut self, facts: &Facts) -> Self {
        const REFUSALS: &[i32] = &[nix::libc::EPERM, nix::libc::ENOSYS];
        let refused = self.errno.is_some_and(|errno| REFUSALS.contains(&errno));
        if refused && facts.process.is_filtered() && self.id != Id::MemoryWithoutPages {
            self.id = Id::Seccomp;
            self.cause += "; a seccomp filter is active, which may have refused the system call";
            self.remedy =
                "run the container with a profile that permits it (--security-opt seccomp=PROFILE.json), \
                           and compare with seccomp=unconfined"
                    .into();
        }
        self
    }
}

/// The finding, the cause and the remedy of an error.
fn explained(error: &Error, what: &str, facts: &Facts) -> (Id, (String, String)) {
    let text = error.to_string();
    let known = |cause: String, remedy: &str| (cause, remedy.to_owned());
    match error {
        Error::Register(error) => registration(error, facts),
        Error::Exporter(error) => exporting(error, what),
        Error::Host(error) => match error {
            dmabuf_rdma::host::Error::Allocate(error) => exporting(error, what),
            _ => (Id::ExporterFailed, split(&text)),
        },
        Error::Verbs(error) => device(error, &text, facts),
        Error::Transfer(error) => match error {
            transfer::Error::PortDown { .. } => (Id::PortDown, split(&text)),
            transfer::Error::Verbs(error) => device(error, &error.to_string(), facts),
            _ => (Id::TransferFailed, known(format!("{what}: {text}"), REPORT)),
        },
        Error::Connect(cm::Error::NoManager { reason, .. }) => {
            let (cause, remedy) = split(reason);
            (Id::Manager, (format!("no connections by IP address: {cause}"), remedy))
        }
        Error::Connect(_) => (Id::Manager, known(format!("no connections by IP address: {text}"), REPORT)),
        _ => (Id::TransferFailed, split(&text)),
    }
}

fn registration(error: &RegisterError, facts: &Facts) -> (Id, (String, String)) {
    let text = error.to_string();
    match error {
        RegisterError::ImportUnsupported { device, refusals } => {
            let refusals: Vec<_> = refusals.iter().map(ToString::to_string).collect();
            (Id::ImportUnsupported, import_unsupported(device, &refusals, facts))
        }
        RegisterError::MemoryWithoutPages { device, .. } => (
            Id::MemoryWithoutPages,
            (
                format!(
                    "{device} imports dma-bufs, but not memory without struct pages: video memory or a PCI BAR"
                ),
                "use a NIC that does peer-to-peer DMA, or a buffer in system memory (udmabuf, a dma-heap)"
                    .into(),
            ),
        ),
        RegisterError::MemlockLimit { .. } => (Id::Memlock, split(&text)),
        RegisterError::Refused { device, path, memory, source, .. } => {
            let remedy = match source.raw_os_error() {
                Some(524) => {
                    "the exporter's driver does not map its memory for this device: use another NIC or exporter"
                }
                Some(nix::libc::ENOMEM) => "free memory, or register less at once",
                _ => REPORT,
            };
            (Id::Refused, (format!("{device} refuses {memory} through {path}"), remedy.into()))
        }
        RegisterError::Host(error) => (Id::ExporterFailed, split(&error.to_string())),
        RegisterError::Verbs(error) => device(error, &text, facts),
        _ => (Id::Refused, split(&text)),
    }
}

/// A device that imports through no path.
pub fn import_unsupported(device: &str, refusals: &[String], facts: &Facts) -> (String, String) {
    let software = facts.devices.iter().any(|known| known.name == device && known.is_software());
    let remedy = match software {
        true => {
            "no released soft-RoCE or soft-iWARP imports dma-bufs: use a NIC, or for tests the module of kernel/rxe; a \
             udmabuf of your own registers by HostMapping"
        }
        false => {
            "update kernel, driver and rdma-core (docs/kernel-support.md lists which have it); a udmabuf of your own \
             registers by HostMapping"
        }
    };
    (format!("{device} imports no dma-bufs ({})", refusals.join("; ")), remedy.into())
}

fn exporting(error: &exporter::Error, what: &str) -> (Id, (String, String)) {
    use exporter::Error as E;
    let text = error.to_string();
    let both = |cause: String, remedy: &str| (cause, remedy.to_owned());
    match error {
        E::Missing { device, remedy, .. } => {
            (Id::ExporterMissing, both(format!("{device} is missing"), remedy))
        }
        E::NotPermitted { device, remedy, .. } => {
            (Id::ExporterForbidden, both(format!("this user may not open {device}"), remedy))
        }
        E::UdmabufLimit { .. } => (Id::UdmabufLimit, split(&text)),
        E::HugePages { .. } => (Id::HugePages, split(&text)),
        E::OutOfMemory { .. } => {
            (Id::OutOfMemory, both(text, "free memory, or raise the limit that the message names"))
        }
        E::Pointer(PointerError::RuntimeMissing { runtime, library, remedy, .. }) => (
            Id::RuntimeMissing,
            both(format!("{runtime} is missing, because {library} cannot be loaded"), remedy),
        ),
        E::Pointer(PointerError::RuntimeTooOld { .. }) => (Id::RuntimeTooOld, split(&text)),
        E::Pointer(PointerError::NotExportable { runtime, remedy }) => (
            Id::NotExportable,
            both(format!("{runtime} does not export its memory as a dma-buf ({what})"), remedy),
        ),
        E::Allocate { .. } => {
            let remedy = "this card or driver makes no such buffers: use another exporter";
            let (cause, own) = split(&text);
            (Id::ExporterFailed, (cause, if own == REPORT { remedy.into() } else { own }))
        }
        E::Unusable { .. } => {
            (Id::ExporterFailed, both(text, "another program may use it, or it is another kind of device"))
        }
        _ => (Id::ExporterFailed, split(&text)),
    }
}

fn device(error: &verbs::Error, text: &str, facts: &Facts) -> (Id, (String, String)) {
    use verbs::Error as E;
    match error {
        E::ListDevices { reason, .. } => (hidden(reason, facts), split(reason)),
        E::UnknownDevice { name, reason, .. } if !reason.is_empty() => {
            // The kernel's devices are listed with the others; this is about one that libibverbs leaves out.
            let id = if name.is_empty() { Id::NoDevice } else { hidden(reason, facts) };
            (id, split(reason))
        }
        E::Device { device, operation, source } => match operation.strip_prefix("open the device: ") {
            Some(reason) => {
                let (cause, remedy) = split(reason);
                let forbidden = matches!(source.raw_os_error(), Some(nix::libc::EACCES | nix::libc::EPERM));
                let id = if forbidden { Id::NodeForbidden } else { Id::NodeMissing };
                (id, (format!("{device} cannot be opened: {cause}"), remedy))
            }
            None if operation.contains("imports dma-bufs through") => (Id::ProbeUnclear, split(text)),
            None => (Id::DeviceFailed, split(text)),
        },
        E::Unavailable { device, operation, needs, .. } => {
            (Id::Unavailable, (format!("{device} has no {operation}"), format!("it needs {needs}")))
        }
        E::NoGid { device, port, reason } => {
            let (cause, remedy) = split(reason);
            match remedy.as_str() {
                REPORT => (Id::NoGid, (format!("{device} port {port} has no usable GID"), cause)),
                _ => (Id::NoGid, (format!("{device} port {port} has no usable GID: {cause}"), remedy)),
            }
        }
        _ => (Id::DeviceFailed, split(text)),
    }
}

/// What hides a device from libibverbs, by what is there.
fn hidden(reason: &str, facts: &Facts) -> Id {
    if reason.starts_with("the kernel has no RDMA device") {
        Id::NoDevice
    } else if reason.contains("ib_uverbs") {
        Id::UverbsMissing
    } else if reason.contains("provider") {
        Id::ProviderMissing
    } else if reason.contains("descriptors") {
        Id::OpenFiles
    } else if reason.contains("may not open") || reason.contains("cgroup forbids") {
        Id::NodeForbidden
    } else if reason.contains("/dev/infiniband") {
        Id::NodeMissing
    } else if facts.devices.is_empty() {
        Id::NoDevice
    } else {
        Id::DeviceFailed
    }
}

/// The text without the number after a word, which differs each time.
fn without_number(text: &str, word: &str) -> String {
    let Some(at) = text.find(word).map(|at| at + word.len()) else { return text.to_owned() };
    format!("{}{}", text[..at].trim_end(), text[at..].trim_start_matches(|c: char| c.is_ascii_digit()))
}

/// The cause and the remedy of a message in the form "cause: remedy". Colons in parentheses do not count.
pub fn split(text: &str) -> (String, String) {
    let (mut depth, mut at) = (0, None);
    for (index, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            ':' if depth == 0 && text[index + 1..].starts_with(' ') => at = Some(index),
            _ => {}
        }
    }
    match at {
        Some(at) => (text[..at].to_owned(), text[at + 2..].to_owned()),
        None => (text.to_owned(), REPORT.to_owned()),
    }
}

fn with_errno(cause: String, errno: Option<i32>) -> String {
    let Some(errno) = errno else { return cause };
    let name = match errno {
        // Internal to the kernel, so that no table has it.
        524 => "errno 524, ENOTSUPP".to_owned(),
        errno => format!("{:?}", nix::errno::Errno::from_raw(errno)),
    };
    if cause.contains(&name) { cause } else { format!("{cause} ({name})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_a_cause_and_a_remedy() {
        let both = |text| {
            let (cause, remedy) = split(text);
            [cause, remedy]
        };
        assert_eq!(
            both("no node (owner 0:0, a: b): do this (Debian: x)"),
            ["no node (owner 0:0, a: b)", "do this (Debian: x)"]
        );
        assert_eq!(both("rxe0: cannot open: join its group"), ["rxe0: cannot open", "join its group"]);
        assert_eq!(both("nothing to do"), ["nothing to do", REPORT]);
        assert_eq!(
            without_number("rxe0: cannot bring queue pair 17 to RTR", "queue pair "),
            "rxe0: cannot bring queue pair to RTR"
        );
        assert_eq!(with_errno("it failed".into(), Some(524)), "it failed (errno 524, ENOTSUPP)");
        assert_eq!(with_errno("it failed".into(), Some(13)), "it failed (EACCES)");
        assert_eq!(with_errno("EOPNOTSUPP, no".into(), Some(95)), "EOPNOTSUPP, no");
    }
}
