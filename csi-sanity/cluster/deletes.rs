//! Deletes that wait for nodes, and volumes that nobody used.

use crate::lab::{Lab, PATIENCE, lab, report};
use crate::mode::Mode;
use crate::objects::{claim_of, class, on_node, pod};
use crate::scale::many;
use hostdir::k8s::api::{HostNode, HostVolume};
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::{SetOnDrop, needs};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[needs(Root, Go, Cluster)]
fn deletes_wait_for_nodes_that_are_off_and_not_for_those_that_are_gone() {
    let mut lab = lab(
        Mode::Elected,
        "vanished",
        "5. a node is off, and then gone, and then back",
    );
    let names = ["off", "gone", "kept"];
    for name in names {
        lab.apply(&[lab.claim(name, "10Mi"), on_node(pod(name, name), "node-1")]);
    }
    for name in names {
        lab.running(name);
        lab.exec(name, &format!("echo {name} > /data/file")).unwrap();
    }
    let [off, gone, kept] = names.map(|name| lab.volume_of(name));

    lab.nodes[0].cut_power().unwrap();
    lab.force_delete_pods();
    lab.kubectl()
        .run(&["delete", "pvc", "off", "-n", &lab.namespace, "--wait=false"])
        .unwrap();
    lab.wait("the delete waits and says for whom", || {
        Ok(lab
            .kubectl()
            .run(&["describe", "pv", &off])?
            .contains("hostdir on node node-1 has not answered"))
    });
    lab.power_on(0).unwrap();
    lab.wait("the delete lands", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.len() == 2 && !lab.is_on_node(0, &off))
    });

    lab.nodes[0].cut_power().unwrap();
    lab.kubectl().run(&["delete", "node", "node-1"]).unwrap();
    let start = Instant::now();
    lab.kubectl()
        .run(&["delete", "pvc", "gone", "-n", &lab.namespace, "--wait=false"])
        .unwrap();
    lab.wait("the delete of a node that is gone lands", || {
        Ok(lab.kubectl().is_gone(&["pv", &gone])? && lab.kubectl().is_gone(&["hostvolume", &gone])?)
    });
    report(&format!(
        "gone {:.0?} after the Node, with a grace of 10 s",
        start.elapsed()
    ));
    assert!(
        lab.kubectl().get(&["hostvolume", &kept]).is_ok(),
        "nobody asked for this one to be deleted"
    );
    let events = lab.kubectl().run(&["events", "-A"]).unwrap();
    assert!(events.contains("NodeGone"), "nobody was told");

    lab.power_on(0).unwrap();
    // A kubelet whose Node is gone takes its time to register it again.
    lab.wait("the node is back", || {
        Ok(lab.kubectl().get(&["node", "node-1"]).is_ok())
    });
    // By then it tries to register plugins once in two minutes only.
    lab.nodes[0].kill_kubelet().unwrap();
    lab.nodes[0].start_kubelet().unwrap();
    lab.wait_ready(3).unwrap();
    lab.wait("what is left is listed", || {
        let node = lab.kubectl().get(&["hostnode", "node-1"])?;
        Ok(node["status"]["orphans"] == json!([{"id": gone, "pool": "default"}]))
    });
    let left = lab.on_disk(&gone, "file");
    assert_eq!(lab.nodes[0].sh(&format!("cat {left}")).unwrap(), "gone\n");
    lab.apply(&[on_node(pod("kept", "kept"), "node-1")]);
    lab.running("kept");
    assert_eq!(lab.exec("kept", "cat /data/file").unwrap(), "kept\n");

    // An administrator takes the orphan away, as deploy/README.md says.
    lab.nodes[0]
        .sh(&format!("rm -r {}/volumes/{gone}", lab.mode.pool()))
        .unwrap();
    lab.kill_driver(0);
    lab.wait("nothing is listed any more", || {
        let node = lab.kubectl().get(&["hostnode", "node-1"])?;
        Ok(node["status"]["orphans"] == json!([]))
    });
    lab.delete("pod", "kept");
    lab.delete("pvc", "kept");
    lab.nothing_is_left();
}

#[needs(Root, Go, Cluster)]
fn a_claim_that_nobody_ever_used_is_swept_and_others_are_not() {
    let lab = lab(Mode::Elected, "swept", "what nobody ever used is swept");
    let mut now = class(Mode::Elected.driver(), "unused", &json!({}), "Delete", &[]);
    now["volumeBindingMode"] = "Immediate".into();
    lab.apply(&[now, claim_of("unused", "1Mi", "unused", "ReadWriteOnce")]);
    lab.wait("the claim is bound", || {
        Ok(lab.get("pvc", "unused")?["status"]["phase"] == "Bound")
    });
    let bound = lab.volume_of("unused");
    // What a leader leaves behind that dies between making a volume and saying so.
    let left = |name: &str| {
        json!({
            "apiVersion": "hostdir.csi/v1alpha1",
            "kind": "HostVolume",
            "metadata": {"name": name, "finalizers": ["hostdir.csi/node"]},
            "spec": {
                "node": "node-2", "pool": "default", "name": name, "capacity": "1Mi",
                "claim": {"namespace": lab.namespace, "name": "never-was"},
                "directory": {"mode": "0770", "uid": 0, "gid": 0},
            },
        })
    };
    lab.kubectl().apply(&left("pvc-left-behind").to_string()).unwrap();
    lab.wait("what was left behind is swept", || {
        lab.kubectl().is_gone(&["hostvolume", "pvc-left-behind"])
    });
    // The claim that is bound is as old by now.
    assert!(
        lab.kubectl().get(&["hostvolume", &bound]).is_ok(),
        "a bound claim was swept"
    );
    lab.delete("pvc", "unused");
    lab.kubectl().run(&["delete", "storageclass", "unused"]).unwrap();
    lab.nothing_is_left();
}
