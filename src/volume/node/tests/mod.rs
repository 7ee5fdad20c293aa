//! The verbs on a machine in memory that fails on demand.

mod assigned;
mod sizes;

use std::sync::Arc;

use super::memory::Memory;
use super::pool_health::Pool;
use super::{Inventory, Node, PublishRequest};
use crate::volume::access::{AccessMode, MountOptions, TargetPath};
use crate::volume::control::{Control, CreateRequest, Health, Parameters};
use crate::volume::disk::{DiskErrorKind, PoolConfig};
use crate::volume::error::Reason;
use crate::volume::host_volume::{Assignments, NoAssignments};
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::quota::QuotaConfig;
use crate::volume::room::Limits;
use crate::volume::size::{Bytes, SizeRange};

struct Fixture {
    memory: Memory,
    node: Node,
}

fn pool(name: &str) -> PoolName {
    PoolName::parse(name).unwrap()
}

fn id(text: &str) -> VolumeId {
    VolumeId::parse(text).unwrap()
}

fn target(path: &str) -> TargetPath {
    TargetPath::parse(path).unwrap()
}

fn request(name: &str, gib: u64) -> CreateRequest {
    CreateRequest::of(name, gib)
}

fn publish(volume: &str, path: &str, mode: AccessMode) -> PublishRequest {
    PublishRequest {
        id: id(volume),
        target: target(path),
        mode,
        options: MountOptions::default(),
        made_on: None,
        uid: None,
    }
}

impl Fixture {
    /// Pools `default` and `other`, 10 GiB each.
    fn new() -> Self {
        Self::on(Memory::default())
    }

    fn on(memory: Memory) -> Self {
        Self::with_assignments(memory, Arc::new(NoAssignments))
    }

    fn with_assignments(memory: Memory, assignments: Arc<dyn Assignments>) -> Self {
        let config = |name: &str| PoolConfig {
            name: pool(name),
            path: format!("/{name}").into(),
            require_mount: false,
            expected: None,
            limits: Limits::default(),
            quotas: QuotaConfig::default(),
        };
        let node = NodeName::parse("node-a").unwrap();
        let node = Node::new(
            node,
            Arc::new(memory.clone()),
            assignments,
            vec![config("default"), config("other")],
        );
        Self { memory, node }
    }

    fn restarted(self) -> Self {
        Self::on(self.memory)
    }

    fn used(&self, volume: &str) {
        self.node.create(&request(volume, 1)).unwrap();
        self.node
            .publish(&publish(volume, "/t", AccessMode::SingleNodeWriter))
            .unwrap();
        self.node.unpublish(&id(volume), &target("/t")).unwrap();
    }

    /// Takes a pool's disk away, or brings it back; the node has noticed.
    fn set_absent(&self, pool: &PoolName, absent: bool) {
        self.memory.set_absent(pool, absent);
        self.node.pools.iter().for_each(Pool::inspect_now);
    }

    fn room(&self) -> u64 {
        self.node.room(&pool("default"), None).unwrap().unwrap().0 >> 30
    }
}

#[test]
fn verbs_may_be_repeated() {
    let Fixture { node, .. } = Fixture::new();
    let made = node.create(&request("a", 1)).unwrap();
    assert_eq!(node.create(&request("a", 1)).unwrap(), made);
    for _ in 0..2 {
        node.publish(&publish("a", "/t", AccessMode::SingleNodeWriter)).unwrap();
    }
    for _ in 0..2 {
        node.unpublish(&id("a"), &target("/t")).unwrap();
    }
    for _ in 0..2 {
        node.delete(&id("a")).unwrap();
    }
}

#[test]
fn a_create_that_failed_allocates_nothing() {
    let fixture = Fixture::new();
    fixture.memory.fail("create", DiskErrorKind::Failed);
    fixture.node.create(&request("a", 4)).unwrap_err();
    assert_eq!(fixture.room(), 10);
    fixture.node.create(&request("a", 4)).unwrap();
    assert_eq!(fixture.room(), 6);
}

#[test]
fn a_create_that_took_effect_unsettled_counts_and_is_found_again() {
    let fixture = Fixture::new();
    fixture.memory.fail("create", DiskErrorKind::Unsettled);
    let error = fixture.node.create(&request("a", 4)).unwrap_err();
    assert!(matches!(*error.reason, Reason::Disk(ref disk) if disk.kind == DiskErrorKind::Unsettled));
    assert_eq!(fixture.room(), 6);
    fixture.node.create(&request("a", 4)).unwrap();
    assert_eq!(fixture.room(), 6, "counted twice");
}

#[test]
fn a_delete_that_failed_deletes_nothing_and_one_unsettled_is_done() {
    let fixture = Fixture::new();
    fixture.used("a");
    fixture.memory.fail("discard", DiskErrorKind::Failed);
    fixture.node.delete(&id("a")).unwrap_err();
    assert!(fixture.memory.has(&pool("default"), &id("a")) && fixture.node.get(&id("a")).is_ok());
    fixture.memory.fail("discard", DiskErrorKind::Unsettled);
    fixture.node.delete(&id("a")).unwrap_err();
    assert!(!fixture.memory.has(&pool("default"), &id("a")) && fixture.node.get(&id("a")).is_err());
    assert_eq!(fixture.room(), 10);
    fixture.node.delete(&id("a")).unwrap();
}

#[test]
fn a_first_publish_that_failed_is_still_a_first_publish() {
    let fixture = Fixture::new();
    fixture.node.create(&request("a", 1)).unwrap();
    let first = publish("a", "/t", AccessMode::SingleNodeWriter);
    for kind in [DiskErrorKind::Failed, DiskErrorKind::Full, DiskErrorKind::Unsettled] {
        fixture.memory.fail("make_directory", kind);
        fixture.node.publish(&first).unwrap_err();
    }
    fixture.node.publish(&first).unwrap();
}

#[test]
fn a_used_volume_without_its_directory_is_never_published_empty() {
    let fixture = Fixture::new();
    fixture.used("a");
    fixture.memory.lose_directory(&pool("default"), &id("a"));
    let fixture = fixture.restarted();
    let error = fixture
        .node
        .publish(&publish("a", "/t", AccessMode::SingleNodeWriter))
        .unwrap_err();
    assert!(matches!(*error.reason, Reason::DataMissing { .. }), "{error}");
}

#[test]
fn what_may_be_on_an_absent_disk_is_not_said_to_be_gone() {
    let fixture = Fixture::new();
    fixture.used("a");
    fixture.set_absent(&pool("default"), true);
    for error in [
        fixture.node.delete(&id("a")).unwrap_err(),
        fixture.node.delete(&id("never-made")).unwrap_err(),
        fixture.node.create(&request("b", 1)).unwrap_err(),
        fixture.node.get(&id("a")).unwrap_err(),
    ] {
        assert!(matches!(*error.reason, Reason::PoolUnusable { .. }), "{error}");
    }
    assert_eq!(fixture.room(), 0);
    fixture
        .node
        .unpublish(&id("a"), &target("/t"))
        .expect("a pod must be able to end");
    fixture.set_absent(&pool("default"), false);
    fixture.node.delete(&id("a")).unwrap();
}

#[test]
fn a_pool_that_was_absent_at_start_is_opened_when_it_is_there() {
    let memory = Memory::default();
    memory.set_absent(&pool("default"), true);
    let fixture = Fixture::on(memory);
    let error = fixture.node.probe(true).unwrap_err().to_string();
    assert!(
        error.contains("pool default") && !error.contains("pool other"),
        "{error}"
    );
    fixture.node.probe(false).expect("one pool is fine");
    fixture.set_absent(&pool("other"), true);
    fixture.node.probe(false).expect_err("no pool is fine");
    fixture.set_absent(&pool("other"), false);
    fixture.set_absent(&pool("default"), false);
    fixture.node.probe(true).unwrap();
    fixture.node.create(&request("a", 1)).unwrap();
}

#[test]
fn a_panic_while_a_pool_is_opened_is_said_and_it_is_opened_again() {
    let fixture = Fixture::new();
    fixture.memory.remount(&pool("default"), false);
    fixture.memory.panic_at_open();
    let default = &fixture.node.pools[0];
    // One inspection finds that it was mounted again, the next panics.
    (0..2).for_each(|_| default.inspect_now());
    let why = default
        .writable()
        .map_or_else(|why| why.to_string(), |()| String::new());
    // The call itself may have had the pool opened again.
    assert!(why.is_empty() || why.contains("internal error"), "{why}");
    default.inspect_now();
    default.writable().unwrap();
}

#[test]
fn a_node_that_is_closed_lets_no_call_begin() {
    let fixture = Fixture::new();
    fixture.used("a");
    fixture.node.close();
    for error in [
        fixture.node.create(&request("b", 1)).unwrap_err(),
        fixture.node.delete(&id("a")).unwrap_err(),
        fixture.node.probe(false).unwrap_err(),
    ] {
        assert!(error.to_string().contains("is stopping"), "{error}");
    }
    // A pod can end.
    fixture.node.unpublish(&id("a"), &target("/pods/1")).unwrap();
}

#[test]
fn a_pool_that_is_opened_again_must_be_the_same() {
    let fixture = Fixture::new();
    fixture.used("a");
    let inspect = || fixture.node.pools.iter().for_each(Pool::inspect_now);
    fixture.memory.remount(&pool("default"), false);
    // One inspection finds that it was mounted again, the next opens it.
    (0..2).for_each(|_| inspect());
    fixture.node.get(&id("a")).unwrap();
    fixture.memory.remount(&pool("default"), true);
    (0..2).for_each(|_| inspect());
    for error in [
        fixture.node.get(&id("a")).unwrap_err(),
        fixture.node.delete(&id("a")).unwrap_err(),
    ] {
        assert!(matches!(*error.reason, Reason::PoolUnusable { .. }), "{error}");
    }
}

#[test]
fn a_volume_on_two_pools_is_touched_by_nobody() {
    let fixture = Fixture::new();
    fixture.used("a");
    let Inventory { volumes, .. } = fixture.node.inventory();
    fixture.memory.put(&pool("other"), volumes[0].1.record.clone().unwrap());
    let fixture = fixture.restarted();
    for error in [
        fixture.node.delete(&id("a")).unwrap_err(),
        fixture.node.get(&id("a")).unwrap_err(),
    ] {
        assert!(matches!(*error.reason, Reason::Ambiguous(..)), "{error}");
    }
    assert!(fixture.memory.has(&pool("default"), &id("a")) && fixture.memory.has(&pool("other"), &id("a")));
}

#[test]
fn what_cannot_be_told_is_taken_for_mounted() {
    let fixture = Fixture::new();
    fixture.node.create(&request("a", 1)).unwrap();
    fixture
        .node
        .publish(&publish("a", "/t", AccessMode::SingleNodeWriter))
        .unwrap();
    fixture.memory.hide_mounts();
    let error = fixture.node.delete(&id("a")).unwrap_err();
    assert!(matches!(*error.reason, Reason::Mounted(_)), "{error}");
}

#[test]
fn lists_go_by_id_over_all_pools() {
    let fixture = Fixture::new();
    for (name, pool_name) in [("c", "default"), ("a", "other"), ("b", "default"), ("d", "other")] {
        let parameters = Parameters {
            pool: pool(pool_name),
            ..Parameters::default()
        };
        fixture
            .node
            .create(&CreateRequest {
                parameters,
                ..request(name, 1)
            })
            .unwrap();
    }
    let list = |after: Option<&str>, max| {
        let volumes = fixture.node.list(after.map(id).as_ref(), max).unwrap();
        volumes.iter().map(|volume| volume.id.to_string()).collect::<String>()
    };
    assert_eq!(list(None, 10), "abcd");
    assert_eq!(list(None, 3), "abc");
    assert_eq!(list(Some("b"), 3), "cd");
    assert_eq!(list(Some("d"), 3), "");
}

#[test]
fn errors_say_which_volume_and_which_node() {
    let Fixture { node, .. } = Fixture::new();
    let error = node.create(&request("a", 100)).unwrap_err().to_string();
    assert_eq!(
        error,
        "volume a on node node-a: 100 GiB do not fit in pool default, which has room for 10 GiB; \
         delete volumes there, request less, or schedule the pod to another node"
    );
}
