//! The core: what a volume is, and the verbs on it. It knows neither gRPC nor Kubernetes nor system calls.
//!
//! [`Node`] has the verbs of a node: publish, unpublish, statistics, expansion; in local mode also create and delete. It
//! acts through [`disk::Host`] (this machine) and [`disk::Disk`] (one pool on it). In elected mode, a [`Controller`] creates
//! and deletes: it records volumes in a [`host_volume::HostVolumeStore`] and chooses nodes from its
//! [cache](controller::cache); each node reads the volumes assigned to it from [`host_volume::Assignments`]. [`Control`] is
//! the interface that both share. Every refusal is an [`Error`] that says what happened to which volume, where, and what to
//! do.
//!
//! The life of a volume: *create* allocates its size from the pool's [`room`] and writes a [`record`]; the first *publish*
//! makes its directory, limited to its size where the filesystem supports it ([`quota`]), and mounts it; *unpublish*
//! unmounts; *delete* moves it out of the pool by one rename.

pub(crate) mod access;
pub(crate) mod control;
pub(crate) mod controller;
pub(crate) mod disk;
pub(crate) mod error;
pub(crate) mod host_volume;
pub(crate) mod id;
pub(crate) mod node;
pub(crate) mod pool_status;
pub(crate) mod quota;
pub(crate) mod record;
pub(crate) mod room;
pub(crate) mod size;

pub(crate) use control::{Control, CreateRequest, Health, Parameters, Topology, Volume};
pub(crate) use controller::{Controller, Fence};
pub(crate) use error::{Error, Reason};
pub(crate) use node::{Node, PublishRequest, SelfTest};
