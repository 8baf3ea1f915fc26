//! Rows and a table of what was measured.

use super::common::{Pair, Peer as Compared, Result, Rows, Spread};
use super::layout::Load;
use super::{MIB, Peer};

/// Lines of Markdown.
#[derive(Default)]
pub struct Table(Vec<String>);

impl Table {
    pub fn print(&self) {
        println!(
            "\n| blocks | by | memory | blocks/s | MiB/s | this library, polling / it | this library / it |"
        );
        println!("|---|---|---|---|---|---|---|");
        self.0.iter().for_each(|line| println!("{line}"));
        println!();
    }
}

/// Adds the rates of a load.
pub fn add(rows: &mut Rows, table: &mut Table, load: Load, rates: &[(Peer, Vec<f64>)]) -> Result<()> {
    for (peer, theirs) in rates {
        let name = format!("{}, {}", load.name(), peer.name());
        let of = Spread::of(theirs.iter().map(|rate| rate * load.size as f64 / MIB as f64));
        // One line in the chart goes through one load of each size.
        match load.count {
            100_000.. => rows.add(&name, "MiB/s", of, None, None)?,
            _ => rows.add_point(&name, "MiB/s", of, peer.name(), load.size)?,
        }
        let mut line = vec![load.name(), peer.name().into(), peer.memory().into()];
        let (low, rate, high) = quartiles(theirs);
        line.extend([format!("{rate:.0} ({low:.0} to {high:.0})"), format!("{:.1}", of.median)]);
        for (library, ours) in rates {
            if !library.is_library() && !peer.like().contains(library) {
                continue;
            }
            let pairs = ours.iter().zip(theirs);
            let pairs: Vec<_> =
                pairs.map(|(library, bare)| Pair { library: *library, bare: *bare }).collect();
            let compared = Compared::of(&pairs);
            let Compared { ratio, half: (low, high), .. } = compared;
            let cell = format!("{ratio:.2} ({low:.2} to {high:.2})");
            if library.is_library() {
                line.push(if peer.is_library() { String::new() } else { cell });
            }
            if peer.like().contains(library) {
                let of = Spread::of(ours.iter().copied());
                let row = format!("{}, {} / {}", load.name(), library.name(), peer.name());
                rows.add(&row, "blocks/s", of, Some(compared), peer.goal(load.size))?;
            }
        }
        table.0.push(format!("| {} |", line.join(" | ")));
    }
    Ok(())
}

/// The first quartile, the median and the third.
fn quartiles(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |quarters| sorted[(sorted.len() - 1) * quarters / 4];
    (at(1), sorted[sorted.len() / 2], at(3))
}
