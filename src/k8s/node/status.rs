//! The HostNode of a node: the state of its pools, written only when it changes.

use std::time::{Duration, Instant};

use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::runtime::Handle;

use crate::k8s::api::{HostNode, HostNodeSpec, HostNodeStatus, Orphan, PoolStatus};
use crate::k8s::client::{ask, find};
use crate::k8s::convert;
use crate::metrics::Metrics;
use crate::volume::disk::PoolVolume;
use crate::volume::id::{NodeName, PoolName};
use crate::volume::node::NodePool;
use crate::volume::{Node, Reason};

/// How many orphans are listed by name.
const ORPHANS_MAX: usize = 100;

/// How often to check that the HostNode still exists: somebody may delete it.
const LOOK_AGAIN: Duration = Duration::from_mins(5);

/// Keeps one HostNode up to date.
pub(super) struct Publisher {
    name: String,
    nodes: Api<HostNode>,
    runtime: Handle,
    /// The status that the API server has, as far as known, and since when.
    published: Option<(HostNodeStatus, Instant)>,
}

impl Publisher {
    pub(super) fn new(node: &NodeName, client: Client, runtime: Handle) -> Self {
        Self {
            name: node.to_string(),
            nodes: Api::all(client),
            runtime,
            published: None,
        }
    }

    /// Writes the state of the pools, unless the API server has it already.
    pub(super) fn publish(
        &mut self,
        node: &Node,
        metrics: &Metrics,
        orphans: &[(PoolName, PoolVolume)],
    ) -> Result<(), Reason> {
        let pools = node.pools();
        measure(node.name(), metrics, &pools);
        self.published = self.published.take().filter(|(_, since)| since.elapsed() < LOOK_AGAIN);
        if self.published.is_none() {
            self.published = Some((self.find_or_create()?, Instant::now()));
        }
        let last = self.published.as_ref().map(|(status, _)| status);
        let status = HostNodeStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pools: pools.iter().map(|pool| pool_status(pool, last)).collect(),
            orphans: list(orphans),
            orphan_count: u32::try_from(orphans.len()).unwrap_or(u32::MAX),
        };
        if last == Some(&status) {
            return Ok(());
        }
        let patch = Patch::Merge(json!({ "status": status }));
        let params = PatchParams::default();
        let patched = self.nodes.patch_status(&self.name, &params, &patch);
        match ask(&self.runtime, "write the status of its HostNode", patched) {
            Ok(_) => {
                self.published = Some((status, Instant::now()));
                Ok(())
            }
            // Somebody may have deleted the HostNode: then the next pass creates it.
            Err(problem) => {
                self.published = None;
                Err(problem.into())
            }
        }
    }

    fn find_or_create(&self) -> Result<HostNodeStatus, Reason> {
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
        Ok(object.status.unwrap_or_default())
    }
}

fn pool_status(pool: &NodePool, last: Option<&HostNodeStatus>) -> PoolStatus {
    let last = last.and_then(|last| last.pools.iter().find(|last| last.name == pool.name.as_str()));
    convert::pool_status(&pool.name, &pool.status, last)
}

fn list(orphans: &[(PoolName, PoolVolume)]) -> Vec<Orphan> {
    let orphan = |(pool, volume): &(PoolName, PoolVolume)| Orphan {
        id: volume.id.to_string(),
        pool: pool.to_string(),
    };
    let mut listed: Vec<Orphan> = orphans.iter().map(orphan).collect();
    listed.sort_unstable();
    listed.truncate(ORPHANS_MAX);
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
