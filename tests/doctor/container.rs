//! Containers: without /sys or /proc, without providers, under seccomp.
//!
//! `unsafe` is here to install a seccomp filter.

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO};

use super::all_pairs;
use crate::common::doctor::Doctor;

#[test]
fn a_container_without_sys_or_proc() {
    let sys = Doctor::new().after("/usr/bin/mount -t tmpfs none /sys").run();
    // The usual notes about /sys cannot be told; everything is tried nevertheless.
    assert_eq!(sys.pairs(), all_pairs(&["rxe0", "rxe1"]));
    assert_eq!((sys.told(), sys.grade()), (vec![], "A"));
    let hidden = |notes: Vec<String>, file: &str| {
        let found: Vec<_> = notes.into_iter().filter(|note| note.starts_with("files-hidden: ")).collect();
        assert!(found.len() == 1 && found[0].contains(&format!("{file} is not there")), "{found:?}");
    };
    hidden(sys.notes(), "/sys");
    assert_eq!(sys.json["facts"]["gpus"]["unknown"], "/sys/bus: there is no sysfs here");

    let proc = Doctor::new().after("/usr/bin/mount -t tmpfs none /proc").run();
    hidden(proc.notes(), "/proc");
    assert_eq!(
        proc.json["facts"]["kernel"]["release"]["unknown"],
        "/proc/sys/kernel/osrelease: No such file or directory"
    );
}

#[test]
fn a_container_without_providers() {
    let folder = "/usr/lib/x86_64-linux-gnu/libibverbs";
    let none =
        Doctor::new().with_debians_provider().after(&format!("/usr/bin/mount -t tmpfs none {folder}")).run();
    let missing = format!(
        "provider-missing: the kernel has rxe0, but no provider is installed in {folder} -> install ibverbs-providers (Debian) or libibverbs (Fedora)"
    );
    assert_eq!(none.told()[0], missing);
    assert_eq!((none.grade(), none.status), ("F", 1));

    let unnamed =
        Doctor::new().with_debians_provider().after("/usr/bin/mount -t tmpfs none /etc/libibverbs.d").run();
    assert!(
        unnamed.told()[0]
            .starts_with("provider-missing: the kernel has rxe0, but /etc/libibverbs.d names no provider")
    );
    assert_eq!(unnamed.grade(), "F");
}

/// Debian's provider lacks the call that other programs use.
#[test]
fn a_provider_that_lacks_the_import() {
    let told = Doctor::new().with_debians_provider().run().told();
    let lacks = |device: &str| {
        format!(
            "provider-lacks-import: {device} imports dma-bufs in the kernel, but the provider of rdma-core {} lacks ibv_reg_dmabuf_mr: programs that call it (NCCL, UCX, libfabric) are refused; this library asks the kernel -> a newer rdma-core, if a later provider of this device has it (docs/kernel-support.md)",
            debians()
        )
    };
    assert_eq!(told, [lacks("rxe0"), lacks("rxe1")]);
}

/// The version of Debian's rdma-core.
fn debians() -> String {
    let file = std::fs::canonicalize("/usr/lib/x86_64-linux-gnu/libibverbs.so.1").unwrap();
    let name = file.file_name().unwrap().to_str().unwrap().to_owned();
    name.split('.').skip(4).collect::<Vec<_>>().join(".")
}

/// Runs `action` on a thread whose system call of this number fails with EPERM, as do those of its children.
fn without_call<T: Send>(number: libc::c_long, action: impl FnOnce() -> T + Send) -> T {
    let confined = || {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut program = [
            step(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
            step(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, number as u32),
            step(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | libc::EPERM as u32),
            step(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: takes numbers; it affects this thread and its children only.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
        // SAFETY: the program outlives the call, which copies it.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        action()
    };
    std::thread::scope(|scope| scope.spawn(confined).join().expect("the confined thread"))
}

#[test]
fn a_container_with_a_seccomp_profile() {
    let confined = without_call(libc::SYS_memfd_create, || Doctor::new().run());
    let told = confined.told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("seccomp: udmabuf could not "), "{told:?}");
    assert!(told[0].contains("(EPERM); a seccomp filter is active, which may have refused the system call -> run the container with a profile"), "{told:?}");
    assert_eq!((confined.grade(), &confined.json["facts"]["process"]["seccomp"]), ("B", &2.into()));
}
