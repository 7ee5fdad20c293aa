//! A directory whose changes are made durable, one sync for many callers.
//!
//! A change is durable when a sync that began after it has succeeded. Callers that wait for the same sync share it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::dir::Dir;
use crate::volume::disk::DiskError;

pub(super) struct SyncedDir {
    pub(super) dir: Dir,
    /// How many changes were made.
    changed: AtomicU64,
    /// How many of these are durable.
    durable: AtomicU64,
    /// The last change whose sync failed.
    owed: AtomicU64,
    /// Held while a sync runs.
    syncing: Mutex<()>,
}

/// A change that was made: [`SyncedDir::sync`] makes it durable.
#[derive(Clone, Copy)]
pub(super) struct Change(u64);

impl SyncedDir {
    pub(super) fn new(dir: Dir) -> Self {
        Self {
            dir,
            changed: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            owed: AtomicU64::new(0),
            syncing: Mutex::new(()),
        }
    }

    /// Notes a change that has just taken effect.
    pub(super) fn changed(&self) -> Change {
        Change(self.changed.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Makes a change durable, and all that were made before this call.
    pub(super) fn sync(&self, Change(change): Change) -> Result<(), DiskError> {
        if self.durable.load(Ordering::Acquire) >= change {
            return Ok(());
        }
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        // The sync that was waited for may have begun after the change.
        if self.durable.load(Ordering::Acquire) >= change {
            return Ok(());
        }
        let covered = self.changed.load(Ordering::Acquire);
        let synced = self.dir.sync();
        match synced {
            Ok(()) => self.durable.store(covered, Ordering::Release),
            Err(_) => self.owe(Change(change)),
        }
        synced
    }

    /// Notes a change that its caller gave up to make durable.
    pub(super) fn owe(&self, Change(change): Change) {
        self.owed.fetch_max(change, Ordering::AcqRel);
    }

    /// Whether no failed sync has left a change open.
    pub(super) fn is_settled(&self) -> bool {
        self.durable.load(Ordering::Acquire) >= self.owed.load(Ordering::Acquire)
    }

    /// Makes the changes durable that failed syncs have left open.
    pub(super) fn settle(&self) -> Result<(), DiskError> {
        self.sync(Change(self.owed.load(Ordering::Acquire)))
    }
}
