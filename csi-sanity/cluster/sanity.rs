//! Elected mode without a kubelet: the real csi-sanity, and a node that dies while it makes a volume.

use std::fs;

use hostdir_lab::faults::{Fault, Step};
use hostdir_lab::scratch::names;
use hostdir_lab::{needs, sanity};

use crate::pair::{Pair, on_node, publish};

#[needs(Root, Go, Cluster)]
fn csi_sanity_passes_in_elected_mode() {
    let mut pair = Pair::new("sanity", "csi-sanity passes against a controller and a node");
    let (driver, node) = (pair.node(), pair.node().start());
    pair.start_controller();
    let (controller, socket) = pair.controller.as_ref().unwrap();
    let args = [format!("-csi.controllerendpoint=unix://{}", socket.display())];
    let passed = sanity::run(&pair.scratch.path(""), "csi-sanity", &driver.socket, &args);
    passed.unwrap_or_else(|error| panic!("{error:#}\n{}\n{}", controller.log(), node.log()));
    drop(node);
    pair.end();
}

/// Where a node dies while it makes a volume: before and after the record is there, before and after the HostVolume is `Ready`, before
/// the record says so, before the mount.
const DEATHS: [Step; 6] = [
    Step::Named("mkdirat", 0),
    Step::Named("renameat2", 0),
    Step::Named("fsync", 2),
    Step::Named("mkdirat", 1),
    Step::Named("renameat", 0),
    Step::Named("move_mount", 0),
];

#[needs(Root, Go, Cluster)]
fn a_node_that_dies_while_it_makes_a_volume_makes_it_after_a_restart() {
    let mut pair = Pair::new("dying", "a node dies while it makes a volume");
    let mut node = pair.node().start();
    let controller = pair.start_controller();
    let target = pair.scratch.path("target");
    for (number, death) in DEATHS.into_iter().enumerate() {
        let volume = controller.create_as(on_node(&format!("dying-{number}"))).unwrap();
        drop(node);
        let mut dying = pair.node().with_faults().start();
        dying.faults().arm(death, Fault::Die);
        publish(&dying.connect(), &volume, &target).expect_err("it dies");
        dying.ended();
        node = pair.node().start();
        let client = node.connect();
        publish(&client, &volume, &target).unwrap_or_else(|status| panic!("after {death:?}: {status}\n{}", node.log()));
        fs::write(target.join("file"), "data").unwrap();
        let id = &volume.volume_id;
        pair.lab.wait("the HostVolume is Ready", || {
            let object = pair.lab.kubectl().get(&["hostvolume", id])?;
            Ok(object["status"]["phase"] == "Ready")
        });
        client.unpublish(id, &target).unwrap();
        controller.delete(id).unwrap();
        assert_eq!(names(pair.scratch.path("pool/volumes")), [""; 0], "after {death:?}");
        assert_eq!(
            names(pair.scratch.path("pool/.hostdir/new")),
            [""; 0],
            "after {death:?}"
        );
    }
    drop(node);
    pair.end();
}
