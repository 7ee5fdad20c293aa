//! The edge to the API server (elected mode).
//!
//! `api` has the objects, `convert` makes core types of them and back. For controllers, `book` enters and deletes
//! promises, `watch` keeps the registry up to date, `janitor` lets go of what a vanished node held, `guard` watches over who
//! leads (`election` has the objects, and `leader` tells people). For nodes, `agent`
//! is the ledger of promises to this node, `upkeep` carries out deletes and finds what is lost, `publisher` says what the pools
//! are like.
//!
//! Verbs of the core block; what is asked of the API server is not waited for longer than ten seconds.

mod agent;
pub mod api;
mod book;
mod convert;
mod election;
mod events;
mod guard;
mod janitor;
mod leader;
mod publisher;
mod upkeep;
mod watch;

use std::time::Duration;

use kube::Client;
use tokio::runtime::Handle;

pub use agent::Agent;
pub use book::ApiBook;
pub use guard::{Check, Guard, GuardConfig};
pub use janitor::{Janitor, JanitorConfig};
pub use leader::report;
pub use watch::feed;

use crate::volume::Reason;

/// How long an answer of the API server is waited for: below the 30 s that external-provisioner waits for us.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A client by the environment: the service account of this pod, or a kubeconfig.
///
/// # Errors
/// There is neither.
pub async fn client() -> anyhow::Result<Client> {
    Ok(Client::try_default().await?)
}

/// Asks the API server for something, from a thread that may block.
fn ask<T>(runtime: &Handle, verb: &'static str, request: impl Future<Output = kube::Result<T>>) -> Result<T, Problem> {
    runtime.block_on(request_within(TIMEOUT, verb, request))
}

/// Asks the API server for something.
async fn request_within<T>(
    limit: Duration,
    verb: &'static str,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, Problem> {
    match tokio::time::timeout(limit, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => {
            let why = status.message.clone();
            Err(match status.code {
                404 => Problem::NotFound(verb),
                409 => Problem::Conflict(verb),
                401 => Problem::Refused(Refusal::Unauthorized, api(verb, why)),
                403 => Problem::Refused(Refusal::Forbidden, api(verb, why)),
                _ => Problem::Other(api(verb, why)),
            })
        }
        Ok(Err(error)) => Err(Problem::Other(api(verb, with_causes(&error)))),
        Err(_) => Err(Problem::Other(api(
            verb,
            format!("the API server did not answer within {} s", limit.as_secs()),
        ))),
    }
}

/// Asks the API server for an object that may not be there.
fn find<T>(
    runtime: &Handle,
    verb: &'static str,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<Option<T>, Reason> {
    match ask(runtime, verb, request) {
        Ok(found) => Ok(Some(found)),
        Err(Problem::NotFound(_)) => Ok(None),
        Err(problem) => Err(problem.into()),
    }
}

/// What the API server may answer, when asked to do something, that means something of its own.
enum Problem {
    /// There is no such object.
    NotFound(&'static str),
    /// It is there already, or has changed.
    Conflict(&'static str),
    /// The API server does not take this from us.
    Refused(Refusal, Reason),
    /// Anything else.
    Other(Reason),
}

/// How the API server refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// It does not know the token, or not any more.
    Unauthorized,
    /// It knows who asks, who must not.
    Forbidden,
}

impl From<Problem> for Reason {
    fn from(problem: Problem) -> Self {
        match problem {
            Problem::NotFound(verb) => api(verb, "there is no such object".into()),
            Problem::Conflict(verb) => api(verb, "the object has changed meanwhile".into()),
            Problem::Refused(_, reason) | Problem::Other(reason) => reason,
        }
    }
}

fn api(verb: &'static str, why: String) -> Reason {
    Reason::Api { verb, why }
}

/// An error with its causes on one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
