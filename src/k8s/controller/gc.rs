//! Garbage collection: finishes deletes whose node is gone for good, and deletes volumes that were never used.
//!
//! Every controller does this. Each change names the version that it was decided on, so only one of several controllers
//! makes it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use kube::Client;
use kube::api::{Api, DeleteParams};
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::released::Released;
use crate::k8s::api::HostNode;
use crate::k8s::client::{Problem, ask, find};
use crate::k8s::events::Events;
use crate::k8s::store::ApiStore;
use crate::metrics::Metrics;
use crate::volume::Reason;
use crate::volume::controller::cache::ClusterCache;
use crate::volume::host_volume::{HostVolume, HostVolumeStore as _};
use crate::volume::id::{NodeName, VolumeId};
use crate::volume::record::Phase;

const PERIOD: Duration = Duration::from_secs(5);
/// How often to look for volumes that were never used.
const SWEEP_PERIOD: Duration = Duration::from_secs(30);
/// How long to skip a volume that may still be used.
const LOOK_AGAIN: Duration = Duration::from_hours(1);
/// How many volumes one sweep checks at most: each costs two requests.
const SWEEP_MAX: usize = 100;

#[derive(Clone, Copy, Debug)]
pub(crate) struct GcConfig {
    /// How long a Node must be gone before deletes stop waiting for it.
    pub(crate) node_grace: Duration,
    /// The age at which a volume is deleted if it was never used and has neither a PersistentVolume nor a claim.
    pub(crate) unused_age: Duration,
}

/// The garbage collector of a controller.
pub(crate) struct Gc {
    config: GcConfig,
    cache: Arc<ClusterCache>,
    store: Arc<ApiStore>,
    client: Client,
    events: Events,
    runtime: Handle,
    metrics: Arc<Metrics>,
    swept: Option<Instant>,
    released: Released,
    /// Volumes that were found to be in use, and when.
    in_use: HashMap<VolumeId, Instant>,
}

impl Gc {
    /// `instance` is the name of this controller's pod.
    pub(crate) fn new(
        config: GcConfig,
        cache: &Arc<ClusterCache>,
        store: &Arc<ApiStore>,
        client: Client,
        instance: String,
        runtime: Handle,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let events = Events::new(client.clone(), instance, runtime.clone());
        let released = Released::new(Arc::clone(cache), Arc::clone(store), client.clone(), runtime.clone());
        Self {
            config,
            cache: Arc::clone(cache),
            store: Arc::clone(store),
            client,
            events,
            runtime,
            metrics: Arc::clone(metrics),
            swept: None,
            released,
            in_use: HashMap::new(),
        }
    }

    /// Runs forever, on a thread of its own.
    pub(crate) fn run(&mut self) {
        loop {
            std::thread::sleep(PERIOD);
            self.measure();
            if !self.cache.is_complete() {
                continue;
            }
            self.cache.note_absent();
            self.finish_deletes();
            self.sweep();
            for (id, why) in self.released.pass(&self.events) {
                self.note(&id, Err(why));
            }
        }
    }

    fn measure(&self) {
        let counts = self.cache.counts();
        self.metrics.set_volumes(Phase::Claimed, counts.claimed);
        self.metrics.set_volumes(Phase::Ready, counts.ready);
        self.metrics.set_volumes(Phase::Lost, counts.lost);
        self.metrics.set_deletes(counts.deleting, self.cache.oldest_delete());
        self.metrics.set_released(self.cache.released().marked);
        self.metrics.clear_pools();
        for pool in self.cache.pools() {
            self.metrics.set_pool(&pool);
        }
    }

    /// Logs and counts a failure, but goes on: one object must not stop the rest.
    fn note(&self, what: &dyn std::fmt::Display, done: Result<(), Reason>) {
        if let Err(reason) = done {
            self.metrics.failed("janitor");
            warn!(%what, why = %reason, "garbage collection failed; trying again");
        }
    }

    /// Finishes deletes that wait for nodes that are gone for good.
    fn finish_deletes(&self) {
        for id in self.cache.abandoned(self.config.node_grace) {
            self.note(&id, self.finish_delete(&id));
        }
        for node in self.cache.empty_absent_nodes(self.config.node_grace) {
            self.note(&node, self.delete_host_node(&node));
        }
    }

    fn finish_delete(&self, id: &VolumeId) -> Result<(), Reason> {
        let Some(volume) = self.store.get(id)? else {
            return Ok(());
        };
        if !volume.deleting || self.exists(&volume.node)? || !self.store.remove_finalizer(&volume)? {
            return Ok(());
        }
        self.metrics.abandoned();
        let note = format!(
            "volume {id} was deleted without node {}, whose Node object has been gone for {} s; if the node comes back, its \
             data there is listed as an orphan",
            volume.node,
            self.config.node_grace.as_secs()
        );
        warn!(volume.id = %id, node = %volume.node, "{note}");
        self.events.warn(&volume, "NodeGone", &note);
        Ok(())
    }

    /// Whether a Node exists. Asks the API server, because a watch may be late.
    fn exists(&self, node: &NodeName) -> Result<bool, Reason> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        Ok(find(&self.runtime, "read a Node", nodes.get_metadata(node.as_str()))?.is_some())
    }

    fn delete_host_node(&self, node: &NodeName) -> Result<(), Reason> {
        if self.exists(node)? {
            return Ok(());
        }
        let nodes: Api<HostNode> = Api::all(self.client.clone());
        let params = DeleteParams::default();
        match ask(&self.runtime, "delete a HostNode", nodes.delete(node.as_str(), &params)) {
            Ok(_) => info!(node = %node, "deleted the HostNode of a node that is gone"),
            Err(Problem::NotFound(_)) => {}
            Err(problem) => return Err(problem.into()),
        }
        Ok(())
    }

    /// Deletes volumes that never had data and that nobody will ask for again: a leader that dies between recording a volume
    /// and answering leaves one behind.
    fn sweep(&mut self) {
        if self.swept.is_some_and(|last| last.elapsed() < SWEEP_PERIOD) {
            return;
        }
        self.swept = Some(Instant::now());
        self.in_use.retain(|_, looked| looked.elapsed() < LOOK_AGAIN);
        let Ok(before) = Timestamp::now().checked_sub(self.config.unused_age) else {
            return;
        };
        let unused = self.cache.never_used(before);
        let candidates: Vec<VolumeId> = unused
            .into_iter()
            .filter(|id| !self.in_use.contains_key(id))
            .take(SWEEP_MAX)
            .collect();
        for id in candidates {
            let swept = self.sweep_one(&id);
            if !matches!(swept, Ok(true)) {
                self.in_use.insert(id.clone(), Instant::now());
            }
            self.note(&id, swept.map(drop));
        }
    }

    /// Returns whether the volume is gone.
    fn sweep_one(&self, id: &VolumeId) -> Result<bool, Reason> {
        let Some(volume) = self.store.get(id)? else {
            return Ok(true);
        };
        if volume.phase != Phase::Claimed || volume.deleting || self.is_in_use(&volume)? {
            return Ok(false);
        }
        let left = self.store.delete(id, volume.uid)?;
        if let Some(left) = left.filter(|left| left.phase == Phase::Claimed) {
            self.store.remove_finalizer(&left)?;
        }
        self.metrics.swept();
        info!(volume.id = %id, node = %volume.node, "deleted a volume that was never used: no PersistentVolume, no claim");
        Ok(true)
    }

    /// Whether the volume has a PersistentVolume or a claim. A volume whose claim is not known counts as in use.
    fn is_in_use(&self, volume: &HostVolume) -> Result<bool, Reason> {
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        if find(
            &self.runtime,
            "read a PersistentVolume",
            volumes.get_metadata(&volume.spec.name),
        )?
        .is_some()
        {
            return Ok(true);
        }
        // Its claim can get a volume on another node, but not while a volume on a node that is gone has the name.
        if self.cache.is_gone(&volume.node, self.config.node_grace) && !self.exists(&volume.node)? {
            return Ok(false);
        }
        let Some(claim) = &volume.spec.claim else {
            return Ok(true);
        };
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &claim.namespace);
        let found = find(&self.runtime, "read a claim", claims.get_metadata(&claim.name))?;
        Ok(found.is_some_and(|found| {
            let uid = found.metadata.uid.unwrap_or_default();
            // A later claim may have the same name. A volume that is not named after a claim may belong to any claim of that
            // name.
            volume.spec.name.strip_prefix("pvc-").is_none_or(|wanted| wanted == uid)
        }))
    }
}
