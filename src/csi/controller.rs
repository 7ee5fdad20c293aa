//! CSI Controller: creates, deletes, lists and expands volumes.

use std::collections::HashMap;

use tonic::{Request, Response, Status};

use super::proto::controller_server::Controller;
use super::proto::controller_service_capability::rpc::Type as RpcType;
use super::proto::controller_service_capability::{Rpc, Type};
use super::proto::validate_volume_capabilities_response::Confirmed;
use super::proto::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerGetCapabilitiesRequest,
    ControllerGetCapabilitiesResponse, ControllerServiceCapability, CreateVolumeRequest, CreateVolumeResponse,
    DeleteVolumeRequest, DeleteVolumeResponse, GetCapacityRequest, GetCapacityResponse, ListVolumesRequest,
    ListVolumesResponse, ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume as ProtoVolume,
    list_volumes_response,
};
use super::{Service, parse, signed};
use crate::volume::id::{NodeName, VolumeId};
use crate::volume::size::Bytes;
use crate::volume::{Control, CreateRequest, Volume};

/// Key in the volume context: the name of the pool.
const CONTEXT_POOL: &str = "pool";
/// Key in the volume context: the id of the pool. NodePublishVolume names it when it does not find the volume.
pub(super) const CONTEXT_POOL_ID: &str = "poolId";
/// Key in the volume context: the UID of the HostVolume. NodePublishVolume does not mount the data of an earlier one.
pub(super) const CONTEXT_UID: &str = "uid";

/// How many volumes one answer of ListVolumes has at most: an entry is about 300 bytes, and gRPC clients accept 4 MiB by
/// default.
const PAGE_MAX: usize = 4096;

/// The prefix of a `starting_token`; the id of the last volume of the previous page follows it.
const TOKEN_PREFIX: &str = "after:";

/// The capacity of a StorageClass that is wrong: it has unknown parameters, or a pool that this node does not have. With
/// zero, the scheduler would only ever say "not enough free storage"; with this, the claim reaches CreateVolume, whose
/// refusal names the cause in an event on the claim. In local mode all nodes are assumed to have pools of the same names, as
/// with the chart; otherwise the StorageClass's `allowedTopologies` must name the nodes that have the pool.
const UNLIMITED: Bytes = Bytes(i64::MAX.unsigned_abs());

#[tonic::async_trait]
impl Controller for Service<dyn Control> {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let mut request = request.into_inner();
        let name = parse::name(std::mem::take(&mut request.name))?;
        let node = self.about.node.clone();
        let volume = self
            .run("CreateVolume", move |control| {
                let about = parse::about(&name, node.as_ref());
                let request = create_request(control, name.clone(), request).map_err(about)?;
                Ok(to_proto(control.create(&request)?))
            })
            .await?;
        Ok(Response::new(CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let DeleteVolumeRequest { volume_id, secrets: _ } = request.into_inner();
        self.run("DeleteVolume", move |control| {
            Ok(control.delete(&parse::volume_id(&volume_id)?)?)
        })
        .await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let node = self.about.node.clone();
        self.run("ValidateVolumeCapabilities", move |control| {
            validate(control, request, node.as_ref())
        })
        .await
        .map(Response::new)
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let ListVolumesRequest {
            max_entries,
            starting_token,
        } = request.into_inner();
        let after = token(&starting_token)?;
        let max = usize::try_from(max_entries)
            .map_err(|_| Status::invalid_argument(format!("max_entries is negative: {max_entries}")))?;
        let max = if max == 0 { PAGE_MAX } else { max.min(PAGE_MAX) };
        self.run("ListVolumes", move |control| page(control, after.as_ref(), max))
            .await
            .map(Response::new)
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        let GetCapacityRequest {
            volume_capabilities,
            parameters,
            accessible_topology,
        } = request.into_inner();
        let room = self
            .run("GetCapacity", move |control| {
                let segment = match accessible_topology {
                    Some(topology) if !topology.segments.is_empty() => match parse::segment(&topology) {
                        Some(segment) => Some(segment),
                        None => return Ok(Bytes(0)),
                    },
                    Some(_) | None => None,
                };
                let Ok((parameters, _)) = parse::parameters(parameters) else {
                    return Ok(UNLIMITED);
                };
                let filesystem = || control.filesystem(&parameters.pool);
                let possible = parse::capabilities(volume_capabilities, filesystem).is_ok();
                Ok(match control.room(&parameters.pool, segment.as_deref())? {
                    None => UNLIMITED,
                    Some(room) if possible => room,
                    Some(_) => Bytes(0),
                })
            })
            .await?;
        Ok(Response::new(GetCapacityResponse {
            available_capacity: signed(room),
            // The scheduler checks this one first; without it, it could choose this node for a claim that does not fit.
            maximum_volume_size: Some(signed(room)),
            minimum_volume_size: None,
        }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let ControllerExpandVolumeRequest {
            volume_id,
            capacity_range,
            secrets: _,
            volume_capability,
        } = request.into_inner();
        let node = self.about.node.clone();
        let (bytes, node_expansion_required) = self
            .run("ControllerExpandVolume", move |control| {
                let id = parse::volume_id(&volume_id)?;
                let about = parse::about(&id, node.as_ref());
                if capacity_range.is_none() {
                    return Err(about(Status::invalid_argument("capacity_range is missing")));
                }
                let size = parse::size(capacity_range).map_err(&about)?;
                if let Some(capability) = volume_capability {
                    parse::capability(capability, || None).map_err(&about)?;
                }
                Ok((control.expand(&id, size)?, control.expands_on_node()))
            })
            .await?;
        Ok(Response::new(ControllerExpandVolumeResponse {
            capacity_bytes: signed(bytes),
            node_expansion_required,
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let capability = |kind: RpcType| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        };
        Ok(Response::new(ControllerGetCapabilitiesResponse {
            capabilities: vec![
                capability(RpcType::CreateDeleteVolume),
                capability(RpcType::ListVolumes),
                capability(RpcType::GetCapacity),
                capability(RpcType::ExpandVolume),
                capability(RpcType::SingleNodeMultiWriter),
            ],
        }))
    }
}

fn create_request(control: &dyn Control, name: String, request: CreateVolumeRequest) -> Result<CreateRequest, Status> {
    let CreateVolumeRequest {
        name: _,
        capacity_range,
        volume_capabilities,
        parameters,
        secrets: _,
        volume_content_source,
        accessibility_requirements,
        mutable_parameters,
    } = request;
    if volume_content_source.is_some() {
        return Err(Status::invalid_argument(
            "snapshots and clones are not supported; create an empty volume and copy the data into it",
        ));
    }
    if !mutable_parameters.is_empty() {
        return Err(Status::invalid_argument(
            "VolumeAttributesClasses are not supported; leave volumeAttributesClassName out",
        ));
    }
    let (parameters, claim) = parse::parameters(parameters)?;
    if volume_capabilities.is_empty() {
        return Err(Status::invalid_argument("volume_capabilities is missing"));
    }
    parse::capabilities(volume_capabilities, || control.filesystem(&parameters.pool))?;
    let size = parse::size(capacity_range)?;
    let topology = parse::topology(accessibility_requirements);
    Ok(CreateRequest {
        name,
        size,
        parameters,
        claim,
        topology,
    })
}

fn validate(
    control: &dyn Control,
    request: ValidateVolumeCapabilitiesRequest,
    node: Option<&NodeName>,
) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
    let ValidateVolumeCapabilitiesRequest {
        volume_id,
        volume_context,
        volume_capabilities,
        parameters,
        secrets: _,
        mutable_parameters,
    } = request;
    let volume = control.get(&parse::volume_id(&volume_id)?)?;
    if volume_capabilities.is_empty() {
        let missing = Status::invalid_argument("volume_capabilities is missing");
        return Err(parse::about(&volume_id, node)(missing));
    }
    let possible = parse::capabilities(volume_capabilities.clone(), || control.filesystem(&volume.pool));
    let (pool, directory) = (volume.pool.clone(), volume.directory);
    let same_parameters = parameters.is_empty()
        || parse::parameters(parameters.clone())
            .is_ok_and(|(given, _)| given.pool == pool && given.directory == directory);
    let own_context = context(&volume);
    let same_context = volume_context
        .iter()
        .all(|(key, value)| own_context.get(key).is_none_or(|own| own == value));
    let unconfirmed = match possible {
        Err(status) => Some(status.message().to_owned()),
        Ok(()) if !same_parameters => Some("the volume was created with other parameters".to_owned()),
        Ok(()) if !same_context => Some("the volume has another volume context".to_owned()),
        Ok(()) if !mutable_parameters.is_empty() => Some("mutable parameters are not supported".to_owned()),
        Ok(()) => None,
    };
    Ok(match unconfirmed {
        Some(message) => ValidateVolumeCapabilitiesResponse {
            confirmed: None,
            message,
        },
        None => ValidateVolumeCapabilitiesResponse {
            confirmed: Some(Confirmed {
                volume_context,
                volume_capabilities,
                parameters,
                mutable_parameters,
            }),
            message: String::new(),
        },
    })
}

/// CSI: an invalid token is answered with `Aborted`; the caller starts over.
fn token(token: &str) -> Result<Option<VolumeId>, Status> {
    if token.is_empty() {
        return Ok(None);
    }
    let id = token.strip_prefix(TOKEN_PREFIX).and_then(|id| VolumeId::parse(id).ok());
    id.map(Some)
        .ok_or_else(|| Status::aborted("starting_token is not one that ListVolumes returned; start again without one"))
}

fn page(control: &dyn Control, after: Option<&VolumeId>, max: usize) -> Result<ListVolumesResponse, Status> {
    // One more volume than the page has tells whether there is another page.
    let mut volumes = control.list(after, max + 1)?;
    let more = volumes.len() > max;
    volumes.truncate(max);
    let last = volumes.last().filter(|_| more);
    let next_token = last.map_or_else(String::new, |volume| format!("{TOKEN_PREFIX}{}", volume.id));
    let entries = volumes
        .into_iter()
        .map(|volume| list_volumes_response::Entry {
            volume: Some(to_proto(volume)),
            status: None,
        })
        .collect();
    Ok(ListVolumesResponse { entries, next_token })
}

fn to_proto(volume: Volume) -> ProtoVolume {
    ProtoVolume {
        capacity_bytes: signed(volume.bytes),
        volume_context: context(&volume),
        accessible_topology: vec![parse::here(&volume.node)],
        volume_id: volume.id.into(),
        content_source: None,
    }
}

/// The context of a volume never changes, so it has only what is known from the beginning.
fn context(volume: &Volume) -> HashMap<String, String> {
    let pool = (CONTEXT_POOL.to_owned(), volume.pool.to_string());
    let identity = match (volume.uid, volume.made_on) {
        (Some(uid), _) => Some((CONTEXT_UID.to_owned(), uid.to_string())),
        (None, Some(pool_id)) => Some((CONTEXT_POOL_ID.to_owned(), pool_id.to_string())),
        (None, None) => None,
    };
    std::iter::once(pool).chain(identity).collect()
}
