//! Healthy leaders keep the Lease while the API server is slow, and hand it over in a rolling update.

use super::Election;
use crate::lab::Thaw;
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::{SetOnDrop, needs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the API server is frozen.
fn freezes() -> usize {
    if std::env::var_os("HOSTDIR_NIGHT").is_some() {
        10
    } else {
        5
    }
}

#[needs(Root, Go, Cluster)]
fn a_healthy_leader_keeps_the_lease_while_the_api_server_is_slow() {
    let election = Election::begin("ghost-8", "API server slow, and repeatedly frozen for 8 s");
    // A sidecar exits after nine seconds without an answer. If this machine itself stalls that long, the run proves nothing.
    let kept_the_lease = (0..3).any(|_| election.keeps_the_lease_while_frozen());
    assert!(
        kept_the_lease,
        "this machine stalls too long to tell whether a leader keeps the Lease"
    );
    election.end();
}

impl Election {
    /// Freezes the API server, and slows it down. Returns false if the machine stalled so long that the run proves nothing.
    fn keeps_the_lease_while_frozen(&self) -> bool {
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
            "the API server was frozen repeatedly, for {:.1} s at most",
            longest.as_secs_f64()
        ));
        // Every request takes up to two seconds.
        let claim = self.claim();
        for _ in 0..6 {
            longest = longest.max(self.freeze(1.7, 0.3));
        }
        self.note("the API server was slow for 12 s");
        self.lab.wait("a claim is bound", || self.is_bound(&claim));
        assert_eq!(self.hand_over(), None, "a healthy leader was replaced");
        if longest >= Duration::from_millis(8800) {
            self.note("this machine froze the API server for too long: trying again");
            return false;
        }
        assert_eq!((self.holder(), self.transitions()), (leader, transitions));
        true
    }

    /// Freezes the API server for `seconds`, then lets it run for `then` seconds. Returns how long it was frozen.
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

/// A rolling update delays at most one claim.
#[needs(Root, Go, Cluster)]
fn a_rolling_update_under_load_delays_no_claim_for_long() {
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
            // The last old pod ends only after that.
            std::thread::sleep(Duration::from_secs(10));
        });
        // Each claim is made when the one before is bound, so its wait is the time without a leader.
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
    // One long wait is allowed: a standby sidecar that got SIGTERM may still take the Lease before it is killed.
    let long = waits.iter().filter(|wait| **wait > Duration::from_secs(5)).count();
    assert!(
        long <= 1 && *longest < Duration::from_secs(15),
        "claims waited too long for a leader: {waits:?}"
    );
    if let Some(note) = election.hand_over() {
        election.note(&format!(
            "a controller that was killed while it led was replaced: {note}"
        ));
        let from = format!("from {leader} ");
        assert!(
            !note.contains(&from),
            "the leader did not release the Lease on SIGTERM: {note}"
        );
    }
    election.end();
}
