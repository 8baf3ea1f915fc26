//! Rows of a benchmark, their goals, and the printed table.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub row: String,
    pub value: f64,
    pub unit: String,
    pub min: Option<f64>,
    pub max: Option<f64>,
    /// The peer's value.
    pub peer_value: Option<f64>,
    pub ratio: Option<f64>,
    /// The quartiles of the ratios, as a measure of noise.
    pub ratio_low: Option<f64>,
    pub ratio_high: Option<f64>,
    /// For example `ratio <= 1.02` or `value <= 40`.
    pub goal: Option<String>,
    /// The row's line in the chart, and its `x`.
    pub series: Option<String>,
    pub x: Option<f64>,
}

impl Row {
    /// Reads one line of a benchmark's output.
    pub fn parse(line: &str) -> Result<Row> {
        let value: Value =
            serde_json::from_str(line).with_context(|| format!("invalid row, not JSON: {line}"))?;
        let text = |name: &str| value[name].as_str().map(str::to_string);
        let number = |name: &str| value[name].as_f64();
        let row = Row {
            row: text("row").with_context(|| format!("invalid row, `row` is missing: {line}"))?,
            value: number("value").with_context(|| format!("invalid row, `value` is missing: {line}"))?,
            unit: text("unit").unwrap_or_default(),
            min: number("min"),
            max: number("max"),
            peer_value: number("peer_value"),
            ratio: number("ratio"),
            ratio_low: number("ratio_low"),
            ratio_high: number("ratio_high"),
            goal: text("goal"),
            series: text("series"),
            x: number("x"),
        };
        // An invalid goal is an error, not a goal that is met.
        if let Some(goal) = &row.goal {
            Goal::parse(goal)?;
        }
        Ok(row)
    }

    /// Whether the goal is met; `None` without a goal.
    pub fn met(&self) -> Option<bool> {
        let goal = Goal::parse(self.goal.as_ref()?).ok()?;
        let figure = match goal.figure {
            Figure::Ratio => self.ratio,
            Figure::Value => Some(self.value),
        };
        // A goal for a figure without a measurement is missed.
        Some(figure.is_some_and(|figure| goal.holds(figure)))
    }

    fn json(&self) -> Value {
        json!({
            "row": self.row, "value": self.value, "unit": self.unit, "min": self.min, "max": self.max,
            "peer_value": self.peer_value, "ratio": self.ratio, "ratio_low": self.ratio_low,
            "ratio_high": self.ratio_high, "goal": self.goal,
            "series": self.series, "x": self.x,
        })
    }
}

/// All rows as JSON.
pub fn to_json(rows: &[Row]) -> Result<String> {
    let values: Vec<Value> = rows.iter().map(Row::json).collect();
    Ok(serde_json::to_string_pretty(&values)? + "\n")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    Ratio,
    Value,
}

struct Goal {
    figure: Figure,
    at_most: bool,
    limit: f64,
}

impl Goal {
    fn parse(text: &str) -> Result<Goal> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let goal = match words[..] {
            ["ratio", sign, limit] => (Figure::Ratio, sign, limit),
            ["value", sign, limit] => (Figure::Value, sign, limit),
            _ => bail!("invalid goal `{text}`; write for example `ratio <= 1.02`"),
        };
        let at_most = match goal.1 {
            "<=" => true,
            ">=" => false,
            _ => bail!("invalid goal `{text}`; write for example `ratio <= 1.02`"),
        };
        let limit = goal
            .2
            .parse()
            .with_context(|| format!("invalid goal `{text}`; write for example `ratio <= 1.02`"))?;
        Ok(Goal { figure: goal.0, at_most, limit })
    }

    fn holds(&self, figure: f64) -> bool {
        if self.at_most { figure <= self.limit } else { figure >= self.limit }
    }
}

/// Formats the rows as a table.
pub fn table(rows: &[Row]) -> String {
    let head = ["", "median", "min", "max", "peer", "ratio", "middle half", "goal", ""].map(str::to_string);
    let mut cells = vec![head];
    for row in rows {
        let figure = |value: Option<f64>| value.map(|v| shown(v, &row.unit)).unwrap_or_default();
        let mark = match row.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        cells.push([
            row.row.clone(),
            figure(Some(row.value)),
            figure(row.min),
            figure(row.max),
            figure(row.peer_value),
            row.ratio.map(|r| format!("{r:.3}")).unwrap_or_default(),
            row.ratio_low.zip(row.ratio_high).map(|(l, h)| format!("{l:.3}-{h:.3}")).unwrap_or_default(),
            row.goal.clone().unwrap_or_default(),
            mark.to_string(),
        ]);
    }
    let width = |column: usize| cells.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..9).map(width).collect();
    let mut text = String::new();
    for line in &cells {
        let padded: Vec<String> = line
            .iter()
            .zip(&widths)
            .enumerate()
            // Figures are right-aligned, names and goals left-aligned.
            .map(
                |(i, (cell, &w))| {
                    if (1..7).contains(&i) { format!("{cell:>w$}") } else { format!("{cell:<w$}") }
                },
            )
            .collect();
        text += padded.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// Formats a value with four significant digits and its unit.
fn shown(value: f64, unit: &str) -> String {
    let digits = match value.abs() {
        v if v >= 1000.0 || v == 0.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$} {unit}").trim_end().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"row":"1 MiB","value":412.5,"unit":"us","min":400,"max":500.25,"peer_value":409.0,"ratio":1.0086,"ratio_low":1.001,"ratio_high":1.015,"goal":"ratio <= 1.02"}"#;

    #[test]
    fn a_row_keeps_its_figures_and_its_goal() {
        let row = Row::parse(LINE).unwrap();
        assert_eq!(row.min, Some(400.0));
        assert_eq!(row.met(), Some(true));
        let json: Value = serde_json::from_str(&to_json(std::slice::from_ref(&row)).unwrap()).unwrap();
        assert_eq!(json[0]["goal"], "ratio <= 1.02");
        let bare = Row::parse(r#"{"row":"x","value":1}"#).unwrap();
        assert_eq!(bare.met(), None);
        let json: Value = serde_json::from_str(&to_json(&[bare]).unwrap()).unwrap();
        assert!(json[0]["peer_value"].is_null() && json[0]["goal"].is_null());
        let table = table(&[row]);
        assert!(
            table.contains("412.5 us")
                && table.contains("1.009  1.001-1.015")
                && table.lines().nth(1).unwrap().ends_with("met"),
            "{table}"
        );
    }

    #[test]
    fn goals() {
        let with = |goal: &str, ratio| Row {
            ratio,
            goal: Some(goal.to_string()),
            ..Row::parse(r#"{"row":"x","value":41,"unit":"us"}"#).unwrap()
        };
        assert_eq!(with("value <= 40", None).met(), Some(false));
        assert_eq!(with("value >= 40", None).met(), Some(true));
        assert_eq!(with("value <= 41", None).met(), Some(true));
        assert_eq!(with("ratio <= 1.02", Some(1.03)).met(), Some(false));
        assert_eq!(with("ratio <= 1.02", None).met(), Some(false));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Row::parse("hello").is_err());
        assert!(Row::parse(r#"{"row":"x"}"#).is_err());
        assert!(Row::parse(r#"{"row":"x","value":1,"goal":"faster"}"#).is_err());
        assert!(Row::parse(r#"{"row":"x","value":1,"goal":"value < 3"}"#).is_err());
    }
}
