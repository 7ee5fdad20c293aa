//! What a controller knows about the cluster, kept up to date by API watches: nodes, their pools, and the volumes there.
//!
//! The cache answers without asking the API server, and may lag behind. What must be exact (whether a name is taken) comes
//! from the [`HostVolumeStore`](crate::volume::host_volume::HostVolumeStore).

mod nodes;
mod reservations;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Bound;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use crate::volume::control::Volume;
use crate::volume::host_volume::{HostVolume, StatusReason};
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::pool_status::{PoolStatus, PoolUsage};
use crate::volume::record::Phase;
use crate::volume::size::Bytes;
use state::{CachedVolume, PoolKey, State};

pub(crate) use nodes::NodeState;
pub(super) use reservations::Reservation;
pub(crate) use state::List;

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

/// Volumes with data, by whether they have a PersistentVolume, and whether they are marked as having none.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Released {
    /// How many have none, and are marked so.
    pub(crate) marked: usize,
    /// Those that have none, and are not marked.
    pub(crate) unmarked: Vec<VolumeId>,
    /// Those that have one, and are marked as having none.
    pub(crate) back: Vec<VolumeId>,
}

fn hash(id: &VolumeId) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
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
        state.forget(id, uid);
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
        }
        state.seen.insert(List::HostVolumes);
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
        state.seen.insert(List::HostNodes);
    }

    /// Notes since when the changes of a list do not come any more; `None` if they come.
    pub(crate) fn set_deaf(&self, list: List, since: Option<Instant>) {
        let deaf = &mut self.lock().deaf;
        match since {
            None => drop(deaf.remove(&list)),
            Some(since) => drop(deaf.entry(list).or_insert(since)),
        }
    }

    /// Whether all lists have been seen completely, and are up to date.
    pub(crate) fn is_complete(&self) -> bool {
        self.lock().is_complete()
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
        let created = state.reservations.range::<VolumeId, _>(range());
        let created = created
            .filter_map(|(id, reserved)| Some((id, reserved.created.as_ref()?)))
            .filter(there)
            .take(max);
        let all: BTreeMap<&VolumeId, &CachedVolume> = created.chain(seen).collect();
        all.into_iter()
            .take(max)
            .map(|(id, cached)| cached.volume(id))
            .collect()
    }

    /// Volumes recorded before this time that never had data and are not being deleted.
    pub(crate) fn never_used(&self, before: Timestamp) -> Vec<VolumeId> {
        let state = self.lock();
        let volumes = state.volumes.iter();
        volumes
            .filter(|(_, cached)| {
                cached.readable && cached.phase == Phase::Claimed && !cached.deleting && cached.created < before
            })
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// A PersistentVolume exists, or is gone. A volume is named after it.
    pub(crate) fn set_persistent(&self, id: &VolumeId, exists: bool) {
        let mut state = self.lock();
        if exists {
            state.persistent.insert(hash(id));
        } else {
            state.persistent.remove(&hash(id));
        }
    }

    /// A list of PersistentVolumes is complete: the others are gone.
    pub(crate) fn retain_persistent(&self, listed: &BTreeSet<VolumeId>) {
        let mut state = self.lock();
        state.persistent = listed.iter().map(hash).collect();
        state.seen.insert(List::PersistentVolumes);
    }

    /// Which volumes with data have no PersistentVolume.
    pub(crate) fn released(&self) -> Released {
        let state = self.lock();
        let mut released = Released::default();
        if !state.seen.contains(&List::PersistentVolumes) {
            return released;
        }
        for (id, cached) in &state.volumes {
            if !cached.readable || cached.deleting || cached.phase == Phase::Claimed {
                continue;
            }
            match (state.persistent.contains(&hash(id)), cached.released) {
                (false, true) => released.marked += 1,
                (false, false) => released.unmarked.push(id.clone()),
                (true, true) => released.back.push(id.clone()),
                (true, false) => {}
            }
        }
        released
    }

    pub(crate) fn counts(&self) -> Counts {
        let state = self.lock();
        let mut counts = Counts::default();
        for cached in state.volumes.values().filter(|cached| cached.readable) {
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
