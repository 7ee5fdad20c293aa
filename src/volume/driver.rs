//! The verbs of the driver, each whole, each harmless to repeat.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use tracing::{info, warn};
use uuid::Uuid;

use super::access::{AccessMode, MountOptions, TargetPath};
use super::error::{Error, Reason};
use super::id::{NodeName, PoolName, VolumeId};
use super::operations::Operations;
use super::pool::{Entry, Mount, OpenPool, Pool};
use super::ports::{BindError, Host, Ledger, PoolConfig, Promise, Space, Unusable};
use super::quota::Means;
use super::record::{Phase, PoolId, Record};
use super::size::Bytes;

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
    /// The UID of its HostVolume, where the caller was given one.
    pub uid: Option<Uuid>,
}

/// A volume found on a pool of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its id.
    pub id: VolumeId,
    /// The pool.
    pub pool: PoolName,
    /// Its record, unless that cannot be read.
    pub record: Option<Record>,
}

/// A pool of this node, as it is now.
#[derive(Clone, Debug)]
pub struct PoolState {
    /// How it is configured.
    pub config: PoolConfig,
    /// What is known of it, or why it cannot be used.
    pub condition: Result<PoolFacts, Unusable>,
}

/// What is known of a pool that can be used.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolFacts {
    /// Its identity.
    pub id: PoolId,
    /// Its filesystem, as mount(8) calls it.
    pub filesystem: String,
    /// Size and use of that.
    pub space: Space,
    /// Bytes that others had on it when the pool was made.
    pub foreign: Bytes,
    /// Sum of what it has promised.
    pub promised: Bytes,
    /// By what its volumes are held to their sizes, or why by nothing.
    pub enforcement: Result<Means, String>,
    /// How many volumes with data are held to no size.
    pub unlimited: usize,
}

/// The pools of this node and what is done with them. All verbs block; different volumes in parallel.
pub struct Driver {
    pub(super) node: NodeName,
    pub(super) host: Arc<dyn Host>,
    pub(super) ledger: Arc<dyn Ledger>,
    pub(super) pools: Vec<Pool>,
    pub(super) operations: Operations,
}

/// Where a volume is, and which pools could not be asked.
pub(super) struct Lookup {
    pub(super) found: Option<(Arc<OpenPool>, Entry)>,
    unusable: Option<(PoolName, Unusable)>,
    open: Vec<PoolId>,
}

impl Driver {
    /// Begins to open the pools. One that cannot be opened, or takes long, is logged and asked again when it is needed.
    #[must_use]
    pub fn new(node: NodeName, host: Arc<dyn Host>, ledger: Arc<dyn Ledger>, pools: Vec<PoolConfig>) -> Self {
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
            ledger,
            pools,
            operations,
        }
    }

    /// The node this driver serves.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// Takes the volume of a HostVolume out of its pool; its data is erased in the background. An unknown volume will do,
    /// and one that was made for another HostVolume is not touched.
    ///
    /// # Errors
    /// [`Reason::Mounted`] while it is, [`Reason::PoolUnusable`] when the volume may be on a pool that cannot be asked.
    pub fn delete_of(&self, id: &VolumeId, uid: Uuid) -> Result<(), Error> {
        self.try_delete(id, Some(uid))
            .map_err(|reason| self.error(Some(id), reason))
    }

    pub(super) fn try_delete(&self, id: &VolumeId, uid: Option<Uuid>) -> Result<(), Reason> {
        let _running = self.operations.on_volume(id)?;
        let (pool, entry) = match self.look_up(id)? {
            Lookup { found: Some(found), .. } => found,
            Lookup {
                unusable: Some((pool, why)),
                ..
            } => return Err(Reason::PoolUnusable { pool, why }),
            Lookup { .. } => return Ok(()),
        };
        if let (Some(uid), Ok(record)) = (uid, &entry.record)
            && record.uid != Some(uid)
        {
            return Ok(());
        }
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
            ..
        } = publish;
        let _running = self.operations.on_target(id, target)?;
        let (pool, entry) = self.require_or_adopt(publish)?;
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
            Phase::Claimed => {
                pool.require_limit(id)?;
                self.ledger.keep(&record)?;
                let phase = Phase::Ready;
                pool.prepare(&Record { phase, ..record })?;
                info!(volume.id = %id, node = %self.node, pool = %pool.config.name, pool.id = %pool.id, "volume made");
            }
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
            Phase::Ready => {
                pool.disk.check_limit(&record)?;
                pool.require_limit(id)?;
            }
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

    /// All volumes on the pools that can be used, and the pools that cannot.
    #[must_use]
    pub fn inventory(&self) -> (Vec<Held>, HashMap<PoolName, Unusable>) {
        let (mut held, mut unusable) = (Vec::new(), HashMap::new());
        for pool in &self.pools {
            let name = &pool.config.name;
            match pool.get(&self.host) {
                Ok(open) => held.extend(open.held()),
                Err(why) => drop(unusable.insert(name.clone(), why)),
            }
        }
        (held, unusable)
    }

    /// The pools as they are now.
    #[must_use]
    pub fn pool_states(&self) -> Vec<PoolState> {
        let facts = |pool: &Pool| {
            let open = pool.get(&self.host)?;
            open.disk.writable()?;
            let enforcement = open.disk.enforcement();
            Ok(PoolFacts {
                id: open.id,
                filesystem: open.filesystem.clone(),
                space: open.disk.space()?,
                foreign: open.foreign,
                promised: open.promised(),
                unlimited: open.unlimited(enforcement.is_ok()),
                enforcement,
            })
        };
        self.pools
            .iter()
            .map(|pool| PoolState {
                config: pool.config.clone(),
                condition: facts(pool),
            })
            .collect()
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

    /// The volume; if none of our disks knows it yet, its record is made from what was promised.
    fn require_or_adopt(&self, publish: &Publish) -> Result<(Arc<OpenPool>, Entry), Reason> {
        let Publish { id, made_on, uid, .. } = publish;
        let mut lookup = self.look_up(id)?;
        if let (Some(wanted), Some((pool, Entry { record: Ok(record), .. }))) = (*uid, &lookup.found)
            && record.uid != Some(wanted)
        {
            if record.phase == Phase::Ready {
                let there = record.uid.map_or_else(|| "none".into(), |uid| uid.to_string());
                return Err(Reason::Predecessor { there, wanted });
            }
            // It never had data.
            pool.discard(id)?;
            lookup.found = None;
        }
        if lookup.found.is_some() {
            return lookup.required(*made_on);
        }
        match self.ledger.promise(id)? {
            None => lookup.required(*made_on),
            Some(promise) if promise.deleting => Err(Reason::Deleting),
            Some(promise) if promise.node != self.node => Err(Reason::OtherNode),
            Some(promise) => {
                let there = promise.uid;
                if let Some(wanted) = uid.filter(|wanted| *wanted != there) {
                    return Err(Reason::Successor { there, wanted });
                }
                match (promise.made_on, lookup.unusable) {
                    (None, _) => self.adopt(promise),
                    (Some(made_on), Some((pool, why))) if !lookup.open.contains(&made_on) => {
                        Err(Reason::PoolUnusable { pool, why })
                    }
                    (Some(made_on), _) => Err(Reason::data_missing(made_on, &lookup.open)),
                }
            }
        }
    }

    /// Records a volume that was promised. Its room was counted when it was promised.
    fn adopt(&self, promise: Promise) -> Result<(Arc<OpenPool>, Entry), Reason> {
        let pool = self.pool(&promise.pool)?;
        let record = Record {
            format: Record::FORMAT,
            id: promise.id,
            uid: Some(promise.uid),
            name: promise.name,
            claim: promise.claim,
            bytes: promise.bytes,
            project: None,
            directory: promise.directory,
            pool_id: pool.id,
            phase: Phase::Claimed,
            created: Timestamp::now(),
        };
        pool.record(record.clone())?;
        let entry = Entry {
            record: Ok(record),
            mounts: Vec::new(),
        };
        Ok((pool, entry))
    }

    pub(super) fn require(&self, id: &VolumeId) -> Result<(Arc<OpenPool>, Entry), Reason> {
        self.look_up(id)?.required(None)
    }

    pub(super) fn look_up(&self, id: &VolumeId) -> Result<Lookup, Reason> {
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

    pub(super) fn pool(&self, name: &PoolName) -> Result<Arc<OpenPool>, Reason> {
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

    pub(super) fn error(&self, volume: Option<&VolumeId>, reason: Reason) -> Error {
        Error {
            volume: volume.cloned(),
            node: Some(self.node.clone()),
            reason: Box::new(reason),
        }
    }
}

impl Lookup {
    /// What was found, or why nothing was.
    fn required(self, made_on: Option<PoolId>) -> Result<(Arc<OpenPool>, Entry), Reason> {
        match self {
            Self { found: Some(found), .. } => Ok(found),
            Self {
                unusable: Some((pool, why)),
                ..
            } => Err(Reason::PoolUnusable { pool, why }),
            Self { open, .. } => match made_on {
                Some(made_on) if !open.contains(&made_on) => Err(Reason::data_missing(made_on, &open)),
                Some(_) | None => Err(Reason::NoSuchVolume),
            },
        }
    }
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
