//! A range of registered memory, as transfers, work requests and descriptions for a peer take it.
//!
//! [`SliceCursor`] is the one place that cuts registered memory into scatter/gather elements.

use std::any::Any;
use std::fmt;
use std::ops::RangeBounds;
use std::sync::Arc;

use dma_sg::{Iova, RangeError, check_range, resolve_range};

use super::{Access, MemoryRegion, RegionSet, RemoteRegion, RemoteRun};
use crate::verbs::{self, Lkey, Sge, ffi};

/// Longest scatter/gather element in bytes.
pub(super) const MAX_SGE_LEN: u64 = dma_sg::MAX_SGE_LEN as u64;

/// A byte range of registered memory: of a region, of a set, of a cached region, or of several of these
/// [in a row](Self::concat).
///
/// A slice is a handle, cheap to clone and to [slice](Self::slice) again. It keeps its memory registered; a
/// transfer holds its slice until the device is done.
#[derive(Clone)]
pub struct RegionSlice {
    memory: Memory,
    offset: u64,
    length: u64,
}

/// What a slice is a range of.
#[derive(Clone)]
enum Memory {
    Region(MemoryRegion),
    Set(RegionSet),
    List(Arc<List>),
    Kept(Arc<Kept>),
}

/// Memory with what else must live as long as somebody uses it.
struct Kept {
    memory: Memory,
    _keeper: Box<dyn Any + Send + Sync>,
}

/// Ranges of regions in a row.
struct List {
    segments: Vec<ListSegment>,
    length: u64,
    /// Those of its slices.
    kept: Vec<Arc<Kept>>,
}

struct ListSegment {
    region: MemoryRegion,
    offset: u64,
    length: u64,
    /// Offset of its first byte in the list.
    start: u64,
}

/// A byte range of one region.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub region: &'a MemoryRegion,
    /// Offset in the region.
    pub offset: u64,
    pub length: u64,
}

impl Segment<'_> {
    fn addr(&self) -> u64 {
        // Cannot overflow: `Umem::new` checked the end of the region.
        self.region.iova().0 + self.offset
    }
}

impl Memory {
    fn len(&self) -> u64 {
        match self {
            Self::Region(region) => region.len(),
            Self::Set(set) => set.len(),
            Self::List(list) => list.length,
            Self::Kept(kept) => kept.memory.len(),
        }
    }

    /// The index of the segment with the byte at `offset`, and the offset of that segment's first byte.
    fn find(&self, offset: u64) -> (usize, u64) {
        match self {
            Self::Region(_) => (0, 0),
            Self::Set(set) => set.find(offset),
            Self::List(list) => {
                let index = list.segments.partition_point(|segment| segment.start <= offset) - 1;
                (index, list.segments[index].start)
            }
            Self::Kept(kept) => kept.memory.find(offset),
        }
    }

    fn segment(&self, index: usize) -> Option<Segment<'_>> {
        match self {
            Self::Region(region) => (index == 0).then(|| Segment { region, offset: 0, length: region.len() }),
            Self::Set(set) => {
                set.chunks().get(index).map(|region| Segment { region, offset: 0, length: region.len() })
            }
            Self::List(list) => {
                let ListSegment { region, offset, length, .. } = list.segments.get(index)?;
                Some(Segment { region, offset: *offset, length: *length })
            }
            Self::Kept(kept) => kept.memory.segment(index),
        }
    }

    fn is_shared(&self) -> bool {
        match self {
            Self::Region(region) => region.is_shared(),
            Self::Set(set) => set.is_shared(),
            Self::List(list) => {
                Arc::strong_count(list) > 1 || list.segments.iter().any(|segment| segment.region.is_shared())
            }
            Self::Kept(kept) => Arc::strong_count(kept) > 1 || kept.memory.is_shared(),
        }
    }
}

impl RegionSlice {
    fn whole(memory: Memory) -> Self {
        let length = memory.len();
        Self { memory, offset: 0, length }
    }

    /// The same slice, which also holds `keeper`: slices of it, tables and transfers of it hold it too, and the last of
    /// them drops it. A region of a runtime's memory does not keep the tensor whose bytes it has, and the framework may
    /// give these to another one; a slice that keeps the tensor prevents that.
    ///
    /// It is dropped by whoever has the last slice, after the device is done: on any thread, also in a child of `fork`.
    #[must_use]
    pub fn keeping(self, keeper: impl Any + Send + Sync) -> Self {
        let kept = Kept { memory: self.memory, _keeper: Box::new(keeper) };
        Self { memory: Memory::Kept(Arc::new(kept)), ..self }
    }

    /// A range of this slice, already checked.
    pub(super) fn part(&self, offset: u64, length: u64) -> Self {
        debug_assert!(check_range(offset, length, self.length).is_ok());
        Self { memory: self.memory.clone(), offset: self.offset + offset, length }
    }

    /// Whether other handles of its memory live.
    pub(super) fn is_shared(&self) -> bool {
        self.memory.is_shared()
    }

    /// Joins several slices into one, in this order: rows of an image, pages of a cache, regions of different
    /// buffers. A transfer requires all of them in its connection's protection domain.
    ///
    /// ```no_run
    /// # use dmabuf_rdma::{MemoryRegion, RegionSlice};
    /// # fn f(image: &MemoryRegion, header: RegionSlice) -> Result<(), dma_sg::RangeError> {
    /// let rows = RegionSlice::concat((0..1080).map(|row| image.slice(row * 8192..row * 8192 + 7680).unwrap()))?;
    /// let both = RegionSlice::concat([header, image.into()])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// - [`RangeError::Empty`]: `slices` is empty.
    /// - [`RangeError::OutOfRange`]: the total length does not fit in 64 bits.
    pub fn concat(slices: impl IntoIterator<Item = impl Into<Self>>) -> Result<Self, RangeError> {
        let mut list = List { segments: Vec::new(), length: 0, kept: Vec::new() };
        for slice in slices {
            let slice = slice.into();
            match &slice.memory {
                Memory::Kept(kept) => list.kept.push(kept.clone()),
                Memory::List(other) => list.kept.extend(other.kept.iter().cloned()),
                Memory::Region(_) | Memory::Set(_) => {}
            }
            for Segment { region, offset, length } in slice.segments() {
                let start = list.length;
                list.length = start.checked_add(length).ok_or(RangeError::OutOfRange {
                    offset: start,
                    length,
                    size: u64::MAX,
                })?;
                list.segments.push(ListSegment { region: region.clone(), offset, length, start });
            }
        }
        if list.segments.is_empty() {
            return Err(RangeError::Empty { offset: 0 });
        }
        Ok(Self::whole(Memory::List(Arc::new(list))))
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty slice cannot be made
    pub fn len(&self) -> u64 {
        self.length
    }

    /// A byte range of this slice.
    ///
    /// # Errors
    /// [`RangeError`]: the range is empty, inverted, or not inside the slice.
    pub fn slice(&self, range: impl RangeBounds<u64>) -> Result<Self, RangeError> {
        let range = resolve_range(range, self.length)?;
        let (offset, length) = (self.offset + range.start, range.end - range.start);
        Ok(Self { memory: self.memory.clone(), offset, length })
    }

    /// Address of the first byte in work requests. Only a slice of one region or set has consecutive addresses.
    pub fn iova(&self) -> Iova {
        Iova(self.first().addr())
    }

    /// The regions of the slice, in the order of its bytes. A region may occur several times.
    pub fn regions(&self) -> impl Iterator<Item = &MemoryRegion> {
        self.segments().map(|segment| segment.region)
    }

    /// The region with the first byte; the only one unless the slice spans several.
    pub fn region(&self) -> &MemoryRegion {
        self.first().region
    }

    /// The access flags that all regions of the slice have.
    pub fn access(&self) -> Access {
        self.regions().fold(Access::all(), |access, region| access & region.access())
    }

    /// The slice as one scatter/gather element, for [`QueuePair::post`](verbs::QueuePair::post).
    ///
    /// # Errors
    /// [`verbs::Error::RequestTooLarge`]: the slice spans several regions, or is longer than 4 GiB less 4 KiB. Use
    /// [`sges`](Self::sges).
    pub fn sge(&self) -> verbs::Result<Sge<'_>> {
        let limit = self.first().length.min(MAX_SGE_LEN);
        if self.length > limit {
            return Err(verbs::Error::sge_too_long(self.length, limit));
        }
        let region = self.region();
        Ok(Sge::new(region.domain(), self.iova().0, self.length as u32, region.lkey()))
    }

    /// The slice as scatter/gather elements, cut at the end of each region and after 4 GiB less 4 KiB.
    pub fn sges(&self) -> Vec<Sge<'_>> {
        let (mut cursor, mut elements) = (SliceCursor::new(self, 0), Vec::new());
        let mut left = self.length;
        while left > 0 {
            let domain =
                self.memory.segment(cursor.index).expect("the cursor is inside the slice").region.domain();
            let element = cursor.next_element(self, left);
            left -= u64::from(element.length);
            elements.push(Sge::new(domain, element.addr, element.length, Lkey(element.lkey)));
        }
        elements
    }

    /// The description that a peer needs to access the slice: one run for each region, with its remote key. The
    /// description covers only the slice, but each key permits access to its whole region.
    pub fn remote(&self) -> RemoteRegion {
        let runs = self.segments().map(|segment| RemoteRun {
            iova: Iova(segment.addr()),
            length: segment.length,
            rkey: segment.region.rkey(),
        });
        RemoteRegion::new(runs, self.access(), self.region().umem().buffer())
            .expect("segments are not empty and lie inside their regions")
    }

    fn first(&self) -> Segment<'_> {
        self.segments().next().expect("a slice is not empty")
    }

    /// The parts of the slice, one for each region that it spans.
    pub(crate) fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        let (first, start) = self.memory.find(self.offset);
        let (mut skip, mut left) = (self.offset - start, self.length);
        (first..).map_while(move |index| {
            if left == 0 {
                return None;
            }
            let Segment { region, offset, length } = self.memory.segment(index)?;
            let segment = Segment { region, offset: offset + skip, length: (length - skip).min(left) };
            skip = 0;
            left -= segment.length;
            Some(segment)
        })
    }
}

impl fmt::Debug for RegionSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionSlice")
            .field("iova", &self.iova())
            .field("length", &self.length)
            .field("region", self.region())
            .finish_non_exhaustive()
    }
}

impl From<MemoryRegion> for RegionSlice {
    /// The whole region.
    fn from(region: MemoryRegion) -> Self {
        Self::whole(Memory::Region(region))
    }
}

impl From<&MemoryRegion> for RegionSlice {
    /// The whole region.
    fn from(region: &MemoryRegion) -> Self {
        region.clone().into()
    }
}

impl From<RegionSet> for RegionSlice {
    /// The whole set.
    fn from(set: RegionSet) -> Self {
        Self::whole(Memory::Set(set))
    }
}

impl From<&RegionSet> for RegionSlice {
    /// The whole set.
    fn from(set: &RegionSet) -> Self {
        set.clone().into()
    }
}

impl From<&RegionSlice> for RegionSlice {
    fn from(slice: &RegionSlice) -> Self {
        slice.clone()
    }
}

/// A position in a slice, with the rest of its segment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SliceCursor {
    addr: u64,
    left: u64,
    lkey: Lkey,
    /// Index of the segment.
    index: usize,
}

impl SliceCursor {
    /// A cursor at the byte at `offset`, which is inside the slice.
    pub(crate) fn new(slice: &RegionSlice, offset: u64) -> Self {
        let offset = slice.offset + offset;
        let (index, start) = slice.memory.find(offset);
        let segment = slice.memory.segment(index).expect("the offset is inside the slice");
        Self::at(segment, index, offset - start)
    }

    fn at(segment: Segment<'_>, index: usize, skip: u64) -> Self {
        Self { addr: segment.addr() + skip, left: segment.length - skip, lkey: segment.region.lkey(), index }
    }

    /// Adds the next bytes of the slice to the first `count` of `elements` and advances. An element that follows the
    /// last one in its region extends it. The caller ensures that the slice has `max_bytes` left. Returns the bytes
    /// added, less than `max_bytes` if the elements are used up.
    pub(crate) fn gather(
        &mut self,
        slice: &RegionSlice,
        max_bytes: u64,
        elements: &mut [ffi::ibv_sge],
        count: &mut usize,
    ) -> u64 {
        let mut bytes = 0;
        while bytes < max_bytes {
            let before = count.checked_sub(1).map(|last| &mut elements[last]);
            let adjoining = before.filter(|before| {
                before.lkey == self.lkey.0
                    && before.addr.wrapping_add(before.length.into()) == self.addr
                    && u64::from(before.length) < MAX_SGE_LEN
            });
            if let Some(before) = adjoining {
                let room = MAX_SGE_LEN - u64::from(before.length);
                let more = self.next_element(slice, room.min(max_bytes - bytes)).length;
                before.length += more;
                bytes += u64::from(more);
                continue;
            }
            let Some(element) = elements.get_mut(*count) else { break };
            *element = self.next_element(slice, max_bytes - bytes);
            *count += 1;
            bytes += u64::from(element.length);
        }
        bytes
    }

    /// The next element: at most `max_bytes` (not 0), and at most to the end of the segment.
    fn next_element(&mut self, slice: &RegionSlice, max_bytes: u64) -> ffi::ibv_sge {
        let length = self.left.min(max_bytes).min(MAX_SGE_LEN);
        let element = ffi::ibv_sge { addr: self.addr, length: length as u32, lkey: self.lkey.0 };
        (self.addr, self.left) = (self.addr + length, self.left - length);
        if self.left == 0 {
            // After the last segment the cursor stays at its end.
            if let Some(next) = slice.memory.segment(self.index + 1) {
                *self = Self::at(next, self.index + 1, 0);
            }
        }
        element
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mr::tests::fake;
    use proptest::prelude::*;

    fn bytes(slice: &RegionSlice) -> Vec<u64> {
        slice.segments().flat_map(|segment| segment.addr()..segment.addr() + segment.length).collect()
    }

    fn list(segments: &[(u64, u64)]) -> RegionSlice {
        let region = fake::region(1 << 40, Access::LOCAL_WRITE);
        RegionSlice::concat(segments.iter().map(|&(at, length)| region.slice(at..at + length).unwrap()))
            .unwrap()
    }

    #[test]
    fn an_element_has_32_bits() {
        let slice = RegionSlice::from(fake::region(10 << 30, Access::empty()));
        let lengths: Vec<_> = slice.sges().iter().map(Sge::len).collect();
        assert_eq!(lengths, [0xffff_f000, 0xffff_f000, 0x8000_2000]);
        match slice.sge() {
            Err(verbs::Error::RequestTooLarge { count: 0x2_8000_0000, limit: 0xffff_f000, .. }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(slice.slice(..0xffff_f000).unwrap().sge().unwrap().len(), 0xffff_f000);
        // The guides state this limit, whatever the machine's page size.
        let guides = [include_str!("../../docs/transfer.md"), include_str!("../../docs/errors.md")];
        assert!(guides.iter().all(|guide| guide.contains("4 GiB less 4 KiB")));
    }

    #[test]
    fn slices_keep_their_region_registered() {
        let region = fake::region(100, Access::empty());
        let (slice, remote) = (region.slice(10..20).unwrap(), region.remote());
        assert!(matches!(
            region.clone().deregister(),
            Err(crate::mr::DeregisterError::InUse { handles: 2, .. })
        ));
        match region.deregister() {
            Err(crate::mr::DeregisterError::InUse { region, handles: 1 }) => drop(region),
            other => panic!("{other:?}"),
        }
        assert_eq!((slice.iova(), slice.len(), remote.len()), (Iova(10), 10, 100));
        assert!(!slice.region().is_shared());
        assert_eq!(slice.slice(3..).unwrap().slice(..=1).unwrap().iova(), Iova(13));
        assert_eq!(
            slice.slice(..11).unwrap_err(),
            RangeError::OutOfRange { offset: 0, length: 11, size: 10 }
        );
    }

    #[test]
    fn the_last_slice_drops_what_it_keeps() {
        let (first, second) = (Arc::new(1), Arc::new(2));
        let slice = RegionSlice::from(fake::region(100, Access::empty())).keeping(first.clone());
        let part = slice.keeping(second.clone()).slice(10..20).unwrap();
        let list = RegionSlice::concat([RegionSlice::concat([&part]).unwrap(), part.clone()]).unwrap();
        let table = list.slice(5..).unwrap().strided(1, 1, 3).unwrap();
        drop((part, list));
        assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (2, 2));
        drop(table);
        assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (1, 1));
    }

    #[test]
    fn an_empty_concatenation_is_refused() {
        assert_eq!(RegionSlice::concat([] as [RegionSlice; 0]).unwrap_err(), RangeError::Empty { offset: 0 });
        let whole = RegionSlice::from(fake::region(u64::MAX, Access::empty()));
        assert!(matches!(RegionSlice::concat([&whole, &whole]), Err(RangeError::OutOfRange { .. })));
    }

    #[test]
    fn a_description_for_a_peer_has_only_the_slice() {
        let slice = list(&[(0x1000, 100), (0x9000, 50)]).slice(90..120).unwrap();
        let remote = slice.remote();
        let runs: Vec<_> = remote.runs().iter().map(|run| (run.iova.0, run.length)).collect();
        assert_eq!(runs, [(0x105a, 10), (0x9000, 20)]);
        assert_eq!(remote.access(), Access::LOCAL_WRITE);
    }

    proptest! {
        #[test]
        fn a_slice_has_the_bytes_of_its_range(
            lengths in proptest::collection::vec(1..20_u64, 1..8), from in 0..160_u64, most in 1..160_u64
        ) {
            let segments: Vec<_> =
                lengths.iter().enumerate().map(|(at, length)| (1000 * at as u64, *length)).collect();
            let whole = list(&segments);
            let all = bytes(&whole);
            match whole.slice(from..from + most) {
                Ok(part) => {
                    prop_assert_eq!(part.len(), most);
                    prop_assert_eq!(bytes(&part), &all[from as usize..(from + most) as usize]);
                    let elements = part.sges();
                    prop_assert_eq!(elements.iter().map(|sge| u64::from(sge.len())).sum::<u64>(), most);
                }
                Err(_) => prop_assert!(from + most > whole.len()),
            }
        }
    }
}
