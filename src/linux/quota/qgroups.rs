//! btrfs: every volume is a subvolume of its own, whose quota group has a limit.
//!
//! With simple quotas the limit is on a group above the subvolume's own: the kernel puts subvolumes that a tenant makes in
//! the volume into that group, too. With full quotas it does not (btrfs-quota(5)).
//!
//! Ids of subvolumes are never given twice, and a subvolume is destroyed with all its files by one call.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::syncfs;

use super::Limit;
use crate::linux::dir::{Dir, failed};
use crate::linux::mountinfo;
use crate::linux::sys::btrfs as sys;
use crate::volume::ports::{DiskError, Usage};
use crate::volume::quota::Means;
use crate::volume::size::Bytes;

/// Quota groups of one filesystem.
pub(super) struct Qgroups {
    /// What the kernel says of them: `/sys/fs/btrfs/<uuid>/qgroups` (Linux 5.9), there while quotas are on.
    sysfs: PathBuf,
    simple: bool,
    /// Destroyed subvolumes whose groups may be there still.
    leaving: Mutex<BTreeSet<u64>>,
}

const OFF: &str = "quotas are off on this btrfs filesystem; run `btrfs quota enable --simple` (before Linux 6.7: `btrfs quota \
                   enable`) on it, then restart hostdir on this node";

impl Qgroups {
    /// The quota groups of the filesystem that `volumes` is on; or why there are none, and what to do about it.
    pub(super) fn find(volumes: &Dir) -> Result<Self, String> {
        let fsid = sys::fsid(volumes).map_err(|errno| format!("its filesystem has no UUID: {errno}"))?;
        let sysfs = Path::new("/sys/fs/btrfs").join(fsid);
        if !sysfs.is_dir() {
            return Err("/sys is not mounted, which tells whether btrfs has quotas; mount it".into());
        }
        let sysfs = sysfs.join("qgroups");
        let mode = fs::read_to_string(sysfs.join("mode")).unwrap_or_default();
        let found = Self {
            simple: mode.trim() == "squota",
            sysfs,
            leaving: Mutex::default(),
        };
        found.enforcement()?;
        Ok(found)
    }

    /// Whether the kernel limits quota groups now.
    pub(super) fn enforcement(&self) -> Result<Means, String> {
        match (self.sysfs.is_dir(), self.simple) {
            (false, _) => Err(OFF.into()),
            (true, true) => Ok(Means::SimpleQuotas),
            (true, false) => Ok(Means::Qgroups),
        }
    }

    /// Limits a subvolume, if it is not limited so already. With simple quotas that is durable with the next commit of the
    /// filesystem.
    pub(super) fn limit(&self, data: &Dir, limit: Limit) -> Result<(), DiskError> {
        let subvolume = subvolume(data)?;
        let group = self.group(subvolume);
        let wanted = limit.bytes.map(|bytes| bytes.0);
        if self.limited(group) == wanted {
            return Ok(());
        }
        let step = |errno| of(data, "limit the quota group of", errno);
        if self.simple {
            sys::create_qgroup(data, group).map_err(step)?;
            sys::join_qgroup(data, subvolume, group).map_err(step)?;
        }
        sys::limit_qgroup(data, group, wanted).map_err(step)
    }

    /// What a subvolume takes; nothing if nobody counts it now.
    pub(super) fn usage(&self, data: &Dir) -> Result<Option<Usage>, DiskError> {
        let group = self.group(subvolume(data)?);
        // What is on the disk, and what is on its way there: the former changes when the filesystem commits.
        let under_way = self.read(group, "rsv_data").unwrap_or_default();
        let usage = |bytes| Usage {
            bytes: Bytes(bytes).plus(Bytes(under_way)),
            inodes: None,
        };
        Ok(self.read(group, "referenced").map(usage))
    }

    /// Notes that subvolumes are destroyed.
    pub(super) fn leave(&self, subvolumes: Vec<u64>) {
        self.lock().extend(subvolumes);
    }

    /// Removes the groups of destroyed subvolumes, which the kernel allows when it has cleaned up behind them (and does itself
    /// as of Linux 6.12); whether some are left.
    pub(super) fn give_back(&self, dir: &Dir) -> bool {
        let leaving: Vec<u64> = self.lock().iter().copied().collect();
        for id in leaving {
            let upper = sys::upper(id);
            if self.simple {
                let _ = sys::leave_qgroup(dir, id, upper).and_then(|()| sys::remove_qgroup(dir, upper));
            }
            let _ = sys::remove_qgroup(dir, id);
            // The kernel says EBUSY of what is not cleaned up, and ENOTCONN where quotas are off.
            if [id, upper]
                .into_iter()
                .all(|group| self.read(group, "referenced").is_none())
            {
                self.lock().remove(&id);
            }
        }
        !self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // Every change is one statement.
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limited(&self, group: u64) -> Option<u64> {
        // BTRFS_QGROUP_LIMIT_MAX_RFER
        let limited = self.read(group, "limit_flags").is_some_and(|flags| flags & 1 != 0);
        self.read(group, "max_referenced").filter(|_| limited)
    }

    /// The group that a limit is set on.
    fn group(&self, subvolume: u64) -> u64 {
        if self.simple { sys::upper(subvolume) } else { subvolume }
    }

    fn read(&self, group: u64, what: &str) -> Option<u64> {
        let (level, id) = (group >> 48, group & ((1 << 48) - 1));
        let path = self.sysfs.join(format!("{level}_{id}")).join(what);
        // A number, in one read.
        let mut buffer = [0; 32];
        let length = File::open(path).and_then(|mut file| file.read(&mut buffer)).ok()?;
        let text = std::str::from_utf8(&buffer[..length]).ok()?.trim();
        // Flags are in hexadecimal.
        text.strip_prefix("0x")
            .map_or_else(|| text.parse().ok(), |digits| u64::from_str_radix(digits, 16).ok())
    }
}

/// Makes a subvolume, where there is none or an empty directory.
pub(super) fn ensure_subvolume(dir: &Dir, name: &CStr) -> Result<Dir, DiskError> {
    if let Some(found) = dir.find_child(name)? {
        if is_subvolume(&found)? {
            return Ok(found);
        }
        // Of an attempt while quotas were off.
        dir.rmdir(name).map_err(|errno| dir.failed("remove", name, errno))?;
    }
    sys::create_subvolume(dir, name).map_err(|errno| dir.failed("make subvolume", name, errno))?;
    // fsync(2) does not commit a new subvolume on every kernel.
    syncfs(dir).map_err(|errno| of(dir, "sync the filesystem of", errno))?;
    dir.child(name)
}

/// Whether a directory on btrfs is the top of a subvolume.
pub(super) fn is_subvolume(dir: &Dir) -> Result<bool, DiskError> {
    let stat = dir.stat(c"").map_err(|errno| of(dir, "stat", errno))?;
    Ok(stat.inode.ino == sys::TOP_INODE)
}

/// Destroys `name` in `dir`, if it is a subvolume, with all that is in it. The subvolumes that were.
pub(super) fn destroy(dir: &Dir, name: &CStr) -> Result<Vec<u64>, DiskError> {
    // What cannot be opened is none, or something is mounted on it.
    let Ok(top) = dir.child(name) else {
        return Ok(Vec::new());
    };
    let Some(id) = is_subvolume(&top)?.then(|| sys::subvolume_of(&top).ok()).flatten() else {
        return Ok(Vec::new());
    };
    // The kernel would unmount it.
    if mountinfo::read()?
        .iter()
        .any(|entry| entry.mount_point.starts_with(top.path()))
    {
        return Err(dir.failed("destroy subvolume", name, Errno::EBUSY));
    }
    drop(top);
    // To take a subvolume out of a full one needs room in that.
    for group in [id, sys::upper(id)] {
        let _ = sys::limit_qgroup(dir, group, None);
    }
    // Children before their parents: a tenant may have made some.
    let (mut path, mut destroyed) = (vec![id], Vec::new());
    while let Some(last) = path.last() {
        let children = sys::subvolumes_in(dir, *last).map_err(|errno| dir.failed("list subvolumes in", name, errno))?;
        if children.is_empty() {
            sys::destroy_subvolume(dir, *last).map_err(|errno| dir.failed("destroy subvolume", name, errno))?;
            destroyed.extend(path.pop());
        } else {
            path.extend(children);
        }
    }
    Ok(destroyed)
}

fn subvolume(data: &Dir) -> Result<u64, DiskError> {
    sys::subvolume_of(data).map_err(|errno| of(data, "find the subvolume of", errno))
}

fn of(dir: &Dir, verb: &'static str, errno: Errno) -> DiskError {
    failed(verb, dir.path().to_owned(), errno)
}
