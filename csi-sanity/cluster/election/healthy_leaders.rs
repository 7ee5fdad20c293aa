//! Leaders that work are left alone: while the API server is slow, and in a rolling update.

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

/// How often the API server is frozen: more often at night.
fn freezes() -> usize {
    if std::env::var_os("HOSTDIR_NIGHT").is_some() {
        10
    } else {
        5
    }
}

#[needs(Root, Go, Cluster)]
fn a_leader_that_is_well_is_left_alone() {
    let election = Election::begin("ghost-8", "API server slow, and frozen again and again for 8 s");
    // A sidecar ends after nine seconds without an answer: a machine that stalls for that long is no news of ours.
    let left_alone = (0..3).any(|_| election.is_left_alone_while_frozen());
    assert!(
        left_alone,
        "this machine stalls too long to tell whether a leader is left alone"
    );
    election.end();
}

impl Election {
    /// Freezes the API server, and slows it down. Nothing can be told (false) if this machine froze it for longer than that.
    fn is_left_alone_while_frozen(&self) -> bool {
        let (leader, _) = self.leader();
        let transitions = self.transitions();
        let _thaw = Thaw(&self.lab);
        let mut longest = Duration::ZERO;
        for _ in 0..freezes() {
            let claim = self.claim();
            longest = longest.max(self.freeze(8.0, 5.0));
            self.lab
                .wait("a claim is bound between two freezes", || self.is_bound(&claim));
        }
        self.note(&format!(
            "frozen again and again, for {:.1} s at most",
            longest.as_secs_f64()
        ));
        // Two seconds for whatever is asked.
        let claim = self.claim();
        for _ in 0..6 {
            longest = longest.max(self.freeze(1.7, 0.3));
        }
        self.note("slow for 12 s");
        self.lab.wait("a claim is bound", || self.is_bound(&claim));
        assert_eq!(self.hand_over(), None, "somebody was deposed");
        if longest >= Duration::from_millis(8800) {
            self.note("this machine froze it for too long: once more");
            return false;
        }
        assert_eq!((self.holder(), self.transitions()), (leader, transitions));
        true
    }

    /// Freezes the API server for so many seconds; how long it took.
    fn freeze(&self, seconds: f64, then: f64) -> Duration {
        let start = Instant::now();
        self.lab.freeze_api_server(true).unwrap();
        std::thread::sleep(Duration::from_secs_f64(seconds));
        self.lab.freeze_api_server(false).unwrap();
        let frozen = start.elapsed();
        std::thread::sleep(Duration::from_secs_f64(then));
        frozen
    }
}

/// What the chart can be updated by without anybody noticing.
#[needs(Root, Go, Cluster)]
fn a_rolling_update_under_load() {
    let election = Election::begin("ghost-10", "a rolling update of the controllers under load");
    let (leader, _) = election.leader();
    let kubectl = election.lab.kubectl();
    let deployment = "deployment/hostdir-controller";
    let done = AtomicBool::new(false);
    let mut waits = Vec::new();
    std::thread::scope(|scope| {
        let update = scope.spawn(|| {
            let _done = SetOnDrop(&done);
            kubectl
                .run(&["rollout", "restart", deployment, "-n", NAMESPACE])
                .unwrap();
            kubectl
                .run(&["rollout", "status", deployment, "-n", NAMESPACE, "--timeout=180s"])
                .unwrap();
            // The last of the old ones ends after that.
            std::thread::sleep(Duration::from_secs(10));
        });
        // Each claim is made when the one before is bound: what one waits is how long nobody made volumes.
        while !done.load(Ordering::Relaxed) {
            let (claim, made) = (election.claim(), Instant::now());
            election.lab.wait("a claim is bound", || election.is_bound(&claim));
            waits.push(made.elapsed());
        }
        update.join().unwrap();
    });
    let longest = waits.iter().max().expect("there were claims");
    election.note(&format!(
        "{} claims, one after the other; the longest wait was {:.1} s",
        waits.len(),
        longest.as_secs_f64()
    ));
    assert!(waits.len() > 10, "only {} claims in a rollout", waits.len());
    // Once, there may be a sidecar that is told to end while it stands by: it takes the Lease once more before it is killed, and
    // lets go of it.
    let long = waits.iter().filter(|wait| **wait > Duration::from_secs(5)).count();
    assert!(
        long <= 1 && *longest < Duration::from_secs(15),
        "nobody led for long: {waits:?}"
    );
    if let Some(note) = election.hand_over() {
        election.note(&format!("one that was killed as the leader was deposed: {note}"));
        let from = format!("from {leader} ");
        assert!(
            !note.contains(&from),
            "the leader has not released the Lease when it was told to end"
        );
    }
    election.end();
}
