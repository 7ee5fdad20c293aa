//! This machine: pools on its disks, and bind mounts. The Linux edge of hostdir, answering [`crate::volume::ports`].
//!
//! What needs a kernel lives here and nowhere else. Linux 5.12 is the oldest that has every call that volumes need: openat2(2)
//! 5.6, statx(2) with `STATX_ATTR_MOUNT_ROOT` 5.8, mount_setattr(2) 5.12. Quotas need more: quotactl_fd(2) 5.14 on XFS and
//! ext4.

mod dir;
mod disk;
mod eraser;
mod mountinfo;
mod open;
mod privileges;
mod quota;
mod survey;
mod sys;
mod target;

pub use privileges::drop_privileges;

use crate::volume::access::TargetPath;
use crate::volume::id::VolumeId;
use crate::volume::ports::{BindError, Host, Inode, Opened, PoolConfig, Unusable};

/// The machine this process runs on.
pub struct Linux;

impl Host for Linux {
    fn open(&self, pool: &PoolConfig) -> Result<Opened, Unusable> {
        open::open(pool)
    }

    fn mounted(&self, target: &TargetPath) -> Result<Option<Inode>, BindError> {
        target::mounted(target)
    }

    fn unbind(&self, id: &VolumeId, target: &TargetPath, data: Option<Inode>) -> Result<bool, BindError> {
        target::unbind(id, target, data)
    }
}
