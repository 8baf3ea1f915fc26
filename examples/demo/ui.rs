//! All output.

use std::error::Error;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::Result;
use crate::wire::Summary;

pub fn side(role: &str, size: u64, summary: &Summary) {
    let Summary { device, exporter, path, register_ms } = summary;
    let size = bytes(size);
    println!("{role:>9}  {exporter}, {size}, registered with {device} by {path} in {register_ms:.1} ms");
}

pub fn moved(operation: &str, size: u64, took: Duration) {
    let seconds = took.as_secs_f64();
    let rate = size as f64 / seconds / f64::from(1 << 20);
    println!("{operation:>9}  {} in {seconds:.1} s, {rate:.0} MiB/s", bytes(size));
}

/// Prints the digest of the bytes that a side received; fails unless it is the digest of the sent bytes.
pub fn compared(role: &str, received: u64, sent: u64) -> Result<()> {
    if received != sent {
        let message =
            format!("the {role} received bytes with digest {received:016x}, not {sent:016x} as sent");
        return Err(message.into());
    }
    println!("{:>9}  the {role} received bytes with digest {received:016x}, as sent", "");
    Ok(())
}

pub fn verified(size: u64, rounds: u32, paths: [&String; 2]) {
    let rounds = if rounds == 1 { String::new() } else { format!(", {rounds} times") };
    let [owner, mover] = paths;
    let paths = if owner == mover { owner.clone() } else { format!("{owner} and {mover}") };
    println!("{:>9}  {} written and read in place{rounds}, by path {paths}", "verified", bytes(size));
}

pub fn failure(error: &dyn Error) {
    eprintln!("{:>9}  {error}", "failed");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("{:>9}  caused by: {error}", "");
        cause = error.source();
    }
}

/// A progress bar on stderr, drawn if `shown`, even if stderr is a pipe: in a guest the pipe leads to a
/// terminal.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(shown: bool, what: &'static str, length: u64) -> Self {
        let target =
            if shown { ProgressDrawTarget::term_like(Box::new(Pipe)) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(length), target);
        let style = "{msg:>9}  {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        bar.set_message(what);
        Self(bar)
    }

    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// stderr, treated as a terminal of 80 columns.
#[derive(Debug)]
struct Pipe;

impl indicatif::TermLike for Pipe {
    fn width(&self) -> u16 {
        80
    }

    fn move_cursor_up(&self, n: usize) -> std::io::Result<()> {
        (0..n).try_for_each(|_| self.write_str("\x1b[A"))
    }

    fn move_cursor_down(&self, n: usize) -> std::io::Result<()> {
        (0..n).try_for_each(|_| self.write_str("\x1b[B"))
    }

    fn move_cursor_right(&self, n: usize) -> std::io::Result<()> {
        (0..n).try_for_each(|_| self.write_str("\x1b[C"))
    }

    fn move_cursor_left(&self, n: usize) -> std::io::Result<()> {
        (0..n).try_for_each(|_| self.write_str("\x1b[D"))
    }

    fn write_line(&self, text: &str) -> std::io::Result<()> {
        self.write_str(text)?;
        self.write_str("\n")
    }

    fn write_str(&self, text: &str) -> std::io::Result<()> {
        use std::io::Write;
        std::io::stderr().write_all(text.as_bytes())
    }

    fn clear_line(&self) -> std::io::Result<()> {
        self.write_str("\r\x1b[2K")
    }

    fn flush(&self) -> std::io::Result<()> {
        std::io::Write::flush(&mut std::io::stderr())
    }
}

pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
