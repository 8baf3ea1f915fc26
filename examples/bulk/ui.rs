//! All output.

use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use crate::Result;

pub fn listening(address: SocketAddr) {
    println!("listening on {address}");
}

pub fn sent(length: u64, took: Duration) {
    let seconds = took.as_secs_f64();
    let rate = length as f64 / seconds / f64::from(1 << 20);
    println!("sent {} in {seconds:.1} s, {rate:.0} MiB/s", BinaryBytes(length));
}

/// Prints the digest of the received bytes; fails unless it is the digest of the sent bytes.
pub fn compared(length: u64, received: u64, sent: u64) -> Result<()> {
    if received != sent {
        return Err(
            format!("the received bytes have digest {received:016x}, the sent bytes {sent:016x}").into()
        );
    }
    println!("received {}, digest {received:016x}, verified", BinaryBytes(length));
    Ok(())
}

pub fn failure(error: &dyn Error) {
    eprintln!("bulk: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("caused by: {error}");
        cause = error.source();
    }
}

/// A progress bar, hidden unless stderr is a terminal.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(length: u64) -> Self {
        let style = "{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(style).expect("a valid template");
        Self(ProgressBar::new(length).with_style(style))
    }

    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
