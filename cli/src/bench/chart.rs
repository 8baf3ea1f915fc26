//! The rates as a picture: a line for each operation and batch, over the size of a block.

use std::fmt::Write;

use super::{Operation, Row};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 40.0;
const COLOURS: &[&str] = &["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444"];

pub fn draw(rows: &[Row]) -> String {
    let mut blocks: Vec<u64> = rows.iter().map(|row| row.block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let most = rows.iter().map(|row| row.mib_per_second).fold(1.0, f64::max);
    let steps = (blocks.len().max(2) - 1) as f64;
    let x = |block: u64| {
        let at = blocks.iter().position(|known| *known == block).unwrap_or(0);
        LEFT + (WIDTH - LEFT - RIGHT) * at as f64 / steps
    };
    let y = |rate: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * rate / most;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    // Writing into a String does not fail.
    let mut put = |text: String| {
        let _ = writeln!(svg, "{text}");
    };
    for part in 0..=4 {
        let rate = most * f64::from(part) / 4.0;
        let at = y(rate);
        put(format!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>",
            WIDTH - RIGHT
        ));
        put(format!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{rate:.0} MiB/s</text>",
            LEFT - 6.0,
            at + 4.0
        ));
    }
    for block in &blocks {
        let (at, below) = (x(*block), HEIGHT - BOTTOM + 18.0);
        put(format!(
            "<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{}</text>",
            dma_sg::Size(*block)
        ));
    }
    let mut lines: Vec<(Operation, u64)> = Vec::new();
    for row in rows {
        if !lines.contains(&(row.operation, row.batch)) {
            lines.push((row.operation, row.batch));
        }
    }
    for (number, (operation, batch)) in lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let of_line = rows.iter().filter(|row| (row.operation, row.batch) == (*operation, *batch));
        let points: Vec<_> = of_line.map(|row| (x(row.block), y(row.mib_per_second))).collect();
        let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        put(format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        ));
        for (x, y) in points {
            put(format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
        }
        let at = TOP + 16.0 * (number as f64 + 1.0);
        let name = format!("{operation:?}").to_lowercase();
        put(format!(
            "<text x=\"{}\" y=\"{at}\" fill=\"{colour}\">{name}, {batch} blocks</text>",
            WIDTH - RIGHT + 10.0
        ));
    }
    svg + "</svg>\n"
}
