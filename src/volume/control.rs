//! The verbs of CSI's Controller service. In local mode the [`Node`](super::Node) carries them out, in elected mode a
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

/// The nodes that a volume may be on, by the values of their topology segments ([`NodeName::segment`]): CSI's
/// `TopologyRequirement`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    /// The volume must be on one of these; on any node if `None`.
    pub(crate) requisite: Option<Vec<String>>,
    /// Preferred nodes, the best first.
    pub(crate) preferred: Vec<String>,
}

impl Topology {
    /// Whether the volume may be on this node.
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
    /// Requests with the same name ask for the same volume.
    pub(crate) name: String,
    pub(crate) size: SizeRange,
    pub(crate) parameters: Parameters,
    pub(crate) claim: Option<Claim>,
    pub(crate) topology: Topology,
}

#[cfg(test)]
impl CreateRequest {
    /// A request for `gib` GiB on any node.
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

/// A recorded volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) id: VolumeId,
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    pub(crate) bytes: Bytes,
    pub(crate) directory: Directory,
    /// The pool it was made on, if it has been made.
    pub(crate) made_on: Option<PoolId>,
    /// The UID of its HostVolume, if it has one.
    pub(crate) uid: Option<Uuid>,
}

impl Volume {
    /// Checks that the volume matches the request, apart from the name.
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

/// The verbs. All of them block. Each may be repeated, also by several callers at once.
pub(crate) trait Control: Send + Sync {
    /// Records a volume, or finds the one recorded under that name.
    ///
    /// # Errors
    /// The name is taken by another volume, there is no room, or this cannot be determined.
    fn create(&self, request: &CreateRequest) -> Result<Volume, Error>;

    /// Deletes a volume: when this succeeds, its data can no longer be reached. Idempotent.
    ///
    /// # Errors
    /// The volume is in use, or it cannot be determined whether it is gone.
    fn delete(&self, id: &VolumeId) -> Result<(), Error>;

    /// Allocates more room to a volume, unless it already has enough. Returns the resulting size.
    ///
    /// # Errors
    /// There is no room for more, the volume would have to shrink, there is no such volume, or this cannot be determined.
    fn expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error>;

    /// Whether the node must also raise the limit of a volume after [`Control::expand`].
    fn expands_on_node(&self) -> bool;

    /// # Errors
    /// There is no such volume, or this cannot be determined.
    fn get(&self, id: &VolumeId) -> Result<Volume, Error>;

    /// At most `max` volumes in the order of their ids, from the first id after `after`.
    ///
    /// # Errors
    /// The list would be incomplete.
    fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error>;

    /// The largest volume that can be created in this pool on the nodes of this segment (on any node, if `segment` is
    /// `None`). `None` if it is certain that no node has a pool of that name.
    ///
    /// # Errors
    /// What is known of the nodes is out of date.
    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Result<Option<Bytes>, Error>;

    /// The filesystem of a pool, as mount(8) calls it, if it is the same on every node that has the pool.
    fn filesystem(&self, pool: &PoolName) -> Option<String>;
}

/// What CSI's Probe checks.
pub(crate) trait Health: Send + Sync {
    /// Whether this process works; `false` while it is still starting. With `all`, no part of it may be broken. Otherwise a
    /// broken part must not stop everything that depends on this process.
    ///
    /// # Errors
    /// What is broken, and why.
    fn probe(&self, all: bool) -> Result<bool, Error>;
}
