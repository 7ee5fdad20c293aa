//! A controller and a node of elected mode as processes of their own, with a real API server between them: the real csi-sanity,
//! and a node that dies while it makes a volume.

use std::fs;
use std::path::{Path, PathBuf};

use hostdir::csi::proto::{CreateVolumeRequest, Topology, TopologyRequirement, Volume};
use hostdir_lab::client::create_request;
use hostdir_lab::faults::{Fault, Step};
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Driver, Mount, Process, Scratch, needs, sanity};
use serde_json::json;

use crate::lab::{Lab, lab};
use crate::mode::Mode;

/// A Node without a kubelet.
const NODE: &str = "sanity";

/// A node with a pool, and a controller.
struct Pair {
    lab: Lab,
    scratch: Scratch,
    controller: Option<(Process, PathBuf)>,
}

impl Pair {
    fn new(namespace: &str, title: &str) -> Self {
        let lab = lab(Mode::Elected, namespace, title);
        lab.join_network().unwrap();
        let scratch = Scratch::new();
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
        lab.kubectl().apply(&node.to_string()).unwrap();
        let pool = scratch.path("pool").display().to_string();
        // csi-sanity asks for 10 GiB at a time, however small the disk is.
        let config = format!("pools: [{{name: default, path: {pool}, overcommit: 1000}}]\n");
        fs::write(scratch.path("config.yaml"), config).unwrap();
        Self {
            lab,
            scratch,
            controller: None,
        }
    }

    fn node(&self) -> Driver {
        let config = self.scratch.path("config.yaml").display().to_string();
        let args = ["node", "--node-name", NODE, "--config", &config];
        Driver::with_args(&self.scratch.mkdir("node"), &args).kubeconfig(&self.lab.kubeconfig)
    }

    /// Starts the controller, and waits until it knows the node, which must run.
    fn start_controller(&mut self) -> Client {
        self.lab.wait("the node has published its pool", || {
            let node = self.lab.kubectl().get(&["hostnode", NODE])?;
            Ok(node["status"]["pools"][0]["free"].is_string())
        });
        let dir = self.scratch.mkdir("controller");
        let driver = Driver::with_args(&dir, &["controller"]).kubeconfig(&self.lab.kubeconfig);
        let mut controller = driver.start();
        self.lab
            .wait("the controller is ready", || Ok(controller.connect().is_ready()));
        let client = controller.connect();
        self.controller = Some((controller, driver.socket));
        client
    }

    fn end(self) {
        self.lab.wait("no HostVolume is left", || {
            Ok(self.lab.kubectl().list(&["hostvolumes"])?.is_empty())
        });
        drop(self.controller);
        for object in ["hostnode", "node"] {
            self.lab.kubectl().run(&["delete", object, NODE]).unwrap();
        }
    }
}

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

/// A request for a volume on the node.
fn on_node(name: &str) -> CreateVolumeRequest {
    let topology = Topology {
        segments: [("topology.hostdir.csi/node".to_owned(), NODE.to_owned())].into(),
    };
    CreateVolumeRequest {
        accessibility_requirements: Some(TopologyRequirement {
            requisite: vec![topology.clone()],
            preferred: vec![topology],
        }),
        ..create_request(name)
    }
}

fn publish(client: &Client, volume: &Volume, target: &Path) -> Result<(), tonic::Status> {
    let mount = Mount {
        context: volume.volume_context.clone(),
        ..Mount::default()
    };
    client.publish_as(&volume.volume_id, &target.to_string_lossy(), mount)
}
