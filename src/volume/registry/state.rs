//! The state behind the registry, and the arithmetic on it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use super::PublishedPool;
use crate::volume::control::{Placement, Volume};
use crate::volume::error::Reason;
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::ports::{Hindrance, Promise, Stage};
use crate::volume::record::{Directory, PoolId};
use crate::volume::size::Bytes;

/// One node and one pool on it: what all volumes there have in common.
#[derive(Debug, PartialEq, Eq, Hash, Clone, PartialOrd, Ord)]
pub(super) struct Home {
    pub(super) node: NodeName,
    pub(super) pool: PoolName,
}

impl Home {
    pub(super) fn new(node: &NodeName, pool: &PoolName) -> Self {
        Self {
            node: node.clone(),
            pool: pool.clone(),
        }
    }
}

/// What was promised of a home.
struct Promised {
    home: Arc<Home>,
    bytes: Bytes,
    /// How many volumes have data on which pool.
    made_on: BTreeMap<PoolId, usize>,
}

/// A promise, as small as it can be kept: there may be a hundred thousand.
pub(super) struct Kept {
    pub(super) home: Arc<Home>,
    pub(super) uid: Uuid,
    pub(super) bytes: Bytes,
    pub(super) directory: Directory,
    pub(super) stage: Stage,
    pub(super) made_on: Option<PoolId>,
    pub(super) deleting: bool,
    pub(super) hindrance: Option<Box<Hindrance>>,
    pub(super) created: Timestamp,
}

/// A promise that was made and has not been seen by the watch yet.
pub(super) struct Pending {
    pub(super) kept: Kept,
    pub(super) since: Instant,
}

/// How long a promise counts that the watch does not show: by then it was deleted before it was seen.
const PENDING_MAX: Duration = Duration::from_mins(1);

#[derive(Default)]
pub(super) struct State {
    pub(super) volumes: BTreeMap<VolumeId, Kept>,
    pub(super) pending: BTreeMap<VolumeId, Pending>,
    promised: HashMap<Arc<Home>, Promised>,
    pub(super) pools: BTreeMap<NodeName, BTreeMap<PoolName, PublishedPool>>,
    /// The Nodes that exist.
    pub(super) nodes: BTreeSet<NodeName>,
    /// Promises that are being deleted, and since when this controller knows it.
    pub(super) deleting: BTreeMap<VolumeId, Instant>,
    /// Nodes that promises name and that do not exist, and since when.
    pub(super) absent: BTreeMap<NodeName, Instant>,
    pub(super) seen: Seen,
}

/// What has been listed whole.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    pub(super) volumes: bool,
    pub(super) host_nodes: bool,
    pub(super) nodes: bool,
}

impl Seen {
    pub(super) fn is_complete(self) -> bool {
        self.volumes && self.host_nodes && self.nodes
    }
}

impl State {
    pub(super) fn get(&self, id: &VolumeId) -> Option<&Kept> {
        let pending = || self.pending.get(id).map(|pending| &pending.kept);
        self.volumes.get(id).or_else(pending)
    }

    pub(super) fn home(&mut self, node: &NodeName, pool: &PoolName) -> Arc<Home> {
        let home = Home::new(node, pool);
        if let Some(promised) = self.promised.get(&home) {
            return Arc::clone(&promised.home);
        }
        let home = Arc::new(home);
        let promised = Promised {
            home: Arc::clone(&home),
            bytes: Bytes(0),
            made_on: BTreeMap::new(),
        };
        self.promised.insert(Arc::clone(&home), promised);
        home
    }

    pub(super) fn kept(&mut self, promise: &Promise) -> Kept {
        Kept {
            home: self.home(&promise.node, &promise.pool),
            uid: promise.uid,
            bytes: promise.bytes,
            directory: promise.directory,
            stage: promise.stage,
            made_on: promise.made_on,
            deleting: promise.deleting,
            hindrance: promise.hindrance.clone().map(Box::new),
            created: promise.created,
        }
    }

    pub(super) fn insert(&mut self, promise: &Promise) {
        self.remove(&promise.id);
        let kept = self.kept(promise);
        if let Some(promised) = self.promised.get_mut(&kept.home) {
            promised.bytes = promised.bytes.plus(kept.bytes);
            if let Some(id) = kept.made_on {
                *promised.made_on.entry(id).or_default() += 1;
            }
        }
        if kept.deleting {
            self.deleting.entry(promise.id.clone()).or_insert_with(Instant::now);
        }
        let uid = kept.uid;
        self.volumes.insert(promise.id.clone(), kept);
        if self
            .pending
            .get(&promise.id)
            .is_some_and(|pending| pending.kept.uid == uid)
        {
            self.pending.remove(&promise.id);
        }
    }

    pub(super) fn remove(&mut self, id: &VolumeId) {
        let Some(kept) = self.volumes.remove(id) else { return };
        let Some(promised) = self.promised.get_mut(&kept.home) else {
            return;
        };
        promised.bytes = promised.bytes.less(kept.bytes);
        if let Some(id) = kept.made_on
            && let Some(count) = promised.made_on.get_mut(&id)
        {
            *count -= 1;
            if *count == 0 {
                promised.made_on.remove(&id);
            }
        }
    }

    pub(super) fn promised_of(&self, home: &Home) -> Bytes {
        let pending = self.pending.values().filter(|pending| *pending.kept.home == *home);
        let pending = pending.fold(Bytes(0), |sum, pending| sum.plus(pending.kept.bytes));
        self.promised
            .get(home)
            .map_or(pending, |promised| promised.bytes.plus(pending))
    }

    /// The largest volume that can be promised of a pool, or why there can be none.
    pub(super) fn room(&self, node: &NodeName, pool: &PoolName) -> Result<Bytes, String> {
        let pools = self
            .pools
            .get(node)
            .ok_or("no hostdir has published its pools; does it run there?")?;
        let published = pools.get(pool).ok_or_else(|| {
            let known: Vec<&str> = pools.keys().map(PoolName::as_str).collect();
            format!("it has no pool {pool} (it has: {})", known.join(", "))
        })?;
        if !self.nodes.contains(node) {
            return Err("the Node is not in the cluster any more".into());
        }
        let space = published
            .space
            .as_ref()
            .map_err(|why| format!("pool {pool} cannot be used: {why}"))?;
        let home = Home::new(node, pool);
        let others = self.promised.get(&home).map(|promised| &promised.made_on);
        let other = others.and_then(|others| others.keys().find(|id| Some(**id) != published.id));
        if let (Some(other), Some(now)) = (other, published.id) {
            return Err(format!(
                "pool {pool} is {now} now, and volumes there were made on {other}: bring that disk back, or delete those volumes"
            ));
        }
        Ok(published
            .limits
            .room(*space, published.foreign, self.promised_of(&home)))
    }

    pub(super) fn no_node(&self, placement: &Placement, mut refusals: Vec<String>) -> Reason {
        let unknown = placement.requisite.iter().flatten().filter(|segment| {
            let known = |node: &NodeName| node.segment() == **segment;
            !self.pools.keys().any(known)
        });
        refusals.extend(
            unknown.map(|segment| format!("node {segment}: no hostdir has published its pools; does it run there?")),
        );
        if refusals.is_empty() {
            refusals.push("no node has published any pool; do hostdir's node pods run?".into());
        }
        // A cluster may have a thousand nodes; the first few tell what is the matter.
        let more = refusals.len().saturating_sub(5);
        refusals.truncate(5);
        let more = if more > 0 {
            format!("; and {more} more nodes")
        } else {
            String::new()
        };
        Reason::NoNode(format!("{}{more}", refusals.join("; ")))
    }

    pub(super) fn expire(&mut self) {
        self.pending.retain(|_, pending| pending.since.elapsed() < PENDING_MAX);
    }

    pub(super) fn is_gone(&self, node: &NodeName, grace: Duration) -> bool {
        self.absent.get(node).is_some_and(|since| since.elapsed() >= grace)
    }

    /// Begins to count for nodes that are named and do not exist.
    pub(super) fn note_absent(&mut self) {
        if !self.seen.is_complete() {
            return;
        }
        let named = self
            .volumes
            .values()
            .map(|kept| &kept.home.node)
            .chain(self.pools.keys());
        let absent: BTreeSet<&NodeName> = named.filter(|node| !self.nodes.contains(*node)).collect();
        let mut since = BTreeMap::new();
        for node in absent {
            let first = self.absent.get(node).copied().unwrap_or_else(Instant::now);
            since.insert(node.clone(), first);
        }
        self.absent = since;
    }
}

impl Kept {
    pub(super) fn volume(&self, id: &VolumeId) -> Volume {
        Volume {
            id: id.clone(),
            node: self.home.node.clone(),
            pool: self.home.pool.clone(),
            bytes: self.bytes,
            directory: self.directory,
            made_on: self.made_on,
            uid: Some(self.uid),
        }
    }
}
