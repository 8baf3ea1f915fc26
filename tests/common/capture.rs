//! Captures the RoCE v2 packets of a network interface.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// UDP port of RoCE v2.
const ROCE: u16 = 4791;

/// Headers of a packet that the tests look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub version: u8,
    /// The DS field of IPv4, the traffic class of IPv6.
    pub traffic_class: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Of IPv6.
    pub flow_label: u32,
    pub source_port: u16,
    pub opcode: u8,
    pub solicited: bool,
    pub pkey: u16,
    pub dest_qp: u32,
}

impl Packet {
    /// Parses an Ethernet frame; `None` if it is not RoCE v2.
    fn parse(frame: &[u8]) -> Option<Self> {
        let two = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
        let ip = 14;
        let (version, traffic_class, hop_limit, flow_label, udp) = match two(12)? {
            0x0800 if *frame.get(ip + 9)? == 17 => {
                (4, frame[ip + 1], frame[ip + 8], 0, ip + 4 * usize::from(frame[ip] & 0xf))
            }
            0x86dd if *frame.get(ip + 6)? == 17 => {
                let first = u32::from(two(ip)?) << 16 | u32::from(two(ip + 2)?);
                (6, (first >> 20) as u8, frame[ip + 7], first & 0xf_ffff, ip + 40)
            }
            _ => return None,
        };
        if two(udp + 2)? != ROCE {
            return None;
        }
        let base = udp + 8;
        Some(Self {
            version,
            traffic_class,
            hop_limit,
            flow_label,
            source_port: two(udp)?,
            opcode: *frame.get(base)?,
            solicited: frame.get(base + 1)? & 0x80 != 0,
            pkey: two(base + 2)?,
            dest_qp: u32::from(*frame.get(base + 5)?) << 16 | u32::from(two(base + 6)?),
        })
    }
}

/// A capture that runs until it is dropped.
pub struct Capture(OwnedFd);

impl Capture {
    /// Captures what enters and leaves an interface, from now on.
    #[track_caller]
    pub fn new(interface: &str) -> Self {
        let name = CString::new(interface).unwrap();
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: plain system calls; the address is a local variable of the stated length.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into());
            assert!(fd >= 0, "socket: {}", io::Error::last_os_error());
            let socket = OwnedFd::from_raw_fd(fd);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let length = size_of::<libc::sockaddr_ll>() as u32;
            let bound = libc::bind(fd, (&raw const address).cast(), length);
            assert_eq!(bound, 0, "bind to {interface}: {}", io::Error::last_os_error());
            Self(socket)
        }
    }

    /// Waits for a packet that `wanted` accepts; the test fails without one.
    #[track_caller]
    pub fn find(&self, what: &str, wanted: impl Fn(&Packet) -> bool) -> Packet {
        let end = Instant::now() + Duration::from_secs(10);
        let mut others = Vec::new();
        while Instant::now() < end {
            let Some(packet) = self.next() else { continue };
            if wanted(&packet) {
                return packet;
            }
            others.push(packet);
        }
        panic!("no packet {what} among {others:?}");
    }

    /// The next packet, which may be no RoCE.
    fn next(&self) -> Option<Packet> {
        let mut frame = [0_u8; 256];
        let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the descriptor is open; both buffers are local variables of the stated lengths.
        let length = unsafe {
            if libc::poll(&mut ready, 1, 100) < 1 {
                return None;
            }
            libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0)
        };
        Packet::parse(&frame[..usize::try_from(length).unwrap_or(0)])
    }
}
