//! What controllers do unasked: let go of what a vanished node held, and sweep promises that nobody ever used.
//!
//! Every controller does it. Each change names the version it was decided on, so that of several only one is made.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use kube::Client;
use kube::api::{Api, DeleteParams};
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::api::HostNode;
use super::events::Events;
use super::{ApiBook, Problem, ask, find};
use crate::metrics::Metrics;
use crate::volume::Reason;
use crate::volume::id::{NodeName, VolumeId};
use crate::volume::ports::{Book, Promise, Stage};
use crate::volume::registry::Registry;

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(5);
/// How often it looks for promises that nobody used.
const SWEEP_PERIOD: Duration = Duration::from_secs(30);
/// How long a promise that somebody may yet use, or that cannot be looked at, is not looked at again.
const LOOK_AGAIN: Duration = Duration::from_hours(1);
/// Promises looked at in one sweep: each costs two requests.
const SWEEP_MAX: usize = 100;

/// How patient it is.
#[derive(Clone, Copy, Debug)]
pub struct JanitorConfig {
    /// How long a Node must not exist before what it held is let go of.
    pub node_grace: Duration,
    /// How old a promise must be that nobody used, and that has neither PersistentVolume nor claim.
    pub unused_age: Duration,
}

/// The janitor of a controller.
pub struct Janitor {
    config: JanitorConfig,
    registry: Arc<Registry>,
    book: Arc<ApiBook>,
    client: Client,
    events: Events,
    runtime: Handle,
    metrics: Arc<Metrics>,
    swept: Option<Instant>,
    /// Promises that were found to be in use, and when.
    in_use: HashMap<VolumeId, Instant>,
}

impl Janitor {
    /// A janitor; `instance` is the name of this controller's pod.
    #[must_use]
    pub fn new(
        config: JanitorConfig,
        registry: &Arc<Registry>,
        book: &Arc<ApiBook>,
        client: Client,
        instance: String,
        runtime: Handle,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let events = Events::new(client.clone(), instance, runtime.clone());
        Self {
            config,
            registry: Arc::clone(registry),
            book: Arc::clone(book),
            client,
            events,
            runtime,
            metrics: Arc::clone(metrics),
            swept: None,
            in_use: HashMap::new(),
        }
    }

    /// Works for ever, on a thread of its own.
    pub fn run(mut self) {
        loop {
            std::thread::sleep(PERIOD);
            self.measure();
            if !self.registry.is_complete() {
                continue;
            }
            self.registry.note_absent();
            self.let_go();
            self.sweep();
        }
    }

    fn measure(&self) {
        let counts = self.registry.counts();
        self.metrics.set_volumes("Claimed", counts.claimed);
        self.metrics.set_volumes("Ready", counts.ready);
        self.metrics.set_volumes("Lost", counts.lost);
        self.metrics.set_deletes(counts.deleting, self.registry.oldest_delete());
        self.metrics.clear_pools();
        for pool in self.registry.pools() {
            let (node, name) = (pool.node.as_str(), pool.pool.as_str());
            self.metrics
                .set_pool(node, name, pool.size.0, pool.promised.0, pool.room.0);
        }
    }

    /// Notes what could not be done, and goes on: one object must not stop the rest.
    fn note(&self, what: &dyn std::fmt::Display, done: Result<(), Reason>) {
        if let Err(reason) = done {
            self.metrics.failed("janitor");
            warn!(%what, why = %reason, "cannot tidy up; trying again");
        }
    }

    /// Ends deletes that wait for nodes that are gone for good.
    fn let_go(&self) {
        for id in self.registry.abandoned(self.config.node_grace) {
            self.note(&id, self.let_go_of(&id));
        }
        for node in self.registry.empty_absent_nodes(self.config.node_grace) {
            self.note(&node, self.forget(&node));
        }
    }

    fn let_go_of(&self, id: &VolumeId) -> Result<(), Reason> {
        let Some(promise) = self.book.look_up(id)? else {
            return Ok(());
        };
        if !promise.deleting || self.exists(&promise.node)? || !self.book.release(&promise)? {
            return Ok(());
        }
        self.metrics.abandoned();
        let note = format!(
            "volume {id} was deleted without node {}, whose Node object has been gone for {} s; if the node comes back, its \
             data there is listed as orphaned",
            promise.node,
            self.config.node_grace.as_secs()
        );
        warn!(volume.id = %id, node = %promise.node, "{note}");
        self.events.warn(&promise, "NodeGone", &note);
        Ok(())
    }

    /// Whether a Node exists, by the API server's own word: a watch may be late.
    fn exists(&self, node: &NodeName) -> Result<bool, Reason> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        Ok(find(&self.runtime, "read a Node", nodes.get_metadata(node.as_str()))?.is_some())
    }

    fn forget(&self, node: &NodeName) -> Result<(), Reason> {
        if self.exists(node)? {
            return Ok(());
        }
        let nodes: Api<HostNode> = Api::all(self.client.clone());
        let params = DeleteParams::default();
        match ask(&self.runtime, "delete a HostNode", nodes.delete(node.as_str(), &params)) {
            Ok(_) => info!(node = %node, "the node is gone: forgot its pools"),
            Err(Problem::NotFound(_)) => {}
            Err(problem) => return Err(problem.into()),
        }
        Ok(())
    }

    /// Deletes promises that never had data and that nobody will ever ask for again: a leader that died between making
    /// one and saying so leaves such behind.
    fn sweep(&mut self) {
        if self.swept.is_some_and(|last| last.elapsed() < SWEEP_PERIOD) {
            return;
        }
        self.swept = Some(Instant::now());
        self.in_use.retain(|_, looked| looked.elapsed() < LOOK_AGAIN);
        let Ok(before) = Timestamp::now().checked_sub(self.config.unused_age) else {
            return;
        };
        let unused = self.registry.never_used(before);
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

    /// Says whether the promise is gone.
    fn sweep_one(&self, id: &VolumeId) -> Result<bool, Reason> {
        let Some(promise) = self.book.look_up(id)? else {
            return Ok(true);
        };
        if promise.stage != Stage::Claimed || promise.deleting || self.is_in_use(&promise)? {
            return Ok(false);
        }
        let left = self.book.delete(id, promise.uid)?;
        if let Some(left) = left.filter(|left| left.stage == Stage::Claimed) {
            self.book.release(&left)?;
        }
        self.metrics.swept();
        info!(volume.id = %id, node = %promise.node, "swept a volume that nobody ever used: it has neither PersistentVolume nor claim");
        Ok(true)
    }

    /// Whether there is a PersistentVolume or a claim for it. Where the claim is not known, there may be.
    fn is_in_use(&self, promise: &Promise) -> Result<bool, Reason> {
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        if find(
            &self.runtime,
            "read a PersistentVolume",
            volumes.get_metadata(&promise.name),
        )?
        .is_some()
        {
            return Ok(true);
        }
        // A claim can be met elsewhere, but not while its name is taken on a node that is gone.
        if self.registry.is_gone(&promise.node, self.config.node_grace) && !self.exists(&promise.node)? {
            return Ok(false);
        }
        let Some(claim) = &promise.claim else { return Ok(true) };
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &claim.namespace);
        let found = find(&self.runtime, "read a claim", claims.get_metadata(&claim.name))?;
        Ok(found.is_some_and(|found| {
            let uid = found.metadata.uid.unwrap_or_default();
            // A claim of that name may be another one; what is not named after its claim may be anybody's.
            promise.name.strip_prefix("pvc-").is_none_or(|wanted| wanted == uid)
        }))
    }
}
