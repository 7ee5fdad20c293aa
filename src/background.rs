//! What background work has in common: threads that panic begin again, those that rest can be stopped, and servers wait before they
//! accept again.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::error;

/// How long to wait before work begins again that has panicked: most likely it panics again.
const AFTER_PANIC: Duration = Duration::from_secs(10);

/// How long to wait after a failed accept(2): without descriptors, the next one fails as well.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Starts a thread that works until `work` returns. If it panics, which is a bug, that is logged, and it begins again: what else
/// the process does must not suffer. The kernel shows the first 15 bytes of its name.
pub(crate) fn spawn(name: String, mut work: impl FnMut() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.clone());
    thread.spawn(move || {
        // The panic itself has been logged by the panic hook.
        while catch_unwind(AssertUnwindSafe(&mut work)).is_err() {
            error!(
                thread = name,
                "background work panicked, which is a bug; it begins again in 10 s"
            );
            thread::sleep(AFTER_PANIC);
        }
    })
}

/// The owner is dropped: the process ends, or the pool is closed.
pub(crate) struct Stopped;

/// Tells a thread to stop. Clones share one state.
#[derive(Clone, Default)]
pub(crate) struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    pub(crate) fn stop(&self) {
        let (stopped, changed) = &*self.0;
        *stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }

    /// Sleeps for `time`, or until [`Stop::stop`].
    pub(crate) fn rest(&self, time: Duration) -> Result<(), Stopped> {
        let (stopped, changed) = &*self.0;
        let stopped = stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(stopped, time, |stopped| !*stopped);
        let (stopped, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *stopped { Err(Stopped) } else { Ok(()) }
    }
}
