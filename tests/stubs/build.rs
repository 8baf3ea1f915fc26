//! Compiles the stub libraries, each also as an old version that does not export dma-bufs.

use std::path::Path;
use std::process::Command;

fn main() {
    let out = std::env::var("OUT_DIR").expect("set by cargo");
    let compiler = cc::Build::new().opt_level(1).warnings_into_errors(true).get_compiler();
    for header in ["stub.h", "cuda_mapped.h", "cuda_kinds.h"] {
        println!("cargo::rerun-if-changed={header}");
    }
    for (source, name) in [
        ("cuda.c", "libcuda.so.1"),
        ("hsa.c", "libhsa-runtime64.so.1"),
        ("level_zero.c", "libze_loader.so.1"),
    ] {
        println!("cargo::rerun-if-changed={source}");
        for (folder, old) in [("now", false), ("old", true)] {
            let folder = Path::new(&out).join(folder);
            std::fs::create_dir_all(&folder).expect("a folder in OUT_DIR");
            let mut command: Command = compiler.to_command();
            command.args(["-shared", "-fPIC", "-Wno-unused-function"]);
            command.arg(format!("-Wl,-soname,{name}"));
            if old {
                command.arg("-DOLD");
            }
            let status = command.arg(source).arg("-o").arg(folder.join(name)).status();
            assert!(status.expect("the C compiler").success(), "{source} does not compile");
        }
    }
}
