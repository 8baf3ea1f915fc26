//! The kernel's names of memory, from /proc/iomem.

use std::collections::BTreeMap;
use std::fs;

use dma_sg::DmaSgList;

/// The innermost name in /proc/iomem at the first address of each segment, with the number of bytes in such
/// segments. It is empty without root, because the file then shows zeros.
pub fn places(list: &DmaSgList) -> Vec<(String, u64)> {
    let text = fs::read_to_string("/proc/iomem").unwrap_or_default();
    let areas: Vec<_> = text.lines().filter_map(area).collect();
    let mut places: BTreeMap<&str, u64> = BTreeMap::new();
    for run in list.runs() {
        // An inner area follows the one around it.
        let inside = areas.iter().rev().find(|(start, end, _)| (*start..=*end).contains(&run.addr));
        if let Some((_, _, name)) = inside {
            *places.entry(name).or_default() += run.len;
        }
    }
    places.into_iter().map(|(name, bytes)| (name.to_string(), bytes)).collect()
}

/// Parses `  fa000000-faffffff : 0000:04:00.0`.
fn area(line: &str) -> Option<(u64, u64, &str)> {
    let (range, name) = line.trim().split_once(" : ")?;
    let (start, end) = range.split_once('-')?;
    let area = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?, name);
    (area.1 > 0).then_some(area)
}
