//! Gives a volume a larger size: NodeExpandVolume.

use tracing::info;
use uuid::Uuid;

use super::Node;
use crate::volume::error::{Error, Reason};
use crate::volume::id::VolumeId;
use crate::volume::size::{Bytes, SizeRange};

impl Node {
    /// Limits a volume to the current capacity of its HostVolume, and returns that; `size` is what the caller expects. In
    /// local mode this also allocates the room.
    ///
    /// # Errors
    /// [`Reason::NotAllocated`], [`Reason::NoRoomToGrow`] in local mode, or as for
    /// [`Control::get`](crate::volume::Control::get).
    pub(crate) fn expand_here(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error> {
        self.try_expand_here(id, size)
            .map_err(|reason| self.error(Some(id), reason))
    }

    fn try_expand_here(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Reason> {
        let (_, volume) = self.require(id)?;
        let record = volume.record.map_err(Reason::BrokenRecord)?;
        let Some(uid) = record.uid else {
            return self.try_expand(id, size);
        };
        // Not from the cache, which may lag behind: this is called as soon as the capacity is raised.
        let assigned = self.assignments.get(id)?.filter(|assigned| assigned.uid == uid);
        let allocated = assigned.ok_or(Reason::NoSuchVolume)?.spec.bytes;
        if size.required > allocated {
            let wanted = size.required;
            return Err(Reason::NotAllocated { allocated, wanted });
        }
        self.try_grow_to(id, uid, allocated)
    }

    /// Grows a volume of this node to the capacity of its HostVolume, if that is larger. Returns the resulting size.
    ///
    /// # Errors
    /// [`Reason::Running`], or the limit or the record cannot be written.
    pub(crate) fn grow_to(&self, id: &VolumeId, uid: Uuid, allocated: Bytes) -> Result<Bytes, Error> {
        self.try_grow_to(id, uid, allocated)
            .map_err(|reason| self.error(Some(id), reason))
    }

    fn try_grow_to(&self, id: &VolumeId, uid: Uuid, allocated: Bytes) -> Result<Bytes, Reason> {
        let _lock = self.locks.lock_volume(id)?;
        let (pool, volume) = self.require(id)?;
        let record = volume.record.map_err(Reason::BrokenRecord)?;
        if record.uid != Some(uid) {
            return Err(Reason::NoSuchVolume);
        }
        let has = record.spec.bytes;
        if allocated <= has {
            return pool.settle().map(|()| has);
        }
        pool.begin_call()?.grow_allocated(record, allocated)?;
        info!(volume.id = %id, node = %self.name, pool = %pool.config.name, size = %allocated, "volume expanded");
        Ok(allocated)
    }
}
