//! Leaders on nodes that were removed, or have no kubelet.

use super::Election;
use super::broken::{BrokenNode, GhostController, SoonerNotReady, WithoutPolicy};
use crate::lab::is_ready;
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::needs;
use serde_json::json;
use std::time::Instant;

/// A node is removed the wrong way: its kubelet is dead and its Node deleted, but its containers still run.
#[needs(Root, Go, Cluster)]
fn a_leader_on_a_deleted_node_whose_containers_run_on_is_replaced() {
    let election = Election::begin("ghost-1", "a removed node whose containers still run");
    let (ghost, node) = election.leader();
    election.note(&format!("{ghost} leads"));
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        let deleted = broken.delete_node();
        election.lab.wait("the ghost's driver has exited", || {
            Ok(!election.runs(node, &ghost, "hostdir"))
        });
        let socket = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/socket/csi.sock";
        let sockets = election.lab.nodes[node]
            .sh(&format!("ls {socket} 2>/dev/null || :"))
            .unwrap();
        assert_eq!(sockets, "", "the ghost's socket still exists");
        election.note("the ghost's driver has exited, and closed its socket");
        election.binds_within(deleted, 30, "the Node was deleted");
        assert_ne!(election.holder(), ghost);
        let log = election.log_of(node, &ghost);
        assert!(
            log.contains("this controller is a ghost") && log.contains("no longer exists"),
            "{log}"
        );
        let gone = || election.lab.kubectl().is_gone(&["pod", &ghost, "-n", NAMESPACE]);
        election.lab.wait("the ghost's Pod is gone", gone);
        election.note("the ghost's Pod object is gone");
        election.binds_within(Instant::now(), 15, "the Pod was gone");
        assert_ne!(election.holder(), ghost);
    }
    election.end();
}

/// The worst case: the ghost's driver hangs, so it cannot exit; its token is bound to no Pod and never expires; and no
/// policy stops it from renewing the Lease.
#[needs(Root, Go, Cluster)]
fn a_hung_ghost_with_an_unbound_token_and_no_policy_is_replaced() {
    let election = Election::begin("ghost-worst", "a hung ghost with an unbound token and no policy");
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
        election.note("the ghost's driver hangs; its sidecar renews the Lease with a token that is bound to no Pod");
        broken.delete_node();
        let args = ["delete", "pod", &name, "-n", NAMESPACE, "--force", "--grace-period=0"];
        kubectl.run(&args).unwrap();
        election.note("the ghost's Pod object is gone");
        election.binds_within(Instant::now(), 15, "the Pod was gone");
        election.was_handed_over(&name);
        let new = election.holder();
        election
            .lab
            .wait("the ghost's sidecar has lost the Lease and starts again", || {
                Ok(ghost.starts() > 1)
            });
        election.note("the ghost's sidecar has ended, and was restarted");
        assert_eq!(election.holder(), new);
        election.check_hand_over_is_reported(&name);
    }
    drop(without_policy);
    election.end();
}

/// The kubelet is dead, but the leader works: it goes on, until its Pod is deleted.
#[needs(Root, Go, Cluster)]
fn a_leader_that_works_without_a_kubelet_leads_until_its_pod_is_deleted() {
    let election = Election::begin("ghost-2", "a dead kubelet, and a leader that works");
    let (leader, node) = election.leader();
    {
        let _sooner = SoonerNotReady::begin(&election.lab);
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        election.lab.wait("the Node is not Ready", || {
            Ok(!is_ready(&election.lab.kubectl().get(&["node", broken.name()])?))
        });
        let noticed = Instant::now();
        election.note("the Node is no longer Ready");
        election.keeps_the_lease(&leader, noticed, 20);
        election.binds_within(Instant::now(), 15, "the Node had not been Ready for 20 s");
        assert_eq!(election.holder(), leader);
        let args = ["delete", "pod", &leader, "-n", NAMESPACE, "--force", "--grace-period=0"];
        election.lab.kubectl().run(&args).unwrap();
        election.note("its Pod is deleted");
        election.lab.wait("another leads", || Ok(election.holder() != leader));
        election.binds_within(Instant::now(), 25, "another led");
        election.lab.wait("the driver of the old leader has exited", || {
            Ok(!election.runs(node, &leader, "hostdir"))
        });
    }
    election.end();
}

#[needs(Root, Go, Cluster)]
fn a_leader_whose_node_was_made_again_is_replaced() {
    let election = Election::begin("ghost-6", "a Node deleted and made again, while the ghost still runs");
    let (ghost, node) = election.leader();
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        // The hung driver cannot see that its Node was replaced; its sidecar renews the Lease.
        election.signal(node, &ghost, "hostdir", "STOP");
        broken.delete_node();
        let anew = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": broken.name()}});
        election.lab.kubectl().apply(&anew.to_string()).unwrap();
        election.note("a Node of the same name is made");
        election.binds_within(Instant::now(), 40, "the Node was made again");
        assert_ne!(election.holder(), ghost);
        // The new leader stays when the ghost's driver resumes.
        election.signal(node, &ghost, "hostdir", "CONT");
        let new = election.holder();
        election.keeps_the_lease(&new, Instant::now(), 15);
    }
    election.end();
}
