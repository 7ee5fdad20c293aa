//! The real csi-sanity against elected mode: a controller and a node, on two sockets, with an API server between them.

use std::fs;

use hostdir_lab::{Driver, needs, sanity};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::lab::lab;
use crate::mode::Mode;

/// A Node without a kubelet.
const NODE: &str = "sanity";

#[needs(Root, Go, Cluster)]
fn csi_sanity_passes_in_elected_mode() {
    let title = "csi-sanity passes against a controller and a node";
    let lab = lab(Mode::Elected, "sanity", title);
    lab.join_network().unwrap();
    // Mounts made here end with this thread.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let scratch = tempfile::Builder::new().prefix("hostdir-").tempdir().unwrap();
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
    lab.kubectl().apply(&node.to_string()).unwrap();
    let path = |name: &str| scratch.path().join(name);
    let pool = path("pool").display().to_string();
    // csi-sanity asks for 10 GiB at a time, however small the disk is.
    let config = format!("pools: [{{name: default, path: {pool}, overcommit: 1000}}]\n");
    fs::write(path("config.yaml"), config).unwrap();

    let config = path("config.yaml").display().to_string();
    let start = |name: &str, args: &[&str]| {
        let dir = path(name);
        fs::create_dir(&dir).unwrap();
        let driver = Driver::with_args(&dir, args).kubeconfig(&lab.kubeconfig);
        (driver.start(), driver.socket)
    };
    let (node, node_socket) = start("node", &["node", "--node-name", NODE, "--config", &config]);
    let (mut controller, controller_socket) = start("controller", &["controller"]);
    lab.wait("the node has published its pool", || {
        let node = lab.kubectl().get(&["hostnode", NODE])?;
        Ok(node["status"]["pools"][0]["free"].is_string())
    });
    lab.wait("the controller is ready", || Ok(controller.connect().is_ready()));
    let args = [format!(
        "-csi.controllerendpoint=unix://{}",
        controller_socket.display()
    )];
    let passed = sanity::run(scratch.path(), "csi-sanity", &node_socket, &args);
    passed.unwrap_or_else(|error| panic!("{error:#}\n{}\n{}", controller.log(), node.log()));
    lab.wait("no HostVolume is left", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.is_empty())
    });
    drop((node, controller));
    for object in ["hostnode", "node"] {
        lab.kubectl().run(&["delete", object, NODE]).unwrap();
    }
}
