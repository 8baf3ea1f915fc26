//! The programs that measure themselves: perftest and UCX's. They move one buffer of a block's size again and again,
//! so they have no lists and no cache misses of their own.

use std::process::{Child, Command, Stdio};

use super::common::{Result, until_it_listens};
use super::layout::Load;
use super::{FAR, FAR_ADDRESS, MIB, NEAR, WINDOW};

const PORT: u16 = 18515;

/// Most messages of a run: the rate is steady long before.
pub const MOST: u64 = 16384;

/// Messages a second of `ib_write_bw`.
pub fn perftest(load: Load) -> Result<f64> {
    let start = |device: &str, server: Option<&str>| {
        let mut command = Command::new("ib_write_bw");
        command.args(["-d", device, "-F", "-x", "1", "-m", "4096", "-N", "-p", &PORT.to_string()]);
        command.args(["-s", &load.size.to_string(), "-n", &load.count.min(MOST).to_string()]);
        command.args(["-t", &WINDOW.to_string()]).args(server);
        spawn(command, "perftest")
    };
    // Bytes, iterations, peak, average in MiB/s.
    let bandwidth = |text: &str| {
        text.lines().rev().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words.first()? == &load.size.to_string()).then(|| words.get(3)?.parse::<f64>().ok()).flatten()
        })
    };
    let mib = figure(start(FAR, None)?, || start(NEAR, Some(FAR_ADDRESS)), bandwidth)?;
    Ok(mib * MIB as f64 / load.size as f64)
}

/// Messages a second of `ucx_perftest`, over its RC transport. UCX's upper layer connects through unreliable
/// datagrams first, which Debian's UCX 1.13 gives up over soft-RoCE, so this is the lower layer.
pub fn ucx(load: Load) -> Result<f64> {
    let start = |device: &str, server: Option<&str>| {
        let mut command = Command::new("ucx_perftest");
        command.env("UCX_IB_GID_INDEX", "1").env("UCX_RC_PATH_MTU", "4096");
        command.args(["-d", &format!("{device}:1"), "-x", "rc_verbs", "-p", &PORT.to_string()]);
        command.args(server);
        if server.is_some() {
            command.args(["-t", "put_bw", "-D", "zcopy", "-v", "-w", &WINDOW.to_string()]);
            command.args(["-s", &load.size.to_string(), "-n", &load.count.min(MOST).to_string()]);
        }
        spawn(command, "ucx-utils")
    };
    // Iterations, three latencies, two bandwidths, the recent and the overall message rate.
    let rate = |text: &str| text.lines().last()?.split(',').nth(7)?.parse().ok();
    figure(start(FAR, None)?, || start(NEAR, Some(FAR_ADDRESS)), rate)
}

fn spawn(mut command: Command, package: &str) -> Result<Child> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command.spawn().map_err(|error| format!("{program} (package {package}): {error}"))?)
}

/// What the client prints.
fn figure(
    server: Child,
    client: impl FnOnce() -> Result<Child>,
    read: impl FnOnce(&str) -> Option<f64>,
) -> Result<f64> {
    until_it_listens(PORT)?;
    let client = client()?.wait_with_output()?;
    let server = server.wait_with_output()?;
    let text = String::from_utf8_lossy(&client.stdout);
    if !client.status.success() || !server.status.success() {
        let errors = String::from_utf8_lossy(&client.stderr);
        return Err(format!("ended with {} and {}: {text}{errors}", client.status, server.status).into());
    }
    Ok(read(&text).ok_or_else(|| format!("printed no figure: {text}"))?)
}
