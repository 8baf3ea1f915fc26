//! The programs of `cli/` and `examples/` across the wire, started as a user does.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::system::{example, modprobe, program, run};
use crate::common::wire::FAR;
use crate::common::{assert_same, pattern};

/// Starts a program and waits until it prints where it listens.
fn listening(command: &mut Command) -> (std::process::Child, BufReader<std::process::ChildStdout>) {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("an example");
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert!(line.starts_with("listening on "), "{line}");
    (child, output)
}

/// A copy that was interrupted after two blocks, and whose file then changed, and goes on where it stopped.
#[test]
fn copy_sends_a_file_and_goes_on() {
    let census = Census::take();
    let folder = std::env::temp_dir();
    let (from, to, part) = ["original", "copy", "copy.part"].map(|name| folder.join(name)).into();
    // Not a multiple of the page size, the block or the message size.
    let bytes = pattern((3 << 20) + 1234, 9);
    std::fs::write(&from, &bytes).unwrap();
    let copy = || {
        let (mut receiver, output) =
            listening(Command::new(program()).args(["copy", "receive", "--listen", FAR, "--to"]).arg(&to));
        let words = ["copy", "send", "--connect", FAR, "--exporter", "udmabuf", "--block", "1M", "--file"];
        let words: Vec<_> = words.into_iter().chain([from.to_str().unwrap()]).collect();
        let sent = run(program().to_str().unwrap(), &words);
        let printed: Vec<_> = output.lines().map_while(Result::ok).collect();
        assert!(receiver.wait().unwrap().success());
        assert!(printed.iter().any(|line| line.ends_with("verified")), "{printed:?}");
        assert_same(&std::fs::read(&to).unwrap(), &bytes, "the copy");
        assert!(!part.exists());
        sent
    };
    let sent = copy();
    assert!(sent.contains("sent  3.00 MiB in ") && !sent.contains("resumed"), "{sent}");
    std::fs::write(&part, &bytes[..(2 << 20) + 7]).unwrap();
    let sent = copy();
    assert!(sent.contains("resumed  the receiver has 2.00 MiB already"), "{sent}");
    assert!(sent.contains("sent  1.00 MiB in "), "{sent}");
    let mut other = bytes.clone();
    other[5] ^= 1;
    std::fs::write(&part, &other[..2 << 20]).unwrap();
    let sent = copy();
    assert!(sent.contains("sent  3.00 MiB in ") && !sent.contains("resumed"), "{sent}");
    std::fs::remove_file(from).unwrap();
    std::fs::remove_file(to).unwrap();
    census.assert_unchanged();
}

#[test]
fn ping_goes_to_and_fro() {
    let program = program();
    let words = ["ping", "--listen", FAR, "--count", "20"];
    let (mut waiting, _output) = listening(Command::new(&program).args(words));
    let printed = run(program.to_str().unwrap(), &["ping", "--connect", FAR, "--count", "20"]);
    assert!(printed.starts_with("one way: median "), "{printed}");
    assert!(waiting.wait().unwrap().success());
}

/// A served buffer, which one client writes, another reads, and a third measures.
#[test]
fn serve_lends_a_buffer() {
    let census = Census::take();
    let (program, folder) = (program(), std::env::temp_dir());
    let name = program.to_str().unwrap();
    let words = ["serve", "--listen", FAR, "--exporter", "udmabuf", "--size", "1M", "--clients", "4"];
    let (mut server, output) = listening(Command::new(&program).args(words));
    let (from, to, json, svg) = ["from", "to", "rows.json", "rates.svg"].map(|file| folder.join(file)).into();
    let bytes = pattern(12_345, 3);
    std::fs::write(&from, &bytes).unwrap();
    let at = ["--connect", FAR, "--offset", "7"];
    let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    run(name, &[&["write"], at.as_slice(), &["--from", &path(&from)]].concat());
    run(name, &[&["read"], at.as_slice(), &["--length", "12345", "--to", &path(&to)]].concat());
    assert_same(&std::fs::read(&to).unwrap(), &bytes, "what was read");
    let past = Command::new(&program).args(["read", "--connect", FAR, "--offset", "2M"]).output().unwrap();
    let errors = String::from_utf8_lossy(&past.stderr);
    assert!(!past.status.success() && errors.contains("the served buffer has 1048576 bytes"), "{errors}");

    let words = ["bench", "--connect", FAR, "--block", "4K,64K", "--batch", "1,8,1000", "--seconds", "0.1"];
    let files = ["--json", &path(&json), "--svg", &path(&svg)].map(str::to_owned);
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let printed = run(name, &[words.as_slice(), &files].concat());
    assert_eq!(printed.lines().filter(|line| line.ends_with("  verified")).count(), 8, "{printed}");
    assert!(server.wait().unwrap().success());
    drop(output);
    let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 8);
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap();
        assert!(number("mib_per_second") > 0.0 && number("median") > 1.0 && row["verified"] == true, "{row}");
        assert!(number("median") <= number("p99") && number("p99") <= number("maximum"), "{row}");
    }
    assert_eq!(std::fs::read_to_string(&svg).unwrap().matches("<polyline").count(), 4);
    [from, to, json, svg].iter().for_each(|file| std::fs::remove_file(file).unwrap());
    census.assert_unchanged();
}

/// Every kind of memory at either end, also memory of stub GPUs.
#[test]
fn bench_takes_any_memory() {
    let census = Census::take();
    let program = program();
    for (near, far) in [("host", "cuda"), ("cuda", "heap"), ("udmabuf", "hsa:1"), ("level-zero", "host")] {
        let mut command = Command::new(&program);
        command.args(["bench", "--device", "rxe0", "--peer-device", "rxe1", "--block", "4K", "--batch", "4"]);
        command.args(["--depth", "3", "--seconds", "0.05", "--exporter", near, "--peer-exporter", far]);
        let libraries = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        command.env("LD_LIBRARY_PATH", format!("{}:{libraries}", gpu_stubs::FOLDER));
        let output = command.output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(printed.matches("  verified").count(), 2, "{near} {far}: {printed}{errors}");
    }
    census.assert_unchanged();
}

/// The addresses of a dma-buf of another process, which is this one.
#[test]
fn explain_looks_into_another_process() {
    modprobe("dma_sg");
    let buffer = heap(2 << 20);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&buffer)).to_string();
    let pid = std::process::id().to_string();
    let printed = run(program().to_str().unwrap(), &["explain", "--pid", &pid, "--fd", &fd]);
    let expected = format!("buffer  system, descriptor {fd} of process {pid}, 2 MiB");
    assert!(printed.contains(&expected) && printed.contains("segments"), "{printed}");
    let wrong = Command::new(program()).args(["explain", "--pid", &pid, "--fd", "0"]).output().unwrap();
    let errors = String::from_utf8_lossy(&wrong.stderr);
    assert!(!wrong.status.success() && errors.contains("is not a dma-buf"), "{errors}");
}

/// Two ranks of an MPI program exchange endpoints over MPI, and the contents of their buffers over a
/// connection.
#[test]
fn mpi_ranks_exchange_buffers() {
    let census = Census::take();
    let program = example("mpi");
    let words = [
        "--allow-run-as-root",
        "--oversubscribe",
        "--mca",
        "btl",
        "self,vader",
        "--mca",
        "pml",
        "ob1",
        "-n",
        "2",
    ];
    let printed = run("mpirun", &words.into_iter().chain([program.to_str().unwrap()]).collect::<Vec<_>>());
    for line in [
        "rank 0 on rxe0: 16 MiB to and from rank 1, verified",
        "rank 1 on rxe1: 16 MiB to and from rank 0, verified",
    ] {
        assert!(printed.lines().any(|printed| printed == line), "{printed}");
    }
    census.assert_unchanged();
}

#[test]
fn kv_cache_pushes_layer_by_layer() {
    let census = Census::take();
    let program = example("kv_cache");
    let size = ["--layers", "3", "--pages", "300", "--page-size", "4096"];
    let (mut decode, output) = listening(Command::new(&program).args(["decode", "--listen", FAR]).args(size));
    let words = ["prefill", "--connect", FAR].into_iter().chain(size);
    let printed = run(program.to_str().unwrap(), &words.collect::<Vec<_>>());
    assert!(printed.starts_with("pushed 3 layers of 300 pages in "), "{printed}");
    assert!(printed.contains("verified: ") && printed.contains(" blocks/s, "), "{printed}");
    let lines: Vec<_> = output.lines().map_while(Result::ok).collect();
    assert_eq!(lines, ["received 3 layers of 300 pages, verified"]);
    assert!(decode.wait().unwrap().success());
    census.assert_unchanged();
}

/// Eight clients at once, and then one that cancels, one that is killed, and one that says nothing.
#[test]
fn the_service_survives_its_clients() {
    let census = Census::take();
    let program = example("service");
    // The checks of a debug kernel hold a client up for seconds.
    let patience = if run("uname", &["-r"]).trim().ends_with("-debug") { "30" } else { "2" };
    let serve = ["serve", "--listen", FAR, "--size", "4M", "--patience", patience, "--clients", "12"];
    let (mut server, output) = listening(Command::new(&program).args(serve));
    let fetch = |words: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["fetch", "--connect", FAR]).args(words).stdout(Stdio::piped());
        command.spawn().expect("an example")
    };
    let clients: Vec<_> = (0..8).map(|_| fetch(&[])).collect();
    for client in clients {
        let output = client.wait_with_output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.ends_with("verified\n"), "{printed}");
    }
    assert!(fetch(&["--then", "cancel"]).wait().unwrap().success());
    let (mut silent, mut killed) = (fetch(&["--then", "silent"]), fetch(&["--then", "silent"]));
    let mut line = String::new();
    BufReader::new(killed.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "silent\n");
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(fetch(&[]).wait().unwrap().success());
    let lines: Vec<_> = output.lines().map_while(Result::ok).collect();
    assert!(server.wait().unwrap().success(), "{lines:?}");
    silent.kill().unwrap();
    silent.wait().unwrap();
    drop((silent, killed));
    let count = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
    assert_eq!((count("has verified all bytes"), count("is gone: ")), (9, 3), "{lines:?}");
    assert_eq!(count(&format!("it was silent for {patience}s")), 1, "{lines:?}");
    assert_eq!(count("the peer disconnected"), 2, "{lines:?}");
    census.assert_unchanged();
}
