//! Gauges and spans.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use dmabuf_rdma::RegionSet;
use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{Access, MemoryRegion, RegionCache};
use dmabuf_rdma::observe::{self, RegionGauges, gauges};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_core::span::Current;

use crate::common::buffers::{heap, udmabuf};
use crate::common::census::regions;
use crate::common::peers::{domain, import_path};

#[test]
fn the_gauges_count_what_the_process_holds() {
    let domain = domain();
    let (before, counted) = (gauges(), regions());
    let allocation = udmabuf(PageKind::Base, 1 << 20);
    let buffer = &allocation.dmabuf;
    let region = MemoryRegion::builder(&domain, buffer).range(..4096).register().unwrap();
    let set = RegionSet::builder(buffer).chunk_size(256 << 10).own_descriptors();
    let set = set.register(&domain).unwrap();
    let host = MemoryRegion::builder(&domain, buffer)
        .paths(&[])
        .host_mapping(allocation.backing.as_ref().unwrap())
        .register()
        .unwrap();
    let cache = RegionCache::default();
    for _ in 0..3 {
        cache.get(&domain, buffer, ..8192, Access::empty()).unwrap();
    }

    let now = gauges();
    let more =
        |now: RegionGauges, before: RegionGauges| (now.regions - before.regions, now.bytes - before.bytes);
    let import = import_path().to_string();
    for ((path, now), (_, before)) in now.by_path().zip(before.by_path()) {
        let expected = match path {
            "HostMapping" => (1, 1 << 20),
            path if path == import => (6, 4096 + (1 << 20) + 8192),
            _ => (0, 0),
        };
        assert_eq!(more(now, before), expected, "{path}");
    }
    assert_eq!(more(now.regions(), before.regions()).0, (regions() - counted) as u64);
    // The buffer's descriptor, and one for each chunk.
    assert_eq!(now.fds - before.fds, 5);
    let (hits, misses) = (now.cache.hits - before.cache.hits, now.cache.misses - before.cache.misses);
    assert_eq!((hits, misses, now.cache.entries - before.cache.entries), (2, 1, 1));
    assert_eq!(now.cache.bytes - before.cache.bytes, 8192);
    assert!(now.cache.registering > before.cache.registering);

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let published = metrics::with_local_recorder(&recorder, observe::publish);
    assert_eq!(published, now);
    let seen: HashMap<String, DebugValue> = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .map(|(key, _, _, value)| {
            let labels: String = key.key().labels().map(|label| label.value().to_owned()).collect();
            (format!("{} {labels}", key.key().name()), value)
        })
        .collect();
    let gauge = |value: u64| DebugValue::Gauge((value as f64).into());
    let used = now.by_path().find(|(name, _)| *name == import).unwrap().1;
    assert_eq!(seen[&format!("dmabuf_rdma_regions {import}")], gauge(used.regions));
    assert_eq!(seen[&format!("dmabuf_rdma_mapped_bytes {import}")], gauge(used.bytes));
    assert_eq!(seen["dmabuf_rdma_fds "], gauge(now.fds));
    assert_eq!(seen["dmabuf_rdma_cache_hits "], DebugValue::Counter(now.cache.hits));

    drop((region, set, host, cache, allocation));
    let after = gauges();
    assert_eq!((after.regions(), after.fds), (before.regions(), before.fds));
    assert_eq!((after.cache.hits, after.cache.entries), (now.cache.hits, before.cache.entries));
}

/// Closed spans, by name, with their fields.
#[derive(Default, Clone)]
struct Spans(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    open: HashMap<u64, (&'static Metadata<'static>, HashMap<String, String>)>,
    /// References to each span.
    references: HashMap<u64, u32>,
    current: Vec<u64>,
    closed: Vec<(String, HashMap<String, String>)>,
}

struct Fields<'a>(&'a mut HashMap<String, String>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().into(), format!("{value:?}"));
    }
}

impl Subscriber for Spans {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "dmabuf_rdma" && metadata.is_span()
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut seen = self.0.lock().unwrap();
        let number = 1 + seen.open.len() as u64 + seen.closed.len() as u64;
        let mut fields = HashMap::new();
        attributes.record(&mut Fields(&mut fields));
        seen.references.insert(number, 1);
        seen.open.insert(number, (attributes.metadata(), fields));
        Id::from_u64(number)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let mut seen = self.0.lock().unwrap();
        if let Some((_, fields)) = seen.open.get_mut(&span.into_u64()) {
            values.record(&mut Fields(fields));
        }
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, span: &Id) {
        self.0.lock().unwrap().current.push(span.into_u64());
    }

    fn exit(&self, _: &Id) {
        self.0.lock().unwrap().current.pop();
    }

    fn current_span(&self) -> Current {
        let seen = self.0.lock().unwrap();
        match seen.current.last() {
            Some(number) => Current::new(Id::from_u64(*number), seen.open[number].0),
            None => Current::none(),
        }
    }

    fn clone_span(&self, span: &Id) -> Id {
        *self.0.lock().unwrap().references.get_mut(&span.into_u64()).unwrap() += 1;
        span.clone()
    }

    fn try_close(&self, span: Id) -> bool {
        let mut seen = self.0.lock().unwrap();
        let references = seen.references.get_mut(&span.into_u64()).unwrap();
        *references -= 1;
        if *references > 0 {
            return false;
        }
        if let Some(closed) = seen.open.remove(&span.into_u64()) {
            seen.closed.push((closed.0.name().into(), closed.1));
        }
        true
    }
}

#[test]
fn spans_report_each_step_and_its_duration() {
    let spans = Spans::default();
    let (key, inode) = tracing::subscriber::with_default(spans.clone(), || {
        let (domain, buffer) = (domain(), heap(1 << 20));
        let region = MemoryRegion::builder(&domain, &buffer).range(4096..12_288).register().unwrap();
        let key = region.lkey().0.to_string();
        region.deregister().unwrap();
        let _ = MemoryRegion::builder(&domain, &buffer).range(0..0).register().unwrap_err();
        let text = format!("{:?}", buffer.id());
        let inode = text.split("inode: ").nth(1).unwrap().trim_end_matches([' ', '}']).to_owned();
        (key, inode)
    });
    let seen = spans.0.lock().unwrap();
    let names: Vec<&str> = seen.closed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["export", "register", "deregister", "register"]);
    let field = |at: usize, name: &str| seen.closed[at].1.get(name).cloned().unwrap_or_default();
    assert_eq!((field(0, "size"), field(0, "buffer")), ("1048576".into(), inode.clone()));
    assert!(field(0, "exporter").contains("system"));
    for at in [1, 2] {
        assert_eq!((field(at, "device"), field(at, "path")), ("\"rxe0\"".into(), import_path().to_string()));
        assert_eq!((field(at, "offset"), field(at, "length")), ("4096".into(), "8192".into()));
        assert_eq!((field(at, "lkey"), field(at, "buffer")), (key.clone(), inode.clone()));
    }
    for (at, name) in names.iter().enumerate().take(4) {
        field(at, "duration").parse::<u64>().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    assert!(field(3, "error").contains("has 0 bytes"));
}
