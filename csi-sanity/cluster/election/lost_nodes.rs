//! Leaders on nodes that are removed, or have no kubelet.

use super::broken::*;
use super::*;
use crate::lab::{Lab, PATIENCE, Thaw, is_ready, lab, report};
use crate::mode::Mode;
use crate::objects::{claim_of, class, on_node, pod};
use crate::rights::{Holder, token};
use anyhow::{Context, Result, ensure};
use hostdir_lab::cluster::{ControllerManager, NAMESPACE};
use hostdir_lab::prove::target_dir;
use hostdir_lab::{SetOnDrop, needs};
use k8s_openapi::api::coordination::v1::Lease;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A node is removed the wrong way: its kubelet is dead, its Node deleted, its containers live on.
#[needs(Root, Go, Cluster)]
fn a_removed_node_whose_containers_live_on() {
    let election = Election::begin("ghost-1", "the election itself: a removed node");
    let (ghost, node) = election.leader();
    election.note(&format!("{ghost} leads"));
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        let deleted = broken.delete_node();
        election.lab.wait("the ghost has ended itself", || {
            Ok(!election.runs(node, &ghost, "hostdir"))
        });
        let socket = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/socket/csi.sock";
        let sockets = election.lab.nodes[node]
            .sh(&format!("ls {socket} 2>/dev/null || :"))
            .unwrap();
        assert_eq!(sockets, "", "its socket is there");
        election.note("the ghost's driver has ended itself, and closed its socket");
        election.binds_within(deleted, 30, "the Node was deleted");
        assert_ne!(election.holder(), ghost);
        let log = election.log_of(node, &ghost);
        assert!(
            log.contains("this controller is a ghost") && log.contains("does not exist any more"),
            "{log}"
        );
        let gone = || election.lab.kubectl().is_gone(&["pod", &ghost, "-n", NAMESPACE]);
        election.lab.wait("its Pod is gone", gone);
        election.note("the ghost's Pod object is gone");
        election.binds_within(Instant::now(), 15, "its Pod's end");
        assert_ne!(election.holder(), ghost);
    }
    election.end();
}

/// The worst of all: its driver hangs, so that it cannot end itself, its token is bound to no Pod and never expires, and no
/// policy keeps it from renewing.
#[needs(Root, Go, Cluster)]
fn a_ghost_that_hangs_with_an_unbound_token_and_no_policy() {
    let election = Election::begin("ghost-worst", "again, with an unbound token and no policy");
    let kubectl = election.lab.kubectl();
    let (name, node) = election.leader();
    let without_policy = WithoutPolicy::begin(&election);
    let token = election.token(None);
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        let ghost = GhostController::start(&election, node, &name, &token);
        election.signal(node, &name, "hostdir", "STOP");
        ghost.hang_driver();
        assert_eq!(election.holder(), name);
        election.note("its driver hangs; its sidecar renews with a token that is bound to no Pod");
        broken.delete_node();
        let args = ["delete", "pod", &name, "-n", NAMESPACE, "--force", "--grace-period=0"];
        kubectl.run(&args).unwrap();
        election.note("its Pod object is gone");
        election.binds_within(Instant::now(), 15, "its Pod's end");
        election.was_handed_over(&name);
        let new = election.holder();
        election
            .lab
            .wait("the ghost has lost and begins anew", || Ok(ghost.starts() > 1));
        election.note("the ghost's sidecar has ended, and was started again");
        assert_eq!(election.holder(), new);
        election.tells_who_led(&name);
    }
    drop(without_policy);
    election.end();
}

/// The kubelet is dead, the Node stays, and the leader works: that is no reason to do anything soon.
#[needs(Root, Go, Cluster)]
fn a_node_without_its_kubelet() {
    let election = Election::begin("ghost-2", "a dead kubelet, and a leader that works");
    let (leader, node) = election.leader();
    let transitions = election.transitions();
    {
        let _sooner = SoonerNotReady::begin(&election.lab);
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        election.lab.wait("the Node is not ready", || {
            Ok(!is_ready(&election.lab.kubectl().get(&["node", broken.name()])?))
        });
        let noticed = Instant::now();
        election.note("the Node is not Ready any more");
        election.keeps_the_lease(&leader, noticed, 55);
        election.binds_within(Instant::now(), 15, "a claim was made of the leader that works");
        election.lab.wait("another leads", || Ok(election.holder() != leader));
        let after = noticed.elapsed();
        election.note(&format!(
            "another leads, {:.1} s after the Node was not Ready",
            after.as_secs_f64()
        ));
        assert!(
            after > Duration::from_secs(57) && after < Duration::from_secs(75),
            "{after:?}"
        );
        election.was_handed_over("is not Ready, for 6");
        election.binds_within(Instant::now(), 15, "the hand-over");
    }
    assert_eq!(election.transitions(), transitions + 1, "one hand-over, and one only");
    election.end();
}

#[needs(Root, Go, Cluster)]
fn the_node_is_made_again_under_the_same_name() {
    let election = Election::begin("ghost-6", "Node deleted and made again, the ghost lives");
    let (ghost, node) = election.leader();
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        // It cannot see that its Node is another: its driver hangs, and its sidecar renews.
        election.signal(node, &ghost, "hostdir", "STOP");
        broken.delete_node();
        let anew = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": broken.name()}});
        election.lab.kubectl().apply(&anew.to_string()).unwrap();
        election.note("a Node of the same name is made");
        election.binds_within(Instant::now(), 40, "the new Node");
        assert_ne!(election.holder(), ghost);
        // And it stays so when the ghost is heard of again.
        election.signal(node, &ghost, "hostdir", "CONT");
        let new = election.holder();
        election.keeps_the_lease(&new, Instant::now(), 15);
    }
    election.end();
}
