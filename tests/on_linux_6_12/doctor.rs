//! `dmabuf-rdma doctor` with cards of all kinds, one of which has no struct pages here.

use crate::common::doctor::Doctor;
use crate::common::drm::card;
use crate::common::peers::import_path;
use crate::common::system::cameras;
use crate::doctor::{all_pairs, heaps};

/// Cards with memory that devices take, and bochs, whose video memory soft-RoCE does not reach.
#[test]
fn cards_and_cameras() {
    let names = ["vgem", "virtio_gpu", "bochs-drm"];
    let cards = names.map(card);
    let nodes = cameras();
    let seen = Doctor::new().with_cards().run();
    drop(cards);
    let path = import_path().to_string();
    let mut pairs = all_pairs(&["rxe0", "rxe1"]);
    let at = 2 * (1 + heaps().len());
    let of_cards: Vec<_> = seen.pairs().into_iter().filter(|pair| pair.starts_with("drm ")).collect();
    for device in ["rxe0", "rxe1"] {
        for name in ["vgem", "virtio_gpu"] {
            assert!(of_cards.contains(&format!("drm {name} {device} {path} ++++++")), "{of_cards:?}");
        }
        assert!(of_cards.contains(&format!("drm bochs-drm {device} none +-....")), "{of_cards:?}");
    }
    assert_eq!(of_cards.len(), 6, "{of_cards:?}");
    pairs.splice(at..at, of_cards);
    assert_eq!(seen.pairs(), pairs);
    let told = seen.told();
    let without = |device: &str| {
        format!(
            "memory-without-pages: {device} imports dma-bufs, but not memory without struct pages: video memory or a PCI BAR (ENOSYS) -> use a NIC that does peer-to-peer DMA, or a buffer in system memory (udmabuf, a dma-heap)"
        )
    };
    assert_eq!(told, ["rxe0", "rxe1"].map(without));
    assert_eq!(seen.grade(), "B");
    let known: Vec<_> = seen.json["facts"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["path"].as_str().unwrap())
        .collect();
    assert!(nodes.iter().all(|node| known.contains(node)), "{known:?}");
}
