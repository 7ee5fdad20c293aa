//! The edge to the API server (elected mode).
//!
//! [`api`] has the objects, `convert` makes core types of them and back, `store` reads and writes HostVolumes, `watch` follows
//! objects, `events` tells people.
//!
//! - `node`: a node follows its own HostVolumes; `node::reconcile` makes a volume be what its HostVolume says; `node::status`
//!   publishes the pools as a HostNode.
//! - `controller`: a controller follows all of them; `controller::gc` cleans up what nobody asks for any more.
//! - `election`: every controller watches who leads, and takes over from a leader that cannot work.
//!
//! Verbs of the core block; no request to the API server is waited for longer than ten seconds.

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
pub(crate) use controller::{Gc, GcConfig, feed};
pub(crate) use election::{Check, Guard, GuardConfig, report};
pub(crate) use node::Agent;
pub(crate) use store::ApiStore;
