//! The metrics of a process, in the text format of Prometheus (OpenMetrics).

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use crate::volume::pool_status::PoolUsage;
use crate::volume::record::Phase;
use crate::volume::size::Bytes;

/// Upper bounds of the buckets for durations, in seconds: from a lookup in memory to a delete that waits for its node.
const BUCKETS: [f64; 12] = [
    0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: String,
    code: String,
}

/// The labels of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Pool {
    node: String,
    pool: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Lease {
    lease: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Leader {
    lease: String,
    holder: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandOver {
    lease: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Object {
    kind: &'static str,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Task {
    task: &'static str,
}

pub(crate) struct Metrics {
    registry: Registry,
    calls: Family<Call, Histogram, fn() -> Histogram>,
    volumes: Family<PhaseLabel, Gauge>,
    pool_size: Family<Pool, Gauge>,
    pool_promised: Family<Pool, Gauge>,
    pool_room: Family<Pool, Gauge>,
    pool_overallocated: Family<Pool, Gauge>,
    pool_enforced: Family<Pool, Gauge>,
    pool_unlimited: Family<Pool, Gauge>,
    deletes_pending: Gauge,
    oldest_delete: Gauge,
    orphans: Gauge,
    released: Gauge,
    unused: Gauge,
    unreadable: Family<Object, Gauge>,
    errors: Family<Task, Counter>,
    abandoned: Counter,
    left: Counter,
    swept: Counter,
    leaders: Family<Leader, Gauge>,
    silence: Family<Lease, Gauge>,
    candidates: Family<Lease, Gauge>,
    lease_policy: Gauge,
    leaderless: Family<Lease, Counter<f64, AtomicU64>>,
    hand_overs: Family<HandOver, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("hostdir");
        let r = &mut registry;
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let calls = Family::new_with_constructor(histogram);
        Self {
            calls: add(
                r,
                "csi_call_duration_seconds",
                "Duration of CSI calls by method and status code",
                calls,
            ),
            volumes: new(r, "volumes", "Volumes by phase"),
            pool_size: new(r, "pool_size_bytes", "Bytes of a pool that can be allocated in total"),
            pool_promised: new(
                r,
                "pool_promised_bytes",
                "Bytes of a pool that are allocated to volumes",
            ),
            pool_room: new(
                r,
                "pool_room_bytes",
                "The largest volume that can still be created on a pool",
            ),
            pool_overallocated: new(
                r,
                "pool_overallocated_bytes",
                "Bytes that are allocated to volumes beyond what can be allocated in total",
            ),
            pool_enforced: new(
                r,
                "pool_quota_enforced",
                "1 if the kernel limits the volumes of a pool to their sizes, else 0",
            ),
            pool_unlimited: new(r, "pool_volumes_unlimited", "Volumes with data that have no limit"),
            deletes_pending: new(r, "deletes_pending", "Volumes that are being deleted"),
            oldest_delete: new(r, "oldest_delete_pending_seconds", "Age of the oldest pending delete"),
            orphans: new(r, "orphans", "Volumes on this node's pools that have no HostVolume"),
            released: new(
                r,
                "volumes_without_persistent_volume",
                "Volumes with data whose PersistentVolume is gone",
            ),
            unused: new(
                r,
                "volumes_unused",
                "Local mode: volumes that no pod has used for 30 days",
            ),
            unreadable: new(
                r,
                "object_unreadable",
                "1 for an object in the API server that cannot be read",
            ),
            errors: new(
                r,
                "errors",
                "Failures of background tasks, by task; each task is tried again",
            ),
            abandoned: new(
                r,
                "volumes_abandoned",
                "Volumes deleted without their node because the node was gone",
            ),
            left: new(
                r,
                "volumes_left",
                "HostVolumes deleted without their data because an annotation allowed it",
            ),
            swept: new(r, "volumes_swept", "Volumes deleted because they were never used"),
            leaders: new(
                r,
                "leader",
                "1 for the holder of an election's Lease, as this controller sees it",
            ),
            silence: new(
                r,
                "leader_heartbeat_age_seconds",
                "How long the holder of a Lease has sent no heartbeat that says that it could lead",
            ),
            candidates: new(
                r,
                "leader_candidates",
                "How many controllers could lead, the leader among them; if it is 0, no volumes are created or resized",
            ),
            lease_policy: new(
                r,
                "lease_policy_missing",
                "1 if the admission policy for Leases is not in force",
            ),
            leaderless: new(
                r,
                "leaderless_seconds",
                "How long this controller has seen no leader, or one that must not lead",
            ),
            hand_overs: new(
                r,
                "hand_overs",
                "Leases that this controller took over from a ghost, by reason",
            ),
            registry,
        }
    }
}

fn new<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    add(registry, name, help, M::default())
}

fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn gauge(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl Metrics {
    pub(crate) fn call_ended(&self, method: &str, code: &str, duration: Duration) {
        let call = Call {
            method: method.to_owned(),
            code: code.to_owned(),
        };
        self.calls.get_or_create(&call).observe(duration.as_secs_f64());
    }

    /// Sets the number of volumes in a phase.
    pub(crate) fn set_volumes(&self, phase: Phase, count: usize) {
        let phase = phase.as_str();
        self.volumes
            .get_or_create(&PhaseLabel { phase })
            .set(gauge(count as u64));
    }

    /// Removes all pools, before those that still exist are set again.
    pub(crate) fn clear_pools(&self) {
        self.pool_size.clear();
        self.pool_promised.clear();
        self.pool_room.clear();
        self.pool_overallocated.clear();
        self.pool_enforced.clear();
        self.pool_unlimited.clear();
    }

    pub(crate) fn set_pool(&self, usage: &PoolUsage) {
        let Bytes(beyond) = usage.overallocated();
        let PoolUsage {
            node,
            pool,
            size: Bytes(size),
            allocated: Bytes(allocated),
            room: Bytes(room),
        } = usage;
        let labels = Pool {
            node: node.to_string(),
            pool: pool.to_string(),
        };
        self.pool_size.get_or_create(&labels).set(gauge(*size));
        self.pool_promised.get_or_create(&labels).set(gauge(*allocated));
        self.pool_room.get_or_create(&labels).set(gauge(*room));
        self.pool_overallocated.get_or_create(&labels).set(gauge(beyond));
    }

    /// Sets whether the kernel limits the volumes of a pool to their sizes, and how many volumes have no limit.
    pub(crate) fn set_quota(&self, node: &str, pool: &str, enforced: bool, unenforced: usize) {
        let labels = Pool {
            node: node.to_owned(),
            pool: pool.to_owned(),
        };
        self.pool_enforced.get_or_create(&labels).set(i64::from(enforced));
        self.pool_unlimited.get_or_create(&labels).set(gauge(unenforced as u64));
    }

    /// Sets the number of pending deletes, and the age of the oldest.
    pub(crate) fn set_deletes(&self, pending: usize, oldest: Duration) {
        self.deletes_pending.set(gauge(pending as u64));
        self.oldest_delete.set(gauge(oldest.as_secs()));
    }

    /// Sets the number of orphans.
    pub(crate) fn set_orphans(&self, count: usize) {
        self.orphans.set(gauge(count as u64));
    }

    /// Sets the number of volumes with data whose PersistentVolume is gone.
    pub(crate) fn set_released(&self, count: usize) {
        self.released.set(gauge(count as u64));
    }

    /// Sets the number of volumes that no pod has used for long.
    pub(crate) fn set_unused(&self, count: usize) {
        self.unused.set(gauge(count as u64));
    }

    /// Sets whether an object in the API server cannot be read.
    pub(crate) fn set_unreadable(&self, kind: &'static str, name: &str, unreadable: bool) {
        let name = name.to_owned();
        let object = Object { kind, name };
        if unreadable {
            self.unreadable.get_or_create(&object).set(1);
        } else {
            self.unreadable.remove(&object);
        }
    }

    /// Counts a failure of a background task.
    pub(crate) fn failed(&self, task: &'static str) {
        self.errors.get_or_create(&Task { task }).inc();
    }

    /// Counts a volume that was deleted without its node.
    pub(crate) fn abandoned(&self) {
        self.abandoned.inc();
    }

    /// Counts a HostVolume that was deleted without its data.
    pub(crate) fn left(&self) {
        self.left.inc();
    }

    /// Counts a volume that was deleted because it was never used.
    pub(crate) fn swept(&self) {
        self.swept.inc();
    }

    /// Removes all leaders, before the current ones are set again.
    pub(crate) fn clear_leaders(&self) {
        self.leaders.clear();
        self.silence.clear();
    }

    /// Sets who leads, if anybody does, and adds to the time without a leader that may lead.
    pub(crate) fn set_leader(&self, lease: &str, holder: Option<&str>, silence: Duration, leaderless: Duration) {
        let of = Lease {
            lease: lease.to_owned(),
        };
        self.leaderless.get_or_create(&of).inc_by(leaderless.as_secs_f64());
        if let Some(holder) = holder {
            let leader = Leader {
                lease: lease.to_owned(),
                holder: holder.to_owned(),
            };
            self.leaders.get_or_create(&leader).set(1);
            self.silence.get_or_create(&of).set(gauge(silence.as_secs()));
        }
    }

    /// Sets whether the admission policy for Leases is missing.
    pub(crate) fn set_lease_policy_missing(&self, missing: bool) {
        self.lease_policy.set(missing.into());
    }

    /// Sets how many controllers could lead.
    pub(crate) fn set_candidates(&self, lease: &str, candidates: usize) {
        let of = Lease {
            lease: lease.to_owned(),
        };
        self.candidates.get_or_create(&of).set(gauge(candidates as u64));
    }

    pub(crate) fn handed_over(&self, lease: &str, reason: &'static str) {
        let hand_over = HandOver {
            lease: lease.to_owned(),
            reason,
        };
        self.hand_overs.get_or_create(&hand_over).inc();
    }

    /// All metrics, as text.
    pub(crate) fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::id::{NodeName, PoolName};

    #[test]
    fn calls_are_counted_by_method_and_code() {
        let metrics = Metrics::default();
        metrics.call_ended("CreateVolume", "Ok", Duration::from_millis(2));
        metrics.call_ended("CreateVolume", "Unavailable", Duration::from_secs(40));
        metrics.set_pool(&PoolUsage {
            node: NodeName::parse("node-1").unwrap(),
            pool: PoolName::default(),
            size: Bytes(100),
            allocated: Bytes(60),
            room: Bytes(40),
        });
        let text = metrics.encode();
        for line in [
            "hostdir_csi_call_duration_seconds_count{method=\"CreateVolume\",code=\"Ok\"} 1",
            "hostdir_csi_call_duration_seconds_bucket{le=\"30.0\",method=\"CreateVolume\",code=\"Unavailable\"} 0",
            "hostdir_pool_room_bytes{node=\"node-1\",pool=\"default\"} 40",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
