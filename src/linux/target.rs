//! The places where volumes are mounted: directories of the kubelet, reached without following a symbolic link.

use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use tracing::warn;

use super::dir::{Dir, absent};
use super::mountinfo;
use super::sys::{DetachedMount, Stat};
use crate::volume::access::{MountOptions, TargetPath};
use crate::volume::disk::{BindError, DiskError, Inode};
use crate::volume::id::VolumeId;

/// Permissions of a target directory while nothing is mounted on it. The mount brings its own.
const TARGET_MODE: Mode = Mode::S_IRWXU.union(Mode::S_IRGRP).union(Mode::S_IXGRP);

/// How many mounts of one volume may be stacked on a target. More mean that something is badly wrong.
const STACKED_MAX: usize = 16;

/// EBUSY often ends by itself: a child between fork and exec holds all files of its parent. Retrying for a second here
/// avoids the kubelet's back-off, which grows to minutes.
const BUSY_TRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// The options of a mount that hostdir sets and compares: statvfs(3) flags and mount_setattr(2) attributes.
const OPTIONS: [(FsFlags, u64); 5] = [
    (FsFlags::ST_RDONLY, libc::MOUNT_ATTR_RDONLY),
    (FsFlags::ST_NOSUID, libc::MOUNT_ATTR_NOSUID),
    (FsFlags::ST_NODEV, libc::MOUNT_ATTR_NODEV),
    (FsFlags::ST_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    (FsFlags::ST_NOATIME, libc::MOUNT_ATTR_NOATIME),
];

/// A target: an open parent directory and a name in it.
struct Place {
    parent: Dir,
    name: CString,
}

/// What is at a target.
enum Found {
    Nothing,
    Directory,
    Mount(Stat),
    Other,
}

/// Mounts `data` at `target`, unless it is mounted there already with the same options. Returns whether a mount was made.
pub(super) fn bind(data: &Dir, target: &TargetPath, options: MountOptions) -> Result<bool, BindError> {
    let place = Place::open(target)?.ok_or_else(|| {
        BindError::BadTarget("its parent directory does not exist; the caller (kubelet) must make it".into())
    })?;
    let source = data.stat(c"").map_err(|errno| data.failed_itself("stat", errno))?;
    let asked = asked_flags(options);
    let wanted = asked | pool_flags(data, options)?;
    let made = match place.look()? {
        Found::Nothing => place.make()?,
        Found::Directory => place.require_empty()?,
        Found::Mount(there) if there.inode == source.inode => {
            place.require_flags(wanted, asked)?;
            return Ok(false);
        }
        Found::Mount(_) => {
            return Err(BindError::Conflict(
                "something else is mounted there; unmount it first".into(),
            ));
        }
        Found::Other => {
            let why = "something that is not a directory is in the way; move it away";
            return Err(BindError::InTheWay(why.into()));
        }
    };
    place.attach(data, wanted).inspect_err(|_| {
        // Only a directory that was made here is removed; if that also fails, it must not hide the first error.
        if let (true, Err(errno)) = (made, place.parent.rmdir(&place.name)) {
            warn!(%target, %errno, "cannot remove the target again after a failed mount");
        }
    })?;
    Ok(true)
}

/// What is mounted at `target`, if anything is.
pub(super) fn mounted(target: &TargetPath) -> Result<Option<Inode>, BindError> {
    Ok(mounted_stat(target)?.map(|there| there.inode))
}

/// Like [`mounted`], with all that statx(2) returns.
pub(super) fn mounted_stat(target: &TargetPath) -> Result<Option<Stat>, BindError> {
    let Some(place) = Place::open(target)? else {
        return Ok(None);
    };
    match place.look()? {
        Found::Mount(there) => Ok(Some(there)),
        Found::Nothing | Found::Directory | Found::Other => Ok(None),
    }
}

/// Unmounts the volume from `target`, proves that nothing is mounted there any more, and removes the empty directory.
/// Returns whether there was one.
pub(super) fn unbind(id: &VolumeId, target: &TargetPath, data: Option<Inode>) -> Result<bool, BindError> {
    let Some(place) = Place::open(target)? else {
        return Ok(false);
    };
    for _ in 0..STACKED_MAX {
        match place.look()? {
            Found::Nothing => return Ok(false),
            Found::Directory => return place.remove().map(|()| true),
            Found::Mount(there) if is_mount_of(&there, id)? || data == Some(there.inode) => place.unmount()?,
            Found::Mount(_) => return Err(BindError::Unproven),
            Found::Other => {
                let why = "what is there is not a directory, so hostdir did not make it; move it away";
                return Err(BindError::InTheWay(why.into()));
            }
        }
    }
    Err(BindError::InTheWay(
        "too many mounts of the volume are stacked there; unmount them by hand".into(),
    ))
}

/// Whether the mount table says that this is a mount of a volume's directory, in a pool or in its trash: the only proof left
/// when the pool itself is gone.
fn is_mount_of(there: &Stat, id: &VolumeId) -> Result<bool, DiskError> {
    Ok(mountinfo::find(there.mount_id)?.is_some_and(|entry| is_root_of(&entry.root, id)))
}

/// Whether a path within a filesystem is `…/volumes/<id>/data` or `…/trash/<id>.<n>/data`.
fn is_root_of(root: &Path, id: &VolumeId) -> bool {
    // The kernel appends this to a root that was removed.
    let text = root.as_os_str().as_bytes();
    let text = text.strip_suffix(b"//deleted").unwrap_or(text);
    let mut parts = text.rsplit(|byte| *byte == b'/');
    let (data, volume, home) = (parts.next(), parts.next().unwrap_or_default(), parts.next());
    let id = id.as_str().as_bytes();
    data == Some(b"data")
        && match home {
            Some(b"volumes") => volume == id,
            Some(b"trash") => volume.strip_prefix(id).is_some_and(|rest| rest.first() == Some(&b'.')),
            _ => false,
        }
}

/// The requested flags.
fn asked_flags(options: MountOptions) -> FsFlags {
    let MountOptions {
        read_only,
        nosuid,
        nodev,
        noexec,
        noatime,
    } = options;
    let asked = [read_only, nosuid, nodev, noexec, noatime];
    let flags = OPTIONS.iter().zip(asked);
    flags.filter_map(|((flag, _), asked)| asked.then_some(*flag)).collect()
}

/// The flags that a mount inherits from its pool.
fn pool_flags(data: &Dir, options: MountOptions) -> Result<FsFlags, BindError> {
    let flags = flags_of(data).map_err(|errno| data.failed_itself("statvfs", errno))?;
    if flags.contains(FsFlags::ST_RDONLY) && !options.read_only {
        return Err(BindError::InTheWay(
            "the pool is mounted read-only; remount it read-write on the node".into(),
        ));
    }
    Ok(flags)
}

/// The flags of [`OPTIONS`] that the mount of an open directory has.
fn flags_of(dir: impl std::os::fd::AsFd) -> nix::Result<FsFlags> {
    let known: FsFlags = OPTIONS.iter().map(|(flag, _)| *flag).collect();
    Ok(fstatvfs(dir)?.flags() & known)
}

impl Place {
    /// Opens the parent of a target; `None` if there is none.
    fn open(target: &TargetPath) -> Result<Option<Self>, BindError> {
        let path = target.as_path();
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(BindError::BadTarget("it has no parent directory".into()));
        };
        let name = CString::new(name.as_bytes()).map_err(|_| BindError::BadTarget("it contains a NUL byte".into()))?;
        let parent = match absent(Dir::open(parent)) {
            Ok(parent) => parent,
            Err(error) if error.source.downcast_ref() == Some(&Errno::ELOOP) => {
                let why = "its path goes through a symbolic link; give the kubelet and hostdir the real directory";
                return Err(BindError::BadTarget(why.into()));
            }
            Err(error) if error.source.downcast_ref() == Some(&Errno::ENOTDIR) => {
                return Err(BindError::BadTarget("its parent is not a directory".into()));
            }
            Err(error) => return Err(error.into()),
        };
        Ok(parent.map(|parent| Self { parent, name }))
    }

    fn look(&self) -> Result<Found, DiskError> {
        match self.parent.stat(&self.name) {
            Ok(stat) if stat.is_mount_root() => Ok(Found::Mount(stat)),
            Ok(stat) if stat.is_dir() => Ok(Found::Directory),
            Ok(_) => Ok(Found::Other),
            Err(Errno::ENOENT) => Ok(Found::Nothing),
            Err(errno) => Err(self.failed("stat", errno)),
        }
    }

    /// Makes the target directory. Returns true: it was made here.
    fn make(&self) -> Result<bool, DiskError> {
        mkdirat(&self.parent, self.name.as_c_str(), TARGET_MODE)
            .map_err(|errno| self.failed("make directory", errno))?;
        Ok(true)
    }

    /// Refuses to hide files under a mount. Returns false: the directory was not made here.
    fn require_empty(&self) -> Result<bool, BindError> {
        if self.parent.child(&self.name)?.names()?.next().is_some() {
            let why = "it is a directory with files in it that the mount would hide; move them away";
            return Err(BindError::InTheWay(why.into()));
        }
        Ok(false)
    }

    /// Checks that the mount has the requested options and the same read-only flag. More options are fine: they may come
    /// from the pool, even if they were set there later.
    fn require_flags(&self, wanted: FsFlags, asked: FsFlags) -> Result<(), BindError> {
        let path = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let there = nix::fcntl::openat(&self.parent, self.name.as_c_str(), path, Mode::empty())
            .and_then(flags_of)
            .map_err(|errno| self.failed("statvfs", errno))?;
        let read_only = FsFlags::ST_RDONLY;
        if there.contains(asked) && there & read_only == wanted & read_only {
            return Ok(());
        }
        Err(BindError::Conflict(
            "it is already mounted there with other mount options or another read-only flag; unmount it first".into(),
        ))
    }

    /// Attaches a mount of `data`. It gets its options before anybody can see it; a symbolic link at the target is not
    /// followed.
    fn attach(&self, data: &Dir, wanted: FsFlags) -> Result<(), BindError> {
        let set = OPTIONS.iter().filter(|(flag, _)| wanted.contains(*flag));
        let set: u64 = set.map(|(_, attribute)| attribute).sum();
        // The access time options are one field; it must be cleared to be set (mount_setattr(2)).
        let clear = if set & libc::MOUNT_ATTR_NOATIME != 0 {
            libc::MOUNT_ATTR__ATIME
        } else {
            0
        };
        let mount = DetachedMount::of(data).map_err(|errno| data.failed_itself("clone the mount of", errno))?;
        mount
            .set_attributes(set, clear)
            .map_err(|errno| data.failed_itself("set the mount options of", errno))?;
        mount
            .attach(&self.parent, &self.name)
            .map_err(|errno| self.failed("mount on", errno).into())
    }

    /// Unmounts what is on top. Not lazily: a mount that a process still uses must count as mounted.
    fn unmount(&self) -> Result<(), DiskError> {
        // umount2(2) takes no descriptor; the parent's descriptor in proc(5) keeps the path from being swapped.
        let name = std::ffi::OsStr::from_bytes(self.name.to_bytes());
        let path = Path::new("/proc/thread-self/fd")
            .join(self.parent_fd().to_string())
            .join(name);
        for _ in 0..BUSY_TRIES {
            match umount2(&path, MntFlags::UMOUNT_NOFOLLOW) {
                Err(Errno::EBUSY) => thread::sleep(BUSY_PAUSE),
                unmounted => return unmounted.map_err(|errno| self.failed("unmount", errno)),
            }
        }
        Err(self.failed("unmount", Errno::EBUSY))
    }

    fn parent_fd(&self) -> i32 {
        std::os::fd::AsFd::as_fd(&self.parent).as_raw_fd()
    }

    fn remove(&self) -> Result<(), BindError> {
        match self.parent.rmdir(&self.name) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::ENOTEMPTY) => {
                let why = "it is not a mount but has files in it, which hostdir did not put there; move them away";
                Err(BindError::InTheWay(why.into()))
            }
            Err(errno) => Err(self.failed("remove", errno).into()),
        }
    }

    fn failed(&self, verb: &'static str, errno: Errno) -> DiskError {
        self.parent.failed(verb, &self.name, errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_roots_of_the_very_volume_are_its_mounts() {
        let id = VolumeId::parse("pvc-1").unwrap();
        for root in [
            "/volumes/pvc-1/data",
            "/srv/pool/volumes/pvc-1/data",
            "/trash/pvc-1.0/data",
            "/volumes/pvc-1/data//deleted",
        ] {
            assert!(is_root_of(Path::new(root), &id), "{root}");
        }
        for root in [
            "/",
            "/data",
            "/volumes/pvc-2/data",
            "/volumes/pvc-1",
            "/volumes/pvc-1/data/x",
            "/trash/pvc-10.0/data",
            "/trash/pvc-1/data",
            "/other/pvc-1/data",
        ] {
            assert!(!is_root_of(Path::new(root), &id), "{root}");
        }
    }
}
