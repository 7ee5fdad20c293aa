//! Volumes are reconciled on threads of their own where a disk has to work: one that hangs holds up nothing else.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::found::Found;
use super::reconcile::{Failed, Reconciler};
use crate::metrics::Metrics;
use crate::volume::host_volume::HostVolume;
use crate::volume::id::VolumeId;
use crate::volume::record::Record;

pub(super) struct Tasks {
    reconciler: Arc<Reconciler>,
    metrics: Arc<Metrics>,
    /// The volumes that a thread is working on now.
    running: Mutex<HashSet<VolumeId>>,
}

impl Tasks {
    pub(super) fn new(reconciler: Arc<Reconciler>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            reconciler,
            metrics,
            running: Mutex::default(),
        })
    }

    /// Reconciles a volume, unless a thread is working on it already. `record` is what was found on the disk, if it was looked at.
    pub(super) fn reconcile(self: &Arc<Self>, volume: HostVolume, record: Option<Record>) {
        self.start(volume.id.clone(), move |reconciler| {
            let found = match &record {
                Some(record) if record.uid == Some(volume.uid) => Found::Record(record),
                Some(record) => Found::Earlier(record),
                None => Found::Unknown,
            };
            reconciler.reconcile(&volume, found).map(drop)
        });
    }

    /// Works on a volume, unless a thread does so already.
    pub(super) fn start(
        self: &Arc<Self>,
        id: VolumeId,
        work: impl FnOnce(&Reconciler) -> Result<(), Failed> + Send + 'static,
    ) {
        if !self.running().insert(id.clone()) {
            return;
        }
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let _running = Running(&this, &id);
            if let Err(Failed { task, why }) = work(&this.reconciler) {
                this.metrics.failed(task);
                warn!(volume.id = %id, node = %this.reconciler.node.name(), %why, task, "cannot reconcile a volume; trying again");
            }
        });
    }

    fn running(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        // Each change is one statement, so a panic leaves nothing half-done.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A volume that a thread is working on. Dropped when it ends, even by a panic.
struct Running<'a>(&'a Tasks, &'a VolumeId);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running().remove(self.1);
    }
}
