//! The system calls that nix does not wrap. The only unsafe code of hostdir.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

pub(super) mod btrfs;
pub(super) mod quota;

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_long, c_uint};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::{NixPath, Result};

use crate::volume::disk::Inode;

/// Gives this thread a table of file descriptors of its own, with nothing but the standard streams in it: close_range(2),
/// Linux 5.9. Threads that it starts share this table. The caller must not own a descriptor.
///
/// These threads handle no signals, so that the kernel picks another one (signal(7)): the handler writes to a descriptor that they
/// do not have, and the signal would be lost.
pub(super) fn own_descriptors() -> Result<()> {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]).thread_block()?;
    let (first, last) = (libc::STDERR_FILENO + 1, c_uint::MAX);
    // SAFETY: the call takes no pointer. It closes descriptors of the new table only, of which this thread owns none.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE) };
    Errno::result(result).map(drop)
}

/// Random bytes: getrandom(2). Libraries may keep a descriptor of /dev/urandom instead, which other threads do not have.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut random = [0; N];
    // SAFETY: the kernel writes at most as many bytes as the array has.
    let length = unsafe { libc::getrandom(random.as_mut_ptr().cast(), N, 0) };
    // It returns as many as are asked for, up to 256.
    Errno::result(length).map(|_| random)
}

/// What statx(2) returns about a file.
pub(super) struct Stat {
    pub(super) inode: Inode,
    /// File type bits of `st_mode`, see inode(7).
    kind: u32,
    attributes: u64,
    pub(super) mount_id: u64,
    /// How many hard links it has.
    pub(super) links: u32,
    /// What it uses on the disk, in bytes.
    pub(super) bytes: u64,
    /// When its content was changed last, in seconds since 1970: for a directory, its entries.
    pub(super) modified: i64,
}

impl Stat {
    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Whether the file is the root of a mount (Linux 5.8).
    pub(super) fn is_mount_root(&self) -> bool {
        self.attributes & attribute(libc::STATX_ATTR_MOUNT_ROOT) != 0
    }

    /// Whether `chattr +i` or `+a` keeps it from being removed.
    pub(super) fn is_immutable(&self) -> bool {
        self.attributes & (attribute(libc::STATX_ATTR_IMMUTABLE) | attribute(libc::STATX_ATTR_APPEND)) != 0
    }
}

fn attribute(bit: c_int) -> u64 {
    u64::from(bit.unsigned_abs())
}

/// statx(2) of `path` below `dir`, or of `dir` itself if `path` is empty. It follows no symbolic links, triggers no
/// automounts, and asks no server of a network filesystem.
pub(super) fn statx<P: ?Sized + NixPath>(dir: impl AsFd, path: &P) -> Result<Stat> {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT | libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    let mask = libc::STATX_TYPE
        | libc::STATX_INO
        | libc::STATX_MNT_ID
        | libc::STATX_NLINK
        | libc::STATX_BLOCKS
        | libc::STATX_MTIME;
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    let result = path.with_nix_path(|path| {
        // SAFETY: `path` is NUL-terminated, the buffer is large enough, and both outlive the call.
        unsafe { libc::statx(dir.as_fd().as_raw_fd(), path.as_ptr(), flags, mask, buffer.as_mut_ptr()) }
    })?;
    Errno::result(result)?;
    // SAFETY: zeroed before and filled by the kernel; every bit pattern is a valid `statx`.
    let found = unsafe { buffer.assume_init() };
    Ok(Stat {
        inode: Inode {
            dev: libc::makedev(found.stx_dev_major, found.stx_dev_minor),
            ino: found.stx_ino,
        },
        kind: u32::from(found.stx_mode) & libc::S_IFMT,
        attributes: found.stx_attributes,
        mount_id: found.stx_mnt_id,
        links: found.stx_nlink,
        // These blocks have 512 bytes, whatever the block size of the filesystem (inode(7)).
        bytes: found.stx_blocks.saturating_mul(512),
        modified: found.stx_mtime.tv_sec,
    })
}

/// A mount that is not attached anywhere yet.
pub(super) struct DetachedMount(OwnedFd);

impl DetachedMount {
    /// A bind mount of `dir` alone, without what is mounted below it: open_tree(2), Linux 5.2.
    pub(super) fn of(dir: impl AsFd) -> Result<Self> {
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | flag(libc::AT_EMPTY_PATH);
        let dir = dir.as_fd().as_raw_fd();
        // SAFETY: the path is NUL-terminated and static; the call takes no other pointer.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, dir, EMPTY.as_ptr(), flags) };
        let fd = raw_fd(Errno::result(fd)?)?;
        // SAFETY: the kernel has just returned this descriptor, and nobody else uses it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sets and clears `MOUNT_ATTR_*`, and leaves the peer group of the mount's source: mount_setattr(2), Linux 5.12.
    pub(super) fn set_attributes(&self, set: u64, clear: u64) -> Result<()> {
        let mut attributes = libc::mount_attr {
            attr_set: set,
            attr_clr: clear,
            propagation: libc::MS_PRIVATE,
            userns_fd: 0,
        };
        // SAFETY: the path is NUL-terminated and static; the structure is of the size given and outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                EMPTY.as_ptr(),
                flag(libc::AT_EMPTY_PATH),
                &raw mut attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        Errno::result(result).map(drop)
    }

    /// Attaches the mount at `name` in `dir`, without following a symbolic link there: move_mount(2), Linux 5.2.
    pub(super) fn attach(self, dir: impl AsFd, name: &CStr) -> Result<()> {
        let dir = dir.as_fd().as_raw_fd();
        let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
        // SAFETY: both paths are NUL-terminated and outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                EMPTY.as_ptr(),
                dir,
                name.as_ptr(),
                flags,
            )
        };
        Errno::result(result).map(drop)
    }
}

/// Clears the flags of chattr(1) that keep an open file or directory from being removed (ioctl_iflags(2)).
pub(super) fn clear_immutable(file: impl AsFd) -> Result<()> {
    let file = file.as_fd().as_raw_fd();
    let mut flags: c_long = 0;
    // SAFETY: the kernel reads and writes an int through the pointer (ioctl_iflags(2)); a long has room for it.
    let got = unsafe { libc::ioctl(file, libc::FS_IOC_GETFLAGS, &raw mut flags) };
    Errno::result(got)?;
    flags &= !c_long::from(FS_IMMUTABLE_FL | FS_APPEND_FL);
    // SAFETY: as above.
    let set = unsafe { libc::ioctl(file, libc::FS_IOC_SETFLAGS, &raw const flags) };
    Errno::result(set).map(drop)
}

/// `struct file_attr`, include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct FileAttributes {
    flags: u64,
    _sizes: [u32; 2],
    _project: u32,
    _size: u32,
}

/// Like [`clear_immutable`], for what must not be opened, such as a FIFO or a symbolic link: file_setattr(2), Linux 6.17. Older
/// kernels give such files no flags.
pub(super) fn clear_immutable_at(dir: impl AsFd, name: &CStr) -> Result<()> {
    /// `FS_XFLAG_IMMUTABLE` and `FS_XFLAG_APPEND`
    const IMMUTABLE: u64 = 0x8 | 0x10;
    /// Numbers of the system calls, the same on all architectures but alpha.
    const GET: c_long = 468;
    const SET: c_long = 469;
    let mut found = FileAttributes::default();
    let (dir, name, size) = (dir.as_fd().as_raw_fd(), name.as_ptr(), size_of::<FileAttributes>());
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the name is NUL-terminated, and the structure of the size given; both outlive the call.
    let got = unsafe { libc::syscall(GET, dir, name, &raw mut found, size, flags) };
    Errno::result(got)?;
    found.flags &= !IMMUTABLE;
    // SAFETY: as above.
    let set = unsafe { libc::syscall(SET, dir, name, &raw const found, size, flags) };
    Errno::result(set).map(drop)
}

/// `chattr +i`, include/uapi/linux/fs.h.
const FS_IMMUTABLE_FL: c_int = 0x10;
/// `chattr +a`, include/uapi/linux/fs.h.
const FS_APPEND_FL: c_int = 0x20;

const EMPTY: &CStr = c"";

fn flag(at: c_int) -> c_uint {
    at.unsigned_abs()
}

fn raw_fd(result: c_long) -> Result<RawFd> {
    RawFd::try_from(result).map_err(|_| Errno::EBADF)
}
