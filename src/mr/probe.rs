//! Whether a device can import dma-bufs, and through which path.
//!
//! A registration with fd -1 tells without a buffer: a kernel that would import one answers `EBADF`,
//! one that cannot answers `EOPNOTSUPP`, or `EPROTONOSUPPORT` where the very command is unknown. Any
//! other answer is neither yes nor no, and is reported as that.

use std::fmt;
use std::io;

use rdma_sys_ext::symbols::{MissingSymbol, ibv_reg_dmabuf_mr};

use super::Access;
use super::path::{self, IMPORT, Path, Request};
use crate::umem::{Iova, page_size};
use crate::verbs::{Context, ProtectionDomain};
use crate::{Error, Result};

/// A path that does not import dma-bufs, and why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The path.
    pub path: Path,
    /// What it answered.
    pub reason: RefusalReason,
}

/// Why a path does not import dma-bufs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefusalReason {
    /// `EOPNOTSUPP`: the provider (Verbs) or the kernel driver (Uverbs) does not have the operation.
    NotSupported,
    /// `EPROTONOSUPPORT`: the kernel does not know the command; it came with Linux 5.12.
    UnknownToKernel,
    /// This libibverbs does not have `ibv_reg_dmabuf_mr`.
    MissingSymbol(MissingSymbol),
}

impl RefusalReason {
    /// The refusal as an error's source.
    pub(super) fn source(self) -> Box<dyn std::error::Error + Send + Sync> {
        match self {
            Self::NotSupported => io::Error::from_raw_os_error(libc::EOPNOTSUPP).into(),
            Self::UnknownToKernel => io::Error::from_raw_os_error(libc::EPROTONOSUPPORT).into(),
            Self::MissingSymbol(missing) => missing.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path;
        if let (Some((operation, needs)), false) =
            (path.needs(), matches!(self.reason, RefusalReason::MissingSymbol(_)))
        {
            return write!(f, "{path}: {operation} is not supported here, it needs {needs}");
        }
        match self.reason {
            RefusalReason::NotSupported if path == Path::Verbs => {
                write!(f, "{path}: EOPNOTSUPP, the user-space provider has no reg_dmabuf_mr")
            }
            RefusalReason::NotSupported => write!(f, "{path}: EOPNOTSUPP, the kernel driver imports none"),
            RefusalReason::UnknownToKernel => {
                write!(f, "{path}: EPROTONOSUPPORT, the kernel does not know the command (Linux 5.12 does)")
            }
            RefusalReason::MissingSymbol(missing) => write!(f, "{path}: {missing}"),
        }
    }
}

impl Refusal {
    /// The refusal that an errno stands for, `None` for an errno that is about something else.
    pub(super) fn from_errno(path: Path, error: &io::Error) -> Option<Self> {
        let reason = match error.raw_os_error()? {
            libc::EOPNOTSUPP => RefusalReason::NotSupported,
            libc::EPROTONOSUPPORT => RefusalReason::UnknownToKernel,
            _ => return None,
        };
        Some(Self { path, reason })
    }
}

/// What [`probe`] found, a path each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaBufSupport {
    /// Through the provider's `ibv_reg_dmabuf_mr`.
    pub verbs: Result<(), Refusal>,
    /// Through the kernel's own command.
    pub uverbs: Result<(), Refusal>,
}

impl DmaBufSupport {
    /// Whether a path imports dma-bufs, of the two that are probed.
    pub fn allows(&self, path: Path) -> bool {
        match path {
            Path::Verbs => self.verbs.is_ok(),
            Path::Uverbs => self.uverbs.is_ok(),
            // Not probed: they are taken only where they are asked for, and say themselves.
            Path::HostMapping | Path::VerbsEx | Path::DataDirect => false,
        }
    }

    /// The path that a registration will take, `None` when the device cannot import dma-bufs.
    pub fn path(&self) -> Option<Path> {
        IMPORT.iter().copied().find(|path| self.allows(*path))
    }
}

/// Asks a device whether it imports dma-bufs, through which path, and what refuses.
///
/// Nothing is registered, and no buffer is needed. That a device imports dma-bufs does not say that it
/// takes those of every exporter: memory without struct pages needs a device that does peer-to-peer DMA.
///
/// # Errors
/// - [`Error::Probe`]: an answer that is neither yes nor no, with its errno.
/// - [`Error::Verbs`]: no protection domain to ask with.
pub fn probe(context: &Context) -> Result<DmaBufSupport> {
    let domain = ProtectionDomain::new(context)?;
    let ask = |path| {
        ask(path, &domain).map_err(|source| Error::Probe {
            device: context.device_name().into(),
            path,
            source,
        })
    };
    Ok(DmaBufSupport { verbs: ask(Path::Verbs)?, uverbs: ask(Path::Uverbs)? })
}

/// Whether the provider imports dma-bufs, or may: only a clear no is one.
pub(super) fn provider_imports(domain: &ProtectionDomain) -> bool {
    !matches!(ask(Path::Verbs, domain), Ok(Err(_)))
}

fn ask(path: Path, domain: &ProtectionDomain) -> io::Result<Result<(), Refusal>> {
    // One page, so that nothing but the descriptor is wrong.
    let page = Request { offset: 0, length: page_size(), iova: Iova(0), access: Access::LOCAL_WRITE };
    let answer = match path {
        Path::Verbs => match ibv_reg_dmabuf_mr() {
            Ok(call) => path::register_verbs(call, domain, -1, &page).map(drop),
            Err(missing) => return Ok(Err(Refusal { path, reason: RefusalReason::MissingSymbol(missing) })),
        },
        _ => path::register_uverbs(domain, -1, &page).map(drop),
    };
    judge(path, answer)
}

fn judge(path: Path, answer: io::Result<()>) -> io::Result<Result<(), Refusal>> {
    let error = match answer {
        // Registering no descriptor at all cannot have worked.
        Ok(()) => return Err(io::Error::other("a registration of fd -1 was accepted")),
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => return Ok(Ok(())),
        Err(error) => error,
    };
    Refusal::from_errno(path, &error).map(Err).ok_or(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(errno: i32) -> io::Result<Result<(), Refusal>> {
        judge(Path::Uverbs, Err(io::Error::from_raw_os_error(errno)))
    }

    #[test]
    fn only_the_exact_errno_is_an_answer() {
        assert_eq!(answer(libc::EBADF).unwrap(), Ok(()));
        let refused = |reason| Err(Refusal { path: Path::Uverbs, reason });
        assert_eq!(answer(libc::EOPNOTSUPP).unwrap(), refused(RefusalReason::NotSupported));
        assert_eq!(answer(libc::EPROTONOSUPPORT).unwrap(), refused(RefusalReason::UnknownToKernel));
        for errno in
            [libc::EINVAL, libc::EPERM, libc::ENOMEM, libc::ENOSYS, libc::EIO, crate::error::text::ENOTSUPP]
        {
            assert_eq!(answer(errno).unwrap_err().raw_os_error(), Some(errno));
        }
        judge(Path::Uverbs, Ok(())).unwrap_err();
    }

    #[test]
    fn the_first_path_that_works_is_taken() {
        let no = |path| Err(Refusal { path, reason: RefusalReason::NotSupported });
        let support = |verbs, uverbs| DmaBufSupport { verbs, uverbs }.path();
        assert_eq!(support(Ok(()), Ok(())), Some(Path::Verbs));
        assert_eq!(support(no(Path::Verbs), Ok(())), Some(Path::Uverbs));
        assert_eq!(support(no(Path::Verbs), no(Path::Uverbs)), None);
    }
}
