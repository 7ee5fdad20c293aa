//! Volumes on the pools of this node that have no HostVolume.

use tracing::warn;
use uuid::Uuid;

use super::assignments::ApiAssignments;
use super::cache::NodeCache;
use crate::metrics::Metrics;
use crate::volume::disk::PoolVolume;
use crate::volume::host_volume::HostVolumeStore as _;
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::{Node, Reason};

/// Finds the orphans among the volumes on the pools. Discards those that never had data, and returns the rest.
pub(super) fn find_orphans(
    node: &Node,
    cache: &NodeCache,
    assignments: &ApiAssignments,
    metrics: &Metrics,
    found: Vec<(PoolName, PoolVolume)>,
) -> Vec<(PoolName, PoolVolume)> {
    let unassigned: Vec<_> = found
        .into_iter()
        .filter(|(_, volume)| !is_assigned(cache, volume) && !is_of_self_test(volume))
        .collect();
    if unassigned.is_empty() {
        return unassigned;
    }
    // Some may have been deleted since they were seen on the disk.
    let there = node.inventory().volumes;
    let mut orphans = Vec::new();
    for (pool, volume) in unassigned {
        let same = |(other, there): &(PoolName, PoolVolume)| {
            (other, &there.id, &there.record) == (&pool, &volume.id, &volume.record)
        };
        if !there.iter().any(same) {
            continue;
        }
        let unused = volume.record.as_ref().ok().filter(|record| !record.ready);
        let Some(uid) = unused.and_then(|record| record.uid) else {
            orphans.push((pool, volume));
            continue;
        };
        if let Err(why) = discard_unused(node, assignments, &volume.id, uid) {
            metrics.failed("discard an unused volume");
            warn!(volume.id = %volume.id, node = %node.name(), %why, "cannot discard a volume that was never used; trying again");
        }
    }
    orphans
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
fn discard_unused(node: &Node, assignments: &ApiAssignments, id: &VolumeId, uid: Uuid) -> Result<(), Reason> {
    match assignments.store.get(id)? {
        Some(volume) if volume.uid == uid => Ok(()),
        _ => node.delete_of(id, uid).map_err(|error| *error.reason),
    }
}
