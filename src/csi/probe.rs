//! A client of the driver's socket, for probes.

use std::time::Duration;

use anyhow::{anyhow, ensure};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint as Address};
use tonic::{Request, Response};

use super::proto::identity_client::IdentityClient;
use super::proto::{GetPluginInfoRequest, ProbeRequest, ProbeResponse};
use super::{ALL_POOLS, Endpoint};

/// A driver that takes longer counts as one that does not answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What to ask a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// Whether it answers.
    Alive,
    /// Whether it works.
    Ready,
    /// Whether it works, and all its pools can be used.
    AllPools,
}

/// Asks the driver on a socket.
///
/// # Errors
/// The driver does not answer within five seconds, or answers that something is wrong.
pub(crate) async fn probe(endpoint: &Endpoint, question: Question) -> anyhow::Result<()> {
    let mut client = IdentityClient::new(connect(endpoint, TIMEOUT).await?);
    let mut request = Request::new(ProbeRequest {});
    let answer = match question {
        Question::Alive => client.get_plugin_info(GetPluginInfoRequest {}).await.map(|_| true),
        Question::Ready => client.probe(request).await.map(is_ready),
        Question::AllPools => {
            let metadata = request.metadata_mut();
            metadata.insert(ALL_POOLS, MetadataValue::from_static("1"));
            client.probe(request).await.map(is_ready)
        }
    };
    let ready = answer.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    ensure!(ready, "hostdir is still starting, or no longer hears the API server");
    Ok(())
}

/// A connection to the driver on a socket. Each call on it may take `limit`.
pub(super) async fn connect(endpoint: &Endpoint, limit: Duration) -> anyhow::Result<Channel> {
    let path = endpoint.path().display();
    let address = Address::try_from(format!("unix://{path}"))?;
    let connected = address.timeout(limit).connect_timeout(limit).connect().await;
    connected.map_err(|error| {
        // Each library above the system call repeats the innermost cause: keep only that.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(next) = cause.source() {
            cause = next;
        }
        anyhow!("cannot connect to {path}: {cause}; is hostdir running there?")
    })
}

/// CSI: a driver that leaves `ready` out is ready.
fn is_ready(answer: Response<ProbeResponse>) -> bool {
    answer.into_inner().ready.unwrap_or(true)
}
