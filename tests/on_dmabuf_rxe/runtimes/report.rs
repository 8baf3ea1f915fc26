//! The run on a real GPU, with the stubs in place of its driver: the cases, and the report that a person sends.

use std::process::Command;

#[test]
fn the_cases_for_real_drivers_pass_on_the_stubs() {
    let report = std::env::temp_dir().join(format!("dmabuf-rdma-report-{}", std::process::id()));
    let mut libraries = std::ffi::OsString::from(gpu_stubs::FOLDER);
    if let Some(others) = std::env::var_os("LD_LIBRARY_PATH") {
        libraries.push(":");
        libraries.push(others);
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["on_gpu::", "--test-threads=1", "--nocapture"]);
    command.env("LD_LIBRARY_PATH", libraries).env("DMABUF_RDMA_REPORT", &report);
    let output = command.output().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{errors}");
    let text = std::fs::read_to_string(&report).unwrap();
    std::fs::remove_file(&report).unwrap();
    let page = format!("machine: page size: {}", dma_sg::page_size());
    for line in [
        page.as_str(),
        "machine: runtime: CUDA",
        "machine: runtime: ROCm",
        "machine: runtime: Level Zero",
        "machine: GPU 0: Stub GPU 0, 0000:3b:00.0, driver API 12080",
        "machine: GPU 1: attribute 116, GPU_DIRECT_RDMA_SUPPORTED: 1",
        "machine: GPU 1: attribute 124, DMA_BUF_SUPPORTED: 1",
        "note: CUDA: 1000 bytes were exported as a dma-buf of 4096 bytes",
        "note: ROCm: 1000 bytes were exported as a dma-buf of 8388608 bytes",
        "note: CUDA: a second export is another dma-buf",
        "note: Level Zero: a second export is the same dma-buf",
        "note: GPU 0: a range across 3 mappings: 1 dma-bufs",
        "note: GPU 1: all 3 mappings as one dma-buf: true",
        "note: GPU 0: BUFFER_ID changes when memory is mapped anew: false",
    ] {
        assert!(text.lines().any(|said| said == line), "{line:?} is missing in\n{text}");
    }
    assert!(text.starts_with("machine: kernel: "), "{text}");
}
