//! Local mode: the volumes of one node, recorded on its own pools; and the health of the pools.

use jiff::Timestamp;
use tracing::{info, warn};

use super::Node;
use super::open_pool::OpenPool;
use crate::volume::control::{Control, CreateRequest, Health, Volume};
use crate::volume::disk::PoolVolume;
use crate::volume::error::{Error, Reason};
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::record::{Record, VolumeSpec};
use crate::volume::size::{Bytes, Growth, SizeRange};

impl Health for Node {
    /// Whether the pools are present, writable and still the ones that were opened: with `all` each of them, otherwise at
    /// least one. One bad disk must not stop everything that depends on this process.
    ///
    /// # Errors
    /// [`Reason::NotReady`] names each pool that is not usable.
    fn probe(&self, all: bool) -> Result<bool, Error> {
        let bad: Vec<String> = self
            .pools
            .iter()
            .filter_map(|pool| {
                pool.writable()
                    .err()
                    .map(|why| format!("pool {}: {why}", pool.config.name))
            })
            .collect();
        if bad.is_empty() || (!all && bad.len() < self.pools.len()) {
            Ok(true)
        } else {
            Err(self.error(None, Reason::NotReady(bad.join("; "))))
        }
    }
}

/// Local mode: this node's volumes, recorded on its own pools.
impl Control for Node {
    /// Writes only the record to the disk.
    ///
    /// # Errors
    /// [`Reason::Exists`] when the name is taken by another volume, [`Reason::NoRoom`], [`Reason::OtherNode`] and
    /// [`Reason::NoSuchPool`] when another node may succeed, [`Reason::PoolUnusable`] and [`Reason::Running`] when a later
    /// call may succeed.
    fn create(&self, request: &CreateRequest) -> Result<Volume, Error> {
        let id = VolumeId::for_name(&request.name);
        self.try_create(&id, request)
            .map_err(|reason| self.error(Some(&id), reason))
    }

    /// Discards the volume; its data is erased in the background.
    ///
    /// # Errors
    /// [`Reason::Mounted`] while it is mounted, [`Reason::PoolUnusable`] when the volume may be on a pool that cannot be
    /// used.
    fn delete(&self, id: &VolumeId) -> Result<(), Error> {
        self.try_delete(id, None).map_err(|reason| self.error(Some(id), reason))
    }

    /// # Errors
    /// [`Reason::NoRoomToGrow`], [`Reason::Shrink`], or as for [`Control::get`].
    fn expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error> {
        self.try_expand(id, size).map_err(|reason| self.error(Some(id), reason))
    }

    /// # Errors
    /// [`Reason::NoSuchVolume`], or the pool or the record of the volume cannot be read.
    fn get(&self, id: &VolumeId) -> Result<Volume, Error> {
        let get = || {
            let (pool, volume) = self.require(id)?;
            Ok(self.volume(volume.record.map_err(Reason::BrokenRecord)?, &pool))
        };
        get().map_err(|reason| self.error(Some(id), reason))
    }

    /// # Errors
    /// [`Reason::PoolUnusable`]: a list without the volumes of a pool would say that they are gone.
    fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error> {
        let mut volumes = Vec::new();
        for pool in &self.pools {
            let open = pool.get().map_err(|why| {
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

    /// [`Control::expand`] has already raised the limit.
    fn expands_on_node(&self) -> bool {
        false
    }

    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Result<Option<Bytes>, Error> {
        if segment.is_some_and(|segment| segment != self.name.segment()) {
            return Ok(Some(Bytes(0)));
        }
        let room = match self.pool(pool) {
            Err(Reason::NoSuchPool { .. }) => return Ok(None),
            Err(reason) => Err(reason),
            Ok(pool) => pool.room(),
        };
        Ok(Some(room.unwrap_or_else(|why| {
            warn!(node = %self.name, pool = %pool, %why, "cannot determine the room of the pool; reporting no capacity");
            Bytes(0)
        })))
    }

    fn filesystem(&self, pool: &PoolName) -> Option<String> {
        self.pool(pool).ok().map(|pool| pool.filesystem.clone())
    }
}

impl Node {
    fn try_create(&self, id: &VolumeId, request: &CreateRequest) -> Result<Volume, Reason> {
        let _lock = self.locks.lock_volume(id)?;
        if let Some((pool, volume)) = self.look_up(id)?.found {
            pool.settle()?;
            return self.existing(&pool, volume, request);
        }
        if !request.topology.admits(&self.name) {
            return Err(Reason::OtherNode);
        }
        let bytes = request.size.choose().ok_or(Reason::EmptyRange(request.size))?;
        let pool = self.pool(&request.parameters.pool)?;
        let record = Record {
            format: Record::FORMAT,
            id: id.clone(),
            uid: None,
            adopted: Vec::new(),
            spec: VolumeSpec {
                name: request.name.clone(),
                claim: request.claim.clone(),
                bytes,
                directory: request.parameters.directory,
            },
            project: None,
            pool_id: pool.id,
            ready: false,
            created: Timestamp::now(),
        };
        pool.begin_call()?.create(record.clone())?;
        info!(volume.id = %id, node = %self.name, pool = %pool.config.name, size = %record.spec.bytes, "volume created");
        Ok(self.volume(record, &pool))
    }

    pub(super) fn try_expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Reason> {
        let _lock = self.locks.lock_volume(id)?;
        let (pool, volume) = self.require(id)?;
        let record = volume.record.map_err(Reason::BrokenRecord)?;
        let has = record.spec.bytes;
        match size.growth(has) {
            Growth::Impossible => Err(Reason::Shrink { has }),
            Growth::None => pool.settle().map(|()| has),
            Growth::To(bytes) => {
                pool.begin_call()?.grow(record, bytes)?;
                info!(volume.id = %id, node = %self.name, pool = %pool.config.name, size = %bytes, "volume expanded");
                Ok(bytes)
            }
        }
    }

    /// The existing volume, if it matches the request.
    fn existing(&self, pool: &OpenPool, volume: PoolVolume, request: &CreateRequest) -> Result<Volume, Reason> {
        let record = volume.record.map_err(Reason::BrokenRecord)?;
        if record.spec.name != request.name {
            return Err(Reason::Exists(format!("another name ({:?})", record.spec.name)));
        }
        let volume = self.volume(record, pool);
        volume.meets(request)?;
        Ok(volume)
    }

    fn volume(&self, record: Record, pool: &OpenPool) -> Volume {
        Volume {
            id: record.id,
            node: self.name.clone(),
            pool: pool.config.name.clone(),
            bytes: record.spec.bytes,
            directory: record.spec.directory,
            made_on: Some(record.pool_id),
            uid: record.uid,
        }
    }
}
