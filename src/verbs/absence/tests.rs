use super::*;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicU32, Ordering};

/// A root in a temporary folder, which is removed with it. Its nodes lead to /dev/null, 1:3.
struct World {
    root: PathBuf,
    open: fn(&Path) -> io::Result<File>,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl World {
    fn empty() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dmabuf-rdma-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = std::env::temp_dir().join(name);
        fs::create_dir_all(&root).unwrap();
        Self { root, open: open_node }
    }

    /// A machine with mlx5_0 and rxe0, where nothing is missing.
    fn complete() -> Self {
        let world = Self::empty();
        for (device, node) in [("mlx5_0", "uverbs0"), ("rxe0", "uverbs1")] {
            world.folder(&format!("sys/class/infiniband/{device}"));
            world.file(&format!("sys/class/infiniband_verbs/{node}/ibdev"), &format!("{device}\n"));
            world.file(&format!("sys/class/infiniband_verbs/{node}/dev"), "1:3\n");
            world.node(node);
        }
        world.file("sys/class/infiniband_verbs/abi_version", "6\n");
        world.file("sys/class/misc/rdma_cm/dev", "1:3\n");
        world.node("rdma_cm");
        symlink("../../drivers/mlx5_core", world.folder("sys/class/infiniband/mlx5_0/device").join("driver"))
            .unwrap();
        for name in ["mlx5", "rxe"] {
            world.file(&format!("etc/libibverbs.d/{name}.driver"), &format!("driver {name}\n"));
            world.file(&format!("usr/lib/x86_64-linux-gnu/libibverbs/lib{name}-rdmav34.so"), "");
        }
        world
    }

    fn folder(&self, path: &str) -> PathBuf {
        let path = self.root.join(path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn node(&self, name: &str) {
        symlink("/dev/null", self.folder("dev/infiniband").join(name)).unwrap();
    }

    fn without(self, path: &str) -> Self {
        let path = self.root.join(path);
        match path.symlink_metadata().unwrap().is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
        self
    }

    fn refusing(mut self, open: fn(&Path) -> io::Result<File>) -> Self {
        self.open = open;
        self
    }

    fn system(&self) -> System {
        System { root: self.root.clone(), library: None, open: self.open }
    }

    #[track_caller]
    fn unlisted(&self, errno: Option<i32>, parts: &[&str]) {
        assert_cause(Some(self.system().nothing_listed()), errno, parts);
    }
}

#[track_caller]
fn assert_cause(cause: Option<Cause>, errno: Option<i32>, parts: &[&str]) {
    let cause = cause.expect("a cause");
    assert_eq!(cause.source.as_ref().and_then(io::Error::raw_os_error), errno, "{}", cause.text);
    for part in parts {
        assert!(cause.text.contains(part), "{:?} lacks {part:?}", cause.text);
    }
}

fn fails<const ERRNO: i32>(_: &Path) -> io::Result<File> {
    Err(io::Error::from_raw_os_error(ERRNO))
}

#[test]
fn a_kernel_without_devices_is_not_a_fault_of_the_container() {
    let nothing = World::empty();
    nothing.folder("sys/class");
    assert!(nothing.system().unlisted().is_none());
    nothing.unlisted(None, &["the kernel has no RDMA device: load the NIC's driver", "rdma link add"]);
    let other_namespace = World::empty();
    other_namespace.folder("sys/class/infiniband");
    assert!(other_namespace.system().unlisted().is_none());
    other_namespace.unlisted(None, &["in this network namespace", "rdma dev set"]);
}

#[test]
fn the_missing_one_of_module_node_and_provider_is_named() {
    let of_mlx5 = "the kernel has mlx5_0, but ";
    let world = World::complete().without("sys/class/infiniband_verbs");
    world.unlisted(None, &[of_mlx5, "modprobe ib_uverbs"]);
    let world = World::complete().without("dev/infiniband");
    world.unlisted(Some(libc::ENOENT), &[of_mlx5, "/dev/infiniband is missing", "--device"]);
    world.folder("dev/infiniband");
    world.unlisted(Some(libc::ENOENT), &["/dev/infiniband is empty"]);
    let world = World::complete().without("dev/infiniband/uverbs0");
    let parts = ["/dev/infiniband/uverbs0 is missing (there are: rdma_cm, uverbs1)"];
    world.unlisted(Some(libc::ENOENT), &parts);

    let world = World::complete().without("usr");
    // Of the development package.
    world.file("usr/lib/x86_64-linux-gnu/libmlx5-rdmav34.a", "");
    world.unlisted(None, &[of_mlx5, "no provider is installed", "ibverbs-providers"]);
    let world = World::complete().without("etc");
    world.unlisted(None, &["/etc/libibverbs.d names no provider", "installed: mlx5, rxe"]);
    let libraries = "usr/lib/x86_64-linux-gnu/libibverbs";
    let world = World::complete().without(&format!("{libraries}/libmlx5-rdmav34.so"));
    let parts = ["mlx5_0 (driver mlx5_core)", "none of the installed providers takes it (rxe)"];
    world.unlisted(None, &parts);
    let world = world.without("etc/libibverbs.d/rxe.driver");
    let parts = ["names (mlx5) are not installed in /usr/lib/x86_64-linux-gnu/libibverbs"];
    world.unlisted(None, &parts);
}

#[test]
fn one_device_of_several_is_explained() {
    let world = World::complete().without("dev/infiniband/uverbs1");
    assert!(world.system().device("mlx5_7").is_none());
    let parts = ["the kernel has rxe0, but /dev/infiniband/uverbs1 is missing"];
    assert_cause(world.system().device("rxe0"), Some(libc::ENOENT), &parts);
}

#[test]
fn without_sysfs_the_nodes_and_providers_decide() {
    World::complete().without("sys").unlisted(None, &["/sys is not mounted"]);
    let world = World::complete().without("sys").without("usr");
    world.unlisted(None, &["no provider is installed"]);
    let world = World::complete().without("sys").without("dev");
    world.unlisted(Some(libc::ENOENT), &["/dev/infiniband is missing"]);
    assert!(World::complete().without("sys").system().node("uverbs0").is_none());
    assert!(World::complete().without("sys").system().manager().is_none());
}

#[test]
fn a_node_that_cannot_be_opened_is_explained_by_the_kernels_answer() {
    let node = |world: World| world.system().node("uverbs0");
    assert!(node(World::complete()).is_none());
    let parts = ["this user may not open /dev/infiniband/uverbs0 (owner 0:0, mode 0666)"];
    assert_cause(node(World::complete().refusing(fails::<{ libc::EACCES }>)), Some(libc::EACCES), &parts);
    let parts = ["the device cgroup forbids /dev/infiniband/uverbs0"];
    assert_cause(node(World::complete().refusing(fails::<{ libc::EPERM }>)), Some(libc::EPERM), &parts);
    let parts = ["no device is behind /dev/infiniband/uverbs0"];
    assert_cause(node(World::complete().refusing(fails::<{ libc::ENXIO }>)), Some(libc::ENXIO), &parts);
    let parts = ["too few free file descriptors"];
    assert_cause(node(World::complete().refusing(fails::<{ libc::EMFILE }>)), Some(libc::EMFILE), &parts);
    let missing = World::complete().without("dev/infiniband/uverbs0");
    assert_cause(node(missing), Some(libc::ENOENT), &["/dev/infiniband/uverbs0 is missing"]);

    let removed = World::complete().without("sys/class/infiniband_verbs/uverbs0");
    assert_cause(node(removed), Some(libc::ENODEV), &["the device was removed"]);
    let stale = World::complete();
    stale.file("sys/class/infiniband_verbs/uverbs0/dev", "231:192\n");
    assert_cause(node(stale), None, &["has the device numbers 1:3", "231:192"]);
    let file = World::complete().without("dev/infiniband/uverbs0");
    file.file("dev/infiniband/uverbs0", "");
    assert_cause(node(file), None, &["is not a device node"]);
}

#[test]
fn the_connection_manager_is_absent_or_forbidden() {
    let manager = |world: World| world.system().manager();
    assert!(manager(World::complete()).is_none());
    let unloaded = World::complete().without("sys/class/misc");
    assert_cause(manager(unloaded), None, &["modprobe rdma_ucm"]);
    let absent = World::complete().without("dev/infiniband/rdma_cm");
    let parts = ["/dev/infiniband/rdma_cm is missing (there are: uverbs0, uverbs1)"];
    assert_cause(manager(absent), Some(libc::ENOENT), &parts);
    let forbidden = World::complete().refusing(fails::<{ libc::EPERM }>);
    assert_cause(manager(forbidden), Some(libc::EPERM), &["forbids /dev/infiniband/rdma_cm"]);
}

#[test]
fn this_system_has_descriptors_and_a_libibverbs() {
    descriptors().unwrap();
    let folder = folder_of_libibverbs().expect("the folder of libibverbs.so.1");
    assert!(folder.is_absolute());
}
