//! The guest around the tests: modules, kernel parameters, privileges. The tests run one at a time.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use dmabuf_rdma::exporter::CaptureDevice;

/// Loads a kernel module; failing that fails the test.
#[track_caller]
pub fn modprobe(module: &str) {
    run("modprobe", &[module]);
}

/// Runs a program to its success and returns what it printed.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The camera; the module is loaded first, as light as it goes.
pub fn vivid() -> CaptureDevice {
    let [first, _] = cameras();
    CaptureDevice::open(first).expect("vivid")
}

/// Nodes of two cameras, of which the second one has the multi-planar queue.
pub fn cameras() -> [&'static str; 2] {
    let options = [
        "n_devs=2",
        "multiplanar=1,2",
        "node_types=0x1,0x1",
        "num_inputs=1,1",
        "input_types=0x0,0x0",
        "num_outputs=0,0",
    ];
    run("modprobe", &[&["vivid"], options.as_slice()].concat());
    let nodes = ["/dev/video0", "/dev/video1"];
    let end = Instant::now() + Duration::from_secs(20);
    // They appear a moment after the module is in.
    while nodes.iter().any(|node| CaptureDevice::open(node).is_err()) {
        assert!(Instant::now() < end, "vivid has no {nodes:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    nodes
}

/// The PCI devices that a driver is bound to, in order of their addresses.
#[track_caller]
pub fn driven_by(driver: &str) -> Vec<dmabuf_rdma::pci::PciAddress> {
    let path = format!("/sys/bus/pci/drivers/{driver}");
    let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut found: Vec<_> =
        entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).collect();
    found.sort();
    assert!(!found.is_empty(), "{path} has no device");
    found
}

/// A kernel parameter with another value, until this is dropped.
pub struct Setting {
    path: String,
    before: String,
}

impl Setting {
    #[track_caller]
    pub fn new(path: &str, value: &str) -> Self {
        let read = || fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let before = chosen(&read());
        fs::write(path, value).unwrap_or_else(|e| panic!("{path} = {value}: {e}"));
        assert_eq!(chosen(&read()), value, "{path} did not take the value");
        Self { path: path.into(), before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before)
            .unwrap_or_else(|e| panic!("{} = {}: {e}", self.path, self.before));
    }
}

/// The value of a parameter, also of one that lists its choices as `always [never] advise`.
fn chosen(text: &str) -> String {
    let bracketed = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(text, |(value, _)| value).trim().into()
}

/// Huge pages of 2 MiB in the pool, until this is dropped.
pub fn huge_pages(count: u32) -> Setting {
    Setting::new("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", &count.to_string())
}

/// Transparent huge pages for memfds that ask for them, until this is dropped.
pub fn transparent_huge_pages() -> Setting {
    Setting::new("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise")
}

/// Runs something on a thread of its own that has lost every privilege of root: its capabilities are
/// gone, and files are opened as nobody's.
pub fn unprivileged<T: Send>(action: impl FnOnce() -> T + Send) -> T {
    let privileged = |action: Box<dyn FnOnce() -> T + Send + '_>| {
        std::thread::scope(|scope| scope.spawn(action).join().expect("the unprivileged thread"))
    };
    privileged(Box::new(move || {
        // SAFETY: takes a number; a raw system call changes this thread only.
        unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
        drop_capabilities();
        action()
    }))
}

/// Runs something on a thread of its own that is root's and has no capability.
pub fn without_capabilities<T: Send>(action: impl FnOnce() -> T + Send) -> T {
    let bare = || {
        drop_capabilities();
        action()
    };
    std::thread::scope(|scope| scope.spawn(bare).join().expect("the thread without capabilities"))
}

/// The capabilities of one thread, `struct __user_cap_header_struct` and `__user_cap_data_struct`.
fn drop_capabilities() {
    const VERSION_3: u32 = 0x2008_0522; // linux/capability.h
    let header: [u32; 2] = [VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: header and data have the layout of version 3, and both outlive the calls; a raw system
    // call changes this thread only.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capset, &header, &none), 0, "capset");
    }
}

/// A soft RLIMIT_MEMLOCK of this process, until dropped.
pub struct Memlock(nix::sys::resource::rlim_t, nix::sys::resource::rlim_t);

impl Memlock {
    pub fn new(bytes: u64) -> Self {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).expect("getrlimit");
        setrlimit(Resource::RLIMIT_MEMLOCK, bytes, hard).expect("setrlimit");
        Self(soft, hard)
    }
}

impl Drop for Memlock {
    fn drop(&mut self) {
        use nix::sys::resource::{Resource, setrlimit};
        setrlimit(Resource::RLIMIT_MEMLOCK, self.0, self.1).expect("setrlimit");
    }
}

/// An example program, built beside the tests.
pub fn example(name: &str) -> std::path::PathBuf {
    let tests = std::env::current_exe().expect("this program");
    tests.ancestors().nth(2).expect("target/PROFILE").join("examples").join(name)
}
