//! Where volumes go that the scheduler has not placed, and how soon the scheduler knows a node's room.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::needs;
use serde_json::{Value, json};

use crate::lab::{Lab, lab, lab_alone, report};
use crate::mode::Mode;
use crate::objects::{claim_of, class};

/// Keeps pods away from a node, until this is dropped.
struct Cordoned<'a>(&'a Lab, &'a str);

impl<'a> Cordoned<'a> {
    fn new(lab: &'a Lab, node: &'a str) -> Self {
        lab.kubectl().run(&["cordon", node]).unwrap();
        Self(lab, node)
    }
}

impl Drop for Cordoned<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.kubectl().run(&["uncordon", self.1]) {
            report(&format!("{error:#}"));
        }
    }
}

#[needs(Root, Go, Cluster)]
fn immediate_claims_go_where_pods_can_go() {
    let lab = lab(
        Mode::Elected,
        "immediate",
        "Immediate claims while nodes are cordoned or without hostdir",
    );
    let mut now = class(Mode::Elected.driver(), "now", &json!({}), "Delete", &[]);
    now["volumeBindingMode"] = "Immediate".into();
    // Node 1 has by far the most room.
    let cordoned = Cordoned::new(&lab, "node-1");
    lab.kubectl()
        .run(&["label", "node", "node-2", "hostdir.test/without=yes"])
        .unwrap();
    lab.install(&[r#"affinity={"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"hostdir.test/without","operator":"DoesNotExist"}]}]}}}"#]);
    lab.apply(&[now]);
    lab.wait("a volume goes to the only node that is left", || {
        lab.apply(&[claim_of("claim", "1Mi", "now", "ReadWriteOnce")]);
        let bound = lab.get("pvc", "claim")?["status"]["phase"] == "Bound";
        if !bound {
            return Ok(false);
        }
        let volume = lab.kubectl().get(&["hostvolume", &lab.volume_of("claim")])?;
        assert_eq!(volume["spec"]["node"], "node-3", "{volume}");
        Ok(true)
    });
    lab.delete("pvc", "claim");
    lab.kubectl()
        .run(&["label", "node", "node-2", "hostdir.test/without-"])
        .unwrap();
    drop(cordoned);
    lab.kubectl().run(&["delete", "storageclass", "now"]).unwrap();
    lab.install(&[]);
    lab.nothing_is_left();
}

/// How many nodes join at once. At one object a second they would take five minutes, or at night a quarter of an hour.
fn joining() -> usize {
    if std::env::var_os("HOSTDIR_NIGHT").is_some() {
        1000
    } else {
        300
    }
}

/// Nodes without kubelets on which the driver is registered, until this is dropped.
struct ManyNodes<'a>(&'a Lab);

impl<'a> ManyNodes<'a> {
    fn new(lab: &'a Lab, count: usize) -> Self {
        let mut text = String::new();
        for number in 0..count {
            let name = format!("joined-{number}");
            // No label of an operating system: no DaemonSet wants them.
            let node = json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {"topology.hostdir.csi/node": name, "hostdir.test/joined": "yes"}},
            });
            let drivers =
                json!([{"name": "hostdir.csi", "nodeID": name, "topologyKeys": ["topology.hostdir.csi/node"]}]);
            let csi = json!({
                "apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": name, "labels": {"hostdir.test/joined": "yes"}},
                "spec": {"drivers": drivers},
            });
            writeln!(text, "---\n{node}\n---\n{csi}").unwrap();
        }
        lab.kubectl().feed(&["create", "-f", "-"], &text).unwrap();
        Self(lab)
    }
}

impl Drop for ManyNodes<'_> {
    fn drop(&mut self) {
        let args = ["delete", "csinodes,nodes", "-l", "hostdir.test/joined", "--wait=false"];
        if let Err(error) = self.0.kubectl().run(&args) {
            report(&format!("{error:#}"));
        }
    }
}

#[needs(Root, Go, Cluster)]
fn the_room_of_many_new_nodes_is_published_within_seconds() {
    let count = joining();
    let lab = lab_alone(Mode::Elected, "joined", &format!("{count} nodes join at once"));
    let published = || -> anyhow::Result<usize> {
        let objects = lab.kubectl().list(&["csistoragecapacities", "-n", NAMESPACE])?;
        let joined = |object: &&Value| {
            let node = object["nodeTopology"]["matchLabels"]["topology.hostdir.csi/node"].as_str();
            node.is_some_and(|node| node.starts_with("joined-"))
        };
        Ok(objects.iter().filter(joined).count())
    };
    let start = Instant::now();
    let nodes = ManyNodes::new(&lab, count);
    let joined = start.elapsed();
    lab.wait("every node has its CSIStorageCapacity", || Ok(published()? == count));
    let took = start.elapsed();
    report(&format!(
        "{count} nodes created in {joined:.1?}, all rooms published after {took:.1?}"
    ));
    assert!(took < Duration::from_secs(count as u64 / 2), "{took:.1?}");
    drop(nodes);
    lab.wait("their CSIStorageCapacities are gone", || Ok(published()? == 0));
}
