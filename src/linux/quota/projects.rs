//! Project quotas of XFS and ext4: every volume has a project of its own, which its files inherit.
//!
//! The order in which a volume takes a project keeps a crash or another process from giving it to two volumes: the directory
//! enters the project, then it must be the only file there, then the limit is set, and the record is written last. So the
//! limits of a project without files may always be removed. A project is released when the last of its files is erased.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;
use tracing::{debug, warn};

use super::Limit;
use super::membership::{self, Membership, Tagged};
use crate::linux::dir::Dir;
use crate::linux::sys::quota::{self as sys, Project, Tag};
use crate::linux::sys::random;
use crate::volume::disk::{DiskError, DiskErrorKind, PoolVolume, Usage};
use crate::volume::id::VolumeId;
use crate::volume::quota::{ProjectRange, QuotaKind};
use crate::volume::record::Record;
use crate::volume::size::Bytes;

/// The projects of one pool.
pub(super) struct ProjectQuota {
    range: ProjectRange,
    filesystem: String,
    /// Block size of the filesystem, in bytes: limits are whole blocks.
    block: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The projects of volumes, and whose they are: several volumes only if records are wrong, none if the project is in
    /// `erasing`.
    taken: BTreeMap<u32, Vec<VolumeId>>,
    /// The projects of files that are being erased.
    erasing: BTreeSet<u32>,
}

impl State {
    /// Takes a project for a volume, unless it is another's. Returns whether it is now this volume's.
    fn take(&mut self, project: u32, id: &VolumeId) -> bool {
        let owners = self.taken.entry(project).or_insert_with(|| vec![id.clone()]);
        *owners == [id.clone()]
    }
}

impl ProjectQuota {
    /// The projects of the filesystem that `volumes` is on, or why there are none and what to do about it.
    pub(super) fn find(range: ProjectRange, volumes: &Dir, filesystem: &str) -> Result<Self, String> {
        let block = fstatvfs(volumes)
            .map_err(|errno| format!("statvfs: {errno}"))?
            .fragment_size();
        let found = Self {
            range,
            filesystem: filesystem.to_owned(),
            block: block.max(sys::BASIC_BLOCK),
            state: Mutex::default(),
        };
        found.enforcement(volumes)?;
        Ok(found)
    }

    /// Whether the kernel limits projects now.
    pub(super) fn enforcement(&self, volumes: &Dir) -> Result<QuotaKind, String> {
        let off = match sys::project_state(volumes) {
            Ok(state) if state.enforced => return Ok(QuotaKind::Projects),
            Ok(state) if state.accounted => "project quotas count what volumes use, but do not limit it",
            Ok(_) => "project quotas are off",
            Err(Errno::EPERM) => "hostdir may not read quotas (it needs CAP_SYS_ADMIN)",
            Err(errno) => errno.desc(),
        };
        let cure = match self.filesystem.as_str() {
            "xfs" => "unmount it and mount it with -o prjquota (a remount does not switch them on)",
            "ext4" => {
                "unmount it, run `tune2fs -O project,quota -Q prjquota` on its device, and mount it with -o prjquota"
            }
            other => {
                return Err(format!(
                    "{other} has no quotas that hostdir can set; put the pool on XFS, ext4 or btrfs"
                ));
            }
        };
        Err(format!(
            "{off} on this {} filesystem; {cure}, then restart hostdir on this node",
            self.filesystem
        ))
    }

    /// Notes which projects the volumes of the pool have.
    pub(super) fn note_volumes(
        &self,
        found: &[PoolVolume],
        data: impl Fn(&VolumeId) -> Result<Option<Dir>, DiskError>,
    ) {
        for PoolVolume { id, record, .. } in found {
            let record = record.as_ref().ok();
            // The directory counts only if the record cannot be read.
            let tag = || data(id).ok()?.and_then(|data| Self::tag(&data).ok());
            let tag = if record.is_none() { tag() } else { None };
            if let Some(project) = Tagged::new(id, record, tag).project() {
                let mut state = self.lock();
                let owners = state.taken.entry(project).or_default();
                // One whose record could not be read is noted already.
                if !owners.contains(id) {
                    owners.push(id.clone());
                }
            }
        }
    }

    /// Which project a volume is in.
    pub(super) fn membership(&self, data: &Dir, record: &Record) -> Result<Membership, DiskError> {
        let volume = Tagged::new(&record.id, Some(record), Some(Self::tag(data)?));
        let other = |project: u32, id: &VolumeId| {
            let state = self.lock();
            let owners = state.taken.get(&project)?;
            owners.iter().find(|owner| *owner != id).cloned()
        };
        Ok(membership::membership(&volume, other, self.range))
    }

    /// Whether a project belongs to this volume and to no other.
    pub(super) fn is_of(&self, project: u32, id: &VolumeId) -> bool {
        self.lock()
            .taken
            .get(&project)
            .is_some_and(|owners| *owners == [id.clone()])
    }

    /// The project that a directory has.
    pub(super) fn tag(dir: &Dir) -> Result<Tag, DiskError> {
        sys::tag(dir).map_err(|errno| dir.failed_itself("read the project of", errno))
    }

    /// Gives an empty directory a project of its own, with a limit.
    pub(super) fn enter(&self, data: &Dir, volume: &VolumeId, limit: Limit) -> Result<u32, DiskError> {
        let before = Self::tag(data)?;
        // An interrupted attempt may have left a project.
        let left = before.inherited && self.range.contains(before.project);
        let first = left.then_some(before.project);
        // Two pools on one filesystem should not try the same ids in the same order.
        let start = random().map_err(|errno| data.failed_itself("choose a project for", errno))?;
        for id in first.into_iter().chain(self.range.from(u64::from_ne_bytes(start))) {
            if !self.lock().take(id, volume) {
                continue;
            }
            let entered = self.try_enter(data, before, id, limit);
            if let Ok(true) = entered {
                return Ok(id);
            }
            self.lock().taken.remove(&id);
            entered?;
        }
        Err(self.none_left(data))
    }

    fn none_left(&self, data: &Dir) -> DiskError {
        let ProjectRange { first, last } = self.range;
        DiskError {
            verb: "give a project of its own to",
            path: data.path().to_owned(),
            kind: DiskErrorKind::Failed,
            source: format!("all ids from {first} to {last} are in use on this filesystem; widen projectIds").into(),
        }
    }

    /// Takes an empty directory out of the project that an earlier attempt with quotas has left it in.
    pub(super) fn leave(&self, data: &Dir) -> Result<(), DiskError> {
        let before = Self::tag(data)?;
        if before.inherited && self.range.contains(before.project) {
            self.lock().erasing.insert(before.project);
            sys::set_tag(data, Tag::default()).map_err(|errno| data.failed_itself("remove the project of", errno))?;
        }
        Ok(())
    }

    /// Enters a project, if nothing on this filesystem uses it. Returns whether it did.
    fn try_enter(&self, data: &Dir, before: Tag, id: u32, limit: Limit) -> Result<bool, DiskError> {
        let tag = Tag {
            project: id,
            inherited: true,
        };
        if before != tag {
            let unused = Project {
                id,
                ..Project::default()
            };
            if Self::project(data, id)? != unused {
                return Ok(false);
            }
            sys::set_tag(data, tag).map_err(|errno| match errno {
                Errno::EINVAL | Errno::EOPNOTSUPP if id > u32::from(u16::MAX) => {
                    let verb =
                        "give a project (XFS without projid32bit has no project ids above 65535: set projectIds) to";
                    data.failed_itself(verb, errno)
                }
                errno => data.failed_itself("set the project of", errno),
            })?;
        }
        // Another process may have entered it at the same moment: then at least one of the two sees that here.
        let found = Self::project(data, id)?;
        if found.inodes != 1 {
            return Ok(false);
        }
        self.limit_from(data, found, limit)?;
        Ok(true)
    }

    /// Limits a project, unless it has this limit already.
    pub(super) fn limit(&self, data: &Dir, id: u32, limit: Limit) -> Result<(), DiskError> {
        self.limit_from(data, Self::project(data, id)?, limit)
    }

    /// Limits a project that was just read as `found`.
    fn limit_from(&self, data: &Dir, found: Project, limit: Limit) -> Result<(), DiskError> {
        let id = found.id;
        let bytes = limit.bytes.map_or(0, |bytes| self.whole_blocks(bytes));
        let inodes = limit.inodes.unwrap_or(0);
        if (found.bytes_max, found.inodes_max) == (bytes, inodes) {
            return Ok(());
        }
        debug!(project = id, bytes, inodes, "limit");
        sys::limit_project(data, id, bytes, inodes).map_err(|errno| data.failed_itself("limit the project of", errno))
    }

    /// What a project uses; `None` if quotas do not count it now.
    pub(super) fn usage(data: &Dir, id: u32) -> Result<Option<Usage>, DiskError> {
        match sys::project(data, id) {
            Ok(found) => Ok(Some(Usage {
                bytes: Bytes(found.bytes),
                inodes: Some(found.inodes),
            })),
            // Quotas have been switched off.
            Err(Errno::ENOSYS | Errno::ESRCH | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(data.failed_itself("read the quota of", errno)),
        }
    }

    /// Notes that a volume is being erased.
    pub(super) fn note_trashed(&self, id: &VolumeId) {
        let mut state = self.lock();
        let State { taken, erasing } = &mut *state;
        for (project, owners) in taken.iter_mut().filter(|(_, owners)| owners.contains(id)) {
            owners.retain(|owner| owner != id);
            if owners.is_empty() {
                erasing.insert(*project);
            }
        }
    }

    /// Notes that a directory in the trash is being erased: it may be from a time before this process. A directory that a
    /// tenant has put into the project of a volume changes nothing.
    pub(super) fn note_erasing(&self, trashed: &Dir) {
        match sys::tag(trashed) {
            Ok(Tag { project, .. }) if self.range.contains(project) => {
                let mut state = self.lock();
                if state.taken.entry(project).or_default().is_empty() {
                    state.erasing.insert(project);
                }
            }
            Ok(_) => {}
            Err(errno) => {
                warn!(path = %trashed.path().display(), %errno, "cannot read the project of a directory that is being erased");
            }
        }
    }

    /// Lets files of all projects be moved into a directory: one that is in a project itself would refuse files of others.
    pub(super) fn accept_all(dir: &Dir) -> Result<(), DiskError> {
        let tag = Self::tag(dir)?;
        if !tag.inherited {
            return Ok(());
        }
        let open = Tag {
            inherited: false,
            ..tag
        };
        sys::set_tag(dir, open).map_err(|errno| dir.failed_itself("accept files of all projects in", errno))
    }

    /// Releases the projects whose last file is gone. Returns whether some are left: XFS updates its counts with a delay.
    pub(super) fn release_unused(&self, dir: &Dir) -> bool {
        let erasing: Vec<u32> = self.lock().erasing.iter().copied().collect();
        for id in erasing {
            match self.forget_unused(dir, id) {
                Ok(true) => {
                    let mut state = self.lock();
                    state.erasing.remove(&id);
                    if state.taken.get(&id).is_some_and(Vec::is_empty) {
                        state.taken.remove(&id);
                    }
                }
                Ok(false) => {}
                Err(error) => warn!(
                    project = id,
                    error = error.with_cause(),
                    "cannot release a project yet; trying again"
                ),
            }
        }
        !self.lock().erasing.is_empty()
    }

    /// Removes the limits of a project without files. Returns whether it has none.
    fn forget_unused(&self, dir: &Dir, id: u32) -> Result<bool, DiskError> {
        let found = Self::project(dir, id)?;
        if (found.inodes, found.bytes) != (0, 0) {
            return Ok(false);
        }
        self.limit_from(dir, found, Limit::NONE)?;
        Ok(true)
    }

    /// Finds projects that a crash has left behind, and removes their limits.
    pub(super) fn sweep(&self, dir: &Dir) {
        let mut next = Some(self.range.first);
        while let Some(id) = next {
            let found = match sys::next_project(dir, id) {
                Ok(Some(found)) if found.id <= self.range.last => found,
                Ok(_) => return,
                Err(errno) => return debug!(%errno, "cannot list projects"),
            };
            if !self.lock().taken.contains_key(&found.id) {
                match self.forget_unused(dir, found.id) {
                    Ok(true) => {}
                    // It belongs to the trash, or to another pool: check again until it has no files.
                    Ok(false) => drop(self.lock().erasing.insert(found.id)),
                    Err(error) => {
                        warn!(
                            project = found.id,
                            error = error.with_cause(),
                            "cannot remove the limit of a project that no volume has"
                        );
                    }
                }
            }
            next = found.id.checked_add(1);
        }
    }

    fn project(file: &Dir, id: u32) -> Result<Project, DiskError> {
        let found = sys::project(file, id).map_err(|errno| file.failed_itself("read the quota of", errno))?;
        Ok(Project { id, ..found })
    }

    /// A size in whole blocks of the filesystem: a volume must be able to hold all that is allocated to it.
    fn whole_blocks(&self, size: Bytes) -> u64 {
        size.0.div_ceil(self.block).max(1).saturating_mul(self.block)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one statement, and a project that a panic leaves behind counts as in use.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
