//! Connections between rxe0 and rxe1, over the wire.
//!
//! `cargo xtask` creates rxe0 and rxe1 on the two ends of a veth pair, wire0 and wire1. Its routing makes
//! packets between them cross the pair, so that netem faults apply.

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::transfer::{Connection, ConnectionOptions};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};

use super::buffers::heap;
use super::pattern;
use super::system::run;

/// The address of rxe1.
pub const FAR: &str = "192.168.77.2";

/// A connection with its protection domain.
pub struct End {
    pub connection: Connection,
    pub domain: ProtectionDomain,
}

impl End {
    #[track_caller]
    pub fn new(device: &str, options: ConnectionOptions) -> Self {
        let context = Device::by_name(device).and_then(|device| device.open()).expect("a device of the wire");
        let domain = ProtectionDomain::new(&context).expect("protection domain");
        let connection = Connection::new(&domain, options).expect("connection");
        Self { connection, domain }
    }

    /// Registers a whole buffer with every access.
    #[track_caller]
    pub fn register(&self, buffer: &DmaBuf) -> MemoryRegion {
        MemoryRegion::builder(&self.domain, buffer).access(Access::REMOTE).register().expect("register")
    }

    /// A new buffer of the system heap filled with a pattern, and its region.
    #[track_caller]
    pub fn filled(&self, size: u64, seed: u64) -> (DmaBuf, MemoryRegion) {
        let buffer = heap(size);
        buffer.map().unwrap().write(0, &pattern(size as usize, seed)).unwrap();
        let region = self.register(&buffer);
        (buffer, region)
    }
}

/// Two connected ends: `near` on rxe0 and `far` on rxe1.
pub struct Wire {
    pub near: End,
    pub far: End,
}

impl Wire {
    #[track_caller]
    pub fn new() -> Self {
        Self::with(ConnectionOptions::default())
    }

    #[track_caller]
    pub fn with(options: ConnectionOptions) -> Self {
        let (near, far) = (End::new("rxe0", options), End::new("rxe1", options));
        near.connection.connect(&far.connection.endpoint()).expect("connect");
        far.connection.connect(&near.connection.endpoint()).expect("connect");
        Self { near, far }
    }
}

/// Packets that have crossed the wire, in both directions.
pub fn packets() -> u64 {
    let count = |file: &str| {
        let path = format!("/sys/class/net/wire0/statistics/{file}");
        std::fs::read_to_string(&path)
            .unwrap_or_else(|e| panic!("{path}: {e}"))
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    count("rx_packets") + count("tx_packets")
}

/// A fault on the wire, in both directions, until dropped.
pub struct Fault(());

impl Fault {
    /// Adds a fault in the syntax of tc-netem(8), such as `loss 1%`.
    #[track_caller]
    pub fn new(fault: &str) -> Self {
        for end in ["wire0", "wire1"] {
            let words = ["qdisc", "add", "dev", end, "root", "netem", "limit", "10000"];
            run("/usr/sbin/tc", &words.into_iter().chain(fault.split(' ')).collect::<Vec<_>>());
        }
        Self(())
    }

    /// Packets that the queue of wire0 has dropped.
    pub fn dropped(&self) -> u64 {
        let text = run("/usr/sbin/tc", &["-s", "qdisc", "show", "dev", "wire0"]);
        let count = text.split_once("dropped ").and_then(|(_, rest)| rest.split_once(','));
        count
            .and_then(|(count, _)| count.parse().ok())
            .unwrap_or_else(|| panic!("tc printed no count of dropped packets: {text:?}"))
    }
}

/// The sum over both devices of a hardware counter, such as `duplicate_request` or `out_of_seq_request`.
#[track_caller]
pub fn counted(counter: &str) -> u64 {
    let of = |device| {
        let path = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/{counter}");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        text.trim().parse::<u64>().unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    of("rxe0") + of("rxe1")
}

impl Drop for Fault {
    fn drop(&mut self) {
        for end in ["wire0", "wire1"] {
            run("/usr/sbin/tc", &["qdisc", "delete", "dev", end, "root"]);
        }
    }
}
