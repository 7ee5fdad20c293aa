//! A controller in elected mode. It records volumes in a [`HostVolumeStore`] that all controllers share; the nodes make the
//! volumes later.
//!
//! Correctness does not depend on who leads: a name belongs to the controller that records it first, and a HostVolume is
//! only deleted by its UID. Any number of controllers may act at once, with one inaccuracy: two that allocate the last room
//! of a pool at the same moment do not see each other's volume, and allocate more than the pool has. Each finds that as soon as
//! its watch shows the other's volume, and so does the node; the pool takes no new volumes until all fit again.

pub(crate) mod cache;
mod fence;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use tracing::info;
use uuid::Uuid;

use super::control::{Control, CreateRequest, Health, Volume};
use super::error::{Error, Reason};
use super::host_volume::{HostVolume, HostVolumeStore, NewHostVolume, NotCreated, StatusReason};
use super::id::{PoolName, VolumeId};
use super::record::{Phase, VolumeSpec};
use super::size::{Bytes, Growth, SizeRange};
use cache::{ClusterCache, Reservation};

pub(crate) use fence::Fence;

/// How long a delete waits for the node: less than the 30 s that external-provisioner waits (the chart's `--timeout`).
const DELETE_WAIT: Duration = Duration::from_secs(20);

/// After this time a delete is answered with the node's reason, if it has written one. The node tries again every second, so a
/// reason from before the delete is overwritten by then.
const REASON_WAIT: Duration = Duration::from_secs(3);

/// How long a delete waits for a node that does not seem to answer: calls that wait for such nodes would keep the sidecar from other
/// volumes.
const SILENT_WAIT: Duration = Duration::from_secs(1);

/// Creates, grows and deletes volumes on all nodes.
pub(crate) struct Controller {
    store: Arc<dyn HostVolumeStore>,
    cache: Arc<ClusterCache>,
    fence: Arc<Fence>,
}

/// What a new volume gets.
enum Reserved<'a> {
    /// The room for a volume of this size.
    Room(Reservation<'a>, Bytes),
    /// Nothing: there is a volume of that name.
    Exists(Box<HostVolume>),
}

impl Reserved<'_> {
    fn exists(there: HostVolume) -> Self {
        Self::Exists(Box::new(there))
    }
}

/// An error about a volume on the node of its HostVolume.
fn at(volume: &HostVolume) -> impl Fn(Reason) -> Error {
    |reason| Error::new(Some(&volume.id), Some(&volume.node), reason)
}

/// An error about a volume whose node is not known.
fn about(id: &VolumeId) -> impl Fn(Reason) -> Error {
    |reason| Error::new(Some(id), None, reason)
}

impl Controller {
    /// Refuses all changes once `fence` is closed.
    pub(crate) fn new(store: Arc<dyn HostVolumeStore>, cache: Arc<ClusterCache>, fence: Arc<Fence>) -> Self {
        Self { store, cache, fence }
    }

    fn check_fence(&self, id: &VolumeId) -> Result<(), Error> {
        self.fence.check().map_err(about(id))
    }

    /// Checks that what is known of nodes and volumes is complete and up to date.
    fn check_complete(&self) -> Result<(), Reason> {
        if self.cache.is_complete() {
            return Ok(());
        }
        let why = "this controller has not seen all nodes and volumes yet, or no longer hears the API server; the call will be retried";
        Err(Reason::Waiting(why.into()))
    }

    fn find(&self, id: &VolumeId) -> Result<Option<HostVolume>, Error> {
        self.store.get(id).map_err(about(id))
    }

    /// Chooses the node for a new volume and reserves its room there; or finds the volume of that name.
    fn reserve(&self, id: &VolumeId, request: &CreateRequest) -> Result<Reserved<'_>, Error> {
        // The cache may lag behind, so it cannot prove that the name is free.
        if self.cache.uid(id).is_some()
            && let Some(there) = self.find(id)?
        {
            return Ok(Reserved::exists(there));
        }
        let Some(bytes) = request.size.choose() else {
            return self
                .existing_or(id, Reason::EmptyRange(request.size))
                .map(Reserved::exists);
        };
        self.check_complete().map_err(about(id))?;
        match self
            .cache
            .reserve(id, &request.parameters.pool, bytes, &request.topology)
        {
            Ok(reservation) => Ok(Reserved::Room(reservation, bytes)),
            Err(running @ Reason::Running(_)) => Err(about(id)(running)),
            Err(refusal) => self.existing_or(id, refusal).map(Reserved::exists),
        }
    }

    /// The existing volume, or a refusal. A final error must prove that there is no such volume: an earlier answer may have been
    /// lost.
    fn existing_or(&self, id: &VolumeId, refusal: Reason) -> Result<HostVolume, Error> {
        self.find(id)?.ok_or_else(|| about(id)(refusal))
    }

    fn try_create(&self, id: &VolumeId, request: &CreateRequest) -> Result<Volume, Error> {
        let (reservation, bytes) = match self.reserve(id, request)? {
            Reserved::Room(reservation, bytes) => (reservation, bytes),
            Reserved::Exists(there) => return existing(*there, request),
        };
        let new = NewHostVolume {
            id: id.clone(),
            node: reservation.node.clone(),
            pool: request.parameters.pool.clone(),
            spec: VolumeSpec {
                name: request.name.clone(),
                claim: request.claim.clone(),
                bytes,
                directory: request.parameters.directory,
            },
        };
        let (volume, created) = match self.store.create_or_get(&new) {
            Ok(recorded) => recorded,
            Err(NotCreated { reason, unsure }) => {
                if unsure {
                    reservation.unsure();
                }
                return Err(Error::new(Some(id), Some(&new.node), reason));
            }
        };
        reservation.recorded(&volume);
        if !created {
            return existing(volume, request);
        }
        info!(volume.id = %id, node = %volume.node, pool = %volume.pool, size = %volume.spec.bytes, "volume assigned");
        Ok(to_volume(volume))
    }

    /// The UID of a volume, if it exists.
    fn uid(&self, id: &VolumeId) -> Result<Option<Uuid>, Error> {
        if let Some(uid) = self.cache.uid(id) {
            return Ok(Some(uid));
        }
        let found = self.find(id)?;
        // A volume that the watch has not shown yet must not count as deleted.
        if let Some(volume) = &found {
            self.cache.note(volume);
        }
        Ok(found.map(|volume| volume.uid))
    }

    fn try_delete(&self, id: &VolumeId) -> Result<(), Error> {
        let Some(uid) = self.uid(id)? else { return Ok(()) };
        let Some(volume) = self.store.delete(id, uid).map_err(about(id))? else {
            self.cache.forget(id, uid);
            return Ok(());
        };
        // No disk has ever had its data, so there is no node to wait for. If the node begins to use the volume at this
        // moment, either the node or this controller finds that the object has changed.
        if volume.phase == Phase::Claimed && self.store.remove_finalizer(&volume).map_err(at(&volume))? {
            self.cache.forget(id, uid);
            return Ok(());
        }
        self.wait_deleted(&volume).map_err(at(&volume))?;
        info!(volume.id = %id, node = %volume.node, "volume deleted");
        Ok(())
    }

    fn wait_deleted(&self, volume: &HostVolume) -> Result<(), Reason> {
        let HostVolume { id, uid, node, .. } = volume;
        let silent = self.cache.is_silent(node);
        let first = if silent { SILENT_WAIT } else { REASON_WAIT };
        let answer = match self.cache.wait_deleted(id, *uid, first) {
            Err(None) if !silent => {
                let rest = DELETE_WAIT.saturating_sub(REASON_WAIT);
                self.cache.wait_deleted(id, *uid, rest)
            }
            other => other,
        };
        match answer {
            // The watch may lag behind, or may have been restarted from an old list: only the store is proof.
            Ok(()) => match self.store.get(id)? {
                Some(found) if found.uid == *uid => Err(Reason::Waiting("it is not deleted yet".into())),
                Some(_) | None => Ok(()),
            },
            Err(Some(StatusReason { reason, message })) if reason == StatusReason::MOUNTED => {
                Err(Reason::InUse(message))
            }
            Err(Some(StatusReason { message, .. })) => {
                Err(Reason::Waiting(format!("it is not deleted yet; {message}")))
            }
            Err(None) => {
                if !silent {
                    self.cache.note_silent(node);
                }
                Err(Reason::Waiting(format!(
                    "it is not deleted yet: hostdir on node {node} does not answer; the delete continues when hostdir runs \
                     there; if the node is gone for good, delete the Node object"
                )))
            }
        }
    }

    fn try_expand(&self, volume: &HostVolume, size: SizeRange) -> Result<Bytes, Reason> {
        let HostVolume {
            id, node, pool, spec, ..
        } = volume;
        if volume.deleting {
            return Err(Reason::Deleting);
        }
        let has = spec.bytes;
        let wanted = match size.growth(has) {
            Growth::Impossible => return Err(Reason::Shrink { has }),
            Growth::None => return Ok(has),
            Growth::To(bytes) => bytes,
        };
        let reservation = self.cache.reserve_growth(volume, wanted)?;
        match self.store.set_capacity(volume, wanted) {
            Ok(Some(grown)) => reservation.recorded(&grown),
            Ok(None) => return Err(Reason::Running("this volume".into())),
            Err(reason) => {
                reservation.unsure();
                return Err(reason);
            }
        }
        info!(volume.id = %id, node = %node, pool = %pool, size = %wanted, "volume expanded");
        Ok(wanted)
    }
}

impl Control for Controller {
    fn create(&self, request: &CreateRequest) -> Result<Volume, Error> {
        let id = VolumeId::for_name(&request.name);
        self.check_fence(&id)?;
        self.try_create(&id, request)
    }

    fn delete(&self, id: &VolumeId) -> Result<(), Error> {
        self.check_fence(id)?;
        self.try_delete(id)
    }

    fn expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error> {
        self.check_fence(id)?;
        let volume = self.find(id)?.ok_or_else(|| about(id)(Reason::NoSuchVolume))?;
        self.try_expand(&volume, size).map_err(at(&volume))
    }

    fn expands_on_node(&self) -> bool {
        true
    }

    fn get(&self, id: &VolumeId) -> Result<Volume, Error> {
        let volume = self.find(id)?.ok_or_else(|| about(id)(Reason::NoSuchVolume))?;
        Ok(to_volume(volume))
    }

    fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error> {
        Ok(self.cache.list(after, max))
    }

    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Result<Option<Bytes>, Error> {
        self.check_complete().map_err(|reason| Error::new(None, None, reason))?;
        Ok(self.cache.room(pool, segment))
    }

    fn filesystem(&self, pool: &PoolName) -> Option<String> {
        self.cache.filesystem(pool)
    }
}

impl Health for Controller {
    /// Not ready before all lists have been seen, nor when the API server has not been heard for long: a controller that knows no
    /// node would send every pod elsewhere.
    fn probe(&self, _: bool) -> Result<bool, Error> {
        self.fence.check().map_err(|reason| Error::new(None, None, reason))?;
        Ok(self.cache.is_complete())
    }
}

/// The existing volume, if it matches the request.
fn existing(there: HostVolume, request: &CreateRequest) -> Result<Volume, Error> {
    let check = || {
        if there.deleting {
            return Err(Reason::Deleting);
        }
        if there.spec.name != request.name {
            return Err(Reason::Exists(format!("another name ({:?})", there.spec.name)));
        }
        to_volume(there.clone()).meets(request)
    };
    check().map_err(at(&there))?;
    Ok(to_volume(there))
}

fn to_volume(volume: HostVolume) -> Volume {
    Volume {
        id: volume.id,
        node: volume.node,
        pool: volume.pool,
        bytes: volume.spec.bytes,
        directory: volume.spec.directory,
        made_on: volume.made_on,
        uid: Some(volume.uid),
    }
}
