//! A node and a controller of elected mode as processes of their own, with a real API server between them.

use std::fs;
use std::path::{Path, PathBuf};

use hostdir::csi::proto::{CreateVolumeRequest, Topology, TopologyRequirement, Volume};
use hostdir_lab::client::create_request;
use hostdir_lab::{Client, Driver, Mount, Process, Scratch};
use serde_json::{Value, json};

use crate::lab::{Lab, lab};
use crate::mode::Mode;

/// A Node without a kubelet.
pub(crate) const NODE: &str = "sanity";

/// A node with a pool, and a controller.
pub(crate) struct Pair {
    pub(crate) lab: Lab,
    pub(crate) scratch: Scratch,
    pub(crate) controller: Option<(Process, PathBuf)>,
}

impl Pair {
    /// With one pool. csi-sanity asks for 10 GiB at a time, however small the disk is.
    pub(crate) fn new(namespace: &str, title: &str) -> Self {
        let pair = Self::without_pools(namespace, title);
        pair.set_pools(&[("default", 1000)]);
        pair
    }

    pub(crate) fn without_pools(namespace: &str, title: &str) -> Self {
        let lab = lab(Mode::Elected, namespace, title);
        lab.join_network().unwrap();
        let scratch = Scratch::new();
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
        lab.kubectl().apply(&node.to_string()).unwrap();
        // Until the node controller misses its kubelet, volumes that may go anywhere can go there.
        let now = jiff::Timestamp::now().to_string();
        let ready = json!({"type": "Ready", "status": "True", "lastHeartbeatTime": now, "lastTransitionTime": now});
        let patch = json!({"status": {"conditions": [ready]}}).to_string();
        let args = [
            "patch",
            "node",
            NODE,
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch,
        ];
        lab.kubectl().run(&args).unwrap();
        Self {
            lab,
            scratch,
            controller: None,
        }
    }

    /// Configures the node: names of pools, and how many times they may be allocated. The pool `default` is in the directory `pool`.
    pub(crate) fn set_pools(&self, pools: &[(&str, u32)]) {
        let pool = |(name, overcommit): &(&str, u32)| {
            let dir = if *name == "default" { "pool" } else { name };
            json!({"name": name, "path": self.scratch.path(dir), "overcommit": overcommit})
        };
        let pools: Vec<Value> = pools.iter().map(pool).collect();
        fs::write(self.scratch.path("config.yaml"), json!({"pools": pools}).to_string()).unwrap();
    }

    pub(crate) fn node(&self) -> Driver {
        let config = self.scratch.path("config.yaml").display().to_string();
        let args = ["node", "--node-name", NODE, "--config", &config];
        Driver::with_args(&self.scratch.mkdir("node"), &args).kubeconfig(&self.lab.kubeconfig)
    }

    /// Starts the controller, and waits until it knows the node, which must run.
    pub(crate) fn start_controller(&mut self) -> Client {
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

    pub(crate) fn end(self) {
        self.lab.wait("no HostVolume is left", || {
            Ok(self.lab.kubectl().list(&["hostvolumes"])?.is_empty())
        });
        drop(self.controller);
        for object in ["hostnode", "node"] {
            self.lab.kubectl().run(&["delete", object, NODE]).unwrap();
        }
    }
}

/// A request for a volume on the node.
pub(crate) fn on_node(name: &str) -> CreateVolumeRequest {
    on(NODE, name)
}

/// A request for a volume on a node.
pub(crate) fn on(node: &str, name: &str) -> CreateVolumeRequest {
    let topology = Topology {
        segments: [("topology.hostdir.csi/node".to_owned(), node.to_owned())].into(),
    };
    CreateVolumeRequest {
        accessibility_requirements: Some(TopologyRequirement {
            requisite: vec![topology.clone()],
            preferred: vec![topology],
        }),
        ..create_request(name)
    }
}

pub(crate) fn publish(client: &Client, volume: &Volume, target: &Path) -> Result<(), tonic::Status> {
    let mount = Mount {
        context: volume.volume_context.clone(),
        ..Mount::default()
    };
    client.publish_as(&volume.volume_id, &target.to_string_lossy(), mount)
}
