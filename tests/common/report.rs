//! The report of a run on a real GPU, for a person to send: facts of the machine, and what its driver does.

use std::io::Write;

/// Adds a line to the report, if this run writes one.
pub fn say(line: &str) {
    println!("{line}");
    if let Some(path) = std::env::var_os("DMABUF_RDMA_REPORT") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| writeln!(file, "{line}")).expect("the report can be written");
    }
}
