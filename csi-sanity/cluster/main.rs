//! hostdir where it is used: a real cluster of three nodes, hostdir installed by its chart, real pods.
//!
//! All tests share one cluster, one after the other. What is learnt of a failure is kept below the target directory.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chart;
mod elected;
mod ghosts;
mod lab;
mod objects;
mod pods;
mod sanity;
mod scale;
mod sizes;
mod trouble;
mod user_namespaces;

fn main() -> std::process::ExitCode {
    hostdir_lab::harness::main_one_by_one(env!("CARGO_BIN_EXE_hostdir"))
}
