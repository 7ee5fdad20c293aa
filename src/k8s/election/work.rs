//! Whether each sidecar of this controller answers and does its work.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::warn;

use super::{Get, in_time};
use crate::k8s::controller::Backlog;
use crate::leader::Queue;

/// A sidecar serves this path once it has found its driver, before it takes part in the election.
const HEALTH: &str = "/healthz/leader-election";
const METRICS: &str = "/metrics";
/// The most that a gap between two heartbeats counts: time in which the API server does not answer counts against no sidecar.
const SEEN: Duration = Duration::from_secs(5);

pub(super) struct Work {
    backlog: Arc<Backlog>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// For how long the API server was seen to answer.
    now: Duration,
    /// By Lease and name.
    queues: BTreeMap<(String, String), Queue>,
    /// The Leases whose sidecars serve no metrics.
    unknown: BTreeSet<String>,
}

impl Work {
    pub(super) fn new(backlog: Arc<Backlog>) -> Self {
        let state = Mutex::default();
        Self { backlog, state }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the API server has answered again after `elapsed`.
    pub(super) fn api_answered(&self, elapsed: Duration) {
        self.lock().now += elapsed.min(SEEN);
    }

    /// Why this controller could not lead an election, if that is so: its sidecar does not answer, or leads without doing its
    /// work.
    pub(super) async fn cannot_lead(&self, lease: &str, sidecar: &Get, leads: bool) -> Option<String> {
        let (health, metrics) = tokio::join!(in_time(sidecar(HEALTH)), in_time(sidecar(METRICS)));
        if let Err(error) = health {
            return Some(format!("its sidecar does not answer: {error:#}"));
        }
        let state = &mut *self.lock();
        match metrics {
            Ok(metrics) => {
                state.unknown.remove(lease);
                self.look(state, lease, leads, &metrics);
            }
            Err(error) if state.unknown.insert(lease.to_owned()) => {
                let why = format!("{error:#}");
                warn!(
                    lease,
                    why, "a sidecar serves no metrics: whether it does its work is not known"
                );
            }
            Err(_) => {}
        }
        let queues = state.queues.iter().filter(|((of, _), _)| of == lease);
        queues.filter_map(|(_, queue)| queue.stuck()).map(str::to_owned).next()
    }

    fn look(&self, state: &mut State, lease: &str, leads: bool, metrics: &str) {
        for (name, waiting) in self.backlog.of(lease) {
            if let Some(finished) = finished(metrics, &name) {
                let queue = state.queues.entry((lease.to_owned(), name)).or_default();
                queue.look(state.now, leads, &waiting, finished, self.backlog.objects());
            }
        }
    }
}

/// How many items of a queue a sidecar has finished since it was started, successfully or not (k8s.io/component-base,
/// metrics/prometheus/workqueue/metrics.go).
fn finished(metrics: &str, queue: &str) -> Option<u64> {
    let series = format!("workqueue_work_duration_seconds_count{{name=\"{queue}\"}} ");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series))?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    value.trim().parse::<f64>().ok().map(|value| value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_items_are_counted_by_queue() {
        let metrics = "\
# TYPE workqueue_work_duration_seconds histogram
workqueue_work_duration_seconds_bucket{name=\"claims\",le=\"+Inf\"} 13
workqueue_work_duration_seconds_count{name=\"claims\"} 12
workqueue_work_duration_seconds_count{name=\"volumes\"} 1.2e+06
";
        assert_eq!(finished(metrics, "claims"), Some(12));
        assert_eq!(finished(metrics, "volumes"), Some(1_200_000));
        assert_eq!(finished(metrics, "claim"), None);
    }
}
