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
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tracing::{debug, error, warn};

use super::dir::Dir;
use super::durable::SyncedDir;
use super::layout::DATA;
use super::quota::{Destroyed, Quota};
use super::sys;
use crate::background::{Stop, Stopped, spawn};
use crate::volume::disk::{DiskError, Inode};
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
        match remove(&self.trash.dir, name) {
            Ok(()) => return Ok(Ok(Outcome::Gone)),
            Err(Errno::ENOTEMPTY) => match self.quota.destroy(&self.trash.dir, name)? {
                Destroyed::NoSubvolume => {}
                Destroyed::Gone => return Ok(Ok(Outcome::Gone)),
                Destroyed::Holds(nested) => return Ok(Ok(self.move_all_up(nested, name))),
            },
            Err(errno) => return Ok(Ok(stuck(&self.trash.dir, name, errno))),
        }
        let dir = self.trash.dir.child(name)?;
        self.quota.note_erasing(&dir);
        let mut outcome = Outcome::Gone;
        // The directory of a volume: its project must be noted before it is gone. If it cannot be opened, the loop below
        // finds it stuck.
        if let Ok(Some(data)) = dir.find_child(DATA) {
            self.quota.note_erasing(&data);
            drop(data);
            // Even if it is empty: its quota group must be released.
            if let Destroyed::Holds(nested) = self.quota.destroy(&dir, DATA)? {
                return Ok(Ok(self.move_all_up(nested, name)));
            }
        }
        for entry in dir.names()? {
            let entry = entry?;
            let removed = match remove(&dir, &entry) {
                // A subvolume is also moved, and destroyed later as an entry of the trash.
                Err(Errno::ENOTEMPTY) => match self.move_up(&dir, &entry, name) {
                    Err(Errno::ENOKEY) => match self.remove_tree(&dir, &entry, pace)? {
                        Ok(removed) => removed,
                        Err(stopped) => return Ok(Err(stopped)),
                    },
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
                outcome = stuck(&dir, &entry, errno);
            }
            if let Err(stopped) = pace.step(&self.stop) {
                return Ok(Err(stopped));
            }
        }
        drop(dir);
        if let (false, Err(errno)) = (matches!(outcome, Outcome::Stuck), remove(&self.trash.dir, name)) {
            outcome = stuck(&self.trash.dir, name, errno);
        }
        Ok(Ok(outcome))
    }

    /// Removes a directory with all that is in it, from within: nothing can be moved out of an encrypted directory whose key is gone
    /// (fscrypt_prepare_rename in fs/crypto/hooks.c), but everything in it can be removed. Keeps one descriptor, however deep it is.
    fn remove_tree(
        &self,
        parent: &Dir,
        name: &CStr,
        pace: &mut Pace,
    ) -> Result<Result<nix::Result<()>, Stopped>, DiskError> {
        // The directories above the current one, and its name in each.
        let mut above: Vec<(Inode, CString)> = Vec::new();
        let mut dir = parent.child(name)?;
        loop {
            let mut deeper = None;
            for entry in dir.names()? {
                let entry = entry?;
                match remove(&dir, &entry) {
                    Ok(()) => {}
                    Err(Errno::ENOTEMPTY) => {
                        deeper = Some(entry);
                        break;
                    }
                    Err(errno) => return Ok(Ok(Err(errno))),
                }
                if let Err(stopped) = pace.step(&self.stop) {
                    return Ok(Err(stopped));
                }
            }
            if let Some(entry) = deeper {
                let child = dir.child(&entry)?;
                above.push((dir.inode()?, entry));
                dir = child;
            } else if let Some((inode, entry)) = above.pop() {
                dir = dir.parent(inode)?;
                if let Err(errno) = remove(&dir, &entry) {
                    return Ok(Ok(Err(errno)));
                }
            } else {
                return Ok(Ok(remove(parent, name)));
            }
        }
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
    if !stat.is_immutable() {
        return Ok(());
    }
    if stat.is_file() || stat.is_dir() {
        let file = dir.open_beneath(name, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty())?;
        return sys::clear_immutable(file);
    }
    // Opening anything else may have side effects.
    sys::clear_immutable_at(dir, name)
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
