//! The diagnosis as text, with colours that a terminal shows and anything else drops.

use std::fmt::{Display, Write};

use anstyle::Style;

use super::Diagnosis;
use super::facts::{Device, Facts, Gpu, SoftHard};
use super::findings::{Finding, Id, Severity};
use super::grade::Grade;
use super::look::Fact;
use super::trials::{Mark, Pair, Trials};
use crate::ui::{BAD, DIM, FAIR, GOOD, STRONG, bytes};

/// The text, without an end of line at its end.
pub fn text(diagnosis: &Diagnosis) -> String {
    let mut text = Text(String::new());
    let Diagnosis { program, grade, summary, facts, trials, findings, .. } = diagnosis;
    let host = facts.host.known().map_or("an unknown host", String::as_str);
    text.line(format!("{STRONG}{program}{STRONG:#} doctor on {host}"));
    text.line("");
    let style = colour(*grade).bold();
    let letter = match grade {
        Grade::Ungraded => "-".into(),
        grade => format!("{grade:?}"),
    };
    text.line(format!("  {style}{letter}{style:#}  {summary}"));
    text.line("");
    text.facts(facts);
    if let Some(trials) = trials {
        text.trials(trials);
    }
    let (mut number, mut notes) = (0, 0);
    for finding in findings.iter().filter(|finding| finding.severity != Severity::Note) {
        if number == 0 {
            text.line("");
        }
        number += 1;
        let style = if finding.severity == Severity::Blocks { BAD } else { FAIR };
        text.paragraph(&format!("{style}{number:>3}.{style:#} "), 5, &cause(finding));
        text.paragraph(&format!("     {GOOD}do:{GOOD:#} "), 9, &finding.remedy);
    }
    for finding in findings.iter().filter(|finding| finding.severity == Severity::Note) {
        if notes == 0 {
            text.line("");
            text.line(format!("{DIM}Also:{DIM:#}"));
        }
        notes += 1;
        text.paragraph("   - ", 5, &format!("{}: {}", finding.cause, finding.remedy));
    }
    text.0.trim_end().to_owned()
}

/// The cause, and which memory on which device it concerns.
fn cause(finding: &Finding) -> String {
    match finding.id {
        Id::DeadRegistration | Id::TransferFailed | Id::MemoryWithoutPages | Id::Refused => {
            format!("{} ({})", finding.cause, finding.affects.join(", "))
        }
        _ => finding.cause.clone(),
    }
}

fn colour(grade: Grade) -> Style {
    match grade {
        Grade::A => GOOD,
        Grade::B | Grade::C => FAIR,
        Grade::D | Grade::F => BAD,
        Grade::Ungraded => DIM,
    }
}

/// Columns of a line.
const WIDTH: usize = 110;

struct Text(String);

impl Text {
    fn line(&mut self, line: impl Display) {
        // Writing into a String does not fail.
        let _ = writeln!(self.0, "{line}");
    }

    /// Text after a start, which takes `indent` columns, in lines of at most [`WIDTH`] columns.
    fn paragraph(&mut self, start: &str, indent: usize, text: &str) {
        let (mut line, mut column) = (start.to_owned(), indent);
        for (number, word) in text.split(' ').enumerate() {
            let length = anstream::adapter::strip_str(word).to_string().chars().count();
            if number > 0 && column + 1 + length > WIDTH {
                self.line(&line);
                (line, column) = (" ".repeat(indent), indent);
            } else if number > 0 {
                line.push(' ');
                column += 1;
            }
            line += word;
            column += length;
        }
        self.line(line);
    }

    /// A row of facts; continued ones have no name.
    fn row(&mut self, name: &str, value: impl Display) {
        self.paragraph(&format!("  {DIM}{name:<10}{DIM:#} "), 13, &value.to_string());
    }

    fn rows(&mut self, name: &str, values: impl IntoIterator<Item = String>) {
        for (at, value) in values.into_iter().enumerate() {
            self.row(if at == 0 { name } else { "" }, value);
        }
    }

    fn facts(&mut self, facts: &Facts) {
        let kernel = &facts.kernel;
        self.row("kernel", format!("Linux {}, {}", shown(&kernel.release), kernel.architecture));
        self.row(
            "modules",
            match &kernel.modules {
                Fact::Known(modules) if modules.is_empty() => "none of those that matter".into(),
                Fact::Known(modules) => modules
                    .iter()
                    .map(|(name, version)| format!("{name} {version}").trim_end().to_owned())
                    .collect::<Vec<_>>()
                    .join(", "),
                Fact::Unknown { unknown } => could_not_look(unknown),
            },
        );
        let set = |options: &std::collections::BTreeMap<String, String>| {
            let off: Vec<_> = options
                .iter()
                .filter(|(_, value)| *value == "n")
                .map(|(name, _)| name.trim_start_matches("CONFIG_"))
                .collect();
            if off.is_empty() { "all on that matter".to_owned() } else { format!("off: {}", off.join(", ")) }
        };
        self.row(
            "options",
            kernel
                .options
                .known()
                .map_or_else(|| could_not_look(kernel.options.why().unwrap_or_default()), set),
        );
        self.row("user", user(facts));
        self.row("limits", limits(facts));
        let libraries = &facts.libraries;
        let providers = libraries.providers.known().map_or("unknown".into(), |names| {
            if names.is_empty() { "none".into() } else { names.join(", ") }
        });
        let manager = if libraries.librdmacm.known().is_some() { "" } else { ", no librdmacm" };
        self.row(
            "libraries",
            format!("rdma-core {}{manager}; providers: {providers}", shown(&libraries.rdma_core)),
        );
        let forbidden: Vec<_> = facts
            .nodes
            .iter()
            .filter(|node| node.permitted.known() == Some(&false))
            .map(|node| node.path.as_str())
            .collect();
        let nodes = match (facts.nodes.len(), forbidden.as_slice()) {
            (0, _) => "none".into(),
            (count, []) => format!("{count} device nodes"),
            (count, forbidden) => format!(
                "{count} device nodes, {} of them forbidden: {}",
                forbidden.len(),
                forbidden.join(", ")
            ),
        };
        self.row("nodes", nodes);
        match facts.devices.as_slice() {
            [] => self.row("devices", "none in sysfs"),
            devices => self.rows("devices", devices.iter().flat_map(device)),
        }
        match &facts.gpus {
            Fact::Unknown { unknown } => self.row("GPUs", could_not_look(unknown)),
            Fact::Known(gpus) if gpus.is_empty() => self.row("GPUs", "none on PCI"),
            Fact::Known(gpus) => self.rows("GPUs", gpus.iter().map(gpu)),
        }
        self.rows(
            "runtimes",
            facts.runtimes.iter().map(|runtime| {
                let version =
                    runtime.version.as_deref().map(|version| format!(" {version}")).unwrap_or_default();
                match &runtime.devices {
                    Fact::Known(devices) => {
                        let exports = runtime.attributes.iter().map(|can| match can.exports_dmabufs {
                            Some(true) => "exports dma-bufs",
                            Some(false) => "exports no dma-bufs",
                            None => "does not say whether it exports dma-bufs",
                        });
                        let exports: Vec<_> = exports.collect();
                        let each = devices.iter().enumerate().map(|(at, device)| match exports.get(at) {
                            Some(exports) => format!("{device} ({exports})"),
                            None => device.clone(),
                        });
                        format!("{}{version}: {}", runtime.name, each.collect::<Vec<_>>().join(", "))
                    }
                    Fact::Unknown { unknown } => {
                        format!("{DIM}{}{DIM:#}", super::failure::split(unknown).0)
                    }
                }
            }),
        );
        let iommu = &facts.iommu;
        let units = if iommu.units.is_empty() { "off".into() } else { iommu.units.join(", ") };
        self.row(
            "IOMMU",
            std::iter::once(units).chain(iommu.parameters.iter().cloned()).collect::<Vec<_>>().join(", "),
        );
    }

    fn trials(&mut self, trials: &Trials) {
        let devices: Vec<_> =
            trials.devices.iter().filter(|device| device.opened).map(|device| device.name.as_str()).collect();
        if devices.is_empty() {
            return;
        }
        self.line("");
        const CELL: usize = 26;
        let mut exporters: Vec<&str> = Vec::new();
        trials.pairs.iter().for_each(|pair| {
            if !exporters.contains(&pair.exporter.as_str()) {
                exporters.push(&pair.exporter)
            }
        });
        let width = exporters.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(12);
        let head: String = devices.iter().map(|name| format!("{name:<CELL$}")).collect();
        self.line(format!("  {DIM}{:<width$}{DIM:#}  {STRONG}{}{STRONG:#}", "", head.trim_end()));
        for exporter in exporters {
            let cell = |device: &&str| {
                let is_it = |pair: &&Pair| pair.exporter == exporter && pair.device == *device;
                trials.pairs.iter().find(is_it).map_or_else(|| " ".repeat(CELL), |pair| marks(pair, CELL))
            };
            let cells: String = devices.iter().map(cell).collect();
            self.line(format!("  {exporter:<width$}  {}", cells.trim_end()));
        }
        let steps = "Each mark: allocate, register, write and read, first byte, last byte, odd offset";
        self.line(format!(
            "  {DIM}{:<width$}  {steps}; {:.1} s{DIM:#}",
            "",
            trials.milliseconds as f64 / 1e3
        ));
    }
}

/// The marks of a pair and its path, padded to a width.
fn marks(pair: &Pair, width: usize) -> String {
    let mark = |mark: &Mark| match mark {
        Mark::Passed => format!("{GOOD}✓{GOOD:#}"),
        Mark::Failed => format!("{BAD}✗{BAD:#}"),
        Mark::NotTried => format!("{DIM}·{DIM:#}"),
    };
    let steps = pair.steps();
    let path = pair.path.as_deref().unwrap_or_default();
    let padding = width.saturating_sub(2 * steps.len() + path.len());
    format!("{} {path}{}", steps.iter().map(mark).collect::<Vec<_>>().join(" "), " ".repeat(padding))
}

fn could_not_look(why: &str) -> String {
    format!("{DIM}could not look: {why}{DIM:#}")
}

fn shown(fact: &Fact<String>) -> String {
    fact.known().cloned().unwrap_or_else(|| could_not_look(fact.why().unwrap_or_default()))
}

fn user(facts: &Facts) -> String {
    let process = &facts.process;
    let mut parts = vec![match &process.user {
        Fact::Known(0) => "root".to_owned(),
        Fact::Known(user) => format!("user {user}"),
        Fact::Unknown { unknown } => could_not_look(unknown),
    }];
    match process.capabilities.known().map(Vec::as_slice) {
        Some([]) => parts.push("no capability that matters".into()),
        Some(names) => parts.push(names.join(" ")),
        None => {}
    }
    if process.user_namespace.known() == Some(&true) {
        parts.push("in a user namespace".into());
    }
    if process.is_filtered() {
        parts.push("under a seccomp filter".into());
    }
    parts.extend(process.container.as_ref().map(|what| format!("in a container: {what}")));
    parts.join(", ")
}

fn limits(facts: &Facts) -> String {
    let limits = &facts.limits;
    let soft = |fact: &Fact<SoftHard>, unit: fn(u64) -> String| match fact.known() {
        Some(SoftHard { soft: Some(soft), .. }) => unit(*soft),
        Some(SoftHard { soft: None, .. }) => "unlimited".into(),
        None => "unknown".into(),
    };
    let size = |fact: &Fact<u64>| fact.known().map_or("unknown".into(), |size| bytes(*size));
    let mut parts = vec![
        format!("memlock {}", soft(&limits.memlock, bytes)),
        format!("open files {}", soft(&limits.nofile, |count| count.to_string())),
        format!("memory {} of {}", size(&limits.memory_available), size(&limits.memory_total)),
    ];
    if let Some(Some(cgroup)) = limits.cgroup_memory.known() {
        parts.push(format!("cgroup {} of {}", bytes(cgroup.left), bytes(cgroup.limit)));
    }
    if let (Some(size), Some(list)) = (limits.udmabuf_size_mb.known(), limits.udmabuf_list.known()) {
        parts.push(format!("udmabuf {size} MiB in {list} ranges"));
    }
    parts.join(", ")
}

fn device(device: &Device) -> Vec<String> {
    let mut about = vec![device.name.clone()];
    about.extend(device.driver.clone());
    about.extend(device.firmware.as_ref().map(|version| format!("firmware {version}")));
    about.extend(device.pci.as_ref().map(|place| {
        let node = place.numa_node.map(|node| format!(" on node {node}")).unwrap_or_default();
        format!("{}{node}", place.address)
    }));
    let ports = device.ports.iter().map(|port| {
        let mut parts = vec![format!("port {} {}", port.number, shown(&port.state))];
        parts.extend(port.link_layer.known().cloned());
        parts.extend(port.rate.known().cloned());
        parts.extend(port.mtu.known().map(|mtu| format!("MTU {mtu}")));
        let v2 = port.gids.iter().filter(|gid| gid.is_roce_v2()).count();
        parts.push(format!(
            "{} GID{}{}",
            port.gids.len(),
            if port.gids.len() == 1 { "" } else { "s" },
            if v2 > 0 { format!(", {v2} of RoCE v2") } else { String::new() }
        ));
        parts.extend(port.netdevs.iter().map(|(name, _)| name.clone()));
        parts.join(", ")
    });
    let ports: Vec<_> = ports.collect();
    match ports.as_slice() {
        [] => vec![about.join(", ")],
        [port] => vec![format!("{}: {port}", about.join(", "))],
        ports => {
            std::iter::once(about.join(", ")).chain(ports.iter().map(|port| format!("  {port}"))).collect()
        }
    }
}

fn gpu(gpu: &Gpu) -> String {
    let mut parts = vec![format!("{} {}", gpu.place.address, gpu.vendor.as_deref().unwrap_or(&gpu.id))];
    parts.push(gpu.driver.clone().unwrap_or_else(|| "no driver".into()));
    parts
        .extend(gpu.largest_bar.known().filter(|bar| **bar > 0).map(|bar| format!("BAR of {}", bytes(*bar))));
    parts.extend(gpu.place.numa_node.map(|node| format!("node {node}")));
    match &gpu.routes {
        Fact::Known(routes) => {
            parts.extend(routes.first().map(|route| format!("nearest NIC {}, {}", route.nic, route.through)))
        }
        Fact::Unknown { unknown } => parts.push(could_not_look(unknown)),
    }
    parts.join(", ")
}
