//! Loaders of runtimes in worlds of their own: each test runs again in a process that finds other libraries
//! than the machine's.
//!
//! `unsafe` is here to lower a limit of that process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::kind::ErrorKind;

/// The name of the test that this process is for.
const CHILD: &str = "DMABUF_RDMA_TEST_ALONE";

/// Runs a test in a process of its own, which looks for libraries in this folder first.
fn alone(test: &str, folder: &Path, action: impl FnOnce()) {
    let test = format!("exporter::own_world::{test}");
    if std::env::var_os(CHILD).is_some_and(|name| name == *test) {
        return action();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &test, "--nocapture", "--test-threads=1"]);
    let output = child.env("LD_LIBRARY_PATH", folder).env(CHILD, &test).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
}

/// Takes all descriptors of this process.
fn exhaust() -> Vec<File> {
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: reads one struct.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

/// A folder of libraries that no loader accepts.
struct Broken(PathBuf);

impl Broken {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("dmabuf-rdma-broken-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for library in ["libcuda.so.1", "libhsa-runtime64.so.1", "libze_loader.so.1", "libvulkan.so.1"] {
            fs::write(folder.join(library), "").unwrap();
        }
        Self(folder)
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn load_each() -> [(&'static str, Result<()>); 4] {
    [
        ("libcuda.so.1", Cuda::load().map(drop)),
        ("libhsa-runtime64.so.1", Hsa::load().map(drop)),
        ("libze_loader.so.1", LevelZero::load().map(drop)),
        ("libvulkan.so.1", Vulkan::load().map(drop)),
    ]
}

#[test]
fn a_library_that_cannot_be_loaded_is_named_with_the_reason() {
    let broken = Broken::new();
    alone("a_library_that_cannot_be_loaded_is_named_with_the_reason", &broken.0, || {
        for (name, refused) in load_each() {
            match refused {
                Err(Error::Pointer(PointerError::RuntimeMissing { library, source, .. })) => {
                    assert_eq!(library, name);
                    assert!(source.to_string().contains("file too short"), "{source}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        assert!(Cuda::if_loaded().unwrap().is_none());
        assert_eq!(Runtimes::loaded().unwrap().names().count(), 0);
    });
}

#[test]
fn a_library_that_is_too_old_is_named_with_its_function() {
    let folder = Path::new(gpu_stubs::OLD_FOLDER);
    alone("a_library_that_is_too_old_is_named_with_its_function", folder, || {
        for (refused, lacks) in [
            (Cuda::load().map(drop), "cuMemGetHandleForAddressRange"),
            (Hsa::load().map(drop), "hsa_amd_portable_export_dmabuf"),
            (LevelZero::load().map(drop), "zeMemGetAddressRange"),
        ] {
            match refused {
                Err(Error::Pointer(PointerError::RuntimeTooOld { symbol, .. })) => assert_eq!(symbol, lacks),
                other => panic!("{other:?}"),
            }
        }
    });
}

/// An exhausted process is not told that its driver, its devices or its cards are missing.
#[test]
fn without_a_free_descriptor_nothing_is_reported_as_missing() {
    let folder = Path::new(gpu_stubs::FOLDER);
    alone("without_a_free_descriptor_nothing_is_reported_as_missing", folder, || {
        let exhausted = |what: &str, error: Error| {
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Limit, Some(libc::EMFILE)), "{what}");
            error.to_string()
        };
        let all = exhaust();
        for (library, refused) in load_each() {
            let message = exhausted(library, refused.unwrap_err());
            assert!(message.contains("no file descriptor is free"), "{message}");
        }
        exhausted("cameras", CaptureDevice::by_driver("vivid").unwrap_err());
        #[cfg(feature = "drm")]
        exhausted("cards", DumbBuffers::by_driver("vgem").unwrap_err());
        drop(all);

        // Nothing of that is remembered.
        drop((Cuda::load().unwrap(), Hsa::load().unwrap(), LevelZero::load().unwrap()));

        // A runtime that is loaded reports that it has no device, because it could not open it.
        let (cuda, hsa, ze) = ("libcuda.so.1", "libhsa-runtime64.so.1", "libze_loader.so.1");
        let stubs = [(cuda, "cuInit", 100), (hsa, "hsa_init", 0x1008), (ze, "zeInit", 0x7800_0001)];
        let stubs = stubs.map(|(library, call, code)| (gpu_stubs::Stub::load(library), call, code));
        let all = exhaust();
        for (stub, call, code) in &stubs {
            stub.refuse(call, *code);
        }
        for (library, refused) in load_each() {
            exhausted(library, refused.unwrap_err());
        }
        drop(all);
        for (stub, call, code) in &stubs {
            stub.refuse(call, *code);
        }
        for (library, refused) in load_each().into_iter().take(3) {
            match refused {
                Err(Error::Pointer(PointerError::NoDevice { .. })) => {}
                other => panic!("{library}: {other:?}"),
            }
        }
    });
}

#[test]
#[allow(clippy::type_complexity)]
fn success_without_a_descriptor_is_refused() {
    let folder = Path::new(gpu_stubs::FOLDER);
    alone("success_without_a_descriptor_is_refused", folder, || {
        let runtimes: [(&str, fn() -> Box<dyn Runtime>, fn() -> DeviceMemory); 3] = [
            (
                "libcuda.so.1",
                || Box::new(Cuda::load().unwrap()),
                || Cuda::load().unwrap().device_memory(1 << 20).unwrap(),
            ),
            (
                "libhsa-runtime64.so.1",
                || Box::new(Hsa::load().unwrap()),
                || Hsa::load().unwrap().device_memory(1 << 20).unwrap(),
            ),
            (
                "libze_loader.so.1",
                || Box::new(LevelZero::load().unwrap()),
                || LevelZero::load().unwrap().device_memory(1 << 20).unwrap(),
            ),
        ];
        for (library, load, allocate) in runtimes {
            let stub = gpu_stubs::Stub::load(library);
            let (runtime, memory) = (load(), allocate());
            stub.export_nothing(true);
            let refused = runtime.export_at(memory.address(), 4096);
            stub.export_nothing(false);
            assert_error!(refused, PointerError::NotExportable { .. });
            for (start, end) in [(0, 3), (5, 7)] {
                assert_error!(memory.fill(start..end, 1), Error::Range(RangeError::NoWord { .. }));
            }
            drop((memory, runtime));
            assert_eq!((stub.misuse(), stub.live()), (None, 0), "{library}");
        }
    });
}
