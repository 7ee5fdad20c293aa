//! Volumes come and go: the verbs of CSI's Controller service, whoever carries them out.
//!
//! In local mode that is the [`Driver`](super::Driver) of the one node; in elected mode a controller that records claims
//! for the nodes to fulfil.

use uuid::Uuid;

use super::error::{Error, Reason};
use super::id::{NodeName, PoolName, VolumeId};
use super::record::{Claim, Directory, PoolId};
use super::size::{Bytes, SizeRange};

/// What a StorageClass says about its volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// The pool to make them on.
    pub pool: PoolName,
    /// Owner and mode of their top directories.
    pub directory: Directory,
}

/// On which nodes a volume may lie, by the values of their topology segments ([`NodeName::segment`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// One of these; anywhere if not given.
    pub requisite: Option<Vec<String>>,
    /// Rather on the first of these than on a later one.
    pub preferred: Vec<String>,
}

impl Placement {
    /// Whether a volume on this node is what was asked for.
    #[must_use]
    pub fn admits(&self, node: &NodeName) -> bool {
        let segment = node.segment();
        self.requisite
            .as_ref()
            .is_none_or(|segments| segments.contains(&segment))
    }
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
    /// Where.
    pub placement: Placement,
}

/// A volume that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// The node it is on.
    pub node: NodeName,
    /// The pool it is on.
    pub pool: PoolName,
    /// Its size.
    pub bytes: Bytes,
    /// Owner and mode of its top directory.
    pub directory: Directory,
    /// Identity of the pool it was made on, where it has been made.
    pub made_on: Option<PoolId>,
    /// The UID of its HostVolume, where it has one.
    pub uid: Option<Uuid>,
}

impl Volume {
    /// Whether it is what is wanted, but for its name.
    pub(super) fn meets(&self, want: &Want) -> Result<(), Reason> {
        if !want.size.admits(self.bytes) {
            return Err(Reason::Exists(format!("another size ({})", self.bytes)));
        }
        if (&self.pool, self.directory) != (&want.parameters.pool, want.parameters.directory) {
            let Directory { mode, uid, gid } = self.directory;
            return Err(Reason::Exists(format!(
                "other parameters (pool {}, mode {mode:04o}, uid {uid}, gid {gid})",
                self.pool
            )));
        }
        if !want.placement.admits(&self.node) {
            return Err(Reason::Exists(format!("another topology (node {})", self.node)));
        }
        Ok(())
    }
}

/// The verbs. All block; each may be repeated, and by several callers at once.
pub trait Control: Send + Sync {
    /// Records a volume, or finds the one recorded under that name.
    ///
    /// # Errors
    /// The name is taken by another volume, there is no room, or it cannot be told.
    fn create(&self, want: &Want) -> Result<Volume, Error>;

    /// Deletes a volume: when this succeeds, no data of it can be reached any more. An unknown volume will do.
    ///
    /// # Errors
    /// It is in use, or it cannot be told whether it is gone.
    fn delete(&self, id: &VolumeId) -> Result<(), Error>;

    /// Promises a volume more, if it does not have it already; its size then.
    ///
    /// # Errors
    /// There is no room for more, it would have to shrink, there is no such volume, or it cannot be told.
    fn expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error>;

    /// Whether the node of a volume has to do its part of an expansion, too, before the volume can be filled.
    fn expands_on_node(&self) -> bool;

    /// A volume.
    ///
    /// # Errors
    /// There is none, or it cannot be told.
    fn get(&self, id: &VolumeId) -> Result<Volume, Error>;

    /// At most `max` volumes, in the order of their ids, from the first after `after`.
    ///
    /// # Errors
    /// The list would not be whole.
    fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error>;

    /// The largest volume that can be promised on a pool of the nodes of this segment (of all, if none is given): nothing
    /// if it is known that no node has a pool of that name.
    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Option<Bytes>;

    /// The filesystem of a pool, as mount(8) calls it, if it is the same wherever the pool is.
    fn filesystem(&self, pool: &PoolName) -> Option<String>;
}

/// Something that works or does not.
pub trait Health: Send + Sync {
    /// Whether it works; `false` while it is still starting. With `all`, nothing of it may be broken; without, what is
    /// broken must not stop what depends on it as a whole.
    ///
    /// # Errors
    /// What is broken.
    fn probe(&self, all: bool) -> Result<bool, Error>;
}
