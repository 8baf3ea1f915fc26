//! Dependencies of modules, in load order, as modprobe knows them.

use crate::process;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A module file in the kernel's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// With underscores, as printed by `lsmod`.
    pub name: String,
    pub path: PathBuf,
}

/// The named modules and all their dependencies; a dependency comes first. Built-in modules need no loading.
///
/// `root` has the tree `lib/modules/RELEASE`, with the indices of depmod.
pub fn closure(root: &Path, release: &str, names: &[&str]) -> Result<Vec<Module>> {
    let modprobe =
        process::find("modprobe").context("modprobe is not installed; install the package kmod")?;
    let mut command = Command::new(modprobe);
    // The machine's own configuration is about its own kernel.
    command.args(["-C", "/dev/null", "-S", release, "--all", "--show-depends", "-d"]).arg(root).args(names);
    let text = process::output(&mut command)?;
    let mut modules: Vec<Module> = Vec::new();
    for path in
        text.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|path| Path::new(path.trim()))
    {
        let module = Module { name: module_name(path), path: path.to_path_buf() };
        if !modules.contains(&module) {
            modules.push(module);
        }
    }
    Ok(modules)
}

/// The name of a module file: `kernel/net/9p/9pnet-virtio.ko.xz` is `9pnet_virtio`.
fn module_name(file: &Path) -> String {
    let base = file.file_name().unwrap_or_default().to_string_lossy();
    base.split(".ko").next().unwrap_or(&base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock;
    use std::fs;

    #[test]
    fn dependencies_come_first() {
        let root =
            lock::new_folder(&std::env::temp_dir(), |unique| format!("xtask-modules-{unique}")).unwrap();
        let tree = root.join("lib/modules/1.2.3");
        fs::create_dir_all(tree.join("kernel")).unwrap();
        fs::create_dir_all(root.join("usr/lib")).unwrap();
        std::os::unix::fs::symlink("../../lib/modules", root.join("usr/lib/modules")).unwrap();
        // `b-x` uses a symbol of `a`, and `c` one of `b-x`.
        let exports = "char s[] __attribute__((section(\"__ksymtab_strings\"))) =";
        for (name, code) in [
            ("a", format!("{exports} \"of_a\";")),
            ("b-x", format!("{exports} \"of_b\"; extern int of_a; int *p = &of_a;")),
            ("c", "extern int of_b; int *p = &of_b;".to_string()),
        ] {
            let source = tree.join("kernel").join(name);
            fs::write(source.with_extension("c"), code).unwrap();
            let mut compile = Command::new("gcc");
            compile.arg("-c").arg(source.with_extension("c")).arg("-o").arg(source.with_extension("ko"));
            process::output(&mut compile).unwrap();
        }
        fs::write(tree.join("modules.builtin"), "kernel/e.ko\n").unwrap();
        process::output(Command::new(process::find("depmod").unwrap()).arg("-b").arg(&root).arg("1.2.3"))
            .unwrap();
        let names = |wanted: &[&str]| {
            let modules = closure(&root, "1.2.3", wanted)?;
            Ok::<_, anyhow::Error>(modules.into_iter().map(|module| module.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["c", "b_x", "e"]).unwrap(), ["a", "b_x", "c"]);
        assert_eq!(names(&["b-x"]).unwrap(), ["a", "b_x"]);
        assert!(names(&["absent", "a"]).is_err());
        fs::remove_dir_all(root).unwrap();
    }
}
