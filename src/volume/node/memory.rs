//! A machine in memory, for tests of the verbs. It fails on demand, which a real disk does not.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::volume::access::{MountOptions, TargetPath};
use crate::volume::disk::{
    Absent, BindError, Disk, DiskError, DiskErrorKind, Host, Inode, Inspection, Measure, Opened, PoolConfig,
    PoolVolume, Unusable, Usage, took_effect,
};
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::quota::QuotaKind;
use crate::volume::record::{PoolId, Record};
use crate::volume::room::Space;
use crate::volume::size::Bytes;

/// All disks and mounts. Clones share one machine.
#[derive(Clone, Default)]
pub(super) struct Memory(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    pools: BTreeMap<PoolName, PoolState>,
    mounts: HashMap<TargetPath, Inode>,
    /// Verbs whose next call fails, and how.
    failing: HashMap<&'static str, DiskErrorKind>,
    unreadable_targets: bool,
    /// Whether the next attempt to open a pool panics.
    panics: bool,
    /// Whether volumes are limited.
    enforcing: bool,
    /// Volumes that are not limited, and why.
    unenforced: HashMap<VolumeId, String>,
    /// What every volume uses; `None` until it is counted.
    usage: Option<Usage>,
}

struct PoolState {
    id: PoolId,
    absent: bool,
    remounted: bool,
    volumes: BTreeMap<VolumeId, Record>,
    directories: HashSet<VolumeId>,
}

impl Default for PoolState {
    fn default() -> Self {
        Self {
            id: PoolId::random(),
            absent: false,
            remounted: false,
            volumes: BTreeMap::new(),
            directories: HashSet::new(),
        }
    }
}

impl Memory {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics while it holds the lock")
    }

    /// Makes the next call of this verb fail.
    pub(super) fn fail(&self, verb: &'static str, kind: DiskErrorKind) {
        self.lock().failing.insert(verb, kind);
    }

    /// Mounts the disk of a pool again; or another one in its place.
    pub(super) fn remount(&self, pool: &PoolName, another: bool) {
        let mut state = self.lock();
        let pool = state.pools.entry(pool.clone()).or_default();
        pool.remounted = true;
        if another {
            pool.id = PoolId::random();
        }
    }

    /// Removes a pool's disk, or brings it back.
    pub(super) fn set_absent(&self, pool: &PoolName, absent: bool) {
        self.lock().pools.entry(pool.clone()).or_default().absent = absent;
    }

    /// Makes the next attempt to open a pool panic.
    pub(super) fn panic_at_open(&self) {
        self.lock().panics = true;
    }

    /// From now on, looking at any target fails.
    pub(super) fn hide_mounts(&self) {
        self.lock().unreadable_targets = true;
    }

    /// Switches quotas on or off.
    pub(super) fn enforce(&self, enforcing: bool) {
        self.lock().enforcing = enforcing;
    }

    /// Removes the limit of a volume.
    pub(super) fn set_unenforced(&self, id: &VolumeId, why: &str) {
        self.lock().unenforced.insert(id.clone(), why.into());
    }

    /// Sets what every volume uses from now on.
    pub(super) fn set_usage(&self, usage: Option<Usage>) {
        self.lock().usage = usage;
    }

    /// Puts a record on a pool that is not open yet.
    pub(super) fn put(&self, pool: &PoolName, record: Record) {
        self.lock()
            .pools
            .entry(pool.clone())
            .or_default()
            .volumes
            .insert(record.id.clone(), record);
    }

    /// Whether a volume is on a pool.
    pub(super) fn has(&self, pool: &PoolName, id: &VolumeId) -> bool {
        self.lock()
            .pools
            .get(pool)
            .is_some_and(|pool| pool.volumes.contains_key(id))
    }

    /// Removes the directory of a volume.
    pub(super) fn lose_directory(&self, pool: &PoolName, id: &VolumeId) {
        self.lock()
            .pools
            .entry(pool.clone())
            .or_default()
            .directories
            .remove(id);
    }
}

impl State {
    fn attempt(&mut self, verb: &'static str) -> Result<(), DiskError> {
        match self.failing.remove(verb) {
            None => Ok(()),
            Some(kind) => Err(failed(verb, kind)),
        }
    }
}

fn failed(verb: &'static str, kind: DiskErrorKind) -> DiskError {
    DiskError {
        verb,
        path: PathBuf::from("/memory"),
        kind,
        source: "the test asked for it".into(),
    }
}

/// The directory of a volume has the same identity as long as it exists.
fn inode(id: &VolumeId) -> Inode {
    let ino = id
        .as_str()
        .bytes()
        .fold(7_u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
    Inode { dev: 1, ino }
}

impl Host for Memory {
    fn open(&self, config: &PoolConfig) -> Result<Opened, Unusable> {
        let panics = std::mem::take(&mut self.lock().panics);
        assert!(!panics, "the test asked for it");
        let mut state = self.lock();
        let pool = state.pools.entry(config.name.clone()).or_default();
        if pool.absent {
            return Err(Unusable("its disk is absent".into()));
        }
        if config.expected.is_some_and(|expected| expected != pool.id) {
            return Err(Unusable("it is another pool".into()));
        }
        pool.remounted = false;
        let volume = |(id, record): (&VolumeId, &Record)| PoolVolume::new(id.clone(), Ok(record.clone()));
        Ok(Opened {
            id: pool.id,
            filesystem: "memory".into(),
            foreign: Bytes(0),
            volumes: pool.volumes.iter().map(volume).collect(),
            disk: Box::new(MemoryDisk {
                memory: self.clone(),
                pool: config.name.clone(),
            }),
        })
    }

    fn mounted(&self, target: &TargetPath) -> Result<Option<Inode>, BindError> {
        let state = self.lock();
        if state.unreadable_targets {
            return Err(failed("stat", DiskErrorKind::Failed).into());
        }
        Ok(state.mounts.get(target).copied())
    }

    fn unbind(&self, _: &VolumeId, target: &TargetPath, _: Option<Inode>) -> Result<bool, BindError> {
        Ok(self.lock().mounts.remove(target).is_some())
    }
}

struct MemoryDisk {
    memory: Memory,
    pool: PoolName,
}

impl MemoryDisk {
    fn change(&self, verb: &'static str, change: impl FnOnce(&mut PoolState)) -> Result<(), DiskError> {
        let mut state = self.memory.lock();
        let attempt = state.attempt(verb);
        // An unsettled change has taken effect.
        if took_effect(&attempt) {
            change(state.pools.entry(self.pool.clone()).or_default());
        }
        attempt
    }
}

impl Disk for MemoryDisk {
    fn present(&self) -> Result<(), Absent> {
        match self.memory.lock().pools.get(&self.pool) {
            Some(pool) if pool.remounted => Err(Absent::Remounted),
            Some(pool) if !pool.absent => Ok(()),
            _ => Err(Absent::Unusable(Unusable("its disk is absent".into()))),
        }
    }

    fn inspect(&self) -> Result<Inspection, Absent> {
        self.present()?;
        let writable = self.memory.lock().attempt("writable").map_err(Unusable::from);
        Ok(Inspection {
            writable,
            space: Ok(Space {
                total: Bytes(10 << 30),
                available: Bytes(10 << 30),
                ..Space::default()
            }),
            enforcement: self.enforcement(),
        })
    }

    fn is_settled(&self) -> bool {
        true
    }

    fn settle(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn reload(&self, id: &VolumeId) -> Result<Record, String> {
        let state = self.memory.lock();
        let record = state.pools.get(&self.pool).and_then(|pool| pool.volumes.get(id));
        record.cloned().ok_or_else(|| "volume.json is missing".into())
    }

    fn create(&self, record: &Record) -> Result<(), DiskError> {
        self.change("create", |pool| {
            drop(pool.volumes.insert(record.id.clone(), record.clone()));
        })
    }

    fn make_directory(&self, record: &Record) -> Result<Record, DiskError> {
        self.change("make_directory", |pool| {
            pool.directories.insert(record.id.clone());
            pool.volumes.insert(record.id.clone(), record.clone());
        })?;
        Ok(record.clone())
    }

    fn enforcement(&self) -> Result<QuotaKind, String> {
        if self.memory.lock().enforcing {
            Ok(QuotaKind::Projects)
        } else {
            Err("memory has no quotas".into())
        }
    }

    fn unenforced(&self, id: &VolumeId) -> Option<String> {
        self.memory.lock().unenforced.get(id).cloned()
    }

    fn enforce(&self, _: &Record) -> Result<(), DiskError> {
        Ok(())
    }

    fn measure(&self, record: &Record, mounted: Inode) -> Result<Measure, DiskError> {
        if self.data(&record.id)? != Some(mounted) {
            return Ok(Measure::Elsewhere);
        }
        let mut state = self.memory.lock();
        state.attempt("measure")?;
        Ok(state.usage.map_or(Measure::Counting, Measure::Takes))
    }

    fn resize(&self, record: &Record) -> Result<(), DiskError> {
        self.change("resize", |pool| {
            pool.volumes.insert(record.id.clone(), record.clone());
        })
    }

    fn data(&self, id: &VolumeId) -> Result<Option<Inode>, DiskError> {
        let mut state = self.memory.lock();
        state.attempt("data")?;
        let there = state
            .pools
            .get(&self.pool)
            .is_some_and(|pool| pool.directories.contains(id));
        Ok(there.then(|| inode(id)))
    }

    fn bind(&self, id: &VolumeId, target: &TargetPath, _: MountOptions) -> Result<bool, BindError> {
        let mut state = self.memory.lock();
        state.attempt("bind")?;
        Ok(state.mounts.insert(target.clone(), inode(id)).is_none())
    }

    fn discard(&self, id: &VolumeId) -> Result<(), DiskError> {
        self.change("discard", |pool| {
            pool.volumes.remove(id);
            pool.directories.remove(id);
        })
    }
}
