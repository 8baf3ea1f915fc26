//! Connects the caller's terminal to the guest.

use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;

/// Ctrl-], as in telnet: stops a guest that hangs.
const ESCAPE: u8 = 0x1d;

/// Whether stdin and stdout are a terminal.
pub fn present() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Rows and columns of the terminal.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(std::io::stdout()) {
        Ok(Winsize { ws_row, ws_col, .. }) if ws_row > 0 && ws_col > 0 => (ws_row, ws_col),
        _ => (24, 80),
    }
}

/// The terminal in raw mode. Restores the old mode when dropped.
pub struct Raw(Termios);

impl Raw {
    pub fn enter() -> rustix::io::Result<Raw> {
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Sends the typed input to the guest until the guest ends. Calls `leave` on Ctrl-].
///
/// The caller does not join the thread: it blocks in a read until the next key.
pub fn input(mut to: UnixStream, leave: impl Fn() + Send + 'static) {
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stdin.read(&mut buffer) {
            if buffer[..n].contains(&ESCAPE) {
                return leave();
            }
            if to.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    });
}
