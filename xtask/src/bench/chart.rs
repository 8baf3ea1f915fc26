//! A line chart as SVG, of the rows that have a series and an `x`. The peer's line is dashed, in the same
//! colour.

use super::rows::Row;
use std::fmt::Write;

/// The labels of a chart.
pub struct Labels {
    pub title: &'static str,
    /// Name of the x axis: a size in bytes, with a log2 scale.
    pub x: &'static str,
    /// Name of the peer, whose lines are dashed.
    pub peer: &'static str,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 270.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;

/// Distinguishable in print and for colour-blind readers.
const COLOURS: &[&str] =
    &["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

struct Series<'a> {
    name: &'a str,
    points: Vec<(f64, f64)>,
    /// The peer's points.
    peers: Vec<(f64, f64)>,
}

/// Draws the chart; `None` without points.
pub fn svg(labels: &Labels, rows: &[Row]) -> Option<String> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let (Some(name), Some(x)) = (&row.series, row.x) else { continue };
        let at = series.iter().position(|s| s.name == name).unwrap_or(series.len());
        if at == series.len() {
            series.push(Series { name, points: Vec::new(), peers: Vec::new() });
        }
        series[at].points.push((x, row.value));
        series[at].peers.extend(row.peer_value.map(|value| (x, value)));
    }
    let points = || series.iter().flat_map(|s| s.points.iter().chain(&s.peers));
    let unit = &rows.iter().find(|row| row.series.is_some())?.unit;
    let (low, high) = points().fold((f64::MAX, 0.0_f64), |(low, high), p| (low.min(p.0), high.max(p.0)));
    let step = step(points().map(|p| p.1).fold(0.0, f64::max));
    let top = step * (points().map(|p| p.1).fold(0.0, f64::max) / step).ceil().max(1.0);
    let (low, high) = (low.log2(), high.log2());
    let span = if high > low { high - low } else { 1.0 };
    let at_x = |x: f64| LEFT + (x.log2() - low) / span * (WIDTH - LEFT - RIGHT);
    let at_y = |y: f64| HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM);

    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let label = |x: f64, y: f64, anchor: &str, what: &str| {
        let what = escaped(what);
        format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>\n")
    };
    text += &label(LEFT, TOP - 20.0, "start", &format!("{} ({unit})", labels.title));
    text += &label((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 15.0, "middle", labels.x);
    let mut y = 0.0;
    while y <= top * 1.001 {
        let (line, end) = (at_y(y), WIDTH - RIGHT);
        let _ = writeln!(
            text,
            "<line x1=\"{LEFT}\" y1=\"{line:.1}\" x2=\"{end}\" y2=\"{line:.1}\" stroke=\"#ddd\"/>"
        );
        text += &label(LEFT - 8.0, line + 4.0, "end", &figure(y));
        y += step;
    }
    let mut xs: Vec<f64> = points().map(|p| p.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    for x in xs {
        text += &label(at_x(x), HEIGHT - BOTTOM + 20.0, "middle", &size(x));
    }
    for (number, s) in series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let mut line = |points: &[(f64, f64)], dashes: &str| {
            let path: Vec<_> = points.iter().map(|p| format!("{:.1},{:.1}", at_x(p.0), at_y(p.1))).collect();
            let path = path.join(" ");
            let _ = writeln!(
                text,
                "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>"
            );
        };
        line(&s.points, "");
        if !s.peers.is_empty() {
            line(&s.peers, " stroke-dasharray=\"6 4\"");
        }
        for p in s.points.iter().chain(&s.peers) {
            let (x, y) = (at_x(p.0), at_y(p.1));
            let _ = writeln!(text, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
        }
        let (x, y) = (WIDTH - RIGHT + 20.0, TOP + 22.0 * number as f64);
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"14\" height=\"4\" fill=\"{colour}\"/>",
            y - 6.0
        );
        text += &label(x + 22.0, y, "start", s.name);
    }
    if series.iter().any(|s| !s.peers.is_empty()) {
        let (x, y) = (WIDTH - RIGHT + 20.0, TOP + 22.0 * (series.len() + 1) as f64);
        text += &label(x, y, "start", &format!("dashed: {}", labels.peer));
    }
    text += "</svg>\n";
    Some(text)
}

/// A round distance between grid lines, for four to ten lines.
fn step(most: f64) -> f64 {
    let power = 10_f64.powf((most.max(1e-9) / 4.0).log10().floor());
    [5.0, 2.0, 1.0].iter().map(|n| n * power).find(|step| most / step >= 4.0).unwrap_or(power)
}

fn figure(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn size(bytes: f64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    format!("{} {}", figure(value), UNITS[unit])
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: Labels = Labels { title: "cost & more", x: "size", peer: "the peer" };

    fn row(series: &str, x: u64, value: f64) -> Row {
        let line = format!(r#"{{"row":"r","value":{value},"unit":"ms","series":"{series}","x":{x}}}"#);
        Row::parse(&line).unwrap()
    }

    #[test]
    fn each_series_is_a_line_through_its_points() {
        let rows = [row("a <b>", 1 << 20, 10.0), row("a <b>", 1 << 30, 20.0), row("c", 1 << 30, 0.0)];
        let text = svg(&LABELS, &rows).unwrap();
        assert_eq!(text.matches("<polyline").count(), 2);
        assert_eq!(text.matches("<circle").count(), 3);
        // From the left edge, half way up, to the right edge at the top.
        assert!(text.contains("points=\"80.0,235.0 590.0,50.0\""), "{text}");
        for shown in ["cost &amp; more (ms)", "a &lt;b&gt;", ">1 MiB<", ">1 GiB<", ">20<", ">5<"] {
            assert!(text.contains(shown), "{shown} is missing: {text}");
        }
    }

    #[test]
    fn the_peer_is_dashed() {
        let line = r#"{"row":"r","value":10,"peer_value":20,"unit":"ms","series":"a","x":1024}"#;
        let rows = [Row::parse(line).unwrap(), row("b", 2048, 5.0)];
        let text = svg(&LABELS, &rows).unwrap();
        assert_eq!((text.matches("<polyline").count(), text.matches("stroke-dasharray").count()), (3, 1));
        assert!(text.contains("points=\"80.0,50.0\"") && text.contains("dashed: the peer"), "{text}");
    }

    #[test]
    fn rows_without_points_make_no_chart() {
        assert!(svg(&LABELS, &[Row::parse(r#"{"row":"x","value":1}"#).unwrap()]).is_none());
        assert!(svg(&LABELS, &[]).is_none());
    }

    #[test]
    fn grid_lines_are_at_round_figures() {
        assert_eq!([step(20.0), step(99.0), step(0.7), step(4.0)], [5.0, 20.0, 0.1, 1.0]);
    }
}
