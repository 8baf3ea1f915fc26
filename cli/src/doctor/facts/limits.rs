//! Limits of this process, its cgroup, the machine's memory and udmabuf.

use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look};

/// A limit of a process; `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftHard {
    pub soft: Option<u64>,
    pub hard: Option<u64>,
}

/// A pool of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    pub bytes: u64,
    pub total: u64,
    pub free: u64,
}

/// Limits. Sizes are in bytes unless the name says otherwise.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    pub memlock: Fact<SoftHard>,
    /// What the process has pinned already.
    pub pinned: Fact<u64>,
    pub nofile: Fact<SoftHard>,
    pub open_files: Fact<u64>,
    pub memory_available: Fact<u64>,
    pub memory_total: Fact<u64>,
    /// The smallest limit of memory on the way up from this process's cgroup, with its file and what it leaves.
    pub cgroup_memory: Fact<Option<CgroupMemory>>,
    pub udmabuf_size_mb: Fact<u64>,
    pub udmabuf_list: Fact<u64>,
    pub huge_pages: Vec<HugePages>,
    /// Whether memfds get transparent huge pages: `never`, `advise`, …
    pub shmem_huge_pages: Fact<String>,
}

/// A limit of a cgroup's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupMemory {
    pub file: String,
    pub limit: u64,
    pub left: u64,
}

impl Limits {
    pub fn gather(look: &Look) -> Self {
        let meminfo = look.text("/proc/meminfo");
        let memory = |name: &str| {
            meminfo.clone().and_then(|text| {
                Fact::from(kilobytes(&text, name).ok_or(format!("/proc/meminfo has no {name}")))
            })
        };
        let limits = look.text("/proc/self/limits");
        let limit = |name: &str| {
            limits.clone().and_then(|text| {
                Fact::from(soft_hard(&text, name).ok_or(format!("/proc/self/limits has no {name}")))
            })
        };
        let status = look.text("/proc/self/status");
        let open_files = match look.path("/proc/self/fd").is_dir() {
            true => Fact::Known(look.names("/proc/self/fd").len() as u64),
            false => Fact::unknown("/proc/self/fd: it is not there"),
        };
        let parameter = |name: &str| look.number(&format!("/sys/module/udmabuf/parameters/{name}"));
        let chosen = |text: String| match text.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
            Some((value, _)) => value.to_owned(),
            None => text,
        };
        Self {
            memlock: limit("Max locked memory"),
            pinned: status.and_then(|text| {
                Fact::from(kilobytes(&text, "VmPin").ok_or("/proc/self/status has no VmPin"))
            }),
            nofile: limit("Max open files"),
            open_files,
            memory_available: memory("MemAvailable"),
            memory_total: memory("MemTotal"),
            cgroup_memory: cgroup_memory(look),
            udmabuf_size_mb: parameter("size_limit_mb"),
            udmabuf_list: parameter("list_limit"),
            huge_pages: huge_pages(look),
            shmem_huge_pages: look.text("/sys/kernel/mm/transparent_hugepage/shmem_enabled").map(chosen),
        }
    }
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

/// A row of /proc/self/limits. The name has spaces, the limits have none.
fn soft_hard(text: &str, name: &str) -> Option<SoftHard> {
    let row = text.lines().find_map(|line| line.strip_prefix(name))?;
    let mut words = row.split_whitespace();
    let mut limit = || {
        let word = words.next()?;
        if word == "unlimited" { Some(None) } else { word.parse().ok().map(Some) }
    };
    Some(SoftHard { soft: limit()?, hard: limit()? })
}

fn huge_pages(look: &Look) -> Vec<HugePages> {
    let of = |name: String| {
        let bytes = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()? << 10;
        let count = |file| look.number(&format!("/sys/kernel/mm/hugepages/{name}/{file}")).known().copied();
        Some(HugePages { bytes, total: count("nr_hugepages")?, free: count("free_hugepages")? })
    };
    look.names("/sys/kernel/mm/hugepages").into_iter().filter_map(of).collect()
}

fn cgroup_memory(look: &Look) -> Fact<Option<CgroupMemory>> {
    look.text("/proc/self/cgroup").map(|groups| {
        let line = |start: &str| groups.lines().find_map(|line| line.strip_prefix(start)).map(str::to_owned);
        let unified = line("0::").map(|path| ("/sys/fs/cgroup", path, "memory.max", "memory.current"));
        let of_memory = groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|name| name == "memory").then(|| path.to_owned())
        });
        let older = of_memory
            .map(|path| ("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"));
        let limits = older.into_iter().chain(unified).flat_map(|(mount, path, limit, usage)| {
            // A container sees its own group as the root of the mount, whatever its path.
            let above: Vec<String> = path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect();
            let folders = std::iter::once(path.clone()).chain(above).chain([String::new()]);
            let read = move |folder: String| {
                let file = format!("{mount}{}/{limit}", folder.trim_end_matches('/'));
                let limit = look.number(&file).known().copied()?;
                let used = look.number(&format!("{mount}{}/{usage}", folder.trim_end_matches('/')));
                let left = limit.saturating_sub(used.known().copied().unwrap_or(0));
                Some(CgroupMemory { file, limit, left })
            };
            folders.filter_map(read).collect::<Vec<_>>()
        });
        // Version 1 says "no limit" by a number near 2^63.
        limits.filter(|found| found.limit < 1 << 60).min_by_key(|found| found.limit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_of_proc_are_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max open files            1024                 1048576              files\n\
                    Max locked memory         8388608              unlimited            bytes\n";
        assert_eq!(
            soft_hard(text, "Max open files"),
            Some(SoftHard { soft: Some(1024), hard: Some(1 << 20) })
        );
        assert_eq!(soft_hard(text, "Max locked memory"), Some(SoftHard { soft: Some(8 << 20), hard: None }));
        assert_eq!(soft_hard(text, "Max processes"), None);
        assert_eq!(kilobytes("VmPin:\t      12 kB\n", "VmPin"), Some(12 << 10));
    }
}
