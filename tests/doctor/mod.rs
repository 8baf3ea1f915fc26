//! `dmabuf-rdma doctor` in real surroundings: each fault is injected, and what doctor says is compared line by line with
//! what is true.

mod container;
mod devices;
mod exporters;
mod limits;
mod machines;

use std::fs;
use std::time::Instant;

use dmabuf_rdma::exporter::DmaHeap;
use dmabuf_rdma::verbs::devices;

use crate::common::census::Census;
use crate::common::doctor::{Doctor, word};
use crate::common::peers::import_path;
use crate::common::system::run;

/// The heaps of this kernel as doctor names them.
pub fn heaps() -> Vec<String> {
    DmaHeap::list().unwrap().iter().map(|heap| format!("dma-heap {heap}")).collect()
}

/// All pairs of these devices, where everything works.
pub fn all_pairs(devices: &[&str]) -> Vec<String> {
    let path = import_path().to_string();
    let mut pairs = Vec::new();
    for exporter in ["udmabuf".to_owned()].into_iter().chain(heaps()) {
        pairs.extend(devices.iter().map(|device| format!("{exporter} {device} {path} ++++++")));
    }
    pairs.extend(devices.iter().map(|device| format!("host memory {device} HostMemory ++++++")));
    pairs
}

/// A healthy machine: facts as they are, no complaint, nothing changed, in time.
#[test]
fn a_healthy_machine_has_no_complaint() {
    let (census, modules) = (Census::take(), fs::read_to_string("/proc/modules").unwrap());
    let start = Instant::now();
    let healthy = Doctor::new().run();
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    census.assert_unchanged();
    let names = |modules: &str| -> Vec<String> {
        modules.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&fs::read_to_string("/proc/modules").unwrap()), names(&modules));
    healthy.assert("A", &[], &[]);
    assert_eq!(healthy.pairs(), all_pairs(&["rxe0", "rxe1"]));

    let facts = &healthy.json["facts"];
    assert_eq!(word(&facts["host"]), "guest");
    assert_eq!(word(&facts["kernel"]["release"]), run("uname", &["-r"]).trim());
    assert_eq!((&facts["process"]["user"], &facts["process"]["seccomp"]), (&0.into(), &0.into()));
    assert_eq!(facts["process"]["user_namespace"], false);
    let memlock = run("sh", &["-c", "ulimit -l"]);
    let kilobytes: u64 = memlock.trim().parse().unwrap();
    assert_eq!(facts["limits"]["memlock"]["soft"], kilobytes << 10);
    let parameter = fs::read_to_string("/sys/module/udmabuf/parameters/size_limit_mb").unwrap();
    assert_eq!(facts["limits"]["udmabuf_size_mb"].to_string(), parameter.trim());
    let of_device = |device: &serde_json::Value| {
        let port = &device["ports"][0];
        let mtu = port["mtu"].as_u64().unwrap();
        let gids = port["gids"].as_array().unwrap().iter();
        let gids: Vec<String> = gids.map(|gid| word(&gid["gid"]).to_owned()).collect();
        (
            word(&device["name"]).to_owned(),
            word(&device["driver"]).to_owned(),
            word(&port["state"]).to_owned(),
            mtu,
            gids,
        )
    };
    let told: Vec<_> = facts["devices"].as_array().unwrap().iter().map(of_device).collect();
    let seen: Vec<_> = devices()
        .unwrap()
        .iter()
        .map(|device| {
            let context = device.open().unwrap();
            let gids = context.gids(1).unwrap();
            let gids = gids.iter().map(|gid| std::net::Ipv6Addr::from(gid.gid).to_string()).collect();
            (
                device.name().to_owned(),
                "rxe".to_owned(),
                "ACTIVE".to_owned(),
                u64::from(context.port(1).unwrap().mtu),
                gids,
            )
        })
        .collect();
    assert_eq!(told, seen);
}

/// What a person sees: the grade, the matrix, colours only when asked, and the file for a bug report.
#[test]
fn the_text_and_the_report_say_the_same() {
    let report = std::env::temp_dir().join("doctor-report.txt");
    let path = report.to_str().unwrap();
    let output = Doctor::new().arguments(&["--report", path]).output();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && !text.contains('\x1b'), "{text}");
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].ends_with("doctor on guest"), "{text}");
    let pairs = 2 * (1 + heaps().len());
    let summary =
        format!("  A  every device moves the dma-bufs of every exporter: {pairs} of {pairs} pairs, verified");
    assert_eq!(lines[2], summary);
    let marks = "✓ ✓ ✓ ✓ ✓ ✓";
    let row = lines.iter().find(|line| line.starts_with("  udmabuf ")).expect("a row of the matrix");
    assert_eq!(row.matches(marks).count(), 2, "{row}");
    let coloured = Doctor::new().env("CLICOLOR_FORCE", "1").arguments(&[]).output();
    assert!(String::from_utf8_lossy(&coloured.stdout).contains('\x1b'));
    let plain = Doctor::new().env("CLICOLOR_FORCE", "1").env("NO_COLOR", "1").arguments(&[]).output();
    assert!(!String::from_utf8_lossy(&plain.stdout).contains('\x1b'));

    let written = fs::read_to_string(&report).unwrap();
    fs::remove_file(&report).unwrap();
    let private = ["192.168.77", "fd77::", "fe80::ff", "02:00:00:00:77", "doctor on guest", "\"guest\""];
    let found: Vec<_> = private.iter().filter(|word| written.contains(**word)).collect();
    assert!(found.is_empty(), "{found:?} in {written}");
    assert!(
        written.contains("doctor on host") && written.contains(&summary) && written.contains("\"schema\": 1")
    );
}
