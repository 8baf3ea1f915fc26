//! Reads the guest's control port and copies its output streams.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A message of the guest on its control port.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The job starts.
    Ready,
    /// The job ended with this status.
    Exit(i32),
    /// The guest's init failed.
    Failed(String),
    /// The control port is closed: the guest has ended.
    Gone,
}

impl Event {
    fn parse(line: &str) -> Option<Event> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "ready" => Some(Event::Ready),
            "exit" => Some(Event::Exit(rest.trim().parse().ok()?)),
            "failed" => Some(Event::Failed(rest.to_string())),
            _ => None,
        }
    }
}

/// Reads events until the port closes.
pub fn control(stream: UnixStream, events: Sender<Event>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stream));
        while let Some(Ok(line)) = lines.next() {
            if let Some(event) = Event::parse(line.trim_end())
                && events.send(event).is_err()
            {
                return;
            }
        }
        let _ = events.send(Event::Gone);
    })
}

/// A copy of all data of a stream.
pub type Captured = Arc<Mutex<Vec<u8>>>;

/// Copies a stream to `to`, and also to `copy` if given.
pub fn output<W: Write + Send + 'static>(
    mut from: UnixStream,
    mut to: W,
    copy: Option<Captured>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => n,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // QEMU has ended and closed its end.
                Err(_) => return,
            };
            if let Some(copy) = &copy
                && let Ok(mut copy) = copy.lock()
            {
                copy.extend(&buffer[..n]);
            }
            // Ignore a closed output: the guest's job goes on.
            let _ = to.write_all(&buffer[..n]).and_then(|()| to.flush());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_parse() {
        assert_eq!(Event::parse("ready"), Some(Event::Ready));
        assert_eq!(Event::parse("exit 137"), Some(Event::Exit(137)));
        assert_eq!(Event::parse("failed no rxe0"), Some(Event::Failed("no rxe0".into())));
        assert_eq!(Event::parse("hello"), None);
    }
}
