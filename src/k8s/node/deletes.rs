//! Deletes do not wait for the next pass: each is tried at once, then every second, and more and more seldom the longer it cannot be
//! carried out.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::PERIOD;
use super::cache::NodeCache;
use super::tasks::Tasks;
use crate::metrics::Metrics;
use crate::volume::host_volume::{Decision, HostVolume};
use crate::volume::id::VolumeId;

/// How often to try again what cannot be deleted yet, at first and at last.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(15);

/// For how long to try again every second: a pod that ends unmounts its volume within seconds.
const EAGER: Duration = Duration::from_secs(20);

/// A delete that this process knows of.
struct Pending {
    since: Instant,
    due: Instant,
    pause: Duration,
    /// What was decided about the data when it was tried last.
    decision: Decision,
}

impl Pending {
    fn new(volume: &HostVolume) -> Self {
        let now = Instant::now();
        Self {
            since: now,
            due: now,
            pause: RETRY,
            decision: volume.decision,
        }
    }

    /// Whether to try it now; if so, the next try is later.
    fn try_now(&mut self, volume: &HostVolume) -> bool {
        let now = Instant::now();
        if self.decision != volume.decision {
            self.decision = volume.decision;
            (self.since, self.due, self.pause) = (now, now, RETRY);
        }
        if now < self.due {
            return false;
        }
        if self.since.elapsed() >= EAGER {
            self.pause = (self.pause * 2).min(RETRY_MAX);
        }
        self.due = now + self.pause + spread(&volume.id, self.pause);
        true
    }
}

/// A part of `pause`, another one for each volume: a thousand deletes that wait for one pod are not tried at the same moment.
fn spread(id: &VolumeId, pause: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    pause * u32::try_from(hasher.finish() % 64).unwrap_or_default() / 256
}

/// Runs forever.
pub(super) async fn run(cache: &NodeCache, tasks: &Arc<Tasks>, metrics: &Metrics) {
    let mut pending: HashMap<VolumeId, Pending> = HashMap::new();
    loop {
        let deleting = cache.volumes(|volume| volume.deleting && volume.held);
        pending.retain(|id, _| deleting.iter().any(|volume| volume.id == *id));
        for volume in deleting {
            let known = pending
                .entry(volume.id.clone())
                .or_insert_with(|| Pending::new(&volume));
            if known.try_now(&volume) {
                tasks.reconcile(volume, None);
            }
        }
        let oldest = pending.values().map(|pending| pending.since.elapsed()).max();
        metrics.set_deletes(pending.len(), oldest.unwrap_or_default());
        let wait = if pending.is_empty() { PERIOD } else { RETRY };
        let _ = timeout(wait, cache.delete.notified()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::host_volume::tests::host_volume;

    #[test]
    fn what_cannot_be_deleted_is_tried_more_and_more_seldom() {
        let mut volume = host_volume("pvc-1");
        let mut pending = Pending::new(&volume);
        assert!(pending.try_now(&volume));
        assert!(!pending.try_now(&volume), "at once again");
        let pause = |pending: &mut Pending| {
            pending.due = Instant::now();
            assert!(pending.try_now(&volume));
            pending.pause
        };
        assert_eq!(pause(&mut pending), RETRY);
        pending.since = Instant::now().checked_sub(EAGER).unwrap();
        let pauses: Vec<u64> = (0..6).map(|_| pause(&mut pending).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 15, 15, 15]);
        // Somebody has decided what is to become of the data.
        volume.decision.leave = true;
        assert!(pending.try_now(&volume));
        assert_eq!(pending.pause, RETRY);
    }

    #[test]
    fn deletes_that_wait_are_not_tried_at_the_same_moment() {
        let ids = (0..100).map(|number| VolumeId::parse(&format!("pvc-{number}")).unwrap());
        let spreads: std::collections::HashSet<Duration> = ids.map(|id| spread(&id, RETRY_MAX)).collect();
        assert!(spreads.len() > 30, "{spreads:?}");
        assert!(spreads.iter().all(|spread| *spread < RETRY_MAX / 4));
    }
}
