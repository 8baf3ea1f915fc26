//! Allocations that fail while a buffer is registered or mapped, in a kernel that checks itself: every failure is
//! an error, the kernel reports nothing, and nothing leaks.

mod inject;

use std::io;

use dma_sg::device_view::{self, DeviceView, DmaDevice};
use dmabuf_rdma::DmaBuf;

use crate::common::buffers::{Kind, every_kind, heap};
use crate::common::census::Census;
use crate::common::leaks;
use crate::common::peers::domain;
use crate::common::raw::{REMOTE, RawRegion};
use crate::common::system::modprobe;
use dmabuf_rdma::verbs::ProtectionDomain;
use inject::Injection;

const SIZE: u64 = 4 << 20;

/// Registers a buffer or maps it with `dma_sg`, and undoes it.
#[derive(Clone, Copy, Debug)]
enum Call {
    Register,
    View,
}

impl Call {
    fn make(self, injection: Injection, domain: &ProtectionDomain, buffer: &DmaBuf) -> Result<(), io::Error> {
        match self {
            Call::Register => {
                let region = injection.during(|| RawRegion::new(domain, buffer, REMOTE))?;
                region.deregister()
            }
            Call::View => match injection.during(|| DeviceView::new(buffer, DmaDevice::Untranslated)) {
                Ok(view) => {
                    assert_eq!(view.list().unwrap().total_len(), buffer.size());
                    Ok(())
                }
                Err(device_view::Error::Map { source, .. }) => Err(source),
                Err(device_view::Error::ModuleMissing { source, .. }) => Err(source),
                Err(error) => panic!("{error}"),
            },
        }
    }
}

struct Scene {
    domain: ProtectionDomain,
    _kinds: Vec<Kind>,
    buffers: Vec<DmaBuf>,
    census: Census,
}

fn scene() -> Scene {
    modprobe("dma_sg");
    let domain = domain();
    let kinds = every_kind();
    let buffers: Vec<_> = kinds.iter().map(|kind| (kind.allocate)(SIZE).dmabuf).collect();
    // The first of each call allocates what stays, such as slabs.
    for buffer in &buffers {
        drop(RawRegion::new(&domain, buffer, REMOTE).unwrap());
        drop(DeviceView::new(buffer, DmaDevice::Untranslated).unwrap());
    }
    leaks::assert_none();
    tell_the_console("allocations fail on purpose");
    Scene { domain, _kinds: kinds, buffers, census: Census::take() }
}

/// For `cargo xtask`, which looks for problems there. A test that fails in between fails the run anyway.
fn tell_the_console(text: &str) {
    std::fs::write("/dev/kmsg", format!("<4>{text}")).unwrap();
}

impl Scene {
    fn end(self) {
        tell_the_console("allocations fail no more");
        self.census.assert_unchanged();
        for buffer in &self.buffers {
            drop(RawRegion::new(&self.domain, buffer, REMOTE).unwrap());
        }
        leaks::assert_none();
    }
}

#[track_caller]
fn assert_no_memory(error: &io::Error, what: &str) {
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{what}: {error}");
}

#[test]
fn each_allocation_of_a_call_may_fail() {
    let scene = scene();
    for call in [Call::Register, Call::View] {
        for (kind, buffer) in scene.buffers.iter().enumerate() {
            let mut failed = 0;
            for nth in 1.. {
                assert!(nth < 5000, "{call:?} of kind {kind} makes no end of allocations");
                let injection = Injection::nth(nth);
                let result = call.make(injection, &scene.domain, buffer);
                if let Err(error) = &result {
                    assert_no_memory(error, &format!("{call:?} of kind {kind}, allocation {nth}"));
                    failed += 1;
                }
                // Some allocations have a second try, so success alone is not the end.
                if !inject::happened() {
                    result.unwrap();
                    break;
                }
            }
            assert!(failed >= 3, "{call:?} of kind {kind} failed {failed} times only");
        }
    }
    scene.end();
}

#[test]
fn a_thousand_random_failures() {
    let scene = scene();
    let (mut failed, mut succeeded) = (0, 0);
    for seed in 0..1000_u32 {
        let random = seed.wrapping_mul(0x9e37_79b1).rotate_left(13);
        let call = if random & 1 == 0 { Call::Register } else { Call::View };
        let buffer = &scene.buffers[(random >> 1) as usize % scene.buffers.len()];
        let injection = Injection::probability(1 + (random >> 8) % 30);
        match call.make(injection, &scene.domain, buffer) {
            Ok(()) => succeeded += 1,
            Err(error) => {
                assert_no_memory(&error, &format!("seed {seed}"));
                failed += 1;
            }
        }
    }
    assert!(failed > 100 && succeeded > 100, "{failed} failed, {succeeded} succeeded");
    scene.end();
}

/// The tests above would find nothing if nothing were injected.
#[test]
fn an_injected_failure_is_one() {
    let buffer = heap(SIZE);
    let domain = domain();
    let refused = Injection::nth(1).during(|| RawRegion::new(&domain, &buffer, REMOTE).map(drop));
    assert_no_memory(&refused.unwrap_err(), "the first allocation");
    assert!(inject::happened());
}
