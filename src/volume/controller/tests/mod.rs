//! Controllers on a store in memory that fails on demand.

mod nodes;
mod room;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use super::cache::{ClusterCache, List, NodeState};
use super::*;
use crate::volume::control::Topology;
use crate::volume::host_volume::tests::host_volume;
use crate::volume::id::NodeName;
use crate::volume::pool_status::PoolStatus;
use crate::volume::record::PoolId;
use crate::volume::room::{Limits, Space};
use crate::volume::size::SizeRange;

/// A store that several controllers share. They learn of changes through [`Fixture::watch`].
#[derive(Default)]
struct MemoryStore {
    entries: Mutex<BTreeMap<VolumeId, HostVolume>>,
    /// Answers get lost, but the changes are made anyway.
    loses_answers: AtomicBool,
    /// Nothing is created.
    refuses: AtomicBool,
    gate: Gate,
}

/// Holds calls until all have either come here or ended, so that they are certainly concurrent.
#[derive(Default)]
struct Gate {
    /// How many are awaited; none are held if 0.
    awaited: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    fn arrive(&self) {
        let mut awaited = self.awaited.lock().unwrap();
        *awaited = awaited.saturating_sub(1);
        self.changed.notify_all();
    }

    fn pass(&self) {
        self.arrive();
        let awaited = self.awaited.lock().unwrap();
        let held = self
            .changed
            .wait_timeout_while(awaited, Duration::from_secs(30), |awaited| *awaited > 0);
        assert!(!held.unwrap().1.timed_out(), "some calls neither came nor ended");
    }
}

impl MemoryStore {
    fn answer<T>(&self, answer: T) -> Result<T, Reason> {
        if self.loses_answers.load(Ordering::Relaxed) {
            let why = "no answer".into();
            return Err(Reason::Api { verb: "ask", why });
        }
        Ok(answer)
    }

    fn change(&self, id: &VolumeId, change: impl FnOnce(&mut HostVolume)) {
        let mut entries = self.entries.lock().unwrap();
        let entry = entries.get_mut(id).unwrap();
        change(entry);
        entry.version.push('+');
    }
}

impl HostVolumeStore for MemoryStore {
    fn create_or_get(&self, new: &NewHostVolume) -> Result<(HostVolume, bool), NotCreated> {
        self.gate.pass();
        if self.refuses.load(Ordering::Relaxed) {
            return Err(NotCreated {
                reason: Reason::Waiting("refused".into()),
                unsure: false,
            });
        }
        let mut entries = self.entries.lock().unwrap();
        if let Some(there) = entries.get(&new.id) {
            return self.answer((there.clone(), false)).map_err(NotCreated::unsure);
        }
        let host_volume = HostVolume {
            node: new.node.clone(),
            pool: new.pool.clone(),
            spec: new.spec.clone(),
            created: Timestamp::now(),
            ..host_volume(new.id.as_str())
        };
        entries.insert(new.id.clone(), host_volume.clone());
        self.answer((host_volume, true)).map_err(NotCreated::unsure)
    }

    fn get(&self, id: &VolumeId) -> Result<Option<HostVolume>, Reason> {
        self.answer(self.entries.lock().unwrap().get(id).cloned())
    }

    fn delete(&self, id: &VolumeId, uid: Uuid) -> Result<Option<HostVolume>, Reason> {
        let mut entries = self.entries.lock().unwrap();
        let Some(entry) = entries.get_mut(id) else {
            return self.answer(None);
        };
        assert_eq!(entry.uid, uid, "another HostVolume was deleted");
        entry.deleting = true;
        entry.version.push('-');
        self.answer(Some(entry.clone()))
    }

    fn set_capacity(&self, host_volume: &HostVolume, bytes: Bytes) -> Result<Option<HostVolume>, Reason> {
        let mut entries = self.entries.lock().unwrap();
        let entry = entries.get_mut(&host_volume.id).ok_or(Reason::NoSuchVolume)?;
        if entry.version != host_volume.version {
            return self.answer(None);
        }
        entry.spec.bytes = bytes;
        entry.version.push('+');
        self.answer(Some(entry.clone()))
    }

    fn remove_finalizer(&self, host_volume: &HostVolume) -> Result<bool, Reason> {
        let mut entries = self.entries.lock().unwrap();
        match entries.get(&host_volume.id) {
            Some(entry) if entry.version != host_volume.version => self.answer(false),
            _ => {
                entries.remove(&host_volume.id);
                self.answer(true)
            }
        }
    }
}

struct Fixture {
    store: Arc<MemoryStore>,
    cache: Arc<ClusterCache>,
    controller: Controller,
    fence: Arc<Fence>,
}

const READY: NodeState = NodeState {
    ready: true,
    cordoned: false,
    tainted: false,
};

fn node(number: usize) -> NodeName {
    NodeName::parse(&format!("node-{number}")).unwrap()
}

fn default_pool() -> PoolName {
    PoolName::default()
}

fn id(text: &str) -> VolumeId {
    VolumeId::parse(text).unwrap()
}

fn request(name: &str, gib: u64, on: &[usize]) -> CreateRequest {
    let segments: Vec<String> = on.iter().map(|number| node(*number).segment()).collect();
    CreateRequest {
        topology: Topology {
            requisite: (!segments.is_empty()).then(|| segments.clone()),
            preferred: segments,
        },
        ..CreateRequest::of(name, gib)
    }
}

/// A pool of `gib` GiB.
fn pool_of(gib: u64, id: PoolId) -> BTreeMap<PoolName, PoolStatus> {
    let space = Space {
        total: Bytes(gib << 30),
        available: Bytes(gib << 30),
        ..Space::default()
    };
    let pool = PoolStatus {
        id: Some(id),
        filesystem: Some("ext4".into()),
        space: Ok(space),
        foreign: Bytes(0),
        limits: Limits::default(),
        enforcement: None,
        unenforced: 0,
    };
    BTreeMap::from([(default_pool(), pool)])
}

impl Fixture {
    /// Nodes 1, 2 and 3, with 10, 20 and 30 GiB.
    fn new() -> Self {
        Self::beside(Arc::default())
    }

    /// Another controller with the same store.
    fn beside(store: Arc<MemoryStore>) -> Self {
        let cache = Arc::new(ClusterCache::default());
        for number in 1..=3 {
            cache.set_node(node(number), READY);
            cache.set_pools(node(number), pool_of(10 * number as u64, PoolId::random()));
        }
        let nodes: BTreeSet<NodeName> = (1..=3).map(node).collect();
        cache.retain_nodes(&nodes);
        cache.retain_pools(&nodes);
        cache.retain_volumes(&BTreeSet::new());
        let fence = Arc::<Fence>::default();
        let controller = Controller::new(Arc::clone(&store) as _, Arc::clone(&cache), Arc::clone(&fence));
        Self {
            store,
            cache,
            controller,
            fence,
        }
    }

    /// Lets the cache catch up with the store.
    fn watch(&self) {
        let entries = self.store.entries.lock().unwrap();
        for host_volume in entries.values() {
            self.cache.apply(host_volume);
        }
        self.cache.retain_volumes(&entries.keys().cloned().collect());
    }

    fn room(&self, number: usize) -> u64 {
        let segment = node(number).segment();
        self.controller
            .room(&default_pool(), Some(&segment))
            .unwrap()
            .unwrap()
            .0
            >> 30
    }

    fn create(&self, name: &str, gib: u64, on: &[usize]) -> Result<Volume, Reason> {
        self.controller
            .create(&request(name, gib, on))
            .map_err(|error| *error.reason)
    }

    fn delete(&self, name: &str) -> Result<(), Reason> {
        self.controller.delete(&id(name)).map_err(|error| *error.reason)
    }
}

#[test]
fn a_volume_goes_where_it_is_asked_for_and_else_where_most_room_is() {
    let fixture = Fixture::new();
    assert_eq!(fixture.create("a", 1, &[2, 3]).unwrap().node, node(2));
    assert_eq!(fixture.create("b", 1, &[]).unwrap().node, node(3));
    assert_eq!((fixture.room(1), fixture.room(2), fixture.room(3)), (10, 19, 29));
    // The preferred node has too little room.
    assert_eq!(fixture.create("c", 15, &[1, 2]).unwrap().node, node(2));
    let refusal = fixture.create("d", 15, &[1]).unwrap_err();
    assert!(matches!(refusal, Reason::NoNode(_)), "{refusal}");
    assert!(
        refusal
            .to_string()
            .contains("of node node-1, which has room for 10 GiB"),
        "{refusal}"
    );
    let refusal = fixture.create("e", 1, &[7]).unwrap_err();
    assert!(
        refusal.to_string().contains("node node-7: hostdir has not published"),
        "{refusal}"
    );
}

#[test]
fn two_controllers_make_one_volume() {
    let one = Fixture::new();
    let other = Fixture::beside(Arc::clone(&one.store));
    let made = one.create("a", 1, &[1]).unwrap();
    assert_eq!(other.create("a", 1, &[1]).unwrap(), made);
    let refusal = other.create("a", 2, &[1]).unwrap_err();
    assert!(matches!(refusal, Reason::Exists(_)), "{refusal}");
    let refusal = other.create("a", 1, &[2]).unwrap_err();
    assert!(matches!(refusal, Reason::Exists(_)), "{refusal}");
}

#[test]
fn an_answer_that_was_lost_is_found_again() {
    let fixture = Fixture::new();
    fixture.store.loses_answers.store(true, Ordering::Relaxed);
    let refusal = fixture.create("a", 1, &[1]).unwrap_err();
    assert!(matches!(refusal, Reason::Api { .. }), "{refusal}");
    fixture.store.loses_answers.store(false, Ordering::Relaxed);
    let found = fixture.create("a", 1, &[1]).unwrap();
    assert_eq!(fixture.store.entries.lock().unwrap()[&id("a")].uid, found.uid.unwrap());
}

#[test]
fn what_never_had_data_goes_without_its_node() {
    let fixture = Fixture::new();
    fixture.create("a", 1, &[1]).unwrap();
    fixture.delete("a").unwrap();
    assert!(fixture.store.entries.lock().unwrap().is_empty());
    fixture.delete("a").expect("delete is idempotent");
}

#[test]
fn what_has_data_waits_for_its_node_and_its_name_is_not_given_away() {
    let fixture = Fixture::new();
    fixture.create("a", 1, &[1]).unwrap();
    fixture.store.change(&id("a"), |host_volume| {
        host_volume.phase = Phase::Ready;
        host_volume.status_reason = Some(StatusReason {
            reason: StatusReason::MOUNTED.into(),
            message: "it is mounted at /t".into(),
        });
    });
    fixture.watch();
    let refusal = fixture.delete("a").unwrap_err();
    assert!(matches!(refusal, Reason::InUse(_)), "{refusal}");
    let refusal = fixture.create("a", 1, &[1]).unwrap_err();
    assert!(matches!(refusal, Reason::Deleting), "{refusal}");
    fixture.watch();
    assert_eq!(fixture.room(1), 9, "its room is free before the volume is gone");
    let version = || fixture.store.entries.lock().unwrap()[&id("a")].version.clone();
    let before = version();
    std::thread::scope(|scope| {
        let delete = scope.spawn(|| fixture.delete("a"));
        while version() == before {
            assert!(!delete.is_finished(), "the delete does not wait for the node");
            std::thread::yield_now();
        }
        let uid = fixture.cache.uid(&id("a")).unwrap();
        fixture.store.entries.lock().unwrap().clear();
        fixture.cache.forget(&id("a"), uid);
        delete.join().unwrap().expect("the HostVolume is gone");
    });
}

#[test]
fn a_finalizer_is_not_removed_from_a_volume_that_was_just_used() {
    let fixture = Fixture::new();
    fixture.create("a", 1, &[1]).unwrap();
    let stale = fixture
        .store
        .delete(&id("a"), fixture.cache.uid(&id("a")).unwrap())
        .unwrap()
        .unwrap();
    fixture
        .store
        .change(&id("a"), |host_volume| host_volume.phase = Phase::Ready);
    assert!(!fixture.store.remove_finalizer(&stale).unwrap());
    assert!(fixture.store.entries.lock().unwrap().contains_key(&id("a")));
}

#[test]
fn a_ghost_changes_nothing() {
    let fixture = Fixture::new();
    fixture.create("there", 1, &[1]).unwrap();
    fixture.fence.close("its Pod is gone");
    fixture.fence.close("another reason");
    let refused = |reason: &Reason| matches!(reason, Reason::Fenced(why) if why == "its Pod is gone");
    assert!(refused(&fixture.create("new", 1, &[1]).unwrap_err()));
    assert!(refused(&fixture.create("there", 1, &[1]).unwrap_err()));
    assert!(refused(&fixture.delete("there").unwrap_err()));
    assert!(refused(&fixture.delete("unknown").unwrap_err()));
    let size = request("there", 2, &[]).size;
    assert!(refused(
        &fixture.controller.expand(&id("there"), size).unwrap_err().reason
    ));
    assert!(refused(&fixture.controller.probe(false).unwrap_err().reason));
    assert_eq!(fixture.store.entries.lock().unwrap().len(), 1);
}

#[test]
fn a_controller_is_not_ready_before_it_has_seen_everything() {
    let cache = Arc::new(ClusterCache::default());
    let controller = Controller::new(Arc::<MemoryStore>::default(), Arc::clone(&cache), Arc::default());
    assert!(!controller.probe(false).unwrap());
    cache.retain_nodes(&BTreeSet::new());
    cache.retain_pools(&BTreeSet::new());
    assert!(!controller.probe(false).unwrap());
    cache.retain_volumes(&BTreeSet::new());
    assert!(controller.probe(false).unwrap());
}

#[test]
fn a_controller_that_no_longer_hears_the_api_server_does_not_pass_for_well() {
    let fixture = Fixture::new();
    let cache = &fixture.cache;
    let long = Instant::now().checked_sub(Duration::from_mins(2)).unwrap();
    for list in [List::HostVolumes, List::HostNodes, List::Nodes] {
        cache.set_deaf(list, Some(Instant::now()));
        assert!(fixture.controller.probe(false).unwrap(), "a short gap");
        cache.set_deaf(list, None);
        cache.set_deaf(list, Some(long));
        assert!(!fixture.controller.probe(false).unwrap());
        fixture.controller.room(&default_pool(), None).unwrap_err();
        fixture.create("a", 1, &[1]).unwrap_err();
        cache.set_deaf(list, None);
        assert!(fixture.controller.probe(false).unwrap());
    }
}

#[test]
fn what_the_watch_has_not_seen_yet_does_not_pass_for_gone() {
    let one = Fixture::new();
    let other = Fixture::beside(Arc::clone(&one.store));
    one.create("a", 1, &[1]).unwrap();
    one.store.change(&id("a"), |host_volume| {
        host_volume.phase = Phase::Ready;
        host_volume.status_reason = Some(StatusReason {
            reason: StatusReason::MOUNTED.into(),
            message: "it is mounted at /t".into(),
        });
    });
    let refusal = other.delete("a").unwrap_err();
    assert!(matches!(refusal, Reason::InUse(_)), "{refusal}");
}

#[test]
fn what_a_watch_forgets_does_not_pass_for_gone() {
    let fixture = Fixture::new();
    fixture.create("a", 1, &[1]).unwrap();
    fixture
        .store
        .change(&id("a"), |host_volume| host_volume.phase = Phase::Ready);
    fixture.watch();
    let before = fixture.store.entries.lock().unwrap()[&id("a")].version.clone();
    std::thread::scope(|scope| {
        let delete = scope.spawn(|| fixture.delete("a"));
        while fixture.store.entries.lock().unwrap()[&id("a")].version == before {
            std::thread::yield_now();
        }
        fixture.cache.retain_volumes(&BTreeSet::new());
        let refusal = delete.join().unwrap().unwrap_err();
        assert!(matches!(refusal, Reason::Waiting(_)), "{refusal}");
    });
}

#[test]
fn a_volume_whose_answer_was_lost_is_found_although_its_node_is_full_by_now() {
    let one = Fixture::new();
    let made = one.create("a", 8, &[1]).unwrap();
    let other = Fixture::beside(Arc::clone(&one.store));
    other.cache.set_pools(node(1), pool_of(1, PoolId::random()));
    assert_eq!(other.create("a", 8, &[1]).unwrap(), made);
    let refusal = other.create("b", 8, &[1]).unwrap_err();
    assert!(matches!(refusal, Reason::NoNode(_)), "{refusal}");
}

#[test]
fn volumes_whose_persistent_volume_is_gone_are_known() {
    let fixture = Fixture::new();
    for name in ["a", "b"] {
        fixture.create(name, 1, &[1]).unwrap();
        fixture
            .store
            .change(&id(name), |host_volume| host_volume.phase = Phase::Ready);
    }
    fixture.create("unused", 1, &[1]).unwrap();
    fixture.watch();
    assert!(
        fixture.cache.released().unmarked.is_empty(),
        "PersistentVolumes are not known yet"
    );
    fixture.cache.retain_persistent(&BTreeSet::from([id("a")]));
    assert_eq!(fixture.cache.released().unmarked, [id("b")]);
    fixture
        .store
        .change(&id("b"), |host_volume| host_volume.released = true);
    fixture.watch();
    assert_eq!(
        (fixture.cache.released().marked, fixture.cache.released().unmarked.len()),
        (1, 0)
    );
    fixture.cache.set_persistent(&id("b"), true);
    assert_eq!(fixture.cache.released().back, [id("b")]);
}
