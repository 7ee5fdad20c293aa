//! Which nodes can be used, and which are waited for.

use super::*;

#[test]
fn a_volume_that_may_go_anywhere_avoids_nodes_that_no_pod_can_use() {
    let fixture = Fixture::new();
    let cache = &fixture.cache;
    let chosen = |name: &str| fixture.create(name, 1, &[]).map(|volume| volume.node);
    // Node 3 has most room, then node 2.
    cache.set_node(node(3), NodeState { tainted: true, ..READY });
    assert_eq!(chosen("a").unwrap(), node(2));
    cache.set_node(
        node(2),
        NodeState {
            cordoned: true,
            ..READY
        },
    );
    assert_eq!(chosen("b").unwrap(), node(1));
    cache.set_node(node(1), NodeState { ready: false, ..READY });
    assert_eq!(
        chosen("c").unwrap(),
        node(3),
        "rather a taint than a node that is not Ready"
    );
    cache.set_agents(BTreeMap::from([(node(1), true), (node(2), true), (node(3), false)]));
    let refusal = chosen("d").unwrap_err().to_string();
    for why in [
        "node-1: the Node is not Ready",
        "node-2: the Node is cordoned",
        "node-3: hostdir's pod there is not Ready",
    ] {
        assert!(refusal.contains(why), "{refusal}");
    }
    // The scheduler has chosen the node.
    assert_eq!(fixture.create("e", 1, &[2]).unwrap().node, node(2));
}

#[test]
fn a_delete_does_not_wait_for_a_node_that_does_not_answer() {
    let fixture = Fixture::new();
    fixture.create("a", 1, &[1]).unwrap();
    fixture
        .store
        .change(&id("a"), |host_volume| host_volume.phase = Phase::Ready);
    fixture.watch();
    for silence in [
        &|| fixture.cache.set_node(node(1), NodeState { ready: false, ..READY }) as (),
        &|| {
            fixture.cache.set_node(node(1), READY);
            fixture.cache.set_agents(BTreeMap::new());
        },
    ] as [&dyn Fn(); 2]
    {
        silence();
        let start = std::time::Instant::now();
        let refusal = fixture.delete("a").unwrap_err();
        assert!(matches!(refusal, Reason::Waiting(_)), "{refusal}");
        assert!(start.elapsed() < REASON_WAIT, "it waited");
    }
}

#[test]
fn only_deletes_of_absent_nodes_are_abandoned_and_only_after_a_while() {
    let fixture = Fixture::new();
    fixture.create("a", 1, &[1]).unwrap();
    fixture.create("b", 1, &[2]).unwrap();
    for name in ["a", "b"] {
        fixture.store.change(&id(name), |host_volume| {
            host_volume.phase = Phase::Ready;
            host_volume.deleting = true;
        });
    }
    fixture.watch();
    fixture.cache.node_is_gone(&node(1));
    fixture.cache.note_absent();
    assert_eq!(fixture.cache.abandoned(Duration::from_mins(1)), [] as [VolumeId; 0]);
    assert_eq!(fixture.cache.abandoned(Duration::ZERO), [id("a")]);
    fixture.cache.set_node(node(1), READY);
    fixture.cache.note_absent();
    assert_eq!(fixture.cache.abandoned(Duration::ZERO), [] as [VolumeId; 0]);
}
