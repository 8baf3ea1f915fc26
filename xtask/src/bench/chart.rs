//! A line chart as SVG, of the rows that have a series and an `x`, on logarithmic axes: values of one chart differ by
//! orders of magnitude. The peer's line is dashed, in the same colour.

use super::rows::Row;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

/// The labels of a chart.
pub struct Labels {
    pub title: &'static str,
    /// Name of the x axis: a size in bytes.
    pub x: &'static str,
    /// Name of the peer, whose lines are dashed.
    pub peer: &'static str,
}

/// The width of the lines, and of the names beside them.
const WIDTH: (u32, u32) = (640, 280);
const HEIGHT: u32 = 480;

/// Distinguishable in print and for colour-blind readers.
const COLOURS: &[RGBColor] = &[
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(153, 153, 153),
];

/// The points of a series, and the peer's.
type Lines = [Vec<(f64, f64)>; 2];

/// Draws the chart; `None` without points. A logarithmic axis has no place for a value of 0 or less.
pub fn svg(labels: &Labels, rows: &[Row]) -> Result<Option<String>> {
    let mut series: Vec<(&str, Lines)> = Vec::new();
    for row in rows {
        let (Some(name), Some(x)) = (&row.series, row.x) else { continue };
        if !series.iter().any(|(other, _)| other == name) {
            series.push((name, Lines::default()));
        }
        let Some((_, [own, peer])) = series.iter_mut().find(|(other, _)| other == name) else { continue };
        own.extend((row.value > 0.0).then_some((x, row.value)));
        peer.extend(row.peer_value.filter(|value| *value > 0.0).map(|value| (x, value)));
    }
    let points = || series.iter().flat_map(|(_, lines)| lines.iter().flatten());
    let Some(unit) = rows.iter().find(|row| row.series.is_some()).map(|row| &row.unit) else {
        return Ok(None);
    };
    if points().next().is_none() {
        return Ok(None);
    }
    let mut text = String::new();
    let root = SVGBackend::with_string(&mut text, (WIDTH.0 + WIDTH.1, HEIGHT)).into_drawing_area();
    let title = format!("{} ({unit})", labels.title);
    draw(&root, labels, &title, &series).map_err(|error| anyhow!("cannot draw the chart: {error}"))?;
    drop(root);
    Ok(Some(text))
}

type Error = Box<dyn std::error::Error>;

fn draw(
    root: &DrawingArea<SVGBackend, Shift>,
    labels: &Labels,
    title: &str,
    series: &[(&str, Lines)],
) -> Result<(), Error> {
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(WIDTH.0);
    let points = || series.iter().flat_map(|(_, lines)| lines.iter().flatten());
    // Half an octave and a fifth of a decade around the points, also if all are equal.
    let range = |values: &mut dyn Iterator<Item = f64>, around: f64| {
        let (low, high) = values.fold((f64::MAX, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
        low / around..high * around
    };
    let xs = range(&mut points().map(|p| p.0), std::f64::consts::SQRT_2);
    let ys = range(&mut points().map(|p| p.1), 1.6);
    let mut chart = ChartBuilder::on(&left)
        .margin(12)
        .caption(title, ("sans-serif", 20))
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(xs.log_scale().base(2.0), ys.log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 15))
        .x_desc(labels.x)
        .x_label_formatter(&|x| size(*x))
        .y_label_formatter(&|y| figure(*y))
        .draw()?;
    for (number, (name, [own, peer])) in series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        chart.draw_series(LineSeries::new(own.clone(), colour.stroke_width(2)))?;
        chart.draw_series(DashedLineSeries::new(peer.clone(), 6, 4, colour.stroke_width(2)))?;
        chart.draw_series(own.iter().chain(peer).map(|&point| Circle::new(point, 3, colour.filled())))?;
        let y = 40 + 22 * number as i32;
        right.draw(&Rectangle::new([(0, y), (14, y + 4)], colour.filled()))?;
        right.draw(&Text::new(name.to_string(), (22, y - 6), ("sans-serif", 16)))?;
    }
    if series.iter().any(|(_, [_, peer])| !peer.is_empty()) {
        let y = 40 + 22 * (series.len() as i32 + 1);
        right.draw(&Text::new(format!("dashed: {}", labels.peer), (0, y), ("sans-serif", 16)))?;
    }
    root.present()?;
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: Labels = Labels { title: "cost & more", x: "size", peer: "the peer" };

    fn row(series: &str, x: u64, value: f64) -> Row {
        let line = format!(r#"{{"row":"r","value":{value},"unit":"ms","series":"{series}","x":{x}}}"#);
        Row::parse(&line).unwrap()
    }

    /// The vertical places of the circles, from the bottom.
    fn heights(text: &str) -> Vec<f64> {
        let places = text.lines().filter(|line| line.starts_with("<circle"));
        let y = |line: &str| line.split("cy=\"").nth(1)?.split('"').next()?.parse::<f64>().ok();
        places.map(|line| f64::from(HEIGHT) - y(line).unwrap()).collect()
    }

    #[test]
    fn each_series_is_a_line_through_its_points() {
        let rows = [row("a <b>", 1 << 20, 10.0), row("a <b>", 1 << 30, 20.0), row("c", 1 << 30, 0.0)];
        let text = svg(&LABELS, &rows).unwrap().unwrap();
        // A value of 0 has no place.
        assert_eq!(heights(&text).len(), 2, "{text}");
        for shown in ["cost &amp; more (ms)", "a &lt;b&gt;", "size", "MiB"] {
            assert!(text.contains(shown), "{shown} is missing: {text}");
        }
    }

    #[test]
    fn one_large_value_does_not_flatten_the_others() {
        let rows = [row("a", 1024, 1.0), row("a", 2048, 10.0), row("b", 2048, 1000.0)];
        let text = svg(&LABELS, &rows).unwrap().unwrap();
        let [one, ten, thousand] = heights(&text)[..] else { panic!("{text}") };
        let (decade, two) = (ten - one, thousand - ten);
        assert!(decade > 50.0 && (two - 2.0 * decade).abs() < 3.0, "{one} {ten} {thousand}");
    }

    #[test]
    fn the_peer_is_dashed() {
        let line = r#"{"row":"r","value":10,"peer_value":20,"unit":"ms","series":"a","x":1024}"#;
        let rows = [Row::parse(line).unwrap(), row("b", 2048, 5.0)];
        let text = svg(&LABELS, &rows).unwrap().unwrap();
        assert!(text.contains("dashed: the peer") && heights(&text).len() == 3, "{text}");
        let without = svg(&LABELS, &rows[1..]).unwrap().unwrap();
        assert!(!without.contains("dashed"), "{without}");
    }

    #[test]
    fn rows_without_points_make_no_chart() {
        assert!(svg(&LABELS, &[Row::parse(r#"{"row":"x","value":1}"#).unwrap()]).unwrap().is_none());
        assert!(svg(&LABELS, &[]).unwrap().is_none());
    }
}
