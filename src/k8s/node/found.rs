//! What is on the pools of this node for its HostVolumes.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use crate::volume::disk::{PoolVolume, Unusable};
use crate::volume::host_volume::HostVolume;
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::node::Inventory;
use crate::volume::record::Record;

/// What is on the pools of this node for a HostVolume.
#[derive(Clone, Copy)]
pub(super) enum Found<'a> {
    /// The pools were not read, or it is too early to judge.
    Unknown,
    Record(&'a Record),
    /// The volume is not there, but the data of an earlier HostVolume of the same name.
    Earlier(&'a Record),
    /// The volume is there, but its record cannot be read.
    Broken,
    /// The volume's pool cannot be used.
    Unusable(&'a Unusable),
    Nothing,
}

impl<'a> Found<'a> {
    /// The record that was found, of this volume or of an earlier one.
    pub(super) fn record(self) -> Option<&'a Record> {
        match self {
            Self::Record(record) | Self::Earlier(record) => Some(record),
            Self::Unknown | Self::Broken | Self::Unusable(_) | Self::Nothing => None,
        }
    }
}

/// What was found on the pools, by volume.
pub(super) struct OnDisk<'a> {
    records: HashMap<(&'a VolumeId, Option<Uuid>), &'a Record>,
    /// Volumes that have data, whichever HostVolume it was made for.
    with_data: HashMap<&'a VolumeId, &'a Record>,
    broken: HashSet<&'a VolumeId>,
    unusable: &'a HashMap<PoolName, Unusable>,
}

impl<'a> OnDisk<'a> {
    pub(super) fn new(inventory: &'a Inventory) -> Self {
        let (mut records, mut with_data, mut broken) = (HashMap::new(), HashMap::new(), HashSet::new());
        for (_, PoolVolume { id, record, .. }) in &inventory.volumes {
            match record {
                Ok(record) => {
                    records.insert((id, record.uid), record);
                    if record.ready {
                        with_data.insert(id, record);
                    }
                }
                Err(_) => drop(broken.insert(id)),
            }
        }
        let unusable = &inventory.unusable;
        Self {
            records,
            with_data,
            broken,
            unusable,
        }
    }

    pub(super) fn find(&self, volume: &'a HostVolume) -> Found<'a> {
        if let Some(record) = self.records.get(&(&volume.id, Some(volume.uid))) {
            Found::Record(record)
        } else if let Some(record) = self.with_data.get(&volume.id) {
            Found::Earlier(record)
        } else if self.broken.contains(&volume.id) {
            Found::Broken
        } else if let Some(why) = self.unusable.get(&volume.pool) {
            Found::Unusable(why)
        } else {
            Found::Nothing
        }
    }
}
