//! Tests in a real cluster of three nodes: hostdir installed by its chart, and real pods.
//!
//! All tests share one cluster and run one after the other. The logs of a failed test are kept below the target directory.
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
    hostdir_lab::harness::main_one_by_one(env!("CARGO_BIN_EXE_hostdir"))
}
