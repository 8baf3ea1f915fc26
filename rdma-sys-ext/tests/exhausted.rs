//! Loads libraries in a process without a free file descriptor. The only test of its program, because it
//! lowers the limit of the process.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use rdma_sys_ext::rdma_cm::rdma_create_id;
use rdma_sys_ext::symbols::{SymbolError, mlx5dv_reg_dmabuf_mr};

const STUB: &str = "int rdma_create_id(void) { return 0; }\nint mlx5dv_reg_dmabuf_mr(void) { return 0; }\n";
const MAP: &str = "RDMACM_1.0 { global: rdma_create_id; };\nMLX5_1.25 { global: mlx5dv_reg_dmabuf_mr; };\n";

/// The test runs again in a process that finds stub libraries in place of the machine's, if it has any.
#[test]
fn a_load_without_descriptors_says_so_and_is_not_remembered() {
    if std::env::var_os("EXHAUSTED_CHILD").is_some() {
        return exhausted();
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("exhausted");
    std::fs::create_dir_all(&folder).unwrap();
    compile(&folder);
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child
        .arg("--nocapture")
        .env("LD_LIBRARY_PATH", &folder)
        .env("EXHAUSTED_CHILD", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn compile(folder: &Path) {
    let (source, map) = (folder.join("stub.c"), folder.join("stub.map"));
    std::fs::write(&source, STUB).unwrap();
    std::fs::write(&map, MAP).unwrap();
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let compiler = cc::Build::new().host(&host).target(&host).opt_level(0).get_compiler();
    for library in ["librdmacm.so.1", "libmlx5.so.1"] {
        let mut command = compiler.to_command();
        command.args(["-shared", "-fPIC"]).arg(format!("-Wl,-soname,{library}"));
        command.arg(format!("-Wl,--version-script={}", map.display()));
        let status = command.arg("-o").arg(folder.join(library)).arg(&source).status();
        assert!(status.expect("the C compiler starts").success());
    }
}

fn exhausted() {
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: reads one struct.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    let all: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    let errors = [
        rdma_create_id().err(),
        mlx5dv_reg_dmabuf_mr().err(),
        // Once more: nothing is remembered, and nothing is taken for absent.
        rdma_create_id().err(),
        mlx5dv_reg_dmabuf_mr().err(),
    ];
    drop(all);
    for error in errors {
        match error {
            Some(SymbolError::NotLoaded { errno: Some(libc::EMFILE), .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    rdma_create_id().unwrap();
    mlx5dv_reg_dmabuf_mr().unwrap();
}
