//! Modules that the guest loads quickly.
//!
//! A Debian module is compressed, signed and carries BTF: under software
//! emulation a guest spends more time on those than on the module itself. The
//! ones that guests commonly load are stored plain. The code stays what
//! Debian built.

use super::{Kernel, modules};
use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Rewrites the modules that `kernel` names, and those they need, in `tree`.
pub fn slim(kernel: &Kernel, tree: &Path) -> Result<()> {
    let names: Vec<&str> =
        [kernel.root_modules, kernel.rdma_modules, &["rdma_rxe"], kernel.test_modules].concat();
    for module in modules::closure(tree, &names)? {
        let name = module.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some((stem, _)) = name.split_once(".ko.") else { continue };
        let plain = module.path.with_file_name(format!("{stem}.ko"));
        fs::write(&plain, uncompressed(&module.path)?)
            .with_context(|| format!("cannot write {}", plain.display()))?;
        // Writing the file anew also drops the signature at its end.
        process::output(
            Command::new("objcopy").args(["--strip-debug", "-R", ".BTF", "-R", ".BTF.base"]).arg(&plain),
        )?;
        fs::remove_file(&module.path)?;
    }
    Ok(())
}

/// A module's content, whatever its kernel compressed it with.
fn uncompressed(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => "gzip",
    };
    let out = Command::new(program).arg("-dc").arg(path).output();
    let out = out.with_context(|| format!("cannot run {program}"))?;
    if !out.status.success() {
        bail!("cannot unpack {}: {}", path.display(), String::from_utf8_lossy(&out.stderr));
    }
    Ok(out.stdout)
}
