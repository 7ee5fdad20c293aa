//! Volumes in elected mode: recorded by a controller, made by their node.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::*;
use crate::volume::host_volume::HostVolume;
use crate::volume::host_volume::tests::host_volume;
use crate::volume::record::{Phase, PoolId, Record};

/// HostVolumes in memory.
#[derive(Default)]
struct HostVolumes(Mutex<HashMap<VolumeId, HostVolume>>);

impl HostVolumes {
    fn make(&self, name: &str) -> HostVolume {
        let host_volume = host_volume(name);
        self.0.lock().unwrap().insert(id(name), host_volume.clone());
        host_volume
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut HostVolume)) {
        change(self.0.lock().unwrap().get_mut(&id(name)).unwrap());
    }
}

impl Assignments for HostVolumes {
    fn get_cached(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        Ok(self.0.lock().unwrap().get(id).cloned())
    }

    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        self.get_cached(id)
    }

    fn mark_ready(&self, record: &Record) -> Result<(), Reason> {
        let mut host_volumes = self.0.lock().unwrap();
        let host_volume = host_volumes.get_mut(&record.id).ok_or(Reason::NoSuchVolume)?;
        if host_volume.deleting {
            return Err(Reason::Deleting);
        }
        host_volume.phase = Phase::Ready;
        host_volume.made_on = Some(record.pool_id);
        Ok(())
    }
}

/// A node in elected mode, and a way to publish a HostVolume of it at `/t`.
struct Assigned {
    host_volumes: Arc<HostVolumes>,
    fixture: Fixture,
}

impl Assigned {
    fn new() -> Self {
        let host_volumes = Arc::new(HostVolumes::default());
        let fixture = Fixture::with_assignments(Memory::default(), Arc::clone(&host_volumes) as _);
        Self { host_volumes, fixture }
    }

    fn restarted(self) -> Self {
        let fixture = Fixture::with_assignments(self.fixture.memory, Arc::clone(&self.host_volumes) as _);
        Self { fixture, ..self }
    }

    fn publish(&self, name: &str, uid: Uuid) -> Result<(), Reason> {
        let wanted = PublishRequest {
            uid: Some(uid),
            ..publish(name, "/t", AccessMode::SingleNodeWriter)
        };
        self.fixture.node.publish(&wanted).map_err(|error| *error.reason)
    }

    fn unpublish(&self, name: &str) {
        self.fixture.node.unpublish(&id(name), &target("/t")).unwrap();
    }
}

#[test]
fn a_volume_is_made_and_marked_when_a_pod_first_uses_it() {
    let node = Assigned::new();
    let host_volume = node.host_volumes.make("a");
    node.publish("a", host_volume.uid).unwrap();
    let marked = node.host_volumes.get_cached(&id("a")).unwrap().unwrap();
    assert_eq!(marked.phase, Phase::Ready);
    node.unpublish("a");
    // From here on the disk is enough: the assignments need not answer.
    node.host_volumes.0.lock().unwrap().clear();
    node.publish("a", host_volume.uid).unwrap();
}

#[test]
fn a_volume_that_cannot_be_marked_has_no_data() {
    let node = Assigned::new();
    let host_volume = node.host_volumes.make("a");
    node.host_volumes.change("a", |host_volume| host_volume.deleting = true);
    assert!(matches!(node.publish("a", host_volume.uid), Err(Reason::Deleting)));
    assert!(!node.fixture.memory.has(&pool("default"), &id("a")));
    node.host_volumes.0.lock().unwrap().clear();
    assert!(matches!(node.publish("a", host_volume.uid), Err(Reason::NoSuchVolume)));
}

#[test]
fn a_crash_between_mark_and_directory_is_made_good() {
    let node = Assigned::new();
    let host_volume = node.host_volumes.make("a");
    node.fixture.memory.fail("make_directory", DiskErrorKind::Failed);
    node.publish("a", host_volume.uid).unwrap_err();
    assert_eq!(
        node.host_volumes.get_cached(&id("a")).unwrap().unwrap().phase,
        Phase::Ready,
        "the directory was made before the mark"
    );
    let node = node.restarted();
    node.publish("a", host_volume.uid).unwrap();
}

#[test]
fn a_volume_that_was_ready_elsewhere_is_never_made_anew() {
    let node = Assigned::new();
    let host_volume = node.host_volumes.make("a");
    let lost = PoolId::random();
    node.host_volumes.change("a", |host_volume| {
        host_volume.phase = Phase::Ready;
        host_volume.made_on = Some(lost);
    });
    let refusal = node.publish("a", host_volume.uid).unwrap_err();
    assert!(matches!(refusal, Reason::DataMissing { .. }), "{refusal}");
    assert!(refusal.to_string().contains(&lost.to_string()), "{refusal}");
    node.fixture.set_absent(&pool("other"), true);
    let refusal = node.publish("a", host_volume.uid).unwrap_err();
    assert!(
        matches!(refusal, Reason::PoolUnusable { .. }),
        "the data may be on the absent pool: {refusal}"
    );
}

#[test]
fn the_data_of_an_earlier_volume_is_neither_mounted_nor_deleted() {
    let node = Assigned::new();
    let first = node.host_volumes.make("a");
    node.publish("a", first.uid).unwrap();
    node.unpublish("a");
    let second = node.host_volumes.make("a");
    let refusal = node.publish("a", second.uid).unwrap_err();
    assert!(matches!(refusal, Reason::Predecessor { .. }), "{refusal}");
    node.fixture.node.delete_of(&id("a"), second.uid).unwrap();
    assert!(
        node.fixture.memory.has(&pool("default"), &id("a")),
        "the data of the earlier volume was deleted"
    );
    node.fixture.node.delete_of(&id("a"), first.uid).unwrap();
    assert!(!node.fixture.memory.has(&pool("default"), &id("a")));
    node.publish("a", second.uid).unwrap();
}

#[test]
fn a_host_volume_with_another_uid_gives_no_empty_volume() {
    let node = Assigned::new();
    let first = node.host_volumes.make("a");
    node.host_volumes.make("a");
    let refusal = node.publish("a", first.uid).unwrap_err();
    assert!(matches!(refusal, Reason::Successor { .. }), "{refusal}");
    assert!(!node.fixture.memory.has(&pool("default"), &id("a")));
}

#[test]
fn the_unused_record_of_an_earlier_volume_is_replaced() {
    let node = Assigned::new();
    let first = node.host_volumes.make("a");
    node.fixture.memory.fail("make_directory", DiskErrorKind::Failed);
    node.publish("a", first.uid).unwrap_err();
    let second = node.host_volumes.make("a");
    node.publish("a", second.uid).unwrap();
}

#[test]
fn a_volume_of_another_node_is_refused() {
    let node = Assigned::new();
    let host_volume = node.host_volumes.make("a");
    node.host_volumes
        .change("a", |host_volume| host_volume.node = NodeName::parse("node-b").unwrap());
    assert!(matches!(node.publish("a", host_volume.uid), Err(Reason::OtherNode)));
}

#[test]
fn a_node_limits_a_volume_to_what_is_allocated_and_no_more() {
    let assigned = Assigned::new();
    let host_volume = assigned.host_volumes.make("a");
    assigned.publish("a", host_volume.uid).unwrap();
    let node = &assigned.fixture.node;
    let at_least = |gib: u64| SizeRange {
        required: Bytes(gib << 30),
        limit: None,
    };
    let refusal = node.expand_here(&id("a"), at_least(2)).unwrap_err();
    assert!(matches!(*refusal.reason, Reason::NotAllocated { .. }), "{refusal}");
    let grow = |host_volume: &mut HostVolume| host_volume.spec.bytes = Bytes(3 << 30);
    assigned.host_volumes.change("a", grow);
    // A caller that asks for less has an outdated size.
    assert_eq!(node.expand_here(&id("a"), at_least(2)).unwrap(), Bytes(3 << 30));
    assert_eq!(node.get(&id("a")).unwrap().bytes, Bytes(3 << 30));
    let allocated = node.pools()[0].usage.as_ref().unwrap().allocated;
    assert_eq!(allocated, Bytes(3 << 30));
    // A HostVolume with another UID is another volume.
    assert!(node.grow_to(&id("a"), Uuid::new_v4(), Bytes(9 << 30)).is_err());
    assert_eq!(
        node.grow_to(&id("a"), host_volume.uid, Bytes(1 << 30)).unwrap(),
        Bytes(3 << 30)
    );
}

#[test]
fn an_expansion_that_the_disk_refuses_allocates_nothing() {
    let assigned = Assigned::new();
    let host_volume = assigned.host_volumes.make("a");
    assigned.publish("a", host_volume.uid).unwrap();
    assigned
        .host_volumes
        .change("a", |host_volume| host_volume.spec.bytes = Bytes(3 << 30));
    let node = &assigned.fixture.node;
    assigned.fixture.memory.fail("resize", DiskErrorKind::Failed);
    node.grow_to(&id("a"), host_volume.uid, Bytes(3 << 30)).unwrap_err();
    let allocated = || node.pools()[0].usage.as_ref().unwrap().allocated;
    assert_eq!(allocated(), Bytes::GIB);
    node.grow_to(&id("a"), host_volume.uid, Bytes(3 << 30)).unwrap();
    assert_eq!(allocated(), Bytes(3 << 30));
}
