//! A device that is hidden, forbidden, or lacks its provider, and a process without descriptors: the error names
//! the cause.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use dmabuf_rdma::ErrorKind;
use dmabuf_rdma::cm::{self, Listener};
use dmabuf_rdma::verbs::{self, CompletionQueue, Device, devices};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::assert_refused;
use crate::common::census::fds;
use crate::common::system::{run, unprivileged};

const NODES: &str = "/dev/infiniband";
const PROVIDERS: &str = "/usr/lib/x86_64-linux-gnu/libibverbs";

/// Set in a process that runs one test again.
const AGAIN: &str = "DMABUF_RDMA_TEST_AGAIN";

/// Runs the test of this name again in a new process, in which libibverbs has loaded no provider and librdmacm no
/// device. Returns true in that process, and false when it has succeeded.
#[track_caller]
fn in_a_new_process(test: &str) -> bool {
    if std::env::var_os(AGAIN).is_some() {
        return true;
    }
    let name = format!("on_any_rxe::absence::{test}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    // With the distribution's libraries, whose folders the tests name.
    command.args(["--exact", &name, "--test-threads=1"]).env(AGAIN, "1").env_remove("LD_LIBRARY_PATH");
    let output = command.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {}\n{printed}\n{errors}", output.status);
    assert!(printed.contains("1 passed"), "{name}: {printed}");
    false
}

/// Runs `action` on a thread with its own mounts, among them an empty folder over each of `hidden`.
fn hiding<T: Send>(hidden: &[&str], action: impl FnOnce() -> T + Send) -> T {
    let apart = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        run("/usr/bin/mount", &["--make-rprivate", "/"]);
        for folder in hidden {
            run("/usr/bin/mount", &["-t", "tmpfs", "none", folder]);
        }
        action()
    };
    std::thread::scope(|scope| scope.spawn(apart).join()).unwrap_or_else(|e| std::panic::resume_unwind(e))
}

/// The node of a device, as in `uverbs0`.
fn node(device: &str) -> String {
    let class = fs::read_dir("/sys/class/infiniband_verbs").unwrap();
    let of = |name: &String| {
        fs::read_to_string(format!("/sys/class/infiniband_verbs/{name}/ibdev"))
            .is_ok_and(|of| of.trim() == device)
    };
    let mut names = class.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.find(of).expect("a node")
}

fn listen() -> cm::Error {
    Listener::bind("0.0.0.0:0".parse().unwrap()).expect_err("a manager that cannot be used")
}

#[track_caller]
fn assert_parts(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn nodes_that_a_container_lacks_are_named() {
    drop(Listener::bind("0.0.0.0:0".parse().unwrap()).unwrap());
    hiding(&[NODES], || {
        let error = devices().unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NotFound, Some(libc::ENOENT)));
        let message = assert_refused!(Device::by_name("rxe0"), verbs::Error::ListDevices { .. });
        assert_parts(&message, &["the kernel has rxe0, but /dev/infiniband is empty", "--device"]);
        let error = listen();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NotFound, Some(libc::ENOENT)));
        assert_parts(&error.to_string(), &["/dev/infiniband is empty", "--device /dev/infiniband/rdma_cm"]);
    });
    // Without /sys, which libibverbs does not need either.
    hiding(&["/sys", NODES], || {
        let message = assert_refused!(devices(), verbs::Error::ListDevices { .. });
        assert_parts(&message, &["/dev/infiniband is empty"]);
    });
    let of_rxe1 = node("rxe1");
    let number = fs::metadata(format!("{NODES}/{of_rxe1}")).unwrap().rdev();
    hiding(&[NODES], || {
        let path = format!("{NODES}/{of_rxe1}");
        mknod(path.as_str(), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), number).unwrap();
        let names: Vec<_> = devices().unwrap().iter().map(|device| device.name().to_owned()).collect();
        assert_eq!(names, ["rxe1"]);
        let message = assert_refused!(Device::by_name("rxe0"), verbs::Error::UnknownDevice { .. });
        let missing = format!("/dev/infiniband/{} is missing (there are: {of_rxe1})", node("rxe0"));
        assert_parts(&message, &["present: rxe1; the kernel has rxe0, but", &missing]);
        Device::by_name("rxe1").unwrap().open().unwrap();
        assert_parts(&listen().to_string(), &["/dev/infiniband/rdma_cm is missing"]);
    });
    Device::by_name("rxe0").unwrap().open().unwrap();
}

/// Another user's nodes, with and without the folder /dev/char, where libibverbs looks for a node that it cannot
/// open.
#[test]
fn nodes_that_this_user_may_not_open_are_named() {
    let (uverbs, number) = (node("rxe0"), fs::metadata(format!("{NODES}/{}", node("rxe0"))).unwrap().rdev());
    let nodes = [uverbs.as_str(), "rdma_cm"].map(|name| format!("{NODES}/{name}"));
    let modes = nodes.each_ref().map(|path| fs::metadata(path).unwrap().mode() & 0o7777);
    let set = |modes: [u32; 2]| {
        for (path, mode) in nodes.iter().zip(modes) {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    let refused = || {
        set([0o600; 2]);
        let device = Device::by_name("rxe0").unwrap();
        let refused = unprivileged(|| (device.open().map(drop), listen()));
        set(modes);
        refused
    };
    let checked = |(opened, listened): (Result<(), verbs::Error>, cm::Error)| {
        let error = opened.unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Permission, Some(libc::EACCES)), "{error}");
        let part = format!("this user may not open /dev/infiniband/{uverbs} (owner 0:0, mode 0600)");
        assert_parts(&error.to_string(), &["rxe0: cannot open the device", &part]);
        assert_eq!((listened.kind(), listened.errno()), (ErrorKind::Permission, Some(libc::EACCES)));
        assert_parts(&listened.to_string(), &["this user may not open /dev/infiniband/rdma_cm"]);
    };
    let char_folder = "/dev/char";
    assert!(!fs::exists(char_folder).unwrap(), "this guest has no udev");
    checked(refused());
    fs::create_dir(char_folder).unwrap();
    let link = format!("{char_folder}/{}:{}", libc::major(number), libc::minor(number));
    symlink(&nodes[0], link).unwrap();
    let seen = refused();
    fs::remove_dir_all(char_folder).unwrap();
    checked(seen);
}

#[test]
fn providers_that_are_not_installed_are_named() {
    if in_a_new_process("providers_that_are_not_installed_are_named") {
        hiding(&[PROVIDERS], || {
            let error = devices().unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::NotFound, None));
            let part = format!("the kernel has rxe0, but no provider is installed in {PROVIDERS}");
            assert_parts(&error.to_string(), &[&part, "install ibverbs-providers"]);
            assert_parts(&listen().to_string(), &["no provider is installed"]);
        });
    }
}

#[test]
fn a_configuration_without_providers_is_named() {
    if in_a_new_process("a_configuration_without_providers_is_named") {
        hiding(&["/etc/libibverbs.d"], || {
            let message = assert_refused!(Device::by_name("rxe0"), verbs::Error::ListDevices { .. });
            assert_parts(&message, &["/etc/libibverbs.d names no provider"]);
        });
    }
}

/// A process that was out of descriptors when it first listed the devices sees them once it has some.
#[test]
fn a_lack_of_descriptors_is_named_and_passes() {
    if !in_a_new_process("a_lack_of_descriptors_is_named_and_passes") {
        return;
    }
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // Without the descriptor of the listing itself.
    let allow = |more: u64| setrlimit(Resource::RLIMIT_NOFILE, fds() as u64 - 1 + more, hard).unwrap();
    let back = || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    for more in 0..8 {
        allow(more);
        let (listed, found, listened) = (devices(), Device::by_name("rxe0"), listen());
        back();
        for error in [listed.unwrap_err(), found.unwrap_err()] {
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Limit, Some(libc::EMFILE)), "{more}");
            assert_parts(&error.to_string(), &["too few free file descriptors: raise ulimit -n"]);
        }
        assert_eq!((listened.kind(), listened.errno()), (ErrorKind::Limit, Some(libc::EMFILE)), "{more}");
        assert_parts(&listened.to_string(), &["the connection manager", "raise ulimit -n"]);
    }
    let device = Device::by_name("rxe0").expect("nothing was given up");
    let listener = Listener::bind("0.0.0.0:0".parse().unwrap()).expect("nothing was given up");
    let context = device.open().unwrap();
    allow(0);
    let opened = device.open().map(drop);
    let queue = CompletionQueue::new(&context, 8).map(drop);
    let gids = context.gids(1).map(drop);
    let request = listener.accept_request(std::time::Duration::ZERO).map(drop);
    back();
    for (what, refused) in [("open", opened), ("completion queue", queue), ("GIDs", gids)] {
        let error = refused.expect_err(what);
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Limit, Some(libc::EMFILE)), "{what}: {error}");
    }
    let error = request.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Limit, Some(libc::EMFILE)), "{error}");
}
