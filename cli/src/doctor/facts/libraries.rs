//! The user-space libraries of RDMA, and the providers of libibverbs.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look};

/// Libraries and providers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Libraries {
    /// The file of libibverbs that this program loaded.
    pub libibverbs: Fact<String>,
    /// rdma-core's version, from the name of that file.
    pub rdma_core: Fact<String>,
    /// The file of librdmacm, if the loader would find one.
    pub librdmacm: Fact<String>,
    /// The providers that are installed beside libibverbs.
    pub providers: Fact<Vec<String>>,
}

impl Libraries {
    pub fn gather(look: &Look) -> Self {
        let file = if look.here { mapped(look, "libibverbs.so") } else { installed(look, "libibverbs.so.1") };
        let libibverbs = Fact::from(file.ok_or("libibverbs.so.1 is not loaded, or /proc is hidden"));
        let real = libibverbs.known().and_then(|path| std::fs::canonicalize(look.path(path)).ok());
        let version = real.as_deref().and_then(Path::file_name).and_then(|name| version(name.to_str()?));
        let folder = libibverbs.known().and_then(|path| Some(Path::new(path).parent()?.to_str()?.to_owned()));
        let providers = folder.as_ref().map(|folder| {
            let both = [format!("{folder}/libibverbs"), folder.clone()];
            let mut names: Vec<String> = both
                .iter()
                .flat_map(|folder| look.names(folder))
                .filter_map(|file| provider(&file))
                .collect();
            names.sort();
            names.dedup();
            names
        });
        let beside = folder.map(|folder| format!("{folder}/librdmacm.so.1")).filter(|path| look.exists(path));
        let librdmacm = beside.or_else(|| installed(look, "librdmacm.so.1"));
        Self {
            rdma_core: libibverbs
                .clone()
                .and_then(|file| Fact::from(version.ok_or(format!("{file} has no version in its name")))),
            librdmacm: Fact::from(librdmacm.ok_or("librdmacm.so.1 is in none of the usual folders")),
            providers: Fact::from(providers.ok_or("the folder of libibverbs is not known")),
            libibverbs,
        }
    }
}

/// The file of a library that this process has mapped.
fn mapped(look: &Look, name: &str) -> Option<String> {
    let maps = look.any_text("/proc/self/maps")?;
    let path = maps.lines().find(|line| line.contains(name))?;
    Some(path[path.find('/')?..].to_owned())
}

fn installed(look: &Look, name: &str) -> Option<String> {
    let multiarch = look.names("/usr/lib").into_iter().map(|folder| format!("/usr/lib/{folder}"));
    let folders = multiarch.chain(["/usr/lib64".into(), "/usr/lib".into(), "/lib64".into()]);
    folders.map(|folder| format!("{folder}/{name}")).find(|path| look.exists(path))
}

/// `44.0` of `libibverbs.so.1.14.44.0`.
fn version(file: &str) -> Option<String> {
    let numbers: Vec<_> = file.strip_prefix("libibverbs.so.")?.split('.').collect();
    (numbers.len() == 4).then(|| format!("{}.{}", numbers[2], numbers[3]))
}

/// The provider of a library's file: `rxe` of `librxe-rdmav34.so`, and `mlx5` of `libmlx5.so.1`.
fn provider(file: &str) -> Option<String> {
    Some(file.strip_prefix("lib")?.strip_suffix(".so")?.split_once("-rdmav")?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_tell_versions_and_providers() {
        assert_eq!(version("libibverbs.so.1.14.44.0").as_deref(), Some("44.0"));
        assert_eq!(version("libibverbs.so.1"), None);
        assert_eq!(provider("libmlx5-rdmav34.so").as_deref(), Some("mlx5"));
        assert_eq!(provider("libibverbs.so.1"), None);
    }
}
