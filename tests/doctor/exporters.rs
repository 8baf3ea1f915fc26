//! Exporters that are missing, broken, or of every kind; and GPU runtimes.

use std::fs;

use super::all_pairs;
use crate::common::doctor::Doctor;
use crate::common::peers::import_path;

#[test]
fn udmabuf_and_heaps_are_missing() {
    // The nodes of all namespaces are the same.
    fs::rename("/dev/udmabuf", "/dev/udmabuf-away").unwrap();
    let without = Doctor::new().run();
    fs::rename("/dev/udmabuf-away", "/dev/udmabuf").unwrap();
    let missing = "exporter-missing: /dev/udmabuf is missing (ENOENT) -> load the module udmabuf, or use a kernel with CONFIG_UDMABUF (Debian from 6.12 on)";
    without.assert("B", &[missing], &[]);
    let expected = all_pairs(&["rxe0", "rxe1"]).into_iter().map(|pair| match pair.strip_prefix("udmabuf ") {
        Some(rest) => format!("udmabuf {} none -.....", rest.split(' ').next().unwrap()),
        None => pair,
    });
    assert_eq!(without.pairs(), expected.collect::<Vec<_>>());

    let told = Doctor::new().after("/usr/bin/mount -t tmpfs none /dev/dma_heap").run();
    // An empty folder has no heaps; nothing is broken.
    assert_eq!((told.told(), told.grade()), (vec![], "A"));
}

/// Stub runtimes: healthy, and too old. A missing one is in every other test.
#[test]
fn gpu_runtimes() {
    let healthy = Doctor::new().env("LD_LIBRARY_PATH", gpu_stubs::FOLDER).run();
    let path = import_path().to_string();
    let of_gpus: Vec<_> = healthy.pairs().into_iter().filter(|pair| pair.contains(" device ")).collect();
    let devices = |name: &str| {
        let runtimes = healthy.json["facts"]["runtimes"].as_array().unwrap();
        let runtime = runtimes.iter().find(|runtime| runtime["name"] == name).unwrap();
        runtime["devices"].as_array().unwrap_or_else(|| panic!("{runtime}")).len()
    };
    let mut expected = Vec::new();
    for name in ["CUDA", "ROCm", "Level Zero"] {
        for at in 0..devices(name) {
            expected
                .extend(["rxe0", "rxe1"].map(|device| format!("{name} device {at} {device} {path} ++++++")));
        }
    }
    assert!(expected.len() >= 6, "{expected:?}");
    assert_eq!(of_gpus, expected);
    assert_eq!((healthy.told(), healthy.grade()), (vec![], "A"));
    let cuda = &healthy.json["facts"]["runtimes"][0];
    assert_eq!(cuda["attributes"][0]["exports_dmabufs"], true, "{cuda}");
    assert!(!healthy.notes().iter().any(|note| note.starts_with("runtime-")));

    let old = Doctor::new().env("LD_LIBRARY_PATH", gpu_stubs::OLD_FOLDER).run();
    let notes: Vec<_> = old.notes().into_iter().filter(|note| note.starts_with("runtime-")).collect();
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert!(
        notes.iter().all(|note| note.starts_with("runtime-too-old: ") && note.contains(" lacks ")),
        "{notes:?}"
    );
}

/// A runtime without a device is a note; one that a variable hides is told, also on a machine without such a GPU.
#[test]
fn a_runtime_that_shows_no_device() {
    let shows = |name: &str, value: &str| {
        Doctor::new().env("LD_LIBRARY_PATH", gpu_stubs::FOLDER).env(name, value).run()
    };
    let start = "runtime-no-device: CUDA shows no such device";
    let none = shows("STUB_REFUSE", "cuInit 100");
    assert!(none.told().is_empty() && none.notes().iter().any(|note| note == start), "{:?}", none.notes());
    let told = shows("CUDA_VISIBLE_DEVICES", "-1").told();
    let hidden = format!("{start} (CUDA_VISIBLE_DEVICES=-1) -> ");
    assert!(told.len() == 1 && told[0].starts_with(&hidden), "{told:?}");
}
