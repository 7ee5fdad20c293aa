//! Whether each sidecar of this controller answers and does its work.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::{Get, in_time};
use crate::k8s::controller::Backlog;
use crate::leader::Queue;

/// A sidecar serves this path once it has found its driver, before it takes part in the election.
const HEALTH: &str = "/healthz/leader-election";
const METRICS: &str = "/metrics";

pub(super) struct Work {
    start: Instant,
    backlog: Arc<Backlog>,
    queues: Mutex<BTreeMap<(String, String), Queue>>,
}

impl Work {
    pub(super) fn new(backlog: Arc<Backlog>) -> Self {
        Self {
            start: Instant::now(),
            backlog,
            queues: Mutex::default(),
        }
    }

    /// Why this controller could not lead an election, if that is so: its sidecar does not answer, or leads without doing its
    /// work.
    pub(super) async fn cannot_lead(&self, lease: &str, sidecar: &Get, leads: bool) -> Option<String> {
        if let Err(error) = in_time(sidecar(HEALTH)).await {
            return Some(format!("its sidecar does not answer: {error:#}"));
        }
        // A sidecar without metrics is not judged by them.
        let metrics = in_time(sidecar(METRICS)).await.ok()?;
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reason = None;
        for (name, waiting) in self.backlog.of(lease) {
            let Some(finished) = finished(&metrics, &name) else {
                continue;
            };
            let queue = queues.entry((lease.to_owned(), name)).or_default();
            let why = queue.look(self.start.elapsed(), leads, &waiting, finished);
            reason = reason.or(why.map(str::to_owned));
        }
        reason
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
