//! The state behind the cache, and the arithmetic on it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use crate::volume::control::{Topology, Volume};
use crate::volume::error::Reason;
use crate::volume::host_volume::{HostVolume, StatusReason};
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::pool_status::PoolStatus;
use crate::volume::record::{Directory, Phase, PoolId};
use crate::volume::size::Bytes;

/// One node and one pool on it: what all volumes there have in common.
#[derive(Debug, PartialEq, Eq, Hash, Clone, PartialOrd, Ord)]
pub(super) struct PoolKey {
    pub(super) node: NodeName,
    pub(super) pool: PoolName,
}

impl PoolKey {
    pub(super) fn new(node: &NodeName, pool: &PoolName) -> Self {
        Self {
            node: node.clone(),
            pool: pool.clone(),
        }
    }
}

/// How much of a pool is allocated.
struct Allocated {
    place: Arc<PoolKey>,
    bytes: Bytes,
    /// How many volumes have data, by the id of the pool that they were made on.
    made_on: BTreeMap<PoolId, usize>,
}

/// A HostVolume, reduced to what is needed: there may be a hundred thousand.
pub(super) struct CachedVolume {
    pub(super) place: Arc<PoolKey>,
    pub(super) uid: Uuid,
    pub(super) bytes: Bytes,
    pub(super) directory: Directory,
    pub(super) phase: Phase,
    pub(super) made_on: Option<PoolId>,
    pub(super) deleting: bool,
    pub(super) status_reason: Option<Box<StatusReason>>,
    pub(super) created: Timestamp,
}

/// A HostVolume that was created and that the watch has not shown yet.
pub(super) struct Pending {
    pub(super) cached: CachedVolume,
    pub(super) since: Instant,
}

/// How long a HostVolume counts without being shown by the watch. If it takes longer, it was deleted before the watch could
/// show it.
const PENDING_MAX: Duration = Duration::from_mins(1);

#[derive(Default)]
pub(super) struct State {
    pub(super) volumes: BTreeMap<VolumeId, CachedVolume>,
    pub(super) pending: BTreeMap<VolumeId, Pending>,
    allocated: HashMap<Arc<PoolKey>, Allocated>,
    pub(super) pools: BTreeMap<NodeName, BTreeMap<PoolName, PoolStatus>>,
    pub(super) nodes: BTreeSet<NodeName>,
    /// Volumes that are being deleted, and since when this controller knows it.
    pub(super) deleting: BTreeMap<VolumeId, Instant>,
    /// Nodes that are named by objects but do not exist, and since when.
    pub(super) absent: BTreeMap<NodeName, Instant>,
    pub(super) seen: Seen,
}

/// Which lists have been seen completely.
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
    pub(super) fn get(&self, id: &VolumeId) -> Option<&CachedVolume> {
        let pending = || self.pending.get(id).map(|pending| &pending.cached);
        self.volumes.get(id).or_else(pending)
    }

    fn place(&mut self, node: &NodeName, pool: &PoolName) -> Arc<PoolKey> {
        let place = PoolKey::new(node, pool);
        if let Some(allocated) = self.allocated.get(&place) {
            return Arc::clone(&allocated.place);
        }
        let place = Arc::new(place);
        let allocated = Allocated {
            place: Arc::clone(&place),
            bytes: Bytes(0),
            made_on: BTreeMap::new(),
        };
        self.allocated.insert(Arc::clone(&place), allocated);
        place
    }

    pub(super) fn cached(&mut self, volume: &HostVolume) -> CachedVolume {
        CachedVolume {
            place: self.place(&volume.node, &volume.pool),
            uid: volume.uid,
            bytes: volume.spec.bytes,
            directory: volume.spec.directory,
            phase: volume.phase,
            made_on: volume.made_on,
            deleting: volume.deleting,
            status_reason: volume.status_reason.clone().map(Box::new),
            created: volume.created,
        }
    }

    pub(super) fn insert(&mut self, volume: &HostVolume) {
        self.remove(&volume.id);
        let cached = self.cached(volume);
        if let Some(allocated) = self.allocated.get_mut(&cached.place) {
            allocated.bytes = allocated.bytes.plus(cached.bytes);
            if let Some(id) = cached.made_on {
                *allocated.made_on.entry(id).or_default() += 1;
            }
        }
        if cached.deleting {
            self.deleting.entry(volume.id.clone()).or_insert_with(Instant::now);
        }
        let uid = cached.uid;
        self.volumes.insert(volume.id.clone(), cached);
        if self
            .pending
            .get(&volume.id)
            .is_some_and(|pending| pending.cached.uid == uid)
        {
            self.pending.remove(&volume.id);
        }
    }

    pub(super) fn remove(&mut self, id: &VolumeId) {
        let Some(cached) = self.volumes.remove(id) else { return };
        let Some(allocated) = self.allocated.get_mut(&cached.place) else {
            return;
        };
        allocated.bytes = allocated.bytes.less(cached.bytes);
        if let Some(id) = cached.made_on
            && let Some(count) = allocated.made_on.get_mut(&id)
        {
            *count -= 1;
            if *count == 0 {
                allocated.made_on.remove(&id);
            }
        }
    }

    pub(super) fn allocated_of(&self, place: &PoolKey) -> Bytes {
        let pending = self.pending.values().filter(|pending| *pending.cached.place == *place);
        let pending = pending.fold(Bytes(0), |sum, pending| sum.plus(pending.cached.bytes));
        self.allocated
            .get(place)
            .map_or(pending, |allocated| allocated.bytes.plus(pending))
    }

    /// The largest volume that can be created in a pool, or why none can.
    pub(super) fn room(&self, node: &NodeName, pool: &PoolName) -> Result<Bytes, String> {
        let pools = self
            .pools
            .get(node)
            .ok_or("hostdir has not published its pools; is it running there?")?;
        let status = pools.get(pool).ok_or_else(|| {
            let known: Vec<&str> = pools.keys().map(PoolName::as_str).collect();
            format!("it has no pool {pool} (it has: {})", known.join(", "))
        })?;
        if !self.nodes.contains(node) {
            return Err("the Node is no longer in the cluster".into());
        }
        let space = status
            .space
            .as_ref()
            .map_err(|why| format!("pool {pool} cannot be used: {why}"))?;
        let place = PoolKey::new(node, pool);
        let made_on = self.allocated.get(&place).map(|allocated| &allocated.made_on);
        let other = made_on.and_then(|ids| ids.keys().find(|id| Some(**id) != status.id));
        if let (Some(other), Some(now)) = (other, status.id) {
            return Err(format!(
                "pool {pool} now has id {now}, but volumes there were made on id {other}: bring that disk back, \
                 or delete those volumes"
            ));
        }
        let allocated = self.allocated_of(&place);
        Ok(status.limits.room(*space, status.foreign, allocated))
    }

    pub(super) fn no_node(&self, topology: &Topology, mut refusals: Vec<String>) -> Reason {
        let unknown = topology.requisite.iter().flatten().filter(|segment| {
            let known = |node: &NodeName| node.segment() == **segment;
            !self.pools.keys().any(known)
        });
        refusals.extend(
            unknown.map(|segment| format!("node {segment}: hostdir has not published its pools; is it running there?")),
        );
        if refusals.is_empty() {
            refusals.push("no node has published its pools; are hostdir's node pods running?".into());
        }
        // A cluster may have a thousand nodes; the first few show what is wrong.
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

    /// Notes since when nodes that are named by objects do not exist.
    pub(super) fn note_absent(&mut self) {
        if !self.seen.is_complete() {
            return;
        }
        let named = self
            .volumes
            .values()
            .map(|cached| &cached.place.node)
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

impl CachedVolume {
    pub(super) fn volume(&self, id: &VolumeId) -> Volume {
        Volume {
            id: id.clone(),
            node: self.place.node.clone(),
            pool: self.place.pool.clone(),
            bytes: self.bytes,
            directory: self.directory,
            made_on: self.made_on,
            uid: Some(self.uid),
        }
    }
}
