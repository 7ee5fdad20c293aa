//! The HostVolumes of this node, kept up to date by one API watch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kube::api::DynamicObject;
use tokio::sync::Notify;

use crate::k8s::watch::{self, Follower, Unreadable};
use crate::volume::host_volume::HostVolume;
use crate::volume::id::{NodeName, VolumeId};

pub(super) struct NodeCache {
    node: NodeName,
    volumes: Mutex<BTreeMap<VolumeId, HostVolume>>,
    complete: AtomicBool,
    /// Notified when a list is complete.
    pub(super) listed: Notify,
    /// Notified when a volume is to be deleted.
    pub(super) delete: Notify,
}

impl NodeCache {
    pub(super) fn new(node: NodeName) -> Self {
        Self {
            node,
            volumes: Mutex::default(),
            complete: AtomicBool::new(false),
            listed: Notify::new(),
            delete: Notify::new(),
        }
    }

    /// Whether a list was received completely: before that, a volume may exist that is not in this cache.
    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    pub(super) fn get(&self, id: &VolumeId) -> Option<HostVolume> {
        self.lock().get(id).cloned()
    }

    pub(super) fn volumes(&self, wanted: impl Fn(&HostVolume) -> bool) -> Vec<HostVolume> {
        self.lock().values().filter(|volume| wanted(volume)).cloned().collect()
    }

    /// Stores the API server's answer to a change, unless the watch has removed the volume since.
    pub(super) fn update(&self, volume: HostVolume) {
        if let Some(known) = self.lock().get_mut(&volume.id)
            && known.uid == volume.uid
        {
            *known = volume;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, HostVolume>> {
        // The next event corrects what a panic leaves behind.
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Follower for &NodeCache {
    type Key = VolumeId;
    const KIND: &'static str = "HostVolume";

    fn applied(&self, object: DynamicObject) -> Result<VolumeId, Unreadable<VolumeId>> {
        let volume = watch::host_volume(object)?;
        let (id, unreadable, deleting) = (volume.id.clone(), volume.unreadable.clone(), volume.deleting);
        if volume.node == self.node {
            self.lock().insert(id.clone(), volume);
        }
        if deleting {
            self.delete.notify_one();
        }
        watch::readable(id, unreadable)
    }

    fn gone(&self, object: DynamicObject) {
        if let Some((id, uid)) = watch::identity(&object) {
            let mut volumes = self.lock();
            if volumes.get(&id).is_some_and(|known| known.uid == uid) {
                volumes.remove(&id);
            }
        }
    }

    fn retain(&self, listed: &BTreeSet<VolumeId>) {
        self.lock().retain(|id, _| listed.contains(id));
        self.complete.store(true, Ordering::Release);
        self.listed.notify_one();
    }
}
