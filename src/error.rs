//! One error type for programs that use `?` across several steps.

use crate::kind::{ErrorKind, readable_error};
use crate::{cm, dmabuf, exporter, host, mr, transfer, verbs};

/// The result of a program that uses several parts of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of any step. Each function returns the error of its own step, which converts into this one.
///
/// Match a variant of the step's error to handle one cause, and [`kind`](Self::kind) for everything else: a kind
/// says what a program can do, and stays stable as variants change. `Debug` prints the message with its causes, so
/// `fn main() -> dmabuf_rdma::Result<()>` prints a readable error. `docs/errors.md` explains every variant.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A dma-buf, its CPU mapping or its fences.
    #[error(transparent)]
    DmaBuf(#[from] dmabuf::Error),
    /// The addresses of a dma-buf as a device sees them.
    #[error(transparent)]
    DeviceView(#[from] dma_sg::device_view::Error),
    /// An exporter, a GPU runtime or a pointer.
    #[error(transparent)]
    Exporter(#[from] exporter::Error),
    /// Host memory.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// A device, a queue pair or a work request.
    #[error(transparent)]
    Verbs(#[from] verbs::Error),
    /// A registration, or a request to the cache.
    #[error(transparent)]
    Register(#[from] mr::RegisterError),
    /// The registration of a set of regions.
    #[error(transparent)]
    Set(#[from] mr::SetError),
    /// A deregistration.
    #[error(transparent)]
    Deregister(#[from] mr::DeregisterError),
    /// A self-check: the region is registered, but the device does not reach its memory.
    #[error(transparent)]
    SelfCheck(#[from] mr::SelfCheckError),
    /// A description of a peer's memory, or a table of blocks.
    #[error(transparent)]
    Slice(#[from] mr::SliceError),
    /// A transfer.
    #[error(transparent)]
    Transfer(#[from] transfer::Error),
    /// A connection by IP address.
    #[error(transparent)]
    Connect(#[from] cm::Error),
    /// A range, a list of addresses, or the process's page map.
    #[error(transparent)]
    Sg(#[from] dma_sg::Error),
    /// A PCI device in sysfs.
    #[error(transparent)]
    Pci(#[from] dma_sg::pci::Error),
}

readable_error!(Error);

impl Error {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::DmaBuf(error) => error.kind(),
            Self::DeviceView(error) => kind_of_view(error),
            Self::Exporter(error) => error.kind(),
            Self::Host(error) => error.kind(),
            Self::Verbs(error) => error.kind(),
            Self::Register(error) => error.kind(),
            Self::Set(error) => error.kind(),
            Self::Deregister(error) => error.kind(),
            Self::SelfCheck(error) => error.kind(),
            Self::Slice(error) => error.kind(),
            Self::Transfer(error) => error.kind(),
            Self::Connect(error) => error.kind(),
            Self::Sg(error) => kind_of_list(error),
            Self::Pci(error) => kind_of_pci(error),
        }
    }

    /// What to do, besides what the message says: what is known about a failed transfer, or the hint of the
    /// [kind](ErrorKind::hint).
    pub fn hint(&self) -> &str {
        match self {
            Self::Transfer(transfer::Error::Failed { hint, .. } | transfer::Error::Timeout { hint, .. })
                if !hint.is_empty() =>
            {
                hint
            }
            _ => self.kind().hint(),
        }
    }
}

/// The crate `dma-sg` is a layer below and has no [`ErrorKind`].
fn kind_of_list(error: &dma_sg::Error) -> ErrorKind {
    use dma_sg::Error as E;
    match error {
        E::FramesHidden => ErrorKind::Permission,
        E::IovaExhausted { .. } => ErrorKind::Limit,
        E::NoFrame { source, .. } | E::Pagemap { source, .. } => ErrorKind::of(source),
        _ => ErrorKind::Misuse,
    }
}

fn kind_of_pci(error: &dma_sg::pci::Error) -> ErrorKind {
    use dma_sg::pci::Error as E;
    match error {
        E::InvalidPciAddress { .. } => ErrorKind::Misuse,
        E::NotInSysfs { .. } | E::UnknownRdmaDevice { .. } => ErrorKind::NotFound,
        E::Sysfs { source, .. } => ErrorKind::of(source),
        _ => ErrorKind::Unsupported,
    }
}

fn kind_of_view(error: &dma_sg::device_view::Error) -> ErrorKind {
    use dma_sg::device_view::Error as E;
    match error {
        E::Device(error) => kind_of_pci(error),
        E::List(_) => ErrorKind::InvalidData,
        E::ModuleMissing { .. } => ErrorKind::NotFound,
        E::NotPermitted { .. } => ErrorKind::Permission,
        E::Map { source, .. } => match source.raw_os_error() {
            // The device is present, but not set up for DMA through the kernel.
            Some(libc::ENXIO | libc::EBUSY | libc::EADDRNOTAVAIL) => ErrorKind::Unsupported,
            _ => ErrorKind::of(source),
        },
        E::Ended { .. } => ErrorKind::DeviceGone,
        _ => ErrorKind::System,
    }
}

/// Converts an error that is a variant of another step's error.
macro_rules! nested {
    ($($error:ty => $step:ty;)*) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                <$step>::from(error).into()
            }
        })*
    };
}

nested! {
    dma_sg::RangeError => dma_sg::Error;
    exporter::PointerError => exporter::Error;
    exporter::VfioError => exporter::Error;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_kind_its_errno_and_its_message() {
        fn fails() -> Result<()> {
            let source = std::io::Error::from_raw_os_error(libc::EACCES);
            Err(verbs::Error::Device { device: "rxe0".into(), operation: "open the device".into(), source })?
        }
        let error = fails().unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Permission, Some(libc::EACCES)));
        assert_eq!(
            format!("{error:?}"),
            "rxe0: cannot open the device\n  caused by: Permission denied (os error 13)"
        );
        assert_eq!(Error::from(dma_sg::RangeError::Empty { offset: 7 }).kind(), ErrorKind::Misuse);
    }

    #[test]
    fn a_hint_is_that_of_the_transfer_or_of_the_kind() {
        let timeout = |hint: &str| {
            let (opcode, timeout) = (verbs::Opcode::Read, std::time::Duration::from_secs(1));
            let hint = hint.into();
            Error::from(transfer::Error::Timeout { opcode, done: 0, length: 8, timeout, hint, usable: false })
        };
        assert_eq!(timeout("port 1 of rxe0 is down").hint(), "port 1 of rxe0 is down");
        assert_eq!(timeout("").hint(), ErrorKind::Timeout.hint());
    }

    #[test]
    fn a_connection_that_was_never_connected_is_misused() {
        let kind =
            |reason: &str| Error::from(transfer::Error::Unusable { reason: reason.into(), done: 0 }).kind();
        assert_eq!(kind("it is not connected"), ErrorKind::Misuse);
        assert_eq!(kind("the peer disconnected"), ErrorKind::Transport);
    }

    #[test]
    fn what_a_device_view_refuses_has_a_kind() {
        let map = |errno| {
            let source = std::io::Error::from_raw_os_error(errno);
            dma_sg::device_view::Error::Map {
                device: "rxe0".into(),
                exporter: "udmabuf".into(),
                size: 4096,
                source,
            }
        };
        assert_eq!(Error::from(map(libc::EBUSY)).kind(), ErrorKind::Unsupported);
        assert_eq!(Error::from(map(libc::ENOMEM)).kind(), ErrorKind::OutOfMemory);
        let list = dma_sg::device_view::Error::from(dma_sg::Error::FramesHidden);
        assert_eq!(Error::from(list).kind(), ErrorKind::InvalidData);
    }

    /// Every variant has an entry in docs/errors*.md, so that a reader can look it up.
    #[test]
    fn the_error_guide_has_every_variant() {
        let guide = concat!(include_str!("../docs/errors.md"), include_str!("../docs/errors-memory.md"));
        let sources = [
            ("dma_sg::Error", include_str!("../dma-sg/src/error.rs")),
            ("dma_sg::RangeError", include_str!("../dma-sg/src/range.rs")),
            ("pci::Error", include_str!("../dma-sg/src/pci/error.rs")),
            ("dmabuf::Error", include_str!("dmabuf/error.rs")),
            ("device_view::Error", include_str!("../dma-sg/src/device_view/error.rs")),
            ("exporter::Error", include_str!("exporter/error/mod.rs")),
            ("exporter::PointerError", include_str!("exporter/error/pointer.rs")),
            ("exporter::VfioError", include_str!("exporter/error/vfio.rs")),
            ("host::Error", include_str!("host/error.rs")),
            ("verbs::Error", include_str!("verbs/error.rs")),
            ("mr::…", include_str!("mr/error/mod.rs")),
            ("mr::SliceError", include_str!("mr/error/slice.rs")),
            ("transfer::Error", include_str!("transfer/error.rs")),
            ("cm::Error", include_str!("cm/error.rs")),
        ];
        let mut missing = Vec::new();
        for (of, source) in sources {
            let mut inside = false;
            for line in source.lines() {
                inside = (inside || line.starts_with("pub enum ") && line.contains("Error")) && line != "}";
                let Some(name) = line.strip_prefix("    ").filter(|_| inside) else { continue };
                let name = name.split([' ', '{', ',', '(']).next().unwrap_or_default();
                let named = name.starts_with(|c: char| c.is_ascii_uppercase())
                    && name.chars().all(char::is_alphanumeric);
                // The guide explains a forwarded error at its own enum.
                let passes_on = line.contains("(#[from] ") || line.contains("Setup(");
                if named && !passes_on && !guide.contains(&format!("`{name}`")) {
                    missing.push(format!("{of}: {name}"));
                }
            }
        }
        assert!(missing.is_empty(), "docs/errors*.md lack {missing:#?}");
    }
}
