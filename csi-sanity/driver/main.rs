//! Tests of the whole driver: the real binary, on real filesystems, with real mounts, called over its socket; and of the
//! chart as Helm renders it.
//!
//! Each test has its own mount namespace and directory; both are removed when it ends, even if it panics.

#![expect(clippy::unwrap_used, reason = "a panic fails the test")]

mod chart;
mod crash;
mod durability;
mod erase;
mod faults;
mod flood;
mod hang;
mod hostile;
mod mounts;
mod place;
mod pools;
mod publish;
mod sanity;
mod selftest;
mod service;
mod soak;
mod upgrade;
mod volumes;

fn main() -> std::process::ExitCode {
    hostdir_lab::harness::main(env!("CARGO_BIN_EXE_hostdir"))
}
