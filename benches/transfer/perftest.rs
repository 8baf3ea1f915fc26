//! Runs perftest's programs and reads the figure that they print.

use std::process::{Child, Command, Stdio};

use nix::unistd::Pid;

use super::common::steps::between_posts;
use super::common::{Result, until_it_listens};
use super::party::{processor_time, spent_by};
use super::{DEPTH, FAR, FAR_ADDRESS, Kind, Load, NEAR, Outcome};

const PORT: u16 = 18515;

/// One run of a server and a client.
pub(super) fn theirs(load: Load) -> Result<Outcome> {
    let program = match load.kind {
        Kind::Write => "ib_write_bw",
        Kind::Read => "ib_read_bw",
        Kind::Send => "ib_send_bw",
        Kind::Latency => "ib_write_lat",
        Kind::Notify => "ib_send_lat",
    };
    let start = |device: &str, server: Option<&str>| -> Result<Child> {
        let mut command = Command::new(program);
        command.args(["-d", device, "-F", "-x", "1", "-m", "4096", "-p", &PORT.to_string()]);
        command.args(["-s", &load.size.to_string(), "-n", &load.times.to_string()]);
        match load.kind {
            Kind::Latency => command.args(["-I", "0"]),
            Kind::Notify => &mut command,
            // Without the peak, for which perftest would read the clock at each message.
            _ => command.args(["-N", "-t", &DEPTH.to_string()]),
        };
        command.args(server).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command.spawn().map_err(|error| format!("{program} (package perftest): {error}"))?)
    };
    let server = start(FAR, None)?;
    until_it_listens(PORT)?;
    let before = processor_time();
    let client = start(NEAR, Some(FAR_ADDRESS))?;
    let pid = Pid::from_raw(client.id() as i32);
    let instructions = match load.stepped {
        0 => 0,
        messages => between_posts(pid, messages)?,
    };
    let client = client.wait_with_output()?;
    // The time is the client's alone, since the server has not been waited for yet.
    let cpu = spent_by(before, load.times);
    let served = server.wait_with_output()?;
    let text = String::from_utf8_lossy(&client.stdout);
    if !client.status.success() || !served.status.success() {
        let errors = String::from_utf8_lossy(&client.stderr);
        return Err(
            format!("{program} ended with {} and {}: {text}{errors}", client.status, served.status).into()
        );
    }
    // The columns for bandwidth: bytes, iterations, peak, average; for latency: bytes, iterations, min, max,
    // typical, average, …
    let column = if load.kind.is_latency() { 4 } else { 3 };
    let figures = text.lines().rev().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.first()? == &load.size.to_string()).then(|| words.get(column)?.parse::<f64>().ok()).flatten()
    });
    let figure = figures.ok_or_else(|| format!("{program} printed no figure: {text}"))?;
    Ok(Outcome { figure, cpu, instructions })
}
