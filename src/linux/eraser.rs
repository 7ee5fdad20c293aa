//! The eraser: empties a pool's trash in the background, without following a link or crossing a mount.
//!
//! What lies there was written by tenants: a million files in one directory, thousands of levels, immutable files, mounts.
//! Directories in a volume are not walked down but moved up into the trash, one rename each: no tree is too deep, and
//! whatever the power leaves is simply trash again. (Subvolumes of btrfs are destroyed whole: nothing can be moved out of one.)

use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tracing::{debug, error, warn};

use super::dir::Dir;
use super::disk::DATA;
use super::quota::{Destroyed, Quota};
use super::sys;
use crate::volume::id::PoolName;
use crate::volume::ports::DiskError;

/// What could not be erased is tried again so often: a mount below it may be gone then.
const RETRY: Duration = Duration::from_mins(1);

/// How soon it is looked again whether the last file of a project or subvolume is gone: the kernel cleans up behind it, XFS in
/// moments, btrfs in half a minute.
const COUNTED: Duration = Duration::from_secs(2);

/// And how often so soon.
const LOOKS: u32 = 60;

/// After so many removals the eraser rests for as long as they took: half of the disk's time stays with the tenants.
const BATCH: u32 = 256;

/// The thread that empties one trash.
pub(super) struct Eraser {
    pool: PoolName,
    quota: Arc<Quota>,
    signal: Arc<Signal>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    work: bool,
    stop: bool,
}

impl Eraser {
    /// An eraser that is not running yet.
    pub(super) fn new(pool: PoolName, quota: Arc<Quota>) -> Self {
        Self {
            pool,
            quota,
            signal: Arc::default(),
            thread: Mutex::default(),
        }
    }

    /// Starts it; it begins with what is in the trash already.
    pub(super) fn start(&self, trash: Dir) {
        self.wake();
        let (signal, quota) = (Arc::clone(&self.signal), Arc::clone(&self.quota));
        let spawned = thread::Builder::new()
            .name(format!("erase {}", self.pool))
            .spawn(move || {
                Work {
                    trash,
                    quota: &quota,
                    signal: &signal,
                    moved: AtomicU64::new(0),
                }
                .run();
            });
        match spawned {
            Ok(thread) => *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread),
            Err(why) => {
                error!(pool = %self.pool, %why, "no thread to erase deleted volumes; their space comes back after a restart");
            }
        }
    }

    /// Tells it that there is something in the trash.
    pub(super) fn wake(&self) {
        self.signal.set(|state| state.work = true);
    }
}

impl Drop for Eraser {
    fn drop(&mut self) {
        self.signal.set(|state| state.stop = true);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            error!(pool = %self.pool, "the eraser panicked");
        }
    }
}

impl Signal {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until there is work, or for `limit`; whether to go on.
    fn wait(&self, limit: Option<Duration>) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |state: &mut State| !state.work && !state.stop;
        let mut state = match limit {
            None => self
                .changed
                .wait_while(state, idle)
                .unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                self.changed
                    .wait_timeout_while(state, limit, idle)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        state.work = false;
        !state.stop
    }

    /// Rests, unless told to stop.
    fn rest(&self, time: Duration) -> Result<(), Stopped> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(state, time, |state| !state.stop);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.stop { Err(Stopped) } else { Ok(()) }
    }
}

/// The process ends; the rest is erased after the next start.
struct Stopped;

/// One run through the trash.
struct Work<'a> {
    trash: Dir,
    quota: &'a Quota,
    signal: &'a Signal,
    moved: AtomicU64,
}

/// How far one entry has come.
enum Outcome {
    Gone,
    /// Directories of it are in the trash on their own now.
    Shrunk,
    /// Something of it cannot be removed.
    Stuck,
}

impl Work<'_> {
    fn run(&self) {
        let (mut limit, mut looks) = (None, 0);
        while self.signal.wait(limit) {
            match self.empty() {
                Ok(left) => {
                    // What does not leave soon may never: a tenant can give a file to any project.
                    looks = if self.quota.give_back(&self.trash) {
                        looks + 1
                    } else {
                        0
                    };
                    let again = if looks < LOOKS { COUNTED } else { RETRY };
                    limit = if left {
                        Some(RETRY)
                    } else {
                        (looks > 0).then_some(again)
                    };
                }
                Err(Stopped) => return,
            }
        }
    }

    /// Erases what is in the trash; whether something is left that cannot be.
    fn empty(&self) -> Result<bool, Stopped> {
        let mut pace = Pace::new();
        loop {
            let (mut stuck, mut moving) = (false, false);
            match self.trash.names() {
                Err(error) => return Ok(report(&error)),
                Ok(names) => {
                    for name in names {
                        match name.and_then(|name| self.erase(&name, &mut pace)) {
                            Ok(Ok(Outcome::Gone)) => {}
                            Ok(Ok(Outcome::Shrunk)) => moving = true,
                            Ok(Ok(Outcome::Stuck)) => stuck = true,
                            Ok(Err(Stopped)) => return Err(Stopped),
                            Err(error) => stuck = report(&error),
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
    fn erase(&self, name: &CStr, pace: &mut Pace) -> Result<Result<Outcome, Stopped>, DiskError> {
        match remove(&self.trash, name) {
            Ok(()) => return Ok(Ok(Outcome::Gone)),
            Err(Errno::ENOTEMPTY) => match self.quota.destroy(&self.trash, name)? {
                Destroyed::NoSubvolume => {}
                Destroyed::Gone => return Ok(Ok(Outcome::Gone)),
                Destroyed::Holds(nested) => return Ok(Ok(self.move_all_up(nested, name))),
            },
            Err(errno) => return Ok(Ok(stuck(&self.trash, name, errno))),
        }
        let dir = self.trash.child(name)?;
        self.quota.leaves(&dir);
        let mut outcome = Outcome::Gone;
        // The directory of a volume: seen before it is gone. What cannot be opened is stuck, below.
        if let Ok(Some(data)) = dir.find_child(DATA) {
            self.quota.leaves(&data);
            drop(data);
            // Also when it is empty: its quota group has to be given back.
            if let Destroyed::Holds(nested) = self.quota.destroy(&dir, DATA)? {
                return Ok(Ok(self.move_all_up(nested, name)));
            }
        }
        for entry in dir.names()? {
            let entry = entry?;
            let removed = match remove(&dir, &entry) {
                // A subvolume is moved, too, and destroyed as an entry of the trash.
                Err(Errno::ENOTEMPTY) => {
                    if matches!(outcome, Outcome::Gone) {
                        outcome = Outcome::Shrunk;
                    }
                    self.move_up(&dir, &entry, name)
                }
                removed => removed,
            };
            if let Err(errno) = removed {
                outcome = stuck(&dir, &entry, errno);
            }
            if let Err(stopped) = pace.step(self.signal) {
                return Ok(Err(stopped));
            }
        }
        drop(dir);
        if let (false, Err(errno)) = (matches!(outcome, Outcome::Stuck), remove(&self.trash, name)) {
            outcome = stuck(&self.trash, name, errno);
        }
        Ok(Ok(outcome))
    }

    /// Takes subvolumes out of the one they are in, which is destroyed when it is looked at next.
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

    /// Takes a directory out of a deeper one, so that the trash stays flat.
    fn move_up(&self, dir: &Dir, name: &CStr, volume: &CStr) -> nix::Result<()> {
        loop {
            let to = self.numbered(volume);
            let moved = match dir.move_to(name, &self.trash, &to) {
                Err(Errno::EPERM) => loosen(dir, name).and_then(|()| dir.move_to(name, &self.trash, &to)),
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

/// Removes an entry of any kind; a directory only when it is empty.
fn remove(dir: &Dir, name: &CStr) -> nix::Result<()> {
    // unlink(2) of a directory fails with EISDIR on Linux.
    let attempt = || match dir.unlink(name) {
        Err(Errno::EISDIR) => dir.rmdir(name),
        unlinked => unlinked,
    };
    match attempt() {
        Err(Errno::ENOENT) => Ok(()),
        Err(Errno::EPERM) => loosen(dir, name).and_then(|()| attempt()),
        removed => removed,
    }
}

/// Clears the flags (chattr(1) `+i`, `+a`) that keep an entry, or anything in its directory, from being removed.
fn loosen(dir: &Dir, name: &CStr) -> nix::Result<()> {
    if dir.stat(c"")?.is_immutable() {
        sys::clear_immutable(dir)?;
    }
    let stat = dir.stat(name)?;
    // Only files and directories have flags, and opening anything else may have effects.
    if stat.is_immutable() && (stat.is_file() || stat.is_dir()) {
        let file = dir.open_beneath(name, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty())?;
        sys::clear_immutable(file)?;
    }
    Ok(())
}

fn stuck(dir: &Dir, name: &CStr, errno: Errno) -> Outcome {
    let why = match errno {
        Errno::EBUSY | Errno::EXDEV => {
            "something is mounted on it, or the trash is in a project of its own; unmount that"
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

    fn step(&mut self, signal: &Signal) -> Result<(), Stopped> {
        self.steps += 1;
        if self.steps.is_multiple_of(BATCH) {
            signal.rest(self.since.elapsed())?;
            self.since = Instant::now();
            debug!(removed = self.steps, "erasing");
        }
        Ok(())
    }
}
