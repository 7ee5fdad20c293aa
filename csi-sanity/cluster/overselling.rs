//! No controller promises more than a pool has; two at once promise at worst what is in flight, and that is noticed.

use std::time::Duration;

use hostdir::csi::proto::{CapacityRange, CreateVolumeRequest, GetCapacityRequest};
use hostdir_lab::disk::mount_new;
use hostdir_lab::{Client, Driver, needs, wait_for};

use crate::pair::{NODE, Pair, on_node};
use crate::records::has_condition;

/// A volume is a tenth of the pool.
const SIZE: i64 = 10 << 20;

/// A node with a pool that has room for ten volumes, and its controllers.
fn small(namespace: &str, title: &str) -> Pair {
    let pair = Pair::without_pools(namespace, title);
    pair.set_pools(&[("default", 1)]);
    mount_new(
        &pair.scratch.mkdir("pool"),
        130,
        &["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal"],
    );
    pair
}

fn tenth(name: &str) -> CreateVolumeRequest {
    let size = CapacityRange {
        required_bytes: SIZE,
        limit_bytes: 0,
    };
    CreateVolumeRequest {
        capacity_range: Some(size),
        ..on_node(name)
    }
}

/// The room of the node.
fn room(controller: &Client) -> i64 {
    let request = GetCapacityRequest {
        accessible_topology: on_node("").accessibility_requirements.map(|on| on.requisite[0].clone()),
        ..GetCapacityRequest::default()
    };
    let mut csi = controller.controller();
    controller.wait(csi.get_capacity(request)).unwrap().available_capacity
}

/// Creates volumes from many threads at once, and returns the ids of those that were created.
fn create_many(controllers: &[&Client], count: usize) -> Vec<String> {
    std::thread::scope(|scope| {
        let create = |number: usize| {
            let controller = controllers[number % controllers.len()];
            let request = tenth(&format!("pvc-{number}"));
            scope.spawn(move || controller.create_as(request))
        };
        let calls: Vec<_> = (0..count).map(create).collect();
        let answers = calls.into_iter().filter_map(|call| call.join().unwrap().ok());
        answers.map(|volume| volume.volume_id).collect()
    })
}

fn delete_all(controller: &Client, ids: &[String]) {
    for id in ids {
        wait_for(Duration::from_secs(30), "the volume is deleted", || {
            controller.delete(id).is_ok()
        });
    }
}

#[needs(Root, Go, Cluster)]
fn two_hundred_calls_get_what_there_is_and_no_more() {
    let mut pair = small("burst", "200 volumes at once, and room for ten");
    let _node = pair.node().start();
    let controller = pair.start_controller();
    let before = room(&controller);
    let fit = usize::try_from(before / SIZE).unwrap();
    assert!((8..=12).contains(&fit), "the pool has room for {before} bytes");
    let created = create_many(&[&controller], 200);
    assert_eq!(created.len(), fit);
    assert!(room(&controller) < SIZE);
    delete_all(&controller, &created);
    assert_eq!(room(&controller), before);
    pair.end();
}

#[needs(Root, Go, Cluster)]
fn what_two_controllers_promise_too_much_is_noticed_and_ends() {
    let mut pair = small("two-at-once", "two controllers, and room for ten");
    let mut node = pair.node().start();
    let controller = pair.start_controller();
    let fit = usize::try_from(room(&controller) / SIZE).unwrap();
    let dir = pair.scratch.mkdir("second");
    let driver = Driver::with_args(&dir, &["controller"]).kubeconfig(&pair.lab.kubeconfig);
    let mut second = driver.start();
    pair.lab
        .wait("the second controller is ready", || Ok(second.connect().is_ready()));
    let other = second.connect();
    let created = create_many(&[&controller, &other], 200);
    assert!((fit..=2 * fit).contains(&created.len()), "{} of {fit}", created.len());
    // Whether they have met or not: one more volume is more than there is.
    let more = serde_json::json!({
        "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostVolume", "metadata": {"name": "too-much"},
        "spec": {
            "node": NODE, "pool": "default", "name": "too-much", "capacity": "30Mi",
            "directory": {"mode": "0770", "uid": 0, "gid": 0},
        },
    });
    let kubectl = pair.lab.kubectl();
    kubectl.apply(&more.to_string()).unwrap();
    let condition = |status: &str| {
        pair.lab.wait(&format!("the HostNode has Overallocated={status}"), || {
            Ok(has_condition(
                &kubectl.get(&["hostnode", NODE])?,
                "Overallocated",
                status,
            ))
        });
    };
    condition("True");
    let events = kubectl.run(&["events", "-A"]).unwrap();
    assert!(events.contains("Overallocated"), "{events}");
    for controller in [&controller, &other] {
        assert_eq!(room(controller), 0);
        let refusal = controller.create_as(tenth("pvc-one-more")).unwrap_err();
        assert_eq!(refusal.code(), tonic::Code::ResourceExhausted, "{refusal}");
    }
    delete_all(&other, &created);
    delete_all(&other, &["too-much".to_owned()]);
    condition("False");
    drop((second, node.connect(), node));
    pair.end();
}
