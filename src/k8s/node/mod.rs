//! A node of elected mode: it follows its own HostVolumes with one API watch, makes its volumes match them ([`reconcile`]),
//! and publishes the state of its pools ([`status`]).

mod assignments;
mod cache;
mod deletes;
mod found;
mod orphans;
mod reconcile;
mod status;
mod tasks;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::Client;
use kube::api::Api;
use kube::runtime::watcher::{Config, watcher};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tracing::warn;

use super::api;
use super::events::Events;
use super::watch::follow;
use crate::metrics::Metrics;
use crate::volume::disk::Unusable;
use crate::volume::host_volume::{Assignments, HostVolume};
use crate::volume::id::{NodeName, PoolName};
use crate::volume::node::Inventory;
use crate::volume::{Node, Reason};
use assignments::ApiAssignments;
use cache::NodeCache;
use found::{Found, OnDisk};
use orphans::find_orphans;
use reconcile::{Failed, Reconciler};
use status::Publisher;
use tasks::Tasks;

/// How often a node compares its pools with its HostVolumes, and publishes the state of the pools: a disk that hangs is noticed after
/// ten seconds at most, and published within 15.
const PERIOD: Duration = Duration::from_secs(4);

/// How long a pool must be unusable before its volumes are `Lost`: opening a large pool takes a while, and so does mounting
/// a disk by hand.
const PATIENCE: Duration = Duration::from_secs(30);

/// Carries out what HostVolumes ask of this node.
pub(crate) struct Agent {
    name: NodeName,
    client: Client,
    runtime: Handle,
    metrics: Arc<Metrics>,
    cache: Arc<NodeCache>,
    assignments: Arc<ApiAssignments>,
}

impl Agent {
    pub(crate) fn new(name: NodeName, client: Client, runtime: Handle, metrics: Arc<Metrics>) -> Self {
        let cache = Arc::new(NodeCache::new(name.clone()));
        let assignments = ApiAssignments::new(Arc::clone(&cache), client.clone(), runtime.clone());
        Self {
            name,
            client,
            runtime,
            metrics,
            cache,
            assignments: Arc::new(assignments),
        }
    }

    /// The assignments, for the core. Their cache is empty before [`Agent::run`].
    pub(crate) fn assignments(&self) -> Arc<dyn Assignments> {
        Arc::clone(&self.assignments) as _
    }

    /// Runs forever. If it returns, the error says why it cannot go on.
    pub(crate) async fn run(self, node: Arc<Node>) -> anyhow::Error {
        let fields = format!("spec.node={}", self.name);
        let volumes: Api<api::HostVolume> = Api::all(self.client.clone());
        let watch = watcher(volumes, Config::default().fields(&fields));
        let reconciler = Arc::new(Reconciler {
            node: Arc::clone(&node),
            assignments: Arc::clone(&self.assignments),
            events: Events::new(self.client.clone(), self.name.to_string(), self.runtime.clone()),
        });
        let tasks = Tasks::new(Arc::clone(&reconciler), Arc::clone(&self.metrics));
        let passes = Passes {
            publisher: Publisher::new(&self.name, self.client.clone(), self.runtime.clone()),
            node,
            cache: Arc::clone(&self.cache),
            reconciler,
            tasks: Arc::clone(&tasks),
            metrics: Arc::clone(&self.metrics),
            unusable: HashMap::new(),
        };
        tokio::select! {
            () = follow("watch HostVolumes", watch, &self.metrics, &*self.cache) => anyhow::anyhow!("the API watch has ended"),
            () = deletes::run(&self.cache, &tasks, &self.metrics) => anyhow::anyhow!("the task that deletes volumes has ended"),
            error = passes.run() => error,
        }
    }
}

/// Compares all pools with all HostVolumes, again and again.
struct Passes {
    publisher: Publisher,
    node: Arc<Node>,
    cache: Arc<NodeCache>,
    reconciler: Arc<Reconciler>,
    tasks: Arc<Tasks>,
    metrics: Arc<Metrics>,
    /// The pools that cannot be used, and since when.
    unusable: HashMap<PoolName, Instant>,
}

impl Passes {
    async fn run(mut self) -> anyhow::Error {
        let cache = Arc::clone(&self.cache);
        loop {
            let pass = move || {
                self.pass();
                self
            };
            // Disk access blocks.
            self = match tokio::task::spawn_blocking(pass).await {
                Ok(passes) => passes,
                Err(panic) => return anyhow::anyhow!("a pass over the pools panicked; this is a bug: {panic}"),
            };
            // The second pass starts as soon as all HostVolumes are known.
            let _ = timeout(PERIOD, cache.listed.notified()).await;
        }
    }

    fn pass(&mut self) {
        let mut orphans = Vec::new();
        if self.cache.is_complete() {
            // HostVolumes are read before the disks: a volume that is Ready in the API server was on a disk earlier.
            let volumes = self.cache.volumes(|volume| !volume.deleting);
            let inventory = self.node.inventory();
            self.note_unusable(&inventory.unusable);
            self.reconcile_all(&volumes, &inventory);
            orphans = find_orphans(&self.node, &self.cache, &self.tasks, inventory.volumes);
        }
        self.metrics.set_orphans(orphans.len());
        if let Err(why) = self.publisher.publish(&self.node, &self.metrics, &orphans) {
            self.metrics.failed("publish pools");
            warn!(node = %self.node.name(), %why, "cannot publish the status of the pools; trying again");
        }
    }

    fn note_unusable(&mut self, unusable: &HashMap<PoolName, Unusable>) {
        self.unusable.retain(|pool, _| unusable.contains_key(pool));
        for pool in unusable.keys() {
            self.unusable.entry(pool.clone()).or_insert_with(Instant::now);
        }
    }

    fn reconcile_all(&self, volumes: &[HostVolume], inventory: &Inventory) {
        let on_disk = OnDisk::new(inventory);
        let too_early = |pool| self.unusable.get(pool).is_some_and(|since| since.elapsed() < PATIENCE);
        for volume in volumes.iter().filter(|volume| !too_early(&volume.pool)) {
            let found = on_disk.find(volume);
            if let Found::Record(record) = found
                && volume.spec.bytes > record.spec.bytes
            {
                self.tasks.reconcile(volume.clone(), Some(record.clone()));
                continue;
            }
            let Err(Failed { task, why }) = self.reconciler.reconcile(volume, found) else {
                continue;
            };
            self.metrics.failed(task);
            warn!(volume.id = %volume.id, node = %volume.node, %why, task, "cannot reconcile a volume; trying again");
            if matches!(why, Reason::Api { .. }) {
                // The API server will not answer for the others either.
                return;
            }
        }
    }
}
