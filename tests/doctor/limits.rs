//! Limits of a user, a process and a cgroup.

use std::fs;

use super::all_pairs;
use crate::common::cgroup::Cgroup;
use crate::common::doctor::Doctor;
use crate::common::system::Setting;

/// 8 MiB of locked memory, and nodes of exporters that belong to root.
#[test]
fn a_plain_user_with_little_locked_memory() {
    let user = Doctor::new().through(&["/usr/bin/prlimit", "--memlock=8388608:8388608"]).by_nobody().run();
    let memlock = "memlock: RLIMIT_MEMLOCK is 8.00 MiB, and 0 B are pinned: ibv_reg_mr refuses more host memory, and some NICs their queues (ENOMEM); dma-bufs are not charged -> ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 for a container";
    let forbidden = |node: &str, remedy: &str| {
        format!("exporter-forbidden: this user may not open {node} (EACCES) -> {remedy}")
    };
    let told = user.told();
    assert_eq!(told[0], memlock, "{told:?}");
    let heaps: Vec<_> =
        super::heaps().iter().map(|heap| heap.replace("dma-heap ", "/dev/dma_heap/")).collect();
    for node in heaps.iter().map(String::as_str).chain(["/dev/udmabuf"]) {
        let start = forbidden(node, "");
        assert!(told.iter().any(|line| line.starts_with(start.trim_end())), "{node}: {told:?}");
    }
    assert_eq!(told.len(), 2 + heaps.len(), "{told:?}");
    // Host memory works within the limit.
    assert_eq!((user.grade(), user.status), ("C", 0));
    assert!(user.notes().iter().any(|note| note.starts_with("frames-hidden: ")));
    let facts = &user.json["facts"];
    assert_eq!(
        (&facts["process"]["user"], &facts["limits"]["memlock"]["soft"]),
        (&65534.into(), &(8 << 20).into())
    );

    // With the right to the exporters and no locked memory at all, dma-bufs move nevertheless.
    let nothing = Doctor::new()
        .after("chmod 666 /dev/udmabuf /dev/dma_heap/*")
        .through(&["/usr/bin/prlimit", "--memlock=0:0"])
        .by_nobody()
        .run();
    fs::read_dir("/dev/dma_heap").unwrap().for_each(|heap| private(&heap.unwrap().path()));
    private(std::path::Path::new("/dev/udmabuf"));
    let told = nothing.told();
    assert!(told.iter().all(|line| line.starts_with("memlock: ")) && told.len() >= 2, "{told:?}");
    assert_eq!(nothing.grade(), "A", "{:?}", nothing.pairs());
}

fn private(node: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(node, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn few_descriptors() {
    let few = Doctor::new().through(&["/usr/bin/prlimit", "--nofile=24:24"]).run();
    let told = few.told();
    assert_eq!(
        told[0],
        "open-files: a process may have 24 files open, and each dma-buf is one until it is registered -> ulimit -n 1048576, LimitNOFILE= in a systemd unit, --ulimit nofile= for a container",
        "{told:?}"
    );
    let exhausted = Doctor::new().through(&["/usr/bin/prlimit", "--nofile=9:9"]).run();
    let told = exhausted.told();
    assert!(
        told.iter()
            .any(|line| line
                .starts_with("open-files: this process has too few free file descriptors (EMFILE)")),
        "{told:?}"
    );
    assert_eq!((exhausted.grade(), exhausted.status), ("F", 1));
}

#[test]
fn a_cgroup_of_256_mib() {
    let cgroup = Cgroup::new(256 << 20);
    let limited = Doctor::new().run();
    drop(cgroup);
    let told = limited.told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].starts_with("cgroup-memory: the cgroup permits 256.00 MiB of memory and leaves "),
        "{told:?}"
    );
    assert!(told[0].contains(" (/sys/fs/cgroup/limited/memory.max) -> raise its memory.max"), "{told:?}");
    let left = limited.json["facts"]["limits"]["cgroup_memory"]["left"].as_u64().unwrap();
    assert!((1..256 << 20).contains(&left), "{left}");
    assert_eq!(limited.pairs(), all_pairs(&["rxe0", "rxe1"]));
}

#[test]
fn udmabufs_own_limits() {
    let _size = Setting::new("/sys/module/udmabuf/parameters/size_limit_mb", "64");
    let _list = Setting::new("/sys/module/udmabuf/parameters/list_limit", "1024");
    let limit = "udmabuf-limit: a udmabuf has at most 64 MiB in 1024 ranges -> raise size_limit_mb and list_limit in /sys/module/udmabuf/parameters, also at run time";
    Doctor::new().run().assert("A", &[limit], &[]);
}
