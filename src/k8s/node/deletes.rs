//! Deletes do not wait for the next pass: each is tried at once, and then every second until it is done.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::PERIOD;
use super::cache::NodeCache;
use super::tasks::Tasks;
use crate::metrics::Metrics;
use crate::volume::id::VolumeId;

/// How often to try again what cannot be deleted yet.
const RETRY: Duration = Duration::from_secs(1);

/// Runs forever.
pub(super) async fn run(cache: &NodeCache, tasks: &Arc<Tasks>, metrics: &Metrics) {
    // Since when this process has known of each delete.
    let mut known: HashMap<VolumeId, Instant> = HashMap::new();
    loop {
        let deleting = cache.volumes(|volume| volume.deleting);
        known.retain(|id, _| deleting.iter().any(|volume| volume.id == *id));
        for volume in deleting {
            known.entry(volume.id.clone()).or_insert_with(Instant::now);
            tasks.reconcile(volume, None);
        }
        let oldest = known.values().map(Instant::elapsed).max().unwrap_or_default();
        metrics.set_deletes(known.len(), oldest);
        let wait = if known.is_empty() { PERIOD } else { RETRY };
        let _ = timeout(wait, cache.delete.notified()).await;
    }
}
