//! What this machine needs, and how it gets it.
//!
//! On Debian and its relatives that is a list of packages, installed with apt
//! when we may and named in one command otherwise. Elsewhere we can only say
//! which tools are needed and what Debian calls their packages.

use crate::{process, ui};
use anyhow::{Result, bail};
use std::process::{Command, Stdio};

/// A package and, where looking for a file is enough to know, a program of it.
type Package = (&'static str, Option<&'static str>);

/// To fetch the kernel, build the module and run the guest.
const GUEST: &[Package] = &[
    ("qemu-system-x86", Some("qemu-system-x86_64")),
    ("busybox-static", Some("busybox")),
    ("kmod", Some("depmod")),
    ("xz-utils", Some("xz")),
    ("zstd", Some("zstd")),
    // The module is built with the compiler that built the kernel.
    ("gcc-12", Some("gcc-12")),
    ("libc6-dev", None),
    ("make", Some("make")),
    // Used inside the guest, which sees this machine's file system.
    ("iproute2", Some("rdma")),
    ("rdma-core", None),
    ("ibverbs-providers", None),
    ("ibverbs-utils", Some("ibv_devinfo")),
    // GBM's drivers.
    ("libgl1-mesa-dri", None),
];

/// To build the library, its examples and its tests.
const LIBRARY: &[Package] = &[
    ("gcc", Some("gcc")),
    ("libc6-dev", None),
    ("linux-libc-dev", None),
    ("pkg-config", Some("pkg-config")),
    ("libibverbs-dev", None),
    ("librdmacm-dev", None),
    // ibverbs-sys configures rdma-core with cmake, which wants python, and runs bindgen.
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

/// Programs that the tests and benchmarks compare with.
const PEERS: &[Package] = &[
    ("rdmacm-utils", Some("rping")),
    ("perftest", Some("ib_write_bw")),
    // For the example that finds its peer by MPI.
    ("openmpi-bin", Some("mpirun")),
];

/// What a task is going to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Guest,
    Library,
    Peers,
}

/// Makes sure that all of it is installed.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let mut wanted: Vec<Package> = Vec::new();
    for need in needs {
        let list = match need {
            Need::Guest => GUEST,
            Need::Library => LIBRARY,
            Need::Peers => PEERS,
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
            "packages are missing; install them with\n\n    sudo apt-get install --no-install-recommends {}\n\n\
             and run this again",
            missing.join(" ")
        );
    }
    install(&missing)
}

/// Those that dpkg does not have.
fn missing(wanted: &[Package]) -> Result<Vec<&'static str>> {
    // dpkg-query fails when it does not know one of the names, so only what it says counts.
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
    // Another apt on this machine may be at work.
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
        apt
    };
    let install = || process::output(apt().args(["install", "-y", "--no-install-recommends"]).args(missing));
    // The lists may be old or, in a container, not there at all.
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
        "this machine has no apt, so install what is missing yourself.\n\
         Programs not found: {}.\nDebian's names of the packages that hold them and the headers needed: {}.",
        tools.join(", "),
        packages.join(", ")
    );
}
