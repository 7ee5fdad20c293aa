//! Reads and marks the HostVolumes of this node, for the core. A volume whose data is on the node needs none of this: it is
//! mounted without the API server.

use std::sync::Arc;

use kube::Client;
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::cache::NodeCache;
use crate::k8s::client::api_error;
use crate::k8s::convert;
use crate::k8s::store::ApiStore;
use crate::volume::Reason;
use crate::volume::host_volume::{Assignments, HostVolume, HostVolumeStore as _};
use crate::volume::id::VolumeId;
use crate::volume::record::{Phase, Record};

/// How many times to try to mark a volume while its HostVolume keeps changing.
const CONFLICTS: usize = 3;

pub(super) struct ApiAssignments {
    cache: Arc<NodeCache>,
    pub(super) store: ApiStore,
}

impl ApiAssignments {
    pub(super) fn new(cache: Arc<NodeCache>, client: Client, runtime: Handle) -> Self {
        Self {
            cache,
            store: ApiStore::new(client, runtime),
        }
    }

    /// Writes the status of a HostVolume. Returns false if the object has changed since `volume` was read.
    pub(super) fn write_status(&self, volume: &HostVolume, status: &Value) -> Result<bool, Reason> {
        let Some(object) = self.store.write_status(volume, status)? else {
            return Ok(false);
        };
        if let Ok(volume) = convert::host_volume(object) {
            self.cache.update(volume);
        }
        Ok(true)
    }
}

impl Assignments for ApiAssignments {
    fn get_cached(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        match self.cache.get(id) {
            Some(volume) => Ok(Some(volume)),
            // The watch may be late.
            None => self.get(id),
        }
    }

    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        self.store.get(id)
    }

    fn mark_ready(&self, record: &Record) -> Result<(), Reason> {
        // Volumes of the self-test have no HostVolume.
        if record.uid.is_none() && record.id.is_of_self_test() {
            return Ok(());
        }
        let here = record.pool_id;
        let mut volume = self.get_cached(&record.id)?;
        for _ in 0..CONFLICTS {
            let same = volume.filter(|volume| Some(volume.uid) == record.uid);
            let current = same.ok_or(Reason::NoSuchVolume)?;
            match current.made_on {
                _ if current.unreadable.is_some() => return Err(Reason::NoSuchVolume),
                _ if current.deleting => return Err(Reason::Deleting),
                Some(there) if there == here => return Ok(()),
                Some(there) => return Err(Reason::data_missing(there, &[here])),
                None => {}
            }
            let status = json!({"phase": Phase::Ready, "poolId": here.to_string(), "reason": null, "message": null});
            if self.write_status(&current, &status)? {
                return Ok(());
            }
            volume = self.get(&record.id)?;
        }
        let why = "the object keeps changing";
        Err(api_error("mark its HostVolume as Ready", why.into()))
    }
}
