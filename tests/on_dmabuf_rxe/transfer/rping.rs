//! The example rping and the rping of rdmacm-utils, in every pairing, across the wire.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dmabuf_rdma::cm::Outgoing;
use dmabuf_rdma::transfer::{ConnectionOptions, Error, RequestError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::leaks;
use crate::common::system::{example, run};
use crate::common::wire::End;

/// The two programs.
#[derive(Clone, Copy, PartialEq)]
enum Rping {
    Ours,
    Theirs,
}

use Rping::{Ours, Theirs};

const V4: &str = crate::common::wire::FAR;
const V6: &str = "fd77::2";

impl Rping {
    fn command(self, words: &str) -> Command {
        let program = match self {
            Ours => example("rping"),
            Theirs => "/usr/bin/rping".into(),
        };
        assert!(Path::new(&program).exists(), "{}: cargo xtask installs and builds it", program.display());
        let mut command = Command::new(program);
        command.args(words.split(' ')).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a server and waits until it listens: the kernel repeats an earlier request only after seconds.
    fn serve(self, words: &str, address: &str) -> Running {
        let mut server = self.command(&format!("-s -a {address} {words}")).spawn().expect("rping");
        let end = Instant::now() + Duration::from_secs(20);
        while !run("rdma", &["resource", "show", "cm_id"])
            .lines()
            .any(|line| line.contains("state LISTEN") && line.contains(":7174"))
        {
            assert!(server.try_wait().unwrap().is_none(), "the server ended before it listened");
            assert!(Instant::now() < end, "the server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Running::new(server)
    }

    fn client(self, words: &str, address: &str) -> Running {
        Running::new(self.start_client(words, address))
    }

    fn start_client(self, words: &str, address: &str) -> Child {
        self.command(&format!("-c -a {address} {words}")).spawn().expect("rping")
    }
}

/// A running program, which does not outlive the test. A thread reads its output, which may be more than a pipe
/// holds.
struct Running {
    pid: Pid,
    /// `None` once it was waited for.
    reader: Option<JoinHandle<std::io::Result<Output>>>,
    done: Receiver<()>,
}

impl Running {
    fn new(child: Child) -> Self {
        let pid = Pid::from_raw(child.id() as i32);
        let (tell, done) = channel();
        let reader = std::thread::spawn(move || {
            let output = child.wait_with_output();
            let _ = tell.send(());
            output
        });
        Self { pid, reader: Some(reader), done }
    }

    /// Waits until it ends.
    fn output(&mut self) -> Output {
        self.reader.take().expect("waited for once").join().unwrap().unwrap()
    }

    fn runs(&self) -> bool {
        self.done.try_recv() == Err(TryRecvError::Empty)
    }

    /// Waits until it ends with success, and returns its output.
    #[track_caller]
    fn ended(mut self, what: &str) -> String {
        let hangs = self.done.recv_timeout(Duration::from_secs(60)).is_err();
        if hangs {
            kill(self.pid, Signal::SIGKILL).unwrap();
        }
        let output = self.output();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!hangs, "{what} hangs: {errors}");
        assert!(output.status.success(), "{what}: {}: {errors}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[track_caller]
    fn succeeds(self, what: &str) {
        self.ended(what);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.reader.is_some() {
            // It may have ended meanwhile; its number stays its own until the thread has waited for it.
            if self.runs() {
                let _ = kill(self.pid, Signal::SIGKILL);
            }
            self.output();
        }
    }
}

/// The data of a round, without the NUL.
fn data(round: usize, size: usize) -> String {
    let letters = (b'A'..=b'z').cycle().skip(round).map(char::from);
    let mut text = format!("rdma-ping-{round}: ");
    text.extend(letters.take(size - 1 - text.len()));
    text
}

fn once(server: Rping, client: Rping, size: usize, exporter: &str, address: &str) {
    let what = format!("{size} bytes to {address}");
    let ours = |who| if who == Ours { format!(" --exporter {exporter}") } else { String::new() };
    // The server of rdmacm-utils refuses more bytes than its own option says.
    let server_size = if server == Theirs { " -S 65535" } else { "" };
    let serving = server.serve(&format!("-v{server_size}{}", ours(server)), address);
    let words = format!("-v -V -C 3 -S {size}{}", ours(client));
    let seen = client.client(&words, address).ended(&format!("client, {what}"));
    let served = serving.ended(&format!("server, {what}"));
    for round in 0..3 {
        let text = data(round, size);
        // Without the texts: they would be megabytes.
        assert!(seen.lines().any(|line| line == format!("ping data: {text}")), "client, {what}, {round}");
        let line = format!("server ping data: {text}");
        // The server of rdmacm-utils prints up to the first NUL of its buffer, which may follow older text.
        assert!(served.lines().any(|seen| seen.starts_with(&line)), "server, {what}, {round}");
    }
}

#[test]
fn our_server_answers_their_client() {
    let census = Census::take();
    // The client of rdmacm-utils refuses less than 23 bytes.
    for (size, exporter, address) in
        [(23, "heap", V4), (64, "udmabuf", V6), (1000, "udmabuf:thp", V4), (65535, "heap", V6)]
    {
        once(Ours, Theirs, size, exporter, address);
    }
    census.assert_unchanged();
}

#[test]
fn our_client_asks_their_server() {
    let census = Census::take();
    for (size, exporter, address) in
        [(16, "heap", V4), (23, "udmabuf", V6), (4096, "heap", V6), (65535, "udmabuf", V4)]
    {
        once(Theirs, Ours, size, exporter, address);
    }
    census.assert_unchanged();
}

/// A side with notifications has a second queue pair for messages, and a program of another library has none.
#[test]
fn messages_beside_notifications_need_a_peer_of_this_library() {
    let server = Theirs.serve("-C 1", V4);
    let mut near = End::new("rxe0", ConnectionOptions::default().notifications(4));
    let timeout = Duration::from_secs(20);
    let at = format!("{V4}:7174").parse().unwrap();
    let outgoing = Outgoing::resolve(at, None, timeout).unwrap();
    outgoing.connect(&mut near.connection, &[], timeout).unwrap();
    let (_ours, region) = near.filled(4096, 1);
    assert_refused!(near.connection.send(&region), Error::Request(RequestError::NoMessages));
    assert_refused!(near.connection.recv(&region), Error::Request(RequestError::NoMessages));
    assert!(near.connection.is_usable());
    drop(server);
}

#[test]
fn our_client_asks_our_server() {
    for (size, address) in [(16, V6), (65535, V4)] {
        once(Ours, Ours, size, "heap", address);
    }
}

/// With -P, a server has many clients of both programs: ours all at once. The server of rdmacm-utils keeps a
/// connection request in one variable, where the next one overwrites it (`cb->child_cm_id`), so its clients wait for
/// each other.
#[test]
fn persistent_servers_have_many_clients() {
    for server in [Ours, Theirs] {
        let serving = server.serve("-P -S 65535", V4);
        let clients = [(Ours, 16), (Theirs, 23), (Ours, 65535), (Theirs, 4000)];
        let start = |(who, size): (Rping, usize)| who.client(&format!("-V -C 5 -S {size}"), V4);
        match server {
            Ours => clients.map(start).into_iter().for_each(|client| client.succeeds("one of four clients")),
            Theirs => clients.into_iter().for_each(|client| start(client).succeeds("the only client")),
        }
        Ours.client("-V -C 2", V4).ended("a later client");
        assert!(serving.runs(), "the server still runs");
    }
}

#[test]
fn a_client_without_a_server_says_so() {
    let output = Ours.command(&format!("-c -a {V4} -p 9999 -C 1")).output().unwrap();
    assert!(!output.status.success());
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(printed.contains("rejected the connection: no program listens at that port"), "{printed}");
}

/// The server notices that the client process was killed, also while it only waits.
#[test]
fn a_killed_client_ends_its_server() {
    use std::io::{BufRead, BufReader};
    let census = Census::take();
    for size in [16, 60000] {
        let server = Ours.serve("-C 0", V4);
        let mut client = Ours.start_client(&format!("-v -S {size}"), V4);
        let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
        lines.next().expect("a ping").unwrap();
        // Reads on, or the client would block on a full pipe.
        let reader = std::thread::spawn(move || lines.for_each(drop));
        std::thread::sleep(Duration::from_millis(size % 100));
        client.kill().unwrap();
        client.wait().unwrap();
        reader.join().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while server.runs() {
            assert!(Instant::now() < end, "the server still waits for a client that is gone");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    census.assert_unchanged();
    leaks::assert_none();
}
