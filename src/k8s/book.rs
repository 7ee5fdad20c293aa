//! The book of promises: HostVolumes, as controllers read and write them.

use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::json;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::api::HostVolume;
use super::{Problem, api, ask, convert, find};
use crate::volume::Reason;
use crate::volume::id::VolumeId;
use crate::volume::ports::{Book, Draft, Promise};
use crate::volume::size::Bytes;

const READ: &str = "read its HostVolume";

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
}

fn read(object: HostVolume) -> Result<Promise, Reason> {
    convert::promise(object).map_err(|error| api(READ, format!("{error:#}")))
}

impl Book for ApiBook {
    fn promise(&self, draft: &Draft) -> Result<(Promise, bool), Reason> {
        let verb = "make its HostVolume";
        let object = convert::draft(draft);
        let params = PostParams::default();
        match ask(&self.runtime, verb, self.volumes.create(&params, &object)) {
            Ok(object) => Ok((read(object)?, true)),
            Err(Problem::Conflict(_)) => match self.look_up(&draft.id)? {
                Some(promise) => Ok((promise, false)),
                None => Err(Reason::Deleting),
            },
            Err(problem) => Err(problem.into()),
        }
    }

    fn look_up(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        find(&self.runtime, READ, self.volumes.get(id.as_str()))?
            .map(read)
            .transpose()
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
            Err(Problem::NotFound(_)) => Ok(None),
            // Another one of that name: what we were asked to delete is gone, but the caller may mean this one.
            Err(problem) => Err(problem.into()),
        }
    }

    fn expand(&self, promise: &Promise, bytes: Bytes) -> Result<Option<Promise>, Reason> {
        let verb = "raise the capacity of its HostVolume";
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": promise.version},
            "spec": {"capacity": bytes.quantity()},
        }));
        let params = PatchParams::default();
        let patched = self.volumes.patch(promise.id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, patched) {
            Ok(object) => read(object).map(Some),
            Err(Problem::Conflict(_)) => Ok(None),
            Err(Problem::NotFound(_)) => Err(Reason::NoSuchVolume),
            Err(problem) => Err(problem.into()),
        }
    }

    fn release(&self, promise: &Promise) -> Result<bool, Reason> {
        let verb = "take the finalizer off its HostVolume";
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": promise.version, "finalizers": promise.holders},
        }));
        let params = PatchParams::default();
        let patched = self.volumes.patch(promise.id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, patched) {
            Ok(_) | Err(Problem::NotFound(_)) => Ok(true),
            Err(Problem::Conflict(_)) => Ok(false),
            Err(problem) => Err(problem.into()),
        }
    }
}
