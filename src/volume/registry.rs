//! What a controller knows of the cluster, kept up to date by watches: nodes, their pools, and what was promised of them.
//!
//! It is a cache: it answers "how much room is where" without asking anybody, and it may be late. What must be right
//! (whether a name is taken) is asked of the [`Book`](super::ports::Book).

mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use super::control::{Placement, Volume};
use super::error::Reason;
use super::id::{NodeName, PoolName, VolumeId};
use super::ports::{Hindrance, Promise, Space, Stage};
use super::record::PoolId;
use super::room::Limits;
use super::size::Bytes;
use state::{Home, Kept, Pending, State};

/// A pool as its node published it.
#[derive(Clone, Debug, PartialEq)]
pub struct PublishedPool {
    /// Its identity, where it was ever opened.
    pub id: Option<PoolId>,
    /// Its filesystem, as mount(8) calls it.
    pub filesystem: Option<String>,
    /// Size and use, or why it cannot be used.
    pub space: Result<Space, String>,
    /// Bytes that others had on it when it was made.
    pub foreign: Bytes,
    /// How much of it may be promised.
    pub limits: Limits,
}

/// The cache.
#[derive(Default)]
pub struct Registry {
    state: Mutex<State>,
    changed: Condvar,
}

/// A count of promises by how far they have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Never had data.
    pub claimed: usize,
    /// Have their data.
    pub ready: usize,
    /// Had their data.
    pub lost: usize,
    /// Of all these, being deleted.
    pub deleting: usize,
}

/// Size and promises of one pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolSummary {
    /// The node.
    pub node: NodeName,
    /// The pool.
    pub pool: PoolName,
    /// Size of what can be promised in all.
    pub size: Bytes,
    /// What is promised.
    pub promised: Bytes,
    /// The largest volume that can still be promised.
    pub room: Bytes,
}

impl Registry {
    /// Takes in a promise that is new or has changed.
    pub fn apply(&self, promise: &Promise) {
        let mut state = self.lock();
        state.insert(promise);
        drop(state);
        self.changed.notify_all();
    }

    /// Forgets a promise that is gone.
    pub fn forget(&self, id: &VolumeId, uid: Uuid) {
        let mut state = self.lock();
        if state.volumes.get(id).is_some_and(|kept| kept.uid == uid) {
            state.remove(id);
            state.deleting.remove(id);
        }
        if state.pending.get(id).is_some_and(|pending| pending.kept.uid == uid) {
            state.pending.remove(id);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Takes in a whole list of promises: what is not on it is gone.
    pub fn replace(&self, promises: &BTreeSet<VolumeId>) {
        let mut state = self.lock();
        let gone: Vec<VolumeId> = state
            .volumes
            .keys()
            .filter(|id| !promises.contains(*id))
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

    /// Takes in what a node publishes of its pools.
    pub fn publish(&self, node: NodeName, pools: BTreeMap<PoolName, PublishedPool>) {
        self.lock().pools.insert(node, pools);
    }

    /// Forgets what a node published.
    pub fn unpublish(&self, node: &NodeName) {
        self.lock().pools.remove(node);
    }

    /// Takes in which nodes have published anything: the others have not.
    pub fn retain_published(&self, nodes: &BTreeSet<NodeName>) {
        let mut state = self.lock();
        state.pools.retain(|node, _| nodes.contains(node));
        state.seen.host_nodes = true;
    }

    /// Notes that a Node exists.
    pub fn node_is_there(&self, node: NodeName) {
        let mut state = self.lock();
        state.absent.remove(&node);
        state.nodes.insert(node);
    }

    /// Notes that a Node does not exist.
    pub fn node_is_gone(&self, node: &NodeName) {
        self.lock().nodes.remove(node);
    }

    /// Takes in which Nodes exist: the others do not.
    pub fn retain_nodes(&self, nodes: &BTreeSet<NodeName>) {
        let mut state = self.lock();
        state.nodes.retain(|node| nodes.contains(node));
        state.seen.nodes = true;
    }

    /// Whether all lists have been seen whole.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.lock().seen.is_complete()
    }

    /// Counts a promise that was just made, until the watch shows it.
    pub(super) fn note(&self, promise: &Promise) {
        let mut state = self.lock();
        if state
            .volumes
            .get(&promise.id)
            .is_none_or(|kept| kept.uid != promise.uid)
        {
            let kept = state.kept(promise);
            let pending = Pending {
                kept,
                since: Instant::now(),
            };
            state.pending.insert(promise.id.clone(), pending);
        }
    }

    /// The UID of a promise, if one is known.
    pub(super) fn uid(&self, id: &VolumeId) -> Option<Uuid> {
        let state = self.lock();
        state.get(id).map(|kept| kept.uid)
    }

    /// Waits until the promise of this UID is gone: whether it is, and what its node says if it is not.
    pub(super) fn wait_gone(&self, id: &VolumeId, uid: Uuid, limit: Duration) -> Result<(), Option<Hindrance>> {
        let start = Instant::now();
        let mut state = self.lock();
        loop {
            let Some(kept) = state.get(id).filter(|kept| kept.uid == uid) else {
                return Ok(());
            };
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(kept.hindrance.as_deref().cloned());
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The node for a volume: the first of the preferred ones that can have it, else the one with the most room.
    pub(super) fn choose(&self, pool: &PoolName, bytes: Bytes, placement: &Placement) -> Result<NodeName, Reason> {
        let mut state = self.lock();
        state.expire();
        let candidates: Vec<&NodeName> = state.pools.keys().filter(|node| placement.admits(node)).collect();
        let mut refusals = Vec::new();
        let mut fit: Vec<(usize, Bytes, &NodeName)> = Vec::new();
        for node in candidates {
            match state.room(node, pool) {
                Ok(room) if room >= bytes => {
                    let segment = node.segment();
                    let preferred = placement.preferred.iter().position(|wanted| *wanted == segment);
                    fit.push((preferred.unwrap_or(usize::MAX), room, node));
                }
                Ok(room) => refusals.push(format!(
                    "{bytes} do not fit in pool {pool} of node {node}: {room} are left to promise"
                )),
                Err(why) => refusals.push(format!("node {node}: {why}")),
            }
        }
        fit.sort_by(|a, b| (a.0, b.1, a.2).cmp(&(b.0, a.1, b.2)));
        match fit.first() {
            Some((_, _, node)) => Ok((*node).clone()),
            None => Err(state.no_node(placement, refusals)),
        }
    }

    /// The largest volume that can be promised on a pool of the nodes of this segment; nothing if these nodes have
    /// published their pools and no node at all has such a one.
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

    /// What can still be promised of a pool of a node.
    pub(super) fn left(&self, node: &NodeName, pool: &PoolName) -> Result<Bytes, Reason> {
        let mut state = self.lock();
        state.expire();
        let room = state.room(node, pool);
        room.map_err(|why| Reason::Waiting(format!("it cannot grow now: node {node}: {why}")))
    }

    /// Takes in that a promise has grown, unless what is known of it is newer.
    pub(super) fn raise(&self, promise: &Promise) {
        let mut state = self.lock();
        if let Some(pending) = state.pending.get_mut(&promise.id)
            && pending.kept.uid == promise.uid
        {
            pending.kept.bytes = pending.kept.bytes.max(promise.bytes);
        }
        let known = state.volumes.get(&promise.id);
        if known.is_some_and(|kept| kept.uid == promise.uid && kept.bytes < promise.bytes) {
            state.insert(promise);
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

    /// At most `max` volumes, in the order of their ids, from the first after `after`.
    pub(super) fn list(&self, after: Option<&VolumeId>, max: usize) -> Vec<Volume> {
        let state = self.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = || (start, Bound::<&VolumeId>::Unbounded);
        let there = |(_, kept): &(&VolumeId, &Kept)| !kept.deleting;
        let seen = state.volumes.range::<VolumeId, _>(range()).filter(there).take(max);
        let pending = state.pending.range::<VolumeId, _>(range());
        let pending = pending.map(|(id, pending)| (id, &pending.kept)).filter(there).take(max);
        let all: BTreeMap<&VolumeId, &Kept> = pending.chain(seen).collect();
        all.into_iter().take(max).map(|(id, kept)| kept.volume(id)).collect()
    }

    /// Looks which of the nodes that promises and pools name do not exist, and counts for how long. What follows goes by that.
    pub fn note_absent(&self) {
        self.lock().note_absent();
    }

    /// Promises that are being deleted and whose Node has not existed for so long.
    #[must_use]
    pub fn abandoned(&self, grace: Duration) -> Vec<VolumeId> {
        let state = self.lock();
        let volumes = state.volumes.iter();
        volumes
            .filter(|(_, kept)| kept.deleting && state.is_gone(&kept.home.node, grace))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Whether a Node has not existed for so long.
    #[must_use]
    pub fn is_gone(&self, node: &NodeName, grace: Duration) -> bool {
        self.lock().is_gone(node, grace)
    }

    /// Nodes that published pools, have no promises, and have not existed for so long.
    #[must_use]
    pub fn empty_absent_nodes(&self, grace: Duration) -> Vec<NodeName> {
        let state = self.lock();
        let used: BTreeSet<&NodeName> = state.volumes.values().map(|kept| &kept.home.node).collect();
        let published = state.pools.keys();
        published
            .filter(|node| state.is_gone(node, grace) && !used.contains(node))
            .cloned()
            .collect()
    }

    /// Promises made before then of which no disk has ever had data, and which are not being deleted.
    #[must_use]
    pub fn never_used(&self, before: Timestamp) -> Vec<VolumeId> {
        let state = self.lock();
        let volumes = state.volumes.iter();
        volumes
            .filter(|(_, kept)| kept.stage == Stage::Claimed && !kept.deleting && kept.created < before)
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// How many promises there are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let state = self.lock();
        let mut counts = Counts::default();
        for kept in state.volumes.values() {
            match kept.stage {
                Stage::Claimed => counts.claimed += 1,
                Stage::Ready => counts.ready += 1,
                Stage::Lost => counts.lost += 1,
            }
            counts.deleting += usize::from(kept.deleting);
        }
        counts
    }

    /// For how long this controller has known of the delete that waits longest.
    #[must_use]
    pub fn oldest_delete(&self) -> Duration {
        let state = self.lock();
        state.deleting.values().map(Instant::elapsed).max().unwrap_or_default()
    }

    /// All pools that can be used.
    #[must_use]
    pub fn pools(&self) -> Vec<PoolSummary> {
        let state = self.lock();
        let of = |(node, pools): (&NodeName, &BTreeMap<PoolName, PublishedPool>)| {
            let summary = |(pool, published): (&PoolName, &PublishedPool)| {
                let space = published.space.as_ref().ok()?;
                let promised = state.promised_of(&Home::new(node, pool));
                Some(PoolSummary {
                    node: node.clone(),
                    pool: pool.clone(),
                    size: published.limits.room(*space, published.foreign, Bytes(0)),
                    promised,
                    room: state.room(node, pool).unwrap_or_default(),
                })
            };
            pools.iter().filter_map(summary).collect::<Vec<_>>()
        };
        state.pools.iter().flat_map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // It is only a cache: what a panic leaves behind is put right by the next event.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
