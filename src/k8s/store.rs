//! Reads and writes HostVolumes in the API server, for controllers and nodes.

use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use uuid::Uuid;

use super::client::{Problem, api_error, ask, find};
use super::{api, convert};
use crate::volume::Reason;
use crate::volume::host_volume::{HostVolume, HostVolumeStore, NewHostVolume, NotCreated};
use crate::volume::id::VolumeId;
use crate::volume::size::Bytes;

const READ: &str = "read its HostVolume";

/// Its verbs block, so only threads outside the runtime may call them.
pub(crate) struct ApiStore {
    volumes: Api<api::HostVolume>,
    runtime: Handle,
}

impl ApiStore {
    pub(crate) fn new(client: Client, runtime: Handle) -> Self {
        let volumes = Api::all(client);
        Self { volumes, runtime }
    }

    /// Writes the status of a HostVolume, and returns the changed object; `None` if it has changed since `volume` was read.
    pub(super) fn write_status(&self, volume: &HostVolume, status: &Value) -> Result<Option<api::HostVolume>, Reason> {
        let verb = "write the status of its HostVolume";
        let patch = Patch::Merge(json!({"metadata": {"resourceVersion": volume.version}, "status": status}));
        let params = PatchParams::default();
        let patched = self.volumes.patch_status(volume.id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, patched) {
            Ok(object) => Ok(Some(object)),
            Err(Problem::Conflict(_) | Problem::NotFound(_)) => Ok(None),
            Err(problem) => Err(problem.into()),
        }
    }
}

fn read(object: api::HostVolume) -> Result<HostVolume, Reason> {
    convert::host_volume(object).map_err(|error| api_error(READ, format!("{error:#}")))
}

impl HostVolumeStore for ApiStore {
    fn create_or_get(&self, new: &NewHostVolume) -> Result<(HostVolume, bool), NotCreated> {
        let verb = "create its HostVolume";
        let object = convert::new_host_volume(new);
        let params = PostParams::default();
        match ask(&self.runtime, verb, self.volumes.create(&params, &object)) {
            Ok(object) => Ok((read(object).map_err(NotCreated::unsure)?, true)),
            Err(Problem::Conflict(_)) => match self.get(&new.id).map_err(NotCreated::unsure)? {
                Some(host_volume) => Ok((host_volume, false)),
                None => Err(NotCreated {
                    reason: Reason::Deleting,
                    unsure: false,
                }),
            },
            Err(problem) => Err(NotCreated {
                unsure: matches!(problem, Problem::Other(_)),
                reason: problem.into(),
            }),
        }
    }

    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        find(&self.runtime, READ, self.volumes.get(id.as_str()))?
            .map(read)
            .transpose()
    }

    fn delete(&self, id: &VolumeId, uid: Uuid) -> Result<Option<HostVolume>, Reason> {
        let verb = "note that the data of its HostVolume may be deleted";
        let patch = Patch::Merge(json!({
            "metadata": {"uid": uid, "annotations": {api::DELETE_DATA: uid}},
        }));
        let params = PatchParams::default();
        let noted = self.volumes.patch_metadata(id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, noted) {
            Ok(_) => {}
            Err(Problem::NotFound(_)) => return Ok(None),
            Err(problem) => return Err(problem.into()),
        }
        let verb = "delete its HostVolume";
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(uid.to_string()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match ask(&self.runtime, verb, self.volumes.delete(id.as_str(), &params)) {
            Ok(left) => left.left().map(read).transpose(),
            Err(Problem::NotFound(_)) => Ok(None),
            // Another HostVolume has that name: the one to delete is gone, but the caller may mean this one.
            Err(problem) => Err(problem.into()),
        }
    }

    fn set_capacity(&self, volume: &HostVolume, bytes: Bytes) -> Result<Option<HostVolume>, Reason> {
        let verb = "raise the capacity of its HostVolume";
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": volume.version},
            "spec": {"capacity": bytes.quantity()},
        }));
        let params = PatchParams::default();
        let patched = self.volumes.patch(volume.id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, patched) {
            Ok(object) => read(object).map(Some),
            Err(Problem::Conflict(_)) => Ok(None),
            Err(Problem::NotFound(_)) => Err(Reason::NoSuchVolume),
            Err(problem) => Err(problem.into()),
        }
    }

    fn remove_finalizer(&self, volume: &HostVolume) -> Result<bool, Reason> {
        let verb = "remove the finalizer of its HostVolume";
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": volume.version, "finalizers": volume.other_finalizers},
        }));
        let params = PatchParams::default();
        let patched = self.volumes.patch(volume.id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, patched) {
            Ok(_) | Err(Problem::NotFound(_)) => Ok(true),
            Err(Problem::Conflict(_)) => Ok(false),
            Err(problem) => Err(problem.into()),
        }
    }
}
