//! Rows and a table of what was measured.

use super::common::{Pair, Peer as Compared, Result, Rows, Spread};
use super::layout::Load;
use super::{KIB, MIB, Peer};

/// Lines of Markdown.
#[derive(Default)]
pub struct Table(Vec<String>);

impl Table {
    pub fn print(&self) {
        println!("\n| blocks | by | memory | blocks/s | MiB/s | this library / it |\n|---|---|---|---|---|---|");
        self.0.iter().for_each(|line| println!("{line}"));
        println!();
    }
}

/// Adds the rates of a load. The library is the first.
pub fn add(rows: &mut Rows, table: &mut Table, load: Load, rates: &[(Peer, Vec<f64>)]) -> Result<()> {
    let ours = &rates[0].1;
    for (peer, theirs) in rates {
        let name = format!("{}, {}", load.name(), peer.name());
        let mib = theirs.iter().map(|rate| rate * load.size as f64 / MIB as f64);
        let of = Spread::of(mib);
        // One line in the chart goes through one load of each size.
        match load.count {
            100_000.. => rows.add(&name, "MiB/s", of, None, None)?,
            _ => rows.add_point(&name, "MiB/s", of, peer.name(), load.size)?,
        }
        let pairs: Vec<_> =
            ours.iter().zip(theirs).map(|(library, bare)| Pair { library: *library, bare: *bare }).collect();
        let compared = Compared::of(&pairs);
        let memory = match peer {
            Peer::Library | Peer::Asleep | Peer::Hand => "dma-bufs",
            Peer::Nixl | Peer::Mooncake => "host",
            Peer::Perftest | Peer::Ucx => "host, one block",
        };
        let (low, rate, high) = quartiles(theirs);
        let ratio = match peer {
            Peer::Library => String::new(),
            _ => format!("{:.2} ({:.2} to {:.2})", compared.ratio, compared.half.0, compared.half.1),
        };
        table.0.push(format!(
            "| {} | {} | {memory} | {rate:.0} ({low:.0} to {high:.0}) | {:.1} | {ratio} |",
            load.name(),
            peer.name(),
            of.median
        ));
        if *peer != Peer::Library {
            let of = Spread::of(ours.iter().copied());
            let row = format!("{} x {} KiB, against {}", load.count, load.size / KIB, peer.name());
            rows.add(&row, "blocks/s", of, Some(compared), peer.goal(load.size))?;
        }
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
