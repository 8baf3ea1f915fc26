//! The one place that prints for people.
//!
//! Progress goes to stderr in cargo's own style, so that stdout stays free for
//! what a command in the guest prints and for the closing summaries.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const GREEN: &str = "\x1b[1;32m";
const YELLOW: &str = "\x1b[1;33m";
const RED: &str = "\x1b[1;31m";
const PLAIN: &str = "\x1b[0m";

/// `label` in bold at the left margin and `text` after it, on stderr.
fn line(colour: &str, label: &str, text: &str) {
    let stderr = std::io::stderr();
    let (colour, plain) = if stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        (colour, PLAIN)
    } else {
        ("", "")
    };
    // A closed stderr must not end the task.
    let _ = writeln!(stderr.lock(), "{colour}{label:>12}{plain} {text}");
}

/// Something done or known, such as `Guest  Linux 6.12, ready in 4.1 s`.
pub fn note(label: &str, text: &str) {
    line(GREEN, label, text);
}

/// Something to know that does not stop the task.
pub fn warn(text: &str) {
    line(YELLOW, "warning", text);
}

/// Why the task failed.
pub fn error(text: &str) {
    line(RED, "error", text);
}

/// A line of detail under the one before.
pub fn detail(text: &str) {
    line(PLAIN, "", text);
}

/// Something that takes long enough for a person to wonder: it says what it
/// does when it starts and how long it took when it ends.
pub struct Step(Instant);

impl Step {
    /// Announces the step.
    pub fn start(label: &str, text: &str) -> Step {
        note(label, text);
        Step(Instant::now())
    }

    /// Says that it is done.
    pub fn done(self, label: &str, text: &str) {
        note(label, &format!("{text} in {}", seconds(self.0.elapsed())));
    }
}

/// A duration as a person would say it: `0.4 s`, `12 s`, `3 min 20 s`.
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
