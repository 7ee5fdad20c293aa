//! Quotas limit volumes to their sizes: [`projects`] on XFS and ext4, [`qgroups`] on btrfs. Other filesystems have none.
//!
//! The kind of quotas is determined when the pool is opened; the kernel is asked each time whether they still work. Limits
//! follow the records: they are set before a pod can write, and checked when the pool is opened and whenever a volume is
//! mounted.

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

/// What a volume may use at most.
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
    /// No quotas, and why.
    None(String),
}

impl Quota {
    /// Finds the quotas on the filesystem of a pool, whose volumes are in `volumes`.
    pub(super) fn find(config: QuotaConfig, volumes: &Dir, mount: &mountinfo::Entry) -> Result<Self, Unusable> {
        let kind = match mount.filesystem.as_str() {
            "btrfs" => Qgroups::find(volumes).map(Kind::Qgroups),
            filesystem => ProjectQuota::find(config.projects, volumes, filesystem).map(Kind::Projects),
        };
        let kind = match (kind, config.policy) {
            (Ok(kind), _) => kind,
            (Err(why), QuotaPolicy::Required) => {
                return Err(Unusable(format!("quotas are required of this pool, and {why}")));
            }
            (Err(why), QuotaPolicy::Auto | QuotaPolicy::Off) => Kind::None(why),
        };
        if config.inodes_per_gib.is_some() && !matches!(kind, Kind::Projects(_)) {
            let why = "only project quotas (XFS, ext4) limit inodes";
            if config.policy == QuotaPolicy::Required {
                return Err(Unusable(format!("inodesPerGiB is set, and {why}; remove it")));
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
            return Err("quota is off in the configuration of this pool".into());
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

    /// Makes the directory `name` in the directory of a volume, unless there is an empty one already, and limits it. Also
    /// returns the record to write.
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
            // The pool had quotas when it was opened; they are gone since.
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
                // A limit that an earlier attempt with quotas has left must not apply.
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

    /// Limits a volume, whose directory is `data`, to the size in `record`.
    pub(super) fn resize(&self, data: &Dir, record: &Record) -> Result<(), DiskError> {
        if self.config.policy == QuotaPolicy::Off {
            return Ok(());
        }
        let limit = self.limit(record.spec.bytes);
        let limited = match (&self.kind, record.project) {
            // Whatever else is wrong with the volume, its old limit must not stay.
            (Kind::Projects(projects), Some(project)) if projects.is_of(project, &record.id) => {
                projects.limit(data, project, limit)
            }
            (Kind::Qgroups(qgroups), _) if qgroups::is_subvolume(data)? => qgroups.limit(data, limit),
            _ => Ok(()),
        };
        // If quotas are off, there is no limit to set; when they are on again, a restart sets it.
        limited.or_else(|error| self.enforcement(data).map_or(Ok(()), |_| Err(error)))
    }

    /// What a volume uses, if the filesystem counts it.
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

    /// Sets the limits of the volumes that were found on the disk, or notes why they cannot be set. `data` opens the
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

    /// Limits a volume, if its directory matches its record. Otherwise it has no limit from now on, and its data stays
    /// accessible.
    pub(super) fn enforce(&self, data: &Dir, record: &Record) {
        match self.try_enforce(data, record) {
            Ok(None) => drop(self.lock().remove(&record.id)),
            Ok(Some(why)) => self.set_unenforced(&record.id, &why),
            Err(error) => self.set_unenforced(&record.id, &error.with_cause()),
        }
    }

    /// Limits a volume. Returns the reason if that is not possible.
    fn try_enforce(&self, data: &Dir, record: &Record) -> Result<Option<String>, DiskError> {
        if !record.ready {
            return Ok(None);
        }
        let limit = self.limit(record.spec.bytes);
        match &self.kind {
            Kind::None(_) => Ok(None),
            Kind::Qgroups(qgroups) if qgroups::is_subvolume(data)? => qgroups.limit(data, limit).map(|()| None),
            Kind::Qgroups(_) => Ok(Some(
                "its directory is not a subvolume of its own: it was made when this pool had no quotas; make a new volume \
                 and copy its data there"
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

    /// Notes that a volume was moved to the trash.
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
            // Tenants may have put files into projects here, too. Not every filesystem has projects, so errors do not
            // matter.
            Kind::Qgroups(_) | Kind::None(_) => {
                let _ = ProjectQuota::accept_all(trash);
                Ok(())
            }
        }
    }

    /// Removes limits that a crash has left behind. Call it only when the projects of all volumes are known.
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

    /// Destroys `name` in a directory in the trash, if it is a subvolume: its files belong to a tree of their own and cannot
    /// be moved out. Subvolumes in it can be moved, and must be, before it can be destroyed.
    pub(super) fn destroy(&self, dir: &Dir, name: &CStr) -> Result<Destroyed, DiskError> {
        match &self.kind {
            Kind::Projects(_) => Ok(Destroyed::NoSubvolume),
            // There may be subvolumes from a time when there were quotas, or made by tenants.
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

    /// The limit for a volume of this size: none if quotas are off.
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
        // A panic leaves no change half done: each is one statement.
        self.unenforced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
