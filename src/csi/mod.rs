//! The gRPC edge: parses CSI requests, calls one verb of the core for each, and builds the answers.
//!
//! `parse` turns the fields of a request into types that hold only valid values; `status` turns refusals into status codes.
//! No request is ever logged: it may contain secrets. The verbs block, so each runs on a thread of its own.

mod controller;
mod identity;
mod node;
mod parse;
mod probe;
mod selftest;
mod server;
mod status;

use std::sync::Arc;
use std::time::Instant;

use tokio_util::task::TaskTracker;
use tonic::{Code, Status};
use tracing::{error, warn};

pub(crate) use probe::{Question, probe};
pub(crate) use selftest::selftest;
pub(crate) use server::{Endpoint, Listener, Serving, serve};

use crate::metrics::Metrics;
use crate::volume::id::NodeName;

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

/// The name that the driver is registered under by default.
pub(crate) const DRIVER_NAME: &str = "hostdir.csi";

/// The metadata key of a Probe that asks about every pool, see [`probe()`].
const ALL_POOLS: &str = "hostdir-all-pools";

/// The key of the only topology segment; its value names the node.
pub(crate) const TOPOLOGY_KEY: &str = "topology.hostdir.csi/node";

/// One of the services, and the part of the core that answers its calls.
struct Service<T: ?Sized> {
    subject: Arc<T>,
    about: About,
}

/// What all services of a process have in common.
#[derive(Clone)]
struct About {
    /// The name the driver is registered under.
    driver_name: Arc<str>,
    /// The node, if there is only one.
    node: Option<NodeName>,
    /// The calls whose callers wait for an answer.
    calls: TaskTracker,
    metrics: Arc<Metrics>,
}

/// Longest message of a refusal, in bytes: it goes into an HTTP/2 header, whose size clients limit, and into the log.
const MESSAGE_MAX: usize = 2048;

/// Shortens the message of a refusal if it is too long, because it may repeat parts of the request.
fn cut(status: Status) -> Status {
    let message = status.message();
    if message.len() <= MESSAGE_MAX {
        return status;
    }
    let end = message.floor_char_boundary(MESSAGE_MAX);
    Status::new(status.code(), format!("{}…", &message[..end]))
}

impl<T: ?Sized + Send + Sync + 'static> Service<T> {
    /// Runs a verb on a thread that may block. The verb runs to its end even if the caller goes away, but then it does not keep the
    /// process from stopping.
    async fn run<A, F>(&self, call: &'static str, verb: F) -> Result<A, Status>
    where
        A: Send + 'static,
        F: FnOnce(&T) -> Result<A, Status> + Send + 'static,
    {
        let About { calls, metrics, .. } = &self.about;
        let (subject, metrics, start) = (Arc::clone(&self.subject), Arc::clone(metrics), Instant::now());
        let verb = move || {
            let answer = verb(&subject);
            let code = answer.as_ref().err().map_or(Code::Ok, Status::code);
            metrics.call_ended(call, &format!("{code:?}"), start.elapsed());
            answer
        };
        let _waiting = calls.token();
        let ended = tokio::task::spawn_blocking(verb).await;
        let answer = ended.unwrap_or_else(|panic| {
            error!(call, %panic, "a call panicked; this is a bug");
            Err(Status::unavailable(format!(
                "{call} failed with an internal error; see hostdir's log on the node"
            )))
        });
        answer
            .map_err(cut)
            .inspect_err(|status| warn!(call, code = ?status.code(), why = status.message(), "refused"))
    }
}

/// A size in the type that CSI messages use.
fn signed(bytes: crate::volume::size::Bytes) -> i64 {
    i64::try_from(bytes.0).unwrap_or(i64::MAX)
}
