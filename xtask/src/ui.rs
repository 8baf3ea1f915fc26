//! Prints all messages for people.
//!
//! Progress goes to stderr in cargo's style, so stdout has only the output of
//! commands in the guest and the final summaries.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const GREEN: &str = "\x1b[1;32m";
const YELLOW: &str = "\x1b[1;33m";
const RED: &str = "\x1b[1;31m";
const PLAIN: &str = "\x1b[0m";

/// Prints a bold `label` and `text` on stderr.
fn line(colour: &str, label: &str, text: &str) {
    let stderr = std::io::stderr();
    let (colour, plain) = if stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        (colour, PLAIN)
    } else {
        ("", "")
    };
    // Ignore a closed stderr: the task goes on.
    let _ = writeln!(stderr.lock(), "{colour}{label:>12}{plain} {text}");
}

/// Prints progress, such as `Guest  Linux 6.12, ready in 4.1 s`.
pub fn note(label: &str, text: &str) {
    line(GREEN, label, text);
}

/// Prints a problem that does not stop the task.
pub fn warn(text: &str) {
    line(YELLOW, "warning", text);
}

/// Prints why the task failed.
pub fn error(text: &str) {
    line(RED, "error", text);
}

/// Prints a line of detail below the previous message.
pub fn detail(text: &str) {
    line(PLAIN, "", text);
}

/// A long step: prints a line when it starts, and its duration when it ends.
pub struct Step(Instant);

impl Step {
    /// Prints that the step starts.
    pub fn start(label: &str, text: &str) -> Step {
        note(label, text);
        Step(Instant::now())
    }

    /// Prints that the step is done.
    pub fn done(self, label: &str, text: &str) {
        note(label, &format!("{text} in {}", seconds(self.0.elapsed())));
    }
}

/// A readable duration: `0.4 s`, `12 s`, `3 min 20 s`.
pub fn seconds(duration: Duration) -> String {
    let s = duration.as_secs_f64();
    if s < 10.0 {
        format!("{s:.1} s")
    } else if s < 120.0 {
        format!("{s:.0} s")
    } else {
        format!("{} min {} s", s as u64 / 60, s as u64 % 60)
    }
}
