//! A volume as the API server records it in elected mode, and what the core asks of those records. [`crate::k8s`] answers; the
//! tests of the core answer from memory.

use jiff::Timestamp;
use uuid::Uuid;

use super::error::Reason;
use super::id::{NodeName, PoolName, VolumeId};
use super::record::{Phase, PoolId, Record, VolumeSpec};
use super::size::Bytes;

/// Why a volume is not what its HostVolume asks for: `status.reason` and `status.message`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StatusReason {
    /// One word in CamelCase.
    pub(crate) reason: String,
    /// A sentence for people.
    pub(crate) message: String,
}

impl StatusReason {
    /// The volume cannot be deleted while it is mounted.
    pub(crate) const MOUNTED: &str = "Mounted";
}

/// A volume that is recorded in the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostVolume {
    /// The volume's id, and the name of the object.
    pub(crate) id: VolumeId,
    /// The UID of the object.
    pub(crate) uid: Uuid,
    /// `metadata.resourceVersion`: a change of any other version is refused.
    pub(crate) version: String,
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    pub(crate) spec: VolumeSpec,
    pub(crate) phase: Phase,
    /// The pool that has, or had, the volume's data. Once it is set, the volume is never made anew.
    pub(crate) made_on: Option<PoolId>,
    pub(crate) status_reason: Option<StatusReason>,
    /// Whether it has a deletion timestamp.
    pub(crate) deleting: bool,
    /// Finalizers that are not hostdir's.
    pub(crate) other_finalizers: Vec<String>,
    pub(crate) created: Timestamp,
}

/// A volume that is to be recorded in the API server.
#[derive(Clone, Debug)]
pub(crate) struct NewHostVolume {
    pub(crate) id: VolumeId,
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    pub(crate) spec: VolumeSpec,
}

/// All HostVolumes, as a controller reads and writes them. Answers are current, never from a cache.
///
/// Every verb fails with [`Reason::Api`] when the API server does not answer; the change may have been made all the same.
pub(crate) trait HostVolumeStore: Send + Sync {
    /// Creates a HostVolume, or returns the one that has its name. Also returns whether it was created.
    fn create_or_get(&self, new: &NewHostVolume) -> Result<(HostVolume, bool), Reason>;

    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason>;

    /// Sets the deletion timestamp of the HostVolume with this UID. Returns the object if finalizers still hold it.
    fn delete(&self, id: &VolumeId, uid: Uuid) -> Result<Option<HostVolume>, Reason>;

    /// Raises the capacity, and returns the changed object; nothing if the object has changed since `volume` was read.
    fn set_capacity(&self, volume: &HostVolume, bytes: Bytes) -> Result<Option<HostVolume>, Reason>;

    /// Removes hostdir's finalizer. Returns false if the object has changed since `volume` was read.
    fn remove_finalizer(&self, volume: &HostVolume) -> Result<bool, Reason>;
}

/// The HostVolumes of one node, as that node reads and marks them.
pub(crate) trait Assignments: Send + Sync {
    /// From the cache where it is there, else from the API server.
    ///
    /// # Errors
    /// It is not in the cache, and the API server does not answer.
    fn get_cached(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason>;

    /// From the API server.
    ///
    /// # Errors
    /// The API server does not answer.
    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason>;

    /// Marks a volume as `Ready` on the pool of `record`: from then on it may have data there. Idempotent.
    ///
    /// # Errors
    /// It is not marked, so there must be no data: the volume was deleted meanwhile, or has its data elsewhere.
    fn mark_ready(&self, record: &Record) -> Result<(), Reason>;
}

/// Local mode: volumes are recorded on their pools only.
pub(crate) struct NoAssignments;

impl Assignments for NoAssignments {
    fn get_cached(&self, _: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        Ok(None)
    }

    fn get(&self, _: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        Ok(None)
    }

    fn mark_ready(&self, _: &Record) -> Result<(), Reason> {
        Ok(())
    }
}
