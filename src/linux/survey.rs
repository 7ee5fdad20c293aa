//! What volumes take where no quota counts it: their files are counted, in the background, one volume at a time.
//!
//! A count is answered until it is old: a minute, or fifty times as long as it took, so that counting takes at most a
//! fiftieth of the time, with rests like the eraser's. The thread starts when somebody first asks.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use super::dir::{Dir, Names, failed};
use super::disk::open_data;
use super::sys::Stat;
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::ports::{DiskError, Usage};
use crate::volume::size::Bytes;

/// How long a count is answered, at least.
const FRESH: Duration = Duration::from_mins(1);
/// And at least so many times as long as it took.
const RARELY: u32 = 50;
/// How long somebody who asks for the first time is kept waiting.
const PATIENCE: Duration = Duration::from_secs(1);
/// Directories deeper than this are not counted: each level keeps two files open.
const DEPTH: usize = 100;
/// A volume that takes longer to count is not counted to its end: tenants can make files faster than they are counted.
const LONGEST: Duration = Duration::from_mins(2);
/// After so many files it rests for as long as they took.
const BATCH: u32 = 1024;

/// The counts of one pool. Dropping it stops the counting.
pub(super) struct Survey {
    shared: Arc<Shared>,
}

struct Shared {
    pool: PoolName,
    volumes: Dir,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    counts: HashMap<VolumeId, Count>,
    wanted: VecDeque<VolumeId>,
    running: bool,
    stop: bool,
}

#[derive(Clone, Copy)]
struct Count {
    usage: Usage,
    at: Instant,
    took: Duration,
}

impl Count {
    fn is_old(&self) -> bool {
        self.at.elapsed() > FRESH.max(self.took * RARELY)
    }
}

impl Survey {
    /// Of the volumes in a directory.
    pub(super) fn new(pool: PoolName, volumes: Dir) -> Self {
        let shared = Shared {
            pool,
            volumes,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// What a volume took when its files were last counted; nothing if they never were.
    pub(super) fn usage(&self, id: &VolumeId) -> Result<Option<Usage>, DiskError> {
        let mut state = self.shared.lock();
        let known = state.counts.get(id).copied();
        if known.is_none_or(|count| count.is_old()) && !state.wanted.contains(id) {
            state.wanted.push_back(id.clone());
            if !std::mem::replace(&mut state.running, true)
                && let Err(error) = self.start()
            {
                state.running = false;
                let errno = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or_default());
                let path = self.shared.volumes.path().join(id.as_str());
                return Err(failed("start a thread to count the files of", path, errno));
            }
            self.shared.changed.notify_all();
        }
        if known.is_some() {
            return Ok(known.map(|count| count.usage));
        }
        let uncounted = |state: &mut State| !state.counts.contains_key(id) && !state.stop;
        let waited = self.shared.changed.wait_timeout_while(state, PATIENCE, uncounted);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Ok(state.counts.get(id).map(|count| count.usage))
    }

    /// Forgets a volume.
    pub(super) fn forget(&self, id: &VolumeId) {
        let mut state = self.shared.lock();
        state.counts.remove(id);
        state.wanted.retain(|wanted| wanted != id);
    }

    fn start(&self) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let name = format!("count {}", shared.pool);
        thread::Builder::new().name(name).spawn(move || shared.run()).map(drop)
    }
}

impl Drop for Survey {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let idle = |state: &mut State| state.wanted.is_empty() && !state.stop;
            let mut state = self
                .changed
                .wait_while(self.lock(), idle)
                .unwrap_or_else(PoisonError::into_inner);
            if state.stop {
                return;
            }
            let Some(id) = state.wanted.pop_front() else { continue };
            // It may have been asked for while it was counted.
            if state.counts.get(&id).is_some_and(|count| !count.is_old()) {
                continue;
            }
            drop(state);
            let start = Instant::now();
            // Gone meanwhile, or the disk fails: whoever asks is told so.
            let Ok(data) = open_data(&self.volumes, &id) else {
                continue;
            };
            let Some(tally) = self.count(data) else { return };
            if tally.incomplete {
                warn!(volume.id = %id, pool = %self.pool, depth = DEPTH, "not all files of a volume could be counted; it takes more than is said");
            }
            let count = Count {
                usage: tally.usage(),
                at: Instant::now(),
                took: start.elapsed(),
            };
            self.lock().counts.insert(id, count);
            self.changed.notify_all();
        }
    }

    /// Counts what is in a directory; nothing when told to stop.
    fn count(&self, data: Dir) -> Option<Tally> {
        let mut tally = Tally::default();
        match data.stat(c"") {
            Ok(stat) => tally.add(&stat),
            Err(_) => tally.incomplete = true,
        }
        let mut levels = Vec::new();
        tally.enter(&mut levels, data);
        let (start, mut since, mut steps) = (Instant::now(), Instant::now(), 0_u32);
        while let Some((dir, names)) = levels.last_mut() {
            let name = match names.next() {
                None => {
                    levels.pop();
                    continue;
                }
                Some(Ok(name)) => name,
                Some(Err(_)) => {
                    tally.incomplete = true;
                    levels.pop();
                    continue;
                }
            };
            // What is gone meanwhile takes nothing; what is mounted there is not the volume's.
            if let Ok(stat) = dir.stat(&name)
                && !stat.is_mount_root()
            {
                tally.add(&stat);
                if stat.is_dir() {
                    match dir.find_child(&name) {
                        Ok(Some(child)) if levels.len() < DEPTH => tally.enter(&mut levels, child),
                        Ok(None) => {}
                        Ok(Some(_)) | Err(_) => tally.incomplete = true,
                    }
                }
            }
            steps += 1;
            if steps.is_multiple_of(BATCH) {
                self.rest(since.elapsed())?;
                since = Instant::now();
                // Others wait.
                if start.elapsed() > LONGEST {
                    tally.incomplete = true;
                    break;
                }
            }
        }
        Some(tally)
    }

    /// Rests, unless told to stop.
    fn rest(&self, time: Duration) -> Option<()> {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |state| !state.stop);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (!state.stop).then_some(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was counted.
#[derive(Default)]
struct Tally {
    bytes: u64,
    inodes: u64,
    /// Names and bytes of files with several names, by how many they have: each name counts for its part.
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

    fn enter(&mut self, levels: &mut Vec<(Dir, Names)>, dir: Dir) {
        match dir.names() {
            Ok(names) => levels.push((dir, names)),
            Err(_) => self.incomplete = true,
        }
    }

    fn usage(&self) -> Usage {
        let (mut bytes, mut inodes) = (self.bytes, self.inodes);
        for (links, (names, shared)) in &self.shared {
            inodes += names / u64::from(*links);
            bytes += shared / u64::from(*links);
        }
        Usage {
            bytes: Bytes(bytes),
            inodes: Some(inodes),
        }
    }
}
