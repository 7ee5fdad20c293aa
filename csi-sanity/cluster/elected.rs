//! What only elected mode promises: controllers apart from volumes, restarts without an API server, both modes in one
//! cluster.

use crate::lab::{Lab, lab, report};
use crate::mode::Mode;
use crate::objects::{claim_of, on_node, pod};
use hostdir_lab::needs;
use serde_json::json;
use std::time::{Duration, Instant};

/// A node without the leader: its number and name.
pub(super) fn node_without_leader(lab: &Lab) -> (usize, String) {
    let mut leader = None;
    lab.wait("somebody leads", || {
        leader = lab.leader();
        Ok(leader.is_some())
    });
    let (_, leader) = leader.unwrap();
    let other = (0..3).find(|number| lab.nodes[*number].name != leader).unwrap();
    (other, lab.nodes[other].name.clone())
}

#[needs(Root, Go, Cluster)]
fn controllers_have_no_host_access_and_volumes_are_made_where_pods_run() {
    let lab = lab(
        Mode::Elected,
        "apart",
        "1. the leader is on another node and has no host access",
    );
    for controller in lab.controllers() {
        let spec = &controller["spec"];
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
        assert!(spec["hostNetwork"].is_null(), "a controller uses the host's network");
        for volume in spec["volumes"].as_array().unwrap() {
            assert!(volume["hostPath"].is_null(), "a controller has a host path: {volume}");
        }
        for container in spec["containers"].as_array().unwrap() {
            let context = &container["securityContext"];
            assert!(context["privileged"].is_null(), "a controller is privileged");
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
        }
    }
    let (number, node) = node_without_leader(&lab);
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), &node)]);
    assert_eq!(lab.running("pod"), node);
    let volume = lab.volume_of("data");
    assert!(lab.is_on_node(number, &volume));
    let object = lab.kubectl().get(&["hostvolume", &volume]).unwrap();
    assert_eq!(object["spec"]["node"], node.as_str());
    assert_eq!(object["status"]["phase"], "Ready");
    assert_eq!(object["spec"]["claim"]["name"], "data");
    lab.delete("pod", "pod");
    let start = Instant::now();
    lab.delete("pvc", "data");
    lab.wait("the directory is gone", || Ok(!lab.is_on_node(number, &volume)));
    report(&format!("deleted and erased in {:.1?}", start.elapsed()));
    lab.nothing_is_left();
}

#[needs(Root, Go, Cluster)]
fn pods_and_drivers_restart_without_an_api_server() {
    let lab = lab(Mode::Elected, "no-api", "the API server is away for 15 s");
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    lab.exec("pod", "echo precious > /data/file").unwrap();
    let volume = lab.volume_of("data");
    let file = lab.on_disk(&volume, "file");
    let before = lab.get("pod", "pod").unwrap()["status"]["containerStatuses"][0]["containerID"].clone();

    let driver = lab.driver_processes(0);
    lab.stop_api_server().unwrap();
    let start = Instant::now();
    // Kills the pod's container and the driver. The kubelet restarts both, and the volume stays mounted.
    lab.kill_driver(0);
    let script = "for p in /proc/[0-9]*; do
        case \"$(tr '\\0' ' ' < $p/cmdline 2>/dev/null)\" in
        '/bin/sh -c trap'*) kill -9 ${p#/proc/} ;;
        esac
    done";
    lab.nodes[0].sh(script).unwrap();
    while start.elapsed() < Duration::from_secs(15) {
        assert_eq!(lab.nodes[0].sh(&format!("cat {file}")).unwrap(), "precious\n");
        assert_eq!(lab.mounts(), 1);
        std::thread::sleep(Duration::from_secs(3));
    }
    let now = lab.driver_processes(0);
    assert!(
        !now.is_empty() && now != driver,
        "the driver was not restarted: {driver}{now}"
    );
    lab.start_api_server().unwrap();
    let start = Instant::now();
    lab.wait("the pod runs again", || {
        let status = lab.get("pod", "pod")?["status"]["containerStatuses"][0].clone();
        Ok(status["containerID"] != before && status["ready"] == true)
    });
    report(&format!(
        "the pod is ready again {:.1?} after the API server",
        start.elapsed()
    ));
    assert_eq!(lab.exec("pod", "cat /data/file").unwrap(), "precious\n");
    // New claims work again.
    lab.apply(&[lab.claim("next", "10Mi"), pod("next", "next")]);
    lab.running("next");
    report(&format!(
        "a new claim's pod is ready {:.1?} after the API server",
        start.elapsed()
    ));
    for name in ["pod", "next"] {
        lab.delete("pod", name);
    }
    for name in ["data", "next"] {
        lab.delete("pvc", name);
    }
    lab.nothing_is_left();
    lab.wait_ready(3).unwrap();
}

#[needs(Root, Go, Cluster)]
fn both_modes_run_in_one_cluster() {
    let lab = lab(Mode::Elected, "both", "7. one pod with a volume of each mode");
    let mut both = on_node(pod("both", "mine"), "node-2");
    let other = json!({"name": "other", "persistentVolumeClaim": {"claimName": "other"}});
    both["spec"]["volumes"].as_array_mut().unwrap().push(other);
    let mount = json!({"name": "other", "mountPath": "/other"});
    let mounts = both["spec"]["containers"][0]["volumeMounts"].as_array_mut().unwrap();
    mounts.push(mount);
    lab.apply(&[
        lab.claim("mine", "10Mi"),
        claim_of("other", "10Mi", Mode::Local.release(), "ReadWriteOnce"),
        both,
    ]);
    assert_eq!(lab.running("both"), "node-2");
    let (mine, other) = (lab.volume_of("mine"), lab.volume_of("other"));
    let pools = [(Mode::Elected.pool(), &mine), (Mode::Local.pool(), &other)];
    for (pool, volume) in pools {
        lab.nodes[1]
            .sh(&format!("test -d {pool}/volumes/{volume}/data"))
            .unwrap();
    }
    lab.delete("pod", "both");
    lab.delete("pvc", "mine");
    lab.delete("pvc", "other");
    lab.nothing_is_left();
    lab.wait("the volume in the local pool is gone, too", || {
        Ok(lab.nodes[1]
            .sh(&format!("ls {}/volumes", Mode::Local.pool()))?
            .is_empty())
    });
}
