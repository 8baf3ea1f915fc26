//! The scatter list with 64-bit lengths.
//!
//! A dma-buf as a device addresses it is a list of runs, and a run of GPU memory is easily larger than
//! 4 GiB; hence a `u64` where `ibv_sge` and the kernel's scatterlist have 32 bits.

/// One run of device addresses: `len` bytes from `addr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DmaSg {
    /// First address, in the address space of whom the list is for.
    pub addr: u64,
    /// Length in bytes, never 0 in a [`DmaSgList`].
    pub len: u64,
}

/// A list of runs, in the order of the bytes they hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DmaSgList {
    runs: Box<[DmaSg]>,
}

impl DmaSgList {
    /// A list of one run. Whoever calls has checked it: not empty, no overflow.
    pub(crate) fn single(run: DmaSg) -> Self {
        debug_assert!(run.len > 0 && run.addr.checked_add(run.len).is_some());
        Self { runs: Box::new([run]) }
    }

    /// The runs, in order.
    pub fn runs(&self) -> &[DmaSg] {
        &self.runs
    }

    /// Length of all runs together in bytes.
    pub fn total_len(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// The run that holds the byte at `offset` of the list, cut so that it begins with that byte;
    /// `None` past the end.
    pub fn run_at(&self, mut offset: u64) -> Option<DmaSg> {
        for run in &self.runs {
            if offset < run.len {
                return Some(DmaSg { addr: run.addr + offset, len: run.len - offset });
            }
            offset -= run.len;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_found_in_its_run() {
        let runs = [DmaSg { addr: 0x1000, len: 0x1000 }, DmaSg { addr: 1 << 40, len: 5 << 30 }];
        let list = DmaSgList { runs: Box::new(runs) };
        assert_eq!(list.total_len(), (5 << 30) + 0x1000);
        assert_eq!(list.run_at(0xfff), Some(DmaSg { addr: 0x1fff, len: 1 }));
        assert_eq!(list.run_at(0x1000), Some(runs[1]));
        assert_eq!(list.run_at((5 << 30) + 0xfff).map(|run| run.len), Some(1));
        assert_eq!(list.run_at((5 << 30) + 0x1000), None);
    }
}
