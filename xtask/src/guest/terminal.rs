//! The caller's terminal as the guest's terminal.

use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;

/// Ctrl-], as telnet has it: the way out of a guest that answers nothing.
const ESCAPE: u8 = 0x1d;

/// Whether somebody sits in front of this program.
pub fn present() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Rows and columns.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(std::io::stdout()) {
        Ok(Winsize { ws_row, ws_col, .. }) if ws_row > 0 && ws_col > 0 => (ws_row, ws_col),
        _ => (24, 80),
    }
}

/// The terminal in raw mode, put back when dropped.
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

/// Sends what is typed to the guest until it ends; calls `leave` on Ctrl-].
///
/// The thread is not waited for: it sits in a read that only a key ends.
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
