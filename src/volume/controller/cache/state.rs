//! The state behind the cache, and the arithmetic on it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use super::nodes::NodeState;
use super::reservations::Reserved;
use crate::volume::control::Volume;
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
    /// The volumes that have room reserved here.
    reserved: BTreeSet<VolumeId>,
}

/// A HostVolume, reduced to what is needed: there may be a hundred thousand.
pub(super) struct CachedVolume {
    pub(super) place: Arc<PoolKey>,
    pub(super) uid: Uuid,
    pub(super) bytes: Bytes,
    pub(super) directory: Directory,
    pub(super) phase: Phase,
    /// If not, only its place and its size are known.
    pub(super) readable: bool,
    pub(super) made_on: Option<PoolId>,
    pub(super) deleting: bool,
    pub(super) released: bool,
    pub(super) status_reason: Option<Box<StatusReason>>,
    pub(super) created: Timestamp,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) volumes: BTreeMap<VolumeId, CachedVolume>,
    pub(super) reservations: BTreeMap<VolumeId, Reserved>,
    /// How many calls have reserved room.
    pub(super) calls: u64,
    allocated: HashMap<Arc<PoolKey>, Allocated>,
    pub(super) pools: BTreeMap<NodeName, BTreeMap<PoolName, PoolStatus>>,
    pub(super) nodes: BTreeMap<NodeName, NodeState>,
    /// Whether hostdir's pod on a node is Ready, if these pods are watched.
    pub(super) agents: Option<BTreeMap<NodeName, bool>>,
    /// Nodes that a delete has waited for in vain, and when.
    pub(super) silent: BTreeMap<NodeName, Instant>,
    /// The volumes that have a PersistentVolume, as hashes of their ids: the ids of all would take several megabytes.
    pub(super) persistent: HashSet<u64>,
    /// Volumes that are being deleted, and since when this controller knows it.
    pub(super) deleting: BTreeMap<VolumeId, Instant>,
    /// Nodes that are named by objects but do not exist, and since when.
    pub(super) absent: BTreeMap<NodeName, Instant>,
    /// The lists that have been seen completely.
    pub(super) seen: BTreeSet<List>,
    /// The lists whose changes do not come any more, and since when.
    pub(super) deaf: BTreeMap<List, Instant>,
}

/// For how long the API server may not be heard before what is known counts as out of date. A restart of it takes less.
pub(super) const DEAF: Duration = Duration::from_mins(1);

/// A list of objects that the cache follows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum List {
    HostVolumes,
    HostNodes,
    Nodes,
    PersistentVolumes,
}

impl State {
    /// Whether all lists have been seen completely that creating and deleting volumes depends on, and their changes since then.
    pub(super) fn is_complete(&self) -> bool {
        let is_known = |list: &List| {
            let deaf = self.deaf.get(list).is_some_and(|since| since.elapsed() >= DEAF);
            self.seen.contains(list) && !deaf
        };
        [List::HostVolumes, List::HostNodes, List::Nodes].iter().all(is_known)
    }

    pub(super) fn get(&self, id: &VolumeId) -> Option<&CachedVolume> {
        let created = || self.reservations.get(id)?.created.as_ref();
        self.volumes.get(id).or_else(created)
    }

    pub(super) fn place(&mut self, node: &NodeName, pool: &PoolName) -> Arc<PoolKey> {
        let place = PoolKey::new(node, pool);
        if let Some(allocated) = self.allocated.get(&place) {
            return Arc::clone(&allocated.place);
        }
        let place = Arc::new(place);
        let allocated = Allocated {
            place: Arc::clone(&place),
            bytes: Bytes(0),
            made_on: BTreeMap::new(),
            reserved: BTreeSet::new(),
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
            readable: volume.unreadable.is_none(),
            made_on: volume.made_on,
            deleting: volume.deleting,
            released: volume.released,
            status_reason: volume.status_reason.clone().map(Box::new),
            created: volume.created,
        }
    }

    pub(super) fn insert(&mut self, volume: &HostVolume) {
        let deleting = self.deleting.get(&volume.id).copied();
        self.remove(&volume.id);
        let cached = self.cached(volume);
        if let Some(allocated) = self.allocated.get_mut(&cached.place) {
            allocated.bytes = allocated.bytes.plus(cached.bytes);
            if let Some(id) = cached.made_on {
                *allocated.made_on.entry(id).or_default() += 1;
            }
        }
        if cached.deleting {
            let since = deleting.unwrap_or_else(Instant::now);
            self.deleting.insert(volume.id.clone(), since);
        }
        let (place, bytes) = (Arc::clone(&cached.place), cached.bytes);
        self.volumes.insert(volume.id.clone(), cached);
        let reserved = self.reservations.get(&volume.id);
        if reserved.is_some_and(|reserved| reserved.place == place && reserved.bytes <= bytes) {
            self.end_reservation(&volume.id);
        }
    }

    pub(super) fn remove(&mut self, id: &VolumeId) {
        self.deleting.remove(id);
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

    /// The HostVolume of this UID is gone.
    pub(super) fn forget(&mut self, id: &VolumeId, uid: Uuid) {
        if let Some(cached) = self.volumes.get(id).filter(|cached| cached.uid == uid) {
            // Its node works.
            let place = Arc::clone(&cached.place);
            self.silent.remove(&place.node);
            self.remove(id);
        }
        let created = self.reservations.get(id).and_then(|reserved| reserved.created.as_ref());
        if created.is_some_and(|created| created.uid == uid) {
            self.end_reservation(id);
        }
    }

    pub(super) fn put_reservation(&mut self, id: &VolumeId, reserved: Reserved) {
        self.end_reservation(id);
        if let Some(allocated) = self.allocated.get_mut(&reserved.place) {
            allocated.reserved.insert(id.clone());
        }
        self.reservations.insert(id.clone(), reserved);
    }

    pub(super) fn end_reservation(&mut self, id: &VolumeId) -> Option<Reserved> {
        let reserved = self.reservations.remove(id)?;
        if let Some(allocated) = self.allocated.get_mut(&reserved.place) {
            allocated.reserved.remove(id);
        }
        Some(reserved)
    }

    /// What is allocated to volumes, and reserved for those that the watch has not shown yet.
    pub(super) fn allocated_of(&self, place: &PoolKey) -> Bytes {
        let Some(allocated) = self.allocated.get(place) else {
            return Bytes(0);
        };
        let reserved = allocated.reserved.iter().map(|id| self.reserved_beyond(id, place));
        reserved.fold(allocated.bytes, Bytes::plus)
    }

    /// What is reserved for a volume beyond the size that the watch has shown.
    fn reserved_beyond(&self, id: &VolumeId, place: &PoolKey) -> Bytes {
        let reserved = self.reservations.get(id).map_or(Bytes(0), |reserved| reserved.bytes);
        let shown = self.volumes.get(id).filter(|shown| *shown.place == *place);
        reserved.less(shown.map_or(Bytes(0), |shown| shown.bytes))
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
        if !self.nodes.contains_key(node) {
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
