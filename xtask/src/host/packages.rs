//! The Debian packages that tasks need.

/// A package and a program in it that shows whether it is installed, if it has one.
pub type Package<'a> = (&'a str, Option<&'a str>);

/// A set of packages that a task needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Guest,
    Library,
    Peers,
    BlockPeers,
    Python,
    C,
    KernelBuild,
}

impl Need {
    pub fn packages(self) -> &'static [Package<'static>] {
        match self {
            Need::Guest => GUEST,
            Need::Library => LIBRARY,
            Need::Peers => PEERS,
            Need::BlockPeers => BLOCK_PEERS,
            Need::Python => PYTHON,
            Need::C => C,
            Need::KernelBuild => KERNEL_BUILD,
        }
    }
}

/// The packages of several needs, each once.
pub fn of(needs: &[Need]) -> Vec<Package<'static>> {
    let mut wanted: Vec<Package> = Vec::new();
    for package in needs.iter().flat_map(|need| need.packages()) {
        if !wanted.iter().any(|(name, _)| *name == package.0) {
            wanted.push(*package);
        }
    }
    wanted
}

/// For fetching the kernel, building the modules and running the guest.
const GUEST: &[Package] = &[
    ("qemu-system-x86", Some("qemu-system-x86_64")),
    ("busybox-static", Some("busybox")),
    ("kmod", Some("depmod")),
    ("xz-utils", Some("xz")),
    ("zstd", Some("zstd")),
    // The release's own compiler, which built its kernel.
    ("gcc", Some("gcc")),
    ("libc6-dev", None),
    ("make", Some("make")),
    // The guest uses these: it sees this machine's file system.
    ("iproute2", Some("rdma")),
    ("rdma-core", None),
    ("ibverbs-providers", None),
    ("ibverbs-utils", Some("ibv_devinfo")),
    // Drivers for GBM.
    ("libgl1-mesa-dri", None),
];

/// For building the library, its examples and its tests.
const LIBRARY: &[Package] = &[
    ("gcc", Some("gcc")),
    ("libc6-dev", None),
    ("linux-libc-dev", None),
    ("pkg-config", Some("pkg-config")),
    ("libibverbs-dev", None),
    ("librdmacm-dev", None),
    // ibverbs-sys configures rdma-core with cmake, which needs python, and runs bindgen.
    ("cmake", Some("cmake")),
    ("python3", Some("python3")),
    ("make", Some("make")),
    ("clang", Some("clang")),
    ("libclang-dev", None),
    ("libnl-3-dev", None),
    ("libnl-route-3-dev", None),
    ("libudev-dev", None),
    // For the feature gbm.
    ("libgbm-dev", None),
];

/// Programs that the tests and benchmarks use as peers.
const PEERS: &[Package] = &[
    ("rdmacm-utils", Some("rping")),
    ("perftest", Some("ib_write_bw")),
    // For the example `mpi`.
    ("openmpi-bin", Some("mpirun")),
];

/// Programs that only `cargo xtask bench peers` compares with. Its Python packages are in a virtual environment.
const BLOCK_PEERS: &[Package] =
    &[("ucx-utils", Some("ucx_perftest")), ("python3", Some("python3")), ("python3-venv", None)];

/// For the Python package.
const PYTHON: &[Package] = &[("python3", Some("python3")), ("python3-venv", None)];

/// For the tests of the C library. AddressSanitizer comes with gcc.
const C: &[Package] = &[
    ("gcc", Some("gcc")),
    ("g++", Some("g++")),
    ("libc6-dev", None),
    ("binutils", Some("nm")),
    ("pkg-config", Some("pkg-config")),
    ("python3", Some("python3")),
    ("valgrind", Some("valgrind")),
];

/// For building a kernel.
const KERNEL_BUILD: &[Package] = &[
    ("gcc", Some("gcc")),
    ("make", Some("make")),
    ("flex", Some("flex")),
    ("bison", Some("bison")),
    ("bc", Some("bc")),
    ("libelf-dev", None),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::project;
    use std::collections::BTreeSet;

    #[test]
    fn the_container_has_what_the_demo_and_the_tests_need() {
        let text = std::fs::read_to_string(project::root().join("Containerfile")).unwrap();
        let list = text.split("--no-install-recommends").nth(1).expect("an apt-get install");
        let list = list.split("&&").next().unwrap().replace('\\', " ");
        let listed: BTreeSet<&str> = list.split_whitespace().collect();
        let needed: BTreeSet<&str> =
            of(&[Need::Guest, Need::Library, Need::Peers]).iter().map(|(name, _)| *name).collect();
        assert_eq!(listed, needed);
    }
}
