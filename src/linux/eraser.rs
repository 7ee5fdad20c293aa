//! The eraser: empties a pool's trash in the background, without following a link or crossing a mount.
//!
//! Tenants wrote what is there: a million files in one directory, thousands of levels, immutable files, mounts. The eraser
//! does not descend into a volume but moves its directories up into the trash, one rename each: no tree is too deep, and
//! whatever a power cut leaves is simply trash again. (Subvolumes of btrfs are destroyed as a whole: nothing can be moved
//! out of one.)

use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tracing::{debug, error, warn};

use super::dir::Dir;
use super::durable::SyncedDir;
use super::layout::DATA;
use super::quota::{Destroyed, Quota};
use super::removal::{Halt, loosen, remove, remove_tree};
use crate::background::{Stop, Stopped, spawn};
use crate::volume::disk::DiskError;
use crate::volume::id::PoolName;

/// How often to retry what could not be erased: a mount below it may be gone by then.
const RETRY: Duration = Duration::from_mins(1);

/// How often to check whether the last file of a project or subvolume is gone: the kernel cleans up later, on XFS within
/// moments, on btrfs within half a minute.
const COUNTED: Duration = Duration::from_secs(2);

/// How many times to check that often.
const LOOKS: u32 = 60;

/// After this many removals the eraser rests for as long as they took: tenants keep half of the disk's time.
const BATCH: u32 = 256;

/// The thread that empties one trash. Dropping it waits for the thread.
pub(super) struct Eraser {
    pool: PoolName,
    quota: Arc<Quota>,
    stop: Stop,
    running: Mutex<Option<Running>>,
}

struct Running {
    wake: SyncSender<()>,
    thread: JoinHandle<()>,
}

impl Eraser {
    /// An eraser that is not running yet.
    pub(super) fn new(pool: PoolName, quota: Arc<Quota>) -> Self {
        Self {
            pool,
            quota,
            stop: Stop::default(),
            running: Mutex::default(),
        }
    }

    /// Starts the eraser, which begins with what is already in the trash.
    pub(super) fn start(&self, trash: Arc<SyncedDir>) {
        let (wake, woken) = sync_channel(1);
        let work = Work {
            trash,
            quota: Arc::clone(&self.quota),
            stop: self.stop.clone(),
            moved: AtomicU64::new(0),
        };
        match spawn(format!("erase {}", self.pool), move || work.run(&woken)) {
            Ok(thread) => *self.lock() = Some(Running { wake, thread }),
            Err(why) => {
                error!(pool = %self.pool, %why,
                    "cannot start a thread to erase deleted volumes; restart hostdir to free their space");
            }
        }
    }

    /// Tells the eraser that there is something in the trash.
    pub(super) fn wake(&self) {
        if let Some(running) = &*self.lock() {
            // If the channel is full, the eraser has already been woken.
            let _ = running.wake.try_send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Eraser {
    fn drop(&mut self) {
        self.stop.stop();
        let Some(Running { wake, thread }) = self.lock().take() else {
            return;
        };
        drop(wake);
        if thread.join().is_err() {
            error!(pool = %self.pool, "the eraser panicked, which is a bug");
        }
    }
}

/// What the thread works with.
struct Work {
    trash: Arc<SyncedDir>,
    quota: Arc<Quota>,
    stop: Stop,
    moved: AtomicU64,
}

/// What became of one entry of the trash.
enum Outcome {
    Gone,
    /// Its directories are entries of the trash now.
    Shrunk,
    /// Part of it cannot be removed.
    Stuck,
}

impl Work {
    /// Empties the trash again and again, until the eraser is dropped.
    fn run(&self, woken: &Receiver<()>) {
        let mut looks = 0;
        while let Ok(left) = self.empty() {
            // A project that is not empty soon may never be: a tenant can put a file into any project.
            looks = if self.quota.release_unused(&self.trash.dir) {
                looks + 1
            } else {
                0
            };
            let limit = match (left, looks) {
                (false, 0) => None,
                (false, looks) if looks < LOOKS => Some(COUNTED),
                _ => Some(RETRY),
            };
            let waited = match limit {
                None => woken.recv().map_err(RecvTimeoutError::from),
                Some(limit) => woken.recv_timeout(limit),
            };
            if waited == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }

    /// Erases what is in the trash. Returns whether something is left that cannot be erased.
    fn empty(&self) -> Result<bool, Stopped> {
        let mut pace = Pace::new();
        loop {
            let (mut stuck, mut moving) = (false, false);
            match self.trash.dir.names() {
                Err(error) => return Ok(report(&error)),
                Ok(names) => {
                    for name in names {
                        self.stop.rest(Duration::ZERO)?;
                        let name = name.map_err(Halt::from);
                        match name.and_then(|name| self.erase(&name, &mut pace)) {
                            Ok(Outcome::Gone) => {}
                            Ok(Outcome::Shrunk) => moving = true,
                            Ok(Outcome::Stuck) => stuck = true,
                            Err(Halt::Stopped) => return Err(Stopped),
                            Err(Halt::Failed(error)) => stuck = report(&error),
                        }
                    }
                }
            }
            if !moving {
                return Ok(stuck);
            }
        }
    }

    /// Erases one entry of the trash.
    fn erase(&self, name: &CStr, pace: &mut Pace) -> Result<Outcome, Halt> {
        let trash = &self.trash.dir;
        match remove(trash, name) {
            Ok(()) => return Ok(Outcome::Gone),
            Err(Errno::ENOTEMPTY) => match self.quota.destroy(trash, name)? {
                Destroyed::NoSubvolume => {}
                Destroyed::Gone => return Ok(Outcome::Gone),
                Destroyed::Holds(nested) => return Ok(self.move_all_up(nested, name)),
            },
            Err(errno) => return Ok(stuck(trash, name, errno)),
        }
        let dir = trash.child(name)?;
        self.quota.note_erasing(&dir);
        // The directory of a volume: its project must be noted before it is gone. If it cannot be opened, it is found stuck.
        if let Ok(Some(data)) = dir.find_child(DATA) {
            self.quota.note_erasing(&data);
            drop(data);
            // Even if it is empty: its quota group must be released.
            if let Destroyed::Holds(nested) = self.quota.destroy(&dir, DATA)? {
                return Ok(self.move_all_up(nested, name));
            }
        }
        let outcome = self.empty_dir(&dir, name, pace)?;
        drop(dir);
        Ok(match (outcome, remove(trash, name)) {
            (Outcome::Stuck, _) => Outcome::Stuck,
            (_, Err(errno)) => stuck(trash, name, errno),
            (outcome, Ok(())) => outcome,
        })
    }

    /// Removes what is in a directory, and moves directories that are not empty up into the trash.
    fn empty_dir(&self, dir: &Dir, volume: &CStr, pace: &mut Pace) -> Result<Outcome, Halt> {
        let mut outcome = Outcome::Gone;
        for entry in dir.names()? {
            let entry = entry?;
            let removed = match remove(dir, &entry) {
                // A subvolume is also moved, and destroyed later as an entry of the trash.
                Err(Errno::ENOTEMPTY) => match self.move_up(dir, &entry, volume) {
                    Err(Errno::ENOKEY) => remove_tree(dir, &entry, || pace.step(&self.stop))?,
                    moved => {
                        if matches!(outcome, Outcome::Gone) {
                            outcome = Outcome::Shrunk;
                        }
                        moved
                    }
                },
                removed => removed,
            };
            if let Err(errno) = removed {
                outcome = stuck(dir, &entry, errno);
            }
            pace.step(&self.stop)?;
        }
        Ok(outcome)
    }

    /// Moves subvolumes out of the one that they are in, which is destroyed on the next pass.
    fn move_all_up(&self, nested: Vec<(Dir, CString)>, volume: &CStr) -> Outcome {
        let mut outcome = Outcome::Shrunk;
        for (dir, name) in nested {
            match self.move_up(&dir, &name, volume) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => outcome = stuck(&dir, &name, errno),
            }
        }
        outcome
    }

    /// Moves a directory out of a deeper one, so that the trash stays flat.
    fn move_up(&self, dir: &Dir, name: &CStr, volume: &CStr) -> nix::Result<()> {
        loop {
            let to = self.numbered(volume);
            let moved = match dir.move_to(name, &self.trash.dir, &to) {
                Err(Errno::EPERM) => loosen(dir, name).and_then(|()| dir.move_to(name, &self.trash.dir, &to)),
                moved => moved,
            };
            if moved != Err(Errno::EEXIST) {
                return moved;
            }
        }
    }

    /// `<volume id>.<n>.<another number>`, however deep the directory was.
    fn numbered(&self, volume: &CStr) -> CString {
        let n = self.moved.fetch_add(1, Ordering::Relaxed);
        let mut parts = volume.to_bytes().splitn(3, |byte| *byte == b'.');
        let (id, trash) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let name = [id, b".", trash, b".", n.to_string().as_bytes()].concat();
        CString::new(name).expect("made of C strings and digits")
    }
}

fn stuck(dir: &Dir, name: &CStr, errno: Errno) -> Outcome {
    let why = match errno {
        Errno::EBUSY | Errno::EXDEV => {
            "something is mounted on it (unmount that), or the trash is in a project of its own"
        }
        _ => errno.desc(),
    };
    warn!(path = %dir.path().display(), ?name, why, "part of a deleted volume cannot be erased yet");
    Outcome::Stuck
}

fn report(error: &DiskError) -> bool {
    warn!(
        error = error.with_cause(),
        "part of a deleted volume cannot be erased yet"
    );
    true
}

/// Work and rest in equal parts.
struct Pace {
    steps: u32,
    since: Instant,
}

impl Pace {
    fn new() -> Self {
        Self {
            steps: 0,
            since: Instant::now(),
        }
    }

    fn step(&mut self, stop: &Stop) -> Result<(), Stopped> {
        self.steps += 1;
        if self.steps.is_multiple_of(BATCH) {
            stop.rest(self.since.elapsed())?;
            self.since = Instant::now();
            debug!(removed = self.steps, "erasing");
        }
        Ok(())
    }
}
