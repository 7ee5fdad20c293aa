//! Deletes that wait for nodes, and HostVolumes that were never used.

use crate::lab::{lab, lab_alone, report};
use crate::mode::Mode;
use crate::objects::{claim_of, class, on_node, pod};
use hostdir_lab::needs;
use serde_json::json;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

#[needs(Root, Go, Cluster)]
fn deletes_wait_for_a_node_that_is_off_but_not_for_a_deleted_one() {
    let mut lab = lab(Mode::Elected, "vanished", "5. a node is off, then deleted, then back");
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
    lab.wait("the delete waits, and an Event names the node", || {
        Ok(lab
            .kubectl()
            .run(&["describe", "pv", &off])?
            .contains("hostdir on node node-1 does not answer"))
    });
    lab.power_on(0).unwrap();
    lab.wait("the delete is done", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.len() == 2 && !lab.is_on_node(0, &off))
    });

    lab.nodes[0].cut_power().unwrap();
    lab.kubectl().run(&["delete", "node", "node-1"]).unwrap();
    let start = Instant::now();
    lab.kubectl()
        .run(&["delete", "pvc", "gone", "-n", &lab.namespace, "--wait=false"])
        .unwrap();
    lab.wait("the delete of a volume on a deleted node is done", || {
        Ok(lab.kubectl().is_gone(&["pv", &gone])? && lab.kubectl().is_gone(&["hostvolume", &gone])?)
    });
    report(&format!(
        "the volume is gone {:.0?} after its Node, with a grace period of 10 s",
        start.elapsed()
    ));
    assert!(
        lab.kubectl().get(&["hostvolume", &kept]).is_ok(),
        "a HostVolume whose claim was not deleted is gone"
    );
    let events = lab.kubectl().run(&["events", "-A"]).unwrap();
    assert!(events.contains("NodeGone"), "there is no Event NodeGone: {events}");

    lab.power_on(0).unwrap();
    // A kubelet whose Node is gone takes a while to register it again.
    lab.wait("the node is back", || {
        Ok(lab.kubectl().get(&["node", "node-1"]).is_ok())
    });
    // By then the kubelet retries to register plugins only every two minutes.
    lab.nodes[0].kill_kubelet().unwrap();
    lab.nodes[0].start_kubelet().unwrap();
    lab.wait_ready(3).unwrap();
    lab.wait("the HostNode lists the orphan", || {
        let node = lab.kubectl().get(&["hostnode", "node-1"])?;
        let orphans = &node["status"]["orphans"];
        Ok(orphans[0]["id"] == gone.as_str() && orphans[0]["claim"]["name"] == "gone" && orphans[1].is_null())
    });
    let left = lab.on_disk(&gone, "file");
    assert_eq!(lab.nodes[0].sh(&format!("cat {left}")).unwrap(), "gone\n");
    lab.apply(&[on_node(pod("kept", "kept"), "node-1")]);
    lab.running("kept");
    assert_eq!(lab.exec("kept", "cat /data/file").unwrap(), "kept\n");

    // An administrator removes the orphan, as deploy/README.md says.
    lab.nodes[0]
        .sh(&format!("rm -r {}/volumes/{gone}", lab.mode.pool()))
        .unwrap();
    lab.kill_driver(0);
    lab.wait("the HostNode lists no orphan", || {
        let node = lab.kubectl().get(&["hostnode", "node-1"])?;
        Ok(node["status"]["orphans"] == json!([]))
    });
    lab.delete("pod", "kept");
    lab.delete("pvc", "kept");
    lab.nothing_is_left();
}

/// How many volumes wait for their delete: more than external-provisioner has workers.
fn waiting() -> usize {
    if std::env::var_os("HOSTDIR_NIGHT").is_some() {
        1600
    } else {
        150
    }
}

#[needs(Root, Go, Cluster)]
fn deletes_on_a_dead_node_keep_no_claim_on_a_healthy_one_waiting() {
    let count = waiting();
    let lab = lab_alone(
        Mode::Elected,
        "dead-zone",
        &format!("{count} deletes wait for a dead node"),
    );
    let mut volumes = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "dead"}}).to_string();
    let mut persistent = String::new();
    let driver = Mode::Elected.driver();
    for number in 0..count {
        let name = format!("pvc-dead-{number}");
        let volume = json!({
            "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostVolume",
            "metadata": {"name": name, "finalizers": ["hostdir.csi/node"]},
            "spec": {
                "node": "dead", "pool": "default", "name": name, "capacity": "1Mi",
                "directory": {"mode": "0770", "uid": 0, "gid": 0},
            },
        });
        // Its claim was deleted.
        let claim = json!({"namespace": lab.namespace, "name": name, "uid": "0b5bd0f0-5b0f-4b0e-8b0a-5b5b5b5b5b5b"});
        let pv = json!({
            "apiVersion": "v1", "kind": "PersistentVolume",
            "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": driver}},
            "spec": {
                "capacity": {"storage": "1Mi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "hostdir",
                "persistentVolumeReclaimPolicy": "Delete", "claimRef": claim,
                "csi": {"driver": driver, "volumeHandle": name},
            },
        });
        write!(volumes, "\n---\n{volume}").unwrap();
        write!(persistent, "\n---\n{pv}").unwrap();
    }
    lab.kubectl().feed(&["create", "-f", "-"], &volumes).unwrap();
    // The phase is a status, which `create` leaves out.
    let patch = r#"{"status":{"phase":"Ready","poolId":"6b1f9a64-8d0e-4a3c-9a57-1f0a8c1d2e3f"}}"#;
    let volumes = lab.kubectl().list(&["hostvolumes"]).unwrap();
    let names: Vec<&str> = volumes
        .iter()
        .filter_map(|volume| volume["metadata"]["name"].as_str())
        .collect();
    for some in names.chunks(100) {
        let args = [
            "patch",
            "hostvolume",
            "--subresource=status",
            "--type=merge",
            "-p",
            patch,
        ];
        lab.kubectl().run(&[&args[..], some].concat()).unwrap();
    }
    lab.kubectl().feed(&["create", "-f", "-"], &persistent).unwrap();
    lab.wait("all deletes wait", || {
        let volumes = lab.kubectl().list(&["hostvolumes"])?;
        let deleting = |volume: &&serde_json::Value| !volume["metadata"]["deletionTimestamp"].is_null();
        Ok(volumes.iter().filter(deleting).count() == count)
    });
    let start = Instant::now();
    lab.apply(&[lab.claim("healthy", "1Mi"), pod("healthy", "healthy")]);
    lab.wait("the claim is bound", || {
        Ok(lab.get("pvc", "healthy")?["status"]["phase"] == "Bound")
    });
    let bound = start.elapsed();
    lab.running("healthy");
    let start = Instant::now();
    lab.delete("pod", "healthy");
    let volume = lab.volume_of("healthy");
    lab.delete("pvc", "healthy");
    lab.wait("the healthy volume is deleted", || {
        lab.kubectl().is_gone(&["hostvolume", &volume])
    });
    report(&format!(
        "with {count} deletes that wait, a claim is bound in {bound:.1?}, and deleted in {:.1?}",
        start.elapsed()
    ));
    assert!(bound < Duration::from_secs(5), "{bound:.1?}");
    lab.kubectl().run(&["delete", "node", "dead"]).unwrap();
    lab.wait("the deletes end without the node", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.is_empty())
    });
    // external-provisioner would try again after minutes.
    lab.wait("the PersistentVolumes are gone", || {
        let left = lab.kubectl().list(&["pv"])?;
        let names: Vec<&str> = left.iter().filter_map(|pv| pv["metadata"]["name"].as_str()).collect();
        let delete = ["delete", "pv", "--ignore-not-found", "--wait=false"];
        let free = [
            "patch",
            "pv",
            "--type=merge",
            "-p",
            r#"{"metadata":{"finalizers":null}}"#,
        ];
        // Some go by themselves meanwhile.
        for args in [&delete[..], &free[..]].iter().filter(|_| !names.is_empty()) {
            let _ = lab.kubectl().run(&[args, &names[..]].concat());
        }
        Ok(names.is_empty())
    });
    lab.nothing_is_left();
}

#[needs(Root, Go, Cluster)]
fn a_hostvolume_without_a_claim_is_swept_and_a_bound_one_is_not() {
    let lab = lab(Mode::Elected, "swept", "a HostVolume without a claim is swept");
    let mut now = class(Mode::Elected.driver(), "unused", &json!({}), "Delete", &[]);
    now["volumeBindingMode"] = "Immediate".into();
    lab.apply(&[now, claim_of("unused", "1Mi", "unused", "ReadWriteOnce")]);
    lab.wait("the claim is bound", || {
        Ok(lab.get("pvc", "unused")?["status"]["phase"] == "Bound")
    });
    let bound = lab.volume_of("unused");
    // The HostVolume that a leader leaves behind if it dies between creating it and answering.
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
    lab.wait("the HostVolume that was left behind is swept", || {
        lab.kubectl().is_gone(&["hostvolume", "pvc-left-behind"])
    });
    // By now the HostVolume of the bound claim is as old.
    assert!(
        lab.kubectl().get(&["hostvolume", &bound]).is_ok(),
        "the HostVolume of a bound claim was swept"
    );
    lab.delete("pvc", "unused");
    lab.kubectl().run(&["delete", "storageclass", "unused"]).unwrap();
    lab.nothing_is_left();
}
