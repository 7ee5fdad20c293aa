//! Leaders that hang, die, pause or lose their network.

use super::broken::{BrokenNode, CutOff, GhostController, UselessSidecars, WithoutPolicy};
use super::{CLASS, Election, LEASE, RESIZER_LEASE};
use crate::objects::{claim_of, pod};
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::needs;
use serde_json::Value;
use std::time::{Duration, Instant};

/// One process of the leader hangs or dies, while everything else is healthy.
#[needs(Root, Go, Cluster)]
fn a_leader_with_a_hung_or_dead_process_is_replaced() {
    let election = Election::begin("ghost-3", "driver hung, driver dead, sidecar hung");
    let (leader, node) = election.leader();
    {
        let _broken = BrokenNode::new(&election, node);
        election.signal(node, &leader, "hostdir", "STOP");
        let hung = Instant::now();
        election.note("the leader's driver hangs; its sidecar renews the Lease");
        election.binds_within(hung, 40, "the driver hung");
        assert_ne!(election.holder(), leader);
        election.was_handed_over("has sent no heartbeat");
        // Also where there is no other controller.
        election.lab.wait("the kubelet has restarted the driver", || {
            let pod = election.lab.kubectl().get(&["pod", &leader, "-n", NAMESPACE])?;
            let statuses = pod["status"]["containerStatuses"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            Ok(statuses
                .iter()
                .any(|one| one["name"] == "hostdir" && one["restartCount"] != 0))
        });
        let restarted = hung.elapsed();
        election.note(&format!(
            "the driver is restarted after {:.1} s",
            restarted.as_secs_f64()
        ));
        assert!(restarted < Duration::from_mins(1), "{restarted:?}");
    }
    election.renew_controllers();
    let (leader, node) = election.leader();
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        election.signal(node, &leader, "hostdir", "KILL");
        election.note("the leader's driver is dead, and no kubelet restarts it");
        election.binds_within(Instant::now(), 40, "the driver died");
        assert_ne!(election.holder(), leader);
    }
    election.renew_controllers();
    let (leader, node) = election.leader();
    {
        let _broken = BrokenNode::new(&election, node);
        election.signal(node, &leader, "csi-provisioner", "STOP");
        election.note("the leader's sidecar hangs");
        // The Lease lasts 10 s from the check that saw its last renewal. Checks are up to 4.4 s apart: 19 s at most.
        election.binds_within(Instant::now(), 25, "the sidecar hung");
        assert_ne!(election.holder(), leader);
        // The Lease expires at about the same time.
        if let Some(note) = election.hand_over() {
            assert!(note.contains("its sidecar does not answer"), "{note}");
        }
    }
    election.end();
}

/// The leader's sidecars win their elections and renew their Leases, its driver answers, and nothing is done: lists are refused.
#[needs(Root, Go, Cluster)]
fn a_leader_whose_sidecars_do_no_work_is_replaced() {
    let election = Election::begin("ghost-11", "sidecars that lead and do nothing");
    election.lab.join_network().unwrap();
    let kubectl = election.lab.kubectl();
    let (leader, node) = election.leader();
    // Each election has its own leader.
    let token = election.token(Some(&leader));
    election.hold(&token, RESIZER_LEASE, &leader).unwrap();
    let without_policy = WithoutPolicy::begin(&election);
    {
        let broken = BrokenNode::new(&election, node);
        broken.stop_kubelet();
        let useless = UselessSidecars::start(&election, node, &leader);
        election.lab.wait("they lead", || {
            let leads = |lease: &str| {
                let lease = kubectl.get(&["lease", lease, "-n", NAMESPACE])?;
                anyhow::Ok(lease["spec"]["holderIdentity"] == leader.as_str())
            };
            anyhow::ensure!(leads(LEASE)? && leads(RESIZER_LEASE)?, "{}", useless.log());
            Ok(true)
        });
        election.note("the leader has sidecars that may list nothing; they renew both Leases");
        let asked = Instant::now();
        let grow = r#"{"spec":{"resources":{"requests":{"storage":"20Mi"}}}}"#;
        let namespace = election.lab.namespace.as_str();
        kubectl
            .run(&["patch", "pvc", "live", "-n", namespace, "-p", grow])
            .unwrap();
        election.binds_within(asked, 90, "the claim was made");
        assert_ne!(election.holder(), leader);
        election.was_handed_over("its sidecar has finished nothing for");
        election.lab.wait("the volume of the other claim has grown", || {
            Ok(election.lab.get("pvc", "live")?["status"]["capacity"]["storage"] == "20Mi")
        });
        let grown = asked.elapsed();
        election.note(&format!("a claim has grown after {:.1} s", grown.as_secs_f64()));
        assert!(grown < Duration::from_secs(100), "{grown:?}");
    }
    drop(without_policy);
    election.end();
}

#[needs(Root, Go, Cluster)]
fn a_leader_without_network_is_replaced_and_does_not_lead_again() {
    let election = Election::begin("ghost-4", "the network of the leader's node is cut");
    let (leader, node) = election.leader();
    election.lab.apply(&twenty_claims("before"));
    election
        .lab
        .apply(&["before-0", "before-19"].map(|name| pod(name, name)));
    election.lab.cut_network(node, true).unwrap();
    let cut = CutOff {
        election: &election,
        node,
    };
    election.note("the leader's node has no network, and the leader has work to do");
    election.lab.apply(&twenty_claims("meanwhile"));
    election
        .lab
        .apply(&["meanwhile-0", "meanwhile-19"].map(|name| pod(name, name)));
    election.binds_within(Instant::now(), 25, "the network was cut");
    let new = election.holder();
    assert_ne!(new, leader);
    drop(cut);
    election.note("the network is back");
    election.keeps_the_lease(&new, Instant::now(), 20);
    election.binds_within(Instant::now(), 15, "the network had been back for 20 s");
    for name in ["before-0", "before-19", "meanwhile-0", "meanwhile-19"] {
        election.lab.running(name);
    }
    election.end();
}

fn twenty_claims(name: &str) -> Vec<Value> {
    let names = (0..20).map(|number| format!("{name}-{number}"));
    names
        .map(|name| claim_of(&name, "1Mi", CLASS, "ReadWriteOnce"))
        .collect()
}

/// Both processes of the leader are paused while they create volumes, and later resume.
#[needs(Root, Go, Cluster)]
fn a_leader_paused_while_it_creates_does_no_harm_when_it_resumes() {
    let election = Election::begin("ghost-5", "a pause of 40 s in the middle of 50 creates");
    election.stop_liveness_probes();
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
            lab.wait("some of the 50 volumes are made", || {
                Ok(election.recorded().len() > before + 3)
            });
            for program in ["hostdir", "csi-provisioner"] {
                election.signal(node, &leader, program, "STOP");
            }
        });
        let paused = Instant::now();
        let made = election.recorded().len() - before;
        election.note(&format!("the leader is paused; {made} volumes are made"));
        assert!(made < 50, "all 50 volumes were made before the pause");
        election.lab.wait("another leads", || Ok(election.holder() != leader));
        election.note("another leads");
        for name in used {
            election.lab.running(name);
        }
        // The old leader does not know of these deletes: it takes the claims as bound, or as still to be provisioned.
        election.lab.delete("pod", "paused-0");
        for name in ["paused-0", "paused-2", "paused-48"] {
            election.lab.delete("pvc", name);
        }
        std::thread::sleep(Duration::from_secs(40).saturating_sub(paused.elapsed()));
        for program in ["hostdir", "csi-provisioner"] {
            election.signal(node, &leader, program, "CONT");
        }
        election.note("the old leader resumes");
    }
    election.lab.wait("47 of the 50 volumes are left", || {
        Ok(election.bound().len() == before + 47)
    });
    election.binds_within(Instant::now(), 15, "all deletes were done");
    assert_eq!(
        election.recorded().len(),
        before + 48,
        "the number of HostVolumes is not that of the claims"
    );
    election.lab.install(&[]);
    election.end();
}

#[needs(Root, Go, Cluster)]
fn the_lease_is_handed_over_only_once_a_controller_is_fit() {
    let election = Election::begin("ghost-7", "all controllers hang, then one recovers");
    election.stop_liveness_probes();
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
        election.note("the leader's driver hangs; the other controller's sidecar hangs, but its driver works");
        election.keeps_the_lease(&leader, Instant::now(), 22);
        let report = format!("{:#}", election.ask_who_leads(other).unwrap_err());
        assert!(report.contains("it must not lead"), "{report}");
        assert!(report.contains("No other controller could lead either"), "{report}");
        let pod = election.lab.kubectl().get(&["pod", other, "-n", NAMESPACE]).unwrap();
        let line = format!("hostdir_leader_candidates{{lease=\"{LEASE}\"}} 0");
        election.lab.metrics_have(&pod, &[&line]);
        election.lab.wait("an Event says that nobody could lead", || {
            let events = election
                .lab
                .kubectl()
                .run(&["describe", "lease", LEASE, "-n", NAMESPACE])?;
            Ok(events.contains("NobodyCanLead"))
        });
        election.signal(*beside, other, "hostdir", "STOP");
        election.note("the other controller's driver hangs, too");
        election.keeps_the_lease(&leader, Instant::now(), 6);
        assert_eq!(election.transitions(), transitions);
        for program in ["hostdir", "csi-provisioner"] {
            election.signal(*beside, other, program, "CONT");
        }
        election.note("the other controller recovers");
        election.binds_within(Instant::now(), 15, "the other controller recovered");
        assert_eq!((&election.holder(), election.transitions()), (other, transitions + 1));
    }
    election.lab.install(&[]);
    election.end();
}

/// Two sidecars with one name. One of them outlives the Pod with the Pod's token, and is restarted whenever it ends.
#[needs(Root, Go, Cluster)]
fn a_ghost_that_keeps_restarting_never_leads_again() {
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
        election.note("the leader's Pod is deleted; the ghost has its token, and is restarted whenever it ends");
        election.lab.wait("another leads", || Ok(election.holder() != name));
        election.binds_within(gone, 15, "the Pod was deleted");
        let new = election.holder();
        // The API server accepts a token for ten seconds longer than it should.
        election.keeps_the_lease(&new, gone, 15);
        while gone.elapsed() < Duration::from_secs(45) {
            assert_eq!(election.holder(), new, "the ghost leads");
            let error = election
                .hold(&token, LEASE, &name)
                .expect_err("the token of a deleted Pod was accepted")
                .to_string();
            assert!(error.contains("nauthorized"), "{error}");
            std::thread::sleep(Duration::from_millis(500));
        }
        election.binds_within(Instant::now(), 15, "45 s of a restarting ghost");
        election.note(&format!(
            "the ghost was started {} times, and never led again",
            ghost.starts()
        ));
        assert!(ghost.starts() > 1);
    }
    election.end();
}
