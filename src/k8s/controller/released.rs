//! Volumes with data whose PersistentVolume is gone: deleted with the policy Retain, or by force. Nobody asks for them any more, and
//! nobody else would say that they are there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::PersistentVolume;
use kube::Client;
use kube::api::Api;
use serde_json::json;
use tokio::runtime::Handle;
use tracing::warn;

use crate::k8s::api::{Condition, PV_GONE};
use crate::k8s::client::find;
use crate::k8s::convert;
use crate::k8s::events::Events;
use crate::k8s::store::ApiStore;
use crate::volume::Reason;
use crate::volume::controller::cache::ClusterCache;
use crate::volume::host_volume::{HostVolume, HostVolumeStore as _};
use crate::volume::id::VolumeId;

/// How long a PersistentVolume must be gone: the watches of both kinds of objects are not in step.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many volumes are marked in one pass at most.
const MARKS_MAX: usize = 50;

/// Marks volumes whose PersistentVolume is gone.
pub(super) struct Released {
    cache: Arc<ClusterCache>,
    store: Arc<ApiStore>,
    client: Client,
    runtime: Handle,
    /// Volumes without PersistentVolume, and since when this controller knows it.
    gone: BTreeMap<VolumeId, Instant>,
}

impl Released {
    pub(super) fn new(cache: Arc<ClusterCache>, store: Arc<ApiStore>, client: Client, runtime: Handle) -> Self {
        let gone = BTreeMap::new();
        Self {
            cache,
            store,
            client,
            runtime,
            gone,
        }
    }

    /// Returns what went wrong, with the volume.
    pub(super) fn pass(&mut self, events: &Events) -> Vec<(VolumeId, Reason)> {
        let now = self.cache.released();
        self.gone.retain(|id, _| now.unmarked.contains(id));
        for id in now.unmarked {
            self.gone.entry(id).or_insert_with(Instant::now);
        }
        let long_gone = self.gone.iter().filter(|(_, since)| since.elapsed() >= PATIENCE);
        let marks: Vec<(VolumeId, bool)> = long_gone
            .map(|(id, _)| (id.clone(), true))
            .chain(now.back.into_iter().map(|id| (id, false)))
            .take(MARKS_MAX)
            .collect();
        let mut failed = Vec::new();
        for (id, gone) in marks {
            if let Err(why) = self.mark(&id, gone, events) {
                failed.push((id, why));
            }
        }
        failed
    }

    fn mark(&self, id: &VolumeId, gone: bool, events: &Events) -> Result<(), Reason> {
        let Some(volume) = self.store.get(id)? else {
            return Ok(());
        };
        // The watch may be late.
        if volume.deleting || self.exists(&volume)? == gone || !self.write(&volume, gone)? || !gone {
            return Ok(());
        }
        let note = message(&volume);
        warn!(volume.id = %id, node = %volume.node, "{note}");
        events.warn(&volume, PV_GONE, &note);
        Ok(())
    }

    fn exists(&self, volume: &HostVolume) -> Result<bool, Reason> {
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let found = volumes.get_metadata(&volume.spec.name);
        Ok(find(&self.runtime, "read a PersistentVolume", found)?.is_some())
    }

    /// Writes the condition. Returns false if the HostVolume has changed meanwhile.
    fn write(&self, volume: &HostVolume, gone: bool) -> Result<bool, Reason> {
        let condition = Condition {
            type_: PV_GONE.into(),
            status: if gone { "True" } else { "False" }.into(),
            reason: if gone { "NotFound" } else { "Found" }.into(),
            message: if gone {
                message(volume)
            } else {
                "its PersistentVolume is there".into()
            },
            last_transition_time: convert::now(),
        };
        let written = self.store.write_status(volume, &json!({"conditions": [condition]}))?;
        Ok(written.is_some())
    }
}

fn message(volume: &HostVolume) -> String {
    let HostVolume {
        id,
        uid,
        node,
        pool,
        spec,
        ..
    } = volume;
    format!(
        "PersistentVolume {} is gone, and the data of its volume is still in pool {pool} of node {node}; to use it again, create a \
         PersistentVolume for it (deploy/README.md); to erase it: kubectl annotate hostvolume {id} hostdir.csi/delete-data={uid} && \
         kubectl delete hostvolume {id}",
        spec.name
    )
}
