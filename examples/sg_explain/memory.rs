//! What the kernel calls the memory at an address: /proc/iomem.

use std::collections::BTreeMap;
use std::fs;

use dmabuf_rdma::sg::DmaSgList;

/// The innermost names of /proc/iomem at the segments' beginnings, with how many bytes those have;
/// nothing where it cannot be read (to all but root it shows zeros).
pub fn places(list: &DmaSgList) -> Vec<(String, u64)> {
    let text = fs::read_to_string("/proc/iomem").unwrap_or_default();
    let areas: Vec<_> = text.lines().filter_map(area).collect();
    let mut places: BTreeMap<&str, u64> = BTreeMap::new();
    for run in list.runs() {
        // Inner areas follow the ones around them.
        let inside = areas.iter().rev().find(|(start, end, _)| (*start..=*end).contains(&run.addr));
        if let Some((_, _, name)) = inside {
            *places.entry(name).or_default() += run.len;
        }
    }
    places.into_iter().map(|(name, bytes)| (name.to_string(), bytes)).collect()
}

/// `  fa000000-faffffff : 0000:04:00.0`
fn area(line: &str) -> Option<(u64, u64, &str)> {
    let (range, name) = line.trim().split_once(" : ")?;
    let (start, end) = range.split_once('-')?;
    let area = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?, name);
    (area.1 > 0).then_some(area)
}
