//! CSI Node: mounts and unmounts volumes.

use tonic::{Request, Response, Status};

use super::controller::{CONTEXT_POOL_ID, CONTEXT_UID};
use super::proto::node_server::Node as NodeService;
use super::proto::node_service_capability::rpc::Type as RpcType;
use super::proto::node_service_capability::{Rpc, Type};
use super::proto::volume_usage::Unit;
use super::proto::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, VolumeUsage,
};
use super::{Service, parse, signed};
use crate::volume::access::MountOptions;
use crate::volume::room::Space;
use crate::volume::size::Bytes;
use crate::volume::{Control, Node, PublishRequest};

#[tonic::async_trait]
impl NodeService for Service<Node> {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        self.run("NodePublishVolume", move |node| {
            Ok(node.publish(&publish(node, request)?)?)
        })
        .await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let NodeUnpublishVolumeRequest { volume_id, target_path } = request.into_inner();
        self.run("NodeUnpublishVolume", move |node| {
            let id = parse::volume_id(&volume_id)?;
            let target = parse::target(target_path).map_err(parse::about(&id, Some(node.name())))?;
            Ok(node.unpublish(&id, &target)?)
        })
        .await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let NodeGetVolumeStatsRequest {
            volume_id,
            volume_path,
            staging_target_path: _,
        } = request.into_inner();
        let space = self
            .run("NodeGetVolumeStats", move |node| {
                let id = parse::volume_id(&volume_id)?;
                if volume_path.is_empty() {
                    let missing = Status::invalid_argument("volume_path is missing");
                    return Err(parse::about(&id, Some(node.name()))(missing));
                }
                Ok(node.stats(&id, &volume_path)?)
            })
            .await?;
        Ok(Response::new(NodeGetVolumeStatsResponse { usage: usage(space) }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let NodeExpandVolumeRequest {
            volume_id,
            volume_path,
            capacity_range,
            staging_target_path: _,
            volume_capability: _,
            secrets: _,
        } = request.into_inner();
        let bytes = self
            .run("NodeExpandVolume", move |node| {
                let id = parse::volume_id(&volume_id)?;
                let about = parse::about(&id, Some(node.name()));
                // The path must be given but is not used: a volume has one size, wherever it is mounted.
                if volume_path.is_empty() {
                    return Err(about(Status::invalid_argument("volume_path is missing")));
                }
                let size = parse::size(capacity_range).map_err(&about)?;
                Ok(node.expand_here(&id, size)?)
            })
            .await?;
        Ok(Response::new(NodeExpandVolumeResponse {
            capacity_bytes: signed(bytes),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: RpcType| NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        };
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: vec![
                capability(RpcType::GetVolumeStats),
                capability(RpcType::ExpandVolume),
                capability(RpcType::SingleNodeMultiWriter),
            ],
        }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        let node = self.subject.name();
        Ok(Response::new(NodeGetInfoResponse {
            node_id: node.to_string(),
            // No limit, because a bind mount costs next to nothing.
            max_volumes_per_node: 0,
            accessible_topology: Some(parse::here(node)),
        }))
    }
}

fn publish(node: &Node, request: NodePublishVolumeRequest) -> Result<PublishRequest, Status> {
    let NodePublishVolumeRequest {
        volume_id,
        publish_context: _,
        staging_target_path: _,
        target_path,
        volume_capability,
        readonly,
        secrets: _,
        mut volume_context,
    } = request;
    let id = parse::volume_id(&volume_id)?;
    let about = parse::about(id.clone(), Some(node.name()));
    let target = parse::target(target_path).map_err(&about)?;
    let capability =
        volume_capability.ok_or_else(|| about(Status::invalid_argument("volume_capability is missing")))?;
    let filesystem = || node.get(&id).ok().and_then(|volume| node.filesystem(&volume.pool));
    let (mode, options) = parse::capability(capability, filesystem).map_err(&about)?;
    let options = MountOptions {
        read_only: options.read_only || readonly,
        ..options
    };
    // The rest of the context is ignored. A value that is not an id is never repeated in a message.
    let made_on = volume_context.remove(CONTEXT_POOL_ID).and_then(|id| id.parse().ok());
    let uid = volume_context.remove(CONTEXT_UID).and_then(|uid| uid.parse().ok());
    Ok(PublishRequest {
        id,
        target,
        mode,
        options,
        made_on,
        uid,
    })
}

fn usage(space: Space) -> Vec<VolumeUsage> {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let usage = |unit: Unit, total, available, used| VolumeUsage {
        unit: unit.into(),
        total: signed(total),
        available: signed(available),
        used: signed(used),
    };
    let Space {
        total: Bytes(total),
        available: Bytes(available),
        used: Bytes(used),
        ..
    } = space;
    let bytes = usage(Unit::Bytes, total, available, used);
    // Not every filesystem counts inodes.
    let inodes =
        (space.inodes > 0).then(|| usage(Unit::Inodes, space.inodes, space.inodes_available, space.inodes_used));
    std::iter::once(bytes).chain(inodes).collect()
}
