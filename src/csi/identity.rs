//! CSI Identity: the name of the driver, what it can do, and whether it works.

use tonic::{Request, Response, Status};

use super::proto::identity_server::Identity;
use super::proto::plugin_capability::service::Type as ServiceType;
use super::proto::plugin_capability::{self, Type};
use super::proto::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use super::{ALL_POOLS, Service};
use crate::volume::Health;

#[tonic::async_trait]
impl Identity for Service<dyn Health> {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.about.driver_name.to_string(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..GetPluginInfoResponse::default()
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        // CSI: every instance of one version must return the same set, wherever it is deployed.
        let capability = |service: ServiceType| PluginCapability {
            r#type: Some(Type::Service(plugin_capability::Service { r#type: service.into() })),
        };
        let online = plugin_capability::volume_expansion::Type::Online.into();
        let online_expansion = PluginCapability {
            r#type: Some(Type::VolumeExpansion(plugin_capability::VolumeExpansion {
                r#type: online,
            })),
        };
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: vec![
                capability(ServiceType::ControllerService),
                capability(ServiceType::VolumeAccessibilityConstraints),
                online_expansion,
            ],
        }))
    }

    /// Fails when no pool can be used. One bad pool among others does not make it fail, unless it is asked about all pools:
    /// sidecars such as external-provisioner exit when Probe fails (csi-lib-utils `ProbeForever`), and then nobody would
    /// create volumes on the good pools.
    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let all = request.metadata().contains_key(ALL_POOLS);
        let ready = self.run("Probe", move |subject| Ok(subject.probe(all)?)).await?;
        Ok(Response::new(ProbeResponse { ready: Some(ready) }))
    }
}
