//! The two processes of a peer. They stay, connected and stopped, from turn to turn, so that none takes processor time
//! from another.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::common::Result;

/// What a line for the benchmark begins with. The peers' libraries print others.
pub const MARK: &str = "= ";

/// One process.
struct Side {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Where its stderr goes.
    log: PathBuf,
}

impl Side {
    fn start(mut command: Command, log: PathBuf) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        let shown = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().map_err(|error| format!("cannot run {shown}: {error}"))?;
        let input = child.stdin.take().ok_or("no pipe")?;
        let output = BufReader::new(child.stdout.take().ok_or("no pipe")?);
        Ok(Self { child, input, output, log })
    }

    fn hear(&mut self) -> Result<String> {
        let mut last = VecDeque::new();
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(20)..].join("\n");
                let status = self.child.wait()?;
                let printed: String = last.into_iter().collect();
                return Err(format!("ended early with {status}:\n{printed}{tail}").into());
            }
            match line.strip_prefix(MARK) {
                Some(text) => return Ok(text.trim().to_string()),
                None => last.push_back(line),
            }
            if last.len() > 10 {
                last.pop_front();
            }
        }
    }

    fn say(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.input, "{line}")?)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // Also a stopped process, and one that would crash in its own clean-up.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both processes of a peer.
pub struct Pair {
    near: Side,
    far: Side,
}

impl Pair {
    /// Starts both, lets them connect, and stops them.
    pub fn start(near: Command, far: Command, logs: &Path) -> Result<Self> {
        let mut far = Side::start(far, logs.join("far.log"))?;
        let mut near = Side::start(near, logs.join("near.log"))?;
        let (theirs, ours) = (far.hear()?, near.hear()?);
        far.say(&ours)?;
        near.say(&theirs)?;
        far.hear()?;
        near.hear()?;
        let pair = Self { near, far };
        pair.signal(Signal::SIGSTOP)?;
        Ok(pair)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.far.signal(signal)?;
        self.near.signal(signal)
    }

    /// Lets the near side write all blocks, and returns how many seconds it says that took.
    pub fn turn(&mut self) -> Result<f64> {
        self.signal(Signal::SIGCONT)?;
        self.near.say("go")?;
        let seconds = self.near.hear()?.parse()?;
        self.signal(Signal::SIGSTOP)?;
        Ok(seconds)
    }
}
