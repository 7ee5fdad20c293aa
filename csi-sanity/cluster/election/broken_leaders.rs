//! Leaders that hang, die, stand still or are cut off.

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

/// One part of the leader hangs or dies, with everything around it well.
#[needs(Root, Go, Cluster)]
fn a_leader_of_which_a_part_is_dead() {
    let election = Election::begin("ghost-3", "driver hung, driver dead, sidecar hung");
    let (leader, node) = election.leader();
    {
        let _broken = BrokenNode::new(&election, node);
        election.signal(node, &leader, "hostdir", "STOP");
        election.note("the leader's driver hangs, its sidecar renews");
        election.binds_within(Instant::now(), 40, "the driver hung");
        assert_ne!(election.holder(), leader);
        election.was_handed_over("gives no heartbeat");
    }
    election.renew_controllers();
    let (leader, node) = election.leader();
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        election.signal(node, &leader, "hostdir", "KILL");
        election.note("the leader's driver is dead, and nobody starts it again");
        election.binds_within(Instant::now(), 40, "the driver died");
        assert_ne!(election.holder(), leader);
    }
    election.renew_controllers();
    let (leader, node) = election.leader();
    {
        let _broken = BrokenNode::new(&election, node);
        election.signal(node, &leader, "csi-provisioner", "STOP");
        election.note("the leader's sidecar hangs");
        // 10 s, counted from a look up to 4.4 s after the last renewal, and up to 4.4 s until the next look.
        election.binds_within(Instant::now(), 25, "the sidecar hung");
        assert_ne!(election.holder(), leader);
        assert_eq!(election.hand_over(), None, "it expires, and nobody hurries it");
    }
    election.end();
}

#[needs(Root, Go, Cluster)]
fn a_leader_that_is_cut_off_and_comes_back() {
    let election = Election::begin("ghost-4", "the network of the leader's node is cut");
    let (leader, node) = election.leader();
    election.lab.apply(&twenty("before"));
    election
        .lab
        .apply(&["before-0", "before-19"].map(|name| pod(name, name)));
    election.lab.cut_network(node, true).unwrap();
    let cut = CutOff {
        election: &election,
        node,
    };
    election.note("the leader's node has no network, and the leader its hands full");
    election.lab.apply(&twenty("meanwhile"));
    election
        .lab
        .apply(&["meanwhile-0", "meanwhile-19"].map(|name| pod(name, name)));
    election.binds_within(Instant::now(), 25, "the network was cut");
    let new = election.holder();
    assert_ne!(new, leader);
    drop(cut);
    election.note("the network is back");
    election.keeps_the_lease(&new, Instant::now(), 20);
    election.binds_within(Instant::now(), 15, "a claim was made after it came back");
    for name in ["before-0", "before-19", "meanwhile-0", "meanwhile-19"] {
        election.lab.running(name);
    }
    election.end();
}

fn twenty(name: &str) -> Vec<Value> {
    let names = (0..20).map(|number| format!("{name}-{number}"));
    names
        .map(|name| claim_of(&name, "1Mi", CLASS, "ReadWriteOnce"))
        .collect()
}

/// Both processes of the leader stand still in the middle of their work, and then go on as if nothing had been.
#[needs(Root, Go, Cluster)]
fn a_leader_that_is_paused_in_the_middle_of_its_work() {
    let election = Election::begin("ghost-5", "a pause of 40 s in the middle of 50 creates");
    let (leader, node) = election.leader();
    let before = election.recorded().len();
    {
        let _broken = BrokenNode::new(&election, node);
        let claims: Vec<Value> = (0..50)
            .map(|number| claim_of(&format!("paused-{number}"), "1Mi", CLASS, "ReadWriteOnce"))
            .collect();
        let used = ["paused-0", "paused-1", "paused-25", "paused-49"];
        std::thread::scope(|scope| {
            let lab = &election.lab;
            scope.spawn(|| {
                lab.apply(&claims);
                lab.apply(&used.map(|name| pod(name, name)));
            });
            lab.wait("some of fifty are made", || Ok(election.recorded().len() > before + 3));
            for program in ["hostdir", "csi-provisioner"] {
                election.signal(node, &leader, program, "STOP");
            }
        });
        let paused = Instant::now();
        let made = election.recorded().len() - before;
        election.note(&format!("the leader stands still; {made} volumes are made"));
        assert!(made < 50, "too late");
        election.lab.wait("another leads", || Ok(election.holder() != leader));
        election.note("another leads");
        for name in used {
            election.lab.running(name);
        }
        // Of what is deleted now the old leader still thinks that it is there, or to be made.
        election.lab.delete("pod", "paused-0");
        for name in ["paused-0", "paused-2", "paused-48"] {
            election.lab.delete("pvc", name);
        }
        std::thread::sleep(Duration::from_secs(40).saturating_sub(paused.elapsed()));
        for program in ["hostdir", "csi-provisioner"] {
            election.signal(node, &leader, program, "CONT");
        }
        election.note("the old leader goes on");
    }
    election
        .lab
        .wait("47 of fifty are left", || Ok(election.bound().len() == before + 47));
    election.binds_within(Instant::now(), 15, "a claim was made after that");
    assert_eq!(election.recorded().len(), before + 48, "as many as were asked for");
    election.end();
}

#[needs(Root, Go, Cluster)]
fn nobody_is_fit_and_then_one_is() {
    let election = Election::begin("ghost-7", "all controllers hang, then one recovers");
    let (leader, at) = election.leader();
    let transitions = election.transitions();
    let places: Vec<_> = election
        .lab
        .controllers()
        .iter()
        .map(|pod| election.place_of(pod))
        .collect();
    let (other, beside) = places.iter().find(|(name, _)| *name != leader).unwrap();
    {
        let _broken = [BrokenNode::new(&election, at), BrokenNode::new(&election, *beside)];
        election.signal(at, &leader, "hostdir", "STOP");
        election.signal(*beside, other, "csi-provisioner", "STOP");
        election.note("the leader's driver hangs; the other controller's sidecar does, its driver looks on");
        election.keeps_the_lease(&leader, Instant::now(), 35);
        let report = format!("{:#}", election.ask_who_leads(other).unwrap_err());
        assert!(report.contains("it must not lead"), "{report}");
        election.signal(*beside, other, "hostdir", "STOP");
        election.note("the other's driver hangs, too");
        election.keeps_the_lease(&leader, Instant::now(), 6);
        assert_eq!(election.transitions(), transitions);
        for program in ["hostdir", "csi-provisioner"] {
            election.signal(*beside, other, program, "CONT");
        }
        election.note("the other recovers");
        election.binds_within(Instant::now(), 15, "it recovered");
        assert_eq!((&election.holder(), election.transitions()), (other, transitions + 1));
    }
    election.end();
}

/// Two processes under one name, one of which outlives the Pod with the Pod's token, and rises whenever it ends.
#[needs(Root, Go, Cluster)]
fn a_ghost_that_rises_again_and_again() {
    let election = Election::begin("ghost-9", "a ghost in a loop, with its old token");
    let kubectl = election.lab.kubectl();
    election.lab.join_network().unwrap();
    let (name, node) = election.leader();
    let token = election.token(Some(&name));
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        let ghost = GhostController::start(&election, node, &name, &token);
        let args = ["delete", "pod", &name, "-n", NAMESPACE, "--force", "--grace-period=0"];
        kubectl.run(&args).unwrap();
        let gone = Instant::now();
        election.note("its Pod is deleted; the ghost has its token, and rises whenever it ends");
        election.lab.wait("another leads", || Ok(election.holder() != name));
        election.binds_within(gone, 15, "its Pod's end");
        let new = election.holder();
        // The API server takes a token for ten seconds longer than it should.
        election.keeps_the_lease(&new, gone, 15);
        while gone.elapsed() < Duration::from_secs(45) {
            assert_eq!(election.holder(), new, "the ghost leads");
            let error = election
                .hold(&token, LEASE, &name)
                .expect_err("with a dead token")
                .to_string();
            assert!(error.contains("nauthorized"), "{error}");
            std::thread::sleep(Duration::from_millis(500));
        }
        election.binds_within(Instant::now(), 15, "a claim was made");
        election.note(&format!("it has risen {} times, and never led", ghost.starts()));
        assert!(ghost.starts() > 1);
    }
    election.end();
}
