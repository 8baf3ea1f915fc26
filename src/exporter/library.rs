//! Libraries of runtimes, found when the program runs.
//!
//! `unsafe` is here because loading a library runs its constructors, and because nothing but the
//! header that was read says what type a symbol has.

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};

#[cfg(any(feature = "hsa", feature = "level-zero"))]
use crate::Result;
use crate::error::ExporterError;

/// glibc's; libloading has no name for it.
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
const RTLD_NOLOAD: std::ffi::c_int = libc::RTLD_NOLOAD;

/// A runtime's library: how it is called and what brings it.
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
#[derive(Debug, Clone, Copy)]
pub(super) struct Named {
    pub(super) runtime: &'static str,
    /// The name with its version, which a program that was linked with it loads.
    pub(super) library: &'static str,
    pub(super) remedy: &'static str,
}

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
impl Named {
    /// Loads it, or takes it where it is loaded.
    #[cfg(any(feature = "hsa", feature = "level-zero"))]
    pub(super) fn open(&self) -> Result<Library> {
        // SAFETY: its constructors run as they do for any program that is linked with it.
        let opened = unsafe { Library::open(Some(self.library), RTLD_LAZY | RTLD_LOCAL) };
        opened.map_err(|error| {
            tracing::debug!(%error, library = self.library, "cannot load");
            self.missing().into()
        })
    }

    /// Whether this process has loaded it already, under this name.
    pub(super) fn is_loaded(&self) -> bool {
        // SAFETY: runs nothing: what is loaded already has been constructed.
        unsafe { Library::open(Some(self.library), RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD) }.is_ok()
    }

    pub(super) fn missing(&self) -> ExporterError {
        let Self { runtime, library, remedy } = *self;
        ExporterError::RuntimeMissing { runtime, library, remedy }
    }

    pub(super) fn lacks(&self, symbol: &'static str, since: &'static str) -> ExporterError {
        ExporterError::RuntimeTooOld { runtime: self.runtime, library: self.library, symbol, since }
    }

    /// The function called `symbol`, which the library has from version `since` on.
    ///
    /// # Safety
    /// `F` is the type of a pointer to that function, and the library outlives its calls.
    #[cfg(any(feature = "hsa", feature = "level-zero"))]
    pub(super) unsafe fn symbol<F: Copy>(
        &self,
        library: &Library,
        symbol: &'static str,
        since: &'static str,
    ) -> Result<F> {
        // SAFETY: passed on.
        let found = unsafe { library.get::<F>(symbol.as_bytes()) };
        found.map(|found| *found).map_err(|_| self.lacks(symbol, since).into())
    }
}

/// An answer that is not success, which all runtimes have 0 for.
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) call: &'static str,
    pub(super) code: u32,
}

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
pub(super) type Answer<T = ()> = std::result::Result<T, Refused>;

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
pub(super) fn answered(call: &'static str, code: u32) -> Answer {
    if code == 0 { Ok(()) } else { Err(Refused { call, code }) }
}

/// Declares the functions of the module's `LIBRARY` with their C types, as `Api`, which finds them all.
#[cfg(any(feature = "hsa", feature = "level-zero"))]
macro_rules! functions {
    ($($name:ident: $symbol:literal, $since:literal, ($($argument:ty),*);)*) => {
        /// The functions that are used here, and the library that has them.
        #[derive(Debug)]
        pub(super) struct Api {
            $($name: unsafe extern "C" fn($($argument),*) -> u32,)*
            // Unloaded after the last use of the functions above.
            _library: libloading::os::unix::Library,
        }

        impl Api {
            /// Loads the library and finds all of it.
            pub(super) fn load() -> $crate::Result<Self> {
                let library = LIBRARY.open()?;
                // SAFETY: the types are those of the headers; the library is kept beside them.
                Ok(unsafe { Self { $($name: LIBRARY.symbol(&library, $symbol, $since)?,)* _library: library } })
            }
        }
    };
}
#[cfg(any(feature = "hsa", feature = "level-zero"))]
pub(super) use functions;

/// What a failure of a runtime may come from that it does not say: no descriptors left.
pub(super) fn out_of_descriptors(exporter: &'static str) -> Option<ExporterError> {
    let source = std::fs::File::open("/dev/null").err()?;
    let exhausted = matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
    exhausted.then_some(ExporterError::OutOfDescriptors { exporter, source })
}

/// Likewise: a device node that is there and not for this user.
pub(super) fn forbidden_node(nodes: &[&str], remedy: &'static str) -> Option<crate::Error> {
    nodes.iter().find_map(|node| {
        let source = std::fs::OpenOptions::new().read(true).write(true).open(node).err()?;
        let forbidden = matches!(source.raw_os_error(), Some(libc::EACCES | libc::EPERM));
        forbidden.then(|| crate::Error::ExporterNotPermitted {
            device: (*node).into(),
            remedy: remedy.into(),
            source,
        })
    })
}

/// A second descriptor, close-on-exec, of one that stays the runtime's.
///
/// # Safety
/// `fd` is open until this returns.
#[cfg(any(feature = "hsa", feature = "level-zero"))]
pub(super) unsafe fn duplicate(fd: std::os::fd::RawFd) -> std::io::Result<std::os::fd::OwnedFd> {
    // SAFETY: says the caller.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
