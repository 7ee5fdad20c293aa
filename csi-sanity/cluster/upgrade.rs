//! A node of an earlier version is taken over without conversion: its HostVolumes, volumes and mounts stay.
//!
//! The objects and files are what hostdir 389b711 wrote; `driver/upgrade.rs` has the same for local mode.

use std::fs;

use hostdir::csi::proto::Volume;
use hostdir_lab::golden::{POOL, POOL_ID, record};
use hostdir_lab::scratch::{is_mounted, names};
use hostdir_lab::{needs, wait_until};
use nix::mount::{MsFlags, mount};
use serde_json::json;

use crate::pair::{NODE, Pair, on_node, publish};

const VOLUME: &str = "pvc-old";
const CONTENT: &str = "written under 389b711";

/// Makes a HostVolume as 389b711 left it when its volume was in use. Returns its UID.
fn make_old_host_volume(pair: &Pair) -> String {
    let object = json!({
        "apiVersion": "hostdir.csi/v1alpha1",
        "kind": "HostVolume",
        "metadata": {"name": VOLUME, "finalizers": ["hostdir.csi/node"]},
        "spec": {
            "node": NODE, "pool": "default", "name": VOLUME, "capacity": "1Mi",
            "directory": {"mode": "0770", "uid": 0, "gid": 0},
        },
    });
    let kubectl = pair.lab.kubectl();
    kubectl.apply(&object.to_string()).unwrap();
    let status = json!({"status": {"phase": "Ready", "poolId": POOL_ID}}).to_string();
    let args = [
        "patch",
        "hostvolume",
        VOLUME,
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ];
    kubectl.run(&args).unwrap();
    let object = kubectl.get(&["hostvolume", VOLUME]).unwrap();
    object["metadata"]["uid"].as_str().unwrap().to_owned()
}

/// Makes the pool of the node, with the volume in it, mounted at the target.
fn make_old_pool(pair: &Pair, uid: &str) {
    let path = |name: &str| pair.scratch.path(name);
    for dir in ["pool/.hostdir/new", "pool/trash", "pool/volumes/pvc-old/data", "target"] {
        fs::create_dir_all(path(dir)).unwrap();
    }
    fs::write(path("pool/.hostdir/pool.json"), POOL).unwrap();
    fs::write(
        path("pool/volumes/pvc-old/volume.json"),
        record(VOLUME, "ready", Some(uid)),
    )
    .unwrap();
    let data = path("pool/volumes/pvc-old/data");
    fs::write(data.join("file"), CONTENT).unwrap();
    mount(
        Some(&data),
        &path("target"),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
}

#[needs(Root, Go, Cluster)]
fn a_node_of_an_earlier_version_keeps_its_hostvolumes_volumes_and_mounts() {
    let mut pair = Pair::new("old-node", "the node, HostVolumes and mounts of 389b711 are taken over");
    let uid = make_old_host_volume(&pair);
    make_old_pool(&pair, &uid);
    let (target, other) = (pair.scratch.path("target"), pair.scratch.path("other"));
    let mut node = pair.node().start();
    let (controller, client) = (pair.start_controller(), node.connect());
    assert!(is_mounted(&target));
    let volume = Volume {
        volume_id: VOLUME.into(),
        volume_context: [("uid".to_owned(), uid.clone())].into(),
        ..Volume::default()
    };
    publish(&client, &volume, &other).unwrap();
    assert_eq!(fs::read_to_string(other.join("file")).unwrap(), CONTENT);
    let object = pair.lab.kubectl().get(&["hostvolume", VOLUME]).unwrap();
    assert_eq!(object["metadata"]["uid"], uid);
    assert_eq!(object["status"]["phase"], "Ready", "{object}");
    // A repeated create finds the volume.
    assert_eq!(controller.create_as(on_node(VOLUME)).unwrap().volume_id, VOLUME);
    for target in [&target, &other] {
        client.unpublish(VOLUME, target).unwrap();
    }
    controller.delete(VOLUME).unwrap();
    assert_eq!(names(pair.scratch.path("pool/volumes")), [""; 0]);
    wait_until("the trash is empty", || {
        names(pair.scratch.path("pool/trash")).is_empty()
    });
    drop(node);
    pair.end();
}
