//! Probes whether a device imports dma-bufs, and through which path.
//!
//! The probe registers fd -1, which needs no buffer. The kernel returns `EBADF` if the device imports dma-bufs,
//! `EOPNOTSUPP` if it does not, and `EPROTONOSUPPORT` if the kernel does not know the command. Any other result is
//! an error of the probe.

use std::fmt;
use std::io;

use rdma_sys_ext::symbols::{SymbolError, ibv_reg_dmabuf_mr, ibv_reg_mr_ex, mlx5dv_reg_dmabuf_mr};

use dma_sg::{Iova, page_size};

use super::path::{self, IMPORT, NEWER, Path, Request};
use super::{Access, RegisterError};
use crate::verbs::{Context, ProtectionDomain};

/// A path that does not import dma-bufs, and the reason. `Display` explains it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    path: Path,
    reason: Reason,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Reason {
    /// `EOPNOTSUPP`: the provider (Verbs) or the kernel driver (Uverbs) lacks the operation.
    NotSupported,
    /// `EPROTONOSUPPORT`: the kernel does not know the command, which Linux 5.12 introduced.
    UnknownToKernel,
    /// libibverbs or libmlx5 lacks the function, or the library is not installed.
    Symbol(SymbolError),
}

impl Refusal {
    /// The refusal of a path whose function the library lacks; an error if the library cannot be loaded now.
    pub(super) fn missing(path: Path, symbol: SymbolError) -> io::Result<Self> {
        match symbol {
            SymbolError::NotLoaded { errno: Some(errno), .. } => Err(io::Error::from_raw_os_error(errno)),
            symbol => Ok(Self { path, reason: Reason::Symbol(symbol) }),
        }
    }

    /// The refusal for an errno; `None` if the errno has another cause.
    pub(super) fn from_errno(path: Path, error: &io::Error) -> Option<Self> {
        let reason = match error.raw_os_error()? {
            libc::EOPNOTSUPP => Reason::NotSupported,
            libc::EPROTONOSUPPORT => Reason::UnknownToKernel,
            _ => return None,
        };
        Some(Self { path, reason })
    }

    /// The path that refuses.
    pub fn path(&self) -> Path {
        self.path
    }

    /// `EOPNOTSUPP` if the provider (Verbs) or the kernel driver (Uverbs) lacks the operation, `EPROTONOSUPPORT` if
    /// the kernel does not know the command (before Linux 5.12), `None` if the library lacks the function.
    pub fn errno(&self) -> Option<i32> {
        match self.reason {
            Reason::NotSupported => Some(libc::EOPNOTSUPP),
            Reason::UnknownToKernel => Some(libc::EPROTONOSUPPORT),
            Reason::Symbol(_) => None,
        }
    }

    /// The refusal as the source of an error.
    pub(super) fn source(&self) -> Box<dyn std::error::Error + Send + Sync> {
        match &self.reason {
            Reason::Symbol(error) => error.clone().into(),
            Reason::NotSupported => io::Error::from_raw_os_error(libc::EOPNOTSUPP).into(),
            Reason::UnknownToKernel => io::Error::from_raw_os_error(libc::EPROTONOSUPPORT).into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path;
        if let (Some((operation, needs)), false) = (path.needs(), matches!(self.reason, Reason::Symbol(_))) {
            return write!(f, "{path}: {operation} is not supported here; it needs {needs}");
        }
        match &self.reason {
            Reason::NotSupported if path == Path::Verbs => {
                write!(f, "{path}: EOPNOTSUPP, the user-space provider has no reg_dmabuf_mr")
            }
            Reason::NotSupported => {
                write!(f, "{path}: EOPNOTSUPP, the kernel driver does not import dma-bufs")
            }
            Reason::UnknownToKernel => {
                write!(
                    f,
                    "{path}: EPROTONOSUPPORT, the kernel does not know the command; it needs Linux 5.12"
                )
            }
            Reason::Symbol(error) => write!(f, "{path}: {error}"),
        }
    }
}

/// Probes which path a registration on this device will use.
///
/// It needs no buffer and registers nothing. A device that imports dma-bufs may still refuse those of some
/// exporters: memory without struct pages needs a device that supports peer-to-peer DMA.
///
/// # Errors
/// - [`RegisterError::ImportUnsupported`]: neither Verbs nor Uverbs imports dma-bufs, with the refusal of each.
/// - [`RegisterError::Verbs`] with [`verbs::Error::Device`](crate::verbs::Error::Device): an errno that means neither yes nor no.
/// - [`RegisterError::Verbs`]: the protection domain for the probe cannot be allocated.
pub fn probe(context: &Context) -> Result<Path, RegisterError> {
    let mut refusals = Vec::new();
    for &path in IMPORT {
        match probe_path(context, path)? {
            None => return Ok(path),
            Some(refusal) => refusals.push(refusal),
        }
    }
    Err(RegisterError::ImportUnsupported { device: context.device_name().into(), refusals })
}

/// Probes whether a path imports dma-bufs on this device. Returns `None` if it does, else the refusal. For
/// [`Path::HostMapping`] it probes the kernel's command, as for `Uverbs`.
///
/// # Errors
/// - [`RegisterError::Verbs`] with [`verbs::Error::Device`](crate::verbs::Error::Device): an errno that means neither yes nor no.
/// - [`RegisterError::Verbs`]: the protection domain for the probe cannot be allocated.
pub fn probe_path(context: &Context, path: Path) -> Result<Option<Refusal>, RegisterError> {
    let domain = ProtectionDomain::new(context)?;
    match probe_in(&domain, path, Access::LOCAL_WRITE) {
        Ok(answer) => Ok(answer.err()),
        Err(source) => Err(unclear(context.device_name(), path, source)),
    }
}

/// Whether the provider imports dma-bufs. An inconclusive result counts as yes.
pub(super) fn provider_imports(domain: &ProtectionDomain) -> bool {
    !matches!(probe_in(domain, Path::Verbs, Access::LOCAL_WRITE), Ok(Err(_)))
}

/// Why every path answered "not supported" for a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A path imports dma-bufs with these flags, so it refused this buffer's memory.
    Memory,
    /// A path imports dma-bufs, but not with these flags.
    Flags(Access),
    /// No path imports dma-bufs.
    Import,
}

/// Asks the paths that refused a buffer whether they import dma-bufs at all, first with the flags of the request.
///
/// # Errors
/// The path whose answer is neither yes nor no.
pub(super) fn cause(
    domain: &ProtectionDomain,
    refusals: &[Refusal],
    access: Access,
) -> Result<Cause, (Path, io::Error)> {
    // The other reasons have nothing to do with memory or flags.
    let asked = refusals.iter().filter(|refusal| refusal.reason == Reason::NotSupported);
    let paths: Vec<_> = asked.map(Refusal::path).collect();
    cause_of(&paths, access, |path, access| match probe_in(domain, path, access) {
        // A driver may look at its own hardware before the descriptor, with an errno of its own.
        Err(_) if NEWER.contains(&path) => Ok(false),
        answer => answer.map(|answer| answer.is_ok()),
    })
}

fn cause_of(
    paths: &[Path],
    access: Access,
    imports: impl Fn(Path, Access) -> io::Result<bool>,
) -> Result<Cause, (Path, io::Error)> {
    let first = |access| -> Result<Option<Path>, (Path, io::Error)> {
        for &path in paths {
            if imports(path, access).map_err(|error| (path, error))? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    };
    if first(access)?.is_some() {
        return Ok(Cause::Memory);
    }
    let Some(path) = first(Access::empty())? else { return Ok(Cause::Import) };
    let refused = access.iter().filter(|flag| {
        let alone = match *flag {
            Access::REMOTE_WRITE | Access::REMOTE_ATOMIC => *flag | Access::LOCAL_WRITE,
            flag => flag,
        };
        matches!(imports(path, alone), Ok(false))
    });
    match refused.fold(Access::empty(), Access::union) {
        // Only together.
        none if none.is_empty() => Ok(Cause::Flags(access)),
        refused => Ok(Cause::Flags(refused)),
    }
}

fn probe_in(domain: &ProtectionDomain, path: Path, access: Access) -> io::Result<Result<(), Refusal>> {
    // One valid page, so that only the descriptor is wrong.
    let page = Request { offset: 0, length: page_size(), iova: Iova(0), access };
    let missing = |symbol| Refusal::missing(path, symbol).map(Err);
    let answer = match path {
        Path::Verbs => match ibv_reg_dmabuf_mr() {
            Ok(call) => path::register_verbs(call, domain, -1, &page),
            Err(symbol) => return missing(symbol),
        },
        Path::VerbsEx => match ibv_reg_mr_ex() {
            Ok(call) => path::register_extended(call, domain, -1, &page, None),
            Err(symbol) => return missing(symbol),
        },
        Path::DataDirect => match mlx5dv_reg_dmabuf_mr() {
            Ok(call) => path::register_data_direct(call, domain, -1, &page),
            Err(symbol) => return missing(symbol),
        },
        Path::Uverbs | Path::HostMapping | Path::HostMemory | Path::Foreign => {
            path::register_uverbs(domain, -1, &page)
        }
    };
    interpret(path, answer.map(drop))
}

fn interpret(path: Path, answer: io::Result<()>) -> io::Result<Result<(), Refusal>> {
    let error = match answer {
        // No kernel can import fd -1.
        Ok(()) => return Err(io::Error::other("a registration of fd -1 was accepted")),
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => return Ok(Ok(())),
        Err(error) => error,
    };
    Refusal::from_errno(path, &error).map(Err).ok_or(error)
}

/// The error of a probe that got an unexpected errno.
pub(super) fn unclear(device: &str, path: Path, source: io::Error) -> RegisterError {
    let operation = format!(
        "tell whether it imports dma-bufs through {path}: the probe got an unexpected errno; try the registration, which reports its own"
    );
    crate::verbs::Error::Device { device: device.into(), operation, source }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(errno: i32) -> io::Result<Result<(), Refusal>> {
        interpret(Path::Uverbs, Err(io::Error::from_raw_os_error(errno)))
    }

    /// A device that imports with `supported` flags through `path`, and looks at the flags before the memory.
    fn found(path: Path, supported: Access, access: Access) -> Cause {
        let asked = [Path::Verbs, Path::Uverbs];
        cause_of(&asked, access, |at, access| Ok(at == path && supported.contains(access))).unwrap()
    }

    #[test]
    fn a_flag_that_the_device_refuses_is_not_taken_for_its_memory() {
        let efa = Access::LOCAL_WRITE | Access::REMOTE_READ;
        for path in [Path::Verbs, Path::Uverbs] {
            assert_eq!(found(path, efa, efa), Cause::Memory);
            assert_eq!(found(path, efa, Access::empty()), Cause::Memory);
            assert_eq!(found(path, efa, Access::REMOTE), {
                Cause::Flags(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
            });
            let relaxed = Access::LOCAL_WRITE | Access::RELAXED_ORDERING;
            assert_eq!(found(path, efa, relaxed), Cause::Flags(Access::RELAXED_ORDERING));
            assert_eq!(found(path, Access::empty(), efa), Cause::Flags(efa));
        }
        // No path that was asked imports.
        assert_eq!(found(Path::VerbsEx, Access::all(), efa), Cause::Import);
        // Each flag alone, but not both.
        let both = Access::LOCAL_WRITE | Access::REMOTE_READ;
        assert_eq!(
            cause_of(&[Path::Uverbs], both, |_, access| Ok(access != both)).unwrap(),
            Cause::Flags(both)
        );
    }

    #[test]
    fn an_answer_that_is_no_answer_is_an_error_of_its_path() {
        let answer = cause_of(&[Path::Verbs, Path::Uverbs], Access::REMOTE, |path, _| match path {
            Path::Verbs => Ok(false),
            _ => Err(io::Error::from_raw_os_error(libc::EIO)),
        });
        let (path, error) = answer.unwrap_err();
        assert_eq!((path, error.raw_os_error()), (Path::Uverbs, Some(libc::EIO)));
    }

    #[test]
    fn only_the_exact_errno_is_an_answer() {
        assert_eq!(answer(libc::EBADF).unwrap(), Ok(()));
        let refused = |reason| Err(Refusal { path: Path::Uverbs, reason });
        assert_eq!(answer(libc::EOPNOTSUPP).unwrap(), refused(Reason::NotSupported));
        assert_eq!(answer(libc::EPROTONOSUPPORT).unwrap(), refused(Reason::UnknownToKernel));
        for errno in [libc::EINVAL, libc::EPERM, libc::ENOMEM, libc::ENOSYS, libc::EIO, crate::kind::ENOTSUPP]
        {
            assert_eq!(answer(errno).unwrap_err().raw_os_error(), Some(errno));
        }
        interpret(Path::Uverbs, Ok(())).unwrap_err();
    }
}
