//! The gRPC edge: CSI requests are taken apart, one verb of the core is called, its answer is put together again.
//!
//! `parse` turns what a request holds into types that cannot be wrong; `status` turns refusals into status codes. No
//! request is ever logged: it may hold secrets. The verbs block, so each runs on a thread of its own.

mod controller;
mod identity;
mod node;
mod parse;
mod probe;
mod server;
mod status;

use std::sync::Arc;

use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::{error, warn};

pub use probe::probe;
pub use server::{Endpoint, InvalidEndpoint, Listener, serve};

use crate::volume::Driver;

/// Generated from `proto/csi.proto`.
#[expect(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod proto {
    tonic::include_proto!("csi.v1");
}

/// The name this driver is registered under.
pub const DRIVER_NAME: &str = "hostdir.csi";

/// Metadata of a Probe that asks about every pool, see [`probe()`].
const ALL_POOLS: &str = "hostdir-all-pools";

/// The key of the one topology segment: its value names the node.
pub const TOPOLOGY_KEY: &str = "topology.hostdir.csi/node";

/// The three services, all on one driver.
#[derive(Clone)]
struct Services {
    driver: Arc<Driver>,
    /// The calls that are running.
    calls: TaskTracker,
}

/// Longest message of a refusal, in bytes: it travels in an HTTP/2 header, which clients limit, and into the log.
const MESSAGE_MAX: usize = 2048;

/// A refusal whose message is not too long, whatever was in the request.
fn cut(status: Status) -> Status {
    let message = status.message();
    if message.len() <= MESSAGE_MAX {
        return status;
    }
    let end = message.floor_char_boundary(MESSAGE_MAX);
    Status::new(status.code(), format!("{}…", &message[..end]))
}

impl Services {
    /// Runs a verb on a thread that may block. A caller that goes away does not stop it half-way.
    async fn run<T, F>(&self, call: &'static str, verb: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: FnOnce(&Driver) -> Result<T, Status> + Send + 'static,
    {
        let driver = Arc::clone(&self.driver);
        let ended = self.calls.spawn_blocking(move || verb(&driver)).await;
        let answer = ended.unwrap_or_else(|panic| {
            error!(call, %panic, "a call panicked; this is a bug");
            Err(Status::unavailable(format!(
                "{call} failed on an internal error; see hostdir's log on the node"
            )))
        });
        answer
            .map_err(cut)
            .inspect_err(|status| warn!(call, code = ?status.code(), why = status.message(), "refused"))
    }
}
