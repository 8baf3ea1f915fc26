//! All output.

use std::error::Error;

pub fn data(what: &str, bytes: &[u8]) {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    println!("{what} data: {}", String::from_utf8_lossy(&bytes[..end]));
}

pub fn failure(error: &dyn Error) {
    eprintln!("rping: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("caused by: {error}");
        cause = error.source();
    }
}
