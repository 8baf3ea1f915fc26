//! Installs the packages that this machine needs.
//!
//! On Debian and its derivatives, root installs them with apt; other users get
//! the command to run. Other systems get a list of the missing programs and the
//! names of their Debian packages.

use crate::{process, ui};
use anyhow::{Result, bail};
use std::process::{Command, Stdio};

/// A package and a program in it that shows whether it is installed, if it has one.
type Package = (&'static str, Option<&'static str>);

/// For fetching the kernel, building the modules and running the guest.
const GUEST: &[Package] = &[
    ("qemu-system-x86", Some("qemu-system-x86_64")),
    ("busybox-static", Some("busybox")),
    ("kmod", Some("depmod")),
    ("xz-utils", Some("xz")),
    ("zstd", Some("zstd")),
    // The modules need the compiler that built the kernel.
    ("gcc-12", Some("gcc-12")),
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

/// For building a kernel.
const KERNEL_BUILD: &[Package] = &[
    ("gcc-12", Some("gcc-12")),
    ("make", Some("make")),
    ("flex", Some("flex")),
    ("bison", Some("bison")),
    ("bc", Some("bc")),
    ("libelf-dev", None),
];

/// A set of packages that a task needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Guest,
    Library,
    Peers,
    BlockPeers,
    KernelBuild,
}

/// Installs the missing packages.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let mut wanted: Vec<Package> = Vec::new();
    for need in needs {
        let list = match need {
            Need::Guest => GUEST,
            Need::Library => LIBRARY,
            Need::Peers => PEERS,
            Need::BlockPeers => BLOCK_PEERS,
            Need::KernelBuild => KERNEL_BUILD,
        };
        wanted.extend(
            list.iter().filter(|(name, _)| !wanted.iter().any(|(n, _)| n == name)).collect::<Vec<_>>(),
        );
    }
    if process::find("dpkg-query").is_none() || process::find("apt-get").is_none() {
        return without_apt(&wanted);
    }
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!(
            "{} packages are missing; install them with\n\n    \
             sudo apt-get install --no-install-recommends {}\n\nand run this again",
            missing.len(),
            missing.join(" ")
        );
    }
    install(&missing)
}

/// The packages that dpkg does not list as installed.
fn missing(wanted: &[Package]) -> Result<Vec<&'static str>> {
    // dpkg-query fails if it does not know one of the names, so ignore its status.
    let out = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(wanted.iter().map(|(name, _)| name))
        .stderr(Stdio::null())
        .output()?;
    let known = String::from_utf8_lossy(&out.stdout);
    let installed: Vec<&str> = known.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(wanted.iter().map(|(name, _)| *name).filter(|name| !installed.contains(name)).collect())
}

fn install(missing: &[&str]) -> Result<()> {
    let step = ui::Step::start("Installing", &missing.join(" "));
    // Wait if another apt is running.
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
        apt
    };
    let install = || process::output(apt().args(["install", "-y", "--no-install-recommends"]).args(missing));
    // The package lists may be old, or missing in a container.
    process::output(apt().arg("update"))?;
    install()?;
    step.done("Installed", &format!("{} packages", missing.len()));
    Ok(())
}

fn without_apt(wanted: &[Package]) -> Result<()> {
    let absent = |&&(_, program): &&Package| program.is_none_or(|p| process::find(p).is_none());
    let missing: Vec<_> = wanted.iter().filter(absent).collect();
    if missing.iter().all(|(_, program)| program.is_none()) {
        return Ok(());
    }
    let tools: Vec<&str> = missing.iter().filter_map(|(_, program)| *program).collect();
    let packages: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    bail!(
        "this machine has no apt, so install the missing programs and headers yourself.\n\
         Programs not found: {}.\nDebian packages that contain them and the headers: {}.",
        tools.join(", "),
        packages.join(", ")
    );
}
