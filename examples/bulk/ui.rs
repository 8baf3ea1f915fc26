//! Everything that bulk shows to people.

use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use crate::Result;

pub fn listening(address: SocketAddr) {
    println!("listening on {address}");
}

pub fn sent(length: u64, took: Duration) {
    let rate = length as f64 / took.as_secs_f64() / f64::from(1 << 20);
    println!("sent {} in {:.1} s, {rate:.0} MiB/s", BinaryBytes(length), took.as_secs_f64());
}

/// Shows that what came is what was sent; an error unless it is.
pub fn compared(length: u64, seen: u64, sent: u64) -> Result<()> {
    if seen != sent {
        return Err(format!("digest {seen:016x}, but {sent:016x} was sent").into());
    }
    println!("received {}, digest {seen:016x}, verified", BinaryBytes(length));
    Ok(())
}

pub fn failure(error: &dyn Error) {
    eprintln!("bulk: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("because: {error}");
        cause = error.source();
    }
}

/// A progress bar; nothing where nobody looks at a terminal.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(length: u64) -> Self {
        let style = "{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
        Self(
            ProgressBar::new(length)
                .with_style(ProgressStyle::with_template(style).expect("a valid template")),
        )
    }

    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
