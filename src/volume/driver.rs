//! The verbs of the driver, each whole, each harmless to repeat.

use std::sync::Arc;

use jiff::Timestamp;
use tracing::{info, warn};

use super::access::{AccessMode, MountOptions, TargetPath};
use super::error::{Error, Reason};
use super::id::{NodeName, PoolName, VolumeId};
use super::operations::Operations;
use super::pool::{Entry, Mount, OpenPool, Pool};
use super::ports::{BindError, Host, PoolConfig, Space, Unusable};
use super::record::{Claim, Directory, Phase, PoolId, Record};
use super::size::{Bytes, SizeRange};

/// What a StorageClass says about its volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// The pool to make them on.
    pub pool: PoolName,
    /// Owner and mode of their top directories.
    pub directory: Directory,
}

/// A volume that somebody wants.
#[derive(Clone, Debug)]
pub struct Want {
    /// Its name: asking twice for a name is asking for one volume.
    pub name: String,
    /// Its size.
    pub size: SizeRange,
    /// What its StorageClass says.
    pub parameters: Parameters,
    /// The claim it is for.
    pub claim: Option<Claim>,
    /// Whether it may lie on this node.
    pub may_be_here: bool,
}

/// A volume that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its record.
    pub record: Record,
    /// The pool it is on.
    pub pool: PoolName,
}

/// A mount that somebody wants.
#[derive(Clone, Debug)]
pub struct Publish {
    /// The volume.
    pub id: VolumeId,
    /// Where.
    pub target: TargetPath,
    /// In which access mode.
    pub mode: AccessMode,
    /// With which options.
    pub options: MountOptions,
    /// The pool the caller believes the volume was made on. Only for telling people: callers can be wrong.
    pub made_on: Option<PoolId>,
}

/// The pools of this node and what is done with them. All verbs block; different volumes in parallel.
pub struct Driver {
    node: NodeName,
    host: Arc<dyn Host>,
    pools: Vec<Pool>,
    operations: Operations,
}

/// Where a volume is, and which pools could not be asked.
struct Lookup {
    found: Option<(Arc<OpenPool>, Entry)>,
    unusable: Option<(PoolName, Unusable)>,
    open: Vec<PoolId>,
}

impl Driver {
    /// Begins to open the pools. One that cannot be opened, or takes long, is logged and asked again when it is needed.
    #[must_use]
    pub fn new(node: NodeName, host: Arc<dyn Host>, pools: Vec<PoolConfig>) -> Self {
        let pools: Vec<Pool> = pools.into_iter().map(Pool::new).collect();
        for pool in &pools {
            if let Err(why) = pool.get(&host) {
                tracing::error!(node = %node, pool = %pool.config.name, %why, "pool cannot be used; going on without it");
            }
        }
        let operations = Operations::default();
        Self {
            node,
            host,
            pools,
            operations,
        }
    }

    /// The node this driver serves.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// Whether the pools are present, writable and the ones that were opened: at least one of them, or all. One bad disk must
    /// not stop what depends on the driver as a whole.
    ///
    /// # Errors
    /// [`Reason::NotReady`] names each pool that is not.
    pub fn probe(&self, all: bool) -> Result<(), Error> {
        let check = |pool: &Pool| pool.get(&self.host).and_then(|open| open.disk.writable());
        let bad: Vec<String> = self
            .pools
            .iter()
            .filter_map(|pool| check(pool).err().map(|why| format!("pool {}: {why}", pool.config.name)))
            .collect();
        if bad.is_empty() || (!all && bad.len() < self.pools.len()) {
            Ok(())
        } else {
            Err(self.error(None, Reason::NotReady(bad.join("; "))))
        }
    }

    /// Records a volume, or finds the one recorded under that name. Nothing else is put on the disk.
    ///
    /// # Errors
    /// [`Reason::Exists`] when the name is taken by another volume, [`Reason::NoRoom`], [`Reason::OtherNode`] and
    /// [`Reason::NoSuchPool`] when another node may have better luck, [`Reason::PoolUnusable`] and
    /// [`Reason::Running`] when a later call may.
    pub fn create(&self, want: &Want) -> Result<Volume, Error> {
        let id = VolumeId::for_name(&want.name);
        self.try_create(&id, want)
            .map_err(|reason| self.error(Some(&id), reason))
    }

    fn try_create(&self, id: &VolumeId, want: &Want) -> Result<Volume, Reason> {
        let _running = self.operations.on_volume(id)?;
        if let Some((pool, entry)) = self.look_up(id)?.found {
            return existing(&pool, entry, want);
        }
        if !want.may_be_here {
            return Err(Reason::OtherNode);
        }
        if !want.size.admits(want.size.choose()) {
            return Err(Reason::EmptyRange(want.size));
        }
        let pool = self.pool(&want.parameters.pool)?;
        let record = Record {
            format: Record::FORMAT,
            id: id.clone(),
            name: want.name.clone(),
            claim: want.claim.clone(),
            bytes: want.size.choose(),
            directory: want.parameters.directory,
            pool_id: pool.id,
            phase: Phase::Claimed,
            created: Timestamp::now(),
        };
        pool.claim(record.clone())?;
        info!(volume.id = %id, node = %self.node, pool = %pool.config.name, size = %record.bytes, "volume created");
        Ok(Volume {
            record,
            pool: pool.config.name.clone(),
        })
    }

    /// Takes a volume out of its pool; its data is erased in the background. An unknown volume will do.
    ///
    /// # Errors
    /// [`Reason::Mounted`] while it is, [`Reason::PoolUnusable`] when the volume may be on a pool that cannot be asked.
    pub fn delete(&self, id: &VolumeId) -> Result<(), Error> {
        self.try_delete(id).map_err(|reason| self.error(Some(id), reason))
    }

    fn try_delete(&self, id: &VolumeId) -> Result<(), Reason> {
        let _running = self.operations.on_volume(id)?;
        let (pool, entry) = match self.look_up(id)? {
            Lookup { found: Some(found), .. } => found,
            Lookup {
                unusable: Some((pool, why)),
                ..
            } => return Err(Reason::PoolUnusable { pool, why }),
            Lookup { .. } => return Ok(()),
        };
        if let Some(mount) = self.live_mounts(&pool, id, entry.mounts).into_iter().next() {
            return Err(Reason::Mounted(mount.target));
        }
        pool.discard(id)?;
        info!(volume.id = %id, node = %self.node, pool = %pool.config.name, "volume deleted");
        Ok(())
    }

    /// Mounts a volume, making its directory if no pod has ever used it.
    ///
    /// # Errors
    /// [`Reason::DataMissing`] when it was used before and its directory is gone: never an empty one in its place.
    /// [`Reason::Exclusive`] and [`Reason::Bind`] when the mount cannot be had.
    pub fn publish(&self, publish: &Publish) -> Result<(), Error> {
        self.try_publish(publish)
            .map_err(|reason| self.error(Some(&publish.id), reason))
    }

    fn try_publish(&self, publish: &Publish) -> Result<(), Reason> {
        let Publish {
            id,
            target,
            mode,
            options,
            made_on,
        } = publish;
        let _running = self.operations.on_target(id, target)?;
        let (pool, entry) = self.require(id, *made_on)?;
        let record = entry.record.map_err(Reason::BrokenRecord)?;
        let mounts = self.live_mounts(&pool, id, entry.mounts);
        let other = mounts.iter().find(|mount| {
            mount.target != *target && (mode.is_exclusive() || mount.mode.is_some_and(AccessMode::is_exclusive))
        });
        if let Some(other) = other {
            return Err(Reason::Exclusive(other.target.clone()));
        }
        let here = mounts.iter().find(|mount| mount.target == *target);
        if here.and_then(|mount| mount.mode).is_some_and(|noted| noted != *mode) {
            let why = "it is published there already, in another access mode; unpublish it first";
            return Err(bind(target, BindError::Conflict(why.into())));
        }
        match record.phase {
            Phase::Claimed => pool.prepare(Record {
                phase: Phase::Ready,
                ..record
            })?,
            Phase::Ready if pool.disk.data(id)?.is_none() => {
                let here = format!(
                    "pool {} ({}) has its record, but no directory",
                    pool.config.name, pool.id
                );
                return Err(Reason::DataMissing {
                    made_on: record.pool_id.to_string(),
                    here,
                });
            }
            Phase::Ready => {}
        }
        let options = MountOptions {
            read_only: options.read_only || mode.is_read_only(),
            ..*options
        };
        let mounted = pool
            .disk
            .bind(id, target, options)
            .map_err(|source| bind(target, source))?;
        pool.note_mount(id, target, *mode);
        if mounted {
            info!(volume.id = %id, node = %self.node, pool = %pool.config.name, %target, "volume published");
        }
        Ok(())
    }

    /// Unmounts a volume from a target and removes the target. It works for volumes and pools that are gone, too: a
    /// pod must be able to end.
    ///
    /// # Errors
    /// [`Reason::Bind`] when the target holds something that is not proven to be this volume, or is in use.
    pub fn unpublish(&self, id: &VolumeId, target: &TargetPath) -> Result<(), Error> {
        self.try_unpublish(id, target)
            .map_err(|reason| self.error(Some(id), reason))
    }

    fn try_unpublish(&self, id: &VolumeId, target: &TargetPath) -> Result<(), Reason> {
        let _running = self.operations.on_target(id, target)?;
        let found = self.look_up(id).ok().and_then(|lookup| lookup.found);
        // A disk that does not answer must not keep the pod: then the mount table has to prove whose mount it is.
        let data = found.as_ref().and_then(|(pool, _)| pool.disk.data(id).ok().flatten());
        let unmounted = self
            .host
            .unbind(id, target, data)
            .map_err(|source| bind(target, source))?;
        if let Some((pool, _)) = found {
            pool.forget_mount(id, target);
        }
        if unmounted {
            info!(volume.id = %id, node = %self.node, %target, "volume unpublished");
        }
        Ok(())
    }

    /// The record of a volume.
    ///
    /// # Errors
    /// [`Reason::NoSuchVolume`], or its pool or record cannot be read.
    pub fn get(&self, id: &VolumeId) -> Result<Volume, Error> {
        let get = || {
            let (pool, entry) = self.require(id, None)?;
            let record = entry.record.map_err(Reason::BrokenRecord)?;
            Ok(Volume {
                record,
                pool: pool.config.name.clone(),
            })
        };
        get().map_err(|reason| self.error(Some(id), reason))
    }

    /// Size and use of a volume that is mounted at `path`: those of the filesystem it shares.
    ///
    /// # Errors
    /// [`Reason::NotMounted`], or as [`Driver::get`].
    pub fn stats(&self, id: &VolumeId, path: &str) -> Result<Space, Error> {
        self.try_stats(id, path).map_err(|reason| self.error(Some(id), reason))
    }

    fn try_stats(&self, id: &VolumeId, path: &str) -> Result<Space, Reason> {
        let (pool, _) = self.require(id, None)?;
        let not_mounted = || Reason::NotMounted(path.to_owned());
        let target = TargetPath::parse(path).map_err(|_| not_mounted())?;
        // Looked at, and nothing noted: this holds no operation on the volume.
        let there = self.host.mounted(&target).map_err(|_| not_mounted())?;
        if there.is_none() || there != pool.disk.data(id)? {
            return Err(not_mounted());
        }
        Ok(pool.disk.space()?)
    }

    /// The largest volume that a pool can still promise: none if it cannot be used, nothing if there is no such pool.
    #[must_use]
    pub fn room(&self, pool: &PoolName) -> Option<Bytes> {
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

    /// The filesystem of a pool, as mount(8) calls it.
    #[must_use]
    pub fn filesystem(&self, pool: &PoolName) -> Option<String> {
        self.pool(pool).ok().map(|pool| pool.filesystem.clone())
    }

    /// At most `max` volumes, in the order of their ids, from the first after `after`.
    ///
    /// # Errors
    /// [`Reason::PoolUnusable`]: a list without the volumes of a pool would say that they are gone.
    pub fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error> {
        let mut volumes = Vec::new();
        for pool in &self.pools {
            let name = &pool.config.name;
            let open = pool.get(&self.host).map_err(|why| {
                let pool = name.clone();
                self.error(None, Reason::PoolUnusable { pool, why })
            })?;
            let records = open.records_after(after, max).into_iter();
            volumes.extend(records.map(|record| Volume {
                record,
                pool: name.clone(),
            }));
        }
        volumes.sort_unstable_by(|a, b| a.record.id.cmp(&b.record.id));
        volumes.truncate(max);
        Ok(volumes)
    }

    /// The mounts among `mounts` that may still be mounts of the volume; the others are forgotten. Mounts come and go
    /// without us: a reboot, an administrator's umount(8).
    fn live_mounts(&self, pool: &OpenPool, id: &VolumeId, mounts: Vec<Mount>) -> Vec<Mount> {
        let mut live = Vec::new();
        for mount in mounts {
            match self.host.mounted(&mount.target) {
                Ok(None) => pool.forget_mount(id, &mount.target),
                // Where something else is on top, our mount may be below it.
                Ok(Some(_)) => live.push(mount),
                // What cannot be told is taken for mounted: a refusal is better than a guess.
                Err(error) => {
                    warn!(volume.id = %id, target = %mount.target, error = &error as &dyn std::error::Error, "cannot tell what is mounted");
                    live.push(mount);
                }
            }
        }
        live
    }

    fn require(&self, id: &VolumeId, made_on: Option<PoolId>) -> Result<(Arc<OpenPool>, Entry), Reason> {
        match self.look_up(id)? {
            Lookup { found: Some(found), .. } => Ok(found),
            Lookup {
                unusable: Some((pool, why)),
                ..
            } => Err(Reason::PoolUnusable { pool, why }),
            Lookup { open, .. } => match made_on {
                Some(made_on) if !open.contains(&made_on) => Err(Reason::data_missing(made_on, &open)),
                Some(_) | None => Err(Reason::NoSuchVolume),
            },
        }
    }

    fn look_up(&self, id: &VolumeId) -> Result<Lookup, Reason> {
        let mut lookup = Lookup {
            found: None,
            unusable: None,
            open: Vec::new(),
        };
        for pool in &self.pools {
            let name = &pool.config.name;
            let open = match pool.get(&self.host) {
                Ok(open) => open,
                Err(why) => {
                    lookup.unusable = Some((name.clone(), why));
                    continue;
                }
            };
            lookup.open.push(open.id);
            if let Some(entry) = open.entry(id) {
                if let Some((other, _)) = &lookup.found {
                    return Err(Reason::Ambiguous(other.config.name.clone(), name.clone()));
                }
                lookup.found = Some((open, entry));
            }
        }
        Ok(lookup)
    }

    fn pool(&self, name: &PoolName) -> Result<Arc<OpenPool>, Reason> {
        let Some(pool) = self.pools.iter().find(|pool| pool.config.name == *name) else {
            let known: Vec<&str> = self.pools.iter().map(|pool| pool.config.name.as_str()).collect();
            return Err(Reason::NoSuchPool {
                wanted: name.clone(),
                known: known.join(", "),
            });
        };
        pool.get(&self.host).map_err(|why| Reason::PoolUnusable {
            pool: name.clone(),
            why,
        })
    }

    fn error(&self, volume: Option<&VolumeId>, reason: Reason) -> Error {
        Error {
            volume: volume.cloned(),
            node: self.node.clone(),
            reason: Box::new(reason),
        }
    }
}

/// The volume that is there already, if it is what is wanted.
fn existing(pool: &OpenPool, entry: Entry, want: &Want) -> Result<Volume, Reason> {
    let record = entry.record.map_err(Reason::BrokenRecord)?;
    let name = &pool.config.name;
    if record.name != want.name {
        return Err(Reason::Exists(format!("the other name {:?}", record.name)));
    }
    if !want.size.admits(record.bytes) {
        return Err(Reason::Exists(format!("another size ({})", record.bytes)));
    }
    let parameters = Parameters {
        pool: name.clone(),
        directory: record.directory,
    };
    if parameters != want.parameters {
        let Directory { mode, uid, gid } = record.directory;
        return Err(Reason::Exists(format!(
            "other parameters (pool {name}, mode {mode:04o}, uid {uid}, gid {gid})"
        )));
    }
    if !want.may_be_here {
        return Err(Reason::Exists("another topology (this node)".into()));
    }
    Ok(Volume {
        record,
        pool: name.clone(),
    })
}

fn bind(target: &TargetPath, source: BindError) -> Reason {
    Reason::Bind {
        target: target.clone(),
        source,
    }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
