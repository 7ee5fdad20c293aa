//! Tests in a real cluster of three nodes: hostdir installed by its chart, and real pods.
//!
//! Two tests run at the same time, each in a cluster that it has to itself: most of the time they wait. Tests that keep the
//! machine busy run alone. The logs of a failed test are kept below the target directory.
#![expect(clippy::unwrap_used, reason = "a panic fails the test")]

mod chart;
mod controllers;
mod deletes;
mod disks;
mod elected;
mod election;
mod lab;
mod lies;
mod mode;
mod objects;
mod overselling;
mod pair;
mod placement;
mod pods;
mod proxy;
mod records;
mod rights;
mod sanity;
mod scale;
mod sizes;
mod trouble;
mod upgrade;
mod user_namespaces;

fn main() -> std::process::ExitCode {
    hostdir_lab::harness::main_with_threads(env!("CARGO_BIN_EXE_hostdir"), lab::CLUSTERS)
}
