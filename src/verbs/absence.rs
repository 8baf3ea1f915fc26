//! Why a program does not see or cannot open an RDMA device.
//!
//! libibverbs skips a device without a word if its node or its provider is missing, and answers ENOENT whatever
//! keeps it from opening a node. This module compares sysfs, the nodes in /dev/infiniband, and the installed
//! providers, and names the first that is missing.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ibverbs_sys as ffi;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// Descriptors that libibverbs and librdmacm open at once at most, to list or open a device.
const DESCRIPTORS: usize = 8;

/// Checks that descriptors are free. libibverbs and librdmacm report their lack as a missing device, and
/// libibverbs never loads again a provider that failed to load for want of one.
pub(crate) fn descriptors() -> io::Result<()> {
    // O_PATH needs no permission, and the root always exists.
    let one = |_| open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    Ok((0..DESCRIPTORS).map(one).collect::<Result<Vec<_>, _>>().map(drop)?)
}

/// Whether the error says that no descriptor is free.
pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Says what is exhausted and what to do.
pub(crate) fn exhaustion(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENFILE) => "the system has too few free file descriptors: raise fs.file-max",
        _ => "this process has too few free file descriptors: raise ulimit -n, or close some",
    }
}

/// What keeps a program from a device.
#[derive(Debug)]
pub(crate) struct Cause {
    /// What is missing, and what to do.
    pub text: String,
    /// The answer of the kernel, if one shows the cause.
    pub source: Option<io::Error>,
}

impl Cause {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), source: None }
    }
}

/// The system to look at. A test brings a root and an `open` of its own.
pub(crate) struct System {
    root: PathBuf,
    /// The folder of libibverbs. Its providers are in the folder `libibverbs` beside it.
    library: Option<PathBuf>,
    /// Opens a node for reading and writing.
    open: fn(&Path) -> io::Result<File>,
}

impl System {
    /// This process's own view.
    pub(crate) fn this() -> Self {
        Self { root: "/".into(), library: folder_of_libibverbs(), open: open_node }
    }

    /// Why libibverbs lists no device: a cause in any case.
    pub(crate) fn nothing_listed(&self) -> Cause {
        self.unlisted().unwrap_or_else(|| {
            let text = if self.path("sys/class/infiniband").is_dir() {
                "the kernel has no RDMA device in this network namespace: load the NIC's driver, move a device \
                 here (rdma dev set), or add soft-RoCE (rdma link add rxe0 type rxe netdev eth0)"
            } else {
                "the kernel has no RDMA device: load the NIC's driver (modprobe mlx5_ib), or add soft-RoCE \
                 (rdma link add rxe0 type rxe netdev eth0)"
            };
            Cause::new(text)
        })
    }

    /// Why libibverbs does not list the devices that the kernel has; `None` if the kernel has none.
    pub(crate) fn unlisted(&self) -> Option<Cause> {
        if self.has_sysfs() {
            let first = self.names("sys/class/infiniband").into_iter().next()?;
            return self.device(&first);
        }
        // Without sysfs the nodes show which devices there are.
        let node = self.nodes().into_iter().find(|name| name.starts_with("uverbs"));
        Some(match node {
            None => self.node_missing("uverbs0", io::Error::from_raw_os_error(libc::ENOENT)),
            Some(node) => match self.providers() {
                Err(text) => Cause::new(text),
                Ok(_) => Cause::new(format!(
                    "/dev/infiniband/{node} is there, but /sys is not mounted: mount -t sysfs sysfs /sys"
                )),
            },
        })
    }

    /// Why libibverbs does not list this device; `None` if the kernel has no such device.
    pub(crate) fn device(&self, name: &str) -> Option<Cause> {
        if !self.path("sys/class/infiniband").join(name).exists() {
            return None;
        }
        let class = "sys/class/infiniband_verbs";
        let is_its = |uverbs: &String| self.text(&format!("{class}/{uverbs}/ibdev")).as_deref() == Some(name);
        let Some(node) = self.names(class).into_iter().find(is_its) else {
            let text = format!("the kernel has {name}, but not ib_uverbs for it: modprobe ib_uverbs");
            return Some(Cause::new(text));
        };
        let missing = fs::metadata(self.path("dev/infiniband").join(&node)).err();
        Some(match (missing, self.providers()) {
            (Some(error), _) => {
                let Cause { text, source } = self.node_failed(&node, error);
                Cause { text: format!("the kernel has {name}, but {text}"), source }
            }
            (None, Err(text)) => Cause::new(format!("the kernel has {name}, but {text}")),
            (None, Ok(installed)) => Cause::new(format!(
                "the kernel has {name}{}, but none of the installed providers takes it ({}): install the \
                 provider for it, of the same rdma-core as libibverbs",
                self.driver(name),
                installed.join(", ")
            )),
        })
    }

    /// Why a node in /dev/infiniband cannot be opened; `None` if it can.
    pub(crate) fn node(&self, node: &str) -> Option<Cause> {
        if self.has_sysfs() && !self.path("sys/class/infiniband_verbs").join(node).exists() {
            let text = format!("the kernel has no {node} any more: the device was removed");
            return Some(Cause { text, source: Some(io::Error::from_raw_os_error(libc::ENODEV)) });
        }
        self.unopenable(node, &format!("sys/class/infiniband_verbs/{node}/dev"))
    }

    /// What keeps a program from the kernel's connection manager; `None` if nothing does.
    pub(crate) fn manager(&self) -> Option<Cause> {
        if self.has_sysfs() && !self.path("sys/class/misc/rdma_cm").exists() {
            return Some(Cause::new("the kernel module rdma_ucm is not loaded: modprobe rdma_ucm"));
        }
        self.unopenable("rdma_cm", "sys/class/misc/rdma_cm/dev")
    }

    /// Why the node cannot be opened. `numbers` is the file of its device numbers in sysfs.
    fn unopenable(&self, node: &str, numbers: &str) -> Option<Cause> {
        let path = self.path("dev/infiniband").join(node);
        let opened = fs::metadata(&path).and_then(|meta| (self.open)(&path).map(|_| meta));
        let meta = match opened {
            Ok(meta) => meta,
            Err(error) => return Some(self.node_failed(node, error)),
        };
        let shown = Path::new("/dev/infiniband").join(node);
        if !meta.file_type().is_char_device() {
            return Some(Cause::new(format!("{} is not a device node: remove it", shown.display())));
        }
        let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        let actual = format!("{major}:{minor}");
        let expected = self.text(numbers).filter(|expected| *expected != actual)?;
        Some(Cause::new(format!(
            "{} has the device numbers {actual}, and the kernel's device {expected}: create the node again (restart the container)",
            shown.display()
        )))
    }

    fn node_failed(&self, node: &str, error: io::Error) -> Cause {
        let shown = format!("/dev/infiniband/{node}");
        let text = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => return self.node_missing(node, error),
            Some(libc::EMFILE | libc::ENFILE) => exhaustion(&error).into(),
            Some(libc::EACCES) => {
                let of = fs::metadata(self.path("dev/infiniband").join(node)).map(|meta| {
                    format!(" (owner {}:{}, mode {:04o})", meta.uid(), meta.gid(), meta.mode() & 0o7777)
                });
                let of = of.unwrap_or_default();
                format!("this user may not open {shown}{of}: join its group, or write a udev rule")
            }
            Some(libc::EPERM) => {
                format!("the device cgroup forbids {shown}: pass it to the container (--device {shown})")
            }
            Some(libc::ENXIO | libc::ENODEV) => {
                format!("no device is behind {shown}: create the node again (restart the container)")
            }
            _ => format!("{shown} cannot be opened"),
        };
        Cause { text, source: Some(error) }
    }

    fn node_missing(&self, node: &str, error: io::Error) -> Cause {
        let present = self.nodes();
        let what = if !self.path("dev/infiniband").exists() {
            "/dev/infiniband is missing".to_owned()
        } else if present.is_empty() {
            "/dev/infiniband is empty".to_owned()
        } else {
            format!("/dev/infiniband/{node} is missing (there are: {})", present.join(", "))
        };
        let text = format!(
            "{what}: pass the node to the container (--device /dev/infiniband/{node}), or let udev create it"
        );
        Cause { text, source: Some(error) }
    }

    /// The providers that are both configured and installed, or what is missing.
    fn providers(&self) -> Result<Vec<String>, String> {
        let configured = self.configured();
        let folders = self.provider_folders();
        let mut installed: Vec<String> =
            folders.iter().flat_map(|folder| names_in(folder)).filter_map(|file| provider(&file)).collect();
        installed.sort();
        installed.dedup();
        const DO: &str = "install ibverbs-providers (Debian) or libibverbs (Fedora)";
        if installed.is_empty() {
            return Err(format!("no provider is installed in {}: {DO}", self.shown(&folders)));
        }
        if configured.is_empty() {
            let names = installed.join(", ");
            return Err(format!(
                "/etc/libibverbs.d names no provider, and libibverbs loads only those named there (installed: {names}): {DO}"
            ));
        }
        let (usable, lacking): (Vec<_>, Vec<_>) =
            configured.into_iter().partition(|name| name.starts_with('/') || installed.contains(name));
        match usable[..] {
            [] => Err(format!(
                "the providers that /etc/libibverbs.d names ({}) are not installed in {}: {DO}",
                lacking.join(", "),
                self.shown(&folders)
            )),
            _ => Ok(usable),
        }
    }

    /// The providers that libibverbs loads: the lines `driver NAME` of its configuration.
    fn configured(&self) -> Vec<String> {
        let files = self.names("etc/libibverbs.d").into_iter();
        let texts = files.filter_map(|file| self.text(&format!("etc/libibverbs.d/{file}")));
        let named = |text: String| -> Vec<String> {
            let of_line = |line: &str| Some(line.trim().strip_prefix("driver")?.trim().to_owned());
            text.lines().filter_map(of_line).filter(|name| !name.is_empty()).collect()
        };
        let mut all: Vec<String> = texts.flat_map(named).collect();
        all.sort();
        all.dedup();
        all
    }

    /// The folders where libibverbs finds providers.
    fn provider_folders(&self) -> Vec<PathBuf> {
        let libraries = match &self.library {
            Some(folder) => vec![folder.clone()],
            None => {
                let multiarch = self.names("usr/lib").into_iter().map(|name| format!("usr/lib/{name}"));
                let usual = ["usr/lib64", "usr/lib"].map(String::from);
                multiarch.chain(usual).map(|folder| self.path(&folder)).collect()
            }
        };
        let both = libraries.into_iter().flat_map(|folder| [folder.join("libibverbs"), folder]);
        both.filter(|folder| folder.is_dir()).collect()
    }

    /// The folders in words, as a process sees them whose root this is.
    fn shown(&self, folders: &[PathBuf]) -> String {
        let inside = |folder: &PathBuf| match folder.strip_prefix(&self.root) {
            Ok(inside) => Path::new("/").join(inside).display().to_string(),
            Err(_) => folder.display().to_string(),
        };
        match folders {
            [] => "the folder libibverbs beside libibverbs.so.1".into(),
            [first, ..] => inside(first),
        }
    }

    /// " (driver mlx5_core)", if sysfs names the driver.
    fn driver(&self, device: &str) -> String {
        let link = fs::read_link(self.path("sys/class/infiniband").join(device).join("device/driver"));
        let name = link.ok().and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
        name.map(|name| format!(" (driver {name})")).unwrap_or_default()
    }

    fn has_sysfs(&self) -> bool {
        self.path("sys/class").is_dir()
    }

    /// The nodes in /dev/infiniband.
    fn nodes(&self) -> Vec<String> {
        self.names("dev/infiniband")
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    fn names(&self, folder: &str) -> Vec<String> {
        names_in(&self.path(folder))
    }

    fn text(&self, file: &str) -> Option<String> {
        Some(fs::read_to_string(self.path(file)).ok()?.trim_end().to_owned())
    }
}

/// Opens a node as libibverbs does.
fn open_node(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// The names in a folder, sorted; none if it cannot be read.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The provider of a library's file: `rxe` of `librxe-rdmav34.so`.
fn provider(file: &str) -> Option<String> {
    Some(file.strip_prefix("lib")?.strip_suffix(".so")?.split_once("-rdmav")?.0.to_owned())
}

/// The folder of the libibverbs that this process uses.
fn folder_of_libibverbs() -> Option<PathBuf> {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    let function = ffi::ibv_get_device_list as unsafe extern "C" fn(_) -> _;
    // SAFETY: the call only compares the address with those of the loaded libraries; `info` is a local variable.
    if unsafe { libc::dladdr(function as *const libc::c_void, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the call succeeded, so this is the name of a library, which is never unloaded.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = fs::canonicalize(path.to_str().ok()?).ok()?;
    // In a program that links libibverbs statically this is the program itself.
    let is_library = path.file_name()?.to_str()?.starts_with("libibverbs");
    is_library.then(|| path.parent().map(Path::to_owned)).flatten()
}

#[cfg(test)]
mod tests;
