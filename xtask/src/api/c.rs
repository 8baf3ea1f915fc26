//! The interface of the C library: its header, which cbindgen writes from `capi/src`, and its exported symbols.

use crate::project;
use anyhow::{Context, Result};
use std::fs;

/// The header, from the project's root.
pub const HEADER: &str = "capi/include/dmabuf_rdma.h";

/// The list of symbols.
const SYMBOLS: &str = "docs/api/libdmabuf_rdma.txt";

/// Compares header and symbols with the source, or writes them. Returns complaints.
pub fn check(update: bool) -> Result<Vec<String>> {
    let header = generated()?;
    let list = format!(
        "# The exported symbols. Written by `cargo xtask api --update`.\n{}\n",
        declared(&header).join("\n")
    );
    let mut complaints = Vec::new();
    for (name, text) in [(HEADER, header), (SYMBOLS, list)] {
        let file = project::root().join(name);
        if update {
            fs::write(&file, text).with_context(|| format!("cannot write {name}"))?;
        } else if fs::read_to_string(&file).ok().as_ref() != Some(&text) {
            complaints
                .push(format!("{name} is not what capi/src says: `cargo xtask api --update` writes it."));
        }
    }
    Ok(complaints)
}

/// The symbols that the library must export, sorted.
pub fn symbols() -> Result<Vec<String>> {
    let text = fs::read_to_string(project::root().join(SYMBOLS))
        .with_context(|| format!("cannot read {SYMBOLS}"))?;
    Ok(text.lines().filter(|line| !line.starts_with('#')).map(str::to_string).collect())
}

fn generated() -> Result<String> {
    let folder = project::root().join("capi");
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).map_err(anyhow::Error::msg)?;
    let bindings = cbindgen::Builder::new().with_config(config).with_crate(folder).generate()?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    Ok(String::from_utf8(text)?)
}

/// The functions that a header declares, sorted. A declaration begins at the start of a line.
fn declared(header: &str) -> Vec<String> {
    let name = |line: &str| {
        let (before, _) = line.split_once('(')?;
        let name = before.rsplit([' ', '*']).next()?;
        (line.starts_with(|first: char| first.is_ascii_lowercase()) && name.starts_with("drdma_"))
            .then(|| name.to_string())
    };
    let mut names: Vec<String> = header.lines().filter_map(name).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_are_found_and_comments_are_not() {
        let header = "/*\n * Like drdma_a(), but\n */\ndrdma_status drdma_b(int x,\n  int y);\nchar *drdma_a(void);\n#define X drdma_c(1)\n";
        assert_eq!(declared(header), ["drdma_a", "drdma_b"]);
    }
}
