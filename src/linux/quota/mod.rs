//! Holding volumes to their sizes, by what the filesystem of a pool has for that: [`projects`] on XFS and ext4, [`qgroups`] on
//! btrfs, nothing elsewhere.
//!
//! It is found out once, when the pool is opened; whether it still works is asked of the kernel whenever somebody wants to
//! know. Limits follow the records: they are set before a pod can write, and compared when the pool is opened.

mod projects;
mod qgroups;
mod sorting;

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use super::dir::Dir;
use super::mountinfo;
use crate::volume::id::VolumeId;
use crate::volume::ports::{DiskError, Found, Unusable, Usage};
use crate::volume::quota::{Means, Policy, Quotas};
use crate::volume::record::{Phase, Record};
use crate::volume::size::Bytes;
use projects::ProjectQuota;
use qgroups::Qgroups;
use sorting::{Standing, Tagged};

/// What a volume may take at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    bytes: Option<Bytes>,
    inodes: Option<u64>,
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
        let enforced = self.enforcement(volume);
        let mut project = None;
        let data = match (&self.kind, &enforced) {
            _ if self.wishes.policy == Policy::Off => volume.ensure_child(name)?,
            (Kind::Projects(projects), Ok(_)) => {
                let data = volume.ensure_child(name)?;
                project = Some(projects.enter(&data, limit)?);
                data
            }
            (Kind::Qgroups(qgroups), Ok(_)) => {
                let data = qgroups::ensure_subvolume(volume, name)?;
                qgroups.limit(&data, limit)?;
                data
            }
            (_, Err(why)) => {
                self.let_loose(&record.id, format!("when it was made, {why}"));
                volume.ensure_child(name)?
            }
            (Kind::None(_), Ok(_)) => volume.ensure_child(name)?,
        };
        let record = Record {
            project,
            ..record.clone()
        };
        Ok((data, record))
    }

    /// Limits a volume, whose directory is `data`, to the size that `record` says.
    pub(super) fn resize(&self, data: &Dir, record: &Record) -> Result<(), DiskError> {
        if self.lock().contains_key(&record.id) || self.enforcement(data).is_err() {
            return Ok(());
        }
        let limit = self.limit(record.bytes);
        match (&self.kind, record.project) {
            (Kind::Projects(projects), Some(project)) => projects.limit(data, project, limit),
            (Kind::Qgroups(qgroups), _) => qgroups.limit(data, limit),
            (Kind::Projects(_), None) | (Kind::None(_), _) => Ok(()),
        }
    }

    /// What a volume takes, if the filesystem keeps count of it.
    pub(super) fn usage(&self, data: &Dir, record: &Record) -> Result<Option<Usage>, DiskError> {
        if self.lock().contains_key(&record.id) {
            return Ok(None);
        }
        match (&self.kind, record.project) {
            (Kind::Projects(_), Some(project)) => ProjectQuota::usage(data, project),
            (Kind::Qgroups(qgroups), _) => qgroups.usage(data),
            (Kind::Projects(_), None) | (Kind::None(_), _) => Ok(None),
        }
    }

    /// Brings limits and records of the volumes that were found on the disk together. `data` opens the directory of one, if
    /// it has one; `rewrite` replaces a record by one that is true. A volume of which something cannot be told or done is
    /// held to nothing, and its data stays in reach.
    pub(super) fn sort_out(
        &self,
        found: &mut [Found],
        data: impl Fn(&VolumeId) -> Result<Option<Dir>, DiskError>,
        rewrite: impl Fn(&Record) -> Result<(), DiskError>,
    ) {
        match &self.kind {
            Kind::None(_) => {}
            Kind::Qgroups(qgroups) => {
                for Found { id, record } in &*found {
                    let Ok(record) = record else { continue };
                    let limited = data(id)
                        .and_then(|data| data.map_or(Ok(None), |data| self.sort_out_subvolume(qgroups, &data, record)));
                    if let Some(why) = limited.unwrap_or_else(|error| Some(error.with_cause())) {
                        self.let_loose(id, why);
                    }
                }
            }
            Kind::Projects(projects) => self.sort_out_projects(projects, found, data, rewrite),
        }
    }

    /// Why a subvolume is held to nothing, if it is.
    fn sort_out_subvolume(&self, qgroups: &Qgroups, data: &Dir, record: &Record) -> Result<Option<String>, DiskError> {
        if record.phase == Phase::Claimed {
            return Ok(None);
        }
        if !qgroups::is_subvolume(data)? {
            let why = "its directory is no subvolume of its own: it was made when this pool had no quotas; make a new volume and \
                       copy its data there";
            return Ok(Some(why.into()));
        }
        qgroups.limit(data, self.lawful(record.bytes)).map(|()| None)
    }

    fn sort_out_projects(
        &self,
        projects: &ProjectQuota,
        found: &mut [Found],
        data: impl Fn(&VolumeId) -> Result<Option<Dir>, DiskError>,
        rewrite: impl Fn(&Record) -> Result<(), DiskError>,
    ) {
        let tag_of = |id: &VolumeId| data(id)?.map(|data| ProjectQuota::tag(&data)).transpose();
        let tagged: Vec<Tagged> = found
            .iter()
            .map(|Found { id, record }| {
                let tag = tag_of(id).unwrap_or_else(|error| {
                    self.let_loose(id, error.with_cause());
                    None
                });
                Tagged::new(id, record.as_ref().ok(), tag)
            })
            .collect();
        projects.know(&tagged);
        for (Found { id, record }, standing) in found.iter_mut().zip(sorting::sort(&tagged, self.wishes.projects)) {
            match (record, standing) {
                (Err(_), _) | (_, Standing::Unused) => {}
                (_, Standing::Loose(why)) => self.let_loose(id, why),
                (Ok(record), Standing::In(project)) => {
                    if record.project != Some(project) {
                        warn!(volume.id = %id, said = ?record.project, project, "volume.json named another project than the directory has; corrected");
                        record.project = Some(project);
                        if let Err(error) = rewrite(record) {
                            warn!(volume.id = %id, error = error.with_cause(), "cannot correct volume.json; a restart tries again");
                        }
                    }
                    let limit = |data| projects.limit(&data, project, self.lawful(record.bytes));
                    if let Err(error) = data(id).and_then(|data| data.map_or(Ok(()), limit)) {
                        self.let_loose(id, error.with_cause());
                    }
                }
            }
        }
    }

    fn let_loose(&self, id: &VolumeId, why: String) {
        if self.wishes.policy != Policy::Off {
            info!(volume.id = %id, why, "volume is held to no size");
        }
        self.lock().insert(id.clone(), why);
    }

    /// Notes that a volume is on its way to the trash.
    pub(super) fn forget(&self, id: &VolumeId) {
        self.lock().remove(id);
    }

    /// Makes a directory fit to be the trash of the pool.
    pub(super) fn ready_trash(&self, trash: &Dir) -> Result<(), DiskError> {
        match &self.kind {
            Kind::Projects(_) => ProjectQuota::open_to_all(trash),
            Kind::Qgroups(_) | Kind::None(_) => Ok(()),
        }
    }

    /// Forgets limits that a crash has left behind, once it is known which projects volumes have.
    pub(super) fn sweep(&self, dir: &Dir) {
        if let Kind::Projects(projects) = &self.kind {
            projects.sweep(dir);
        }
    }

    /// Notes that a directory in the trash is being erased: its project is given back when its last file is gone.
    pub(super) fn leaves(&self, trashed: &Dir) {
        if let Kind::Projects(projects) = &self.kind {
            projects.leaves(trashed);
        }
    }

    /// Destroys `name` in a directory in the trash, if it is a subvolume: its files are of a tree of their own, and cannot be
    /// moved. Says whether it was one.
    pub(super) fn destroy(&self, dir: &Dir, name: &CStr) -> Result<bool, DiskError> {
        match &self.kind {
            Kind::Qgroups(qgroups) => {
                let destroyed = qgroups::destroy(dir, name)?;
                let any = !destroyed.is_empty();
                qgroups.leave(destroyed);
                Ok(any)
            }
            // There may be subvolumes of a time when there were quotas, or of tenants.
            Kind::None(_) => Ok(!qgroups::destroy(dir, name)?.is_empty()),
            Kind::Projects(_) => Ok(false),
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

    /// The limit of a volume of this size, were quotas wanted.
    fn limit(&self, size: Bytes) -> Limit {
        Limit {
            bytes: Some(size),
            inodes: self.wishes.inodes(size),
        }
    }

    /// The limit that a volume of this size is to have: none if quotas are off.
    fn lawful(&self, size: Bytes) -> Limit {
        match self.wishes.policy {
            Policy::Required | Policy::Auto => self.limit(size),
            Policy::Off => Limit {
                bytes: None,
                inodes: None,
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VolumeId, String>> {
        // Every change is one statement.
        self.loose.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
