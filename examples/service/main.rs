//! A service in tokio that lets clients READ a buffer, and a client.
//!
//! ```text
//! service serve --listen 192.0.2.1
//! service fetch --connect 192.0.2.1
//! ```
//!
//! All clients share one worker: one completion queue, one descriptor and one pool of receives. The server does nothing
//! for the bytes that they read. A client says by notifications that it is alive and when it is done. The server drops
//! one that is silent for too long, and goes on when one is killed or cancels.

mod digest;
#[path = "../common/exporter.rs"]
mod exporter;
#[path = "../common/register.rs"]
mod register;
#[path = "../common/size.rs"]
mod size;

mod client;
mod server;

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const TIMEOUT: Duration = Duration::from_secs(60);

/// The notifications of a client: it is alive, and it has verified all bytes.
const ALIVE: u32 = 1;
const DONE: u32 = 2;

#[derive(Parser)]
#[command(about = "Serves a buffer to clients that READ it over RDMA, in tokio")]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Serve a buffer.
    Serve {
        #[command(flatten)]
        options: Options,
        /// Address of an RDMA device to listen on.
        #[arg(long)]
        listen: String,
        /// Size of the buffer, such as 64M.
        #[arg(long, default_value = "16M", value_parser = size::parse_size)]
        size: u64,
        /// Seconds of silence after which a client is dropped.
        #[arg(long, default_value_t = 30.0)]
        patience: f64,
        /// End after so many clients have come and gone; 0 serves without end.
        #[arg(long, default_value_t = 0)]
        clients: usize,
    },
    /// Read the buffer and verify it.
    Fetch {
        #[command(flatten)]
        options: Options,
        /// Address that the server listens on.
        #[arg(long)]
        connect: String,
        /// What to do instead of reading to the end.
        #[arg(long, value_enum)]
        then: Option<Then>,
    },
}

/// How a client misbehaves.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Then {
    /// Cancel what is in flight, and disconnect.
    Cancel,
    /// Stay connected, and say nothing.
    Silent,
}

#[derive(Args)]
struct Options {
    #[arg(long, default_value_t = 18520)]
    port: u16,
    /// The exporter of the buffer: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
    #[arg(long, default_value = "heap")]
    exporter: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let run = match Cli::parse().role {
        Role::Serve { options, listen, size, patience, clients } => {
            let patience = Duration::try_from_secs_f64(patience).unwrap_or(Duration::MAX);
            server::serve(&options, &listen, size, patience, clients).await
        }
        Role::Fetch { options, connect, then } => client::fetch(&options, &connect, then).await,
    };
    if let Err(error) = run {
        eprintln!("service: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    (host, port).to_socket_addrs()?.next().ok_or_else(|| format!("{host} has no address").into())
}
