//! Tests of the whole driver: the real binary, on real filesystems, with real mounts, called over its socket; and of the chart as
//! Helm renders it.
//!
//! Each test works in a mount namespace and a directory of its own; both are gone when it ends, however it ends.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chart;
mod crash;
mod durability;
mod erase;
mod faults;
mod hostile;
mod mounts;
mod place;
mod pools;
mod publish;
mod sanity;
mod selftest;
mod service;
mod volumes;

fn main() -> std::process::ExitCode {
    hostdir_lab::harness::main(env!("CARGO_BIN_EXE_hostdir"))
}
