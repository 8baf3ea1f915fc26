//! A model for the tests: a list as the addresses of all its bytes, and the rules for pages applied to each
//! of them. It shares no arithmetic with the code.

use crate::{DmaSg, DmaSgBuilder, DmaSgList, DmaSgView};
use proptest::prelude::*;

/// The address of each byte.
pub fn bytes(view: DmaSgView<'_>) -> Vec<u64> {
    view.runs().flat_map(|run| run.addr..run.addr + run.len).collect()
}

/// `n` runs of different lengths, none contiguous with another.
pub fn scattered(n: usize) -> DmaSgList {
    DmaSgList::from_runs((0..n as u64).map(|i| DmaSg { addr: i * 100, len: 1 + i % 7 })).unwrap()
}

/// Lists with few enough bytes to count: long and short, merged and not, aligned and not, with contiguous
/// runs and with repeated addresses.
pub fn list() -> impl Strategy<Value = DmaSgList> {
    let run = (0..40_u64, 0..4_u32, 1..9_u64, 0..4_u32, any::<bool>());
    (prop::collection::vec((run, 0..3_u8), 1..40), 0..6_u32).prop_map(|(runs, align)| {
        let mut builder = DmaSgBuilder::new();
        let mut end = 0;
        for ((at, shift, n, size, unmerged), kind) in runs {
            // A third of the runs continue the one before; `align` makes lists that have a page size.
            let addr = if kind == 0 { end } else { (at << shift) << align };
            let run = DmaSg { addr, len: if align < 3 { n << size } else { (n % 4 + 1) << align } };
            end = run.addr + run.len;
            if unmerged { builder.push_unmerged(run) } else { builder.push(run) }.unwrap();
        }
        builder.finish().unwrap()
    })
}

/// A list, and the offset and the length of a range in it.
pub fn range() -> impl Strategy<Value = (DmaSgList, u64, u64)> {
    list().prop_flat_map(|list| {
        let total = list.total_len();
        (Just(list), 0..total)
            .prop_flat_map(move |(list, offset)| (Just(list), Just(offset), 1..=total - offset))
    })
}

/// Numbers near overflow and near powers of two.
pub fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..3_u64,
        (0..64_u32, 0..3_u64).prop_map(|(bit, off)| (1_u64 << bit).wrapping_add(off).wrapping_sub(1)),
        (0..3_u64).prop_map(|off| u64::MAX - off),
        any::<u64>(),
    ]
}

/// The addresses of bytes that are mapped at `iova`.
pub struct MappedBytes<'a> {
    pub bytes: &'a [u64],
    pub iova: u64,
}

impl MappedBytes<'_> {
    /// The page numbers, each with the iovas and addresses of its bytes.
    fn pages(&self, size: u64) -> Vec<(u64, Vec<(u64, u64)>)> {
        let mut pages: Vec<(u64, Vec<(u64, u64)>)> = Vec::new();
        for (at, &addr) in self.bytes.iter().enumerate() {
            let va = self.iova + at as u64;
            match pages.last_mut() {
                Some((page, bytes)) if *page == va / size => bytes.push((va, addr)),
                _ => pages.push((va / size, vec![(va, addr)])),
            }
        }
        pages
    }

    pub fn count(&self, size: u64) -> u64 {
        self.pages(size).len() as u64
    }

    /// The block behind each page, if every page is a single block.
    pub fn blocks(&self, size: u64) -> Option<Vec<u64>> {
        let block = |(_, bytes): (u64, Vec<(u64, u64)>)| {
            let block = bytes[0].1 / size * size;
            let one = bytes.iter().all(|&(va, addr)| addr / size * size == block && addr % size == va % size);
            one.then_some(block)
        };
        self.pages(size).into_iter().map(block).collect()
    }

    /// The largest supported size whose pages are single blocks, but no larger than the smallest that holds
    /// all bytes in one page. The kernel does not count a page of one byte as such.
    pub fn best(&self, supported: u64) -> Option<u64> {
        let sizes: Vec<_> = (0..64).map(|bit| 1_u64 << bit).filter(|size| supported & size != 0).collect();
        let enough =
            sizes.iter().copied().find(|&size| size > 1 && self.count(size) == 1).unwrap_or(u64::MAX);
        sizes.into_iter().filter(|&size| size <= enough && self.blocks(size).is_some()).max()
    }
}

/// The kernel's formula step by step: bit masks over the entries of a scatterlist, and 0 if no size fits. The
/// last iova is computed in 128 bits to detect overflow.
pub fn kernel_best(list: &DmaSgList, supported: u64, iova: u64) -> u64 {
    let last = u128::from(iova) + u128::from(list.total_len()) - 1;
    if last > u128::from(u64::MAX) {
        return 0;
    }
    let changing = last as u64 ^ iova;
    let covering =
        (0..64).filter(|&bit| bit >= 1 && changing >> bit == 0).fold(0, |mask, bit| mask | 1_u64 << bit);
    let mut mask = supported & covering;
    let (mut va, mut end) = (iova, None);
    for (at, run) in list.runs().iter().enumerate() {
        if end != Some(run.addr) {
            mask |= run.addr ^ va;
            if at != 0 {
                mask |= va;
            }
        }
        end = Some(run.addr + run.len);
        va = va.wrapping_add(run.len);
    }
    let fits = |bit: &u64| supported >> bit & 1 == 1 && (0..*bit).all(|lower| mask >> lower & 1 == 0);
    (0..64).rev().find(fits).map_or(0, |bit| 1 << bit)
}
