//! Runs the integration tests, one binary, in the guests that its tests need.
//!
//! A test's module decides where it runs, see `places`. After the runs this
//! compares the binary's list of tests with the tests that ran, so that no test
//! is forgotten.

use super::libtest::{Report, Verdict, parse_list};
use super::{Args, Summary, gpu, tee};
use crate::guest::{Guest, Job};
use crate::kernel::lines::{self, Kernel};
use crate::kernel::rxe::Rxe;
use crate::kernel::{self, NotOffered};
use crate::provider::Provider;
use crate::size::Size;
use crate::{cargo, lavapipe, process, project, ui, vm};
use anyhow::Result;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The name of the cargo target.
pub const TARGET: &str = "integration";

/// The modules of the tests.
const ANY: &str = "on_any_rxe::";
const STOCK: &str = "on_stock_rxe::";
const DMABUF: &str = "on_dmabuf_rxe::";
/// The provider pretends to be other devices.
const PROFILES: &str = "on_profiles::";
/// The program `dmabuf-rdma doctor` in injected surroundings.
const DOCTOR: &str = "doctor::";
/// A provider without ibv_reg_dmabuf_mr, and the tests that then register through the kernel's command.
const DEBIAN_PROVIDER: &str = "on_debian_provider::";
const REGISTRATION: &[&str] = &[
    DEBIAN_PROVIDER,
    "on_dmabuf_rxe::data::",
    "on_dmabuf_rxe::handles::",
    "on_dmabuf_rxe::newer::",
    "on_dmabuf_rxe::observe::",
    "on_dmabuf_rxe::protection::",
    "on_dmabuf_rxe::self_check::",
    "on_dmabuf_rxe::sets::",
    "on_dmabuf_rxe::support::",
];
/// Soft-iWARP.
const SIW: &str = "on_siw::";
const SWIOTLB: &str = "on_swiotlb::";
const IOMMU: &str = "on_iommu::";
const PCI: &str = "on_pci::";
const LINUX_6_12: &str = "on_linux_6_12::";
const LINUX_7: &str = "on_linux_7::";
const DEBUG: &str = "on_debug_kernel::";
const LONG: &str = "long::";
#[cfg(test)]
const MODULES: &[&str] = &[
    ANY,
    STOCK,
    DMABUF,
    PROFILES,
    DOCTOR,
    DEBIAN_PROVIDER,
    SIW,
    SWIOTLB,
    IOMMU,
    PCI,
    LINUX_6_12,
    LINUX_7,
    DEBUG,
    LONG,
];

/// The modules that need a special guest.
const NEED_A_GUEST: &[&str] =
    &[STOCK, PROFILES, DOCTOR, DEBIAN_PROVIDER, SIW, SWIOTLB, IOMMU, PCI, LINUX_6_12, LINUX_7, DEBUG];

/// Tests of this library's default timeouts, which the checks of a debug kernel exceed.
const TOO_SLOW_FOR_CHECKS: &[&str] = &["on_dmabuf_rxe::transfer::endings::sixteen_readers_of_one_server"];

/// An IOMMU, a device behind it, and a device that bypasses it through a second host bridge. Interrupt
/// remapping is off: it needs another interrupt controller under KVM, and its timer check fails on a busy
/// host.
const BEHIND_AN_IOMMU: &[&str] = &[
    "-device",
    "intel-iommu,intremap=off",
    "-device",
    "virtio-rng-pci,addr=1e.0",
    "-device",
    "pxb-pcie,id=aside,bus_nr=0x80,bus=pcie.0,bypass_iommu=true",
    "-device",
    "pcie-root-port,id=aside0,bus=aside,chassis=9,slot=9",
    "-device",
    "virtio-rng-pci,bus=aside0",
];

/// A device with its own memory, and a CPU whose host bridges the kernel trusts to forward peer-to-peer traffic: AMD's
/// since Zen, so this guest is always emulated. No topology helps on other CPUs: below one switch both devices would
/// be in one IOMMU group, which VFIO does not share with a driver.
const BARS: &[&str] = &[
    "-cpu",
    "max,-erms,-fsrm,-pclmulqdq,-la57,family=25",
    "-device",
    "pcie-root-port,id=shared0,bus=pcie.0,chassis=10,slot=10",
    "-object",
    "memory-backend-ram,id=shared,size=16M,share=on",
    "-device",
    "ivshmem-plain,memdev=shared,bus=shared0",
];

/// Two NUMA nodes; a switch with two ports and a device on each; a device with two functions behind another
/// root port; and, on each node, a host bridge with a device behind a root port.
const PCI_TOPOLOGY: &[&str] = &[
    "-object",
    "memory-backend-ram,id=ram0,size=1G",
    "-object",
    "memory-backend-ram,id=ram1,size=1G",
    "-numa",
    "node,nodeid=0,memdev=ram0,cpus=0-1",
    "-numa",
    "node,nodeid=1,memdev=ram1",
    "-device",
    "pcie-root-port,id=rp0,bus=pcie.0,chassis=11,slot=11,addr=10.0",
    "-device",
    "x3130-upstream,id=up0,bus=rp0",
    "-device",
    "xio3130-downstream,id=dn0,bus=up0,chassis=12,slot=12,addr=0.0",
    "-device",
    "xio3130-downstream,id=dn1,bus=up0,chassis=13,slot=13,addr=1.0",
    "-device",
    "virtio-rng-pci,bus=dn0",
    "-object",
    "memory-backend-ram,id=shared,size=16M,share=on",
    "-device",
    "ivshmem-plain,memdev=shared,bus=dn1",
    "-device",
    "pcie-root-port,id=rp1,bus=pcie.0,chassis=14,slot=14,addr=11.0",
    "-device",
    "virtio-rng-pci,bus=rp1,multifunction=on,addr=0.0",
    "-device",
    "virtio-rng-pci,bus=rp1,addr=0.1",
    "-device",
    "pxb-pcie,id=node0,bus_nr=0x80,bus=pcie.0,numa_node=0",
    "-device",
    "pcie-root-port,id=rp2,bus=node0,chassis=15,slot=15",
    "-device",
    "virtio-rng-pci,bus=rp2",
    "-device",
    "pxb-pcie,id=node1,bus_nr=0xc0,bus=pcie.0,numa_node=1",
    "-device",
    "pcie-root-port,id=rp3,bus=node1,chassis=16,slot=16",
    "-device",
    "virtio-rng-pci,bus=rp3",
];

/// A place where tests run.
struct Place {
    name: &'static str,
    kernel: &'static Kernel,
    /// `None` for this machine itself.
    guest: Option<(Rxe, Size)>,
    /// The provider, if it is not the usual one of the guest.
    provider: Option<Provider>,
    siw: bool,
    /// Extra parameters for the guest kernel's command line.
    append: &'static [&'static str],
    /// Extra arguments for QEMU.
    qemu: &'static [&'static [&'static str]],
    /// Emulation, also where KVM works.
    emulate: bool,
    /// The modules whose tests run here.
    modules: Vec<&'static str>,
}

/// The places where tests run, in order. Tests that work on any kernel run on `kernel`.
fn places(kernel: &'static Kernel, host: bool, long: bool) -> Vec<Place> {
    let if_long: &[&str] = if long { &[LONG] } else { &[] };
    let place = |name, guest, append, modules: &[&'static str]| Place {
        name,
        kernel,
        guest,
        provider: None,
        siw: false,
        append,
        qemu: &[],
        emulate: false,
        modules: modules.to_vec(),
    };
    if host {
        // This machine's device is not the stock rxe and is not in a special guest.
        return vec![place("Host", None, &[], &[&[ANY, DMABUF], if_long].concat())];
    }
    if kernel.configuration.is_some() {
        // The other guests differ in what the modules do not see.
        let modules = [&[ANY, DMABUF, DEBUG], if_long].concat();
        return vec![place(
            "debug guest",
            Some((Rxe::Dmabuf, Size::gib(if long { 14 } else { 8 }))),
            &[],
            &modules,
        )];
    }
    let if_6_12: &[&str] = if kernel.line == lines::LINUX_6_12.line { &[LINUX_6_12] } else { &[] };
    let dmabuf = [&[ANY, DMABUF, PROFILES, DOCTOR], if_6_12, if_long].concat();
    // The long tests have two buffers of 5 GiB.
    let memory = Size::gib(if long { 13 } else { 7 });
    vec![
        place("Stock guest", Some((Rxe::Stock, Size::gib(3))), &[], &[ANY, STOCK]),
        place("dma-buf guest", Some((Rxe::Dmabuf, memory)), &[], &dmabuf),
        Place {
            provider: Some(Provider::Debian),
            ..place("Debian's provider", Some((Rxe::Dmabuf, Size::gib(7))), &[], REGISTRATION)
        },
        Place { siw: true, ..place("siw guest", Some((Rxe::Dmabuf, Size::gib(2))), &[], &[SIW]) },
        place("swiotlb guest", Some((Rxe::Dmabuf, Size::gib(2))), &["swiotlb=force"], &[SWIOTLB]),
        Place {
            qemu: &[BEHIND_AN_IOMMU],
            ..place("IOMMU guest", Some((Rxe::Dmabuf, Size::gib(2))), &["intel_iommu=on"], &[IOMMU])
        },
        Place { qemu: &[PCI_TOPOLOGY], ..place("PCI guest", Some((Rxe::Stock, Size::gib(2))), &[], &[PCI]) },
        Place {
            kernel: kernel.beside(&lines::LINUX_7),
            qemu: &[BEHIND_AN_IOMMU, BARS],
            emulate: true,
            ..place("Linux 7 guest", Some((Rxe::Dmabuf, Size::gib(2))), &["intel_iommu=on"], &[LINUX_7])
        },
    ]
}

/// A guest with Debian's kernel for a suite, whose output is captured.
pub(super) fn guest_for_tests(args: &Args, rxe: Rxe, memory: Size) -> Result<Guest> {
    Ok(Guest {
        kernel: lines::by_name(&args.kernel)?,
        timeout: Some(Duration::from_secs(args.timeout.unwrap_or(1800))),
        capture: true,
        ..Guest::new(rxe, memory)
    })
}

pub(super) fn run(args: &Args, filter: &[&str], summary: &mut Summary) -> Result<()> {
    let step = ui::Step::start("Building", "the integration tests and the programs");
    let build = || -> Result<_> {
        let binary = cargo::executable(&["test", "--no-run", "--test", TARGET], TARGET)?;
        // The tests start the programs in examples/ and cli/.
        super::shown(
            project::cargo().args(["build", "--examples", "--bin", "dmabuf-rdma"]).args(cargo::EVERYTHING),
        )?;
        Ok(binary)
    };
    let binary = build().inspect_err(|_| summary.broken.push("building the integration tests".into()))?;
    step.done("Built", "the integration tests and the programs");
    let list = parse_list(&process::output(Command::new(&binary).arg("--list"))?);

    let mut all = Report::default();
    let mut unavailable: Vec<&str> = Vec::new();
    let kernel = lines::by_name(&args.kernel)?;
    let debug = kernel.configuration;
    for place in places(kernel, args.host, args.long) {
        let wanted =
            |name: &String| place.modules.iter().any(|m| name.starts_with(m)) && chosen(args, filter, name);
        let tests: Vec<&String> = list.iter().filter(|name| wanted(name)).collect();
        if tests.is_empty() {
            ui::note("Skipped", &format!("{}: no test to run there", place.name));
            continue;
        }
        if place.kernel.line != kernel.line
            && let Err(error) = kernel::unpacked(place.kernel)
        {
            if !error.is::<NotOffered>() {
                return Err(error);
            }
            ui::note("Skipped", &format!("{}: {error}", place.name));
            let reason = "this machine's Debian mirror has no such kernel";
            summary.skipped.extend(tests.into_iter().map(|name| (name.clone(), reason)));
            unavailable.extend(place.modules.iter());
            continue;
        }
        // Run the other guests even if one fails.
        let report = place.run(args, &binary, &tests, summary)?;
        all.add(&report);
    }
    for name in list.iter().filter(|name| chosen(args, filter, name)) {
        match all.tests.get(name) {
            Some(Verdict::Passed | Verdict::Failed) => {}
            _ if unavailable.iter().any(|module| name.starts_with(*module)) => {}
            _ if name.starts_with(gpu::MODULE) => summary.skipped.push((name.clone(), "needs --gpu")),
            _ if name.starts_with(LONG) && !args.long => summary.skipped.push((name.clone(), "needs --long")),
            _ if name.starts_with(LINUX_6_12) && debug.is_none() && kernel.line != lines::LINUX_6_12.line => {
                summary.skipped.push((name.clone(), "needs --kernel 6.12"))
            }
            _ if name.starts_with(DEBUG) && debug.is_none() => {
                summary.skipped.push((name.clone(), "needs --kernel debug"))
            }
            _ if debug.is_some() && TOO_SLOW_FOR_CHECKS.contains(&name.as_str()) => {
                summary.skipped.push((name.clone(), "the debug kernel exceeds the default timeouts"))
            }
            _ if debug.is_some() && NEED_A_GUEST.iter().any(|m| name.starts_with(m)) => {
                summary.skipped.push((name.clone(), "needs a guest with Debian's kernel"))
            }
            _ if args.host && NEED_A_GUEST.iter().any(|m| name.starts_with(m)) => {
                summary.skipped.push((name.clone(), "needs a guest"))
            }
            _ => summary.missed.push(name.clone()),
        }
    }
    summary.add(&all);
    Ok(())
}

fn chosen(args: &Args, filter: &[&str], name: &str) -> bool {
    let named = |part: &&str| name.contains(part);
    (!args.siw || name.starts_with(SIW)) && (filter.is_empty() || filter.iter().any(named))
}

impl Place {
    /// Runs the tests of this place. A failure goes into the summary; an error
    /// ends all runs.
    fn run(&self, args: &Args, binary: &Path, tests: &[&String], summary: &mut Summary) -> Result<Report> {
        let start = Instant::now();
        let mut words =
            vec![binary.to_string_lossy().into_owned(), "--test-threads=1".into(), "--exact".into()];
        let too_slow =
            |name: &str| self.kernel.configuration.is_some() && TOO_SLOW_FOR_CHECKS.contains(&name);
        let runs = |name: &&&String| !too_slow(name);
        words.extend(tests.iter().filter(runs).map(|name| name.to_string()));
        let (output, success) = match self.guest {
            None => {
                let mut command = Command::new(binary);
                command.args(&words[1..]).current_dir(project::root());
                tee(&mut command)?
            }
            Some((rxe, memory)) => {
                let slow = args.long || self.kernel.configuration.is_some();
                let timeout = args.timeout.unwrap_or(if slow { 5400 } else { 1200 });
                let mut guest = Guest {
                    kernel: self.kernel,
                    timeout: Some(Duration::from_secs(timeout)),
                    append: self.append.iter().map(|word| word.to_string()).collect(),
                    qemu: self.qemu.concat().iter().map(|word| word.to_string()).collect(),
                    emulate: self.emulate,
                    capture: true,
                    ..Guest::new(rxe, memory)
                };
                guest.siw = self.siw;
                guest.provider = self.provider.unwrap_or(guest.provider);
                let mut job = Job::new(words)?.for_tests();
                job.directory = project::root().to_path_buf();
                if self.modules.contains(&DMABUF) || self.modules == REGISTRATION {
                    for (name, value) in lavapipe::environment()? {
                        job = job.env(&name, &value);
                    }
                }
                let mut outcome = guest.run(&job)?;
                if outcome.hit_patched_code() {
                    vm::report(&outcome);
                    ui::note(
                        "Again",
                        "QEMU's emulation hit code that the kernel was patching; restarting the guest",
                    );
                    outcome = guest.run(&job)?;
                }
                vm::report(&outcome);
                let success = outcome.success();
                (outcome.stdout, success)
            }
        };
        let report = Report::parse(&output);
        let took = ui::seconds(start.elapsed());
        if success {
            ui::note("ok", &format!("{}: {} passed in {took}", self.name, report.passed));
        } else {
            ui::error(&format!("{}: {} failed after {took}", self.name, report.failed));
            // After a kernel panic or a timeout no test has failed.
            if report.failed == 0 {
                summary.broken.push(self.name.to_string());
            }
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_has_a_place() {
        let runs = |module: &&str, host, long| -> Vec<_> {
            places(&lines::LINUX_6_12, host, long)
                .iter()
                .filter(|p| p.modules.contains(module))
                .map(|p| p.name)
                .collect()
        };
        assert_eq!(places(&lines::LINUX_DEBUG, false, false)[0].modules, [ANY, DMABUF, DEBUG]);
        for module in MODULES.iter().filter(|module| **module != DEBUG) {
            assert!(!runs(module, false, true).is_empty(), "{module}");
            assert_eq!(runs(module, false, false).is_empty(), *module == LONG, "{module}");
        }
        assert_eq!(runs(&ANY, false, false), ["Stock guest", "dma-buf guest"]);
        assert_eq!(runs(&STOCK, false, true), ["Stock guest"]);
        assert_eq!(runs(&DMABUF, true, false), ["Host"]);
    }
}
