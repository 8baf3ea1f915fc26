//! How much memory this process can still allocate: what the machine has free, and what its cgroups leave.

use std::fs;
use std::path::Path;

use super::{Error, Result};

const CGROUPS: &str = "/sys/fs/cgroup";

/// Refuses more memory than the machine or, for memory that the kernel charges to it, this process's cgroup
/// can give. The exporters' allocators take all there is, and then the kernel kills processes.
pub(crate) fn check(exporter: impl FnOnce() -> String, size: u64, charged: bool) -> Result<()> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| available(&text)).map(|bytes| (bytes, None));
    let cgroup = || least_room(&read("/proc/self/cgroup")?, Path::new(CGROUPS), size);
    let refused = |limit: &(u64, _)| size > limit.0;
    match machine.filter(refused).or_else(|| charged.then(cgroup).flatten().filter(refused)) {
        Some((available, limit)) => {
            let available = Some(available);
            Err(Error::OutOfMemory { exporter: exporter(), requested: size, available, limit })
        }
        None => Ok(()),
    }
}

/// Free bytes, swap included, by the kernel's own estimate; `None` if it reports none.
fn available(meminfo: &str) -> Option<u64> {
    let kib = |key| value(meminfo, key)?.strip_suffix(" kB")?.parse::<u64>().ok();
    kib("MemAvailable:")?.checked_add(kib("SwapFree:")?)?.checked_mul(1024)
}

fn value<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// The files of a version of cgroups, and the keys of memory.stat with memory that the kernel can take back.
struct Version {
    limit: &'static str,
    usage: &'static str,
    reclaimable: [&'static str; 2],
}

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_active_file ", "total_inactive_file "],
};
const V2: Version =
    Version { limit: "memory.max", usage: "memory.current", reclaimable: ["active_file ", "inactive_file "] };

/// The least room, in bytes, that the process's cgroup and those around it leave, with the file of that
/// limit. `None` without a limit. `memberships` is /proc/self/cgroup.
fn least_room(memberships: &str, mount: &Path, size: u64) -> Option<(u64, Option<String>)> {
    // Version 1 has a line for each hierarchy, such as `4:cpu,memory:/a`; version 2 has `0::/a`.
    let fields = memberships.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let v1 = fields.clone().find(|(controllers, _)| controllers.split(',').any(|name| name == "memory"));
    let v2 = || fields.clone().find(|(controllers, _)| controllers.is_empty());
    let (version, mount, path) = match v1 {
        Some((_, path)) => (V1, mount.join("memory"), path),
        None => (V2, mount.to_path_buf(), v2()?.1),
    };
    // In a container, the path may be one of the host's; its own limit is then that of the mount.
    let levels = Path::new(path.trim_start_matches('/')).ancestors();
    let rooms = levels.filter_map(|level| {
        let folder = mount.join(level);
        let room = room(&folder, &version, size)?;
        Some((room, Some(folder.join(version.limit).display().to_string())))
    });
    rooms.min_by_key(|(room, _)| *room)
}

/// What a cgroup's limit leaves. Page cache counts as free, if `size` needs it; `None` without a limit.
fn room(folder: &Path, version: &Version, size: u64) -> Option<u64> {
    let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let (limit, usage) = (number(version.limit)?, number(version.usage)?);
    let room = limit.saturating_sub(usage);
    if room >= size {
        return Some(room);
    }
    let stat = read("memory.stat").unwrap_or_default();
    let cache = version.reclaimable.iter().filter_map(|key| value(&stat, key)?.parse::<u64>().ok());
    Some(limit.saturating_sub(usage.saturating_sub(cache.fold(0, u64::saturating_add))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// A file system of cgroups, removed when dropped.
    struct Cgroups(PathBuf);

    impl Cgroups {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("dmabuf-rdma-{name}-{}", std::process::id()));
            for (file, text) in files {
                let path = root.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }

        fn room(&self, memberships: &str, size: u64) -> Option<(u64, String)> {
            let (room, limit) = least_room(memberships, &self.0, size)?;
            let limit = limit.unwrap();
            Some((room, limit.strip_prefix(&self.0.display().to_string()).unwrap().into()))
        }
    }

    impl Drop for Cgroups {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn available_memory_includes_swap() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   1000 kB\nSwapFree:         24 kB\n";
        assert_eq!(available(text), Some(1024 << 10));
        assert_eq!(available("MemTotal:  1 kB\n"), None);
        let most = u64::MAX;
        assert_eq!(available(&format!("MemAvailable: {most} kB\nSwapFree: {most} kB\n")), None);
    }

    #[test]
    fn the_tightest_limit_of_version_2_counts() {
        let cgroups = Cgroups::new(
            "v2",
            &[
                ("a/memory.max", "9000\n"),
                ("a/memory.current", "4000\n"),
                ("a/b/memory.max", "max\n"),
                ("a/b/memory.current", "1000\n"),
                ("a/b/c/memory.max", "6000\n"),
                ("a/b/c/memory.current", "5500\n"),
                ("a/b/c/memory.stat", "anon 1\nactive_file 300\ninactive_file 200\nfile 999\n"),
            ],
        );
        assert_eq!(cgroups.room("0::/a/b\n", 1), Some((5000, "/a/memory.max".into())));
        // Page cache makes room, but not what is in use.
        assert_eq!(cgroups.room("0::/a/b/c\n", 501), Some((1000, "/a/b/c/memory.max".into())));
        assert_eq!(cgroups.room("0::/a/b/c\n", 1), Some((500, "/a/b/c/memory.max".into())));
        assert_eq!(cgroups.room("0::/\n", 1), None);
        // A path of the host's, as a container without a cgroup namespace sees it.
        assert_eq!(cgroups.room("0::/kubepods/pod1\n", 1), None);
    }

    #[test]
    fn version_1_has_files_of_its_own() {
        let cgroups = Cgroups::new(
            "v1",
            &[
                ("memory/memory.limit_in_bytes", "8000\n"),
                ("memory/memory.usage_in_bytes", "7000\n"),
                ("memory/memory.stat", "total_active_file 30\ntotal_inactive_file 20\n"),
                ("memory/docker/memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory/docker/memory.usage_in_bytes", "7000\n"),
            ],
        );
        let memberships = "5:devices:/docker\n4:cpu,memory:/docker\n0::/\n";
        let limit = "/memory/memory.limit_in_bytes";
        assert_eq!(cgroups.room(memberships, 1000), Some((1000, limit.into())));
        assert_eq!(cgroups.room(memberships, 1001), Some((1050, limit.into())));
        assert_eq!(cgroups.room("4:memory:/elsewhere\n", 1), Some((1000, limit.into())));
        assert_eq!(cgroups.room("1:cpu:/docker\n", 1), None);
    }

    #[test]
    fn odd_numbers_are_taken_and_odd_text_is_no_limit() {
        for (limit, usage, room) in [
            ("0", "18446744073709551615", Some(0)),
            ("18446744073709551615", "0", Some(u64::MAX)),
            ("18446744073709551616", "0", None),
            ("", "", None),
            ("-1", "0", None),
        ] {
            let files =
                [("memory.max", limit), ("memory.current", usage), ("memory.stat", "active_file -1\n")];
            let cgroups = Cgroups::new("odd", &files);
            assert_eq!(cgroups.room("0::/\n", u64::MAX).map(|(room, _)| room), room, "{limit} {usage}");
        }
        for memberships in ["", "\n", "0", "0:", "0::", ":::::", "x:memory"] {
            let _ = Cgroups::new("text", &[("memory.max", "1")]).room(memberships, 1);
        }
    }
}
