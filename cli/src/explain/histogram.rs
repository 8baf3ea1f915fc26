//! A histogram of the segments by length, in powers of two.

use dma_sg::{DmaSgList, Size};

use crate::ui;

/// Columns of the longest bar.
const WIDTH: usize = 40;
/// A column in eighths.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// Draws a row for each power of two from the shortest to the longest segment. A bar shows the bytes in
/// segments of that length.
pub fn draw(list: &DmaSgList) {
    let mut buckets = [(0_u64, 0_u64); 64];
    for run in list.runs() {
        let (segments, bytes) = &mut buckets[run.len.max(1).ilog2() as usize];
        *segments += 1;
        *bytes += run.len;
    }
    let filled = |bucket: &(u64, u64)| bucket.0 > 0;
    let first = buckets.iter().position(filled).unwrap_or(0);
    let last = buckets.iter().rposition(filled).unwrap_or(0);
    let most = buckets.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
    ui::line(format!("\n{:>10}  {:>8}  bytes", "length ≥", "segments"));
    for (power, (segments, bytes)) in buckets.iter().enumerate().take(last + 1).skip(first) {
        let label = Size(1 << power).to_string();
        let bar = bar(*bytes, most);
        let space = if bar.is_empty() { "" } else { " " };
        ui::line(format!("{label:>10}  {segments:>8}  {bar}{space}{}", Size(*bytes)));
    }
}

/// A bar for `part` of `most` bytes. Every part but 0 is visible.
fn bar(part: u64, most: u64) -> String {
    let eighths = (u128::from(part) * (8 * WIDTH) as u128).div_ceil(u128::from(most.max(1))) as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}
