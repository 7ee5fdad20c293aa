//! A volume as the API server records it in elected mode, and the traits through which the core reads and writes these
//! records. [`crate::k8s`] implements them; tests of the core use an implementation in memory.

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
    /// `metadata.resourceVersion`: the API server refuses a change to any other version.
    pub(crate) version: String,
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    pub(crate) spec: VolumeSpec,
    pub(crate) phase: Phase,
    /// The pool that has, or had, the volume's data. Once this is set, the volume is never made again.
    pub(crate) made_on: Option<PoolId>,
    pub(crate) status_reason: Option<StatusReason>,
    /// Whether it is marked as having no PersistentVolume.
    pub(crate) released: bool,
    /// Whether the HostVolume has a deletion timestamp.
    pub(crate) deleting: bool,
    /// Why the rest of the object cannot be read, if it cannot: then only its id, UID, node, pool and size are known. A newer
    /// hostdir may have written it.
    pub(crate) unreadable: Option<String>,
    /// What somebody has decided about its data.
    pub(crate) decision: Decision,
    /// Whether hostdir's finalizer keeps the object.
    pub(crate) held: bool,
    /// Finalizers that are not hostdir's.
    pub(crate) other_finalizers: Vec<String>,
    pub(crate) created: Timestamp,
}

/// What an annotation of a HostVolume says about the volume's data. Each names the UID of a HostVolume, so that one that a backup
/// tool has copied to a later object says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Its data may be deleted, once the HostVolume is deleted. DeleteVolume says so, or a person.
    pub(crate) delete: bool,
    /// The HostVolume may go without its data.
    pub(crate) leave: bool,
    /// It takes the data that the HostVolume of this UID had left.
    pub(crate) adopt: Option<Uuid>,
}

/// A volume to be recorded in the API server.
#[derive(Clone, Debug)]
pub(crate) struct NewHostVolume {
    pub(crate) id: VolumeId,
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    pub(crate) spec: VolumeSpec,
}

/// All HostVolumes, as a controller reads and writes them. Answers are current, never from a cache.
///
/// Every verb fails with [`Reason::Api`] when the API server does not answer; the change may have been made anyway.
pub(crate) trait HostVolumeStore: Send + Sync {
    /// Creates a HostVolume, or returns the one that has its name. Also returns whether it was created.
    fn create_or_get(&self, new: &NewHostVolume) -> Result<(HostVolume, bool), NotCreated>;

    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason>;

    /// Notes that the data of the HostVolume with this UID may be deleted, and sets its deletion timestamp. Returns the object if
    /// finalizers still keep it.
    fn delete(&self, id: &VolumeId, uid: Uuid) -> Result<Option<HostVolume>, Reason>;

    /// Raises the capacity and returns the changed object, or `None` if the object has changed since `volume` was read.
    fn set_capacity(&self, volume: &HostVolume, bytes: Bytes) -> Result<Option<HostVolume>, Reason>;

    /// Removes hostdir's finalizer. Returns false if the object has changed since `volume` was read.
    fn remove_finalizer(&self, volume: &HostVolume) -> Result<bool, Reason>;
}

/// Why a HostVolume was not created.
#[derive(Debug)]
pub(crate) struct NotCreated {
    pub(crate) reason: Reason,
    /// Whether it may have been created anyway: no answer came, or none that says.
    pub(crate) unsure: bool,
}

impl NotCreated {
    pub(crate) fn unsure(reason: Reason) -> Self {
        Self { reason, unsure: true }
    }
}

/// The HostVolumes of one node, as that node reads and marks them.
pub(crate) trait Assignments: Send + Sync {
    /// Reads the HostVolume from the cache if it is there, else from the API server.
    ///
    /// # Errors
    /// The HostVolume is not in the cache, and the API server does not answer.
    fn get_cached(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason>;

    /// Reads the HostVolume from the API server.
    ///
    /// # Errors
    /// The API server does not answer.
    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason>;

    /// Marks a volume as `Ready` on the pool of `record`: from then on it may have data there. Idempotent.
    ///
    /// # Errors
    /// The volume is not marked, so the caller must not make its data: it was deleted meanwhile, or has its data elsewhere.
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::volume::record::Directory;

    /// A HostVolume of 1 GiB on node-a that was never used.
    pub(crate) fn host_volume(name: &str) -> HostVolume {
        HostVolume {
            id: VolumeId::parse(name).unwrap(),
            uid: Uuid::new_v4(),
            version: "1".into(),
            node: NodeName::parse("node-a").unwrap(),
            pool: PoolName::default(),
            spec: VolumeSpec {
                name: name.into(),
                claim: None,
                bytes: Bytes::GIB,
                directory: Directory::default(),
            },
            phase: Phase::Claimed,
            made_on: None,
            status_reason: None,
            released: false,
            deleting: false,
            unreadable: None,
            decision: Decision::default(),
            held: true,
            other_finalizers: Vec::new(),
            created: Timestamp::UNIX_EPOCH,
        }
    }
}
