//! Data whose HostVolume is gone: it can be given to a new HostVolume of the same name, and a HostVolume can go without it.

use tracing::info;
use uuid::Uuid;

use super::Node;
use crate::volume::disk::PoolVolume;
use crate::volume::error::{Error, Reason};
use crate::volume::host_volume::HostVolume;
use crate::volume::record::{Record, VolumeSpec};

impl Node {
    /// Gives a HostVolume the data that the HostVolume `from` had left: from then on its record names the new one. Pods that have it
    /// mounted do not notice. Idempotent.
    ///
    /// # Errors
    /// There is no such data on the HostVolume's pool, or its record cannot be written.
    pub(crate) fn adopt(&self, volume: &HostVolume, from: Uuid) -> Result<(), Error> {
        self.try_adopt(volume, from)
            .map_err(|reason| self.error(Some(&volume.id), reason))
    }

    fn try_adopt(&self, volume: &HostVolume, from: Uuid) -> Result<(), Reason> {
        let HostVolume {
            id,
            uid,
            pool: wanted,
            spec,
            ..
        } = volume;
        let _lock = self.locks.lock_volume(id)?;
        let (pool, there) = self.require(id)?;
        let record = there.record.map_err(Reason::BrokenRecord)?;
        if record.uid == Some(*uid) {
            return pool.settle();
        }
        if record.uid != Some(from) || !record.ready {
            return Err(Reason::NoSuchVolume);
        }
        if pool.config.name != *wanted {
            let there = &pool.config.name;
            return Err(Reason::Waiting(format!(
                "its data is on pool {there}, and its HostVolume names pool {wanted}; create the HostVolume with pool {there}"
            )));
        }
        // Volumes never shrink.
        let bytes = record.spec.bytes.max(spec.bytes);
        let adopted = Record {
            uid: Some(*uid),
            adopted: record.adopted.iter().copied().chain([from]).collect(),
            spec: VolumeSpec {
                bytes: record.spec.bytes,
                ..spec.clone()
            },
            ..record
        };
        pool.begin_call()?.grow_allocated(adopted, bytes)?;
        info!(volume.id = %id, node = %self.name, pool = %wanted, %from, to = %uid, "data adopted");
        Ok(())
    }

    /// Deletes the volume of a HostVolume, as [`Node::delete_of`].
    ///
    /// # Errors
    /// As there, and [`Reason::PoolRemoved`] when the volume was made on a pool that is not configured any more.
    pub(crate) fn delete_assigned(&self, volume: &HostVolume) -> Result<(), Error> {
        let HostVolume { id, uid, pool, .. } = volume;
        let configured = self.pools.iter().any(|known| known.config.name == *pool);
        if volume.made_on.is_some() && !configured && self.known_pool_of(id).is_none() {
            let known: Vec<&str> = self.pools.iter().map(|pool| pool.config.name.as_str()).collect();
            let reason = Reason::PoolRemoved {
                pool: pool.clone(),
                known: known.join(", "),
            };
            return Err(self.error(Some(id), reason));
        }
        self.delete_of(id, *uid)
    }

    /// Whether a HostVolume has data, as far as the API server and the pools say; if in doubt, it has.
    pub(crate) fn may_have_data(&self, volume: &HostVolume) -> bool {
        let Ok(lookup) = self.look_up(&volume.id) else {
            return true;
        };
        let with_data = |there: &PoolVolume| there.record.as_ref().map_or(true, |record| record.ready);
        let found = lookup.found.as_ref().is_some_and(|(_, there)| with_data(there));
        found || volume.made_on.is_some() || lookup.unusable.is_some()
    }

    /// Why the data of a HostVolume cannot be reached on this node, if it certainly cannot: its pool is not configured, or cannot be
    /// used, and no pod has it mounted.
    pub(crate) fn unreachable(&self, volume: &HostVolume) -> Option<Reason> {
        if let Some(pool) = self.known_pool_of(&volume.id)
            && pool.volume(&volume.id).is_some_and(|there| !there.mounts.is_empty())
        {
            return None;
        }
        match self.look_up(&volume.id) {
            Ok(lookup) if lookup.found.is_some() => None,
            Ok(_) => self.pool(&volume.pool).err(),
            Err(_) => None,
        }
    }
}
