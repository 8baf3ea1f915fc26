//! Carrying the guest's streams to where people and programs read them.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What the guest tells about itself on its control port.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The job starts.
    Ready,
    /// The job ended with this status.
    Exit(i32),
    /// The guest could not be made ready.
    Failed(String),
    /// The control port is closed: there is no guest any more.
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

/// A copy of all that a stream carried.
pub type Captured = Arc<Mutex<Vec<u8>>>;

/// Copies a stream to one of ours as it comes, and into `copy` if there is one.
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
                // QEMU ended and took its end with it.
                Err(_) => return,
            };
            if let Some(copy) = &copy
                && let Ok(mut copy) = copy.lock()
            {
                copy.extend(&buffer[..n]);
            }
            // Somebody may have closed our output; the guest's job goes on.
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
