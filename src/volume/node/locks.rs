//! One call at a time per volume, and per target.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use crate::volume::access::TargetPath;
use crate::volume::error::Reason;
use crate::volume::id::VolumeId;

/// What only one call may hold at a time.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Volume(VolumeId),
    Target(TargetPath),
}

/// The volumes and targets that calls are working on.
#[derive(Default)]
pub(super) struct VolumeLocks(Mutex<HashSet<Key>>);

/// A lock that is held until it is dropped.
pub(super) struct VolumeLock<'a> {
    held_in: &'a VolumeLocks,
    keys: Vec<Key>,
}

impl VolumeLocks {
    pub(super) fn lock_volume(&self, id: &VolumeId) -> Result<VolumeLock<'_>, Reason> {
        self.hold(vec![Key::Volume(id.clone())])
            .map_err(|()| Reason::Running("this volume".into()))
    }

    /// Locks a volume and a target: two volumes must not race for one target either.
    pub(super) fn lock_volume_and_target(&self, id: &VolumeId, target: &TargetPath) -> Result<VolumeLock<'_>, Reason> {
        self.hold(vec![Key::Volume(id.clone()), Key::Target(target.clone())])
            .map_err(|()| Reason::Running(format!("this volume or {target}")))
    }

    /// Locks a target, for a call that changes nothing of the volume.
    pub(super) fn lock_target(&self, target: &TargetPath) -> Result<VolumeLock<'_>, Reason> {
        self.hold(vec![Key::Target(target.clone())])
            .map_err(|()| Reason::Running(target.to_string()))
    }

    fn hold(&self, keys: Vec<Key>) -> Result<VolumeLock<'_>, ()> {
        let mut held = self.lock();
        if keys.iter().any(|key| held.contains(key)) {
            return Err(());
        }
        held.extend(keys.iter().cloned());
        Ok(VolumeLock { held_in: self, keys })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<Key>> {
        // A panic elsewhere cannot leave the set half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VolumeLock<'_> {
    fn drop(&mut self) {
        let mut held = self.held_in.lock();
        for key in &self.keys {
            held.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> VolumeId {
        VolumeId::parse(text).unwrap()
    }

    #[test]
    fn a_second_call_on_a_volume_is_refused_until_the_first_ends() {
        let locks = VolumeLocks::default();
        let first = locks.lock_volume(&id("a")).unwrap();
        assert!(locks.lock_volume(&id("a")).is_err());
        assert!(locks.lock_volume(&id("b")).is_ok());
        drop(first);
        assert!(locks.lock_volume(&id("a")).is_ok());
    }

    #[test]
    fn two_volumes_do_not_race_for_a_target() {
        let locks = VolumeLocks::default();
        let target = TargetPath::parse("/t").unwrap();
        let _first = locks.lock_volume_and_target(&id("a"), &target).unwrap();
        assert!(locks.lock_volume_and_target(&id("b"), &target).is_err());
        assert!(
            locks.lock_volume(&id("b")).is_ok(),
            "a refused call left its volume locked"
        );
    }
}
