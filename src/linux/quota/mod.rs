//! Quotas: volumes are limited to their sizes by what the filesystem of a pool has for that: [`projects`] on XFS and ext4,
//! [`qgroups`] on btrfs, nothing elsewhere.
//!
//! What there is, is found out when the pool is opened; whether it still works is asked of the kernel each time. Limits follow the records: they are set before a pod can write, and compared when the pool is opened and whenever a
//! volume is mounted.

mod membership;
mod projects;
mod qgroups;

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::dir::Dir;
use super::mountinfo;
use crate::volume::disk::{DiskError, DiskErrorKind, PoolVolume, Unusable, Usage};
use crate::volume::id::VolumeId;
use crate::volume::quota::{QuotaConfig, QuotaKind, QuotaPolicy};
use crate::volume::record::Record;
use crate::volume::size::Bytes;
use membership::Membership;
use projects::ProjectQuota;
pub(super) use qgroups::Destroyed;
use qgroups::Qgroups;

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

/// The quotas of one pool.
pub(super) struct Quota {
    config: QuotaConfig,
    kind: Kind,
    /// Volumes that have no limit, and why.
    unenforced: Mutex<HashMap<VolumeId, String>>,
}

enum Kind {
    Projects(ProjectQuota),
    Qgroups(Qgroups),
    /// Nothing, and why.
    None(String),
}

impl Quota {
    /// What there is on the filesystem of a pool, whose volumes are in `volumes`.
    pub(super) fn find(config: QuotaConfig, volumes: &Dir, mount: &mountinfo::Entry) -> Result<Self, Unusable> {
        let kind = match mount.filesystem.as_str() {
            "btrfs" => Qgroups::find(volumes).map(Kind::Qgroups),
            filesystem => ProjectQuota::find(config.projects, volumes, filesystem).map(Kind::Projects),
        };
        let kind = match (kind, config.policy) {
            (Ok(kind), _) => kind,
            (Err(why), QuotaPolicy::Required) => {
                return Err(Unusable(format!("quotas are required of it, and {why}")));
            }
            (Err(why), QuotaPolicy::Auto | QuotaPolicy::Off) => Kind::None(why),
        };
        if config.inodes_per_gib.is_some() && !matches!(kind, Kind::Projects(_)) {
            let why = "only project quotas (XFS, ext4) limit inodes";
            if config.policy == QuotaPolicy::Required {
                return Err(Unusable(format!("inodesPerGiB is set, and {why}; take it out")));
            }
            warn!(path = %volumes.path().display(), why, "inodesPerGiB has no effect on this pool");
        }
        Ok(Self {
            config,
            kind,
            unenforced: Mutex::default(),
        })
    }

    /// Which quotas limit volumes now; or why none do, and what to do about it.
    pub(super) fn enforcement(&self, volumes: &Dir) -> Result<QuotaKind, String> {
        if self.config.policy == QuotaPolicy::Off {
            return Err("quota is off in its configuration".into());
        }
        match &self.kind {
            Kind::Projects(projects) => projects.enforcement(volumes),
            Kind::Qgroups(qgroups) => qgroups.enforcement(),
            Kind::None(why) => Err(why.clone()),
        }
    }

    /// Why a volume has no limit, although others have.
    pub(super) fn unenforced(&self, id: &VolumeId) -> Option<String> {
        self.lock().get(id).cloned()
    }

    /// Makes the directory `name` of a volume in its own, where there is none or an empty one, and limits it. With it comes
    /// the record to write.
    pub(super) fn make(&self, volume: &Dir, name: &CStr, record: &Record) -> Result<(Dir, Record), DiskError> {
        let limit = self.limit(record.spec.bytes);
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
            (_, Err(why)) if self.config.policy == QuotaPolicy::Required => {
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
                    Kind::Qgroups(qgroups)
                        if self.config.policy == QuotaPolicy::Off && qgroups::is_subvolume(&data)? =>
                    {
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
        if self.config.policy == QuotaPolicy::Off {
            return Ok(());
        }
        let limit = self.limit(record.spec.bytes);
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
    pub(super) fn enforce_all(&self, found: &[PoolVolume], data: impl Fn(&VolumeId) -> Result<Option<Dir>, DiskError>) {
        if let Kind::Projects(projects) = &self.kind {
            projects.note_volumes(found, &data);
        }
        for PoolVolume { id, record, .. } in found {
            let Ok(record) = record else { continue };
            match data(id) {
                Ok(None) => {}
                Ok(Some(data)) => self.enforce(&data, record),
                Err(error) => self.set_unenforced(id, &error.with_cause()),
            }
        }
    }

    /// Limits a volume, if its directory is what its record says. If not, it has no limit from now on, and its data stays in
    /// reach.
    pub(super) fn enforce(&self, data: &Dir, record: &Record) {
        match self.try_enforce(data, record) {
            Ok(None) => drop(self.lock().remove(&record.id)),
            Ok(Some(why)) => self.set_unenforced(&record.id, &why),
            Err(error) => self.set_unenforced(&record.id, &error.with_cause()),
        }
    }

    /// Limits a volume. Returns why that is not possible, if it is not.
    fn try_enforce(&self, data: &Dir, record: &Record) -> Result<Option<String>, DiskError> {
        if !record.ready {
            return Ok(None);
        }
        let limit = self.limit(record.spec.bytes);
        match &self.kind {
            Kind::None(_) => Ok(None),
            Kind::Qgroups(qgroups) if qgroups::is_subvolume(data)? => qgroups.limit(data, limit).map(|()| None),
            Kind::Qgroups(_) => Ok(Some(
                "its directory is no subvolume of its own: it was made when this pool had no quotas; make a new volume and copy \
                 its data there"
                    .into(),
            )),
            Kind::Projects(projects) => match projects.membership(data, record)? {
                Membership::Of(project) => projects.limit(data, project, limit).map(|()| None),
                Membership::Unenforced(why) => Ok(Some(why)),
                Membership::Unused => Ok(None),
            },
        }
    }

    fn set_unenforced(&self, id: &VolumeId, why: &str) {
        let known = self.lock().insert(id.clone(), why.to_owned());
        if self.config.policy != QuotaPolicy::Off && known.as_deref() != Some(why) {
            warn!(volume.id = %id, why, "volume is not limited to its size");
        }
    }

    /// Notes that a volume is on its way to the trash.
    pub(super) fn forget(&self, id: &VolumeId) {
        self.lock().remove(id);
        if let Kind::Projects(projects) = &self.kind {
            projects.note_trashed(id);
        }
    }

    /// Lets files of all projects be moved into the trash of the pool.
    pub(super) fn prepare_trash(&self, trash: &Dir) -> Result<(), DiskError> {
        match &self.kind {
            Kind::Projects(_) => ProjectQuota::accept_all(trash),
            // A tenant may have given files to other projects all the same; not every filesystem knows of any.
            Kind::Qgroups(_) | Kind::None(_) => {
                let _ = ProjectQuota::accept_all(trash);
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

    /// Notes that a directory in the trash is being erased: its project is released when its last file is gone.
    pub(super) fn note_erasing(&self, trashed: &Dir) {
        if let Kind::Projects(projects) = &self.kind {
            projects.note_erasing(trashed);
        }
    }

    /// Destroys `name` in a directory in the trash, if it is a subvolume: its files are of a tree of their own, and cannot be
    /// moved. Subvolumes in it can, and have to be, before it can be destroyed.
    pub(super) fn destroy(&self, dir: &Dir, name: &CStr) -> Result<Destroyed, DiskError> {
        match &self.kind {
            Kind::Projects(_) => Ok(Destroyed::NoSubvolume),
            // There may be subvolumes of a time when there were quotas, or of tenants.
            Kind::None(_) => qgroups::destroy(dir, name, |_| {}),
            Kind::Qgroups(qgroups) => qgroups::destroy(dir, name, |id| qgroups.note_destroyed(id)),
        }
    }

    /// Releases the projects and quota groups whose last file is gone. Returns whether some are left.
    pub(super) fn release_unused(&self, dir: &Dir) -> bool {
        match &self.kind {
            Kind::Projects(projects) => projects.release_unused(dir),
            Kind::Qgroups(qgroups) => qgroups.release_unused(dir),
            Kind::None(_) => false,
        }
    }

    /// The limit that a volume of this size is to have: none if quotas are off.
    fn limit(&self, size: Bytes) -> Limit {
        match self.config.policy {
            QuotaPolicy::Required | QuotaPolicy::Auto => Limit {
                bytes: Some(size),
                inodes: self.config.inodes(size),
            },
            QuotaPolicy::Off => Limit::NONE,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VolumeId, String>> {
        // Every change is one statement.
        self.unenforced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
