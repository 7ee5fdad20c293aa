//! What the tests share: a place to work in, the driver as a process, a client, and the word for "cannot run here".

pub(crate) mod client;
pub(crate) mod disk;
pub(crate) mod driver;
pub(crate) mod faults;
pub(crate) mod scene;
pub(crate) mod scratch;
pub(crate) mod uml;

use std::io::Write;
use std::time::{Duration, Instant};

pub(crate) use client::{Client, Mount};
pub(crate) use driver::{Driver, Process};
pub(crate) use scratch::Scratch;

/// How long anything may take that is waited for. Far beyond what it takes: a test that fails by this has failed.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

/// Says that a test cannot run here, and fails where it must run. Written past the test harness, which would hide it.
pub(crate) fn skipped(test: &str, why: &str) {
    assert!(
        std::env::var_os("CI").is_none(),
        "{test} must run here, but cannot: {why}"
    );
    writeln!(std::io::stderr(), "SKIPPED {test}: {why}").expect("standard error is open");
}

/// Waits until `condition` holds.
pub(crate) fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_for(DEADLINE, what, condition);
}

/// Waits until `condition` holds, for at most `limit`.
pub(crate) fn wait_for(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
