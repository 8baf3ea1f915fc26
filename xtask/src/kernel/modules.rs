//! Dependencies of modules, in load order.

use super::read;
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A module file in the kernel's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// With underscores, as printed by `lsmod`.
    pub name: String,
    pub path: PathBuf,
}

/// The named modules and all their dependencies; a dependency comes first.
pub fn closure(tree: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let dep = Dependencies::parse(&read(&tree.join("modules.dep"))?);
    // Built-in modules need no loading.
    let builtin = read(&tree.join("modules.builtin")).unwrap_or_default();
    let builtin: Vec<String> = builtin.lines().map(module_name).collect();
    let mut order = Vec::new();
    for name in names.iter().map(|n| n.replace('-', "_")).filter(|n| !builtin.contains(n)) {
        dep.visit(&name, &mut order).with_context(|| format!("in {}", tree.display()))?;
    }
    Ok(order.into_iter().map(|file| Module { name: module_name(&file), path: tree.join(&file) }).collect())
}

/// `modules.dep`, by module name.
struct Dependencies(HashMap<String, (String, Vec<String>)>);

impl Dependencies {
    fn parse(text: &str) -> Dependencies {
        let entry = |line: &str| {
            let (file, needs) = line.split_once(':')?;
            let needs = needs.split_whitespace().map(str::to_string).collect();
            Some((module_name(file), (file.to_string(), needs)))
        };
        Dependencies(text.lines().filter_map(entry).collect())
    }

    fn visit(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let (file, needs) = self.0.get(name).with_context(|| format!("modules.dep has no module {name}"))?;
        if order.contains(file) {
            return Ok(());
        }
        for need in needs {
            self.visit(&module_name(need), order)?;
        }
        order.push(file.clone());
        Ok(())
    }
}

/// The name of a module file: `kernel/net/9p/9pnet-virtio.ko.xz` is `9pnet_virtio`.
fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first() {
        let dep = Dependencies::parse(
            "kernel/a.ko.xz:\n\
             kernel/b-x.ko.xz: kernel/a.ko.xz\n\
             kernel/c.ko: kernel/d.ko kernel/b-x.ko.xz kernel/a.ko.xz\n\
             kernel/d.ko: kernel/a.ko.xz\n",
        );
        let mut order = Vec::new();
        dep.visit("c", &mut order).unwrap();
        dep.visit("b_x", &mut order).unwrap();
        assert_eq!(order, ["kernel/a.ko.xz", "kernel/d.ko", "kernel/b-x.ko.xz", "kernel/c.ko"]);
        assert!(dep.visit("e", &mut order).is_err());
    }
}
