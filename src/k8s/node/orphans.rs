//! Volumes on the pools of this node that have no HostVolume.

use std::sync::Arc;

use uuid::Uuid;

use super::cache::NodeCache;
use super::reconcile::Failed;
use super::tasks::Tasks;
use crate::volume::Node;
use crate::volume::disk::PoolVolume;
use crate::volume::host_volume::HostVolumeStore as _;
use crate::volume::id::{PoolName, VolumeId};

/// Volumes that are on a pool and have no HostVolume.
#[derive(Default)]
pub(super) struct Unassigned {
    /// Nobody uses them.
    pub(super) orphans: Vec<(PoolName, PoolVolume)>,
    /// They are mounted.
    pub(super) in_use: Vec<(PoolName, PoolVolume)>,
}

/// Finds the volumes on the pools that have no HostVolume. Discards those that never had data, and returns the rest.
pub(super) fn find_unassigned(
    node: &Node,
    cache: &NodeCache,
    tasks: &Arc<Tasks>,
    found: Vec<(PoolName, PoolVolume)>,
) -> Unassigned {
    let unassigned: Vec<_> = found
        .into_iter()
        .filter(|(_, volume)| !is_assigned(cache, volume) && !is_of_self_test(volume))
        .collect();
    let mut result = Unassigned::default();
    if unassigned.is_empty() {
        return result;
    }
    // Some may have been deleted since they were seen on the disk.
    let there = node.inventory().volumes;
    for (pool, volume) in unassigned {
        let same = |(other, there): &(PoolName, PoolVolume)| {
            (other, &there.id, &there.record) == (&pool, &volume.id, &volume.record)
        };
        if !there.iter().any(same) {
            continue;
        }
        let unused = volume.record.as_ref().ok().filter(|record| !record.ready);
        match unused.and_then(|record| record.uid) {
            Some(uid) => discard_unused(tasks, volume.id, uid),
            None if volume.mounts.is_empty() => result.orphans.push((pool, volume)),
            None => result.in_use.push((pool, volume)),
        }
    }
    result
}

fn is_of_self_test(volume: &PoolVolume) -> bool {
    volume.id.is_of_self_test() && volume.record.as_ref().is_ok_and(|record| record.uid.is_none())
}

fn is_assigned(cache: &NodeCache, volume: &PoolVolume) -> bool {
    cache.get(&volume.id).is_some_and(|assigned| match &volume.record {
        Ok(record) => record.uid == Some(assigned.uid),
        // An unreadable record is assumed to be that of the assigned volume.
        Err(_) => true,
    })
}

/// Asks the API server first: a first publish may be running while the watch is late.
fn discard_unused(tasks: &Arc<Tasks>, id: VolumeId, uid: Uuid) {
    tasks.start(id.clone(), move |reconciler| {
        let discard = || match reconciler.assignments.store.get(&id)? {
            Some(volume) if volume.uid == uid => Ok(()),
            _ => reconciler.node.delete_of(&id, uid).map_err(|error| *error.reason),
        };
        let task = "discard an unused volume";
        discard().map_err(|why| Failed { task, why })
    });
}
