//! Reads physical memory through /proc/kcore.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// A segment of physical memory in the file.
struct Segment {
    physical: u64,
    length: u64,
    offset: u64,
}

pub struct Kcore {
    file: File,
    segments: Vec<Segment>,
}

impl Kcore {
    /// Opens /proc/kcore, which needs root and CAP_SYS_RAWIO.
    #[track_caller]
    pub fn open() -> Self {
        let file = File::open("/proc/kcore").expect("/proc/kcore");
        let mut header = [0; 64];
        file.read_exact_at(&mut header, 0).expect("ELF header");
        assert_eq!(&header[..5], b"\x7fELF\x02", "a 64-bit ELF file");
        let word = |bytes: &[u8], at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let half = |at: usize| u64::from(u16::from_ne_bytes(header[at..at + 2].try_into().unwrap()));
        let (start, size, count) = (word(&header, 32), half(54), half(56));
        let segments = (0..count).filter_map(|number| {
            let mut program = [0; 56];
            file.read_exact_at(&mut program, start + number * size).expect("program header");
            let (offset, physical, length) = (word(&program, 8), word(&program, 24), word(&program, 32));
            // PT_LOAD with a physical address.
            (program[..4] == [1, 0, 0, 0] && physical != u64::MAX).then_some(Segment {
                physical,
                length,
                offset,
            })
        });
        let segments = segments.collect();
        Self { file, segments }
    }

    /// Reads the bytes at a physical address, which must be RAM.
    #[track_caller]
    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        let end = address + bytes.len() as u64;
        let segment = self.segments.iter().find(|s| s.physical <= address && end <= s.physical + s.length);
        let segment = segment.unwrap_or_else(|| panic!("/proc/kcore has no RAM at {address:#x} to {end:#x}"));
        self.file.read_exact_at(bytes, segment.offset + (address - segment.physical)).expect("kcore");
    }

    /// Reads the bytes of all (address, length) runs, concatenated.
    #[track_caller]
    pub fn gather(&self, runs: impl IntoIterator<Item = (u64, u64)>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, length) in runs {
            let at = bytes.len();
            bytes.resize(at + length as usize, 0);
            self.read(address, &mut bytes[at..]);
        }
        bytes
    }
}
