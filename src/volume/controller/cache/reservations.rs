//! Room that is reserved before the API server knows of it: choosing a node and counting the volume there are one step, so that
//! two calls cannot both get the last room of a pool.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ClusterCache;
use super::state::{CachedVolume, PoolKey, State};
use crate::volume::control::Topology;
use crate::volume::error::Reason;
use crate::volume::host_volume::HostVolume;
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::size::Bytes;

/// How long room stays reserved after its call has ended, unless the watch shows the HostVolume before: if it takes longer, the
/// HostVolume was never created, or it was deleted before the watch could show it. Longer than a dead watch goes unnoticed.
const RESERVED_MAX: Duration = Duration::from_mins(2);

/// The room of a volume that the watch has not shown yet, or not with this size.
pub(super) struct Reserved {
    pub(super) place: Arc<PoolKey>,
    /// The size that the volume gets.
    pub(super) bytes: Bytes,
    /// The HostVolume, if it was created and the watch has not shown it yet.
    pub(super) created: Option<CachedVolume>,
    held: Held,
}

/// Why room is still reserved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// The call of this number is running.
    ByCall(u64),
    /// The call ended then.
    Since(Instant),
}

impl Reserved {
    fn is_running(&self) -> bool {
        matches!(self.held, Held::ByCall(_))
    }
}

/// Reserved room of a running call. It is given back when this is dropped, unless the API server may know of the volume.
pub(in crate::volume::controller) struct Reservation<'a> {
    cache: &'a ClusterCache,
    call: u64,
    id: VolumeId,
    /// The node that was chosen.
    pub(in crate::volume::controller) node: NodeName,
}

impl Reservation<'_> {
    /// The API server has the HostVolume: its room counts until the watch shows it, and from then on as part of the volume.
    pub(in crate::volume::controller) fn recorded(self, volume: &HostVolume) {
        self.cache.lock().count(volume);
    }

    /// The API server may have made the change or not: the room stays reserved for two minutes, or until the watch or the next
    /// call shows which.
    pub(in crate::volume::controller) fn unsure(self) {
        let mut state = self.cache.lock();
        if let Some(reserved) = state.reservations.get_mut(&self.id)
            && reserved.held == Held::ByCall(self.call)
        {
            reserved.held = Held::Since(Instant::now());
        }
    }
}

impl Drop for Reservation<'_> {
    /// Gives the room back, if neither [`Reservation::recorded`] nor [`Reservation::unsure`] has ended the call.
    fn drop(&mut self) {
        self.cache.lock().give_back(&self.id, self.call);
    }
}

impl ClusterCache {
    /// Chooses the node for a volume, and reserves its room there.
    ///
    /// # Errors
    /// No node has room for it; or another call for the same volume is running, or has just created it.
    pub(in crate::volume::controller) fn reserve(
        &self,
        id: &VolumeId,
        pool: &PoolName,
        bytes: Bytes,
        topology: &Topology,
    ) -> Result<Reservation<'_>, Reason> {
        let mut state = self.lock();
        state.expire();
        let running = state.reservations.get(id).is_some_and(Reserved::is_running);
        if running || state.get(id).is_some() {
            return Err(Reason::Running("this volume".into()));
        }
        // What an earlier call may have created has the same name: it is either found, or not there.
        state.end_reservation(id);
        let node = state.choose(pool, bytes, topology)?;
        let call = state.next_call();
        let reserved = Reserved {
            place: state.place(&node, pool),
            bytes,
            created: None,
            held: Held::ByCall(call),
        };
        state.put_reservation(id, reserved);
        drop(state);
        Ok(self.reservation(id, node, call))
    }

    /// Reserves the room that a volume needs to grow to `wanted`.
    ///
    /// # Errors
    /// There is less room; or that is not known; or another call for the same volume is running.
    pub(in crate::volume::controller) fn reserve_growth(
        &self,
        volume: &HostVolume,
        wanted: Bytes,
    ) -> Result<Reservation<'_>, Reason> {
        let HostVolume {
            id, node, pool, spec, ..
        } = volume;
        let mut state = self.lock();
        state.expire();
        if state.reservations.get(id).is_some_and(Reserved::is_running) {
            return Err(Reason::Running("this volume".into()));
        }
        // The watch may be late.
        state.count(volume);
        // Unknown room must not count as zero: that would be a final error.
        let room = state.room(node, pool);
        let room = room.map_err(|why| Reason::Waiting(format!("it cannot grow now: node {node}: {why}")))?;
        let room = spec.bytes.plus(room);
        if wanted > room {
            let pool = pool.clone();
            return Err(Reason::NoRoomToGrow { pool, wanted, room });
        }
        let created = state.end_reservation(id).and_then(|reserved| reserved.created);
        let call = state.next_call();
        let reserved = Reserved {
            place: state.place(node, pool),
            bytes: wanted,
            created,
            held: Held::ByCall(call),
        };
        state.put_reservation(id, reserved);
        drop(state);
        Ok(self.reservation(id, node.clone(), call))
    }

    fn reservation(&self, id: &VolumeId, node: NodeName, call: u64) -> Reservation<'_> {
        Reservation {
            cache: self,
            call,
            id: id.clone(),
            node,
        }
    }

    /// Counts a HostVolume that the API server has, until the watch shows it.
    pub(in crate::volume::controller) fn note(&self, volume: &HostVolume) {
        self.lock().count(volume);
    }
}

impl State {
    /// Counts at least what the API server has of this volume, whatever the watch has shown so far.
    fn count(&mut self, volume: &HostVolume) {
        let shown = self.volumes.get(&volume.id).filter(|shown| shown.uid == volume.uid);
        if shown.is_some_and(|shown| shown.bytes >= volume.spec.bytes) {
            self.end_reservation(&volume.id);
            return;
        }
        let created = shown.is_none().then(|| self.cached(volume));
        let reserved = Reserved {
            place: self.place(&volume.node, &volume.pool),
            bytes: volume.spec.bytes,
            created,
            held: Held::Since(Instant::now()),
        };
        self.put_reservation(&volume.id, reserved);
    }

    fn next_call(&mut self) -> u64 {
        self.calls += 1;
        self.calls
    }

    fn give_back(&mut self, id: &VolumeId, call: u64) {
        let of_call = |reserved: &&mut Reserved| reserved.held == Held::ByCall(call);
        let Some(reserved) = self.reservations.get_mut(id).filter(of_call) else {
            return;
        };
        // A volume that was to grow keeps what it had.
        if let Some(created) = &reserved.created {
            reserved.bytes = created.bytes;
            reserved.held = Held::Since(Instant::now());
        } else {
            self.end_reservation(id);
        }
    }

    pub(super) fn expire(&mut self) {
        let old = |reserved: &Reserved| matches!(reserved.held, Held::Since(since) if since.elapsed() >= RESERVED_MAX);
        let expired = self.reservations.iter().filter(|(_, reserved)| old(reserved));
        let expired: Vec<VolumeId> = expired.map(|(id, _)| id.clone()).collect();
        for id in expired {
            self.end_reservation(&id);
        }
    }
}
