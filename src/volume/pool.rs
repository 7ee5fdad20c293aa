//! The pools of a node: which volumes each has, and how much of it is promised.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::access::{AccessMode, TargetPath};
use super::driver::Held;
use super::error::Reason;
use super::id::VolumeId;
use super::ports::{Disk, DiskError, DiskErrorKind, Found, Host, Opened, PoolConfig, Unusable};
use super::quota::Policy;
use super::record::{Phase, PoolId, Record};
use super::size::Bytes;

/// A pool of the configuration, open or not. A pool that cannot be opened stays closed and is tried again whenever it
/// is asked for: the other pools and the mounts of running pods must not suffer from one bad disk. For the same reason
/// it is opened on a thread of its own: a disk may also hang.
pub(super) struct Pool {
    pub(super) config: PoolConfig,
    opening: Arc<Opening>,
}

struct Opening {
    state: Mutex<State>,
    changed: Condvar,
}

enum State {
    /// Not open, and why: begun anew by the next call.
    Closed(Unusable),
    /// Being opened since then.
    Opening(Instant),
    Open(Arc<OpenPool>),
}

/// How long a call waits for a pool that is being opened, from when that began. Later calls do not wait at all.
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

    /// The pool, opened now if it was not before, if it is still the one that was opened.
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
                    "{} is still being opened; if that goes on, its disk hangs: look at the kernel's log",
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
            .map_err(|error| Unusable(format!("no thread to open it: {error}")))
    }
}

impl Opening {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A volume as its pool knows it.
#[derive(Clone)]
pub(super) struct Entry {
    /// What its record says, or why that cannot be read.
    pub(super) record: Result<Record, String>,
    /// Where it is mounted, as far as this process knows: what is listed is checked before it is relied on.
    pub(super) mounts: Vec<Mount>,
}

/// A mount of a volume.
#[derive(Clone)]
pub(super) struct Mount {
    pub(super) target: TargetPath,
    /// How it was asked for; unknown when it was made before this process started.
    pub(super) mode: Option<AccessMode>,
}

/// An open pool.
pub(super) struct OpenPool {
    pub(super) config: PoolConfig,
    pub(super) id: PoolId,
    pub(super) filesystem: String,
    /// What was on the filesystem when the pool was made.
    pub(super) foreign: Bytes,
    pub(super) disk: Box<dyn Disk>,
    volumes: Mutex<Volumes>,
}

#[derive(Default)]
struct Volumes {
    entries: BTreeMap<VolumeId, Entry>,
    /// Sum of the sizes in `entries` and of claims being written.
    claimed: Bytes,
}

impl Volumes {
    fn count(&mut self, bytes: Bytes) {
        self.claimed = self.claimed.plus(bytes);
    }
}

impl OpenPool {
    fn new(config: &PoolConfig, opened: Opened) -> Self {
        let Opened {
            id,
            filesystem,
            foreign,
            volumes: found,
            targets,
            disk,
        } = opened;
        let mut volumes = Volumes::default();
        for Found { id, record } in found {
            match &record {
                Ok(record) => volumes.count(record.bytes),
                Err(why) => error!(volume.id = %id, pool = %config.name, why, "the record of a volume cannot be read"),
            }
            volumes.entries.insert(
                id,
                Entry {
                    record,
                    mounts: Vec::new(),
                },
            );
        }
        for (id, target) in targets {
            if let Some(entry) = volumes.entries.get_mut(&id) {
                entry.mounts.push(Mount { target, mode: None });
            } else {
                warn!(volume.id = %id, %target, pool = %config.name, "mounted, but not a volume of this pool");
            }
        }
        info!(
            pool = %config.name, pool.id = %id, path = %config.path.display(), filesystem,
            volumes = volumes.entries.len(), claimed = %volumes.claimed, "pool opened"
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

    pub(super) fn entry(&self, id: &VolumeId) -> Option<Entry> {
        self.lock().entries.get(id).cloned()
    }

    /// At most `max` sound records after `after`, in the order of their ids.
    pub(super) fn records_after(&self, after: Option<&VolumeId>, max: usize) -> Vec<Record> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let volumes = self.lock();
        let entries = volumes.entries.range::<VolumeId, _>((start, Bound::Unbounded));
        let sound = entries.filter_map(|(_, entry)| entry.record.as_ref().ok());
        sound.take(max).cloned().collect()
    }

    /// Sum of what is promised.
    pub(super) fn promised(&self) -> Bytes {
        self.lock().claimed
    }

    /// The largest volume that may be promised now.
    pub(super) fn room(&self) -> Result<Bytes, DiskError> {
        let space = self.disk.space()?;
        Ok(self.config.limits.room(space, self.foreign, self.lock().claimed))
    }

    /// All its volumes.
    pub(super) fn held(&self) -> Vec<Held> {
        let volumes = self.lock();
        let held = |(id, entry): (&VolumeId, &Entry)| Held {
            id: id.clone(),
            pool: self.config.name.clone(),
            record: entry.record.clone().ok(),
        };
        volumes.entries.iter().map(held).collect()
    }

    /// Records a new volume, if there is room for it.
    pub(super) fn claim(&self, record: Record) -> Result<(), Reason> {
        self.promise(record.bytes)?;
        self.write(record)
    }

    /// Records a volume whose room was counted elsewhere.
    pub(super) fn record(&self, record: Record) -> Result<(), Reason> {
        self.lock().count(record.bytes);
        self.write(record)
    }

    fn write(&self, record: Record) -> Result<(), Reason> {
        let claimed = self.disk.claim(&record);
        let mut volumes = self.lock();
        if took_effect(&claimed) {
            let entry = Entry {
                record: Ok(record.clone()),
                mounts: Vec::new(),
            };
            volumes.entries.insert(record.id, entry);
        } else {
            volumes.claimed = volumes.claimed.less(record.bytes);
        }
        Ok(claimed?)
    }

    /// Records a larger size of a volume, if there is room for it.
    pub(super) fn grow(&self, record: Record, bytes: Bytes) -> Result<(), Reason> {
        let more = bytes.less(record.bytes);
        self.promise(more).map_err(|reason| match reason {
            Reason::NoRoom { pool, room, .. } => Reason::NoRoomToGrow {
                pool,
                wanted: bytes,
                room: record.bytes.plus(room),
            },
            other => other,
        })?;
        self.resize(record, bytes)
    }

    /// Counts `bytes` as promised, before they are recorded: two callers at once cannot both have the last of the room.
    fn promise(&self, bytes: Bytes) -> Result<(), Reason> {
        let space = self.disk.space()?;
        let mut volumes = self.lock();
        let room = self.config.limits.room(space, self.foreign, volumes.claimed);
        if bytes > room {
            return Err(Reason::NoRoom {
                pool: self.config.name.clone(),
                wanted: bytes,
                room,
            });
        }
        volumes.count(bytes);
        Ok(())
    }

    /// Lets a volume have more whose room was counted elsewhere.
    pub(super) fn raise(&self, record: Record, bytes: Bytes) -> Result<(), Reason> {
        self.lock().count(bytes.less(record.bytes));
        self.resize(record, bytes)
    }

    /// Gives a volume a larger size, whose bytes are counted already.
    fn resize(&self, record: Record, bytes: Bytes) -> Result<(), Reason> {
        let more = bytes.less(record.bytes);
        let record = Record { bytes, ..record };
        let written = self.disk.rewrite(&record);
        let mut volumes = self.lock();
        if !took_effect(&written) {
            volumes.claimed = volumes.claimed.less(more);
        } else if let Some(entry) = volumes.entries.get_mut(&record.id) {
            entry.record = Ok(record);
        }
        Ok(written?)
    }

    /// Refuses a volume that is held to no size, where all have to be.
    pub(super) fn require_limit(&self, id: &VolumeId) -> Result<(), Reason> {
        if self.config.quotas.policy != Policy::Required {
            return Ok(());
        }
        let why = self.disk.enforcement().err().or_else(|| self.disk.loose(id));
        why.map_or(Ok(()), |why| {
            let pool = self.config.name.clone();
            Err(Reason::Unlimited { pool, why })
        })
    }

    /// How many volumes with data are held to no size, where others are (`enforced`) or none is.
    pub(super) fn unlimited(&self, enforced: bool) -> usize {
        let volumes = self.lock();
        let with_data = volumes.entries.iter().filter(|(_, entry)| {
            let record = entry.record.as_ref();
            record.is_ok_and(|record| record.phase == Phase::Ready)
        });
        with_data
            .filter(|(id, _)| !enforced || self.disk.loose(id).is_some())
            .count()
    }

    /// Makes the directory of a volume and keeps its new record.
    pub(super) fn prepare(&self, record: &Record) -> Result<(), Reason> {
        let record = self.disk.prepare(record)?;
        if let Some(entry) = self.lock().entries.get_mut(&record.id) {
            entry.record = Ok(record);
        }
        Ok(())
    }

    /// Takes a volume out of the pool.
    pub(super) fn discard(&self, id: &VolumeId) -> Result<(), Reason> {
        let discarded = self.disk.discard(id);
        if took_effect(&discarded) {
            let mut volumes = self.lock();
            if let Some(Entry { record: Ok(record), .. }) = volumes.entries.remove(id) {
                volumes.claimed = volumes.claimed.less(record.bytes);
            }
        }
        Ok(discarded?)
    }

    /// Notes that a volume is mounted at a target, asked for in this mode.
    pub(super) fn note_mount(&self, id: &VolumeId, target: &TargetPath, mode: AccessMode) {
        if let Some(entry) = self.lock().entries.get_mut(id) {
            entry.mounts.retain(|mount| mount.target != *target);
            entry.mounts.push(Mount {
                target: target.clone(),
                mode: Some(mode),
            });
        }
    }

    /// Notes that a volume is no longer mounted at a target.
    pub(super) fn forget_mount(&self, id: &VolumeId, target: &TargetPath) {
        if let Some(entry) = self.lock().entries.get_mut(id) {
            entry.mounts.retain(|mount| mount.target != *target);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Volumes> {
        // Every change below is one statement on one map: a panic elsewhere leaves nothing half done.
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a step on the disk was done, durable or not yet.
fn took_effect(step: &Result<(), DiskError>) -> bool {
    step.as_ref()
        .err()
        .is_none_or(|error| error.kind == DiskErrorKind::Unsettled)
}
