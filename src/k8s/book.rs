//! The book of promises: HostVolumes, as controllers read and write them.

use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::json;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::api::HostVolume;
use super::{Problem, api, ask, convert};
use crate::volume::Reason;
use crate::volume::id::VolumeId;
use crate::volume::ports::{Book, Draft, Promise};
use crate::volume::size::Bytes;

/// The API server's book.
pub struct ApiBook {
    volumes: Api<HostVolume>,
    runtime: Handle,
}

impl ApiBook {
    /// The book that this client reaches. Its verbs are for threads outside the runtime.
    #[must_use]
    pub fn new(client: Client, runtime: Handle) -> Self {
        let volumes = Api::all(client);
        Self { volumes, runtime }
    }

    fn look(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        match ask(&self.runtime, "read its HostVolume", self.volumes.get(id.as_str())) {
            Ok(object) => Ok(Some(object)),
            Err(Problem::NotFound) => Ok(None),
            Err(problem) => Err(problem.into_reason("read its HostVolume")),
        }
    }
}

fn read(object: HostVolume) -> Result<Promise, Reason> {
    convert::promise(object).map_err(|error| api("read its HostVolume", format!("{error:#}")))
}

impl Book for ApiBook {
    fn promise(&self, draft: &Draft) -> Result<(Promise, bool), Reason> {
        let verb = "make its HostVolume";
        let object = convert::draft(draft);
        let params = PostParams::default();
        match ask(&self.runtime, verb, self.volumes.create(&params, &object)) {
            Ok(object) => Ok((read(object)?, true)),
            Err(Problem::Conflict) => match self.look(&draft.id)? {
                Some(object) => Ok((read(object)?, false)),
                None => Err(Reason::Deleting),
            },
            Err(problem) => Err(problem.into_reason(verb)),
        }
    }

    fn look_up(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        self.look(id)?.map(read).transpose()
    }

    fn delete(&self, id: &VolumeId, uid: Uuid) -> Result<Option<Promise>, Reason> {
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
            Err(Problem::NotFound) => Ok(None),
            // Another one of that name: what we were asked to delete is gone, but the caller may mean this one.
            Err(problem) => Err(problem.into_reason(verb)),
        }
    }

    fn expand(&self, promise: &Promise, bytes: Bytes) -> Result<bool, Reason> {
        let verb = "raise the capacity of its HostVolume";
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": promise.version},
            "spec": {"capacity": bytes.quantity()},
        }));
        let params = PatchParams::default();
        let patched = self.volumes.patch(promise.id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, patched) {
            Ok(_) => Ok(true),
            Err(Problem::Conflict) => Ok(false),
            Err(Problem::NotFound) => Err(Reason::NoSuchVolume),
            Err(problem) => Err(problem.into_reason(verb)),
        }
    }

    fn release(&self, promise: &Promise) -> Result<bool, Reason> {
        let verb = "take the finalizer off its HostVolume";
        match ask(&self.runtime, verb, release(&self.volumes, promise)) {
            Ok(_) | Err(Problem::NotFound) => Ok(true),
            Err(Problem::Conflict) => Ok(false),
            Err(problem) => Err(problem.into_reason(verb)),
        }
    }
}

/// Takes the finalizer off, if the object is still of the version that was read.
pub(super) async fn release(volumes: &Api<HostVolume>, promise: &Promise) -> kube::Result<HostVolume> {
    let patch = json!({"metadata": {"resourceVersion": promise.version, "finalizers": promise.holders}});
    let params = PatchParams::default();
    volumes.patch(promise.id.as_str(), &params, &Patch::Merge(&patch)).await
}
