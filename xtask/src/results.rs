//! What test programs print, added up and shown.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::run::interrupted;

/// Results over all test programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub passed: u32,
    pub failed: u32,
    pub skipped: u32,
    failures: Vec<String>,
    /// The test that runs, whose result comes later, on a line of its own.
    running: String,
    /// Tests that said why they, or parts of them, prove nothing here.
    pub skips: Vec<Skip>,
    /// Programs that said "running N tests" and have not said their result.
    pub open: u32,
}

/// `SKIPPED WHAT: REASON`.
#[derive(Debug, PartialEq, Eq)]
pub struct Skip {
    /// Name with modules, of the test that said it.
    pub test: String,
    pub text: String,
}

impl Sum {
    /// One line of a test program.
    pub fn add(&mut self, line: &str) {
        if let Some(text) = line.strip_prefix("SKIPPED ") {
            self.skips.push(Skip {
                test: self.running.clone(),
                text: text.to_owned(),
            });
        } else if line.starts_with("running ")
            && (line.ends_with(" tests") || line.ends_with(" test"))
        {
            self.open += 1;
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            self.open = self.open.saturating_sub(1);
            self.passed += count(counts, " passed");
            self.failed += count(counts, " failed");
            self.skipped += count(counts, " ignored");
        } else if let Some((name, result)) = test_line(line) {
            self.running.clear();
            match result {
                "FAILED" => self.failures.push(name.to_owned()),
                "ok" => {}
                _ if result.starts_with("ignored") => {}
                _ => name.clone_into(&mut self.running),
            }
        } else if line == "FAILED" {
            self.failures.push(std::mem::take(&mut self.running));
        } else if line == "ok" {
            self.running.clear();
        }
    }

    /// Whether a test has begun and not said its result.
    pub fn is_inside_test(&self) -> bool {
        !self.running.is_empty()
    }

    /// The sum of other test programs.
    pub fn merge(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
        self.skips.extend(other.skips);
    }

    /// Take out the skips of tests that `cargo xtask vm` can run: their names.
    pub fn take_for_machine(&mut self) -> Vec<String> {
        let is_for_machine = |skip: &mut Skip| skip.text.contains("`cargo xtask vm`");
        let skips = self.skips.extract_if(.., is_for_machine);
        let names: std::collections::BTreeSet<String> = skips.map(|skip| skip.test).collect();
        // Their own programs count them as passed.
        self.passed = self.passed.saturating_sub(names.len() as u32);
        names.into_iter().collect()
    }

    /// Tests that were not run anywhere.
    pub fn skip(&mut self, text: &str, names: &[String]) {
        self.passed += names.len() as u32;
        self.skips.extend(names.iter().map(|test| Skip {
            test: test.clone(),
            text: format!("{test}: {text}"),
        }));
    }

    /// What failed and what was skipped, the sum as the last line, and the exit
    /// status that goes with it.
    pub fn report(&self) -> ExitCode {
        for skip in &self.skips {
            eprintln!("test: SKIPPED {}", skip.text);
        }
        let skipped = self.skipped + self.skips.len() as u32;
        if skipped > 0 {
            eprintln!("test: {skipped} skipped");
        }
        for name in &self.failures {
            eprintln!("test: failed: {name}");
        }
        if interrupted() {
            eprintln!("test: interrupted");
        }
        println!("{self}");
        match (interrupted(), self.failed) {
            (true, _) => ExitCode::from(130),
            (false, 0) => ExitCode::SUCCESS,
            (false, _) => ExitCode::FAILURE,
        }
    }
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The test programs count them as passed.
        let passed = self.passed.saturating_sub(self.skips.len() as u32);
        write!(f, "{passed} passed, {} failed", self.failed)
    }
}

/// `test NAME ... RESULT`.
fn test_line(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.split_once(" ... ")
}

/// The number before a word: "3 passed; 0 failed".
fn count(text: &str, word: &str) -> u32 {
    let before = text.split(word).next().unwrap_or("");
    let number = before.rsplit(' ').next().and_then(|n| n.parse().ok());
    number.unwrap_or(0)
}

/// What is seen of the lines: everything, or on a terminal a bar and everything
/// but success.
pub struct Shown {
    bar: Option<ProgressBar>,
}

impl Shown {
    pub fn new(what: &str) -> Self {
        let style = ProgressStyle::with_template("test: {prefix} {bar:30} {pos}/{len} {wide_msg}");
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_prefix(what.to_owned())
        });
        Self { bar }
    }

    pub fn line(&mut self, line: &str) {
        let Some(bar) = &self.bar else {
            println!("{line}");
            return;
        };
        let good = |result: &str| result == "ok" || result.starts_with("ignored");
        if let Some((name, result)) = test_line(line)
            && good(result)
        {
            bar.inc(1);
            bar.set_message(name.to_owned());
        } else if line.starts_with("running ") {
            bar.inc_length(u64::from(count(line, " test")));
        } else if !line.trim().is_empty() {
            if test_line(line).is_some() {
                bar.inc(1);
            }
            bar.suspend(|| println!("{line}"));
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_test_programs_add_up() {
        let mut sum = Sum::default();
        for line in [
            "running 3 tests",
            "test model::moves_at_once ... ok",
            "test model::ages ... FAILED",
            "test model::late ... ignored",
            "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out",
            "running 1 test",
        ] {
            sum.add(line);
        }
        assert_eq!(sum.failures, ["model::ages"]);
        assert_eq!(sum.open, 1, "the second program has not said its result");
        assert_eq!(sum.to_string(), "12 passed, 3 failed");
    }

    #[test]
    fn sum_without_skips_names_none() {
        let mut sum = Sum::default();
        sum.add("test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out");
        assert_eq!(sum.to_string(), "5 passed, 0 failed");
        assert_eq!(count("nothing", " passed"), 0);
    }

    #[test]
    fn results_on_lines_of_their_own_belong_to_the_test_before() {
        let mut sum = Sum::default();
        for line in [
            "test underlay::bond ... ",
            "SKIPPED bond: this kernel has no Bond (`cargo xtask vm` boots one that has)",
            "ok",
            "test traffic::jumbo ... ",
            "SKIPPED jumbo: no memory",
            "ok",
            "test life::dies ... log of the daemon lab-1-0:",
            "FAILED",
            "test result: FAILED. 5 passed; 1 failed; 0 ignored; 0 measured; 2 filtered out",
        ] {
            sum.add(line);
        }
        assert_eq!(sum.failures, ["life::dies"]);
        assert_eq!(sum.to_string(), "3 passed, 1 failed");
        assert_eq!(sum.take_for_machine(), ["underlay::bond"]);
        assert_eq!(sum.skips.len(), 1);
        assert_eq!(sum.to_string(), "3 passed, 1 failed");
    }
}
