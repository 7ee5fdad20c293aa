//! What a pool is like: found out by its node, published in the API server, read there by controllers.

use super::id::{NodeName, PoolName};
use super::quota::QuotaKind;
use super::record::PoolId;
use super::room::{Limits, Space};
use super::size::Bytes;

/// A pool of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PoolStatus {
    pub(crate) limits: Limits,
    /// Its identity, where it was ever opened.
    pub(crate) id: Option<PoolId>,
    /// Its filesystem, as mount(8) calls it, where it was ever opened.
    pub(crate) filesystem: Option<String>,
    /// Bytes that others had on the filesystem when the pool was made.
    pub(crate) foreign: Bytes,
    /// Size and use of the filesystem, or why the pool cannot be used.
    pub(crate) space: Result<Space, String>,
    /// By which quotas its volumes are limited, or why by none. Not known of a pool that cannot be used.
    pub(crate) enforcement: Option<Result<QuotaKind, String>>,
    /// How many volumes with data have no limit.
    pub(crate) unenforced: usize,
}

impl PoolStatus {
    /// What is allocated of it and what is left, if it can be used.
    pub(crate) fn usage(&self, node: &NodeName, pool: &PoolName, allocated: Bytes) -> Option<PoolUsage> {
        let space = *self.space.as_ref().ok()?;
        let room = |allocated| self.limits.room(space, self.foreign, allocated);
        Some(PoolUsage {
            node: node.clone(),
            pool: pool.clone(),
            size: room(Bytes(0)),
            allocated,
            room: room(allocated),
        })
    }
}

/// How much of a pool is allocated.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PoolUsage {
    pub(crate) node: NodeName,
    pub(crate) pool: PoolName,
    /// What can be allocated in all.
    pub(crate) size: Bytes,
    pub(crate) allocated: Bytes,
    /// The largest volume that can still be created.
    pub(crate) room: Bytes,
}
