//! What a controller knows about the cluster, kept up to date by API watches: nodes, their pools, and the volumes there.
//!
//! The cache answers without asking the API server, and may lag behind. What must be exact (whether a name is taken) comes
//! from the [`HostVolumeStore`](crate::volume::host_volume::HostVolumeStore).

mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use crate::volume::control::{Topology, Volume};
use crate::volume::error::Reason;
use crate::volume::host_volume::{HostVolume, StatusReason};
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::pool_status::{PoolStatus, PoolUsage};
use crate::volume::record::Phase;
use crate::volume::size::Bytes;
use state::{CachedVolume, Pending, PoolKey, State};

#[derive(Default)]
pub(crate) struct ClusterCache {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) claimed: usize,
    pub(crate) ready: usize,
    pub(crate) lost: usize,
    /// How many of all these are being deleted.
    pub(crate) deleting: usize,
}

impl ClusterCache {
    /// A HostVolume is new or has changed.
    pub(crate) fn apply(&self, volume: &HostVolume) {
        let mut state = self.lock();
        state.insert(volume);
        drop(state);
        self.changed.notify_all();
    }

    /// A HostVolume is gone.
    pub(crate) fn forget(&self, id: &VolumeId, uid: Uuid) {
        let mut state = self.lock();
        if state.volumes.get(id).is_some_and(|cached| cached.uid == uid) {
            state.remove(id);
            state.deleting.remove(id);
        }
        if state.pending.get(id).is_some_and(|pending| pending.cached.uid == uid) {
            state.pending.remove(id);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A list of HostVolumes is complete: the others are gone.
    pub(crate) fn retain_volumes(&self, listed: &BTreeSet<VolumeId>) {
        let mut state = self.lock();
        let gone: Vec<VolumeId> = state
            .volumes
            .keys()
            .filter(|id| !listed.contains(*id))
            .cloned()
            .collect();
        for id in gone {
            state.remove(&id);
            state.deleting.remove(&id);
        }
        state.seen.volumes = true;
        drop(state);
        self.changed.notify_all();
    }

    /// A node has published its pools.
    pub(crate) fn set_pools(&self, node: NodeName, pools: BTreeMap<PoolName, PoolStatus>) {
        self.lock().pools.insert(node, pools);
    }

    /// The HostNode of a node is gone.
    pub(crate) fn forget_pools(&self, node: &NodeName) {
        self.lock().pools.remove(node);
    }

    /// A list of HostNodes is complete: the others are gone.
    pub(crate) fn retain_pools(&self, nodes: &BTreeSet<NodeName>) {
        let mut state = self.lock();
        state.pools.retain(|node, _| nodes.contains(node));
        state.seen.host_nodes = true;
    }

    pub(crate) fn node_exists(&self, node: NodeName) {
        let mut state = self.lock();
        state.absent.remove(&node);
        state.nodes.insert(node);
    }

    pub(crate) fn node_is_gone(&self, node: &NodeName) {
        self.lock().nodes.remove(node);
    }

    /// A list of Nodes is complete: the others are gone.
    pub(crate) fn retain_nodes(&self, nodes: &BTreeSet<NodeName>) {
        let mut state = self.lock();
        state.nodes.retain(|node| nodes.contains(node));
        state.seen.nodes = true;
    }

    /// Whether all lists have been seen completely.
    pub(crate) fn is_complete(&self) -> bool {
        self.lock().seen.is_complete()
    }

    /// Counts a HostVolume that was just created, until the watch shows it.
    pub(super) fn note(&self, volume: &HostVolume) {
        let mut state = self.lock();
        if state
            .volumes
            .get(&volume.id)
            .is_none_or(|cached| cached.uid != volume.uid)
        {
            let cached = state.cached(volume);
            let pending = Pending {
                cached,
                since: Instant::now(),
            };
            state.pending.insert(volume.id.clone(), pending);
        }
    }

    /// The UID of a HostVolume, if one is known.
    pub(super) fn uid(&self, id: &VolumeId) -> Option<Uuid> {
        let state = self.lock();
        state.get(id).map(|cached| cached.uid)
    }

    /// Waits until the HostVolume of this UID is gone, for `limit` at most.
    ///
    /// # Errors
    /// The HostVolume still exists; the reason that its node has written, if any.
    pub(super) fn wait_deleted(&self, id: &VolumeId, uid: Uuid, limit: Duration) -> Result<(), Option<StatusReason>> {
        let start = Instant::now();
        let mut state = self.lock();
        loop {
            let Some(cached) = state.get(id).filter(|cached| cached.uid == uid) else {
                return Ok(());
            };
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(cached.status_reason.as_deref().cloned());
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The node for a volume: the first preferred node that has room for it, else the node with the most room.
    pub(super) fn choose(&self, pool: &PoolName, bytes: Bytes, topology: &Topology) -> Result<NodeName, Reason> {
        let mut state = self.lock();
        state.expire();
        let candidates: Vec<&NodeName> = state.pools.keys().filter(|node| topology.admits(node)).collect();
        let mut refusals = Vec::new();
        let mut fit: Vec<(usize, Bytes, &NodeName)> = Vec::new();
        for node in candidates {
            match state.room(node, pool) {
                Ok(room) if room >= bytes => {
                    let segment = node.segment();
                    let preferred = topology.preferred.iter().position(|wanted| *wanted == segment);
                    fit.push((preferred.unwrap_or(usize::MAX), room, node));
                }
                Ok(room) => refusals.push(format!(
                    "{bytes} do not fit in pool {pool} of node {node}, which has room for {room}"
                )),
                Err(why) => refusals.push(format!("node {node}: {why}")),
            }
        }
        fit.sort_by(|a, b| (a.0, b.1, a.2).cmp(&(b.0, a.1, b.2)));
        match fit.first() {
            Some((_, _, node)) => Ok((*node).clone()),
            None => Err(state.no_node(topology, refusals)),
        }
    }

    /// The largest volume that can be created in this pool on the nodes of this segment; `None` if these nodes have
    /// published their pools and no node at all has a pool of that name.
    pub(super) fn room(&self, pool: &PoolName, segment: Option<&str>) -> Option<Bytes> {
        let mut state = self.lock();
        state.expire();
        let (mut known, mut published) = (false, false);
        let mut most = Bytes(0);
        for (node, pools) in &state.pools {
            known |= pools.contains_key(pool);
            if segment.is_none_or(|segment| segment == node.segment()) {
                published = true;
                most = most.max(state.room(node, pool).unwrap_or_default());
            }
        }
        (known || !published).then_some(most)
    }

    /// The largest volume that can be created in a pool of a node.
    pub(super) fn room_of(&self, node: &NodeName, pool: &PoolName) -> Result<Bytes, Reason> {
        let mut state = self.lock();
        state.expire();
        let room = state.room(node, pool);
        room.map_err(|why| Reason::Waiting(format!("it cannot grow now: node {node}: {why}")))
    }

    /// Counts the new size of a HostVolume, unless the cache knows a newer state of it.
    pub(super) fn raise(&self, volume: &HostVolume) {
        let mut state = self.lock();
        if let Some(pending) = state.pending.get_mut(&volume.id)
            && pending.cached.uid == volume.uid
        {
            pending.cached.bytes = pending.cached.bytes.max(volume.spec.bytes);
        }
        let known = state.volumes.get(&volume.id);
        if known.is_some_and(|cached| cached.uid == volume.uid && cached.bytes < volume.spec.bytes) {
            state.insert(volume);
        }
    }

    /// The filesystem of a pool, if it is the same on all nodes that have one.
    pub(super) fn filesystem(&self, pool: &PoolName) -> Option<String> {
        let state = self.lock();
        let mut found = state
            .pools
            .values()
            .filter_map(|pools| pools.get(pool)?.filesystem.as_ref());
        let first = found.next()?;
        found.all(|other| other == first).then(|| first.clone())
    }

    /// At most `max` volumes in the order of their ids, from the first id after `after`.
    pub(super) fn list(&self, after: Option<&VolumeId>, max: usize) -> Vec<Volume> {
        let state = self.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = || (start, Bound::<&VolumeId>::Unbounded);
        let there = |(_, cached): &(&VolumeId, &CachedVolume)| !cached.deleting;
        let seen = state.volumes.range::<VolumeId, _>(range()).filter(there).take(max);
        let pending = state.pending.range::<VolumeId, _>(range());
        let pending = pending
            .map(|(id, pending)| (id, &pending.cached))
            .filter(there)
            .take(max);
        let all: BTreeMap<&VolumeId, &CachedVolume> = pending.chain(seen).collect();
        all.into_iter()
            .take(max)
            .map(|(id, cached)| cached.volume(id))
            .collect()
    }

    /// Notes which of the nodes that HostVolumes and HostNodes name do not exist, and since when. The queries below rely on
    /// this.
    pub(crate) fn note_absent(&self) {
        self.lock().note_absent();
    }

    /// Volumes that are being deleted and whose Node has not existed for `grace`.
    pub(crate) fn abandoned(&self, grace: Duration) -> Vec<VolumeId> {
        let state = self.lock();
        let volumes = state.volumes.iter();
        volumes
            .filter(|(_, cached)| cached.deleting && state.is_gone(&cached.place.node, grace))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Whether a Node has not existed for `grace`.
    pub(crate) fn is_gone(&self, node: &NodeName, grace: Duration) -> bool {
        self.lock().is_gone(node, grace)
    }

    /// Nodes that have a HostNode and no volumes, and have not existed for `grace`.
    pub(crate) fn empty_absent_nodes(&self, grace: Duration) -> Vec<NodeName> {
        let state = self.lock();
        let used: BTreeSet<&NodeName> = state.volumes.values().map(|cached| &cached.place.node).collect();
        let published = state.pools.keys();
        published
            .filter(|node| state.is_gone(node, grace) && !used.contains(node))
            .cloned()
            .collect()
    }

    /// Volumes recorded before this time that never had data and are not being deleted.
    pub(crate) fn never_used(&self, before: Timestamp) -> Vec<VolumeId> {
        let state = self.lock();
        let volumes = state.volumes.iter();
        volumes
            .filter(|(_, cached)| cached.phase == Phase::Claimed && !cached.deleting && cached.created < before)
            .map(|(id, _)| id.clone())
            .collect()
    }
    pub(crate) fn counts(&self) -> Counts {
        let state = self.lock();
        let mut counts = Counts::default();
        for cached in state.volumes.values() {
            match cached.phase {
                Phase::Claimed => counts.claimed += 1,
                Phase::Ready => counts.ready += 1,
                Phase::Lost => counts.lost += 1,
            }
            counts.deleting += usize::from(cached.deleting);
        }
        counts
    }

    /// How long this controller has known about the delete that has waited longest.
    pub(crate) fn oldest_delete(&self) -> Duration {
        let state = self.lock();
        state.deleting.values().map(Instant::elapsed).max().unwrap_or_default()
    }

    /// All pools that can be used.
    pub(crate) fn pools(&self) -> Vec<PoolUsage> {
        let state = self.lock();
        let of = |(node, pools): (&NodeName, &BTreeMap<PoolName, PoolStatus>)| {
            let usage = |(pool, status): (&PoolName, &PoolStatus)| {
                let allocated = state.allocated_of(&PoolKey::new(node, pool));
                status.usage(node, pool, allocated)
            };
            pools.iter().filter_map(usage).collect::<Vec<_>>()
        };
        state.pools.iter().flat_map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // It is only a cache: the next event corrects what a panic leaves behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
