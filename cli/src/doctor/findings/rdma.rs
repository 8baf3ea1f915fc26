//! Findings about the RDMA devices.

use super::{Finding, Id, Severity};
use crate::doctor::facts::{Device, Facts, Port};
use crate::doctor::failure::import_unsupported;
use crate::doctor::trials::{DeviceTrial, Trials};

pub fn find(facts: &Facts, trials: Option<&Trials>, all: &mut Vec<Finding>) {
    for device in &facts.devices {
        device.ports.iter().for_each(|port| of_port(device, port, all));
        if device.driver.as_deref() == Some("rxe") {
            all.push(Finding::new(
                Id::LargeHostRegions,
                &device.name,
                "soft-RoCE of some kernels (6.12.117, 7.3) refuses more than 1 GiB of host memory in one region (ENOMEM)".into(),
                "register in chunks of 1 GiB (RegionSet); dma-bufs have no such limit",
            ));
        }
    }
    if let Some(trials) = trials.filter(|trials| trials.untried > 0) {
        all.push(Finding::new(
            Id::Untried,
            "pairs",
            format!(
                "{} pairs of exporter and device were not tried, since the others took all the time",
                trials.untried
            ),
            "look at the devices that do not answer first, and run doctor again",
        ));
    }
    match trials {
        Some(trials) => trials.devices.iter().for_each(|device| of_trial(device, facts, all)),
        // Nobody looked whether libibverbs lists them.
        None if facts.devices.is_empty() => all.push(Finding::new(
            Id::NoDevice,
            "devices",
            "the kernel has no RDMA device".into(),
            "load the NIC's driver (modprobe mlx5_ib), or add soft-RoCE (rdma link add rxe0 type rxe netdev eth0)",
        )),
        None => {}
    }
}

/// The network interface of a port.
fn interface<'a>(device: &'a Device, port: &'a Port) -> Option<&'a str> {
    port.netdevs.first().map(|(name, _)| name.as_str()).or(device.netdev.as_deref())
}

/// The cause and the remedy of a port that carries no traffic.
pub fn port_down(device: &Device, port: &Port) -> Option<(String, String)> {
    let state = port.state.known().filter(|state| *state != "ACTIVE")?;
    let physical = port.physical_state.known().map(|state| format!(", {state}")).unwrap_or_default();
    let remedy = match interface(device, port) {
        Some(interface) => format!("ip link set {interface} up, or check the cable and the switch"),
        None if port.link_layer.known().is_some_and(|layer| layer == "InfiniBand") => {
            "check the cable, and that a subnet manager runs (opensm)".into()
        }
        None => "bring its network interface up, or check the cable and the switch".into(),
    };
    Some((format!("{} port {} is {state}{physical}", device.name, port.number), remedy))
}

fn of_port(device: &Device, port: &Port, all: &mut Vec<Finding>) {
    let (name, interface) = (&device.name, interface(device, port));
    if let Some((cause, remedy)) = port_down(device, port) {
        all.push(Finding::new(Id::PortDown, name, cause, remedy));
    }
    let of_ethernet = port.link_layer.known().is_some_and(|layer| layer == "Ethernet") && !device.is_iwarp();
    if !of_ethernet {
        return;
    }
    let what = interface.unwrap_or("its network interface");
    if !port.gids.is_empty() && port.gids.iter().all(|gid| gid.is_link_local()) {
        all.push(Finding::new(
            Id::LinkLocalGids,
            name,
            format!("{name} port {} has only link-local GIDs: no peer behind a router, and none with an IPv4 GID, reaches it", port.number),
            match interface {
                Some(name) => format!("give {name} an address: ip address add 192.0.2.1/24 dev {name}"),
                None => "give its network interface an address".into(),
            },
        ));
    }
    if let Some(mtu) = port.mtu.known().filter(|mtu| **mtu < 4096) {
        let of_interface = port
            .netdevs
            .iter()
            .find_map(|(name, mtu)| Some(format!(", as {name} has an MTU of {}", mtu.known()?)));
        all.push(Finding::new(
            Id::SmallMtu,
            name,
            format!(
                "{name} port {} has an RDMA MTU of {mtu}{}",
                port.number,
                of_interface.unwrap_or_default()
            ),
            format!("for full speed, on both ends and the switches: ip link set {what} mtu 4200"),
        ));
    }
}

fn of_trial(trial: &DeviceTrial, facts: &Facts, all: &mut Vec<Finding>) {
    let name = &trial.name;
    if let (Some(verbs), Some(uverbs)) = (&trial.verbs, &trial.uverbs) {
        let refusals: Vec<String> =
            [verbs, uverbs].into_iter().filter_map(|probe| probe.refusal.clone()).collect();
        match (verbs.imports, uverbs.imports) {
            (false, false) => {
                let (cause, remedy) = import_unsupported(name, &refusals, facts);
                all.push(Finding::new(Id::ImportUnsupported, name, cause, remedy));
            }
            (false, true) => {
                let version = facts
                    .libraries
                    .rdma_core
                    .known()
                    .map(|v| format!(" of rdma-core {v}"))
                    .unwrap_or_default();
                all.push(Finding::new(
                    Id::ProviderLacksImport,
                    name,
                    format!(
                        "{name} imports dma-bufs in the kernel, but the provider{version} lacks ibv_reg_dmabuf_mr: programs that call it \
                         (NCCL, UCX, libfabric) are refused; this library asks the kernel"
                    ),
                    "a newer rdma-core, if a later provider of this device has it (docs/kernel-support.md)",
                ));
            }
            _ => {}
        }
    }
    if trial.atomics == Some(false) {
        all.push(Finding::new(
            Id::NoAtomics,
            name,
            format!("{name} executes no atomics for a peer"),
            "register without REMOTE_ATOMIC; use WRITE and notifications",
        ));
    }
    // A device in no sysfs, or in another namespace.
    if trial.opened && facts.devices.iter().all(|device| device.name != *name) && facts.gpus.known().is_some()
    {
        let cause = format!("{name} is not in /sys/class/infiniband of this network namespace");
        let remedy = "run in the namespace of its interface, or move it here: rdma dev set";
        all.push(Finding::new(Id::FilesHidden, name, cause, remedy).with(Severity::Note));
    }
}
