//! Makes modules load faster in the guest.
//!
//! A Debian module is compressed, signed and contains BTF. Under software
//! emulation a guest spends more time on these than on loading the code. This
//! removes them from the modules that guests load; Debian's code stays the same.

use super::{Kernel, modules};
use crate::process::{self, decompressed};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Rewrites the modules that `kernel` names and their dependencies, below `root`.
pub fn slim(kernel: &Kernel, root: &Path, release: &str) -> Result<()> {
    let names: Vec<&str> =
        [kernel.root_modules, kernel.rdma_modules, &["rdma_rxe"], kernel.test_modules].concat();
    for module in modules::closure(root, release, &names)? {
        let name = module.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some((stem, suffix)) = name.split_once(".ko.") else { continue };
        let packed =
            fs::read(&module.path).with_context(|| format!("cannot read {}", module.path.display()))?;
        let plain = module.path.with_file_name(format!("{stem}.ko"));
        fs::write(&plain, decompressed(suffix, packed)?)
            .with_context(|| format!("cannot write {}", plain.display()))?;
        // Rewriting the file also drops the signature at its end.
        process::output(
            Command::new("objcopy").args(["--strip-debug", "-R", ".BTF", "-R", ".BTF.base"]).arg(&plain),
        )?;
        fs::remove_file(&module.path)?;
    }
    Ok(())
}
