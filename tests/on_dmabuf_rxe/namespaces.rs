//! Network namespaces: no GID is chosen whose interface is elsewhere.

use std::fs::File;
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use dmabuf_rdma::verbs::{
    CompletionQueue, Context, Device, Error, GidEntry, ProtectionDomain, QueuePair, QueuePairOptions,
};
use nix::sched::{CloneFlags, setns};

use crate::assert_refused;
use crate::common::system::{again, is_child, run};

/// A network namespace with an interface `inner0` of its own, and soft-RoCE on it.
struct Namespace(());

impl Namespace {
    fn new() -> Self {
        run("ip", &["netns", "add", "away"]);
        for words in
            ["link add inner0 type dummy", "address add 10.98.0.1/24 dev inner0", "link set inner0 up"]
        {
            run("ip", &["-n", "away"].into_iter().chain(words.split(' ')).collect::<Vec<_>>());
        }
        Self(())
    }

    /// Runs `action` on a new thread in this namespace.
    fn within<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            let file = File::open("/run/netns/away").unwrap();
            setns(file, CloneFlags::CLONE_NEWNET).expect("setns");
            action()
        };
        std::thread::scope(|scope| scope.spawn(enter).join().expect("the thread in the namespace"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        run("ip", &["netns", "delete", "away"]);
    }
}

/// The exclusive mode, until dropped. The kernel changes the mode only while there is one namespace; one that was
/// deleted goes a little later.
struct Exclusive(());

impl Exclusive {
    fn new() -> Self {
        set_mode("exclusive");
        Self(())
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        set_mode("shared");
    }
}

fn set_mode(mode: &str) {
    let end = Instant::now() + Duration::from_secs(20);
    let set = || Command::new("rdma").args(["system", "set", "netns", mode]).output().unwrap();
    while !set().status.success() {
        assert!(Instant::now() < end, "{:?}", set());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(run("rdma", &["system", "show"]).contains(&format!("netns {mode}")));
}

fn open(device: &str) -> Context {
    Device::by_name(device).unwrap().open().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pair(context: &Context, options: QueuePairOptions) -> Result<QueuePair, Error> {
    let domain = ProtectionDomain::new(context).unwrap();
    let queue = CompletionQueue::new(context, 8).unwrap();
    QueuePair::new(&domain, &queue, &queue, options)
}

/// Every choice is refused, with the GIDs of the other namespace in the message.
#[track_caller]
fn nothing_to_choose(device: &str, address: &str) {
    let context = open(device);
    let gids = context.gids(1).unwrap();
    assert!(gids.iter().all(|entry| entry.netdev.is_none()), "{gids:?}");
    let found: Option<&GidEntry> = gids.iter().find(|entry| entry.address() == Some(ip(address)));
    let index = found.unwrap_or_else(|| panic!("{address} is not among {gids:?}")).index;
    let options = QueuePairOptions::default();
    for refused in [
        context.best_gid(1).map(drop),
        context.gid_for(1, ip(address)).map(drop),
        pair(&context, options).map(drop),
        pair(&context, options.gid_index(Some(index))).map(drop),
        pair(&context, options.gid_address(Some(ip(address)))).map(drop),
    ] {
        let message = assert_refused!(refused, Error::NoGid { port: 1, .. });
        assert!(message.contains("no interface in this network namespace"), "{message}");
    }
}

/// In the shared mode every namespace sees every device.
#[test]
fn gids_of_another_namespace_are_not_chosen() {
    assert!(run("rdma", &["system", "show"]).contains("netns shared"));
    let away = Namespace::new();
    // From within, rxe0's interfaces are elsewhere.
    away.within(|| nothing_to_choose("rxe0", "192.168.77.1"));
    // And from here those of a device that was made within.
    run("ip", &["netns", "exec", "away", "rdma", "link", "add", "inner", "type", "rxe", "netdev", "inner0"]);
    let within = away.within(|| open("inner").best_gid(1));
    nothing_to_choose("inner", "10.98.0.1");
    run("rdma", &["link", "delete", "inner"]);
    let within = within.unwrap();
    assert_eq!((within.address(), within.netdev.as_deref()), (Some(ip("10.98.0.1")), Some("inner0")));
    // Here rxe0 serves as before.
    pair(&open("rxe0"), QueuePairOptions::default()).unwrap();
}

/// rxe cannot be moved to another namespace (`ib_device_set_netns_put`), so only what it hides is tested.
#[test]
fn in_the_exclusive_mode_a_device_of_another_namespace_is_unknown() {
    if is_child() {
        let refused = Device::by_name("rxe0").and_then(|device| device.open());
        let message = assert_refused!(refused, Error::UnknownDevice { .. });
        assert!(message.starts_with("no RDMA device is named \"rxe0\""), "{message}");
        return;
    }
    let _exclusive = Exclusive::new();
    let away = Namespace::new();
    // `ip netns exec` mounts the /sys of the namespace, as a container has it.
    let output = again(&["ip", "netns", "exec", "away"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    // Here it serves.
    pair(&open("rxe0"), QueuePairOptions::default()).unwrap();
    drop(away);
}
