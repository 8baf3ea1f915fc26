//! All output except the histogram.

use std::error::Error;
use std::fmt::Display;

use dma_sg::{DmaSgList, Iova, PageSizes, Size, page_size};

pub fn row(what: &str, text: impl Display) {
    println!("{what:>10}  {text}");
}

pub fn list(list: &DmaSgList) {
    let runs = list.runs();
    row("list", list);
    let sizes = runs.iter().map(|run| run.len);
    let (shortest, longest) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
    let lowest = runs.iter().map(|run| run.addr).min().unwrap_or(0);
    let highest = runs.iter().map(|run| run.addr + (run.len - 1)).max().unwrap_or(0);
    let lengths = if shortest == longest { "of" } else { &format!("of {} to", Size(shortest)) };
    row("segments", format!("{lengths} {}, from {lowest:#x} to {highest:#x}", Size(longest)));
    // An iova congruent to the first address allows the largest pages.
    let iova = Iova(list.as_view().start_addr());
    match list.best_page_size(PageSizes::ALL, iova).and_then(|size| Ok((size, list.num_blocks(size, iova)?)))
    {
        Ok((size, blocks)) => {
            let small = list.num_blocks(page_size(), iova).unwrap_or(blocks);
            let entries = if blocks == 1 { "entry" } else { "entries" };
            let saved = if blocks < small { &format!(" instead of {small}") } else { "" };
            row("best page", format!("{}: {blocks} {entries} in a device's table{saved}", Size(size)));
        }
        Err(error) => row("best page", error),
    }
}

pub fn places(places: &[(String, u64)]) {
    for (number, (name, bytes)) in places.iter().enumerate() {
        row(if number == 0 { "where" } else { "" }, format!("{name}: {}", Size(*bytes)));
    }
}

pub fn failure(error: &dyn Error) {
    eprintln!("{:>10}  {error}", "failed");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("{:>10}  caused by: {error}", "");
        cause = error.source();
    }
}
