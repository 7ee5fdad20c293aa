//! The driver as a process, its clients, and disks and machines for it to run on.
#![expect(missing_docs, reason = "these are helpers of tests")]
#![expect(
    clippy::must_use_candidate,
    clippy::return_self_not_must_use,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "test helpers panic to fail the test"
)]

pub mod attributes;
pub mod client;
pub mod disk;
pub mod driver;
pub mod faults;
pub mod golden;
pub mod hostile_tree;
pub mod scene;
pub mod scratch;
pub mod steps;
pub mod uml;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use client::{Client, Csi, Mount};
pub use driver::{Driver, Process};
pub use scratch::Scratch;

/// The limit of all waits, far longer than they should take.
pub const DEADLINE: Duration = Duration::from_mins(1);

/// Sets a flag on drop, so that other threads end even if this one panics.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_for(DEADLINE, what, condition);
}

/// Waits until `condition` holds, for at most `limit`.
pub fn wait_for(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < limit,
            "timed out after {limit:?} waiting until {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
