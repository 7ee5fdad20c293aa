//! What volumes use, where no quota counts it: their files are counted in the background, one volume at a time.
//!
//! A count is used for a minute, or for fifty times as long as it took if that is longer: counting takes at most a fiftieth
//! of the time, and rests for half of that, as the eraser does. The thread starts at the first request.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

use super::dir::{Dir, Names, io_failed};
use super::layout::open_data;
use super::sys::Stat;
use crate::background::{Stop, Stopped, spawn};
use crate::volume::disk::{DiskError, Measure, Usage};
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::size::Bytes;

/// How long a count is used at least.
const FRESH: Duration = Duration::from_mins(1);
/// A count is used for at least this many times the time it took.
const FRESH_FACTOR: u32 = 50;
/// How long the first caller waits for a count.
const PATIENCE: Duration = Duration::from_secs(1);
/// Directories deeper than this are not counted: each level keeps two descriptors open.
const DEPTH: usize = 100;
/// Counting a volume ends after this time: tenants can make files faster than they are counted.
const LONGEST: Duration = Duration::from_mins(2);
/// After this many files the thread rests for as long as they took.
const BATCH: u32 = 1024;

/// Counts what the volumes of one pool use. Dropping it stops the counting.
pub(super) struct UsageCounter {
    shared: Arc<Shared>,
    /// Which volumes to count; `None` before the thread is started.
    wanted: Mutex<Option<Sender<VolumeId>>>,
}

struct Shared {
    pool: PoolName,
    volumes: Dir,
    state: Mutex<State>,
    counted: Condvar,
    stop: Stop,
}

#[derive(Default)]
struct State {
    counts: HashMap<VolumeId, Count>,
    queued: HashSet<VolumeId>,
}

#[derive(Clone, Copy)]
struct Count {
    /// [`Measure::Takes`], or [`Measure::Uncounted`].
    measure: Measure,
    at: Instant,
    took: Duration,
}

impl Count {
    fn is_old(&self) -> bool {
        self.at.elapsed() > FRESH.max(self.took * FRESH_FACTOR)
    }
}

impl UsageCounter {
    /// `volumes` is the directory of all volumes of the pool.
    pub(super) fn new(pool: PoolName, volumes: Dir) -> Self {
        let shared = Shared {
            pool,
            volumes,
            state: Mutex::default(),
            counted: Condvar::new(),
            stop: Stop::default(),
        };
        Self {
            shared: Arc::new(shared),
            wanted: Mutex::default(),
        }
    }

    /// What a volume used when its files were last counted.
    pub(super) fn measure(&self, id: &VolumeId) -> Result<Measure, DiskError> {
        let mut state = self.shared.lock();
        let known = state.counts.get(id).copied();
        if known.is_none_or(|count| count.is_old()) && state.queued.insert(id.clone()) {
            drop(state);
            self.enqueue(id)?;
            state = self.shared.lock();
        }
        if let Some(count) = known {
            return Ok(count.measure);
        }
        let uncounted = |state: &mut State| state.queued.contains(id);
        let waited = self.shared.counted.wait_timeout_while(state, PATIENCE, uncounted);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Ok(state.counts.get(id).map_or(Measure::Counting, |count| count.measure))
    }

    fn enqueue(&self, id: &VolumeId) -> Result<(), DiskError> {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted.is_none() {
            let (sender, receiver) = channel();
            let shared = Arc::clone(&self.shared);
            let work = move || drop(shared.run(&receiver));
            if let Err(error) = spawn(format!("count {}", self.shared.pool), work) {
                self.shared.lock().queued.remove(id);
                let path = self.shared.volumes.path().join(id.as_str());
                return Err(io_failed("start a thread to count the files of", path, error));
            }
            *wanted = Some(sender);
        }
        if let Some(sender) = &*wanted {
            // The thread ends only when the sender is dropped.
            let _ = sender.send(id.clone());
        }
        Ok(())
    }

    pub(super) fn forget(&self, id: &VolumeId) {
        self.shared.lock().counts.remove(id);
    }
}

impl Drop for UsageCounter {
    fn drop(&mut self) {
        self.shared.stop.stop();
    }
}

/// A volume that is being counted. Dropped when that ends, even by a panic.
struct Queued<'a>(&'a Shared, VolumeId);

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.lock().queued.remove(&self.1);
        self.0.counted.notify_all();
    }
}

impl Shared {
    fn run(&self, wanted: &Receiver<VolumeId>) -> Result<(), Stopped> {
        while let Ok(id) = wanted.recv() {
            let queued = Queued(self, id.clone());
            let start = Instant::now();
            // If the volume was deleted meanwhile or the disk fails, the next call finds that itself.
            let tally = match open_data(&self.volumes, &id) {
                Ok(data) => Some(self.count(data)?),
                Err(_) => None,
            };
            if tally.as_ref().is_some_and(|tally| tally.incomplete) {
                warn!(volume.id = %id, pool = %self.pool, depth = DEPTH, limit = ?LONGEST,
                    "not all files of the volume could be counted; it has no statistics");
            }
            let count = tally.map(|tally| Count {
                measure: tally.measure(),
                at: Instant::now(),
                took: start.elapsed(),
            });
            self.lock().counts.extend(count.map(|count| (id, count)));
            drop(queued);
        }
        Ok(())
    }

    /// Counts the files in a directory.
    fn count(&self, data: Dir) -> Result<Tally, Stopped> {
        let mut tally = Tally::default();
        match data.stat(c"") {
            Ok(stat) => tally.add(&stat),
            Err(_) => tally.incomplete = true,
        }
        let mut levels = Vec::new();
        tally.enter(&mut levels, data);
        let (start, mut since, mut steps) = (Instant::now(), Instant::now(), 0_u32);
        while tally.step(&mut levels) {
            steps += 1;
            if steps.is_multiple_of(BATCH) {
                self.stop.rest(since.elapsed())?;
                since = Instant::now();
                // Other volumes wait to be counted.
                if start.elapsed() > LONGEST {
                    tally.incomplete = true;
                    break;
                }
            }
        }
        Ok(tally)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic leaves no change half done: each is one statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The directories from the top to the current file, each with the names that are still to be counted.
type Levels = Vec<(Dir, Names)>;

#[derive(Default)]
struct Tally {
    bytes: u64,
    inodes: u64,
    /// Hard links and bytes of files with several hard links, by the number of links: each link counts as its fraction of
    /// the file.
    shared: BTreeMap<u32, (u64, u64)>,
    incomplete: bool,
}

impl Tally {
    fn add(&mut self, stat: &Stat) {
        if stat.links > 1 && !stat.is_dir() {
            let (names, bytes) = self.shared.entry(stat.links).or_default();
            *names += 1;
            *bytes += stat.bytes;
        } else {
            self.inodes += 1;
            self.bytes += stat.bytes;
        }
    }

    /// Counts the next file. Returns false if there is none.
    fn step(&mut self, levels: &mut Levels) -> bool {
        let depth = levels.len();
        let Some((dir, names)) = levels.last_mut() else {
            return false;
        };
        let name = match names.next() {
            Some(Ok(name)) => name,
            end => {
                self.incomplete |= end.is_some();
                levels.pop();
                return true;
            }
        };
        // A file that was deleted meanwhile takes no space; what is mounted here is not the volume's.
        let Ok(stat) = dir.stat(&name) else { return true };
        if stat.is_mount_root() {
            return true;
        }
        self.add(&stat);
        if stat.is_dir() {
            match dir.find_child(&name) {
                Ok(Some(child)) if depth < DEPTH => self.enter(levels, child),
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => self.incomplete = true,
            }
        }
        true
    }

    fn enter(&mut self, levels: &mut Levels, dir: Dir) {
        match dir.names() {
            Ok(names) => levels.push((dir, names)),
            Err(_) => self.incomplete = true,
        }
    }

    fn measure(&self) -> Measure {
        if self.incomplete {
            return Measure::Uncounted;
        }
        let (mut bytes, mut inodes) = (self.bytes, self.inodes);
        for (links, (names, shared)) in &self.shared {
            inodes += names / u64::from(*links);
            bytes += shared / u64::from(*links);
        }
        Measure::Takes(Usage {
            bytes: Bytes(bytes),
            inodes: Some(inodes),
        })
    }
}
