//! `dmabuf-rdma doctor` on devices that the provider pretends to be.

use crate::common::doctor::{Diagnosis, Doctor};

fn on(profile: &str) -> Diagnosis {
    Doctor::new().env("DMABUF_RDMA_PROFILE", profile).run()
}

/// efa registers, and has no queue pairs for connections.
#[test]
fn a_device_without_reliable_connections() {
    let efa = on("efa");
    let told = efa.told();
    let lacks = |device: &str| format!("unavailable: {device} has no ");
    for device in ["rxe0", "rxe1"] {
        let found: Vec<_> = told.iter().filter(|line| line.starts_with(&lacks(device))).collect();
        assert!(found.len() == 1 && found[0].contains(" -> it needs "), "{told:?}");
    }
    assert_eq!((told.len(), efa.grade(), efa.status), (2, "D", 1), "{told:?}");
    assert!(efa.pairs().iter().all(|pair| pair.ends_with(" ++-...")), "{:?}", efa.pairs());
}

/// Memory that registers, and whose transfers fail.
#[test]
fn registrations_that_are_dead() {
    let dead = on("dead-keys");
    let told = dead.told();
    let of = |device: &str| {
        format!(
            "dead-registration: memory registers with {device}, but its transfers fail (WR_FLUSH_ERR) -> do not use this memory with {device}: compare the routes between the devices, switch off ACS redirection and the IOMMU's translation between them, or update the driver"
        )
    };
    assert_eq!(told, ["rxe0", "rxe1"].map(of));
    let of_dmabufs = |pair: &&String| !pair.starts_with("host memory");
    assert!(
        dead.pairs().iter().filter(of_dmabufs).all(|pair| pair.ends_with(" ++-...")),
        "{:?}",
        dead.pairs()
    );
    assert!("CD".contains(dead.grade()), "{:?}", dead.pairs());
}

/// A driver that leaks the kernel's own errno.
#[test]
fn an_errno_that_no_table_has() {
    let leaking = on("errno-524");
    let told = leaking.told();
    let of = |memory: &str, device: &str| {
        format!(
            "refused: {device} refuses a \"{memory}\" dma-buf through Verbs (errno 524, ENOTSUPP) -> the exporter's driver does not map its memory for this device: use another NIC or exporter"
        )
    };
    for device in ["rxe0", "rxe1"] {
        assert!(told.contains(&of("udmabuf", device)) && told.contains(&of("system", device)), "{told:?}");
    }
    // Host memory still moves.
    assert_eq!((leaking.grade(), leaking.status), ("C", 0), "{:?}", leaking.pairs());
}

#[test]
fn a_device_without_atomics() {
    let notes = on("mlx5-without-atomics").notes();
    for device in ["rxe0", "rxe1"] {
        let note = format!("no-atomics: {device} executes no atomics for a peer");
        assert!(notes.contains(&note), "{notes:?}");
    }
}

/// A device that writes into pages which are not the buffer's: every transfer succeeds.
#[test]
fn registrations_of_other_pages() {
    let stray = on("stray-pages");
    let told = stray.told();
    for device in ["rxe0", "rxe1"] {
        let start = format!("wrong-bytes: udmabuf on {device}: transfers succeed, but byte 0x");
        let found: Vec<_> = told.iter().filter(|line| line.starts_with(&start)).collect();
        assert!(
            found.len() == 1 && found[0].contains(" -> do not use this memory with the device"),
            "{told:?}"
        );
    }
    assert!(told.iter().all(|line| line.starts_with("wrong-bytes: ")), "{told:?}");
    assert_eq!((stray.grade(), stray.status), ("C", 0), "{:?}", stray.pairs());
}

/// A probe that gets an errno which is neither yes nor no.
#[test]
fn a_probe_without_an_answer() {
    let unclear = on("probe-eio").told();
    for device in ["rxe0", "rxe1"] {
        let found: Vec<_> = unclear.iter().filter(|line| line.contains(device)).collect();
        assert!(found.len() == 1 && found[0].starts_with("probe-unclear: "), "{unclear:?}");
        assert!(found[0].contains("EIO"), "{unclear:?}");
    }
}

/// A device whose packets are lost: each pair takes its whole time, and the last ones get none.
#[test]
fn a_device_that_does_not_answer() {
    let silent = on("silent");
    let (told, notes) = (silent.told(), silent.notes());
    let lost = |line: &String| line.starts_with("dead-registration: ") && line.contains("(they time out)");
    assert!(!told.is_empty() && told.iter().all(lost), "{told:?}");
    let count = silent.pairs().iter().filter(|pair| pair.ends_with(" +.....")).count();
    let untried = format!(
        "untried: {count} pairs of exporter and device were not tried, since the others took all the time"
    );
    assert!(count > 0 && notes.contains(&untried), "{notes:?}");
    assert_eq!((silent.grade(), silent.status), ("D", 1));
}
