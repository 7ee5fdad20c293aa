//! One operation at a time per volume, and per target.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use super::access::TargetPath;
use super::error::Reason;
use super::id::VolumeId;

/// What only one operation may hold at a time.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Volume(VolumeId),
    Target(TargetPath),
}

/// The operations that are running.
#[derive(Default)]
pub(super) struct Operations(Mutex<HashSet<Key>>);

/// A running operation; it ends when this is dropped.
pub(super) struct Operation<'a> {
    running: &'a Operations,
    keys: Vec<Key>,
}

impl Operations {
    /// Begins an operation on a volume.
    pub(super) fn on_volume(&self, id: &VolumeId) -> Result<Operation<'_>, Reason> {
        self.begin(vec![Key::Volume(id.clone())])
            .map_err(|()| Reason::Running("this volume".into()))
    }

    /// Begins an operation on a volume and a target: two volumes must not race for one target either.
    pub(super) fn on_target(&self, id: &VolumeId, target: &TargetPath) -> Result<Operation<'_>, Reason> {
        self.begin(vec![Key::Volume(id.clone()), Key::Target(target.clone())])
            .map_err(|()| Reason::Running(format!("this volume or on {target}")))
    }

    fn begin(&self, keys: Vec<Key>) -> Result<Operation<'_>, ()> {
        let mut running = self.lock();
        if keys.iter().any(|key| running.contains(key)) {
            return Err(());
        }
        running.extend(keys.iter().cloned());
        Ok(Operation { running: self, keys })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<Key>> {
        // A panic elsewhere cannot leave the set half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        let mut running = self.running.lock();
        for key in &self.keys {
            running.remove(key);
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
    fn a_second_operation_on_a_volume_waits_its_turn() {
        let operations = Operations::default();
        let first = operations.on_volume(&id("a")).unwrap();
        assert!(operations.on_volume(&id("a")).is_err());
        assert!(operations.on_volume(&id("b")).is_ok());
        drop(first);
        assert!(operations.on_volume(&id("a")).is_ok());
    }

    #[test]
    fn two_volumes_do_not_race_for_a_target() {
        let operations = Operations::default();
        let target = TargetPath::parse("/t").unwrap();
        let _first = operations.on_target(&id("a"), &target).unwrap();
        assert!(operations.on_target(&id("b"), &target).is_err());
        assert!(
            operations.on_volume(&id("b")).is_ok(),
            "a refused operation must hold nothing"
        );
    }
}
