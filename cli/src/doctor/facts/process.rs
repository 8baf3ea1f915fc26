//! This process: its user, its rights, and what confines it.

use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look};

/// Capabilities that matter, by number (linux/capability.h).
const CAPABILITIES: &[(u32, &str)] = &[
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (14, "CAP_IPC_LOCK"),
    (17, "CAP_SYS_RAWIO"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (24, "CAP_SYS_RESOURCE"),
];

/// The process and what confines it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Process {
    /// The effective user.
    pub user: Fact<u32>,
    pub groups: Fact<Vec<u32>>,
    /// The effective capabilities that matter.
    pub capabilities: Fact<Vec<String>>,
    /// 0: none, 1: strict, 2: a filter.
    pub seccomp: Fact<u32>,
    /// Whether it is in a user namespace of its own, where capabilities count less.
    pub user_namespace: Fact<bool>,
    /// What shows that it runs in a container.
    pub container: Option<String>,
    /// Variables that hide devices from a runtime.
    pub hiding: Vec<String>,
}

impl Process {
    pub fn gather(look: &Look) -> Self {
        let status = look.text("/proc/self/status");
        let field = |name: &str| -> Fact<String> {
            status.clone().and_then(|text| {
                let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
                Fact::from(
                    found
                        .map(|value| value.trim().to_owned())
                        .ok_or(format!("/proc/self/status has no {name}")),
                )
            })
        };
        let numbers =
            |text: String| text.split_whitespace().filter_map(|n| n.parse().ok()).collect::<Vec<u32>>();
        let user = match field("Uid").map(numbers) {
            // Real, effective, saved, of the file system. /proc shows the thread that reads it.
            Fact::Known(ids) if ids.len() == 4 => Fact::Known(ids[1]),
            _ if look.here => Fact::Known(nix::unistd::geteuid().as_raw()),
            Fact::Known(_) => Fact::unknown("/proc/self/status has no user"),
            Fact::Unknown { unknown } => Fact::Unknown { unknown },
        };
        let capabilities = field("CapEff").and_then(|text| {
            let bits = u64::from_str_radix(&text, 16).map_err(|_| format!("CapEff is {text:?}"));
            Fact::from(bits).map(|bits| {
                let set = CAPABILITIES.iter().filter(|(number, _)| bits >> number & 1 == 1);
                set.map(|(_, name)| (*name).to_owned()).collect()
            })
        });
        let user_namespace = look.text("/proc/self/uid_map").map(|text| {
            let words: Vec<_> = text.split_whitespace().collect();
            words != ["0", "0", "4294967295"]
        });
        Self {
            user,
            groups: field("Groups").map(numbers),
            capabilities,
            seccomp: field("Seccomp")
                .and_then(|text| text.parse().map_err(|_| format!("Seccomp is {text:?}")).into()),
            user_namespace,
            container: container(look),
            hiding: hiding(look),
        }
    }

    /// Whether the capability counts outside of a user namespace.
    pub fn may(&self, capability: &str) -> bool {
        let has = self.capabilities.known().is_some_and(|all| all.iter().any(|name| name == capability));
        has && self.user_namespace.known() == Some(&false)
    }

    /// Whether a seccomp filter may refuse system calls.
    pub fn is_filtered(&self) -> bool {
        self.seccomp.known().is_some_and(|mode| *mode != 0)
    }
}

fn container(look: &Look) -> Option<String> {
    for (file, what) in [("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman")] {
        if look.exists(file) {
            return Some(format!("{what} ({file})"));
        }
    }
    let of_init = look.any_text("/proc/1/environ").unwrap_or_default();
    let named = of_init.split('\0').find_map(|variable| variable.strip_prefix("container="));
    if let Some(name) = named {
        return Some(name.to_owned());
    }
    let groups = look.any_text("/proc/self/cgroup").unwrap_or_default();
    let known = ["kubepods", "docker", "containerd", "libpod", "lxc"];
    known.iter().find(|name| groups.contains(*name)).map(|name| format!("{name} (/proc/self/cgroup)"))
}

fn hiding(look: &Look) -> Vec<String> {
    const NAMES: &[&str] = &[
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
    ];
    let set = NAMES
        .iter()
        .filter(|_| look.here)
        .filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)));
    set.collect()
}
