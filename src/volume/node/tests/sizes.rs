//! Sizes, quotas and statistics.

use super::super::NodePool;
use super::*;
use crate::volume::disk::Usage;
use crate::volume::quota::QuotaPolicy;

#[test]
fn a_volume_grows_as_far_as_there_is_room_or_not_at_all() {
    let fixture = Fixture::new();
    fixture.node.create(&request("a", 4)).unwrap();
    let expand = |gib: u64| {
        let size = SizeRange {
            required: Bytes(gib << 30),
            limit: None,
        };
        fixture.node.expand(&id("a"), size).map_err(|error| *error.reason)
    };
    fixture.memory.fail("resize", DiskErrorKind::Failed);
    expand(6).unwrap_err();
    assert_eq!(fixture.room(), 6, "a failed expansion counts");
    assert_eq!(expand(6).unwrap(), Bytes(6 << 30));
    assert_eq!(fixture.room(), 4);
    assert_eq!(expand(5).unwrap(), Bytes(6 << 30));
    let refusal = expand(11).unwrap_err();
    assert!(
        matches!(refusal, Reason::NoRoomToGrow { room, .. } if room == Bytes(10 << 30)),
        "{refusal}"
    );
    let fixture = fixture.restarted();
    assert_eq!(fixture.node.get(&id("a")).unwrap().bytes, Bytes(6 << 30));
}

/// A node with one pool that requires quotas.
fn required(memory: &Memory) -> Node {
    let config = PoolConfig {
        name: pool("default"),
        path: "/default".into(),
        require_mount: false,
        expected: None,
        limits: Limits::default(),
        quotas: QuotaConfig {
            policy: QuotaPolicy::Required,
            ..QuotaConfig::default()
        },
    };
    let node = NodeName::parse("node-a").unwrap();
    Node::new(node, Arc::new(memory.clone()), Arc::new(NoAssignments), vec![config])
}

/// The pools as they are after an inspection.
fn pools(node: &Node) -> Vec<NodePool> {
    node.pools.iter().for_each(Pool::inspect_now);
    node.pools()
}

#[test]
fn where_quotas_are_required_nothing_is_mounted_without() {
    let memory = Memory::default();
    let node = required(&memory);
    node.create(&request("a", 1)).unwrap();
    let mount = |path: &str| node.publish(&publish("a", path, AccessMode::SingleNodeMultiWriter));
    assert!(matches!(*mount("/t").unwrap_err().reason, Reason::Unenforced { .. }));
    memory.enforce(true);
    mount("/t").unwrap();
    // Quotas work, but this volume has no limit.
    memory.set_unenforced(&id("a"), "it was made without quotas");
    let refusal = mount("/u").unwrap_err().to_string();
    assert!(refusal.contains("it was made without quotas"), "{refusal}");
    assert_eq!(pools(&node)[0].status.unenforced, 1);
    // A running pod can still end, and its volume can be deleted.
    node.unpublish(&id("a"), &target("/t")).unwrap();
    node.delete(&id("a")).unwrap();
    assert_eq!(pools(&node)[0].status.unenforced, 0);
}

#[test]
fn statistics_are_those_of_the_volume() {
    let Fixture { memory, node } = Fixture::new();
    node.create(&request("a", 2)).unwrap();
    node.publish(&publish("a", "/t", AccessMode::SingleNodeWriter)).unwrap();
    let refusal = node.stats(&id("a"), "/t").unwrap_err();
    assert!(matches!(*refusal.reason, Reason::Waiting(_)), "{refusal}");
    let mut usage = Usage {
        bytes: Bytes(1 << 30),
        inodes: None,
    };
    memory.set_usage(Some(usage));
    let stats = node.stats(&id("a"), "/t").unwrap();
    assert_eq!(
        (stats.total, stats.used, stats.available),
        (Bytes(2 << 30), Bytes(1 << 30), Bytes(1 << 30))
    );
    // Without a limit, a volume may use more than is allocated to it.
    usage.bytes = Bytes(3 << 30);
    memory.set_usage(Some(usage));
    let stats = node.stats(&id("a"), "/t").unwrap();
    assert_eq!((stats.used, stats.available), (Bytes(3 << 30), Bytes(0)));
}
