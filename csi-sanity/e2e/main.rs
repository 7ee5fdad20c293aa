//! Tests of the whole driver: the real binary, on real filesystems, with real mounts, called over its socket.
//!
//! Each test works in a mount namespace and a directory of its own; both are gone when it ends, however it ends. Most need
//! root: without it they say so and are skipped, and where `CI` is set they fail instead.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod crash;
mod faults;
mod hostile;
mod publish;
mod quota;
mod sanity;
mod service;
mod support;
mod volumes;
