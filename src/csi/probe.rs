//! The other side of the socket, for probes.

use std::time::Duration;

use anyhow::Context;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint as Address;

use super::proto::identity_client::IdentityClient;
use super::proto::{GetPluginInfoRequest, ProbeRequest};
use super::{ALL_POOLS, Endpoint};

/// A driver that takes longer does not answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the driver on a socket whether it answers; with `ready`, also whether all its pools can be used.
///
/// # Errors
/// It does not answer within five seconds, or says what is wrong.
pub async fn probe(endpoint: &Endpoint, ready: bool) -> anyhow::Result<()> {
    let path = endpoint.path().display();
    let channel = Address::try_from(format!("unix://{path}"))?
        .timeout(TIMEOUT)
        .connect_timeout(TIMEOUT)
        .connect()
        .await
        .with_context(|| format!("connect to {path}"))?;
    let mut client = IdentityClient::new(channel);
    let answer = if ready {
        let mut request = Request::new(ProbeRequest {});
        request
            .metadata_mut()
            .insert(ALL_POOLS, MetadataValue::from_static("1"));
        client.probe(request).await.map(drop)
    } else {
        client.get_plugin_info(GetPluginInfoRequest {}).await.map(drop)
    };
    answer.map_err(|status| anyhow::anyhow!("{}", status.message()))
}
