//! One exporter's memory on one device.

use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Context, ProtectionDomain, QueuePairOptions};
use dmabuf_rdma::{Connection, Error, MemoryRegion};
use nix::ifaddrs::getifaddrs;

use super::memory::{Memory, SIZE, View};
use super::{Facts, Failure, Mark, Pair};
use crate::doctor::facts::Device;
use crate::pattern;

/// Bytes of the transfers.
const BULK: u64 = 64 << 10;
const ODD: u64 = 30_001;
/// A device that does not answer fails within this.
const STALL: Duration = Duration::from_secs(3);

pub fn run(exporter: &str, memory: Option<&Memory>, context: &Context, facts: &Facts) -> Pair {
    let mut pair = Pair::untried(exporter, memory, context);
    let Some(memory) = memory else { return pair };
    if let Err(failure) = steps(&mut pair, memory, context, facts) {
        pair.failure = Some(failure);
    }
    pair
}

fn steps(pair: &mut Pair, memory: &Memory, context: &Context, facts: &Facts) -> Result<(), Failure> {
    let what = format!("{} on {}", pair.exporter, pair.device);
    let failed = |error: Error| Failure::of(&error, &what, facts);
    pair.register = Mark::Failed;
    let domain = ProtectionDomain::new(context).map_err(|error| failed(error.into()))?;
    let region = memory.register(&domain).map_err(failed)?;
    (pair.register, pair.path) = (Mark::Passed, Some(region.path().to_string()));

    let transferred = |error: Error| Failure::of_transfer(&error, &what, facts);
    let ports = context.limits().map_or(1, |limits| limits.ports.max(1));
    let active = (1..=ports).find(|port| context.port(*port).is_ok_and(|port| port.active));
    if let (None, Some(failure)) = (active, Failure::port_down(&what, &pair.device, facts)) {
        pair.transfer = Mark::Failed;
        return Err(failure);
    }
    let device = facts.devices.iter().find(|device| device.name == pair.device);
    // The other end of a connection by IP address; it must live as long.
    let (connection, _other) = match device.filter(|device| device.is_iwarp()) {
        Some(device) => {
            let address = address_of(device).ok_or_else(|| Failure::iwarp(&pair.device))?;
            pair.transfer = Mark::Failed;
            let (one, other) = connect_by_address(&domain, address).map_err(transferred)?;
            (one, Some(other))
        }
        None => {
            pair.transfer = Mark::Failed;
            (connect(&domain, active.unwrap_or(1)).map_err(transferred)?, None)
        }
    };
    let view = memory.view(&region, &connection).map_err(failed)?;
    let mut expected = vec![0; region.len() as usize];
    pattern::write(&mut expected, 0, u64::from(std::process::id()));
    view.fill(&expected).map_err(transferred)?;

    let trial = Trial { region: &region, connection: &connection, view: &view, what: &what, facts };
    let (half, last) = (SIZE / 2, region.len() - 1);
    trial.copy(&mut expected, 0..BULK, half, false)?;
    trial.copy(&mut expected, half + BULK..SIZE, BULK, true)?;
    pair.transfer = Mark::Passed;

    pair.first_byte = Mark::Failed;
    let other = differing(&expected, 0, half);
    trial.copy(&mut expected, other..other + 1, 0, false)?;
    pair.first_byte = Mark::Passed;

    pair.last_byte = Mark::Failed;
    let other = differing(&expected, last, half);
    trial.copy(&mut expected, other..other + 1, last, false)?;
    pair.last_byte = Mark::Passed;

    pair.odd_offset = Mark::Failed;
    trial.copy(&mut expected, half + 3..half + 3 + ODD, 5, false)?;
    trial.copy(&mut expected, half + 7..half + 7 + ODD, 9, true)?;
    pair.odd_offset = Mark::Passed;
    Ok(())
}

/// A connection of the device with itself, through this port.
fn connect(domain: &ProtectionDomain, port: u8) -> Result<Connection, Error> {
    let pair = QueuePairOptions::default().port(port);
    let options = ConnectionOptions::default().queue_pair(pair).window(16).stall_timeout(STALL);
    let connection = Connection::new(domain, options)?;
    connection.connect(&connection.endpoint())?;
    Ok(connection)
}

/// An address of a device's network interface.
fn address_of(device: &Device) -> Option<IpAddr> {
    let of_ports = device.ports.iter().flat_map(|port| &port.netdevs).map(|(name, _)| name);
    let names: Vec<_> = device.netdev.iter().chain(of_ports).collect();
    let ours = getifaddrs().ok()?.filter(|entry| names.contains(&&entry.interface_name));
    ours.filter_map(|entry| Some(entry.address?.as_sockaddr_in()?.ip().into())).next()
}

/// Two connections of the device to each other, through the connection manager. iWARP has no other way.
fn connect_by_address(domain: &ProtectionDomain, address: IpAddr) -> Result<(Connection, Connection), Error> {
    let options = ConnectionOptions::default().window(16).stall_timeout(STALL);
    let listener = Listener::bind((address, 0).into())?;
    let outgoing = Outgoing::resolve(listener.local_addr(), Some((address, 0).into()), STALL)?;
    let mut ours = Connection::new(domain, options)?;
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| -> Result<Connection, Error> {
            let incoming = listener.accept_request(STALL)?;
            let mut theirs = Connection::new(domain, options)?;
            incoming.accept(&mut theirs, &[], STALL)?;
            Ok(theirs)
        });
        let connected = outgoing.connect(&mut ours, &[], STALL);
        let theirs = accepting.join().expect("accepting does not panic")?;
        connected?;
        Ok((ours, theirs))
    })
}

struct Trial<'a> {
    region: &'a MemoryRegion,
    connection: &'a Connection,
    view: &'a View<'a>,
    what: &'a str,
    facts: &'a Facts,
}

impl Trial<'_> {
    /// Has the device copy a range of the buffer to another place in it, by a WRITE or a READ, and compares all bytes.
    fn copy(&self, expected: &mut [u8], from: Range<u64>, to: u64, read: bool) -> Result<(), Failure> {
        let failed = |error: Error| Failure::of_transfer(&error, self.what, self.facts);
        let to = to..to + (from.end - from.start);
        let run = || -> Result<Vec<u8>, Error> {
            let remote = self.region.remote();
            let slice = |range: &Range<u64>| self.region.slice(range.clone()).map_err(dma_sg::Error::from);
            let distant = |range: &Range<u64>| remote.slice(range.clone()).map_err(dma_sg::Error::from);
            match read {
                true => self.connection.read(slice(&to)?, distant(&from)?)?.wait()?,
                false => self.connection.write(slice(&from)?, distant(&to)?)?.wait()?,
            };
            self.view.contents(expected.len() as u64)
        };
        let seen = run().map_err(failed)?;
        expected.copy_within(from.start as usize..from.end as usize, to.start as usize);
        match seen.iter().zip(&*expected).position(|(seen, expected)| seen != expected) {
            Some(at) => Err(Failure::wrong_bytes(self.what, at as u64, seen[at], expected[at])),
            None => Ok(()),
        }
    }
}

/// A place from `from` on whose byte differs from the one at `at`.
fn differing(bytes: &[u8], at: u64, from: u64) -> u64 {
    let other = bytes[from as usize..].iter().position(|byte| *byte != bytes[at as usize]);
    from + other.unwrap_or(0) as u64
}
