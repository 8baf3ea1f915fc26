//! `serve`, `read` and `write`: one side owns a buffer, and others read and write it over RDMA.
//!
//! 1. A client connects by IP address; the server's reply has the description of the buffer.
//! 2. The client reads and writes as it likes. The server's CPU takes no part.
//! 3. The client disconnects.

mod server;

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use dmabuf_rdma::cm::Outgoing;
use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::Access;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, HostBuffer, MemoryRegion, RemoteRegion};

use crate::net::{TIMEOUT, address};
use crate::{Result, exporter, size, ui};

/// Own a buffer that others read and write, with `dmabuf-rdma read` and `write`.
///
/// Whoever reaches the port may read and write the buffer, and nothing else.
#[derive(clap::Args)]
pub struct Args {
    /// Address of an RDMA device to listen on.
    #[arg(long)]
    listen: String,
    #[arg(long, default_value_t = PORT)]
    port: u16,
    #[arg(long, default_value = "heap", help = format!("The exporter of the buffer: {}", exporter::NAMES))]
    exporter: String,
    /// Size of the buffer, such as 64M or 4G.
    #[arg(long, default_value = "64M", value_parser = size::parse_size)]
    size: u64,
    /// Fill the buffer from this file, and write it back at the end.
    #[arg(long)]
    file: Option<PathBuf>,
    /// Permit reading only.
    #[arg(long, conflicts_with = "file")]
    read_only: bool,
    /// End after so many clients; 0 serves without end.
    #[arg(long, default_value_t = 0)]
    clients: u64,
}

/// Read bytes of a buffer that `dmabuf-rdma serve` owns.
#[derive(clap::Args)]
pub struct ReadArgs {
    #[command(flatten)]
    at: At,
    /// Number of bytes, such as 64 or 1M; default: all from the offset on.
    #[arg(long, value_parser = size::parse_size)]
    length: Option<u64>,
    /// Write the bytes into this file; default: print them, on a terminal in hexadecimal.
    #[arg(long)]
    to: Option<PathBuf>,
}

/// Write bytes into a buffer that `dmabuf-rdma serve` owns.
#[derive(clap::Args)]
pub struct WriteArgs {
    #[command(flatten)]
    at: At,
    /// Take the bytes from this file; default: from the standard input.
    #[arg(long)]
    from: Option<PathBuf>,
}

#[derive(clap::Args)]
struct At {
    /// Address that the server listens on.
    #[arg(long)]
    connect: String,
    #[arg(long, default_value_t = PORT)]
    port: u16,
    /// Where in the buffer, such as 0 or 4K.
    #[arg(long, default_value = "0", value_parser = size::parse_offset)]
    offset: u64,
}

const PORT: u16 = 18518;

pub use server::run;

pub fn read(args: &ReadArgs) -> Result<()> {
    let client = Client::connect(&args.at)?;
    let left = client.remote.len().checked_sub(args.at.offset).filter(|left| *left > 0);
    let left = left.ok_or_else(|| format!("the served buffer has {} bytes", client.remote.len()))?;
    let (host, region, took) = client.transfer(args.at.offset, args.length.unwrap_or(left), None)?;
    let mut bytes = vec![0; region.len() as usize];
    host.read(0, &mut bytes)?;
    match &args.to {
        Some(path) => {
            std::fs::write(path, &bytes).map_err(|error| format!("{}: {error}", path.display()))?;
            ui::row("read", took);
        }
        None if std::io::stdout().is_terminal() => ui::line(hexadecimal(&bytes, args.at.offset)),
        None => std::io::stdout().write_all(&bytes)?,
    }
    Ok(())
}

pub fn write(args: &WriteArgs) -> Result<()> {
    let mut bytes = Vec::new();
    match &args.from {
        Some(path) => {
            let file = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
            file.map_err(|error| format!("{}: {error}", path.display()))?;
        }
        None => {
            std::io::stdin().read_to_end(&mut bytes)?;
        }
    }
    if bytes.is_empty() {
        return Err("there are no bytes to write".into());
    }
    let client = Client::connect(&args.at)?;
    let (_, _, took) = client.transfer(args.at.offset, bytes.len() as u64, Some(&bytes))?;
    ui::row("written", took);
    Ok(())
}

struct Client {
    domain: ProtectionDomain,
    connection: Connection,
    remote: RemoteRegion,
}

impl Client {
    fn connect(at: &At) -> Result<Self> {
        let outgoing = Outgoing::resolve(address(&at.connect, at.port)?, None, TIMEOUT)?;
        let domain = ProtectionDomain::new(&Device::by_name(&outgoing.device_name())?.open()?)?;
        let mut connection = Connection::new(&domain, Default::default())?;
        let answer = outgoing.connect(&mut connection, &[], TIMEOUT)?;
        let (remote, _padding) = RemoteRegion::split_from(&answer)?;
        Ok(Self { domain, connection, remote })
    }

    /// Writes these bytes to the server, or without any reads from it. Returns the local memory, and how long it took.
    fn transfer(
        &self,
        offset: u64,
        length: u64,
        bytes: Option<&[u8]>,
    ) -> Result<(HostBuffer, MemoryRegion, String)> {
        let end = offset.checked_add(length).ok_or("the range does not fit in 64 bits")?;
        let remote = self.remote.slice(offset..end)?;
        let host = HostBuffer::allocate(length, PageKind::Base)?;
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
        let region = MemoryRegion::builder(&self.domain, &host).range(..length).access(access).register()?;
        bytes.map_or(Ok(()), |bytes| host.write(0, bytes))?;
        let bar = ui::Bar::new(if bytes.is_some() { "write" } else { "read" }, length);
        let start = Instant::now();
        let transfer = match bytes {
            Some(_) => self.connection.write(&region, remote)?,
            None => self.connection.read(&region, remote)?,
        };
        transfer.wait_with_progress(|done| bar.set(done))?;
        let took = start.elapsed();
        bar.finish();
        Ok((host, region, ui::rate(length, took)))
    }
}

/// Rows of 16 bytes with their offsets.
fn hexadecimal(bytes: &[u8], offset: u64) -> String {
    let row = |(at, row): (usize, &[u8])| {
        let numbers: Vec<_> = row.iter().map(|byte| format!("{byte:02x}")).collect();
        let letters: String =
            row.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
        format!("{:08x}  {:<47}  {letters}", offset + 16 * at as u64, numbers.join(" "))
    };
    bytes.chunks(16).enumerate().map(row).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_are_shown_with_their_offsets() {
        let text = super::hexadecimal(b"0123456789abcdef\0A", 0x20);
        assert_eq!(
            text,
            "00000020  30 31 32 33 34 35 36 37 38 39 61 62 63 64 65 66  0123456789abcdef\n\
             00000030  00 41                                            .A"
        );
    }
}
