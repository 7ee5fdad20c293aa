//! Requests to the API server, each with a timeout, and what their answers mean.

use std::time::Duration;

use kube::{Client, Config};
use tokio::runtime::Handle;

use crate::volume::Reason;
use crate::volume::error::chain;

/// How long to wait for an answer: below the 30 s that external-provisioner waits for us.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be silent while an answer is awaited. On watches the API server sends a bookmark every minute
/// (`defaultBookmarkFrequency`, k8s.io/apiserver/pkg/storage/cacher): a longer silence means that it is gone without a word.
const READ_TIMEOUT: Duration = Duration::from_secs(75);

/// A client that is configured by the environment: by the service account of this pod, or by a kubeconfig.
///
/// # Errors
/// There is neither a service account nor a kubeconfig.
pub(crate) async fn client() -> anyhow::Result<Client> {
    let mut config = Config::infer().await?;
    config.read_timeout = Some(READ_TIMEOUT);
    Ok(Client::try_from(config)?)
}

/// Sends a request and waits for the answer, on a thread that may block. `verb` names the request in messages.
pub(super) fn ask<T>(
    runtime: &Handle,
    verb: &'static str,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, Problem> {
    runtime.block_on(request_within(TIMEOUT, verb, request))
}

/// Sends a request and waits at most `limit` for the answer.
pub(super) async fn request_within<T>(
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
                401 => Problem::Refused(Refusal::Unauthorized, api_error(verb, why)),
                403 => Problem::Refused(Refusal::Forbidden, api_error(verb, why)),
                // Not 408: the request may have been carried out.
                400 | 402..=407 | 409..=499 => Problem::Rejected(api_error(verb, why)),
                _ => Problem::Other(api_error(verb, why)),
            })
        }
        Ok(Err(error)) => Err(Problem::Other(api_error(verb, chain(&error)))),
        Err(_) => Err(Problem::Other(api_error(
            verb,
            format!("the API server did not answer within {} s", limit.as_secs()),
        ))),
    }
}

/// Reads an object that may not exist.
pub(super) fn find<T>(
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

/// Failures that callers distinguish.
pub(super) enum Problem {
    /// There is no such object.
    NotFound(&'static str),
    /// The object exists already, or has changed.
    Conflict(&'static str),
    Refused(Refusal, Reason),
    /// The request is not valid, or cannot be served now: nothing was changed.
    Rejected(Reason),
    /// Whether anything was changed is not known.
    Other(Reason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// 401: the token is not valid, or no longer valid.
    Unauthorized,
    /// 403: the token is valid, but has no right to do this.
    Forbidden,
}

impl From<Problem> for Reason {
    fn from(problem: Problem) -> Self {
        match problem {
            Problem::NotFound(verb) => api_error(verb, "there is no such object".into()),
            Problem::Conflict(verb) => api_error(verb, "the object has changed meanwhile".into()),
            Problem::Refused(_, reason) | Problem::Rejected(reason) | Problem::Other(reason) => reason,
        }
    }
}

pub(super) fn api_error(verb: &'static str, why: String) -> Reason {
    Reason::Api { verb, why }
}
