//! The user-space provider that the guest's RDMA devices use.
//!
//! No released provider of soft-RoCE has `ibv_reg_dmabuf_mr`. xtask builds one in `target/provider`: rdma-core as the
//! crate ibverbs-sys vendors it, with the files of `provider/` in place of its own.

use crate::host::{self, Need};
use crate::lock;
use crate::{process, project, ui};
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

/// Whose libibverbs and providers the guest's programs load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Provider {
    /// Debian's; none of its providers for software devices has ibv_reg_dmabuf_mr
    Debian,
    /// Built from rdma-core and provider/; has ibv_reg_dmabuf_mr, and siw's provider
    Dmabuf,
}

impl Provider {
    pub fn name(self) -> &'static str {
        match self {
            Provider::Debian => "debian",
            Provider::Dmabuf => "dmabuf",
        }
    }
}

/// The version of this recipe. Change it to build again.
const RECIPE: u32 = 1;

/// The targets of make, and the providers among them. mlx5 and efa are libraries too, which perftest and the path
/// DataDirect load, and a libibverbs works only with those of its own version.
const TARGETS: &[&str] = &["ibverbs", "rdmacm", "rxe-rdmav34", "siw-rdmav34", "mlx5", "efa"];
const PROVIDERS: &[&str] = &["rxe", "siw", "mlx5", "efa"];

/// The folder for LD_LIBRARY_PATH. Builds the libraries first if needed.
pub fn libraries() -> Result<PathBuf> {
    let home = project::target().join("provider");
    let libraries = home.join("build/lib");
    let vendored = vendored()?;
    let parts = project::root().join("provider");
    let key = key(&vendored, &parts)?;
    let current = || fs::read_to_string(home.join("key")).is_ok_and(|k| k == key);
    if current() {
        return Ok(libraries);
    }
    let _lock = lock::exclusive(&home.with_extension("lock"))?;
    // Another xtask may have built it while this one waited.
    if current() {
        return Ok(libraries);
    }
    host::ensure(&[Need::Library])?;
    let step = ui::Step::start("Building", "libibverbs and a provider with ibv_reg_dmabuf_mr");
    build(&home, &vendored, &parts)
        .context("cannot build the provider; `--provider debian` works without it")?;
    fs::write(home.join("key"), key).context("cannot write the provider's key")?;
    step.done("Built", "libibverbs and a provider with ibv_reg_dmabuf_mr");
    Ok(libraries)
}

/// Builds in the final place, since libibverbs has its folders compiled in.
fn build(home: &Path, vendored: &Path, parts: &Path) -> Result<()> {
    lock::remove(home)?;
    let (source, build) = (home.join("source"), home.join("build"));
    fs::create_dir_all(&build).with_context(|| format!("cannot create {}", build.display()))?;
    process::output(Command::new("cp").arg("-r").arg(vendored).arg(&source))?;
    for file in files(parts)? {
        let name = file.file_name().context("a file without a name")?;
        fs::copy(&file, source.join("providers/rxe").join(name))
            .with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let mut cmake = Command::new("cmake");
    cmake.arg("-S").arg(&source).arg("-B").arg(&build);
    process::output(cmake.args(["-DIN_PLACE=1", "-DNO_MAN_PAGES=1", "-DNO_PYVERBS=1"]))?;
    let mut make = Command::new("make");
    make.arg("-C").arg(&build).arg(format!("-j{}", available_parallelism()?));
    let log = process::output(make.args(TARGETS))?;
    fs::write(home.join("build.log"), log)?;
    // libibverbs warns of each provider that was not built.
    for entry in fs::read_dir(build.join("etc/libibverbs.d"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !PROVIDERS.contains(&name.as_str()) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    // 12 MB that nobody needs any more.
    lock::remove(&source)
}

/// The rdma-core in the sources of the crate ibverbs-sys.
fn vendored() -> Result<PathBuf> {
    let metadata = process::output(project::cargo().args(["metadata", "--format-version", "1"]))?;
    vendored_in(&serde_json::from_str(&metadata)?)
}

fn vendored_in(metadata: &Value) -> Result<PathBuf> {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let manifest = packages
        .filter(|package| package["name"] == "ibverbs-sys")
        .find_map(|package| package["manifest_path"].as_str());
    let manifest = manifest.context("`cargo metadata` lists no package ibverbs-sys")?;
    Ok(Path::new(manifest).with_file_name("vendor").join("rdma-core"))
}

/// The files that take part in the build.
fn files(parts: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(parts).with_context(|| format!("cannot read {}", parts.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_none_or(|e| e != "md"));
    files.sort();
    Ok(files)
}

/// A key that changes when the libraries must be built again. They know where they are.
fn key(vendored: &Path, parts: &Path) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    (RECIPE, TARGETS, vendored, project::target()).hash(&mut hasher);
    for file in files(parts)? {
        file.file_name().hash(&mut hasher);
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?.hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vendored_source_is_beside_the_manifest() {
        let metadata = serde_json::json!({ "packages": [
            { "name": "libc", "manifest_path": "/registry/libc-1/Cargo.toml" },
            { "name": "ibverbs-sys", "manifest_path": "/registry/ibverbs-sys-1/Cargo.toml" },
        ]});
        let vendored = vendored_in(&metadata).unwrap();
        assert_eq!(vendored, Path::new("/registry/ibverbs-sys-1/vendor/rdma-core"));
        assert!(vendored_in(&serde_json::json!({ "packages": [] })).is_err());
    }
}
