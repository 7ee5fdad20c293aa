//! What a node says of its pools: its HostNode, written only when it changes.

use std::time::{Duration, Instant};

use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::runtime::Handle;

use super::api::{HostNode, HostNodeSpec, HostNodeStatus, Orphan};
use super::{ask, convert, find};
use crate::metrics::Metrics;
use crate::volume::id::NodeName;
use crate::volume::size::Bytes;
use crate::volume::{Driver, Held, PoolState, Reason};

/// Orphans that are listed by name.
const ORPHANS_MAX: usize = 100;

/// How long what the API server has is taken to be there still: somebody may delete it.
const LOOK_AGAIN: Duration = Duration::from_mins(5);

/// Keeps one HostNode.
pub(super) struct Publisher {
    name: String,
    nodes: Api<HostNode>,
    runtime: Handle,
    /// What the API server has, as far as known, and since when.
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

    /// Writes what the pools are like, if the API server does not have it already.
    pub(super) fn publish(&mut self, driver: &Driver, metrics: &Metrics, orphans: &[Held]) -> Result<(), Reason> {
        let pools = driver.pool_states();
        measure(driver.node(), metrics, &pools);
        self.published = self.published.take().filter(|(_, since)| since.elapsed() < LOOK_AGAIN);
        if self.published.is_none() {
            self.published = Some((self.find_or_make()?, Instant::now()));
        }
        let last = self.published.as_ref().map(|(status, _)| status);
        let last_of = |state: &PoolState| last?.pools.iter().find(|pool| pool.name == state.config.name.as_str());
        let mut listed: Vec<Orphan> = orphans
            .iter()
            .map(|held| Orphan {
                id: held.id.to_string(),
                pool: held.pool.to_string(),
            })
            .collect();
        listed.sort_unstable();
        listed.truncate(ORPHANS_MAX);
        let status = HostNodeStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pools: pools
                .iter()
                .map(|state| convert::pool_status(state, last_of(state)))
                .collect(),
            orphans: listed,
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
            // Somebody may have deleted it: then it is made again next time.
            Err(problem) => {
                self.published = None;
                Err(problem.into())
            }
        }
    }

    fn find_or_make(&self) -> Result<HostNodeStatus, Reason> {
        let found = find(&self.runtime, "read its HostNode", self.nodes.get(&self.name))?;
        let object = found.map_or_else(
            || {
                let object = HostNode::new(&self.name, HostNodeSpec {});
                let params = PostParams::default();
                ask(&self.runtime, "make its HostNode", self.nodes.create(&params, &object))
            },
            Ok,
        )?;
        Ok(object.status.unwrap_or_default())
    }
}

/// Notes what the pools have, for whoever reads the metrics.
fn measure(node: &NodeName, metrics: &Metrics, pools: &[PoolState]) {
    metrics.clear_pools();
    for PoolState { config, condition } in pools {
        let Ok(facts) = condition else { continue };
        let promised = facts.promised;
        let room = |promised| config.limits.room(facts.space, facts.foreign, promised).0;
        metrics.set_pool(
            node.as_str(),
            config.name.as_str(),
            room(Bytes(0)),
            promised.0,
            room(promised),
        );
        let enforced = facts.enforcement.is_ok();
        metrics.set_quota(node.as_str(), config.name.as_str(), enforced, facts.unlimited);
    }
}
