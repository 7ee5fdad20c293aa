//! A pool of a node: which volumes it has, and how much of it is allocated to them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{error, info};

use crate::volume::access::{AccessMode, TargetPath};
use crate::volume::disk::{Disk, DiskError, Host, Mount, Opened, PoolConfig, PoolVolume, Unusable, took_effect};
use crate::volume::error::Reason;
use crate::volume::id::VolumeId;
use crate::volume::pool_status::PoolStatus;
use crate::volume::quota::QuotaPolicy;
use crate::volume::record::{PoolId, Record};
use crate::volume::room::Space;
use crate::volume::size::Bytes;

/// A configured pool, open or not. A pool that cannot be opened stays closed and is tried again whenever it is needed: the
/// other pools and the mounts of running pods must not suffer from one bad disk. For the same reason it is opened on a
/// thread of its own: a disk may also hang.
pub(super) struct Pool {
    pub(super) config: PoolConfig,
    opening: Arc<Opening>,
}

struct Opening {
    state: Mutex<State>,
    changed: Condvar,
}

enum State {
    /// Not open, and why. The next call tries again.
    Closed(Unusable),
    Opening(Instant),
    Open(Arc<OpenPool>),
}

/// How long after the start of opening a pool a call still waits for it. Later calls do not wait at all.
const PATIENCE: Duration = Duration::from_secs(1);

impl Pool {
    pub(super) fn new(config: PoolConfig) -> Self {
        let state = Mutex::new(State::Closed(Unusable("not opened yet".into())));
        let opening = Arc::new(Opening {
            state,
            changed: Condvar::new(),
        });
        Self { config, opening }
    }

    /// Opens the pool unless it is open already, and checks that it is still the one that was opened.
    pub(super) fn get(&self, host: &Arc<dyn Host>) -> Result<Arc<OpenPool>, Unusable> {
        let pool = self.opened(host)?;
        pool.disk.present()?;
        Ok(pool)
    }

    fn opened(&self, host: &Arc<dyn Host>) -> Result<Arc<OpenPool>, Unusable> {
        let mut state = self.opening.lock();
        if matches!(*state, State::Closed(_)) {
            *state = State::Opening(Instant::now());
            self.begin(Arc::clone(host))
                .inspect_err(|why| *state = State::Closed(why.clone()))?;
        }
        loop {
            let left = match &*state {
                State::Open(pool) => return Ok(Arc::clone(pool)),
                State::Closed(why) => return Err(why.clone()),
                State::Opening(since) => PATIENCE.saturating_sub(since.elapsed()),
            };
            if left.is_zero() {
                return Err(Unusable(format!(
                    "{} is still being opened; if this persists, its disk hangs: check the kernel log",
                    self.config.path.display()
                )));
            }
            state = self
                .opening
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The current status of the pool.
    pub(super) fn status(&self, host: &Arc<dyn Host>) -> PoolStatus {
        let look = || {
            let pool = self.get(host)?;
            pool.disk.writable()?;
            let space = pool.disk.space()?;
            Ok((pool, space))
        };
        look().map_or_else(
            |why: Unusable| PoolStatus {
                limits: self.config.limits,
                id: None,
                filesystem: None,
                foreign: Bytes(0),
                space: Err(why.to_string()),
                enforcement: None,
                unenforced: 0,
            },
            |(pool, space)| pool.status(space),
        )
    }

    /// The sum of what is allocated to its volumes; zero while the pool is not open.
    pub(super) fn allocated(&self) -> Bytes {
        match &*self.opening.lock() {
            State::Open(pool) => pool.lock().allocated,
            State::Closed(_) | State::Opening(_) => Bytes(0),
        }
    }

    fn begin(&self, host: Arc<dyn Host>) -> Result<(), Unusable> {
        let (config, opening) = (self.config.clone(), Arc::clone(&self.opening));
        let open = move || {
            let opened = host
                .open(&config)
                .map(|opened| Arc::new(OpenPool::new(&config, opened)));
            *opening.lock() = opened.map_or_else(State::Closed, State::Open);
            opening.changed.notify_all();
        };
        let spawned = thread::Builder::new()
            .name(format!("open {}", self.config.name))
            .spawn(open);
        spawned
            .map(drop)
            .map_err(|error| Unusable(format!("cannot start a thread to open it: {error}")))
    }
}

impl Opening {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic leaves no change half done: each is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct OpenPool {
    pub(super) config: PoolConfig,
    pub(super) id: PoolId,
    pub(super) filesystem: String,
    /// Bytes that were in use on the filesystem when the pool was made.
    foreign: Bytes,
    pub(super) disk: Box<dyn Disk>,
    volumes: Mutex<Volumes>,
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
    fn new(config: &PoolConfig, opened: Opened) -> Self {
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
        }
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
    pub(super) fn room(&self) -> Result<Bytes, DiskError> {
        let space = self.disk.space()?;
        Ok(self.config.limits.room(space, self.foreign, self.lock().allocated))
    }

    fn status(&self, space: Space) -> PoolStatus {
        let enforcement = self.disk.enforcement();
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
        let space = self.disk.space()?;
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
