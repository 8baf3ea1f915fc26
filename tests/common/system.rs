//! Modules, kernel parameters and privileges of the guest. The tests run one at a time.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use dmabuf_rdma::exporter::CaptureDevice;

/// Loads a kernel module; the test fails if that fails.
#[track_caller]
pub fn modprobe(module: &str) {
    run("modprobe", &[module]);
}

/// Runs a program, which must succeed, and returns its stdout.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Loads vivid and opens its first, single-planar camera.
pub fn vivid() -> CaptureDevice {
    let [first, _] = cameras();
    CaptureDevice::open(first).expect("vivid")
}

/// Loads vivid with few features and returns the nodes of its two cameras. The second is multi-planar.
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
    // The nodes appear shortly after modprobe returns.
    while nodes.iter().any(|node| CaptureDevice::open(node).is_err()) {
        assert!(Instant::now() < end, "vivid did not create {nodes:?} within 20 s");
        std::thread::sleep(Duration::from_millis(50));
    }
    nodes
}

/// The PCI devices that a driver is bound to, sorted by address.
#[track_caller]
pub fn driven_by(driver: &str) -> Vec<dma_sg::pci::PciAddress> {
    let path = format!("/sys/bus/pci/drivers/{driver}");
    let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut found: Vec<_> =
        entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).collect();
    found.sort();
    assert!(!found.is_empty(), "{path} lists no device");
    found
}

/// Sets a kernel parameter, and restores the old value when dropped.
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

/// The value of a parameter. Some parameters list their choices, as in `always [never] advise`.
fn chosen(text: &str) -> String {
    let bracketed = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(text, |(value, _)| value).trim().into()
}

/// Reserves huge pages of 2 MiB until dropped.
pub fn huge_pages(count: u32) -> Setting {
    Setting::new("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", &count.to_string())
}

/// Enables transparent huge pages for memfds that request them, until dropped.
pub fn transparent_huge_pages() -> Setting {
    Setting::new("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise")
}

/// Runs `action` on a new thread without root's privileges: it has no capabilities, and opens files as
/// `nobody`.
pub fn unprivileged<T: Send>(action: impl FnOnce() -> T + Send) -> T {
    unprivileged_after(|| {}, action)
}

/// Runs `prepare` on a new thread as root, and then `action` there without root's privileges.
fn unprivileged_after<T: Send>(prepare: impl FnOnce() + Send, action: impl FnOnce() -> T + Send) -> T {
    let thread = || {
        prepare();
        // SAFETY: the argument is a number; the raw system call changes only this thread.
        unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
        drop_capabilities();
        action()
    };
    std::thread::scope(|scope| scope.spawn(thread).join().expect("the unprivileged thread"))
}

/// Runs `action` as [`unprivileged`] does, on a thread that sees no other device nodes than this file of root's.
pub fn with_forbidden_node<T: Send>(node: &str, action: impl FnOnce() -> T + Send) -> T {
    unprivileged_after(|| private_dev(Path::new(node)), action)
}

/// Gives this thread a /dev of its own, with a file that only root may open.
fn private_dev(node: &Path) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("unshare");
    let mount = |source: &CStr, at: &CStr, flags| {
        // SAFETY: the strings end in NUL, and the data is null.
        let answer =
            unsafe { libc::mount(source.as_ptr(), at.as_ptr(), source.as_ptr(), flags, std::ptr::null()) };
        assert_eq!(answer, 0, "mount at {at:?}: {}", std::io::Error::last_os_error());
    };
    mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE);
    mount(c"tmpfs", c"/dev", 0);
    fs::create_dir_all(node.parent().expect("a node in /dev")).expect("a folder in /dev");
    fs::write(node, "").expect("a file in /dev");
    fs::set_permissions(node, fs::Permissions::from_mode(0o600)).expect("its mode");
}

/// Runs `action` on a new thread of root without capabilities.
pub fn without_capabilities<T: Send>(action: impl FnOnce() -> T + Send) -> T {
    let bare = || {
        drop_capabilities();
        action()
    };
    std::thread::scope(|scope| scope.spawn(bare).join().expect("the thread without capabilities"))
}

/// Drops all capabilities of this thread. The arguments are `struct __user_cap_header_struct` and
/// `__user_cap_data_struct`.
fn drop_capabilities() {
    const VERSION_3: u32 = 0x2008_0522; // linux/capability.h
    let header: [u32; 2] = [VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: header and data have the layout of version 3 and outlive the call; the raw system call
    // changes only this thread.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capset, &header, &none), 0, "capset");
    }
}

/// Sets the soft RLIMIT_MEMLOCK of this process until dropped.
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

/// Tells a test that [`again`] runs it.
const CHILD: &str = "DMABUF_RDMA_TEST_CHILD";

/// Whether the test runs in a process of its own, which it started itself.
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// The current test in a process of its own, started through another program, such as `ip netns exec`.
pub fn again(through: &[&str]) -> Command {
    let exe = std::env::current_exe().expect("this program");
    let mut command = match through {
        [] => Command::new(exe),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(exe);
            command
        }
    };
    let name = std::thread::current().name().expect("the test's name").to_owned();
    command.args(["--exact", &name, "--nocapture", "--test-threads=1"]).env(CHILD, "1");
    command
}

/// The path of an example program, built with the tests.
pub fn example(name: &str) -> std::path::PathBuf {
    built().join("examples").join(name)
}

/// The path of the program `dmabuf-rdma`, built with the tests.
pub fn program() -> std::path::PathBuf {
    built().join("dmabuf-rdma")
}

/// The folder target/PROFILE.
fn built() -> std::path::PathBuf {
    let tests = std::env::current_exe().expect("this program");
    tests.ancestors().nth(2).expect("target/PROFILE").into()
}
