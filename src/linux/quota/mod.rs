//! Holding volumes to their sizes, by what the filesystem of a pool has for that: [`projects`] on XFS and ext4, [`qgroups`] on
//! btrfs, nothing elsewhere.
//!
//! It is found out once, when the pool is opened; whether it still works is asked of the kernel whenever somebody wants to
//! know. Limits follow the records: they are set before a pod can write, and compared when the pool is opened and whenever a
//! volume is mounted.

mod projects;
mod qgroups;
mod sorting;

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::dir::Dir;
use super::mountinfo;
use crate::volume::id::VolumeId;
use crate::volume::ports::{DiskError, DiskErrorKind, Found, Unusable, Usage};
use crate::volume::quota::{Means, Policy, Quotas};
use crate::volume::record::{Phase, Record};
use crate::volume::size::Bytes;
use projects::ProjectQuota;
pub(super) use qgroups::Destroyed;
use qgroups::Qgroups;
use sorting::Standing;

/// What a volume may take at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    bytes: Option<Bytes>,
    inodes: Option<u64>,
}

impl Limit {
    const NONE: Self = Self {
        bytes: None,
        inodes: None,
    };
}

/// What holds the volumes of one pool to their sizes.
pub(super) struct Quota {
    wishes: Quotas,
    kind: Kind,
    /// Volumes that are held to nothing, and why.
    loose: Mutex<HashMap<VolumeId, String>>,
}

enum Kind {
    Projects(ProjectQuota),
    Qgroups(Qgroups),
    /// Nothing, and why.
    None(String),
}

impl Quota {
    /// What there is on the filesystem of a pool, whose volumes are in `volumes`.
    pub(super) fn find(wishes: Quotas, volumes: &Dir, mount: &mountinfo::Entry) -> Result<Self, Unusable> {
        let kind = match mount.filesystem.as_str() {
            "btrfs" => Qgroups::find(volumes).map(Kind::Qgroups),
            filesystem => ProjectQuota::find(wishes.projects, volumes, filesystem).map(Kind::Projects),
        };
        let kind = match (kind, wishes.policy) {
            (Ok(kind), _) => kind,
            (Err(why), Policy::Required) => {
                return Err(Unusable(format!("quotas are required of it, and {why}")));
            }
            (Err(why), Policy::Auto | Policy::Off) => Kind::None(why),
        };
        if wishes.inodes_per_gib.is_some() && !matches!(kind, Kind::Projects(_)) {
            let why = "only project quotas (XFS, ext4) limit inodes";
            if wishes.policy == Policy::Required {
                return Err(Unusable(format!("inodesPerGiB is set, and {why}; take it out")));
            }
            warn!(path = %volumes.path().display(), why, "inodesPerGiB has no effect on this pool");
        }
        Ok(Self {
            wishes,
            kind,
            loose: Mutex::default(),
        })
    }

    /// By what volumes are held to their sizes, as it is now; or why by nothing, and what to do about it.
    pub(super) fn enforcement(&self, volumes: &Dir) -> Result<Means, String> {
        if self.wishes.policy == Policy::Off {
            return Err("quota is off in its configuration".into());
        }
        match &self.kind {
            Kind::Projects(projects) => projects.enforcement(volumes),
            Kind::Qgroups(qgroups) => qgroups.enforcement(),
            Kind::None(why) => Err(why.clone()),
        }
    }

    /// Why a volume is held to nothing, although others are.
    pub(super) fn loose(&self, id: &VolumeId) -> Option<String> {
        self.lock().get(id).cloned()
    }

    /// Makes the directory `name` of a volume in its own, where there is none or an empty one, and limits it. With it comes
    /// the record to write.
    pub(super) fn make(&self, volume: &Dir, name: &CStr, record: &Record) -> Result<(Dir, Record), DiskError> {
        let limit = self.limit(record.bytes);
        let mut project = None;
        let data = match (&self.kind, self.enforcement(volume)) {
            (Kind::Projects(projects), Ok(_)) => {
                let data = volume.ensure_child(name)?;
                project = Some(projects.enter(&data, &record.id, limit)?);
                data
            }
            (Kind::Qgroups(qgroups), Ok(_)) => {
                let data = qgroups::ensure_subvolume(volume, name)?;
                qgroups.enter(&data)?;
                qgroups.limit(&data, limit)?;
                data
            }
            // Asked for before, and gone since.
            (_, Err(why)) if self.wishes.policy == Policy::Required => {
                return Err(DiskError {
                    verb: "make",
                    path: volume.path().to_owned(),
                    kind: DiskErrorKind::Failed,
                    source: format!("quotas are required, and {why}").into(),
                });
            }
            (kind, _) => {
                let data = volume.ensure_child(name)?;
                // What an attempt with quotas has left must not limit it.
                match kind {
                    Kind::Projects(projects) => projects.leave(&data)?,
                    Kind::Qgroups(qgroups) if self.wishes.policy == Policy::Off && qgroups::is_subvolume(&data)? => {
                        qgroups.limit(&data, limit)?;
                    }
                    Kind::Qgroups(_) | Kind::None(_) => {}
                }
                data
            }
        };
        let record = Record {
            project,
            ..record.clone()
        };
        Ok((data, record))
    }

    /// Limits a volume, whose directory is `data`, to the size that `record` says.
    pub(super) fn resize(&self, data: &Dir, record: &Record) -> Result<(), DiskError> {
        if self.wishes.policy == Policy::Off {
            return Ok(());
        }
        let limit = self.limit(record.bytes);
        let limited = match (&self.kind, record.project) {
            // Whatever else is the matter with it: its old limit must not go on.
            (Kind::Projects(projects), Some(project)) if projects.is_of(project, &record.id) => {
                projects.limit(data, project, limit)
            }
            (Kind::Qgroups(qgroups), _) if qgroups::is_subvolume(data)? => qgroups.limit(data, limit),
            _ => Ok(()),
        };
        // Where quotas are off there is no limit to set; when they are on again, a restart sets it.
        limited.or_else(|error| self.enforcement(data).map_or(Ok(()), |_| Err(error)))
    }

    /// What a volume takes, if the filesystem keeps count of it.
    pub(super) fn usage(&self, data: &Dir, record: &Record) -> Result<Option<Usage>, DiskError> {
        if self.lock().contains_key(&record.id) {
            return Ok(None);
        }
        match (&self.kind, record.project) {
            (Kind::Projects(_), Some(project)) => ProjectQuota::usage(data, project),
            (Kind::Qgroups(qgroups), _) if qgroups::is_subvolume(data)? => qgroups.usage(data),
            _ => Ok(None),
        }
    }

    /// Sets the limits of the volumes that were found on the disk, or finds out why there can be none. `data` opens the
    /// directory of a volume, if it has one.
    pub(super) fn sort_out(&self, found: &[Found], data: impl Fn(&VolumeId) -> Result<Option<Dir>, DiskError>) {
        if let Kind::Projects(projects) = &self.kind {
            projects.know(found, &data);
        }
        for Found { id, record } in found {
            let Ok(record) = record else { continue };
            match data(id) {
                Ok(None) => {}
                Ok(Some(data)) => self.check(&data, record),
                Err(error) => self.let_loose(id, &error.with_cause()),
            }
        }
    }

    /// Looks whether a volume is what its record says, and limits it; if it is not, it is held to nothing, and its data stays
    /// in reach.
    pub(super) fn check(&self, data: &Dir, record: &Record) {
        match self.settle(data, record) {
            Ok(None) => drop(self.lock().remove(&record.id)),
            Ok(Some(why)) => self.let_loose(&record.id, &why),
            Err(error) => self.let_loose(&record.id, &error.with_cause()),
        }
    }

    /// Limits a volume; or says why it is held to nothing.
    fn settle(&self, data: &Dir, record: &Record) -> Result<Option<String>, DiskError> {
        if record.phase == Phase::Claimed {
            return Ok(None);
        }
        let limit = self.limit(record.bytes);
        match &self.kind {
            Kind::None(_) => Ok(None),
            Kind::Qgroups(qgroups) if qgroups::is_subvolume(data)? => qgroups.limit(data, limit).map(|()| None),
            Kind::Qgroups(_) => Ok(Some(
                "its directory is no subvolume of its own: it was made when this pool had no quotas; make a new volume and copy \
                 its data there"
                    .into(),
            )),
            Kind::Projects(projects) => match projects.standing(data, record)? {
                Standing::In(project) => projects.limit(data, project, limit).map(|()| None),
                Standing::Loose(why) => Ok(Some(why)),
                Standing::Unused => Ok(None),
            },
        }
    }

    fn let_loose(&self, id: &VolumeId, why: &str) {
        let known = self.lock().insert(id.clone(), why.to_owned());
        if self.wishes.policy != Policy::Off && known.as_deref() != Some(why) {
            warn!(volume.id = %id, why, "volume is held to no size");
        }
    }

    /// Notes that a volume is on its way to the trash.
    pub(super) fn forget(&self, id: &VolumeId) {
        self.lock().remove(id);
        if let Kind::Projects(projects) = &self.kind {
            projects.trashed(id);
        }
    }

    /// Makes a directory fit to be the trash of the pool.
    pub(super) fn ready_trash(&self, trash: &Dir) -> Result<(), DiskError> {
        match &self.kind {
            Kind::Projects(_) => ProjectQuota::open_to_all(trash),
            // A tenant may have given files to other projects all the same; not every filesystem knows of any.
            Kind::Qgroups(_) | Kind::None(_) => {
                let _ = ProjectQuota::open_to_all(trash);
                Ok(())
            }
        }
    }

    /// Forgets limits that a crash has left behind, once it is known which projects volumes have.
    pub(super) fn sweep(&self, dir: &Dir) {
        match &self.kind {
            Kind::Projects(projects) => projects.sweep(dir),
            Kind::Qgroups(qgroups) => qgroups.sweep(dir),
            Kind::None(_) => {}
        }
    }

    /// Notes that a directory in the trash is being erased: its project is given back when its last file is gone.
    pub(super) fn leaves(&self, trashed: &Dir) {
        if let Kind::Projects(projects) = &self.kind {
            projects.leaves(trashed);
        }
    }

    /// Destroys `name` in a directory in the trash, if it is a subvolume: its files are of a tree of their own, and cannot be
    /// moved. Subvolumes in it can, and have to be, before it can be destroyed.
    pub(super) fn destroy(&self, dir: &Dir, name: &CStr) -> Result<Destroyed, DiskError> {
        match &self.kind {
            Kind::Projects(_) => Ok(Destroyed::NoSubvolume),
            // There may be subvolumes of a time when there were quotas, or of tenants.
            Kind::None(_) => qgroups::destroy(dir, name, |_| {}),
            Kind::Qgroups(qgroups) => qgroups::destroy(dir, name, |id| qgroups.leaves(id)),
        }
    }

    /// Gives back the projects and quota groups whose last file is gone; whether some are left.
    pub(super) fn give_back(&self, dir: &Dir) -> bool {
        match &self.kind {
            Kind::Projects(projects) => projects.give_back(dir),
            Kind::Qgroups(qgroups) => qgroups.give_back(dir),
            Kind::None(_) => false,
        }
    }

    /// The limit that a volume of this size is to have: none if quotas are off.
    fn limit(&self, size: Bytes) -> Limit {
        match self.wishes.policy {
            Policy::Required | Policy::Auto => Limit {
                bytes: Some(size),
                inodes: self.wishes.inodes(size),
            },
            Policy::Off => Limit::NONE,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VolumeId, String>> {
        // Every change is one statement.
        self.loose.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
