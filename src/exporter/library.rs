//! Libraries of runtimes, loaded at run time.
//!
//! `unsafe` is here because loading a library runs its constructors, and because the compiler cannot check
//! the type that a symbol is given.

use std::io;

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};

use super::{Error, PointerError};

/// The name of a runtime's library, and how to install it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Named {
    pub(super) runtime: &'static str,
    /// The name with its version, as a program linked with the library loads it.
    pub(super) library: &'static str,
    pub(super) remedy: &'static str,
}

impl Named {
    /// Loads the library, unless it is loaded already. It stays loaded, because runtimes start threads.
    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(super) fn open(&self) -> Result<Library, PointerError> {
        let flags = RTLD_LAZY | RTLD_LOCAL | libc::RTLD_NODELETE;
        // SAFETY: its constructors run as they do in any program that is linked with it.
        unsafe { Library::open(Some(self.library), flags) }.map_err(|error| self.not_loaded(&error))
    }

    /// Whether this process has already loaded the library under this name.
    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(super) fn is_loaded(&self) -> bool {
        let flags = RTLD_LAZY | RTLD_LOCAL | libc::RTLD_NOLOAD;
        // SAFETY: this loads nothing; the constructors of a loaded library have already run.
        unsafe { Library::open(Some(self.library), flags) }.is_ok()
    }

    /// The error for a library that cannot be loaded, with the loader's message as its source.
    pub(super) fn not_loaded(&self, error: &(dyn std::error::Error + 'static)) -> PointerError {
        let Self { runtime, library, remedy } = *self;
        out_of_descriptors(runtime).unwrap_or_else(|| {
            let message = std::iter::successors(Some(error), |&error| error.source()).last().unwrap_or(error);
            PointerError::RuntimeMissing {
                runtime,
                library,
                remedy,
                source: io::Error::other(message.to_string()),
            }
        })
    }

    /// The error for a runtime that does not start. Runtimes do not report that they could not open a device
    /// node.
    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(super) fn not_started(
        &self,
        nodes: &[&str],
        remedy: &'static str,
        otherwise: impl FnOnce() -> PointerError,
    ) -> Error {
        let exhausted = out_of_descriptors(self.runtime).map(Error::from);
        exhausted.or_else(|| forbidden_node(nodes, remedy)).unwrap_or_else(|| otherwise().into())
    }

    pub(super) fn lacks(&self, symbol: &'static str, since: &'static str) -> PointerError {
        PointerError::RuntimeTooOld { runtime: self.runtime, library: self.library, symbol, since }
    }

    /// Finds the function `symbol`, which the library has since version `since`.
    ///
    /// # Safety
    /// `F` is the type of a pointer to that function, and the library outlives the calls through it.
    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(super) unsafe fn symbol<F: Copy>(
        &self,
        library: &Library,
        symbol: &'static str,
        since: &'static str,
    ) -> Result<F, PointerError> {
        // SAFETY: the caller's promise.
        let found = unsafe { library.get::<F>(symbol.as_bytes()) };
        found.map(|found| *found).map_err(|_| self.lacks(symbol, since))
    }
}

/// A code other than 0, which means success in all runtimes.
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) call: &'static str,
    pub(super) code: u32,
}

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
pub(super) type Answer<T = ()> = Result<T, Refused>;

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
pub(super) fn answered(call: &'static str, code: u32) -> Answer {
    if code == 0 { Ok(()) } else { Err(Refused { call, code }) }
}

/// Declares `Api`: the functions of the module's `LIBRARY` with their C types, all found when it is loaded. Those
/// after `?` are `None` in a library without them.
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
macro_rules! functions {
    (
        $($name:ident: $symbol:literal, $since:literal, ($($argument:ty),*);)*
        $(? $newer:ident: $newer_symbol:literal, ($($newer_argument:ty),*);)*
    ) => {
        /// The functions that this module calls.
        #[derive(Debug, Clone, Copy)]
        pub(super) struct Api {
            $($name: unsafe extern "C" fn($($argument),*) -> u32,)*
            $($newer: Option<unsafe extern "C" fn($($newer_argument),*) -> u32>,)*
        }

        impl Api {
            /// Loads the library and finds all functions.
            pub(super) fn load() -> Result<Self, $crate::exporter::PointerError> {
                let library = LIBRARY.open()?;
                // SAFETY: the types are those of the headers; the library is never unloaded.
                Ok(unsafe { Self {
                    $($name: LIBRARY.symbol(&library, $symbol, $since)?,)*
                    $($newer: LIBRARY.symbol(&library, $newer_symbol, "").ok(),)*
                } })
            }
        }
    };
}
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
pub(super) use functions;

/// The error for a failed call if no descriptor is free, which neither the loader nor runtimes report.
pub(super) fn out_of_descriptors(runtime: &'static str) -> Option<PointerError> {
    let source = std::fs::File::open("/dev/null").err()?;
    let exhausted = matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
    exhausted.then_some(PointerError::OutOfDescriptors { runtime, source })
}

/// The error for a failed start if this user may not open a device node.
pub(super) fn forbidden_node(nodes: &[&str], remedy: &'static str) -> Option<Error> {
    nodes.iter().find_map(|node| {
        let source = std::fs::OpenOptions::new().read(true).write(true).open(node).err()?;
        let forbidden = matches!(source.raw_os_error(), Some(libc::EACCES | libc::EPERM));
        forbidden.then(|| Error::NotPermitted { device: (*node).into(), remedy: remedy.into(), source })
    })
}

/// Duplicates a descriptor that the runtime keeps; the copy is close-on-exec.
///
/// # Safety
/// `fd` is open until this returns, or negative.
#[cfg(any(feature = "hsa", feature = "level-zero"))]
pub(super) unsafe fn duplicate(
    fd: std::os::fd::RawFd,
    runtime: &'static str,
    remedy: &'static str,
) -> Result<std::os::fd::OwnedFd, PointerError> {
    check_descriptor(fd, runtime, remedy)?;
    // SAFETY: the caller's promise.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    fd.try_clone_to_owned().map_err(|source| match source.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => PointerError::OutOfDescriptors { runtime, source },
        _ => {
            let what = format!("{fd:?}, which is not open ({source})");
            PointerError::InvalidAnswer { runtime, call: "the export", what }
        }
    })
}

/// Refuses success without a descriptor, which some drivers return for memory that they do not export.
pub(super) fn check_descriptor(
    fd: std::os::fd::RawFd,
    runtime: &'static str,
    remedy: &'static str,
) -> Result<(), PointerError> {
    if fd < 0 { Err(PointerError::NotExportable { runtime, remedy }) } else { Ok(()) }
}

#[cfg(all(test, any(feature = "hsa", feature = "level-zero")))]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_not_open_is_the_drivers_mistake() {
        // SAFETY: no process has as many descriptors, so it is not closed under anybody.
        let refused = unsafe { duplicate(i32::MAX, "test", "") };
        assert_error!(refused, PointerError::InvalidAnswer { runtime: "test", .. });
        // SAFETY: a negative number is refused.
        assert_error!(unsafe { duplicate(-1, "test", "") }, PointerError::NotExportable { .. });
    }
}
