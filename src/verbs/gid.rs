//! The GIDs of a port, and the choice of one.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;

use super::Endpoint;
use super::absence::is_exhaustion;

/// An entry of a port's GID table, from [`Context::gids`](super::Context::gids).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[doc(alias = "ibv_gid_entry")]
pub struct GidEntry {
    /// Index in the table, for [`QueuePairOptions::gid_index`](super::QueuePairOptions::gid_index).
    pub index: u8,
    /// The GID. On RoCE it contains an IP address: see [`address`](Self::address).
    pub gid: [u8; 16],
    /// Type of the GID: RoCE version 1 or 2, of which both peers need the same; 0 on InfiniBand and iWARP.
    pub roce_version: u8,
    /// Network interface of the GID. `None` if this process's network namespace has no such interface with this
    /// address.
    pub netdev: Option<String>,
    /// Whether that interface is up and has a carrier.
    pub up: bool,
}

impl GidEntry {
    /// Index, GID and RoCE version, of which a queue pair's endpoint consists.
    pub(super) fn parts(&self) -> (u8, [u8; 16], u8) {
        (self.index, self.gid, self.roce_version)
    }

    /// The GID as an address, whether it is one or not.
    pub(super) fn canonical(&self) -> IpAddr {
        address(&self.gid)
    }

    /// The IP address that a RoCE GID contains; `None` on InfiniBand and iWARP.
    pub fn address(&self) -> Option<IpAddr> {
        (self.roce_version != 0).then(|| address(&self.gid))
    }
}

/// The index, the address and the type, as in `GID 1, 10.0.0.1, RoCE v2, eth0`.
impl fmt::Display for GidEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GID {}, {}, {}", self.index, address(&self.gid), link(self.roce_version))?;
        match &self.netdev {
            Some(netdev) if self.up => write!(f, ", {netdev}"),
            Some(netdev) => write!(f, ", {netdev}, which is down"),
            None if self.roce_version == 0 => Ok(()),
            None => f.write_str(", no interface in this network namespace"),
        }
    }
}

fn link(roce_version: u8) -> String {
    match roce_version {
        0 => "not RoCE".into(),
        version => format!("RoCE v{version}"),
    }
}

fn address(gid: &[u8; 16]) -> IpAddr {
    IpAddr::from(*gid).to_canonical()
}

/// A network interface of this process's namespace.
#[derive(Debug, Clone)]
pub(super) struct Interface {
    pub name: String,
    pub up: bool,
    /// Its addresses with their netmasks, among them the link-local one that its MAC address gives.
    pub addresses: Vec<(IpAddr, IpAddr)>,
}

/// The network interfaces of this process's namespace; none if the kernel does not list them.
///
/// # Errors
/// No descriptor is free.
pub(super) fn interfaces() -> io::Result<Vec<Interface>> {
    let all = match getifaddrs() {
        Ok(all) => all,
        Err(errno) => {
            let error = io::Error::from(errno);
            return if is_exhaustion(&error) { Err(error) } else { Ok(Vec::new()) };
        }
    };
    let ip = |address: SockaddrStorage| -> Option<IpAddr> {
        let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
    };
    let mut interfaces: Vec<Interface> = Vec::new();
    for entry in all {
        let name = entry.interface_name;
        let at = interfaces.iter().position(|interface| interface.name == name).unwrap_or_else(|| {
            let up = entry.flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING);
            interfaces.push(Interface { name, up, addresses: Vec::new() });
            interfaces.len() - 1
        });
        let mac = entry.address.as_ref().and_then(|address| address.as_link_addr()?.addr());
        if let Some(mac) = mac {
            interfaces[at].addresses.push((of_mac(mac).into(), Ipv6Addr::from_bits(u128::MAX << 64).into()));
        }
        if let (Some(address), Some(mask)) = (entry.address.and_then(ip), entry.netmask.and_then(ip)) {
            interfaces[at].addresses.push((address, mask));
        }
    }
    Ok(interfaces)
}

/// The link-local address of an interface with this MAC address (EUI-64), which is also its default GID.
fn of_mac(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// Fills in the interface `name` that the kernel gave for the entry. Indexes and names repeat in other network
/// namespaces, so the interface must also have the address.
pub(super) fn set_netdev(entry: &mut GidEntry, name: &str, interfaces: &[Interface]) {
    let has_address = |interface: &&Interface| {
        let of_gid = address(&entry.gid);
        interface.addresses.iter().any(|(own, _)| *own == of_gid)
    };
    let found = interfaces.iter().find(|interface| interface.name == name).filter(has_address);
    entry.netdev = found.map(|interface| interface.name.clone());
    entry.up = found.is_some_and(|interface| interface.up);
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Rank of an entry for a peer of which nothing is known; lower is better. On RoCE an interface that is up comes
/// first, then version 2, then a routable address, then IPv4.
pub(super) fn rank(entry: &GidEntry) -> (bool, u8) {
    let class = match (entry.roce_version, address(&entry.gid)) {
        (2, address) if is_link_local(address) => 2,
        (2, IpAddr::V4(_)) => 0,
        (2, IpAddr::V6(_)) => 1,
        _ => 3,
    };
    (entry.roce_version != 0 && !entry.up, class)
}

/// The remedy if the only GIDs are those of other namespaces.
pub(super) const MOVE: &str =
    "run the program in the namespace of that interface, or move the interface here (ip link set … netns)";

/// The entries that this process can send from: on RoCE those whose interface is in its network namespace. All, if
/// the kernel does not list the interfaces; a namespace has at least `lo`.
pub(super) fn in_namespace(mut entries: Vec<GidEntry>, interfaces: &[Interface]) -> Vec<GidEntry> {
    entries.retain(|entry| entry.roce_version == 0 || entry.netdev.is_some() || interfaces.is_empty());
    entries
}

/// The best entry for a peer of which nothing is known.
pub(super) fn best(entries: &[GidEntry]) -> Option<&GidEntry> {
    entries.iter().min_by_key(|entry| rank(entry))
}

/// The best entry towards an address: that of `source`, the address from which this host's routes send to it;
/// else one on the same subnet; else any of the same family.
pub(super) fn towards<'a>(
    entries: &'a [GidEntry],
    interfaces: &[Interface],
    address: IpAddr,
    source: Option<IpAddr>,
) -> Option<&'a GidEntry> {
    let masked = |address: IpAddr, mask: IpAddr| match (address, mask) {
        (IpAddr::V4(address), IpAddr::V4(mask)) => Some(u128::from(address.to_bits() & mask.to_bits())),
        (IpAddr::V6(address), IpAddr::V6(mask)) => Some(address.to_bits() & mask.to_bits()),
        _ => None,
    };
    let on_subnet = |own: IpAddr| {
        let masks = interfaces.iter().flat_map(|interface| &interface.addresses);
        masks.filter(|(of, _)| *of == own).any(|(_, mask)| {
            masked(own, *mask).is_some_and(|network| Some(network) == masked(address, *mask))
        })
    };
    let of_family = entries.iter().filter_map(|entry| {
        let own = entry.address()?;
        (family(own) == family(address)).then_some((entry, own))
    });
    let nearest = of_family.min_by_key(|(entry, own)| {
        (entry.roce_version == 1, Some(*own) != source, !on_subnet(*own), rank(entry))
    });
    nearest.map(|(entry, _)| entry)
}

/// The address of this host from which its routes send to `address`; `None` without a route.
///
/// # Errors
/// No descriptor is free.
pub(super) fn source_towards(address: IpAddr) -> io::Result<Option<IpAddr>> {
    let any = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    // Connecting a UDP socket asks the routes and sends nothing; 4791 is the port of RoCE v2.
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, 4791))?;
        Ok(SocketAddr::ip(&socket.local_addr()?))
    });
    match source {
        Err(error) if is_exhaustion(&error) => Err(error),
        source => Ok(source.ok()),
    }
}

/// What must agree between both ends of a connection.
fn family(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "an IPv4 address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local IPv6 address",
        IpAddr::V6(_) => "a routable IPv6 address",
    }
}

/// Why these two ends can never reach each other; `None` if nothing is known against it.
pub(super) fn mismatch(ours: &Endpoint, peer: &Endpoint) -> Option<String> {
    let (own, its) = (address(&ours.gid), address(&peer.gid));
    let is_roce = |end: &Endpoint| end.roce_version != 0;
    // A LID shows that an end which states no version is on InfiniBand.
    let on_infiniband = |end: &Endpoint| !is_roce(end) && end.lid != 0;
    if is_roce(ours) && on_infiniband(peer) || on_infiniband(ours) && is_roce(peer) {
        let (roce, other) = if is_roce(ours) { ("this end", "the peer") } else { ("the peer", "this end") };
        return Some(format!("{roce} is on RoCE and {other} on InfiniBand: choose devices of one fabric"));
    }
    if !is_roce(ours) {
        return None;
    }
    if is_roce(peer) && ours.roce_version != peer.roce_version {
        let (own_link, its_link) = (link(ours.roce_version), link(peer.roce_version));
        return Some(format!(
            "GID {own} of this end is {own_link} and the peer's {its} is {its_link}: {CHOOSE}"
        ));
    }
    // The kernel resolves the peer's MAC address within one family.
    (own.is_ipv4() != its.is_ipv4()).then(|| families(own, its))
}

/// Why the kernel did not take the peer's endpoint, as far as the GIDs and its errno show.
pub(super) fn unreachable(ours: &Endpoint, peer: &Endpoint, errno: Option<i32>) -> String {
    let (own, its) = (address(&ours.gid), address(&peer.gid));
    let is_roce = ours.roce_version != 0;
    if is_roce && family(own) != family(its) {
        families(own, its)
    } else if errno == Some(libc::EINVAL) {
        format!("is it connected already, or did its GID {own} go away?")
    } else if is_roce {
        format!("check the route from {own} to {its} (ip route get {its} from {own})")
    } else {
        "check that the fabric leads to the peer".into()
    }
}

fn families(own: IpAddr, its: IpAddr) -> String {
    let (of_own, of_its) = (family(own), family(its));
    format!("GID {own} of this end is {of_own} and the peer's {its} is {of_its}: {CHOOSE}")
}

const CHOOSE: &str = "choose GIDs of one kind on both ends (Context::gid_for, QueuePairOptions::gid_index)";

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "::ffff:10.0.0.1";
    const GLOBAL: &str = "fd01::1";
    const LINK_LOCAL: &str = "fe80::1";

    fn gid(text: &str) -> [u8; 16] {
        text.parse::<Ipv6Addr>().unwrap().octets()
    }

    fn entry(index: u8, roce_version: u8, text: &str, netdev: Option<&str>) -> GidEntry {
        let netdev = netdev.map(String::from);
        GidEntry { index, gid: gid(text), roce_version, up: netdev.is_some(), netdev }
    }

    /// An interface with addresses in the form `10.0.0.1/24`.
    fn interface(name: &str, up: bool, addresses: &[&str]) -> Interface {
        let parsed = |text: &&str| {
            let (address, bits) = text.split_once('/').unwrap();
            let bits: u32 = bits.parse().unwrap();
            let mask = match address.parse().unwrap() {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits(u32::MAX << (32 - bits))),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(u128::MAX << (128 - bits))),
            };
            (address.parse().unwrap(), mask)
        };
        Interface { name: name.into(), up, addresses: addresses.iter().map(parsed).collect() }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_roce_v2_gid_of_an_ipv4_address_is_preferred() {
        let classes =
            [(2, V4), (2, GLOBAL), (2, LINK_LOCAL), (2, "::ffff:169.254.0.1"), (1, V4), (0, LINK_LOCAL)]
                .map(|(version, text)| rank(&entry(0, version, text, Some("eth0"))).1);
        assert_eq!(classes, [0, 1, 2, 2, 3, 3]);
        // On InfiniBand, where no entry has an interface, the first.
        let table = [entry(0, 0, LINK_LOCAL, None), entry(1, 0, GLOBAL, None)];
        assert_eq!(best(&table).unwrap().index, 0);
        assert_eq!(best(&[]), None);
    }

    #[test]
    fn an_interface_that_is_up_here_comes_before_one_elsewhere() {
        let table = [
            entry(0, 2, LINK_LOCAL, Some("eth0")),
            // Of a pod in another network namespace.
            entry(1, 2, "::ffff:10.9.0.1", None),
            entry(2, 2, V4, Some("eth0")),
        ];
        assert_eq!(best(&table).unwrap().index, 2);
        assert_eq!(best(&table[..2]).unwrap().index, 0);
    }

    #[test]
    fn only_gids_of_this_namespace_are_chosen() {
        let table = [
            entry(0, 2, "::ffff:10.9.0.1", None),
            entry(1, 1, V4, Some("eth0")),
            // InfiniBand's have no interface.
            entry(2, 0, LINK_LOCAL, None),
        ];
        let indices = |interfaces: &[Interface]| -> Vec<_> {
            in_namespace(table.to_vec(), interfaces).iter().map(|entry| entry.index).collect()
        };
        assert_eq!(indices(&[interface("lo", true, &["127.0.0.1/8"])]), [1, 2]);
        assert_eq!(indices(&[]), [0, 1, 2], "the interfaces are not known");
    }

    #[test]
    fn an_interface_counts_if_it_is_here_and_has_the_address() {
        let here = [interface("eth0", true, &["10.0.0.1/24"]), interface("eth1", false, &["10.0.1.1/24"])];
        let netdev = |text: &str, name: &str| {
            let mut entry = entry(0, 2, text, None);
            set_netdev(&mut entry, name, &here);
            (entry.netdev, entry.up)
        };
        assert_eq!(netdev(V4, "eth0"), (Some("eth0".into()), true));
        assert_eq!(netdev("::ffff:10.0.1.1", "eth1"), (Some("eth1".into()), false));
        // Another namespace's eth0, and an index that this one does not have.
        assert_eq!(netdev("::ffff:10.9.0.1", "eth0"), (None, false));
        assert_eq!(netdev(V4, ""), (None, false));
        assert_eq!(netdev(LINK_LOCAL, "eth0"), (None, false));
        assert_eq!(of_mac([0x52, 0x54, 0, 1, 2, 3]).to_string(), "fe80::5054:ff:fe01:203");
    }

    #[test]
    fn towards_an_address_goes_the_gid_of_the_route_then_of_the_subnet_then_of_the_family() {
        let here = [
            interface("eth0", true, &["10.0.0.1/24", "fd01::1/64"]),
            interface("eth1", true, &["10.1.0.1/24"]),
        ];
        let table = [
            entry(0, 2, LINK_LOCAL, Some("eth0")),
            entry(1, 1, V4, Some("eth0")),
            entry(2, 2, V4, Some("eth0")),
            entry(3, 2, "::ffff:10.1.0.1", Some("eth1")),
            entry(4, 2, GLOBAL, Some("eth0")),
        ];
        let choice = |address: &str, source: Option<&str>| {
            towards(&table, &here, ip(address), source.map(ip)).map(|entry| entry.index)
        };
        assert_eq!(choice("192.0.2.9", Some("10.1.0.1")), Some(3));
        assert_eq!(choice("10.1.0.9", None), Some(3));
        assert_eq!(choice("10.1.0.9", Some("10.1.0.77")), Some(3), "the route leads through another device");
        assert_eq!(choice("192.0.2.9", None), Some(2));
        assert_eq!(choice("2001:db8::1", None), Some(4));
        assert_eq!(choice("fe80::9", None), Some(0));
        assert_eq!(towards(&table[..1], &here, ip("10.0.0.9"), None), None);
        assert_eq!(towards(&table[..1], &here, ip("fd01::9"), None), None);
        // InfiniBand GIDs contain no IP address.
        assert_eq!(towards(&[entry(0, 0, LINK_LOCAL, None)], &here, ip("fe80::9"), None), None);
    }

    fn end(roce_version: u8, text: &str, lid: u16) -> Endpoint {
        Endpoint {
            qp_num: 17,
            psn: 0,
            lid,
            gid: gid(text),
            mtu: 1024,
            rd_atomic: 1,
            roce_version,
            message_qp_num: 0,
        }
    }

    #[test]
    fn ends_that_cannot_meet_are_named() {
        let cases = [
            (
                end(2, V4, 0),
                end(1, V4, 0),
                "10.0.0.1 of this end is RoCE v2 and the peer's 10.0.0.1 is RoCE v1",
            ),
            (
                end(2, V4, 0),
                end(2, GLOBAL, 0),
                "is an IPv4 address and the peer's fd01::1 is a routable IPv6",
            ),
            (end(2, LINK_LOCAL, 0), end(2, V4, 0), "fe80::1 of this end is a link-local IPv6 address"),
            (end(2, LINK_LOCAL, 0), end(0, V4, 0), "and the peer's 10.0.0.1 is an IPv4 address"),
            (end(2, V4, 0), end(0, LINK_LOCAL, 5), "this end is on RoCE and the peer on InfiniBand"),
            (end(0, LINK_LOCAL, 5), end(2, V4, 0), "the peer is on RoCE and this end on InfiniBand"),
        ];
        for (ours, peer, part) in cases {
            let found = mismatch(&ours, &peer).expect(part);
            assert!(found.contains(part), "{found}");
        }
        let may_meet = [
            (end(2, V4, 0), end(2, V4, 0)),
            (end(2, V4, 0), end(0, V4, 0)),
            // On one link this can work; if the kernel refuses it, the message says why.
            (end(2, LINK_LOCAL, 0), end(2, GLOBAL, 0)),
            (end(0, LINK_LOCAL, 5), end(0, GLOBAL, 6)),
            (end(0, LINK_LOCAL, 0), end(0, V4, 0)),
        ];
        for (ours, peer) in may_meet {
            assert_eq!(mismatch(&ours, &peer), None, "{ours:?} {peer:?}");
        }
        let einval = Some(libc::EINVAL);
        let found = unreachable(&end(2, LINK_LOCAL, 0), &end(2, GLOBAL, 0), einval);
        assert!(found.contains("link-local IPv6 address and the peer's fd01::1 is a routable"), "{found}");
        assert!(unreachable(&end(2, V4, 0), &end(2, V4, 0), einval).starts_with("is it connected already"));
        let found = unreachable(&end(2, V4, 0), &end(2, "::ffff:10.0.0.9", 0), Some(libc::ENETUNREACH));
        assert!(found.contains("ip route get 10.0.0.9 from 10.0.0.1"), "{found}");
    }

    #[test]
    fn an_entry_prints_its_address_its_version_and_its_interface() {
        assert_eq!(entry(3, 2, V4, Some("eth0")).to_string(), "GID 3, 10.0.0.1, RoCE v2, eth0");
        let elsewhere = entry(4, 2, V4, None).to_string();
        assert_eq!(elsewhere, "GID 4, 10.0.0.1, RoCE v2, no interface in this network namespace");
        assert_eq!(entry(0, 0, LINK_LOCAL, None).to_string(), "GID 0, fe80::1, not RoCE");
    }

    #[test]
    fn this_host_has_interfaces_and_a_source_towards_itself() {
        let all = interfaces().unwrap();
        assert!(all.iter().any(|interface| !interface.name.is_empty()) || all.is_empty());
        if let Some(source) = source_towards(ip("127.0.0.1")).unwrap() {
            assert_eq!(source, ip("127.0.0.1"));
        }
    }
}
