//! The status of a pool: its node determines it and publishes it in the API server, where controllers read it.

use super::id::{NodeName, PoolName};
use super::quota::QuotaKind;
use super::record::PoolId;
use super::room::{Limits, Space};
use super::size::Bytes;

/// A pool of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PoolStatus {
    pub(crate) limits: Limits,
    /// Its identity, if it was ever opened.
    pub(crate) id: Option<PoolId>,
    /// Its filesystem, as mount(8) calls it, if it was ever opened.
    pub(crate) filesystem: Option<String>,
    /// Bytes that others had on the filesystem when the pool was made.
    pub(crate) foreign: Bytes,
    /// Size and use of the filesystem, or why the pool cannot be used.
    pub(crate) space: Result<Space, String>,
    /// The quotas that limit its volumes, or why none do. `None` if the pool cannot be used.
    pub(crate) enforcement: Option<Result<QuotaKind, String>>,
    /// How many volumes with data have no limit.
    pub(crate) unenforced: usize,
}

impl PoolStatus {
    /// How much of the pool is allocated and how much room is left. `None` if it cannot be used.
    pub(crate) fn usage(&self, node: &NodeName, pool: &PoolName, allocated: Bytes) -> Option<PoolUsage> {
        let space = *self.space.as_ref().ok()?;
        Some(PoolUsage {
            node: node.clone(),
            pool: pool.clone(),
            size: self.limits.capacity(space, self.foreign, allocated),
            allocated,
            room: self.limits.room(space, self.foreign, allocated),
        })
    }
}

/// How much of a pool is allocated.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PoolUsage {
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    /// What can be allocated in total.
    pub(crate) size: Bytes,
    pub(crate) allocated: Bytes,
    /// The largest volume that can still be created.
    pub(crate) room: Bytes,
}

impl PoolUsage {
    /// How much more is allocated than can be: two controllers allocated the last room at the same moment, or others fill the disk.
    pub(crate) fn overallocated(&self) -> Bytes {
        self.allocated.less(self.size)
    }
}
