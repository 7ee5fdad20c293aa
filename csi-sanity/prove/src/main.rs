//! `cargo prove`: runs all of hostdir's tests, and gets what they need.
//!
//!     cargo prove            everything
//!     cargo prove prepare    installs Debian packages and builds upstream's programs, but runs no tests
//!     cargo prove rest       everything that `cargo test` does not run
//!
//! The last line says how many tests passed, failed and were skipped, and why.

mod stage;

use std::fs::File;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context as _, Result, bail};
use hostdir_prove::{packages, upstream};
use stage::Stages;

const CLIPPY: &[&str] = &[
    "clippy",
    "--locked",
    "--workspace",
    "--all-targets",
    "--",
    "-D",
    "warnings",
];
const CLIPPY_TESTS: &[&str] = &["clippy", "--locked", "--test", "*", "--", "-D", "warnings"];
const DOC: &[&str] = &[
    "doc",
    "--locked",
    "--workspace",
    "--no-deps",
    "--document-private-items",
];
const FMT: &[&str] = &["fmt", "--all", "--check"];

const TIER_1: &[&str] = &["test", "--locked", "--no-fail-fast"];
const OWN: &[&str] = &["test", "--locked", "--package", "hostdir-prove"];
const QUOTA: &[&str] = &["test", "--locked", "--no-fail-fast", "--test", "quota"];
const CLUSTER: &[&str] = &["test", "--locked", "--no-fail-fast", "--test", "cluster"];

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("prove: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => prove(true),
        ["rest"] => prove(false),
        ["prepare"] => {
            install()?;
            upstream::all()?;
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("usage: cargo prove [prepare | rest]"),
    }
}

/// Installs packages if possible. Otherwise the tests that need them are skipped.
fn install() -> Result<()> {
    if packages::can_be_installed() {
        packages::install()
    } else {
        Ok(())
    }
}

fn prove(tier_1: bool) -> Result<ExitCode> {
    let _alone = wait_to_be_alone()?;
    let mut stages = Stages::default();
    stages.note("packages", install());
    // In parallel to everything else, at low priority.
    let builds = thread::spawn(|| if upstream::has_go() { upstream::all() } else { Ok(()) });
    if tier_1 {
        stages.run("cargo test", TIER_1)?;
    }
    stages.run("cargo fmt", FMT)?;
    stages.run("cargo clippy", CLIPPY)?;
    stages.run("cargo clippy, all tests", CLIPPY_TESTS)?;
    stages.run("cargo doc", DOC)?;
    stages.run("cargo prove's own tests", OWN)?;
    stages.run("quotas and power cuts", QUOTA)?;
    let built = builds.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    stages.note("upstream's programs", built);
    stages.run("cluster", CLUSTER)?;
    Ok(stages.end())
}

/// Waits for another run on this machine: two at once would exceed the tests' time limits. The lock ends with the process.
fn wait_to_be_alone() -> Result<File> {
    let path = std::env::temp_dir().join("hostdir-prove.lock");
    // Another user may own the file: locking needs no write permission.
    let lock = File::open(&path).or_else(|_| File::create(&path));
    let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
    if lock.try_lock().is_err() {
        eprintln!(
            "prove: another run on this machine holds the lock {}; waiting until it ends",
            path.display()
        );
        lock.lock().context("cannot wait for another run")?;
    }
    Ok(lock)
}
