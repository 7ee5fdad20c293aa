//! One open pool: volumes are recorded, made, limited, mounted and discarded. Its layout is in [`layout`].
//!
//! A volume appears in `volumes/` by one rename and leaves it by one rename; everything that a rename makes visible is
//! synced before the rename, and the rename is synced before the call is answered.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, OFlag};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::{Gid, Uid, fchown};
use tracing::warn;

use super::dir::{Dir, absent};
use super::durable::SyncedDir;
use super::eraser::Eraser;
use super::layout::{self, DATA, NEW_RECORD, RECORD, dir_name};
use super::quota::Quota;
use super::usage::UsageCounter;
use super::{sys, target};
use crate::volume::access::{MountOptions, TargetPath};
use crate::volume::disk::{
    Absent, BindError, Disk, DiskError, DiskErrorKind, Inode, Inspection, Measure, PoolVolume, Unusable,
};
use crate::volume::id::VolumeId;
use crate::volume::quota::QuotaKind;
use crate::volume::record::{Directory, Record};
use crate::volume::room::Space;
use crate::volume::size::Bytes;

/// One pool, opened and locked. Dropping it stops the eraser and releases the lock.
pub(super) struct PoolDisk {
    pub(super) path: PathBuf,
    /// Identity of the pool's directory when it was opened.
    pub(super) identity: Inode,
    pub(super) meta: Dir,
    pub(super) new: Dir,
    pub(super) volumes: SyncedDir,
    pub(super) trash: Arc<SyncedDir>,
    pub(super) quota: Arc<Quota>,
    pub(super) usage: UsageCounter,
    pub(super) eraser: Eraser,
    pub(super) counter: AtomicU64,
    /// Volumes whose record was replaced, and whose directory could not be synced, with how often that failed.
    pub(super) unsynced: Mutex<BTreeMap<VolumeId, u64>>,
    /// The mount that the pool was opened through.
    pub(super) mount_id: u64,
    pub(super) _lock: Flock<File>,
}

impl Disk for PoolDisk {
    fn present(&self) -> Result<(), Absent> {
        let path = self.path.display();
        let there = sys::statx(AT_FDCWD, &self.path).map_err(|errno| {
            Unusable(format!(
                "{path} is gone ({errno}); mount its disk again or make it reachable"
            ))
        });
        let there = there.map_err(Absent::Unusable)?;
        if there.inode != self.identity {
            return Err(Absent::Unusable(Unusable(format!(
                "{path} is another directory now than when hostdir opened it: its disk was unmounted or replaced; \
                 mount the old disk again, or restart hostdir to accept the new one"
            ))));
        }
        if there.mount_id != self.mount_id {
            return Err(Absent::Remounted);
        }
        Ok(())
    }

    fn inspect(&self) -> Result<Inspection, Absent> {
        self.present()?;
        Ok(Inspection {
            writable: self.check_writable(),
            space: space(&self.volumes.dir).map_err(Unusable::from),
            enforcement: self.enforcement(),
        })
    }

    fn is_settled(&self) -> bool {
        self.trash.is_settled() && self.volumes.is_settled() && self.unsynced().is_empty()
    }

    fn settle(&self) -> Result<(), DiskError> {
        let unsynced = self.unsynced().clone();
        for (id, failures) in unsynced {
            if let Some(volume) = self.volumes.dir.find_child(&dir_name(&id))? {
                volume.sync()?;
            }
            // Unless it has failed once more meanwhile.
            let mut unsynced = self.unsynced();
            if unsynced.get(&id) == Some(&failures) {
                unsynced.remove(&id);
            }
        }
        // The destination of a delete before its source, or else a crash could lose the volume.
        self.trash.settle()?;
        self.volumes.settle()?;
        self.eraser.wake();
        Ok(())
    }

    fn reload(&self, id: &VolumeId) -> Result<Record, String> {
        let record = self.read_record(id)?;
        self.enforce_all(&[PoolVolume::new(id.clone(), Ok(record.clone()))]);
        Ok(record)
    }

    fn create(&self, record: &Record) -> Result<(), DiskError> {
        let name = self.numbered(record.id.as_str());
        let id = dir_name(&record.id);
        let created = self.write_new(&name, record).and_then(|()| {
            self.new
                .move_to(&name, &self.volumes.dir, &id)
                .map_err(|errno| self.volumes.dir.failed("create", &id, errno))
        });
        if let Err(error) = created {
            self.remove_new(&name);
            return Err(error);
        }
        self.volumes.sync(self.volumes.changed()).map_err(unsettled)
    }

    fn make_directory(&self, record: &Record) -> Result<Record, DiskError> {
        let volume = self.open_volume(&record.id)?;
        let (data, record) = self.quota.make(&volume, DATA, record)?;
        let Directory { mode, uid, gid } = record.spec.directory;
        fchown(&data, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .and_then(|()| fchmod(&data, Mode::from_bits_truncate(mode)))
            .map_err(|errno| data.failed_itself("set the owner and mode of", errno))?;
        data.sync()?;
        // The directory must be durable before the record says that it exists.
        volume.sync()?;
        self.replace_record(&volume, &record)?;
        Ok(record)
    }

    fn resize(&self, record: &Record) -> Result<(), DiskError> {
        let volume = self.open_volume(&record.id)?;
        // The limit comes first: an answer promises the new size, and a limit that is too large is corrected when the pool
        // is opened.
        if let Some(data) = volume.find_child(DATA)? {
            self.quota.resize(&data, record)?;
        }
        self.replace_record(&volume, record)
    }

    fn enforcement(&self) -> Result<QuotaKind, String> {
        self.quota.enforcement(&self.volumes.dir)
    }

    fn unenforced(&self, id: &VolumeId) -> Option<String> {
        self.quota.unenforced(id)
    }

    fn enforce(&self, record: &Record) -> Result<(), DiskError> {
        self.quota.enforce(&self.open_data(&record.id)?, record);
        Ok(())
    }

    fn measure(&self, record: &Record, mounted: Inode) -> Result<Measure, DiskError> {
        let Some(data) = absent(self.open_data(&record.id))? else {
            return Ok(Measure::Elsewhere);
        };
        if data.inode()? != mounted {
            return Ok(Measure::Elsewhere);
        }
        match self.quota.usage(&data, record)? {
            None => self.usage.measure(&record.id),
            Some(counted) => Ok(Measure::Takes(counted)),
        }
    }

    fn data(&self, id: &VolumeId) -> Result<Option<Inode>, DiskError> {
        absent(self.open_data(id))?.map(|data| data.inode()).transpose()
    }

    fn bind(&self, id: &VolumeId, target: &TargetPath, options: MountOptions) -> Result<bool, BindError> {
        let data = absent(self.open_data(id))?.ok_or(BindError::NoData)?;
        let bound = target::bind(&data, target, options)?;
        // Says when a pod used the volume last. On a disk that is read-only by now, it says so no more.
        let _ = self.volumes.dir.touch(&dir_name(id));
        Ok(bound)
    }

    fn discard(&self, id: &VolumeId) -> Result<(), DiskError> {
        let name = dir_name(id);
        let volumes = &self.volumes.dir;
        match self.move_to_trash(volumes, &name) {
            // Either the volume or the trash is missing: rename(2) returns the same error for both.
            Err(Errno::ENOENT) if volumes.stat(&name).err() != Some(Errno::ENOENT) => {
                let verb = "discard (the trash directory is missing; restart hostdir to make it again)";
                return Err(volumes.failed(verb, &name, Errno::ENOENT));
            }
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(volumes.failed("discard", &name, errno)),
        }
        self.quota.forget(id);
        self.usage.forget(id);
        let (gone_to, gone_from) = (self.trash.changed(), self.volumes.changed());
        // The destination before the source, or else a crash could lose the volume.
        self.trash.sync(gone_to).map_err(|error| {
            self.volumes.owe(gone_from);
            unsettled(error)
        })?;
        self.volumes.sync(gone_from).map_err(unsettled)?;
        self.eraser.wake();
        Ok(())
    }
}

impl PoolDisk {
    /// The volumes on the disk.
    pub(super) fn load(&self) -> Result<Vec<PoolVolume>, DiskError> {
        let mut found = Vec::new();
        for name in self.volumes.dir.names()? {
            let name = name?;
            match name.to_str().map(VolumeId::parse) {
                Ok(Ok(id)) => {
                    let record = self.read_record(&id);
                    let modified = self.volumes.dir.stat(&name).map(|stat| stat.modified);
                    let used = modified.ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
                    let volume = PoolVolume::new(id, record);
                    found.push(PoolVolume {
                        used: used.unwrap_or(volume.used),
                        ..volume
                    });
                }
                Ok(Err(_)) | Err(_) => {
                    warn!(path = %self.volumes.dir.path().display(), ?name, "not a volume of hostdir; ignoring it");
                }
            }
        }
        Ok(found)
    }

    fn read_record(&self, id: &VolumeId) -> Result<Record, String> {
        let read = || self.volumes.dir.child(&dir_name(id))?.read(RECORD);
        let bytes = read()
            .map_err(|error| error.with_cause())?
            .ok_or("volume.json is missing")?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| format!("volume.json: {error}"))?;
        if record.format != Record::FORMAT {
            return Err(format!(
                "volume.json has format {}, this hostdir supports format {}",
                record.format,
                Record::FORMAT
            ));
        }
        if record.id != *id {
            return Err(format!("volume.json belongs to volume {}", record.id));
        }
        Ok(record)
    }

    /// Moves volumes that an earlier process did not finish into the trash: no caller was ever told of them.
    pub(super) fn sweep(&self) -> Result<(), DiskError> {
        for name in self.new.names()? {
            let name = name?;
            self.move_to_trash(&self.new, &name)
                .map_err(|errno| self.new.failed("discard", &name, errno))?;
        }
        Ok(())
    }

    /// Moves an entry into the trash, under a name that is free there.
    fn move_to_trash(&self, dir: &Dir, name: &CStr) -> nix::Result<()> {
        loop {
            let moved = dir.move_to(name, &self.trash.dir, &self.numbered(&name.to_string_lossy()));
            if moved != Err(Errno::EEXIST) {
                return moved;
            }
        }
    }

    /// Writes a whole volume that nobody sees yet.
    fn write_new(&self, name: &CStr, record: &Record) -> Result<(), DiskError> {
        let dir = self.new.make_child(name)?;
        dir.write(RECORD, &json(record)?)?;
        dir.sync()
    }

    /// Removes a half-made volume. What cannot be removed now is swept when the pool is next opened.
    fn remove_new(&self, name: &CStr) {
        let removed = self.new.find_child(name).map(|dir| dir.map(|dir| dir.unlink(RECORD)));
        if let (Ok(Some(_)), Err(errno)) = (removed, self.new.rmdir(name)) {
            warn!(path = %self.new.path().display(), ?name, %errno,
                "cannot remove a half-made volume; the next restart of hostdir will");
        }
    }

    fn open_volume(&self, id: &VolumeId) -> Result<Dir, DiskError> {
        let name = dir_name(id);
        self.volumes.dir.find_child(&name)?.ok_or_else(|| {
            let verb = "find (somebody removed it; delete the volume and create it again)";
            self.volumes.dir.failed(verb, &name, Errno::ENOENT)
        })
    }

    fn replace_record(&self, volume: &Dir, record: &Record) -> Result<(), DiskError> {
        volume.write(NEW_RECORD, &json(record)?)?;
        volume.rename(NEW_RECORD, RECORD)?;
        volume.sync().map_err(|error| {
            *self.unsynced().entry(record.id.clone()).or_default() += 1;
            unsettled(error)
        })
    }

    /// Sets the limits of the volumes that were found.
    pub(super) fn enforce_all(&self, found: &[PoolVolume]) {
        self.quota.enforce_all(found, |id| absent(self.open_data(id)));
    }

    fn open_data(&self, id: &VolumeId) -> Result<Dir, DiskError> {
        layout::open_data(&self.volumes.dir, id)
    }

    fn unsynced(&self) -> MutexGuard<'_, BTreeMap<VolumeId, u64>> {
        self.unsynced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_writable(&self) -> Result<(), Unusable> {
        const PROBE: &CStr = c"probe";
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT;
        let tried = match self.meta.open_beneath(PROBE, flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(_) => self.meta.unlink(PROBE),
            Err(Errno::ENOSPC | Errno::EDQUOT) => Ok(()),
            Err(errno) => Err(errno),
        };
        tried.map_err(|errno| {
            let path = self.path.display();
            Unusable(format!(
                "{path} cannot be written to ({errno}); check the disk and how it is mounted"
            ))
        })
    }

    /// A name that no other call uses.
    fn numbered(&self, name: &str) -> CString {
        layout::numbered(name, self.counter.fetch_add(1, Ordering::Relaxed))
    }
}

/// The sync of a change failed that is not undone: it may be durable anyway.
fn unsettled(error: DiskError) -> DiskError {
    DiskError {
        kind: DiskErrorKind::Unsettled,
        ..error
    }
}

/// Size and use of the filesystem of a directory.
pub(super) fn space(dir: &Dir) -> Result<Space, DiskError> {
    let found = fstatvfs(dir).map_err(|errno| dir.failed_itself("statvfs", errno))?;
    let bytes = |blocks: u64| Bytes(blocks.saturating_mul(found.fragment_size()));
    let available = if found.flags().contains(FsFlags::ST_RDONLY) {
        0
    } else {
        found.blocks_available()
    };
    Ok(Space {
        total: bytes(found.blocks()),
        available: bytes(available),
        used: bytes(found.blocks().saturating_sub(found.blocks_free())),
        inodes: found.files(),
        inodes_available: found.files_available(),
        inodes_used: found.files().saturating_sub(found.files_free()),
    })
}

fn json(record: &Record) -> Result<Vec<u8>, DiskError> {
    let mut bytes = serde_json::to_vec_pretty(record).map_err(|error| DiskError {
        verb: "encode the record of",
        path: record.id.as_str().into(),
        kind: DiskErrorKind::Failed,
        source: Box::new(error),
    })?;
    bytes.push(b'\n');
    Ok(bytes)
}
