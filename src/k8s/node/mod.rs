//! A node of elected mode: it follows its own HostVolumes with one API watch, makes its volumes match them ([`reconcile`]),
//! and publishes the state of its pools ([`status`]).

mod assignments;
mod cache;
mod deletes;
mod found;
mod orphans;
mod publication;
mod reconcile;
mod status;
mod tasks;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::Client;
use kube::runtime::watcher::Config;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tracing::warn;

use super::api;
use super::events::Events;
use super::watch::{follow, undecoded};
use crate::metrics::Metrics;
use crate::volume::disk::Unusable;
use crate::volume::host_volume::{Assignments, HostVolume};
use crate::volume::id::{NodeName, PoolName};
use crate::volume::node::Inventory;
use crate::volume::size::Bytes;
use crate::volume::{Node, Reason};
use assignments::ApiAssignments;
use cache::NodeCache;
use found::OnDisk;
use orphans::{Unassigned, find_unassigned};
use reconcile::{Failed, Reconciler, Wrote, needs_disk};
use status::{Publisher, Seen};
use tasks::Tasks;

/// How often a node compares its pools with its HostVolumes, and publishes the state of the pools: a disk that hangs is noticed after
/// ten seconds at most, and published within 15.
const PERIOD: Duration = Duration::from_secs(4);

/// How long a pool must be unusable before its volumes are `Lost`: opening a large pool takes a while, and so does mounting
/// a disk by hand.
const PATIENCE: Duration = Duration::from_secs(30);

/// How many statuses one pass writes at most. A mistake in the configuration changes the phase of all volumes at once; the rest are
/// written in the next passes, if it is not corrected before.
const WRITES_MAX: usize = 20;

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
        let volumes = undecoded::<api::HostVolume>(self.client.clone());
        let config = Config::default().fields(&fields);
        let reconciler = Arc::new(Reconciler {
            node: Arc::clone(&node),
            assignments: Arc::clone(&self.assignments),
            events: Events::new(self.client.clone(), self.name.to_string(), self.runtime.clone()),
            metrics: Arc::clone(&self.metrics),
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
            () = follow("watch HostVolumes", volumes, config, &self.metrics, &*self.cache) => anyhow::anyhow!("the API watch has ended"),
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
        let mut seen = Seen {
            allocated: None,
            unassigned: Unassigned::default(),
        };
        if self.cache.is_complete() {
            // HostVolumes are read before the disks: a volume that is Ready in the API server was on a disk earlier.
            let volumes = self.cache.volumes(|_| true);
            seen.allocated = Some(allocated(&volumes));
            let inventory = self.node.inventory();
            self.note_unusable(&inventory.unusable);
            self.reconcile_all(&volumes, &inventory);
            seen.unassigned = find_unassigned(&self.node, &self.cache, &self.tasks, inventory.volumes);
        }
        self.metrics.set_orphans(seen.unassigned.orphans.len());
        if let Err(why) = self.publisher.publish(&self.node, &self.metrics, &seen) {
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
        let too_early = |pool: &PoolName| self.unusable.get(pool).is_some_and(|since| since.elapsed() < PATIENCE);
        let due = |volume: &&HostVolume| !volume.deleting && volume.unreadable.is_none() && !too_early(&volume.pool);
        let mut written = 0;
        for volume in volumes.iter().filter(due) {
            let found = on_disk.find(volume);
            if needs_disk(volume, found) {
                self.tasks.reconcile(volume.clone(), found.record().cloned());
                continue;
            }
            match self.reconciler.reconcile(volume, found) {
                Ok(Wrote::Nothing) => {}
                Ok(Wrote::Status) => written += 1,
                Err(Failed { task, why }) => {
                    self.metrics.failed(task);
                    warn!(volume.id = %volume.id, node = %volume.node, %why, task, "cannot reconcile a volume; trying again");
                    if matches!(why, Reason::Api { .. }) {
                        // The API server will not answer for the others either.
                        return;
                    }
                }
            }
            if written == WRITES_MAX {
                return;
            }
        }
    }
}

/// Bytes of each pool that are allocated to HostVolumes.
fn allocated(volumes: &[HostVolume]) -> HashMap<PoolName, Bytes> {
    let mut allocated: HashMap<PoolName, Bytes> = HashMap::new();
    for volume in volumes {
        let pool = allocated.entry(volume.pool.clone()).or_default();
        *pool = pool.plus(volume.spec.bytes);
    }
    allocated
}
