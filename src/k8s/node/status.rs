//! The HostNode of a node: the state of its pools, written only when it changes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Resource};
use serde_json::json;
use tokio::runtime::Handle;
use tracing::warn;

use super::orphans::Unassigned;
use super::publication::is_due;
use crate::k8s::api::{ClaimReference, Condition, HostNode, HostNodeSpec, HostNodeStatus, Orphan, PoolStatus};
use crate::k8s::client::{ask, find};
use crate::k8s::convert;
use crate::k8s::events::Events;
use crate::metrics::Metrics;
use crate::volume::disk::PoolVolume;
use crate::volume::id::{NodeName, PoolName};
use crate::volume::node::NodePool;
use crate::volume::size::Bytes;
use crate::volume::{Node, Reason};

/// How many volumes are listed by name.
const LISTED_MAX: usize = 100;

/// How often to check that the HostNode still exists: somebody may delete it.
const LOOK_AGAIN: Duration = Duration::from_mins(5);

/// More is allocated on a pool than it has.
const OVERALLOCATED: &str = "Overallocated";
/// Pods use volumes that have no HostVolume.
const UNASSIGNED: &str = "UsedWithoutHostVolume";

/// What a node knows about its volumes when it publishes the state of its pools.
pub(super) struct Seen {
    /// Bytes of each pool that are allocated to HostVolumes. `None` before all of them are known.
    pub(super) allocated: Option<HashMap<PoolName, Bytes>>,
    pub(super) unassigned: Unassigned,
}

/// Keeps one HostNode up to date.
pub(super) struct Publisher {
    name: String,
    nodes: Api<HostNode>,
    runtime: Handle,
    events: Events,
    published: Option<Published>,
}

/// What the API server has, as far as known.
struct Published {
    object: ObjectReference,
    status: HostNodeStatus,
    /// When the object was read, and when its status was written.
    read: Instant,
    written: Option<Instant>,
}

impl Publisher {
    pub(super) fn new(node: &NodeName, client: Client, runtime: Handle) -> Self {
        Self {
            name: node.to_string(),
            nodes: Api::all(client.clone()),
            events: Events::new(client, node.to_string(), runtime.clone()),
            runtime,
            published: None,
        }
    }

    /// Writes the state of the pools, unless the API server has it already.
    pub(super) fn publish(&mut self, node: &Node, metrics: &Metrics, seen: &Seen) -> Result<(), Reason> {
        let pools = node.pools();
        measure(node.name(), metrics, &pools);
        let last = self.published.take().filter(|last| last.read.elapsed() < LOOK_AGAIN);
        let last = last.map_or_else(|| self.find_or_create(), Ok)?;
        let status = status(&pools, seen, &last.status);
        let allocated = |pool: &str| {
            let allocated = seen.allocated.as_ref()?;
            let pool = PoolName::parse(pool).ok()?;
            Some(allocated.get(&pool).copied().unwrap_or_default())
        };
        if !is_due(
            &last.status,
            &status,
            last.written.map(|written| written.elapsed()),
            allocated,
        ) {
            self.published = Some(last);
            return Ok(());
        }
        let patch = Patch::Merge(json!({ "status": status }));
        let params = PatchParams::default();
        // If this fails, the next pass reads the HostNode first: somebody may have deleted it.
        let patched = self.nodes.patch_status(&self.name, &params, &patch);
        ask(&self.runtime, "write the status of its HostNode", patched)?;
        self.tell_changes(&last, &status);
        self.published = Some(Published {
            status,
            written: Some(Instant::now()),
            ..last
        });
        Ok(())
    }

    fn find_or_create(&self) -> Result<Published, Reason> {
        let found = find(&self.runtime, "read its HostNode", self.nodes.get(&self.name))?;
        let object = found.map_or_else(
            || {
                let object = HostNode::new(&self.name, HostNodeSpec {});
                let params = PostParams::default();
                ask(
                    &self.runtime,
                    "create its HostNode",
                    self.nodes.create(&params, &object),
                )
            },
            Ok,
        )?;
        Ok(Published {
            object: object.object_ref(&()),
            status: object.status.unwrap_or_default(),
            read: Instant::now(),
            written: None,
        })
    }

    /// Writes an Event for each condition that has changed.
    fn tell_changes(&self, last: &Published, status: &HostNodeStatus) {
        for condition in &status.conditions {
            let before = find_condition(&last.status, &condition.type_);
            if before.is_some_and(|before| before.status == condition.status) {
                continue;
            }
            let Condition { type_, message, .. } = condition;
            let on = condition.status == "True";
            if on {
                warn!(
                    node = self.name,
                    condition = type_,
                    message,
                    "condition of the HostNode"
                );
            }
            self.events.of_node(&last.object, on, type_, message);
        }
    }
}

fn find_condition<'a>(status: &'a HostNodeStatus, type_: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|condition| condition.type_ == type_)
}

fn status(pools: &[NodePool], seen: &Seen, last: &HostNodeStatus) -> HostNodeStatus {
    let Unassigned { orphans, in_use } = &seen.unassigned;
    let conditions = [
        (
            OVERALLOCATED,
            seen.allocated
                .as_ref()
                .and_then(|allocated| overallocated(pools, allocated)),
        ),
        (UNASSIGNED, used_without_host_volume(in_use)),
    ];
    let conditions = conditions
        .into_iter()
        .filter_map(|(type_, wrong)| condition(type_, wrong, last));
    HostNodeStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        pools: pools.iter().map(|pool| pool_status(pool, last)).collect(),
        orphans: list(orphans),
        orphan_count: u32::try_from(orphans.len()).unwrap_or(u32::MAX),
        conditions: conditions.collect(),
    }
}

/// A condition is written when something is wrong for the first time, and from then on.
fn condition(type_: &str, wrong: Option<String>, last: &HostNodeStatus) -> Option<Condition> {
    let before = find_condition(last, type_);
    if before.is_none() && wrong.is_none() {
        return None;
    }
    let status = if wrong.is_some() { "True" } else { "False" };
    let since = before.filter(|before| before.status == status);
    Some(Condition {
        type_: type_.into(),
        status: status.into(),
        reason: if wrong.is_some() { type_ } else { "AsExpected" }.into(),
        message: wrong.unwrap_or_else(|| "nothing is wrong any more".into()),
        last_transition_time: since.map_or_else(convert::now, |before| before.last_transition_time.clone()),
    })
}

/// Which pools have less than is allocated.
fn overallocated(pools: &[NodePool], allocated: &HashMap<PoolName, Bytes>) -> Option<String> {
    let beyond = |NodePool { name, status, usage }: &NodePool| {
        let node = &usage.as_ref()?.node;
        let usage = status.usage(node, name, allocated.get(name).copied().unwrap_or_default())?;
        let beyond = usage.overallocated();
        (beyond > Bytes(0)).then(|| {
            format!(
                "pool {name}: {} are allocated to volumes, {beyond} more than the pool has; it takes no new volumes until they \
                 fit: delete volumes there, or add room",
                usage.allocated
            )
        })
    };
    let beyond: Vec<String> = pools.iter().filter_map(beyond).collect();
    (!beyond.is_empty()).then(|| beyond.join("; "))
}

fn used_without_host_volume(in_use: &[(PoolName, PoolVolume)]) -> Option<String> {
    let named: Vec<&str> = in_use.iter().map(|(_, volume)| volume.id.as_str()).take(5).collect();
    (!named.is_empty()).then(|| {
        format!(
            "pods use {} volumes that have no HostVolume: {} …; restore their HostVolumes and let them adopt the data \
             (deploy/README.md)",
            in_use.len(),
            named.join(", ")
        )
    })
}

fn pool_status(pool: &NodePool, last: &HostNodeStatus) -> PoolStatus {
    let last = last.pools.iter().find(|last| last.name == pool.name.as_str());
    convert::pool_status(&pool.name, &pool.status, last)
}

fn list(orphans: &[(PoolName, PoolVolume)]) -> Vec<Orphan> {
    let orphan = |(pool, volume): &(PoolName, PoolVolume)| {
        let record = volume.record.as_ref().ok();
        let claim = record.and_then(|record| record.spec.claim.as_ref());
        Orphan {
            id: volume.id.to_string(),
            pool: pool.to_string(),
            uid: record.and_then(|record| record.uid).map(|uid| uid.to_string()),
            claim: claim.map(|claim| ClaimReference {
                namespace: claim.namespace.clone(),
                name: claim.name.clone(),
            }),
        }
    };
    let mut listed: Vec<Orphan> = orphans.iter().map(orphan).collect();
    listed.sort_unstable();
    listed.truncate(LISTED_MAX);
    listed
}

fn measure(node: &NodeName, metrics: &Metrics, pools: &[NodePool]) {
    metrics.clear_pools();
    for NodePool { name, status, usage } in pools {
        let Some(usage) = usage else { continue };
        metrics.set_pool(usage);
        let enforced = matches!(status.enforcement, Some(Ok(_)));
        metrics.set_quota(node.as_str(), name.as_str(), enforced, status.unenforced);
    }
}
