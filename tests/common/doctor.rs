//! `dmabuf-rdma doctor` in the surroundings that a test makes, and what it says of them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use super::system::program;

/// What a run of doctor said.
pub struct Diagnosis {
    pub json: Value,
    pub status: i32,
}

/// A run of doctor in a mount namespace of its own, with an empty /dev/dri and without GPU runtimes, whatever other tests
/// loaded and the machine has.
pub struct Doctor {
    script: String,
    through: Vec<String>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    cards: bool,
    provider: bool,
}

impl Doctor {
    pub fn new() -> Self {
        Self {
            script: String::new(),
            through: Vec::new(),
            arguments: vec!["--json".into()],
            environment: vec![("LD_LIBRARY_PATH".into(), no_runtimes().display().to_string())],
            cards: false,
            provider: true,
        }
    }

    /// Runs this in a shell first, as root, in the same namespace. It stops at the first failure.
    pub fn after(mut self, script: &str) -> Self {
        self.script += script;
        self.script += "\n";
        self
    }

    /// Starts doctor through another program, such as `prlimit`.
    pub fn through(mut self, words: &[&str]) -> Self {
        self.through.extend(words.iter().map(ToString::to_string));
        self
    }

    /// Starts doctor as a user without rights.
    pub fn by_nobody(self) -> Self {
        self.through(&[
            "/usr/bin/setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
        ])
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Leaves the cards of /dev/dri where they are.
    pub fn with_cards(mut self) -> Self {
        self.cards = true;
        self
    }

    /// With the distribution's libibverbs and providers.
    pub fn with_debians_provider(mut self) -> Self {
        self.provider = false;
        self
    }

    /// Other arguments than `--json`.
    pub fn arguments(mut self, words: &[&str]) -> Self {
        self.arguments = words.iter().map(ToString::to_string).collect();
        self
    }

    #[track_caller]
    pub fn output(&self) -> Output {
        let hide =
            if self.cards { "" } else { "[ ! -d /dev/dri ] || /usr/bin/mount -t tmpfs none /dev/dri\n" };
        let script = format!("{hide}{}exec \"$@\"", self.script);
        let mut command = Command::new("/usr/bin/unshare");
        command.args(["--mount", "--propagation", "private", "/bin/sh", "-ec", &script, "sh"]);
        command.args(&self.through).arg(program()).arg("doctor").args(&self.arguments);
        for (name, value) in &self.environment {
            let inherited = std::env::var(name).ok().filter(|_| name == "LD_LIBRARY_PATH" && self.provider);
            let value = inherited.map_or(value.clone(), |others| format!("{value}:{others}"));
            command.env(name, value);
        }
        command.output().expect("unshare")
    }

    #[track_caller]
    pub fn run(&self) -> Diagnosis {
        let output = self.output();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (said, errors) = (text(&output.stdout), text(&output.stderr));
        let json = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}{errors}"));
        Diagnosis { json, status: output.status.code().expect("a status") }
    }
}

/// A folder with libraries of all runtimes that no loader accepts.
fn no_runtimes() -> PathBuf {
    let folder = std::env::temp_dir().join("dmabuf-rdma-no-runtimes");
    fs::create_dir_all(&folder).unwrap();
    for library in ["libcuda.so.1", "libhsa-runtime64.so.1", "libze_loader.so.1"] {
        fs::write(folder.join(library), "").unwrap();
    }
    folder
}

impl Diagnosis {
    /// The lines about what does not work or is limited: `id: cause -> remedy`.
    pub fn told(&self) -> Vec<String> {
        let told = self.findings().filter(|finding| finding["severity"] != "note");
        told.map(|f| format!("{}: {} -> {}", word(&f["id"]), word(&f["cause"]), word(&f["remedy"]))).collect()
    }

    /// The notes, without their remedies: `id: cause`.
    pub fn notes(&self) -> Vec<String> {
        let notes = self.findings().filter(|finding| finding["severity"] == "note");
        notes.map(|f| format!("{}: {}", word(&f["id"]), word(&f["cause"]))).collect()
    }

    fn findings(&self) -> impl Iterator<Item = &Value> {
        self.json["findings"].as_array().expect("findings").iter()
    }

    /// What each pair of exporter and device reached: `udmabuf rxe0 Verbs ++++++`, with `-` for a failure and `.` for
    /// what was not tried.
    pub fn pairs(&self) -> Vec<String> {
        let steps = ["allocate", "register", "transfer", "first_byte", "last_byte", "odd_offset"];
        let pairs = self.json["trials"]["pairs"].as_array().expect("pairs").iter();
        let mark = |mark: &Value| match word(mark) {
            "passed" => '+',
            "failed" => '-',
            "not-tried" => '.',
            other => panic!("{other}"),
        };
        let row = |pair: &Value| {
            let marks: String = steps.iter().map(|step| mark(&pair[*step])).collect();
            let path = pair["path"].as_str().unwrap_or("none");
            format!("{} {} {path} {marks}", word(&pair["exporter"]), word(&pair["device"]))
        };
        pairs.map(row).collect()
    }

    pub fn grade(&self) -> &str {
        word(&self.json["grade"])
    }

    /// Asserts every line about what does not work or is limited, the notes beside the guest's usual ones, the
    /// grade, and that the exit status fits it.
    #[track_caller]
    pub fn assert(&self, grade: &str, told: &[&str], notes: &[&str]) {
        assert_eq!(self.told(), told, "what is told: {:#}", self.json["trials"]);
        let usual = usual_notes();
        let seen = self.notes();
        let more: Vec<_> = seen.iter().filter(|note| !usual.contains(note)).collect();
        assert_eq!(more, notes, "the notes beside the usual ones");
        assert_eq!((self.grade(), self.status), (grade, i32::from("DF".contains(grade))));
    }
}

pub fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string"))
}

/// The notes that are true in any guest of the tests, each compared with what is true now.
pub fn usual_notes() -> Vec<String> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut notes = Vec::new();
    let (files, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    if files < 4096 {
        notes.push(format!(
            "open-files: a process may have {files} files open, and each dma-buf is one until it is registered"
        ));
    }
    for (runtime, library) in
        [("CUDA", "libcuda.so.1"), ("ROCm", "libhsa-runtime64.so.1"), ("Level Zero", "libze_loader.so.1")]
    {
        notes.push(format!("runtime-missing: {runtime} is missing, because {library} cannot be loaded"));
    }
    notes.push("large-host-regions: soft-RoCE of some kernels (6.12.117, 7.3) refuses more than 1 GiB of host memory in one region (ENOMEM)".into());
    let pools = ["2048kB", "1048576kB"].map(|size| format!("/sys/kernel/mm/hugepages/hugepages-{size}"));
    let pools: Vec<_> = pools.iter().filter(|pool| fs::exists(pool).unwrap()).collect();
    if pools.iter().all(|pool| text(&format!("{pool}/free_hugepages")).trim() == "0") {
        let sizes = if pools.len() == 2 { "1.00 GiB, 2.00 MiB" } else { "2.00 MiB" };
        notes.push(format!("huge-pages: no huge page is free ({sizes})"));
    }
    if text("/sys/kernel/mm/transparent_hugepage/shmem_enabled").contains("[never]") {
        notes.push("shmem-huge-pages: memfds get no transparent huge pages, so that a udmabuf has a page of 4 KiB for each entry".into());
    }
    if !fs::exists("/sys/module/dma_sg").unwrap() {
        notes.push(
            "dma-sg-missing: the module dma_sg is not loaded, which shows a device's addresses of a dma-buf"
                .into(),
        );
    }
    let release = text("/proc/sys/kernel/osrelease");
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    let exports_bars = (numbers.next(), numbers.next()) >= (Some(6), Some(19));
    notes.push(match exports_bars {
        true => "vfio-unavailable: no IOMMU is on, without which VFIO opens no device".into(),
        false => {
            format!("vfio-unavailable: Linux {} does not export PCI BARs through VFIO", release.trim())
        }
    });
    notes
}
