//! What background threads have in common: they rest between pieces of work, and stop when their owner is dropped.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The owner is dropped: the process ends, or the pool is closed.
pub(super) struct Stopped;

/// Tells a thread to stop. Clones share one state.
#[derive(Clone, Default)]
pub(super) struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    pub(super) fn stop(&self) {
        let (stopped, changed) = &*self.0;
        *stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }

    /// Sleeps for `time`, or until [`Stop::stop`].
    pub(super) fn rest(&self, time: Duration) -> Result<(), Stopped> {
        let (stopped, changed) = &*self.0;
        let stopped = stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(stopped, time, |stopped| !*stopped);
        let (stopped, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *stopped { Err(Stopped) } else { Ok(()) }
    }
}

/// Starts a thread. The kernel shows the first 15 bytes of its name.
pub(super) fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).spawn(work)
}
