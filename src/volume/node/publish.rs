//! Mounts and unmounts volumes: NodePublishVolume and NodeUnpublishVolume.
//!
//! The first publish makes the volume, in this order: its record (in elected mode), the phase `Ready` in the API server, its
//! directory, the mount. Later publishes need only the disk.

use std::sync::Arc;

use jiff::Timestamp;
use tracing::info;
use uuid::Uuid;

use super::open_pool::{DiskCall, OpenPool};
use super::{Node, ids};
use crate::volume::access::{AccessMode, MountOptions, TargetPath};
use crate::volume::disk::{BindError, Mount, PoolVolume};
use crate::volume::error::{Error, Reason};
use crate::volume::host_volume::HostVolume;
use crate::volume::id::VolumeId;
use crate::volume::record::{PoolId, Record};

/// A requested mount.
#[derive(Clone, Debug)]
pub(crate) struct PublishRequest {
    pub(crate) id: VolumeId,
    pub(crate) target: TargetPath,
    pub(crate) mode: AccessMode,
    pub(crate) options: MountOptions,
    /// The pool that the caller believes the volume was made on. Only for messages: callers can be wrong.
    pub(crate) made_on: Option<PoolId>,
    /// The UID of its HostVolume, if the caller knows one.
    pub(crate) uid: Option<Uuid>,
}

impl Node {
    /// Mounts a volume, making its directory if no pod has ever used it.
    ///
    /// # Errors
    /// [`Reason::DataMissing`] when the volume was used before and its directory is gone: an empty one never replaces it.
    /// [`Reason::Exclusive`] and [`Reason::Bind`] when the volume cannot be mounted at the target.
    pub(crate) fn publish(&self, request: &PublishRequest) -> Result<(), Error> {
        self.try_publish(request)
            .map_err(|reason| self.error(Some(&request.id), reason))
    }

    fn try_publish(&self, request: &PublishRequest) -> Result<(), Reason> {
        let PublishRequest { id, target, mode, .. } = request;
        let _lock = self.locks.lock_volume_and_target(id, target)?;
        let (pool, volume) = self.find_or_record(request)?;
        pool.settle()?;
        let record = volume.record.clone().map_err(Reason::BrokenRecord)?;
        refuse_conflicts(&self.live_mounts(&pool, volume), request)?;
        let call = self.ensure_directory(&pool, record)?;
        let options = MountOptions {
            read_only: request.options.read_only || mode.is_read_only(),
            ..request.options
        };
        let mounted = call
            .disk
            .bind(id, target, options)
            .map_err(|source| bind(target, source))?;
        pool.note_mount(id, target, *mode);
        if mounted {
            info!(volume.id = %id, node = %self.name, pool = %pool.config.name, %target, "volume published");
        }
        Ok(())
    }

    /// Makes the directory of a volume that no pod has used; checks the directory of one that was used.
    fn ensure_directory(&self, pool: &Arc<OpenPool>, record: Record) -> Result<DiskCall, Reason> {
        let id = record.id.clone();
        let call = pool.begin_call()?;
        if record.ready {
            if call.disk.data(&id)?.is_none() {
                let pool_id = pool.id;
                let here = format!("pool {} ({pool_id}) has its record, but no directory", pool.config.name);
                return Err(Reason::DataMissing {
                    made_on: record.pool_id.to_string(),
                    here,
                });
            }
            call.disk.enforce(&record)?;
            call.require_limit(&id)?;
            return Ok(call);
        }
        call.require_limit(&id)?;
        // The API server may be slow, which is not the disk's fault.
        drop(call);
        self.assignments.mark_ready(&record)?;
        let call = pool.begin_call()?;
        call.make_directory(&Record { ready: true, ..record })?;
        info!(volume.id = %id, node = %self.name, pool = %pool.config.name, pool.id = %pool.id, "volume made");
        Ok(call)
    }

    /// Unmounts a volume from a target and removes the target. It also works for volumes and pools that are gone, because a
    /// pod must be able to end.
    ///
    /// # Errors
    /// [`Reason::Bind`] when the target holds something that is not proven to be this volume, or when it is in use.
    pub(crate) fn unpublish(&self, id: &VolumeId, target: &TargetPath) -> Result<(), Error> {
        self.try_unpublish(id, target)
            .map_err(|reason| self.error(Some(id), reason))
    }

    fn try_unpublish(&self, id: &VolumeId, target: &TargetPath) -> Result<(), Reason> {
        // Not the volume: a call on it that hangs must not keep a pod from ending.
        let _lock = self.locks.lock_target(target)?;
        let found = self.known_pool_of(id);
        // Only where the mount table does not prove that the mount is this volume's: a disk that hangs must not keep a pod from
        // ending.
        let data = || {
            let (pool, _) = self.look_up(id).ok()?.found?;
            let call = pool.begin_call().ok()?;
            call.disk.data(id).ok()?
        };
        let unbind = |data| self.host.unbind(id, target, data);
        let unmounted = unbind(None).or_else(|error| match error {
            BindError::Unproven => data().map_or(Err(error), |data| unbind(Some(data))),
            _ => Err(error),
        });
        let unmounted = unmounted.map_err(|source| bind(target, source))?;
        if let Some(pool) = found {
            pool.forget_mount(id, target);
        }
        if unmounted {
            info!(volume.id = %id, node = %self.name, %target, "volume unpublished");
        }
        Ok(())
    }

    /// Finds the volume. If no pool has it yet, makes its record from its HostVolume.
    fn find_or_record(&self, request: &PublishRequest) -> Result<(Arc<OpenPool>, PoolVolume), Reason> {
        let PublishRequest { id, made_on, uid, .. } = request;
        let mut lookup = self.look_up(id)?;
        if let (Some(wanted), Some((pool, PoolVolume { record: Ok(record), .. }))) = (*uid, &lookup.found)
            && !record.is_of(wanted)
        {
            if record.ready {
                let there = record.uid.map_or_else(|| "none".into(), |uid| uid.to_string());
                return Err(Reason::Predecessor { there, wanted });
            }
            // The earlier volume never had data.
            pool.begin_call()?.discard(id)?;
            lookup.found = None;
        }
        if lookup.found.is_some() {
            return lookup.required(*made_on);
        }
        let Some(assigned) = self.assignments.get_cached(id)? else {
            return lookup.required(*made_on);
        };
        self.check_assignment(&assigned, *uid)?;
        match (assigned.made_on, lookup.unusable) {
            (None, _) => self.record(assigned),
            (Some(made_on), Some((pool, why))) if !ids(&lookup.open).contains(&made_on) => {
                Err(Reason::PoolUnusable { pool, why })
            }
            (Some(made_on), _) => Err(Reason::data_missing(made_on, &ids(&lookup.open))),
        }
    }

    /// Checks that a HostVolume is assigned to this node and is the requested one.
    fn check_assignment(&self, assigned: &HostVolume, uid: Option<Uuid>) -> Result<(), Reason> {
        if let Some(why) = &assigned.unreadable {
            return Err(Reason::Waiting(format!(
                "its HostVolume cannot be read: {why}; correct it, or upgrade hostdir"
            )));
        }
        if assigned.deleting {
            return Err(Reason::Deleting);
        }
        if assigned.node != self.name {
            return Err(Reason::OtherNode);
        }
        let there = assigned.uid;
        match uid {
            Some(wanted) if wanted != there => Err(Reason::Successor { there, wanted }),
            _ => Ok(()),
        }
    }

    /// Records a volume that a controller assigned to this node and allocated room for.
    fn record(&self, assigned: HostVolume) -> Result<(Arc<OpenPool>, PoolVolume), Reason> {
        let pool = self.pool(&assigned.pool)?;
        let record = Record {
            format: Record::FORMAT,
            id: assigned.id.clone(),
            uid: Some(assigned.uid),
            adopted: Vec::new(),
            spec: assigned.spec,
            project: None,
            pool_id: pool.id,
            ready: false,
            created: Timestamp::now(),
        };
        pool.begin_call()?.create_allocated(record.clone())?;
        Ok((pool, PoolVolume::new(assigned.id, Ok(record))))
    }
}

/// Refuses a mount that another mount of the volume excludes.
fn refuse_conflicts(mounts: &[Mount], request: &PublishRequest) -> Result<(), Reason> {
    let PublishRequest { target, mode, .. } = request;
    let excludes = |mount: &&Mount| {
        mount.target != *target && (mode.is_exclusive() || mount.mode.is_some_and(AccessMode::is_exclusive))
    };
    if let Some(other) = mounts.iter().find(excludes) {
        return Err(Reason::Exclusive(other.target.clone()));
    }
    let here = mounts.iter().find(|mount| mount.target == *target);
    if here.and_then(|mount| mount.mode).is_some_and(|noted| noted != *mode) {
        let why = "it is already published there with another access mode; unpublish it first";
        return Err(bind(target, BindError::Conflict(why.into())));
    }
    Ok(())
}

fn bind(target: &TargetPath, source: BindError) -> Reason {
    Reason::Bind {
        target: target.clone(),
        source,
    }
}
