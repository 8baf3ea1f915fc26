//! Parses the output of Rust's test harness.

use std::collections::BTreeMap;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Passed,
    Failed,
    Ignored,
}

/// Results of one or more test binaries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Counts from the `test result` lines, which include every test.
    pub passed: usize,
    pub failed: usize,
    pub ignored: usize,
    /// Verdicts by name, as far as the output has them. Use this for one binary
    /// only, since names repeat between binaries.
    pub tests: BTreeMap<String, Verdict>,
    /// Binaries that started and printed no result.
    pub unfinished: usize,
}

impl Report {
    pub fn parse(output: &str) -> Report {
        let mut report = Report::default();
        let mut running: Option<String> = None;
        for line in output.lines() {
            let line = line.trim_end();
            if let Some(counts) = line.strip_prefix("test result: ") {
                report.count(counts);
                running = None;
            } else if is_start(line) {
                report.unfinished += 1;
            } else if let Some((name, rest)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ... "))
            {
                // With one thread the harness prints the name first. Output of
                // a child process may follow before the verdict.
                let name = name.strip_suffix(" - should panic").unwrap_or(name).to_string();
                match verdict(rest).or(rest.split_whitespace().next_back().and_then(verdict)) {
                    Some(verdict) => report.tell(name, verdict),
                    None => running = Some(name),
                }
            } else if let Some(verdict) = verdict(line)
                && let Some(name) = running.take()
            {
                report.tell(name, verdict);
            }
        }
        report
    }

    /// Adds another report. A name in both keeps the worse verdict.
    pub fn add(&mut self, other: &Report) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.unfinished += other.unfinished;
        for (name, &verdict) in &other.tests {
            let entry = self.tests.entry(name.clone()).or_insert(verdict);
            // A test that ran somewhere was not ignored.
            if *entry == Verdict::Ignored || verdict == Verdict::Failed {
                *entry = verdict;
            }
        }
    }

    /// The names of the tests that failed.
    pub fn failures(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().filter(|(_, verdict)| **verdict == Verdict::Failed).map(|(name, _)| name.as_str())
    }

    fn tell(&mut self, name: String, verdict: Verdict) {
        self.tests.insert(name, verdict);
    }

    /// `ok. 5 passed; 1 failed; 0 ignored; 0 measured; 3 filtered out; …`
    fn count(&mut self, counts: &str) {
        let number = |what: &str| {
            let words: Vec<&str> = counts.split([' ', ';']).collect();
            let pair = words.windows(2).find(|w| w[1] == what);
            pair.and_then(|w| w[0].parse::<usize>().ok()).unwrap_or(0)
        };
        self.passed += number("passed");
        self.failed += number("failed");
        self.ignored += number("ignored");
        self.unfinished = self.unfinished.saturating_sub(1);
    }
}

/// `running 5 tests`
fn is_start(line: &str) -> bool {
    let count =
        line.strip_prefix("running ").and_then(|l| l.strip_suffix(" tests").or(l.strip_suffix(" test")));
    count.is_some_and(|n| n.parse::<usize>().is_ok())
}

fn verdict(text: &str) -> Option<Verdict> {
    match text {
        "ok" => Some(Verdict::Passed),
        "FAILED" => Some(Verdict::Failed),
        "ignored" => Some(Verdict::Ignored),
        _ if text.starts_with("ignored, ") => Some(Verdict::Ignored),
        _ => None,
    }
}

/// The names that `--list` prints.
pub fn parse_list(output: &str) -> Vec<String> {
    output.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 5 tests
test a::plain ... ok
test a::broken ... FAILED
test a::later ... ignored, needs a device
test a::talks ... a line of a child
another ok
ok
test a::panics - should panic ... ok

failures:

---- a::broken stdout ----
thread panicked

failures:
    a::broken

test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s

running 1 test
test b::plain ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn verdicts_and_counts() {
        let report = Report::parse(OUTPUT);
        assert_eq!((report.passed, report.failed, report.ignored, report.unfinished), (4, 1, 1, 0));
        assert_eq!(report.tests["a::talks"], Verdict::Passed);
        assert_eq!(report.tests["a::panics"], Verdict::Passed);
        assert_eq!(report.tests["a::broken"], Verdict::Failed);
        assert_eq!(report.tests["a::later"], Verdict::Ignored);
        assert_eq!(report.tests.len(), 6);
    }

    #[test]
    fn a_binary_that_dies_is_noticed() {
        let report = Report::parse("running 3 tests\ntest a ... ok\ntest b ... ");
        assert_eq!((report.unfinished, report.passed), (1, 0));
        assert_eq!(report.tests.len(), 1);
    }

    #[test]
    fn adding_keeps_the_worse_verdict_but_forgets_ignored() {
        let one = |verdict| Report { tests: [("t".to_string(), verdict)].into(), ..Report::default() };
        let mut sum = one(Verdict::Ignored);
        sum.add(&one(Verdict::Passed));
        assert_eq!(sum.tests["t"], Verdict::Passed);
        sum.add(&one(Verdict::Failed));
        sum.add(&one(Verdict::Passed));
        sum.add(&one(Verdict::Ignored));
        assert_eq!(sum.tests["t"], Verdict::Failed);
    }

    #[test]
    fn lists() {
        let names = parse_list("a::b: test\nc: test\nd: benchmark\n\n2 tests, 1 benchmark\n");
        assert_eq!(names, ["a::b", "c"]);
    }
}
