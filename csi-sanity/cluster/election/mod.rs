//! Leader election with the real sidecars: leaders that are dead, hung, cut off or on a removed node are replaced, healthy
//! ones are not.
//!
//! Each test prints its timeline. Measured times begin when the API server shows the failure (or with the failure itself,
//! if it never does), and end when a new claim is bound.

mod access;
mod broken;
mod broken_leaders;
mod healthy_leaders;
mod lost_nodes;

use crate::lab::{Lab, PATIENCE, is_ready, lab, report};
use crate::mode::Mode;
use crate::objects::{claim_of, class, on_node, pod};
use crate::rights::{Holder, token};
use anyhow::{Context, Result};
use hostdir_lab::cluster::NAMESPACE;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

pub(super) const LEASE: &str = "hostdir-csi";

pub(super) const RESIZER_LEASE: &str = "external-resizer-hostdir-csi";

pub(super) const POLICY: &str = "hostdir-leases";

/// A StorageClass with immediate binding, so that no pods are needed.
pub(super) const CLASS: &str = "at-once";

/// A test of the election, with its timeline.
pub(super) struct Election {
    pub(super) lab: Lab,
    pub(super) start: Instant,
    pub(super) claims: Cell<u32>,
    /// The last hand-over before this test.
    pub(super) before: RefCell<String>,
}

impl Election {
    /// Begins a test: with new controllers that have seen no hand-over, one of which leads, and with a volume in use.
    pub(super) fn begin(name: &str, title: &str) -> Self {
        let lab = lab(Mode::Elected, name, title);
        let mut now = class(Mode::Elected.driver(), CLASS, &json!({}), "Delete", &[]);
        now["volumeBindingMode"] = "Immediate".into();
        lab.apply(&[now]);
        let election = Self {
            lab,
            start: Instant::now(),
            claims: Cell::default(),
            before: RefCell::default(),
        };
        election.renew_controllers();
        let (_, node) = election.leader();
        let other = &election.lab.nodes[(node + 1) % 3].name;
        election
            .lab
            .apply(&[election.lab.claim("live", "10Mi"), on_node(pod("live", "live"), other)]);
        election.lab.running("live");
        election
    }

    /// Replaces the controllers until none of them has seen a hand-over, all are ready, and one leads.
    pub(super) fn renew_controllers(&self) {
        for _ in 0..5 {
            let before = self.last_hand_over();
            self.replace_controllers();
            // A standby external-provisioner that gets SIGTERM keeps taking part in the election until it is killed. So an
            // old one may have got the Lease, and a hand-over to a new one may have followed.
            let last = self.last_hand_over();
            if last == before {
                self.before.replace(last);
                return;
            }
        }
        panic!(
            "every replacement of the controllers led to a hand-over: {}",
            self.last_hand_over()
        );
    }

    pub(super) fn replace_controllers(&self) {
        let old: BTreeSet<String> = self.lab.controllers().iter().map(name_of).collect();
        let labels = self.lab.controller_labels();
        // Without this, a standby sidecar would run for another 30 s.
        let args = ["delete", "pods", "-n", NAMESPACE, "-l", &labels, "--grace-period=3"];
        self.lab.kubectl().run(&args).unwrap();
        self.lab.wait("two new controllers are ready, and one leads", || {
            let pods = self.lab.controllers();
            let new = pods
                .iter()
                .filter(|pod| is_ready(pod) && !old.contains(&name_of(pod)))
                .count();
            let leader = self.lab.leader();
            Ok(pods.len() == 2 && new == 2 && leader.is_some_and(|(leader, _)| !old.contains(&leader)))
        });
    }

    /// Lets the kubelet leave controllers alone that are only paused, until hostdir is installed again.
    pub(super) fn stop_liveness_probes(&self) {
        let deployment = "deployment/hostdir-controller";
        let without = |number: usize| {
            let path = format!("/spec/template/spec/containers/{number}/livenessProbe");
            json!({"op": "remove", "path": path})
        };
        let patch = json!([without(0), without(1), without(2)]).to_string();
        let kubectl = self.lab.kubectl();
        for args in [
            &["patch", deployment, "-n", NAMESPACE, "--type=json", "-p", &patch][..],
            &["rollout", "status", deployment, "-n", NAMESPACE, "--timeout=180s"],
        ] {
            kubectl.run(args).unwrap();
        }
        self.renew_controllers();
    }

    pub(super) fn note(&self, what: &str) {
        let (test, time) = (&self.lab.namespace, self.start.elapsed().as_secs_f64());
        report(&format!("  {test} {time:>6.1} s  {what}"));
    }

    /// The leader, and its node by number.
    pub(super) fn leader(&self) -> (String, usize) {
        let (leader, node) = self.lab.leader().expect("a controller leads");
        (leader, self.number_of(&node))
    }

    pub(super) fn number_of(&self, node: &str) -> usize {
        self.lab.nodes.iter().position(|other| other.name == node).unwrap()
    }

    pub(super) fn lease(&self) -> Value {
        self.lab.kubectl().get(&["lease", LEASE, "-n", NAMESPACE]).unwrap()
    }

    pub(super) fn holder(&self) -> String {
        self.lease()["spec"]["holderIdentity"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    pub(super) fn transitions(&self) -> i64 {
        self.lease()["spec"]["leaseTransitions"].as_i64().unwrap_or_default()
    }

    /// The last hand-over since the controllers were replaced, if there was one.
    pub(super) fn hand_over(&self) -> Option<String> {
        let last = self.last_hand_over();
        (last != *self.before.borrow()).then_some(last)
    }

    pub(super) fn was_handed_over(&self, why: &str) {
        let last = self.hand_over().unwrap_or_default();
        assert!(last.contains(why), "{why:?} is not in the hand-over {last:?}");
    }

    pub(super) fn last_hand_over(&self) -> String {
        let note = &self.lease()["metadata"]["annotations"]["hostdir.csi/hand-over"];
        note.as_str().unwrap_or_default().to_owned()
    }

    /// Makes a claim. Returns its name.
    pub(super) fn claim(&self) -> String {
        let number = self.claims.get();
        self.claims.set(number + 1);
        let name = format!("claim-{number}");
        self.lab.apply(&[claim_of(&name, "1Mi", CLASS, "ReadWriteOnce")]);
        name
    }

    pub(super) fn is_bound(&self, claim: &str) -> Result<bool> {
        Ok(self.lab.get("pvc", claim)?["status"]["phase"] == "Bound")
    }

    /// Makes a claim, and checks that it is bound within `seconds` of `since`.
    pub(super) fn binds_within(&self, since: Instant, seconds: u64, of: &str) {
        let claim = self.claim();
        self.lab.wait("a new claim is bound", || self.is_bound(&claim));
        let after = since.elapsed();
        self.note(&format!(
            "a new claim is bound, {:.1} s after {of}; {} leads",
            after.as_secs_f64(),
            self.holder()
        ));
        assert!(
            after < Duration::from_secs(seconds),
            "a new claim was bound {after:?} after {of}, not within {seconds} s"
        );
    }

    /// Runs a shell command for each process of a controller's container: `program` is `hostdir` or `csi-provisioner`, and
    /// `$p` is the process's directory in /proc.
    pub(super) fn for_processes(&self, node: usize, pod: &str, program: &str, command: &str) -> String {
        let script = format!(
            "for p in /proc/[0-9]*; do
                tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx 'HOSTNAME={pod}' || continue
                case \"$(tr '\\0' ' ' < $p/cmdline 2>/dev/null)\" in
                '/{program} '*) {command} ;;
                esac
            done"
        );
        self.lab.nodes[node].sh(&script).unwrap()
    }

    pub(super) fn signal(&self, node: usize, pod: &str, program: &str, signal: &str) {
        self.for_processes(node, pod, program, &format!("kill -{signal} ${{p#/proc/}} || :"));
    }

    pub(super) fn runs(&self, node: usize, pod: &str, program: &str) -> bool {
        !self.for_processes(node, pod, program, "echo yes").is_empty()
    }

    /// Checks that `holder` holds the Lease until `seconds` after `since`.
    pub(super) fn keeps_the_lease(&self, holder: &str, since: Instant, seconds: u64) {
        while since.elapsed() < Duration::from_secs(seconds) {
            assert_eq!(
                self.holder(),
                holder,
                "the holder of the Lease changed after {:?}",
                since.elapsed()
            );
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// The log of a controller's driver, from its node's disk.
    pub(super) fn log_of(&self, node: usize, pod: &str) -> String {
        let script = format!("cat /var/log/pods/{NAMESPACE}_{pod}_*/hostdir/*.log");
        self.lab.nodes[node].sh(&script).unwrap_or_default()
    }

    /// Ends the test: HostVolumes and PersistentVolumes must agree, no volume was made or deleted twice, and deletes leave
    /// nothing.
    pub(super) fn end(self) {
        let lab = &self.lab;
        lab.wait("all claims are bound", || {
            let claims = lab.kubectl().list(&["pvc", "-n", &lab.namespace])?;
            Ok(claims.iter().all(|claim| claim["status"]["phase"] == "Bound"))
        });
        assert_eq!(
            self.recorded(),
            self.bound(),
            "HostVolumes and PersistentVolumes differ"
        );
        let mut logs = self.driver_logs();
        lab.delete_all(PATIENCE);
        lab.nothing_is_left();
        logs.extend(self.driver_logs());
        for (done, words) in [("made", "volume made"), ("deleted", "volume deleted")] {
            let mut times = BTreeMap::<&str, usize>::new();
            for (_, line) in logs.iter().filter(|(_, line)| line.contains(words)) {
                let id = line.split_once("volume.id=").unwrap().1;
                *times.entry(id.split(' ').next().unwrap()).or_default() += 1;
            }
            assert!(!times.is_empty(), "no volume was {done}");
            assert!(
                times.values().all(|times| *times == 1),
                "a volume was {done} twice: {times:?}"
            );
        }
        lab.kubectl().run(&["delete", "storageclass", CLASS]).unwrap();
    }

    /// The log lines of the drivers on all nodes, with the node's name: of all containers of the existing pods. The kubelet
    /// removes the logs of a pod that was replaced.
    pub(super) fn driver_logs(&self) -> BTreeSet<(String, String)> {
        let script = format!("cat /var/log/pods/{NAMESPACE}_hostdir-?????_*/hostdir/*.log 2> /dev/null || :");
        let mut logs = BTreeSet::new();
        for node in &self.lab.nodes {
            let log = node.sh(&script).unwrap();
            logs.extend(log.lines().map(|line| (node.name.clone(), line.to_owned())));
        }
        logs
    }

    /// The node of each volume, from the HostVolumes.
    pub(super) fn recorded(&self) -> BTreeMap<String, String> {
        let volumes = self.lab.kubectl().list(&["hostvolumes"]).unwrap();
        volumes
            .iter()
            .map(|volume| (name_of(volume), volume["spec"]["node"].as_str().unwrap().to_owned()))
            .collect()
    }

    /// The node of each volume, from the PersistentVolumes.
    pub(super) fn bound(&self) -> BTreeMap<String, String> {
        let volumes = self.lab.kubectl().list(&["pv"]).unwrap();
        let node = |volume: &Value| {
            let term = &volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0];
            term["values"][0].as_str().unwrap().to_owned()
        };
        volumes.iter().map(|volume| (name_of(volume), node(volume))).collect()
    }
}

impl Election {
    /// A token of the controllers' service account, bound to a pod if one is named.
    pub(super) fn token(&self, pod: Option<&str>) -> String {
        token(&self.lab, "hostdir-controller", pod)
    }

    pub(super) fn renewed(&self) -> Value {
        self.lease()["spec"]["renewTime"].clone()
    }

    pub(super) fn place_of(&self, pod: &Value) -> (String, usize) {
        let node = pod["spec"]["nodeName"].as_str().unwrap();
        (name_of(pod), self.number_of(node))
    }

    /// Renews a Lease with this holder, authenticated by a token.
    pub(super) fn hold(&self, token: &str, lease: &str, holder: &str) -> kube::Result<()> {
        let writer = Holder::of(token.to_owned());
        let start = Instant::now();
        loop {
            let object = self.lab.kubectl().get(&["lease", lease, "-n", NAMESPACE]).unwrap();
            let mut object: Lease = serde_json::from_value(object).unwrap();
            let spec = object.spec.as_mut().unwrap();
            spec.holder_identity = Some(holder.to_owned());
            spec.renew_time = Some(MicroTime(jiff::Timestamp::now()));
            match writer.put_lease(&object) {
                // The holder has renewed the Lease meanwhile.
                Err(kube::Error::Api(status)) if status.code == 409 && start.elapsed() < PATIENCE => {}
                other => return other,
            }
        }
    }

    /// The output of `hostdir leader` in a controller's container.
    pub(super) fn ask_who_leads(&self, controller: &str) -> Result<String> {
        let args = [
            "exec", "-n", NAMESPACE, controller, "-c", "hostdir", "--", "/hostdir", "leader",
        ];
        self.lab.kubectl().run(&args)
    }

    /// Checks that Events, the log, a metric and `hostdir leader` report the hand-over from a ghost.
    pub(super) fn check_hand_over_is_reported(&self, ghost: &str) {
        let kubectl = self.lab.kubectl();
        for (kind, name) in [("lease", LEASE), ("deployment", "hostdir-controller")] {
            self.lab
                .wait(&format!("an Event on the {kind} reports the hand-over"), || {
                    let text = kubectl.run(&["describe", kind, name, "-n", NAMESPACE])?;
                    Ok(text.contains("LeaderReplaced") && text.contains(ghost))
                });
        }
        let new = self.holder();
        let args = ["logs", "-n", NAMESPACE, &new, "-c", "hostdir"];
        let log = kubectl.run(&args).unwrap();
        assert!(
            log.contains(&format!("{ghost} on node")) && log.contains("must not lead"),
            "{log}"
        );
        let pods = self.lab.controllers();
        let pod = pods
            .iter()
            .find(|pod| name_of(pod) == new)
            .context("the new leader")
            .unwrap();
        let metrics = self.lab.http(pod, "metrics").unwrap();
        assert!(
            metrics.contains("hostdir_hand_overs_total{lease=\"hostdir-csi\",reason="),
            "{metrics}"
        );
        let report = self.ask_who_leads(&new).unwrap();
        assert!(report.contains("last hand-over") && report.contains(ghost), "{report}");
    }
}

pub(super) fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap().to_owned()
}
