//! The core: what a volume is, and the verbs on it. It knows neither gRPC nor Kubernetes nor system calls.
//!
//! [`Driver`] holds the verbs of a node. They act through [`ports::Host`] (this machine) and [`ports::Disk`] (one pool on
//! it), and refuse with an [`Error`] that says what happened to which volume, where, and what to do.
//!
//! The walk of a volume: *create* counts its size against the pool's [`room`] and writes a [`record`] — *publish* makes
//! its directory the first time, limited to its size where the filesystem can ([`quota`]), marks the record `Ready`, then mounts it — *unpublish* unmounts — *delete* moves it out
//! of the pool by one rename.
//!
//! In elected mode *create* and *delete* are those of a controller, [`Elected`]: it enters promises in a [`ports::Book`],
//! by what the [`registry`] knows of all nodes; a node finds those made to it in its [`ports::Ledger`]. [`Control`] is what
//! both modes have in common for callers.

pub mod access;
pub mod control;
mod driver;
mod elected;
mod error;
mod fence;
pub mod id;
mod local;
#[cfg(test)]
mod memory;
mod operations;
mod pool;
pub mod ports;
pub mod quota;
pub mod record;
pub mod registry;
pub mod room;
mod selftest;
pub mod size;
mod sizes;

pub use control::{Control, Health, Parameters, Placement, Volume, Want};
pub use driver::{Driver, Held, PoolFacts, PoolState, Publish};
pub use elected::Elected;
pub use error::{Error, Reason};
pub use fence::Fence;
pub use selftest::SelfTest;
