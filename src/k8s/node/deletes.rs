//! Deletes do not wait for the next pass: each is tried at once, and then every second until it is done.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::warn;

use super::PERIOD;
use super::cache::NodeCache;
use super::found::Found;
use super::reconcile::{Failed, Reconciler};
use crate::metrics::Metrics;
use crate::volume::host_volume::HostVolume;
use crate::volume::id::VolumeId;

/// How often to try again what cannot be deleted yet.
const RETRY: Duration = Duration::from_secs(1);

/// The deletes of a node. Each has a thread of its own: a disk that hangs holds up no other delete.
pub(super) struct Deletes {
    cache: Arc<NodeCache>,
    reconciler: Arc<Reconciler>,
    metrics: Arc<Metrics>,
    /// The deletes that are being tried now.
    running: Mutex<HashSet<VolumeId>>,
}

impl Deletes {
    pub(super) fn new(cache: Arc<NodeCache>, reconciler: Arc<Reconciler>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            cache,
            reconciler,
            metrics,
            running: Mutex::default(),
        })
    }

    /// Runs forever.
    pub(super) async fn run(self: Arc<Self>) {
        // Since when this process has known of each delete.
        let mut known: HashMap<VolumeId, Instant> = HashMap::new();
        loop {
            let deleting = self.cache.volumes(|volume| volume.deleting);
            known.retain(|id, _| deleting.iter().any(|volume| volume.id == *id));
            for volume in deleting {
                known.entry(volume.id.clone()).or_insert_with(Instant::now);
                self.try_one(volume);
            }
            let oldest = known.values().map(Instant::elapsed).max().unwrap_or_default();
            self.metrics.set_deletes(known.len(), oldest);
            let wait = if known.is_empty() { PERIOD } else { RETRY };
            let _ = timeout(wait, self.cache.delete.notified()).await;
        }
    }

    fn try_one(self: &Arc<Self>, volume: HostVolume) {
        if !self.running().insert(volume.id.clone()) {
            return;
        }
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let _running = Running(&this, &volume.id);
            if let Err(Failed { task, why }) = this.reconciler.reconcile(&volume, Found::Unknown) {
                this.metrics.failed(task);
                warn!(volume.id = %volume.id, node = %volume.node, %why, "cannot delete a volume yet; trying again");
            }
        });
    }

    fn running(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        // Each change is one statement, so a panic leaves nothing half-done.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A delete that is being tried. Dropped when it ends, even by a panic.
struct Running<'a>(&'a Deletes, &'a VolumeId);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running().remove(self.1);
    }
}
