//! What works, by trying: each device is asked whether it imports dma-bufs, and moves bytes of each exporter.
//!
//! Everything that is made here is gone afterwards. Transfers go from a device to itself.

mod memory;
mod pair;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use dmabuf_rdma::cm::Listener;
use dmabuf_rdma::exporter::{DmaHeap, DumbBuffers, Exporter, Udmabuf};
use dmabuf_rdma::mr::{Path, probe_path};
use dmabuf_rdma::verbs::{Context, Device, devices};
use dmabuf_rdma::{Error, exporter};
use serde::{Deserialize, Serialize};

use super::facts::Facts;
use super::failure::Failure;
use super::look::Fact;
use memory::Memory;

/// What was tried, and how it went.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Trials {
    /// Why libibverbs lists no device.
    pub listing: Option<Failure>,
    pub devices: Vec<DeviceTrial>,
    pub exporters: Vec<ExporterTrial>,
    pub pairs: Vec<Pair>,
    /// Whether librdmacm and the kernel's connection manager can be used.
    pub manager: Option<Failure>,
    pub milliseconds: u64,
    /// Pairs for which there was no time.
    pub untried: usize,
}

/// No pair is begun after this.
const BUDGET: Duration = Duration::from_secs(7);

/// How far a program gets with a device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceTrial {
    pub name: String,
    pub opened: bool,
    /// Whether it imports dma-bufs through each path; or why that is not known.
    pub verbs: Option<Probe>,
    pub uverbs: Option<Probe>,
    pub atomics: Option<bool>,
    pub failures: Vec<Failure>,
}

/// The answer of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    pub imports: bool,
    /// The refusal in words.
    pub refusal: Option<String>,
}

/// An exporter that is there, or that was looked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExporterTrial {
    pub name: String,
    pub allocated: Mark,
    pub failure: Option<Failure>,
}

/// How a step went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    Passed,
    Failed,
    #[default]
    NotTried,
}

/// An exporter's memory on a device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pair {
    pub exporter: String,
    pub device: String,
    /// Whether the memory is a dma-buf. The row "host memory" is not.
    pub dmabuf: bool,
    /// The path of the registration.
    pub path: Option<String>,
    pub allocate: Mark,
    pub register: Mark,
    /// A WRITE and a READ of 64 KiB, compared.
    pub transfer: Mark,
    pub first_byte: Mark,
    pub last_byte: Mark,
    /// 30,001 bytes from one odd offset to another.
    pub odd_offset: Mark,
    pub failure: Option<Failure>,
}

impl Pair {
    fn untried(exporter: &str, memory: Option<&Memory>, context: &Context) -> Self {
        Self {
            exporter: exporter.into(),
            device: context.device_name().into(),
            dmabuf: memory.is_none_or(Memory::is_dmabuf),
            path: None,
            allocate: if memory.is_some() { Mark::Passed } else { Mark::Failed },
            register: Mark::NotTried,
            transfer: Mark::NotTried,
            first_byte: Mark::NotTried,
            last_byte: Mark::NotTried,
            odd_offset: Mark::NotTried,
            failure: None,
        }
    }

    pub fn steps(&self) -> [Mark; 6] {
        [self.allocate, self.register, self.transfer, self.first_byte, self.last_byte, self.odd_offset]
    }

    /// Whether verified bytes moved at every place.
    pub fn works(&self) -> bool {
        self.steps().iter().all(|mark| *mark == Mark::Passed)
    }

    /// Whether the device reads and writes the dma-buf itself.
    pub fn imports(&self) -> bool {
        self.works() && self.dmabuf && self.path.as_deref() != Some("HostMapping")
    }
}

/// Tries everything. The facts get what an open device tells.
pub fn run(facts: &mut Facts) -> Trials {
    let start = Instant::now();
    let mut trials = Trials::default();
    let contexts = open_all(facts, &mut trials);
    let mut memories = Vec::new();
    for (name, opened) in exporters(facts) {
        let made = opened.and_then(|exporter| Memory::of_exporter(exporter.as_ref()));
        let (allocated, failure) = match made {
            Ok(memory) => {
                memories.push((name.clone(), Some(memory)));
                (Mark::Passed, None)
            }
            Err(error) => {
                memories.push((name.clone(), None));
                (Mark::Failed, Some(Failure::of(&error, &name, facts)))
            }
        };
        trials.exporters.push(ExporterTrial { name, allocated, failure });
    }
    let host = Memory::of_host();
    memories.push(("host memory".into(), host.ok()));
    for (name, memory) in &memories {
        for context in &contexts {
            // A device that does not answer takes seconds for each of its pairs.
            if start.elapsed() < BUDGET {
                trials.pairs.push(pair::run(name, memory.as_ref(), context, facts));
            } else {
                trials.pairs.push(Pair::untried(name, memory.as_ref(), context));
                trials.untried += 1;
            }
        }
    }
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    // Without a device the manager would only say so once more.
    if !facts.devices.is_empty() || !contexts.is_empty() {
        let listening = Listener::bind(any).map(drop).map_err(Error::from);
        trials.manager = listening.err().map(|error| Failure::of(&error, "connections by IP address", facts));
    }
    trials.milliseconds = start.elapsed().as_millis() as u64;
    trials
}

/// Opens every device that the kernel or libibverbs has.
fn open_all(facts: &mut Facts, trials: &mut Trials) -> Vec<Context> {
    let listed = match devices() {
        Ok(listed) => listed,
        Err(error) => {
            trials.listing = Some(Failure::of(&error.into(), "devices", facts));
            Vec::new()
        }
    };
    if listed.is_empty() && trials.listing.is_none() {
        // The error of an unknown device says why there is none.
        let error = Device::by_name("").expect_err("no device has an empty name");
        trials.listing = Some(Failure::of(&error.into(), "devices", facts));
    }
    let hidden = facts.devices.iter().filter(|device| listed.iter().all(|one| one.name() != device.name));
    for name in hidden.map(|device| device.name.clone()).collect::<Vec<_>>() {
        let failure = match Device::by_name(&name) {
            Err(error) if trials.listing.is_none() => vec![Failure::of(&error.into(), &name, facts)],
            _ => Vec::new(),
        };
        let (opened, verbs, uverbs, atomics) = (false, None, None, None);
        trials.devices.push(DeviceTrial { name, opened, verbs, uverbs, atomics, failures: failure });
    }
    let mut contexts = Vec::new();
    for device in listed {
        let mut failures = Vec::new();
        let mut note = |error: Error| failures.push(Failure::of(&error, device.name(), facts));
        let context = device.open().map_err(|error| note(error.into())).ok();
        let mut probe = |path| {
            let asked = probe_path(context.as_ref()?, path).map_err(|error| note(error.into())).ok()?;
            Some(Probe { imports: asked.is_none(), refusal: asked.map(|refusal| refusal.to_string()) })
        };
        let (verbs, uverbs) = (probe(Path::Verbs), probe(Path::Uverbs));
        let limits = context.as_ref().and_then(|context| context.limits().ok());
        let atomics = limits.map(|limits| limits.atomics);
        if let (Some(context), Some(limits)) = (&context, limits) {
            ask_ports(facts, context, limits.ports);
        }
        let (name, opened) = (device.name().to_owned(), context.is_some());
        trials.devices.push(DeviceTrial { name, opened, verbs, uverbs, atomics, failures });
        contexts.extend(context);
    }
    contexts
}

/// The ports as the device itself tells; without a sysfs that is all there is.
fn ask_ports(facts: &mut Facts, context: &Context, count: u8) {
    let name = context.device_name();
    let Some(device) = facts.devices.iter_mut().find(|device| device.name == name) else { return };
    for number in 1..=count {
        let Ok(port) = context.port(number) else { continue };
        if let Some(known) = device.ports.iter_mut().find(|known| known.number == number) {
            known.mtu = Fact::Known(port.mtu);
        }
    }
}

type Opened = Result<Box<dyn Exporter>, Error>;

fn boxed<E: Exporter + 'static>(opened: Result<E, exporter::Error>) -> Opened {
    opened.map(|exporter| Box::new(exporter) as Box<dyn Exporter>).map_err(Error::from)
}

/// The exporters that are there, and the usual ones that are not.
fn exporters(facts: &Facts) -> Vec<(String, Opened)> {
    let mut all: Vec<(String, Opened)> = vec![("udmabuf".into(), boxed(Udmabuf::open()))];
    match DmaHeap::list() {
        Ok(heaps) => all.extend(heaps.into_iter().map(|heap| {
            let opened = boxed(DmaHeap::open(&heap));
            (format!("dma-heap {heap}"), opened)
        })),
        Err(error) => all.push(("dma-heap".into(), Err(error.into()))),
    }
    let cards = facts.nodes.iter().filter(|node| node.path.starts_with("/dev/dri/card"));
    all.extend(cards.map(|node| {
        let opened = DumbBuffers::open(&node.path);
        let name = match &opened {
            Ok(card) => format!("drm {}", card.driver()),
            Err(_) => format!("drm {}", node.path.trim_start_matches("/dev/dri/")),
        };
        (name, boxed(opened))
    }));
    all.extend(gpus(facts).into_iter().flatten());
    all
}

/// The memory of each GPU that a runtime shows.
fn gpus(_facts: &Facts) -> Vec<Vec<(String, Opened)>> {
    Vec::from([
        #[cfg(feature = "cuda")]
        of_runtime(_facts, "CUDA", |at| boxed(exporter::Cuda::load().and_then(|cuda| cuda.with_device(at)))),
        #[cfg(feature = "hsa")]
        of_runtime(_facts, "ROCm", |at| boxed(exporter::Hsa::load().and_then(|hsa| hsa.with_device(at)))),
        #[cfg(feature = "level-zero")]
        of_runtime(_facts, "Level Zero", |at| {
            boxed(exporter::LevelZero::load().and_then(|zero| zero.with_device(at)))
        }),
    ])
}

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
fn of_runtime(facts: &Facts, name: &str, open: impl Fn(usize) -> Opened) -> Vec<(String, Opened)> {
    let runtime = facts.runtimes.iter().find(|runtime| runtime.name == name);
    let count = runtime.and_then(|runtime| runtime.devices.known()).map_or(0, Vec::len);
    (0..count).map(|at| (format!("{name} device {at}"), open(at))).collect()
}
