//! Local mode: one node's volumes, recorded on its own pools, and whether these are fine.

use jiff::Timestamp;
use tracing::{info, warn};

use super::control::{Control, Health, Volume, Want};
use super::driver::Driver;
use super::error::{Error, Reason};
use super::id::{PoolName, VolumeId};
use super::pool::{Entry, OpenPool, Pool};
use super::record::{Phase, Record};
use super::size::{Bytes, SizeRange};

impl Health for Driver {
    /// Whether the pools are present, writable and the ones that were opened: at least one of them, or all. One bad disk must
    /// not stop what depends on the driver as a whole.
    ///
    /// # Errors
    /// [`Reason::NotReady`] names each pool that is not.
    fn probe(&self, all: bool) -> Result<bool, Error> {
        let check = |pool: &Pool| pool.get(&self.host).and_then(|open| open.disk.writable());
        let bad: Vec<String> = self
            .pools
            .iter()
            .filter_map(|pool| check(pool).err().map(|why| format!("pool {}: {why}", pool.config.name)))
            .collect();
        if bad.is_empty() || (!all && bad.len() < self.pools.len()) {
            Ok(true)
        } else {
            Err(self.error(None, Reason::NotReady(bad.join("; "))))
        }
    }
}

/// Local mode: this node's volumes, recorded on its own pools.
impl Control for Driver {
    /// Nothing but the record is put on the disk.
    ///
    /// # Errors
    /// [`Reason::Exists`] when the name is taken by another volume, [`Reason::NoRoom`], [`Reason::OtherNode`] and
    /// [`Reason::NoSuchPool`] when another node may have better luck, [`Reason::PoolUnusable`] and
    /// [`Reason::Running`] when a later call may.
    fn create(&self, want: &Want) -> Result<Volume, Error> {
        let id = VolumeId::for_name(&want.name);
        self.try_create(&id, want)
            .map_err(|reason| self.error(Some(&id), reason))
    }

    /// Takes the volume out of its pool; its data is erased in the background.
    ///
    /// # Errors
    /// [`Reason::Mounted`] while it is, [`Reason::PoolUnusable`] when the volume may be on a pool that cannot be asked.
    fn delete(&self, id: &VolumeId) -> Result<(), Error> {
        self.try_delete(id, None).map_err(|reason| self.error(Some(id), reason))
    }

    /// # Errors
    /// [`Reason::NoRoomToGrow`], [`Reason::Shrink`], or as [`Control::get`].
    fn expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error> {
        self.try_expand(id, size).map_err(|reason| self.error(Some(id), reason))
    }

    /// # Errors
    /// [`Reason::NoSuchVolume`], or its pool or record cannot be read.
    fn get(&self, id: &VolumeId) -> Result<Volume, Error> {
        let get = || {
            let (pool, entry) = self.require(id)?;
            Ok(self.volume(entry.record.map_err(Reason::BrokenRecord)?, &pool))
        };
        get().map_err(|reason| self.error(Some(id), reason))
    }

    /// # Errors
    /// [`Reason::PoolUnusable`]: a list without the volumes of a pool would say that they are gone.
    fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error> {
        let mut volumes = Vec::new();
        for pool in &self.pools {
            let open = pool.get(&self.host).map_err(|why| {
                let pool = pool.config.name.clone();
                self.error(None, Reason::PoolUnusable { pool, why })
            })?;
            let records = open.records_after(after, max);
            volumes.extend(records.into_iter().map(|record| self.volume(record, &open)));
        }
        volumes.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        volumes.truncate(max);
        Ok(volumes)
    }

    /// A driver that keeps the record also sets the limit.
    fn expands_on_node(&self) -> bool {
        false
    }

    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Option<Bytes> {
        if segment.is_some_and(|segment| segment != self.node.segment()) {
            return Some(Bytes(0));
        }
        let room = match self.pool(pool) {
            Err(Reason::NoSuchPool { .. }) => return None,
            Err(reason) => Err(reason),
            Ok(pool) => pool.room().map_err(Reason::from),
        };
        Some(room.unwrap_or_else(|why| {
            warn!(node = %self.node, pool = %pool, %why, "no capacity");
            Bytes(0)
        }))
    }

    fn filesystem(&self, pool: &PoolName) -> Option<String> {
        self.pool(pool).ok().map(|pool| pool.filesystem.clone())
    }
}

impl Driver {
    fn try_create(&self, id: &VolumeId, want: &Want) -> Result<Volume, Reason> {
        let _running = self.operations.on_volume(id)?;
        if let Some((pool, entry)) = self.look_up(id)?.found {
            return self.existing(&pool, entry, want);
        }
        if !want.placement.admits(&self.node) {
            return Err(Reason::OtherNode);
        }
        if !want.size.admits(want.size.choose()) {
            return Err(Reason::EmptyRange(want.size));
        }
        let pool = self.pool(&want.parameters.pool)?;
        let record = Record {
            format: Record::FORMAT,
            id: id.clone(),
            uid: None,
            name: want.name.clone(),
            claim: want.claim.clone(),
            bytes: want.size.choose(),
            project: None,
            directory: want.parameters.directory,
            pool_id: pool.id,
            phase: Phase::Claimed,
            created: Timestamp::now(),
        };
        pool.claim(record.clone())?;
        info!(volume.id = %id, node = %self.node, pool = %pool.config.name, size = %record.bytes, "volume created");
        Ok(self.volume(record, &pool))
    }

    pub(super) fn try_expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Reason> {
        let _running = self.operations.on_volume(id)?;
        let (pool, entry) = self.require(id)?;
        let record = entry.record.map_err(Reason::BrokenRecord)?;
        match size.grow(record.bytes) {
            None => Err(Reason::Shrink { has: record.bytes }),
            Some(None) => Ok(record.bytes),
            Some(Some(bytes)) => {
                pool.grow(record, bytes)?;
                info!(volume.id = %id, node = %self.node, pool = %pool.config.name, size = %bytes, "volume expanded");
                Ok(bytes)
            }
        }
    }

    /// The volume that is there already, if it is what is wanted.
    fn existing(&self, pool: &OpenPool, entry: Entry, want: &Want) -> Result<Volume, Reason> {
        let record = entry.record.map_err(Reason::BrokenRecord)?;
        if record.name != want.name {
            return Err(Reason::Exists(format!("the other name {:?}", record.name)));
        }
        let volume = self.volume(record, pool);
        volume.meets(want)?;
        Ok(volume)
    }

    fn volume(&self, record: Record, pool: &OpenPool) -> Volume {
        Volume {
            id: record.id,
            node: self.node.clone(),
            pool: pool.config.name.clone(),
            bytes: record.bytes,
            directory: record.directory,
            made_on: Some(record.pool_id),
            uid: record.uid,
        }
    }
}
