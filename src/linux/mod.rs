//! This machine: pools on its disks, and bind mounts. The Linux edge of hostdir, which implements [`crate::volume::disk`].
//!
//! All that needs the kernel is here and nowhere else. Linux 5.12 is the oldest version with every call that volumes need:
//! openat2(2) 5.6, statx(2) with `STATX_ATTR_MOUNT_ROOT` 5.8, mount_setattr(2) 5.12. Quotas need more: quotactl_fd(2) 5.14
//! on XFS and ext4.

mod dir;
mod durable;
mod eraser;
mod layout;
mod mountinfo;
mod open;
mod pool;
mod privileges;
mod quota;
mod removal;
mod sys;
mod target;
mod threads;
mod usage;

use std::io;

pub(crate) use privileges::{drop_privileges, raise_descriptor_limit};
use threads::Threads;

use crate::volume::access::TargetPath;
use crate::volume::disk::{BindError, Host, Inode, Opened, PoolConfig, Unusable};
use crate::volume::id::VolumeId;

/// The machine this process runs on.
pub(crate) struct Linux {
    /// Unmounting the last mount of a disk that hangs may hang, too.
    targets: Threads,
}

impl Linux {
    /// # Errors
    /// A thread cannot be started.
    pub(crate) fn new() -> io::Result<Self> {
        let targets = Threads::with_own_descriptors("mount".into())?;
        Ok(Self { targets })
    }
}

impl Host for Linux {
    fn open(&self, pool: &PoolConfig) -> Result<Opened, Unusable> {
        open::open(pool)
    }

    fn mounted(&self, target: &TargetPath) -> Result<Option<Inode>, BindError> {
        let target = target.clone();
        self.targets.run(move || target::mounted(&target))
    }

    fn unbind(&self, id: &VolumeId, target: &TargetPath, data: Option<Inode>) -> Result<bool, BindError> {
        let (id, target) = (id.clone(), target.clone());
        self.targets.run(move || target::unbind(&id, &target, data))
    }
}
