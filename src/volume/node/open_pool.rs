//! An open pool: which volumes it has, and how much of it is allocated to them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tracing::{error, info};

use crate::background;
use crate::volume::access::{AccessMode, TargetPath};
use crate::volume::disk::{Absent, Disk, Inspection, Mount, Opened, PoolConfig, PoolVolume, Unusable, took_effect};
use crate::volume::error::Reason;
use crate::volume::id::VolumeId;
use crate::volume::pool_status::PoolStatus;
use crate::volume::quota::{QuotaKind, QuotaPolicy};
use crate::volume::record::{PoolId, Record};
use crate::volume::room::Space;
use crate::volume::size::Bytes;

pub(super) struct OpenPool {
    pub(super) config: PoolConfig,
    pub(super) id: PoolId,
    pub(super) filesystem: String,
    /// Bytes that were in use on the filesystem when the pool was made.
    foreign: Bytes,
    pub(super) disk: Box<dyn Disk>,
    volumes: Mutex<Volumes>,
    /// The filesystem at the last inspection.
    space: Mutex<Result<Space, Unusable>>,
    calls: Calls,
    reload: Mutex<Reload>,
}

/// The first and the longest pause between attempts to read broken records.
const RELOAD_MIN: Duration = Duration::from_secs(1);
const RELOAD_MAX: Duration = Duration::from_mins(1);

/// When broken records are read again.
struct Reload {
    running: bool,
    due: Instant,
    pause: Duration,
}

/// How long a call waits for another to end when `Calls::max` run.
const CALL_PATIENCE: Duration = Duration::from_secs(2);

/// The calls that may wait for the disk now.
struct Calls {
    /// How many there may be: those that a hung disk holds must leave threads for the other pools.
    max: usize,
    running: Mutex<RunningCalls>,
    ended: Condvar,
}

#[derive(Default)]
struct RunningCalls {
    /// When each began, by its number: the first is the oldest.
    since: BTreeMap<u64, Instant>,
    next: u64,
}

/// A call that may wait for the disk of a pool, until it ends.
pub(super) struct DiskCall {
    pool: Arc<OpenPool>,
    number: u64,
}

impl std::ops::Deref for DiskCall {
    type Target = OpenPool;

    fn deref(&self) -> &OpenPool {
        &self.pool
    }
}

impl Drop for DiskCall {
    fn drop(&mut self) {
        self.pool.running_calls().since.remove(&self.number);
        self.pool.calls.ended.notify_one();
    }
}

#[derive(Default)]
struct Volumes {
    by_id: BTreeMap<VolumeId, PoolVolume>,
    /// Sum of the sizes in `by_id` and of volumes whose records are being written.
    allocated: Bytes,
}

impl Volumes {
    fn allocate(&mut self, bytes: Bytes) {
        self.allocated = self.allocated.plus(bytes);
    }

    fn give_back(&mut self, bytes: Bytes) {
        self.allocated = self.allocated.less(bytes);
    }
}

impl OpenPool {
    pub(super) fn new(config: &PoolConfig, opened: Opened, calls_max: usize) -> Self {
        let Opened {
            id,
            filesystem,
            foreign,
            volumes: found,
            disk,
        } = opened;
        let mut volumes = Volumes::default();
        for volume in found {
            match &volume.record {
                Ok(record) => volumes.allocate(record.spec.bytes),
                Err(why) => {
                    error!(volume.id = %volume.id, pool = %config.name, why, "cannot read the record of a volume");
                }
            }
            volumes.by_id.insert(volume.id.clone(), volume);
        }
        info!(
            pool = %config.name, pool.id = %id, path = %config.path.display(), filesystem,
            volumes = volumes.by_id.len(), allocated = %volumes.allocated, "pool opened"
        );
        Self {
            config: config.clone(),
            id,
            filesystem,
            foreign,
            disk,
            volumes: Mutex::new(volumes),
            space: Mutex::new(Err(Unusable("it has not been inspected yet".into()))),
            calls: Calls {
                max: calls_max,
                running: Mutex::default(),
                ended: Condvar::new(),
            },
            reload: Mutex::new(Reload {
                running: false,
                due: Instant::now(),
                pause: RELOAD_MIN,
            }),
        }
    }

    /// Asks the disk how it is. For the thread that watches the pool: this may hang.
    pub(super) fn inspect(&self) -> Result<Inspection, Absent> {
        let inspection = self.disk.inspect()?;
        let mut space = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        space.clone_from(&inspection.space);
        drop(space);
        Ok(inspection)
    }

    /// Reads the records again that could not be read: the disk may have failed for a moment, or somebody has restored them. On a
    /// thread of its own, since a bad sector may take a minute to fail, and more and more seldom.
    pub(super) fn reload_broken(self: &Arc<Self>) {
        let is_broken = |volume: &&PoolVolume| volume.record.is_err();
        let volumes = self.lock();
        let broken: Vec<VolumeId> = volumes
            .by_id
            .values()
            .filter(is_broken)
            .map(|volume| volume.id.clone())
            .collect();
        drop(volumes);
        let mut reload = self.reload.lock().unwrap_or_else(PoisonError::into_inner);
        if broken.is_empty() || reload.running || Instant::now() < reload.due {
            return;
        }
        let pool = Arc::clone(self);
        let work = move || pool.reload(&broken);
        reload.running = background::spawn(format!("reload {}", self.config.name), work).is_ok();
    }

    fn reload(&self, broken: &[VolumeId]) {
        for id in broken {
            let Ok(record) = self.disk.reload(id) else { continue };
            let mut volumes = self.lock();
            // A call may have deleted the volume meanwhile.
            let Some(volume) = volumes.by_id.get_mut(id).filter(|volume| volume.record.is_err()) else {
                continue;
            };
            let bytes = record.spec.bytes;
            volume.record = Ok(record);
            volumes.allocate(bytes);
            info!(volume.id = %id, pool = %self.config.name, "the record of a volume can be read again");
        }
        let mut reload = self.reload.lock().unwrap_or_else(PoisonError::into_inner);
        *reload = Reload {
            running: false,
            due: Instant::now() + reload.pause,
            pause: (reload.pause * 2).min(RELOAD_MAX),
        };
    }

    /// Begins a call that may wait for the disk. Checks that the pool is still the one that was opened.
    pub(super) fn begin_call(self: &Arc<Self>) -> Result<DiskCall, Reason> {
        let full = |running: &mut RunningCalls| running.since.len() >= self.calls.max;
        let waited = self
            .calls
            .ended
            .wait_timeout_while(self.running_calls(), CALL_PATIENCE, full);
        let (mut running, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            let why = format!(
                "{} calls wait for its disk already; the call will be retried",
                self.calls.max
            );
            return Err(self.unusable(Unusable(why)));
        }
        let number = running.next;
        running.next += 1;
        running.since.insert(number, Instant::now());
        drop(running);
        let call = DiskCall {
            pool: Arc::clone(self),
            number,
        };
        self.disk.present().map_err(|absent| self.unusable(absent.into()))?;
        Ok(call)
    }

    /// For how long the oldest running call has waited for the disk.
    pub(super) fn oldest_call(&self) -> Option<Duration> {
        let running = self.running_calls();
        running.since.values().next().map(Instant::elapsed)
    }

    fn running_calls(&self) -> MutexGuard<'_, RunningCalls> {
        self.calls.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes durable what earlier calls left open, before an answer relies on it.
    pub(super) fn settle(self: &Arc<Self>) -> Result<(), Reason> {
        if self.disk.is_settled() {
            return Ok(());
        }
        Ok(self.begin_call()?.disk.settle()?)
    }

    pub(super) fn space(&self) -> Result<Space, Reason> {
        let space = self.space.lock().unwrap_or_else(PoisonError::into_inner).clone();
        space.map_err(|why| self.unusable(why))
    }

    fn unusable(&self, why: Unusable) -> Reason {
        Reason::PoolUnusable {
            pool: self.config.name.clone(),
            why,
        }
    }

    pub(super) fn allocated(&self) -> Bytes {
        self.lock().allocated
    }

    pub(super) fn volume(&self, id: &VolumeId) -> Option<PoolVolume> {
        self.lock().by_id.get(id).cloned()
    }

    pub(super) fn volumes(&self) -> Vec<PoolVolume> {
        self.lock().by_id.values().cloned().collect()
    }

    /// At most `max` readable records in the order of their ids, from the first id after `after`.
    pub(super) fn records_after(&self, after: Option<&VolumeId>, max: usize) -> Vec<Record> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let volumes = self.lock();
        let from = volumes.by_id.range::<VolumeId, _>((start, Bound::Unbounded));
        let sound = from.filter_map(|(_, volume)| volume.record.as_ref().ok());
        sound.take(max).cloned().collect()
    }

    /// The largest volume that may be created now.
    pub(super) fn room(&self) -> Result<Bytes, Reason> {
        let space = self.space()?;
        Ok(self.config.limits.room(space, self.foreign, self.lock().allocated))
    }

    pub(super) fn status(&self, space: Space, enforcement: Result<QuotaKind, String>) -> PoolStatus {
        PoolStatus {
            limits: self.config.limits,
            id: Some(self.id),
            filesystem: Some(self.filesystem.clone()),
            foreign: self.foreign,
            space: Ok(space),
            unenforced: self.unenforced(enforcement.is_ok()),
            enforcement: Some(enforcement),
        }
    }

    /// Records a new volume, if there is room for it.
    pub(super) fn create(&self, record: Record) -> Result<(), Reason> {
        self.allocate(record.spec.bytes)?;
        self.write(record)
    }

    /// Records a new volume that a controller has allocated room for.
    pub(super) fn create_allocated(&self, record: Record) -> Result<(), Reason> {
        self.lock().allocate(record.spec.bytes);
        self.write(record)
    }

    fn write(&self, record: Record) -> Result<(), Reason> {
        let written = self.disk.create(&record);
        let mut volumes = self.lock();
        if took_effect(&written) {
            let volume = PoolVolume::new(record.id.clone(), Ok(record));
            volumes.by_id.insert(volume.id.clone(), volume);
        } else {
            volumes.give_back(record.spec.bytes);
        }
        Ok(written?)
    }

    /// Gives a volume a larger size, if there is room for it.
    pub(super) fn grow(&self, record: Record, bytes: Bytes) -> Result<(), Reason> {
        let has = record.spec.bytes;
        self.allocate(bytes.less(has)).map_err(|reason| match reason {
            Reason::NoRoom { pool, room, .. } => Reason::NoRoomToGrow {
                pool,
                wanted: bytes,
                room: has.plus(room),
            },
            other => other,
        })?;
        self.resize(record, bytes)
    }

    /// Gives a volume a larger size that a controller has allocated room for.
    pub(super) fn grow_allocated(&self, record: Record, bytes: Bytes) -> Result<(), Reason> {
        self.lock().allocate(bytes.less(record.spec.bytes));
        self.resize(record, bytes)
    }

    fn resize(&self, mut record: Record, bytes: Bytes) -> Result<(), Reason> {
        let more = bytes.less(record.spec.bytes);
        record.spec.bytes = bytes;
        let written = self.disk.resize(&record);
        let mut volumes = self.lock();
        if !took_effect(&written) {
            volumes.give_back(more);
        } else if let Some(volume) = volumes.by_id.get_mut(&record.id) {
            volume.record = Ok(record);
        }
        Ok(written?)
    }

    /// Allocates room before the record is written, so that two concurrent calls cannot both get the last of it.
    fn allocate(&self, bytes: Bytes) -> Result<(), Reason> {
        let space = self.space()?;
        let mut volumes = self.lock();
        let room = self.config.limits.room(space, self.foreign, volumes.allocated);
        if bytes > room {
            return Err(Reason::NoRoom {
                pool: self.config.name.clone(),
                wanted: bytes,
                room,
            });
        }
        volumes.allocate(bytes);
        Ok(())
    }

    /// Refuses a volume without a limit if quotas are required.
    pub(super) fn require_limit(&self, id: &VolumeId) -> Result<(), Reason> {
        if self.config.quotas.policy != QuotaPolicy::Required {
            return Ok(());
        }
        let why = self.disk.enforcement().err().or_else(|| self.disk.unenforced(id));
        why.map_or(Ok(()), |why| {
            let pool = self.config.name.clone();
            Err(Reason::Unenforced { pool, why })
        })
    }

    /// How many volumes with data have no limit; all of them, if the pool's quotas do not work (`enforced` is false).
    fn unenforced(&self, enforced: bool) -> usize {
        let volumes = self.lock();
        let with_data = volumes
            .by_id
            .values()
            .filter(|volume| volume.record.as_ref().is_ok_and(|record| record.ready));
        with_data
            .filter(|volume| !enforced || self.disk.unenforced(&volume.id).is_some())
            .count()
    }

    /// Makes the directory of a volume and notes its new record.
    pub(super) fn make_directory(&self, record: &Record) -> Result<(), Reason> {
        let record = self.disk.make_directory(record)?;
        if let Some(volume) = self.lock().by_id.get_mut(&record.id) {
            volume.record = Ok(record);
        }
        Ok(())
    }

    /// Discards a volume and frees its room.
    pub(super) fn discard(&self, id: &VolumeId) -> Result<(), Reason> {
        let discarded = self.disk.discard(id);
        if took_effect(&discarded) {
            let mut volumes = self.lock();
            if let Some(PoolVolume { record: Ok(record), .. }) = volumes.by_id.remove(id) {
                volumes.give_back(record.spec.bytes);
            }
        }
        Ok(discarded?)
    }

    /// Notes that a volume is mounted at a target with this access mode.
    pub(super) fn note_mount(&self, id: &VolumeId, target: &TargetPath, mode: AccessMode) {
        if let Some(volume) = self.lock().by_id.get_mut(id) {
            volume.used = Timestamp::now();
            volume.mounts.retain(|mount| mount.target != *target);
            volume.mounts.push(Mount {
                target: target.clone(),
                mode: Some(mode),
            });
        }
    }

    /// Notes that a volume is no longer mounted at a target.
    pub(super) fn forget_mount(&self, id: &VolumeId, target: &TargetPath) {
        if let Some(volume) = self.lock().by_id.get_mut(id) {
            volume.mounts.retain(|mount| mount.target != *target);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Volumes> {
        // A panic leaves no change half done: each is one statement on one map.
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
