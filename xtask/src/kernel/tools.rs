//! Runs the kernel's build tools on a machine with an older C library.
//!
//! Some packaged tools (objtool, modpost) need a newer C library than Debian 12
//! has. Replaces each of them by a script that starts it with the C library of
//! its own release.

use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's library folder and dynamic linker.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// Whether some program in `tools` does not run with this machine's libraries.
pub fn foreign(tools: &Path) -> Result<bool> {
    for program in programs(tools)? {
        if !runs(&program)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Wraps every program in `tools` that does not run with this machine's libraries.
pub fn adapt(tools: &Path, libraries: &Path) -> Result<()> {
    for program in programs(tools)? {
        if !runs(&program)? {
            wrap(&program, libraries)?;
        }
    }
    Ok(())
}

/// The executable ELF files in a folder and its subfolders.
fn programs(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if kind.is_dir() {
            found.extend(programs(&path)?);
        } else if kind.is_file()
            && fs::metadata(&path)?.permissions().mode() & 0o111 != 0
            && fs::read(&path)?.starts_with(b"\x7fELF")
        {
            found.push(path);
        }
    }
    Ok(found)
}

/// Whether this machine has the libraries that the program needs.
fn runs(program: &Path) -> Result<bool> {
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("cannot run ldd")?;
    let text = [output.stdout, output.stderr].concat();
    Ok(!String::from_utf8_lossy(&text).contains("not found"))
}

/// Renames the program and puts a script in its place. The script uses paths
/// relative to itself, so the folder can move.
fn wrap(program: &Path, libraries: &Path) -> Result<()> {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let aside = program.with_file_name(format!("{name}.elf"));
    fs::rename(program, &aside).with_context(|| format!("cannot move {}", program.display()))?;
    let folder = program.parent().context("the program has no parent folder")?;
    let root = libraries.parent().context("the libraries have no parent folder")?;
    let below = folder.strip_prefix(root).context("tools and libraries are in different folders")?;
    let up = "../".repeat(below.components().count());
    let libraries = libraries.file_name().unwrap_or_default().to_string_lossy();
    let script = format!(
        "#!/bin/sh\n\
         here=$(dirname \"$0\")\n\
         libraries=$here/{up}{libraries}\n\
         exec \"$libraries/{LOADER}\" --library-path \"$libraries/{LIBRARIES}\" \"$here/{name}.elf\" \"$@\"\n"
    );
    fs::write(program, script).with_context(|| format!("cannot write {}", program.display()))?;
    fs::set_permissions(program, Permissions::from_mode(0o755))?;
    Ok(())
}
