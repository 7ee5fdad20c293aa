//! The verbs of CSI's Controller service, whoever carries them out: in local mode the [`Node`](super::Node), in elected mode a
//! [`Controller`](super::Controller).

use uuid::Uuid;

use super::error::{Error, Reason};
use super::id::{NodeName, PoolName, VolumeId};
use super::record::{Claim, Directory, PoolId};
use super::size::{Bytes, SizeRange};

/// What a StorageClass says about its volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parameters {
    pub(crate) pool: PoolName,
    pub(crate) directory: Directory,
}

/// On which nodes a volume may lie, by the values of their topology segments ([`NodeName::segment`]): CSI's
/// `TopologyRequirement`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    /// One of these; anywhere if not given.
    pub(crate) requisite: Option<Vec<String>>,
    /// Rather on the first of these than on a later one.
    pub(crate) preferred: Vec<String>,
}

impl Topology {
    /// Whether a volume on this node is what was asked for.
    pub(crate) fn admits(&self, node: &NodeName) -> bool {
        let segment = node.segment();
        self.requisite
            .as_ref()
            .is_none_or(|segments| segments.contains(&segment))
    }
}

/// What CreateVolume asks for.
#[derive(Clone, Debug)]
pub(crate) struct CreateRequest {
    /// Its name: asking twice for a name is asking for one volume.
    pub(crate) name: String,
    pub(crate) size: SizeRange,
    pub(crate) parameters: Parameters,
    pub(crate) claim: Option<Claim>,
    pub(crate) topology: Topology,
}

#[cfg(test)]
impl CreateRequest {
    /// For so many GiB, anywhere.
    pub(super) fn of(name: &str, gib: u64) -> Self {
        Self {
            name: name.into(),
            size: SizeRange {
                required: Bytes(gib << 30),
                limit: None,
            },
            parameters: Parameters::default(),
            claim: None,
            topology: Topology::default(),
        }
    }
}

/// A volume that is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) id: VolumeId,
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    pub(crate) bytes: Bytes,
    pub(crate) directory: Directory,
    /// The pool it was made on, where it has been made.
    pub(crate) made_on: Option<PoolId>,
    /// The UID of its HostVolume, where it has one.
    pub(crate) uid: Option<Uuid>,
}

impl Volume {
    /// Checks that it is what is asked for, but for its name.
    pub(super) fn meets(&self, request: &CreateRequest) -> Result<(), Reason> {
        if !request.size.admits(self.bytes) {
            return Err(Reason::Exists(format!("another size ({})", self.bytes)));
        }
        if (&self.pool, self.directory) != (&request.parameters.pool, request.parameters.directory) {
            let Directory { mode, uid, gid } = self.directory;
            return Err(Reason::Exists(format!(
                "other parameters (pool {}, mode {mode:04o}, uid {uid}, gid {gid})",
                self.pool
            )));
        }
        if !request.topology.admits(&self.node) {
            return Err(Reason::Exists(format!("another topology (node {})", self.node)));
        }
        Ok(())
    }
}

/// The verbs. All block; each may be repeated, and by several callers at once.
pub(crate) trait Control: Send + Sync {
    /// Records a volume, or finds the one recorded under that name.
    ///
    /// # Errors
    /// The name is taken by another volume, there is no room, or it cannot be told.
    fn create(&self, request: &CreateRequest) -> Result<Volume, Error>;

    /// Deletes a volume: when this succeeds, no data of it can be reached any more. Idempotent.
    ///
    /// # Errors
    /// It is in use, or it cannot be told whether it is gone.
    fn delete(&self, id: &VolumeId) -> Result<(), Error>;

    /// Allocates more room to a volume, unless it has as much already. Returns its size then.
    ///
    /// # Errors
    /// There is no room for more, it would have to shrink, there is no such volume, or it cannot be told.
    fn expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error>;

    /// Whether the node has to raise the limit of a volume, too, after [`Control::expand`].
    fn expands_on_node(&self) -> bool;

    /// # Errors
    /// There is no such volume, or it cannot be told.
    fn get(&self, id: &VolumeId) -> Result<Volume, Error>;

    /// At most `max` volumes, in the order of their ids, from the first after `after`.
    ///
    /// # Errors
    /// The list would not be whole.
    fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error>;

    /// The largest volume that can be created on a pool of the nodes of this segment (of all, if none is given). Nothing if it
    /// is known that no node has a pool of that name.
    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Option<Bytes>;

    /// The filesystem of a pool, as mount(8) calls it, if it is the same wherever the pool is.
    fn filesystem(&self, pool: &PoolName) -> Option<String>;
}

/// What Probe asks.
pub(crate) trait Health: Send + Sync {
    /// Whether it works; `false` while it is still starting. With `all`, nothing of it may be broken; without, what is
    /// broken must not stop what depends on it as a whole.
    ///
    /// # Errors
    /// What is broken.
    fn probe(&self, all: bool) -> Result<bool, Error>;
}
