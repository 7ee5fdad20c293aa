//! Project quotas: quotactl_fd(2) with the commands of XFS, which also work on ext4 (fs/quota/quota.c translates them), and
//! the project of a file (ioctl_xfs_fsgetxattr(2)).

use std::os::fd::{AsFd, AsRawFd};

use libc::{c_long, c_uint};
use nix::Result;
use nix::errno::Errno;

/// The size of the blocks in which limits and usage are counted (include/uapi/linux/dqblk_xfs.h).
pub(in crate::linux) const BASIC_BLOCK: u64 = 512;

/// Limits and usage of a project.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::linux) struct Project {
    pub(in crate::linux) id: u32,
    /// Hard limit in bytes; zero means no limit.
    pub(in crate::linux) bytes_max: u64,
    /// Hard limit of inodes; zero means no limit.
    pub(in crate::linux) inodes_max: u64,
    pub(in crate::linux) bytes: u64,
    pub(in crate::linux) inodes: u64,
}

/// `struct fs_disk_quota`.
#[repr(C)]
#[derive(Default)]
struct DiskQuota {
    version: i8,
    flags: i8,
    field_mask: u16,
    id: u32,
    block_hard: u64,
    block_soft: u64,
    inode_hard: u64,
    inode_soft: u64,
    blocks: u64,
    inodes: u64,
    _timers_and_realtime: [u64; 7],
}

/// `struct fs_quota_statv`.
#[repr(C)]
#[derive(Default)]
struct QuotaState {
    version: i8,
    _pad: u8,
    flags: u16,
    _counts: [u64; 19],
}

const _: () = assert!(size_of::<DiskQuota>() == 112 && size_of::<QuotaState>() == 160);

const PRJQUOTA: u32 = 2;
const Q_XGETQUOTA: u32 = 0x5803;
const Q_XSETQLIM: u32 = 0x5804;
const Q_XGETQSTATV: u32 = 0x5808;
const Q_XGETNEXTQUOTA: u32 = 0x5809;
const VERSION: i8 = 1;
const FS_PROJ_QUOTA: i8 = 2;
/// `FS_DQ_ISOFT | FS_DQ_IHARD | FS_DQ_BSOFT | FS_DQ_BHARD`
const LIMITS: u16 = 0b1111;
const PDQ_ACCT: u16 = 1 << 4;
const PDQ_ENFD: u16 = 1 << 5;

/// quotactl_fd(2) with a command that reads or writes one structure. Linux 5.14.
fn quotactl<T>(file: impl AsFd, command: u32, id: u32, data: &mut T) -> Result<()> {
    let command: c_uint = (command << 8) | PRJQUOTA;
    let file = file.as_fd().as_raw_fd();
    // SAFETY: each command here takes a pointer to the structure that the caller passes, which outlives the call.
    let result: c_long = unsafe { libc::syscall(libc::SYS_quotactl_fd, file, command, id, &raw mut *data) };
    Errno::result(result).map(drop)
}

/// Whether the filesystem of a file counts and limits what projects use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::linux) struct ProjectState {
    /// Whether it counts what projects use.
    pub(in crate::linux) accounted: bool,
    /// Whether it enforces the limits of projects.
    pub(in crate::linux) enforced: bool,
}

/// Whether the filesystem of a file counts and limits what projects use.
pub(in crate::linux) fn project_state(file: impl AsFd) -> Result<ProjectState> {
    let mut state = QuotaState {
        version: VERSION,
        ..QuotaState::default()
    };
    match quotactl(file, Q_XGETQSTATV, 0, &mut state) {
        // No quotas are on (quota_getstatev, fs/quota/quota.c), or the filesystem has none of this kind.
        Err(Errno::ENOSYS | Errno::EINVAL | Errno::EOPNOTSUPP) => {}
        other => other?,
    }
    Ok(ProjectState {
        accounted: state.flags & PDQ_ACCT != 0,
        enforced: state.flags & PDQ_ENFD != 0,
    })
}

/// Limits and usage of a project: all zero if it was never used.
pub(in crate::linux) fn project(file: impl AsFd, id: u32) -> Result<Project> {
    let mut found = DiskQuota::default();
    match quotactl(file, Q_XGETQUOTA, id, &mut found) {
        // XFS has no record of it.
        Err(Errno::ENOENT) => Ok(Project {
            id,
            ..Project::default()
        }),
        other => other.map(|()| found.into()),
    }
}

/// The first project from `id` on that has limits or usage, if there is any.
pub(in crate::linux) fn next_project(file: impl AsFd, id: u32) -> Result<Option<Project>> {
    let mut found = DiskQuota::default();
    match quotactl(file, Q_XGETNEXTQUOTA, id, &mut found) {
        Err(Errno::ENOENT) => Ok(None),
        other => other.map(|()| Some(found.into())),
    }
}

/// Limits a project; zero means no limit. Limits are counted in 512-byte blocks, and the kernel rounds them down to its own
/// blocks.
pub(in crate::linux) fn limit_project(file: impl AsFd, id: u32, bytes_max: u64, inodes_max: u64) -> Result<()> {
    let blocks = bytes_max / BASIC_BLOCK;
    let mut limits = DiskQuota {
        version: VERSION,
        flags: FS_PROJ_QUOTA,
        field_mask: LIMITS,
        id,
        block_hard: blocks,
        block_soft: 0,
        inode_hard: inodes_max,
        ..DiskQuota::default()
    };
    quotactl(file, Q_XSETQLIM, id, &mut limits)
}

impl From<DiskQuota> for Project {
    fn from(found: DiskQuota) -> Self {
        Self {
            id: found.id,
            bytes_max: found.block_hard.saturating_mul(BASIC_BLOCK),
            inodes_max: found.inode_hard,
            bytes: found.blocks.saturating_mul(BASIC_BLOCK),
            inodes: found.inodes,
        }
    }
}

/// The project of a file or directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::linux) struct Tag {
    pub(in crate::linux) project: u32,
    /// Whether new entries of the directory inherit its project, and entries of other projects cannot be moved or linked
    /// into it.
    pub(in crate::linux) inherited: bool,
}

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

/// include/uapi/linux/fs.h
const FS_XFLAG_PROJINHERIT: u32 = 0x200;

mod raw {
    use super::FsXattr;
    nix::ioctl_read!(fs_get_xattr, b'X', 31, FsXattr);
    nix::ioctl_write_ptr!(fs_set_xattr, b'X', 32, FsXattr);
}

fn attributes(file: impl AsFd) -> Result<FsXattr> {
    let mut found = FsXattr::default();
    // SAFETY: the kernel fills the structure, whose size is encoded in the ioctl number.
    unsafe { raw::fs_get_xattr(file.as_fd().as_raw_fd(), &raw mut found) }?;
    Ok(found)
}

/// The project of a file or directory.
pub(in crate::linux) fn tag(file: impl AsFd) -> Result<Tag> {
    let found = attributes(file)?;
    Ok(Tag {
        project: found.project,
        inherited: found.flags & FS_XFLAG_PROJINHERIT != 0,
    })
}

/// Puts an open directory into a project.
pub(in crate::linux) fn set_tag(dir: impl AsFd, tag: Tag) -> Result<()> {
    let mut wanted = attributes(&dir)?;
    wanted.project = tag.project;
    if tag.inherited {
        wanted.flags |= FS_XFLAG_PROJINHERIT;
    } else {
        wanted.flags &= !FS_XFLAG_PROJINHERIT;
    }
    // SAFETY: the kernel reads the structure, whose size is encoded in the ioctl number.
    unsafe { raw::fs_set_xattr(dir.as_fd().as_raw_fd(), &raw const wanted) }.map(drop)
}
