//! A node: its pools, and the verbs on their volumes. Each verb takes effect as a whole or not at all, and is harmless to
//! repeat.
//!
//! - [`publish`]: mount and unmount; the first publish of a volume makes its directory.
//! - [`adopt`]: data whose HostVolume is gone.
//! - [`expand`] and [`stats`]: sizes.
//! - [`local`]: what a node does itself in local mode and a [controller](super::controller) does in elected mode.
//! - [`pool_health`]: pools are opened and inspected, and a disk that hangs is noticed.
//! - [`open_pool`]: which volumes a pool has, and how much of it is allocated.

mod adopt;
mod expand;
mod local;
mod locks;
#[cfg(test)]
mod memory;
mod open_pool;
mod pool_health;
mod publish;
mod selftest;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tracing::{info, warn};
use uuid::Uuid;

use super::disk::{Host, Mount, PoolConfig, PoolVolume, Unusable};
use super::error::{Error, Reason};
use super::host_volume::Assignments;
use super::id::{NodeName, PoolName, VolumeId};
use super::pool_status::{PoolStatus, PoolUsage};
use super::record::PoolId;
use locks::VolumeLocks;
use open_pool::OpenPool;
use pool_health::Pool;

pub(crate) use publish::PublishRequest;
pub(crate) use selftest::SelfTest;

/// How many calls may wait for disks at the same time, on all pools and on one: with the threads that other work needs, below the
/// number of threads that may block.
const CALLS_MAX: usize = 384;
const CALLS_MAX_PER_POOL: usize = 64;

/// The pools of this node, and the verbs on them. All verbs block; calls for different volumes run in parallel.
pub(crate) struct Node {
    name: NodeName,
    host: Arc<dyn Host>,
    assignments: Arc<dyn Assignments>,
    pools: Vec<Pool>,
    locks: VolumeLocks,
}

/// What is on the pools of a node.
#[derive(Default)]
pub(crate) struct Inventory {
    pub(crate) volumes: Vec<(PoolName, PoolVolume)>,
    /// The pools that cannot be used.
    pub(crate) unusable: HashMap<PoolName, Unusable>,
}

/// A pool of this node.
pub(crate) struct NodePool {
    pub(crate) name: PoolName,
    pub(crate) status: PoolStatus,
    /// `None` if it cannot be used.
    pub(crate) usage: Option<PoolUsage>,
}

/// Where a volume is, and which pools could not be searched.
struct Lookup {
    found: Option<(Arc<OpenPool>, PoolVolume)>,
    unusable: Option<(PoolName, Unusable)>,
    open: Vec<Arc<OpenPool>>,
}

impl Node {
    /// Begins to open the pools. A pool that cannot be opened, or takes long, is logged and tried again when it is needed.
    pub(crate) fn new(
        name: NodeName,
        host: Arc<dyn Host>,
        assignments: Arc<dyn Assignments>,
        pools: Vec<PoolConfig>,
    ) -> Self {
        let calls_max = (CALLS_MAX / pools.len().max(1)).clamp(1, CALLS_MAX_PER_POOL);
        let watch = |config| Pool::new(config, Arc::clone(&host), calls_max);
        let pools: Vec<Pool> = pools.into_iter().map(watch).collect();
        for pool in &pools {
            if let Err(why) = pool.get() {
                tracing::error!(node = %name, pool = %pool.config.name, %why, "cannot use a pool; continuing without it");
            }
        }
        Self {
            name,
            host,
            assignments,
            pools,
            locks: VolumeLocks::default(),
        }
    }

    /// Lets no new call use the pools, for good. Each is unlocked as soon as the calls that use it have ended, so that another
    /// process can serve it, whatever happens on the other disks.
    pub(crate) fn close(&self) {
        self.pools.iter().for_each(Pool::close);
    }

    pub(crate) fn name(&self) -> &NodeName {
        &self.name
    }

    /// Discards the volume of a HostVolume; its data is erased in the background. A volume that was made for another
    /// HostVolume is not touched. Idempotent.
    ///
    /// # Errors
    /// [`Reason::Mounted`] while it is mounted, [`Reason::PoolUnusable`] when the volume may be on a pool that cannot be
    /// used.
    pub(crate) fn delete_of(&self, id: &VolumeId, uid: Uuid) -> Result<(), Error> {
        self.try_delete(id, Some(uid))
            .map_err(|reason| self.error(Some(id), reason))
    }

    fn try_delete(&self, id: &VolumeId, uid: Option<Uuid>) -> Result<(), Reason> {
        let _lock = self.locks.lock_volume(id)?;
        let (pool, volume) = match self.look_up(id)? {
            Lookup { found: Some(found), .. } => found,
            Lookup {
                unusable: Some((pool, why)),
                ..
            } => return Err(Reason::PoolUnusable { pool, why }),
            // An earlier call may have deleted it, and failed to make that durable.
            Lookup { open, .. } => return open.iter().try_for_each(OpenPool::settle),
        };
        if let (Some(uid), Ok(record)) = (uid, &volume.record)
            && record.uid != Some(uid)
        {
            return pool.settle();
        }
        if let Some(mount) = self.live_mounts(&pool, volume).into_iter().next() {
            return Err(Reason::Mounted(mount.target));
        }
        pool.begin_call()?.discard(id)?;
        info!(volume.id = %id, node = %self.name, pool = %pool.config.name, "volume deleted");
        Ok(())
    }

    /// All volumes on the pools that can be used, and the pools that cannot.
    pub(crate) fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::default();
        for pool in &self.pools {
            let name = &pool.config.name;
            match pool.get() {
                Ok(open) => {
                    let volumes = open.volumes().into_iter();
                    inventory.volumes.extend(volumes.map(|volume| (name.clone(), volume)));
                }
                Err(why) => drop(inventory.unusable.insert(name.clone(), why)),
            }
        }
        inventory
    }

    /// The volumes that no pod uses, and has used for `age`, if all pools can be used.
    pub(crate) fn unused(&self, age: Duration) -> Option<Vec<PoolVolume>> {
        let inventory = self.inventory();
        let before = Timestamp::now().checked_sub(age).ok()?;
        let unused = |volume: &PoolVolume| volume.mounts.is_empty() && volume.used < before;
        let volumes = inventory.volumes.into_iter().map(|(_, volume)| volume);
        inventory.unusable.is_empty().then(|| volumes.filter(unused).collect())
    }

    /// The current status of the pools.
    pub(crate) fn pools(&self) -> Vec<NodePool> {
        let of = |pool: &Pool| {
            let status = pool.status();
            let allocated = pool.allocated();
            NodePool {
                name: pool.config.name.clone(),
                usage: status.usage(&self.name, &pool.config.name, allocated),
                status,
            }
        };
        self.pools.iter().map(of).collect()
    }

    /// The known mounts of the volume that may still exist; the others are forgotten. Mounts also disappear without hostdir:
    /// by a reboot or an administrator's umount(8).
    fn live_mounts(&self, pool: &OpenPool, volume: PoolVolume) -> Vec<Mount> {
        let PoolVolume { id, mounts, .. } = volume;
        let mut live = Vec::new();
        for mount in mounts {
            match self.host.mounted(&mount.target) {
                Ok(None) => pool.forget_mount(&id, &mount.target),
                // If something else is on top, our mount may be below it.
                Ok(Some(_)) => live.push(mount),
                // If in doubt, the volume counts as mounted: a refusal is better than a guess.
                Err(error) => {
                    warn!(volume.id = %id, node = %self.name, target = %mount.target, error = &error as &dyn std::error::Error,
                        "cannot tell what is mounted");
                    live.push(mount);
                }
            }
        }
        live
    }

    /// The pool that has the volume, also while its disk cannot be used.
    fn known_pool_of(&self, id: &VolumeId) -> Option<Arc<OpenPool>> {
        let known = self.pools.iter().filter_map(Pool::known);
        known.into_iter().find(|pool| pool.volume(id).is_some())
    }

    fn require(&self, id: &VolumeId) -> Result<(Arc<OpenPool>, PoolVolume), Reason> {
        self.look_up(id)?.required(None)
    }

    fn look_up(&self, id: &VolumeId) -> Result<Lookup, Reason> {
        let mut lookup = Lookup {
            found: None,
            unusable: None,
            open: Vec::new(),
        };
        for pool in &self.pools {
            let name = &pool.config.name;
            let open = match pool.get() {
                Ok(open) => open,
                Err(why) => {
                    lookup.unusable = Some((name.clone(), why));
                    continue;
                }
            };
            lookup.open.push(Arc::clone(&open));
            if let Some(volume) = open.volume(id) {
                if let Some((other, _)) = &lookup.found {
                    return Err(Reason::Ambiguous(other.config.name.clone(), name.clone()));
                }
                lookup.found = Some((open, volume));
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
        pool.get().map_err(|why| Reason::PoolUnusable {
            pool: name.clone(),
            why,
        })
    }

    fn error(&self, volume: Option<&VolumeId>, reason: Reason) -> Error {
        Error::new(volume, Some(&self.name), reason)
    }
}

impl Lookup {
    /// What was found, or why nothing was.
    fn required(self, made_on: Option<PoolId>) -> Result<(Arc<OpenPool>, PoolVolume), Reason> {
        match self {
            Self { found: Some(found), .. } => Ok(found),
            Self {
                unusable: Some((pool, why)),
                ..
            } => Err(Reason::PoolUnusable { pool, why }),
            Self { open, .. } => match made_on {
                Some(made_on) if !ids(&open).contains(&made_on) => Err(Reason::data_missing(made_on, &ids(&open))),
                Some(_) | None => Err(Reason::NoSuchVolume),
            },
        }
    }
}

fn ids(pools: &[Arc<OpenPool>]) -> Vec<PoolId> {
    pools.iter().map(|pool| pool.id).collect()
}
