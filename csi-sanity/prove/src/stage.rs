//! The stages of `cargo prove`: calls of cargo that must all succeed, and the results of their tests.

use std::io::{BufRead as _, BufReader};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hostdir_prove::cargo;

/// The test results that test programs have reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    skipped: usize,
    why: Vec<String>,
}

impl Counts {
    /// Counts a line if it is the summary of a test program, in the format of std's harness or of ours.
    fn read(&mut self, line: &str) {
        let numbers =
            |text: &str| -> Vec<usize> { text.split([' ', ';']).filter_map(|word| word.parse().ok()).collect() };
        if let Some((_, rest)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        {
            if let [passed, failed, skipped, ..] = numbers(rest)[..] {
                self.passed += passed;
                self.failed += failed;
                self.skipped += skipped;
            }
        } else if line.starts_with(|c: char| c.is_ascii_digit())
            && let Some((_, why)) = line.split_once(" skipped (")
        {
            self.why.push(why.trim_end_matches(')').to_owned());
        }
    }
}

struct Stage {
    name: &'static str,
    ok: bool,
    counts: Counts,
    time: Duration,
}

/// The stages that have run.
#[derive(Default)]
pub(crate) struct Stages(Vec<Stage>);

impl Stages {
    /// Runs cargo as one stage. The next stages run even if it fails.
    pub(crate) fn run(&mut self, name: &'static str, args: &[&str]) -> Result<()> {
        eprintln!("prove: {name}: cargo {}", args.join(" "));
        let start = Instant::now();
        let mut command = cargo();
        command
            .args(args)
            .env("RUSTDOCFLAGS", "-D warnings")
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot run cargo")?;
        let mut counts = Counts::default();
        for line in BufReader::new(child.stdout.take().context("cargo has no output")?).split(b'\n') {
            let line = line.context("cannot read cargo's output")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            counts.read(&line);
        }
        let mut ok = child.wait().context("cannot wait for cargo")?.success();
        if args[0] == "test" && counts.passed + counts.failed + counts.skipped == 0 {
            eprintln!("prove: {name} ran no test");
            ok = false;
        }
        self.0.push(Stage {
            name,
            ok,
            counts,
            time: start.elapsed(),
        });
        Ok(())
    }

    /// Records a step that is not a call of cargo, if it failed.
    pub(crate) fn note(&mut self, name: &'static str, done: Result<()>) {
        if let Err(error) = done {
            eprintln!("prove: {name}: {error:#}");
            self.0.push(Stage {
                name,
                ok: false,
                counts: Counts::default(),
                time: Duration::ZERO,
            });
        }
    }

    /// Prints the summary. Each call of cargo counts as a test, too, because lints fail without a test.
    pub(crate) fn end(self) -> ExitCode {
        let mut sum = Counts::default();
        for Stage { name, ok, counts, time } in self.0 {
            let verdict = if ok { "ok" } else { "FAILED" };
            println!(
                "prove: {name:<30} {verdict:<6} {:>6.0} s  {} passed",
                time.as_secs_f64(),
                counts.passed
            );
            sum.passed += counts.passed + usize::from(ok);
            // A stage can fail without a failed test.
            sum.failed += if ok { 0 } else { counts.failed.max(1) };
            sum.skipped += counts.skipped;
            sum.why.extend(counts.why);
        }
        let why = if sum.why.is_empty() {
            String::new()
        } else {
            format!(" ({})", sum.why.join("; "))
        };
        println!(
            "prove: {} passed, {} failed, {} skipped{why}",
            sum.passed, sum.failed, sum.skipped
        );
        if sum.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_counted_and_nothing_else() {
        let mut counts = Counts::default();
        for line in [
            "running 3 tests",
            "test a ... ok",
            "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "2 passed, 0 failed, 1 skipped (1 because it needs root)",
            "test result: FAILED. 4 passed; 5 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "4 passed, 5 failed, 0 skipped",
        ] {
            counts.read(line);
        }
        let why = vec!["1 because it needs root".to_owned()];
        assert_eq!(
            counts,
            Counts {
                passed: 6,
                failed: 5,
                skipped: 1,
                why
            }
        );
    }
}
