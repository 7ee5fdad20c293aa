//! btrfs: every volume is a subvolume of its own, whose quota group has a limit.
//!
//! With simple quotas the limit is on a group above the subvolume's own: the kernel puts subvolumes that a tenant makes in
//! the volume into that group, too. With full quotas it does not (btrfs-quota(5)).
//!
//! A subvolume is destroyed with all its files by one call.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::syncfs;
use tracing::{debug, warn};

use super::Limit;
use crate::linux::dir::Dir;
use crate::linux::mountinfo;
use crate::linux::sys::{btrfs as sys, clear_immutable};
use crate::volume::disk::{DiskError, Usage};
use crate::volume::quota::QuotaKind;
use crate::volume::size::Bytes;

/// Quota groups of one filesystem.
pub(super) struct Qgroups {
    /// Where the kernel shows them: `/sys/fs/btrfs/<uuid>/qgroups` (Linux 5.9). It exists while quotas are on.
    sysfs: PathBuf,
    simple: bool,
    /// A directory that is in no volume: a full one does not even let its own groups be changed.
    outside: Dir,
    /// Whether quotas have been seen off since the pool was opened: then all limits are gone.
    lost: AtomicBool,
    /// Destroyed subvolumes whose groups may still exist.
    destroyed: Mutex<BTreeSet<u64>>,
}

const OFF: &str = "quotas are off on this btrfs filesystem; run `btrfs quota enable --simple` (before Linux 6.7: `btrfs quota \
                   enable`) on it, then restart hostdir on this node";

impl Qgroups {
    /// The quota groups of the filesystem that `volumes` is on, or why there are none and what to do about it.
    pub(super) fn find(volumes: &Dir) -> Result<Self, String> {
        let fsid = sys::fsid(volumes).map_err(|errno| format!("its filesystem has no UUID: {errno}"))?;
        let sysfs = Path::new("/sys/fs/btrfs").join(fsid);
        if !sysfs.is_dir() {
            return Err("/sys is not mounted, so hostdir cannot see whether btrfs has quotas; mount it".into());
        }
        let sysfs = sysfs.join("qgroups");
        let found = Self {
            simple: is_simple(&sysfs),
            outside: volumes.child(c".").map_err(|error| error.with_cause())?,
            sysfs,
            lost: AtomicBool::new(false),
            destroyed: Mutex::default(),
        };
        found.enforcement()?;
        Ok(found)
    }

    /// Whether the kernel limits quota groups now.
    pub(super) fn enforcement(&self) -> Result<QuotaKind, String> {
        match fs::metadata(&self.sysfs) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.lost.store(true, Ordering::Relaxed);
                return Err(OFF.into());
            }
            // This error says nothing about the quotas.
            Err(error) => return Err(format!("cannot stat {}: {error}", self.sysfs.display())),
        }
        if self.lost.load(Ordering::Relaxed) || is_simple(&self.sysfs) != self.simple {
            return Err(
                "quotas were switched off and on, and all limits are gone; restart hostdir on this node".into(),
            );
        }
        if self.simple {
            return Ok(QuotaKind::SimpleQuotas);
        }
        // The kernel stops counting, for example when a large subvolume is destroyed (`drop_subtree_threshold`).
        let inconsistent = fs::read_to_string(self.sysfs.join("inconsistent")).is_ok_and(|text| text.trim() == "1");
        if inconsistent {
            return Err(
                "the quota groups of this btrfs filesystem are inconsistent; run `btrfs quota rescan` on it (simple \
                        quotas, since Linux 6.7, have no such state)"
                    .into(),
            );
        }
        Ok(QuotaKind::Qgroups)
    }

    /// Makes the quota group that the limit of a new subvolume is set on.
    pub(super) fn enter(&self, data: &Dir) -> Result<(), DiskError> {
        if !self.simple {
            return Ok(());
        }
        let subvolume = subvolume(data)?;
        let upper = sys::upper(subvolume);
        sys::create_qgroup(data, upper)
            .and_then(|()| sys::join_qgroup(data, subvolume, upper))
            .map_err(|errno| data.failed_itself("make the quota group of", errno))
    }

    /// Limits a subvolume, unless it has this limit already. With simple quotas the limit is durable after the next commit
    /// of the filesystem.
    pub(super) fn limit(&self, data: &Dir, limit: Limit) -> Result<(), DiskError> {
        let subvolume = subvolume(data)?;
        let group = self.group(subvolume);
        let wanted = limit.bytes.map(|bytes| bytes.0);
        self.adopt_nested(data, subvolume);
        if self.limited(group) == wanted {
            return Ok(());
        }
        if self.read(group, "referenced").is_none() {
            // The subvolume was made with quotas of another kind.
            self.enter(data)?;
        }
        sys::limit_qgroup(data, group, wanted).map_err(|errno| data.failed_itself("limit the quota group of", errno))
    }

    /// With simple quotas: brings the subvolumes that a tenant has made in a volume under the limit of the volume. The kernel does
    /// so itself, unless the tenant names other groups, or none (`BTRFS_SUBVOL_QGROUP_INHERIT`), which needs no privilege.
    fn adopt_nested(&self, data: &Dir, volume: u64) {
        if self.simple
            && let Err(errno) = self.try_adopt_nested(volume)
        {
            warn!(path = %data.path().display(), %errno, "cannot find the subvolumes in a volume; they may exceed its limit");
        }
    }

    fn try_adopt_nested(&self, volume: u64) -> nix::Result<()> {
        let own = sys::upper(volume);
        let (mut parents, mut seen) = (vec![volume], 0);
        while let Some(parent) = parents.pop() {
            let mut from = 0;
            loop {
                let nested = sys::subvolumes_in(&self.outside, parent, from)?;
                let Some(last) = nested.last() else { break };
                from = last.id + 1;
                seen += nested.len();
                if seen > NESTED_MAX {
                    return Err(Errno::E2BIG);
                }
                for subvolume in nested.iter().map(|nested| nested.id) {
                    // One that is removed at this moment must not keep the others from being counted.
                    if let Err(errno) = adopt(&self.outside, subvolume, own) {
                        debug!(subvolume, %errno, "cannot count a subvolume where it belongs");
                    }
                    parents.push(subvolume);
                }
            }
        }
        Ok(())
    }

    /// What a subvolume uses; `None` if quotas do not count it now.
    pub(super) fn usage(&self, data: &Dir) -> Result<Option<Usage>, DiskError> {
        let subvolume = subvolume(data)?;
        self.adopt_nested(data, subvolume);
        let group = self.group(subvolume);
        // The usage on the disk changes only when the filesystem commits; add what is on its way there.
        let under_way = self.read(group, "rsv_data").unwrap_or_default();
        let usage = |bytes| Usage {
            bytes: Bytes(bytes).plus(Bytes(under_way)),
            inodes: None,
        };
        Ok(self.read(group, "referenced").map(usage))
    }

    /// Notes that a subvolume is destroyed.
    pub(super) fn note_destroyed(&self, subvolume: u64) {
        self.lock().insert(subvolume);
    }

    /// Finds hostdir's groups whose subvolume an earlier process has destroyed.
    pub(super) fn sweep(&self, dir: &Dir) {
        let prefix = format!("{}_", sys::LEVEL);
        let groups = fs::read_dir(&self.sysfs).into_iter().flatten().flatten();
        let named = groups.filter_map(|group| group.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok());
        let gone = named.filter(|id| sys::exists(dir, *id) == Ok(false));
        let gone: Vec<u64> = gone.collect();
        self.lock().extend(gone);
    }

    /// Removes the groups of destroyed subvolumes, which the kernel allows when it has cleaned up after them (Linux 6.12 and
    /// later remove the groups themselves). Returns whether some are left.
    pub(super) fn release_unused(&self, dir: &Dir) -> bool {
        let destroyed: Vec<u64> = self.lock().iter().copied().collect();
        for id in destroyed {
            let upper = sys::upper(id);
            // Expected errors: EBUSY before the kernel has cleaned up, ENOENT if it has removed the group, ENOTCONN if
            // quotas are off.
            if self.read(upper, "referenced").is_some() {
                let _ = sys::leave_qgroup(dir, id, upper);
                let _ = sys::remove_qgroup(dir, upper);
            }
            if self.read(id, "referenced").is_some() {
                let _ = sys::remove_qgroup(dir, id);
            }
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
        // A panic leaves no change half done: each is one statement.
        self.destroyed.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (level, id) = (group >> 48, sys::number(group));
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

/// Puts a subvolume into the group `own`, and takes it out of hostdir's other groups.
fn adopt(dir: &Dir, subvolume: u64, own: u64) -> nix::Result<()> {
    let groups = sys::groups_of(dir, subvolume)?;
    let foreign = groups
        .iter()
        .filter(|group| **group != own && **group >> 48 == sys::LEVEL);
    for group in foreign {
        warn!(path = %dir.path().display(), subvolume, group = sys::number(*group), own = sys::number(own),
            "a subvolume in a volume counted towards another volume's limit; now it counts towards its own");
        sys::leave_qgroup(dir, subvolume, *group)?;
    }
    if groups.contains(&own) {
        return Ok(());
    }
    sys::join_qgroup(dir, subvolume, own)
}

/// Makes a subvolume, unless there is one. Replaces an empty directory.
pub(super) fn ensure_subvolume(dir: &Dir, name: &CStr) -> Result<Dir, DiskError> {
    if let Some(found) = dir.find_child(name)? {
        if is_subvolume(&found)? {
            return Ok(found);
        }
        // An attempt while quotas were off has left an empty directory.
        dir.rmdir(name).map_err(|errno| dir.failed("remove", name, errno))?;
    }
    sys::create_subvolume(dir, name).map_err(|errno| dir.failed("make subvolume", name, errno))?;
    // fsync(2) does not commit a new subvolume on every kernel.
    syncfs(dir).map_err(|errno| dir.failed_itself("sync the filesystem of", errno))?;
    dir.child(name)
}

/// Whether a directory on btrfs is the top of a subvolume.
pub(super) fn is_subvolume(dir: &Dir) -> Result<bool, DiskError> {
    Ok(dir.inode()?.ino == sys::TOP_INODE)
}

/// What became of a directory that may be a subvolume.
pub(in crate::linux) enum Destroyed {
    NoSubvolume,
    /// It was a subvolume and is destroyed.
    Gone,
    /// It is a subvolume with others in it: the directories these are in, and their names. Possibly not all of them.
    Holds(Vec<(Dir, CString)>),
}

/// How many nested subvolumes are moved out of another at once: each keeps a descriptor open.
const NESTED_AT_ONCE: usize = 8;

/// How many subvolumes are looked for in a volume: this takes a fraction of a second.
const NESTED_MAX: usize = 10_000;

/// Destroys `name` in `dir`, if it is a subvolume without others in it.
pub(super) fn destroy(dir: &Dir, name: &CStr, destroyed: impl Fn(u64)) -> Result<Destroyed, DiskError> {
    // If it cannot be opened, it is not a subvolume, or something is mounted on it.
    let Ok(top) = dir.child(name) else {
        return Ok(Destroyed::NoSubvolume);
    };
    let Some(id) = is_subvolume(&top)?.then(|| sys::subvolume_of(&top).ok()).flatten() else {
        return Ok(Destroyed::NoSubvolume);
    };
    // The kernel would unmount what is mounted in the subvolume.
    if mountinfo::read()?
        .iter()
        .any(|entry| entry.mount_point.starts_with(top.path()))
    {
        return Err(dir.failed("destroy subvolume", name, Errno::EBUSY));
    }
    let failed = |errno| dir.failed("destroy subvolume", name, errno);
    // Moving a subvolume out of this one needs free space in it, and that it is writable.
    for group in [id, sys::upper(id)] {
        let _ = sys::limit_qgroup(dir, group, None);
    }
    sys::make_writable(&top).map_err(failed)?;
    // The others are found when these are gone.
    let nested = sys::subvolumes_in(dir, id, 0).map_err(failed)?;
    if !nested.is_empty() {
        let located = nested.into_iter().take(NESTED_AT_ONCE).map(|nested| {
            let names = sys::names_up_from(&top, id, nested.directory).map_err(failed)?;
            let within = names
                .iter()
                .rev()
                .try_fold(top.child(c".")?, |at, name| at.child(name))?;
            // A read-only subvolume cannot be moved.
            sys::make_writable(within.child(&nested.name)?).map_err(failed)?;
            Ok((within, nested.name))
        });
        return located.collect::<Result<_, DiskError>>().map(Destroyed::Holds);
    }
    if top.stat(c"").is_ok_and(|stat| stat.is_immutable()) {
        clear_immutable(&top).map_err(failed)?;
    }
    drop(top);
    sys::destroy_subvolume(dir, id).map_err(failed)?;
    destroyed(id);
    Ok(Destroyed::Gone)
}

fn is_simple(sysfs: &Path) -> bool {
    fs::read_to_string(sysfs.join("mode")).is_ok_and(|mode| mode.trim() == "squota")
}

fn subvolume(data: &Dir) -> Result<u64, DiskError> {
    sys::subvolume_of(data).map_err(|errno| data.failed_itself("find the subvolume of", errno))
}
