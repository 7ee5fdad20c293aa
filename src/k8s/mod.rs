//! The edge to the API server (elected mode).
//!
//! [`api`] defines the objects, `convert` converts them to core types and back, `store` reads and writes HostVolumes,
//! `watch` follows objects, `events` writes Events.
//!
//! - `node`: a node follows its own HostVolumes; `node::reconcile` makes a volume match its HostVolume; `node::status`
//!   publishes the pools as a HostNode.
//! - `controller`: a controller follows all HostVolumes, HostNodes, Nodes and PersistentVolumes; `controller::gc` cleans up after
//!   lost nodes and deletes unused volumes; `controller::released` marks volumes whose PersistentVolume is gone;
//!   `controller::backlog` knows what waits for the sidecars.
//! - `election`: every controller watches who leads, and takes over from a leader that must not lead.
//!
//! Verbs of the core block; each request to the API server times out after ten seconds.

pub mod api;
mod client;
mod controller;
mod convert;
mod election;
mod events;
mod node;
mod store;
mod watch;

pub(crate) use client::client;
pub(crate) use controller::{Agents, Backlog, Gc, GcConfig, feed};
pub(crate) use election::{Get, Guard, GuardConfig, report};
pub(crate) use node::Agent;
pub(crate) use store::ApiStore;
