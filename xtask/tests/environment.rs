//! The program itself in environments that its unit tests cannot have.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

fn xtask(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(words);
    command
}

/// A folder for one test.
fn folder(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Compilers and flags for other work reach no build.
#[test]
fn variables_of_other_builds_are_not_passed_on() {
    let folder = folder("variables");
    let cargo = folder.join("cargo");
    fs::write(&cargo, "#!/bin/sh\nenv >\"$0.env\"\nexit 1\n").unwrap();
    fs::set_permissions(&cargo, Permissions::from_mode(0o755)).unwrap();
    let others =
        [("CC", "false"), ("ARCH", "arm64"), ("CROSS_COMPILE", "x-"), ("MAKEFLAGS", "-n"), ("O", "/x")];
    let output = xtask(&["ui"]).env("CARGO", &cargo).env("KEPT", "yes").envs(others).output().unwrap();
    assert!(!output.status.success());
    let environment = fs::read_to_string(folder.join("cargo.env")).unwrap();
    assert!(environment.lines().any(|line| line == "KEPT=yes"), "{environment}");
    for (name, value) in others {
        assert!(!environment.lines().any(|line| line == format!("{name}={value}")), "{name}");
    }
}

#[test]
fn bytes_that_are_no_text_end_in_no_panic() {
    let odd = OsString::from_vec(vec![b'a', 0xff]);
    let output = xtask(&["bench"]).env(&odd, &odd).env("LC_ALL", &odd).output().unwrap();
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("register"));
    let odd_mirror = xtask(&["bench"]).env("DMABUF_RDMA_MIRROR", &odd).output().unwrap();
    let odd_command = xtask(&["vm", "--"]).arg(&odd).output().unwrap();
    for output in [odd_mirror, odd_command] {
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("invalid UTF-8"), "{}", stderr(&output));
    }
}

/// A mirror of choice is asked through the proxy that the environment names, and a start after one that failed is not
/// blocked by what that left.
#[test]
fn the_kernel_comes_through_the_proxy_of_the_environment() {
    let target = folder("proxy");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    let requests = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let first = lines.next().unwrap_or_default();
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            if first == "stop" {
                return requests;
            }
            let _ =
                stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            requests.push(first);
        }
        requests
    });
    // A machine without the packages stops earlier: they come first.
    let run = || {
        let mut command =
            xtask(&["vm", "--rxe", "stock", "--mirror", "http://mirror.invalid/debian", "--", "true"]);
        command.env("CARGO_TARGET_DIR", &target).env("http_proxy", &proxy).env_remove("no_proxy");
        command.output().unwrap()
    };
    let first = run();
    fs::create_dir_all(target.join("kernel/linux-6.12.partial")).unwrap();
    for output in [first, run()] {
        let message = stderr(&output);
        assert!(!output.status.success());
        assert!(
            message.contains("apt cannot fetch Debian's package lists; check the network, http_proxy"),
            "{message}"
        );
    }
    let address = proxy.trim_start_matches("http://");
    TcpStream::connect(address).unwrap().write_all(b"stop\n\n").unwrap();
    let requests = requests.join().unwrap();
    assert!(requests.len() >= 2, "{requests:?}");
    assert!(requests.iter().all(|line| line.starts_with("GET http://mirror.invalid/debian")), "{requests:?}");
}
