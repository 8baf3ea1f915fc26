//! What the commands print for people. Colours and bars only on a terminal; `NO_COLOR` is respected.

use std::error::Error;
use std::fmt::Display;
use std::io::IsTerminal;
use std::time::Duration;

use anstream::{eprintln, println};
use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub const GOOD: Style = AnsiColor::Green.on_default();
pub const BAD: Style = AnsiColor::Red.on_default();
pub const FAIR: Style = AnsiColor::Yellow.on_default();
pub const DIM: Style = Style::new().dimmed();
pub const STRONG: Style = Style::new().bold();

/// A line with a word in front that says what it is.
pub fn row(what: &str, text: impl Display) {
    println!("{STRONG}{what:>10}{STRONG:#}  {text}");
}

/// A line of a table, or any other text.
pub fn line(text: impl Display) {
    println!("{text}");
}

/// Where a command waits for its peer. Nothing else precedes the address, for programs that read it.
pub fn listening(address: impl Display) {
    println!("{LISTENING}{address}");
}

pub const LISTENING: &str = "listening on ";

/// An error with its causes.
pub fn failure(error: &dyn Error) {
    eprintln!("{BAD}{:>10}{BAD:#}  {error}", "failed");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("{:>10}  caused by: {error}", "");
        cause = error.source();
    }
}

pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Bytes with the time that they took.
pub fn rate(length: u64, took: Duration) -> String {
    let seconds = took.as_secs_f64();
    let rate = length as f64 / seconds / f64::from(1 << 20);
    format!("{} in {seconds:.1} s, {rate:.0} MiB/s", bytes(length))
}

/// A progress bar on stderr.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar that is drawn only on a terminal.
    pub fn new(what: &'static str, length: u64) -> Self {
        Self::shown(std::io::stderr().is_terminal(), what, length)
    }

    /// A bar that is drawn if `shown`, even if stderr is a pipe: in a guest the pipe leads to a terminal.
    pub fn shown(shown: bool, what: &'static str, length: u64) -> Self {
        let target = match (shown, std::io::stderr().is_terminal()) {
            (false, _) => ProgressDrawTarget::hidden(),
            (true, true) => ProgressDrawTarget::stderr(),
            (true, false) => ProgressDrawTarget::term_like(Box::new(Pipe)),
        };
        let bar = ProgressBar::with_draw_target(Some(length), target);
        let style = "{msg:>10}  {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
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
