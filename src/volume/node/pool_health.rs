//! A configured pool, with a thread of its own that watches its disk.
//!
//! A disk may hang at any moment, and then every call that asks it hangs, too. So only this thread asks a disk how it is: it opens
//! the pool, inspects it every five seconds, and keeps the answer. Probe, capacity, the HostNode and every look-up read that answer;
//! an inspection that does not return is itself the answer that the disk hangs. A pool that cannot be opened is tried again: the
//! other pools and the mounts of running pods must not suffer from one bad disk.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::open_pool::OpenPool;
use crate::background;
use crate::volume::disk::{Absent, Host, Inspection, PoolConfig, Unusable};
use crate::volume::id::PoolName;
use crate::volume::pool_status::PoolStatus;
use crate::volume::size::Bytes;

/// How often the disk is inspected. Each inspection writes a little, which keeps an idle disk awake.
const PERIOD: Duration = Duration::from_secs(5);

/// An inspection that takes longer means that the disk hangs. A busy disk answers sooner.
const HANGS: Duration = Duration::from_secs(5);

/// A call that takes longer means the same. An inspection waits for no sync, so a filesystem that defers its writes may pass it.
const CALL_HANGS: Duration = Duration::from_secs(30);

/// How long a call waits for a new inspection of a pool that could not be used at the last one.
const PATIENCE: Duration = Duration::from_secs(1);

/// Dropping it closes it, and ends the thread as soon as the disk answers.
pub(super) struct Pool {
    pub(super) config: PoolConfig,
    watched: Arc<Watched>,
}

struct Watched {
    name: PoolName,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The pool once it was opened. Its volumes stay known while its disk cannot be used.
    open: Option<Arc<OpenPool>>,
    /// The answer of the last inspection.
    last: Result<Inspection, Unusable>,
    /// When the running inspection began.
    since: Option<Instant>,
    /// How many inspections have ended.
    ended: u64,
    /// A call waits for an inspection.
    wanted: bool,
    stop: bool,
}

impl State {
    /// What `ended` will be once an inspection that begins after now has ended: a running one began before.
    fn ended_after_next(&self) -> u64 {
        self.ended + if self.since.is_some() { 2 } else { 1 }
    }
}

impl Pool {
    /// Begins to open the pool.
    pub(super) fn new(config: PoolConfig, host: Arc<dyn Host>, calls_max: usize) -> Self {
        let state = State {
            open: None,
            last: Err(Unusable("it has not been opened yet".into())),
            since: Some(Instant::now()),
            ended: 0,
            wanted: false,
            stop: false,
        };
        let watched = Arc::new(Watched {
            name: config.name.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let (shared, pool) = (Arc::clone(&watched), config.clone());
        let watch = move || shared.run(pool.clone(), &*host, calls_max);
        if let Err(error) = background::spawn(format!("watch {}", config.name), watch) {
            let why = format!("cannot start a thread to watch it: {error}; restart hostdir on this node");
            watched.end(Err(Unusable(why)), None);
        }
        Self { config, watched }
    }

    /// The pool, if it can be used.
    pub(super) fn get(&self) -> Result<Arc<OpenPool>, Unusable> {
        self.inspected().map(|(pool, _)| pool)
    }

    /// The pool and its last inspection. Does not touch the disk, and waits for a second at most.
    fn inspected(&self) -> Result<(Arc<OpenPool>, Inspection), Unusable> {
        let (arrived, mut state) = (Instant::now(), self.watched.lock());
        let fresh = state.ended_after_next();
        loop {
            self.refuse_if_stopped_or_hung(&state)?;
            match (&state.open, &state.last) {
                (Some(pool), Ok(inspection)) => return Ok((Arc::clone(pool), inspection.clone())),
                (_, Err(why)) if state.ended >= fresh => return Err(why.clone()),
                _ => {}
            }
            let running = state.since.map_or(Duration::ZERO, |since| since.elapsed());
            let left = PATIENCE.saturating_sub(running.max(arrived.elapsed()));
            if left.is_zero() {
                return Err(self.unanswered(&state));
            }
            if !std::mem::replace(&mut state.wanted, true) {
                self.watched.changed.notify_all();
            }
            let waited = self.watched.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn refuse_if_stopped_or_hung(&self, state: &State) -> Result<(), Unusable> {
        if state.stop {
            let why = "hostdir is stopping on this node; the call will be retried";
            return Err(Unusable(why.into()));
        }
        if state.since.is_some_and(|since| since.elapsed() > HANGS) {
            return Err(self.unanswered(state));
        }
        let oldest = state.open.as_ref().and_then(|pool| pool.oldest_call());
        match oldest.filter(|age| *age > CALL_HANGS) {
            Some(age) => Err(self.hangs(age)),
            None => Ok(()),
        }
    }

    fn unanswered(&self, state: &State) -> Unusable {
        let path = self.config.path.display();
        match (&state.open, state.since, &state.last) {
            (None, Some(_), _) => Unusable(format!(
                "{path} is still being opened; if this persists, its disk hangs: check the kernel log"
            )),
            (Some(_), Some(since), _) => self.hangs(since.elapsed()),
            (_, None, Err(why)) => why.clone(),
            (_, None, Ok(_)) => Unusable(format!("{path} has not been inspected yet")),
        }
    }

    /// The pool, if it was ever opened: its volumes stay known while its disk cannot be used.
    pub(super) fn known(&self) -> Option<Arc<OpenPool>> {
        self.watched.lock().open.clone()
    }

    fn hangs(&self, age: Duration) -> Unusable {
        // In steps, because each new text is a write to the API server.
        let seconds = age.as_secs();
        let age = match seconds {
            0..10 => format!("{seconds} s"),
            10..60 => format!("{} s", seconds / 10 * 10),
            _ => format!("{} min", seconds / 60),
        };
        let path = self.config.path.display();
        Unusable(format!(
            "{path} has not answered for {age}: its disk hangs; check the kernel log"
        ))
    }

    /// Checks that the pool can be used for new volumes.
    pub(super) fn writable(&self) -> Result<(), Unusable> {
        self.inspected().and_then(|(_, inspection)| inspection.writable)
    }

    pub(super) fn status(&self) -> PoolStatus {
        let usable = self.inspected().and_then(|(pool, inspection)| {
            inspection.writable?;
            Ok((pool, inspection.space?, inspection.enforcement))
        });
        usable.map_or_else(
            |why| PoolStatus {
                limits: self.config.limits,
                id: None,
                filesystem: None,
                foreign: Bytes(0),
                space: Err(why.to_string()),
                enforcement: None,
                unenforced: 0,
            },
            |(pool, space, enforcement)| pool.status(space, enforcement),
        )
    }

    /// The sum of what is allocated to its volumes; zero while it was never opened.
    pub(super) fn allocated(&self) -> Bytes {
        self.known().map_or(Bytes(0), |pool| pool.allocated())
    }

    /// Lets no new call use the pool. It is unlocked as soon as the calls that run have ended.
    pub(super) fn close(&self) {
        let mut state = self.watched.lock();
        state.stop = true;
        state.open = None;
        drop(state);
        self.watched.changed.notify_all();
    }

    /// Waits for an inspection that begins after this call.
    #[cfg(test)]
    pub(super) fn inspect_now(&self) {
        let mut state = self.watched.lock();
        let fresh = state.ended_after_next();
        while state.ended < fresh {
            state.wanted = true;
            self.watched.changed.notify_all();
            state = self.watched.changed.wait(state).unwrap();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

impl Watched {
    fn run(&self, mut config: PoolConfig, host: &dyn Host, calls_max: usize) {
        loop {
            let state = self.lock();
            if state.stop {
                return;
            }
            let known = state.open.clone();
            drop(state);
            let inspected = catch_unwind(AssertUnwindSafe(|| inspect(known.clone(), &config, host, calls_max)));
            let (answer, open) = inspected.unwrap_or_else(|_| {
                let why = "inspecting it failed with an internal error, which is a bug; see hostdir's log on this node";
                (Err(Unusable(why.into())), known)
            });
            // From now on no other pool, and no empty directory, can take its place.
            config.expected = open.as_ref().map_or(config.expected, |pool| Some(pool.id));
            if let Some(pool) = &open {
                pool.reload_broken();
            }
            self.end(answer, open);
            self.wait();
        }
    }

    fn end(&self, answer: Result<Inspection, Unusable>, open: Option<Arc<OpenPool>>) {
        let mut state = self.lock();
        if let (Err(why), true) = (&answer, state.last.as_ref().err() != answer.as_ref().err()) {
            warn!(pool = %self.name, %why, "cannot use a pool; trying again");
        }
        if open.is_some() && answer.is_ok() && state.last.is_err() && state.open.is_some() {
            info!(pool = %self.name, "the pool can be used again");
        }
        // A pool that is closed stays so.
        state.open = open.filter(|_| !state.stop);
        state.last = answer;
        state.since = None;
        state.ended = state.ended.saturating_add(1);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until the next inspection is due, and notes that it begins.
    fn wait(&self) {
        let idle = |state: &mut State| !state.wanted && !state.stop;
        let waited = self.changed.wait_timeout_while(self.lock(), PERIOD, idle);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.wanted = false;
        state.since = Some(Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic leaves no change half done: each is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Inspects a pool, and opens it if it is not `known` yet. Returns the answer, and the pool if it is open.
fn inspect(
    known: Option<Arc<OpenPool>>,
    config: &PoolConfig,
    host: &dyn Host,
    calls_max: usize,
) -> (Result<Inspection, Unusable>, Option<Arc<OpenPool>>) {
    let open = || Ok(Arc::new(OpenPool::new(config, host.open(config)?, calls_max)));
    let pool = match known.map_or_else(open, Ok) {
        Ok(pool) => pool,
        Err(why) => return (Err(why), None),
    };
    match pool.inspect() {
        Ok(inspection) => (Ok(inspection), Some(pool)),
        Err(Absent::Unusable(why)) => (Err(why), Some(pool)),
        Err(Absent::Remounted) => {
            info!(pool = %config.name, path = %config.path.display(), "its disk was mounted again: opening the pool again");
            // The pool stays locked until the calls that use it have ended.
            (Err(Absent::Remounted.into()), None)
        }
    }
}
