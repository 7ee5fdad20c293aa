//! The story that hostdir was made for, re-enacted: leaders that are dead, hung, orphaned, cut off or on a removed node.
//!
//! Each prints its timeline. What is measured begins when the evidence is in the API (or with the fault, where it shows
//! nowhere) and ends when a new claim is bound.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hostdir_lab::cluster::{ControllerManager, NAMESPACE};
use hostdir_lab::prove::target_dir;
use k8s_openapi::api::coordination::v1::Lease;
use serde_json::{Value, json};

use crate::elected::{Holder, token};
use crate::lab::{Lab, Mode, PATIENCE, Thaw, is_ready, lab, report};
use crate::objects::{claim_of, class, on_node, pod};
use hostdir_lab::{SetOnDrop, needs};

const LEASE: &str = "hostdir-csi";
const RESIZER_LEASE: &str = "external-resizer-hostdir-csi";
const POLICY: &str = "hostdir-leases";

/// A test's claims are bound at once: no pod has to be waited for.
const CLASS: &str = "at-once";

/// What is told, and when.
struct Story {
    lab: Lab,
    start: Instant,
    claims: Cell<u32>,
    /// The last hand-over before this chapter.
    before: RefCell<String>,
}

impl Story {
    /// A story that begins with controllers that have seen no hand-over yet, one of which leads, and a volume in use.
    fn begin(name: &str, title: &str) -> Self {
        let lab = lab(Mode::Elected, name, title);
        let mut now = class(Mode::Elected.driver(), CLASS, &json!({}), "Delete", &[]);
        now["volumeBindingMode"] = "Immediate".into();
        lab.apply(&[now]);
        let story = Self {
            lab,
            start: Instant::now(),
            claims: Cell::default(),
            before: RefCell::default(),
        };
        story.renew_controllers();
        let (_, node) = story.leader();
        let other = &story.lab.nodes[(node + 1) % 3].name;
        story
            .lab
            .apply(&[story.lab.claim("live", "10Mi"), on_node(pod("live", "live"), other)]);
        story.lab.running("live");
        story
    }

    /// New controllers, none of which has seen a hand-over, that all run, and a leader among them.
    fn renew_controllers(&self) {
        for _ in 0..5 {
            let before = self.last_hand_over();
            self.replace_controllers();
            // external-provisioner takes part in the election until it is killed when SIGTERM finds it standing by. One of
            // the old may so have taken the Lease with it, and a new one taken that from it.
            let last = self.last_hand_over();
            if last == before {
                self.before.replace(last);
                return;
            }
        }
        panic!(
            "there is a hand-over whenever the controllers are replaced: {}",
            self.last_hand_over()
        );
    }

    fn replace_controllers(&self) {
        let old: BTreeSet<String> = self.lab.controllers().iter().map(name_of).collect();
        let labels = self.lab.controller_labels();
        // It would be killed after 30 s.
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

    fn tell(&self, what: &str) {
        report(&format!("  {:>6.1} s  {what}", self.start.elapsed().as_secs_f64()));
    }

    /// The leader, and its node by number.
    fn leader(&self) -> (String, usize) {
        let (leader, node) = self.lab.leader().expect("somebody leads");
        (leader, self.number_of(&node))
    }

    fn number_of(&self, node: &str) -> usize {
        self.lab.nodes.iter().position(|other| other.name == node).unwrap()
    }

    fn lease(&self) -> Value {
        self.lab.kubectl().get(&["lease", LEASE, "-n", NAMESPACE]).unwrap()
    }

    fn holder(&self) -> String {
        self.lease()["spec"]["holderIdentity"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    fn transitions(&self) -> i64 {
        self.lease()["spec"]["leaseTransitions"].as_i64().unwrap_or_default()
    }

    /// The hand-over since the controllers are what they are, if there was one.
    fn hand_over(&self) -> Option<String> {
        let last = self.last_hand_over();
        (last != *self.before.borrow()).then_some(last)
    }

    fn was_handed_over(&self, why: &str) {
        let last = self.hand_over().unwrap_or_default();
        assert!(last.contains(why), "{why} is not in {last:?}");
    }

    fn last_hand_over(&self) -> String {
        let note = &self.lease()["metadata"]["annotations"]["hostdir.csi/hand-over"];
        note.as_str().unwrap_or_default().to_owned()
    }

    /// Makes a claim.
    fn claim(&self) -> String {
        let number = self.claims.get();
        self.claims.set(number + 1);
        let name = format!("claim-{number}");
        self.lab.apply(&[claim_of(&name, "1Mi", CLASS, "ReadWriteOnce")]);
        name
    }

    fn is_bound(&self, claim: &str) -> Result<bool> {
        Ok(self.lab.get("pvc", claim)?["status"]["phase"] == "Bound")
    }

    /// Makes a claim, and sees it bound within so many seconds of `since`.
    fn binds_within(&self, since: Instant, seconds: u64, of: &str) {
        let claim = self.claim();
        self.lab.wait("a new claim is bound", || self.is_bound(&claim));
        let after = since.elapsed();
        self.tell(&format!(
            "a new claim is bound, {:.1} s after {of}; {} leads",
            after.as_secs_f64(),
            self.holder()
        ));
        assert!(
            after < Duration::from_secs(seconds),
            "bound {after:?} after {of}, and not within {seconds} s"
        );
    }

    /// Runs a shell command for each process of a controller's container (`$p` is its directory in /proc): of `hostdir
    /// controller` or `csi-provisioner`.
    fn for_processes(&self, node: usize, pod: &str, program: &str, command: &str) -> String {
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

    fn signal(&self, node: usize, pod: &str, program: &str, signal: &str) {
        self.for_processes(node, pod, program, &format!("kill -{signal} ${{p#/proc/}} || :"));
    }

    fn runs(&self, node: usize, pod: &str, program: &str) -> bool {
        !self.for_processes(node, pod, program, "echo yes").is_empty()
    }

    /// Sees that nobody else takes the Lease until so many seconds after `since`.
    fn keeps_the_lease(&self, holder: &str, since: Instant, seconds: u64) {
        while since.elapsed() < Duration::from_secs(seconds) {
            assert_eq!(self.holder(), holder, "after {:?}", since.elapsed());
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// What the driver of a controller has logged, from its node's disk.
    fn log_of(&self, node: usize, pod: &str) -> String {
        let script = format!("cat /var/log/pods/{NAMESPACE}_{pod}_*/hostdir/*.log");
        self.lab.nodes[node].sh(&script).unwrap_or_default()
    }

    /// Every volume is in both books alike, no node has deleted one twice, and what is deleted leaves nothing.
    fn end(self) {
        let lab = &self.lab;
        lab.wait("all claims are bound", || {
            let claims = lab.kubectl().list(&["pvc", "-n", &lab.namespace])?;
            Ok(claims.iter().all(|claim| claim["status"]["phase"] == "Bound"))
        });
        assert_eq!(
            self.promised(),
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
            assert!(!times.is_empty(), "none was {done}");
            assert!(times.values().all(|times| *times == 1), "{done} twice: {times:?}");
        }
        lab.kubectl().run(&["delete", "storageclass", CLASS]).unwrap();
    }

    /// The lines that the drivers on nodes have logged, by node: of all containers of pods that are there. The kubelet takes away
    /// the logs of a pod that has been replaced.
    fn driver_logs(&self) -> BTreeSet<(String, String)> {
        let script = format!("cat /var/log/pods/{NAMESPACE}_hostdir-?????_*/hostdir/*.log 2> /dev/null || :");
        let mut logs = BTreeSet::new();
        for node in &self.lab.nodes {
            let log = node.sh(&script).unwrap();
            logs.extend(log.lines().map(|line| (node.name.clone(), line.to_owned())));
        }
        logs
    }

    /// Where each volume is, by the HostVolumes.
    fn promised(&self) -> BTreeMap<String, String> {
        let volumes = self.lab.kubectl().list(&["hostvolumes"]).unwrap();
        volumes
            .iter()
            .map(|volume| (name_of(volume), volume["spec"]["node"].as_str().unwrap().to_owned()))
            .collect()
    }

    /// Where each volume is, by the PersistentVolumes.
    fn bound(&self) -> BTreeMap<String, String> {
        let volumes = self.lab.kubectl().list(&["pv"]).unwrap();
        let node = |volume: &Value| {
            let term = &volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0];
            term["values"][0].as_str().unwrap().to_owned()
        };
        volumes.iter().map(|volume| (name_of(volume), node(volume))).collect()
    }
}

fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap().to_owned()
}

/// A node on which something is wrong, until this is dropped.
struct Haunted<'a> {
    story: &'a Story,
    node: usize,
    kubelet: Cell<bool>,
}

impl<'a> Haunted<'a> {
    fn new(story: &'a Story, node: usize) -> Self {
        let kubelet = true.into();
        Self { story, node, kubelet }
    }

    fn name(&self) -> &str {
        &self.story.lab.nodes[self.node].name
    }

    fn stop_kubelet(&self) {
        self.story.lab.nodes[self.node].kill_kubelet().unwrap();
        self.kubelet.set(false);
        self.story.tell(&format!("the kubelet of {} is dead", self.name()));
    }

    fn delete_node(&self) -> Instant {
        self.story.lab.kubectl().run(&["delete", "node", self.name()]).unwrap();
        self.story.tell(&format!("Node {} is deleted", self.name()));
        Instant::now()
    }

    fn recover(&self) -> Result<()> {
        let lab = &self.story.lab;
        let node = &lab.nodes[self.node];
        node.sh("for p in /proc/[0-9]*; do kill -CONT ${p#/proc/} 2>/dev/null || :; done")?;
        if !self.kubelet.get() {
            node.start_kubelet()?;
        }
        lab.wait_ready(3)?;
        lab.kubectl().wait(PATIENCE, "both drivers are registered", || {
            let drivers = lab.kubectl().get(&["csinode", self.name()])?["spec"]["drivers"].clone();
            Ok(drivers.as_array().is_some_and(|drivers| drivers.len() == 2))
        })
    }
}

impl Drop for Haunted<'_> {
    fn drop(&mut self) {
        let recovered = self.recover();
        if !std::thread::panicking() {
            recovered.expect("the node recovers");
        }
    }
}

/// A controller that a machine runs outside of Kubernetes, under the name of a pod and with a token: the ghost itself. Its
/// driver does not look after itself, as those before hostdir did not; its sidecar is started again whenever it ends, until
/// this is dropped.
struct Ghost<'a> {
    story: &'a Story,
    node: usize,
}

impl<'a> Ghost<'a> {
    const DIR: &'static str = "/run/ghost";

    /// In place of a pod's own sidecar, which is killed: one of the same name goes on at once.
    fn rise(story: &'a Story, node: usize, pod: &str, token: &str) -> Self {
        let ghost = Self { story, node };
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "https://10.42.0.1:443", "insecure-skip-tls-verify": true}}],
            "users": [{"name": "c", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        let provisioner = target_dir().join("lab/bin/csi-provisioner");
        let hostdir = hostdir_lab::harness::hostdir();
        let script = format!(
            "mkdir -p {dir}; echo '{config}' > {dir}/kubeconfig; : > {dir}/starts
             exec 0<&- >{dir}/log 2>&1
             setsid unshare --uts sh -c 'hostname {pod}; echo $$ > {dir}/pid
                export KUBECONFIG={dir}/kubeconfig
                {hostdir} controller --endpoint unix://{dir}/csi.sock & echo $! > {dir}/driver
                while :; do
                    echo start >> {dir}/starts
                    {provisioner} --kubeconfig=$KUBECONFIG --csi-address={dir}/csi.sock \\
                        --leader-election --leader-election-namespace={NAMESPACE} --leader-election-lease-duration=10s \\
                        --leader-election-renew-deadline=9s --leader-election-retry-period=2s --strict-topology \\
                        --immediate-topology=false --extra-create-metadata --timeout=10s
                    sleep 1
                done' &",
            dir = Self::DIR,
            provisioner = provisioner.display(),
            hostdir = hostdir.display(),
        );
        story.signal(node, pod, "csi-provisioner", "KILL");
        let renewed = story.renewed();
        ghost.sh(&script);
        story.lab.wait("the ghost renews", || {
            ensure!(story.holder() == pod && story.renewed() != renewed, "{}", ghost.log());
            Ok(true)
        });
        ghost
    }

    fn hang_driver(&self) {
        self.sh(&format!("kill -STOP $(cat {}/driver)", Self::DIR));
    }

    fn sh(&self, script: &str) -> String {
        self.story.lab.nodes[self.node].sh(script).unwrap()
    }

    /// How often it has risen.
    fn risings(&self) -> usize {
        self.sh(&format!("cat {}/starts", Self::DIR)).lines().count()
    }

    fn log(&self) -> String {
        self.sh(&format!("tail -n 20 {}/log", Self::DIR))
    }
}

impl Drop for Ghost<'_> {
    fn drop(&mut self) {
        // The session is that of the shell.
        let script = format!("kill -9 -- -$(cat {0}/pid); rm -rf {0}", Self::DIR);
        let _ = self.story.lab.nodes[self.node].sh(&script);
    }
}

/// A node is removed the wrong way: its kubelet is dead, its Node deleted, its containers live on.
#[needs(Root, Go, Cluster)]
fn ghost_1_a_removed_node_whose_containers_live_on() {
    let story = Story::begin("ghost-1", "ghost 1. the story itself: a removed node");
    let (ghost, node) = story.leader();
    story.tell(&format!("{ghost} leads"));
    {
        let haunted = Haunted::new(&story, node);
        haunted.stop_kubelet();
        let deleted = haunted.delete_node();
        story.lab.wait(
            "the ghost has ended itself",
            || Ok(!story.runs(node, &ghost, "hostdir")),
        );
        let socket = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/socket/csi.sock";
        let sockets = story.lab.nodes[node]
            .sh(&format!("ls {socket} 2>/dev/null || :"))
            .unwrap();
        assert_eq!(sockets, "", "its socket is there");
        story.tell("the ghost's driver has ended itself, and closed its socket");
        story.binds_within(deleted, 30, "the Node was deleted");
        assert_ne!(story.holder(), ghost);
        let log = story.log_of(node, &ghost);
        assert!(
            log.contains("this controller is a ghost") && log.contains("does not exist any more"),
            "{log}"
        );
        let gone = || story.lab.kubectl().is_gone(&["pod", &ghost, "-n", NAMESPACE]);
        story.lab.wait("its Pod is gone", gone);
        story.tell("the ghost's Pod object is gone");
        story.binds_within(Instant::now(), 15, "its Pod's end");
        assert_ne!(story.holder(), ghost);
    }
    story.end();
}

/// The worst of all: its driver hangs, so that it cannot end itself, its token is bound to no Pod and never expires, and no
/// policy keeps it from renewing.
#[needs(Root, Go, Cluster)]
fn ghost_1_the_worst_of_all() {
    let story = Story::begin("ghost-worst", "ghost 1. again, with an unbound token and no policy");
    let kubectl = story.lab.kubectl();
    let (name, node) = story.leader();
    let lawless = Lawless::begin(&story);
    let token = story.token(None);
    {
        let haunted = Haunted::new(&story, node);
        haunted.stop_kubelet();
        let ghost = Ghost::rise(&story, node, &name, &token);
        story.signal(node, &name, "hostdir", "STOP");
        ghost.hang_driver();
        assert_eq!(story.holder(), name);
        story.tell("its driver hangs; its sidecar renews with a token that is bound to no Pod");
        haunted.delete_node();
        let args = ["delete", "pod", &name, "-n", NAMESPACE, "--force", "--grace-period=0"];
        kubectl.run(&args).unwrap();
        story.tell("its Pod object is gone");
        story.binds_within(Instant::now(), 15, "its Pod's end");
        story.was_handed_over(&name);
        let new = story.holder();
        story
            .lab
            .wait("the ghost has lost and begins anew", || Ok(ghost.risings() > 1));
        story.tell("the ghost's sidecar has ended, and was started again");
        assert_eq!(story.holder(), new);
        story.says_who_led(&name);
    }
    drop(lawless);
    story.end();
}

/// A cluster whose admission policy for Leases binds nobody, until this is dropped.
struct Lawless<'a> {
    story: &'a Story,
    binding: Value,
}

impl<'a> Lawless<'a> {
    const KIND: &'static str = "validatingadmissionpolicybinding";

    fn begin(story: &'a Story) -> Self {
        let kubectl = story.lab.kubectl();
        let mut binding = kubectl.get(&[Self::KIND, POLICY]).unwrap();
        binding["metadata"]
            .as_object_mut()
            .unwrap()
            .retain(|key, _| ["name", "labels", "annotations"].contains(&key.as_str()));
        kubectl.run(&["delete", Self::KIND, POLICY]).unwrap();
        Self { story, binding }
    }
}

impl Drop for Lawless<'_> {
    fn drop(&mut self) {
        let _ = self.story.lab.kubectl().apply(&self.binding.to_string());
    }
}

/// A controller manager that calls a Node not Ready after 20 s of a silent kubelet instead of 50 s, until this is dropped.
struct SoonerNotReady<'a>(&'a Lab);

impl<'a> SoonerNotReady<'a> {
    fn begin(lab: &'a Lab) -> Self {
        let sooner = ControllerManager {
            node_grace: 20,
            ..ControllerManager::default()
        };
        lab.restart_controller_manager(sooner).unwrap();
        Self(lab)
    }
}

impl Drop for SoonerNotReady<'_> {
    fn drop(&mut self) {
        let _ = self.0.restart_controller_manager(ControllerManager::default());
    }
}

/// The kubelet is dead, the Node stays, and the leader works: that is no reason to do anything soon.
#[needs(Root, Go, Cluster)]
fn ghost_2_a_node_without_its_kubelet() {
    let story = Story::begin("ghost-2", "ghost 2. a dead kubelet, and a leader that works");
    let (leader, node) = story.leader();
    let transitions = story.transitions();
    {
        let _sooner = SoonerNotReady::begin(&story.lab);
        let haunted = Haunted::new(&story, node);
        haunted.stop_kubelet();
        story.lab.wait("the Node is not ready", || {
            Ok(!is_ready(&story.lab.kubectl().get(&["node", haunted.name()])?))
        });
        let noticed = Instant::now();
        story.tell("the Node is not Ready any more");
        story.keeps_the_lease(&leader, noticed, 55);
        story.binds_within(Instant::now(), 15, "a claim was made of the leader that works");
        story.lab.wait("another leads", || Ok(story.holder() != leader));
        let after = noticed.elapsed();
        story.tell(&format!(
            "another leads, {:.1} s after the Node was not Ready",
            after.as_secs_f64()
        ));
        assert!(
            after > Duration::from_secs(57) && after < Duration::from_secs(75),
            "{after:?}"
        );
        story.was_handed_over("is not Ready, for 6");
        story.binds_within(Instant::now(), 15, "the hand-over");
    }
    assert_eq!(story.transitions(), transitions + 1, "one hand-over, and one only");
    story.end();
}

/// One part of the leader hangs or dies, with everything around it well.
#[needs(Root, Go, Cluster)]
fn ghost_3_a_leader_of_which_a_part_is_dead() {
    let story = Story::begin("ghost-3", "ghost 3. driver hung, driver dead, sidecar hung");
    let (leader, node) = story.leader();
    {
        let _haunted = Haunted::new(&story, node);
        story.signal(node, &leader, "hostdir", "STOP");
        story.tell("the leader's driver hangs, its sidecar renews");
        story.binds_within(Instant::now(), 40, "the driver hung");
        assert_ne!(story.holder(), leader);
        story.was_handed_over("gives no heartbeat");
    }
    story.renew_controllers();
    let (leader, node) = story.leader();
    {
        let haunted = Haunted::new(&story, node);
        haunted.stop_kubelet();
        story.signal(node, &leader, "hostdir", "KILL");
        story.tell("the leader's driver is dead, and nobody starts it again");
        story.binds_within(Instant::now(), 40, "the driver died");
        assert_ne!(story.holder(), leader);
    }
    story.renew_controllers();
    let (leader, node) = story.leader();
    {
        let _haunted = Haunted::new(&story, node);
        story.signal(node, &leader, "csi-provisioner", "STOP");
        story.tell("the leader's sidecar hangs");
        // 10 s, counted from a look up to 4.4 s after the last renewal, and up to 4.4 s until the next look.
        story.binds_within(Instant::now(), 25, "the sidecar hung");
        assert_ne!(story.holder(), leader);
        assert_eq!(story.hand_over(), None, "it expires, and nobody hurries it");
    }
    story.end();
}

#[needs(Root, Go, Cluster)]
fn ghost_4_a_leader_that_is_cut_off_and_comes_back() {
    let story = Story::begin("ghost-4", "ghost 4. the network of the leader's node is cut");
    let (leader, node) = story.leader();
    story.lab.apply(&twenty("before"));
    story.lab.apply(&["before-0", "before-19"].map(|name| pod(name, name)));
    story.lab.cut_network(node, true).unwrap();
    let cut = CutOff { story: &story, node };
    story.tell("the leader's node has no network, and the leader its hands full");
    story.lab.apply(&twenty("meanwhile"));
    story
        .lab
        .apply(&["meanwhile-0", "meanwhile-19"].map(|name| pod(name, name)));
    story.binds_within(Instant::now(), 25, "the network was cut");
    let new = story.holder();
    assert_ne!(new, leader);
    drop(cut);
    story.tell("the network is back");
    story.keeps_the_lease(&new, Instant::now(), 20);
    story.binds_within(Instant::now(), 15, "a claim was made after it came back");
    for name in ["before-0", "before-19", "meanwhile-0", "meanwhile-19"] {
        story.lab.running(name);
    }
    story.end();
}

fn twenty(name: &str) -> Vec<Value> {
    let names = (0..20).map(|number| format!("{name}-{number}"));
    names
        .map(|name| claim_of(&name, "1Mi", CLASS, "ReadWriteOnce"))
        .collect()
}

struct CutOff<'a> {
    story: &'a Story,
    node: usize,
}

impl Drop for CutOff<'_> {
    fn drop(&mut self) {
        let _ = self.story.lab.cut_network(self.node, false);
    }
}

/// Both processes of the leader stand still in the middle of their work, and then go on as if nothing had been.
#[needs(Root, Go, Cluster)]
fn ghost_5_a_leader_that_is_paused_in_the_middle_of_its_work() {
    let story = Story::begin("ghost-5", "ghost 5. a pause of 40 s in the middle of 50 creates");
    let (leader, node) = story.leader();
    let before = story.promised().len();
    {
        let _haunted = Haunted::new(&story, node);
        let claims: Vec<Value> = (0..50)
            .map(|number| claim_of(&format!("paused-{number}"), "1Mi", CLASS, "ReadWriteOnce"))
            .collect();
        let used = ["paused-0", "paused-1", "paused-25", "paused-49"];
        std::thread::scope(|scope| {
            let lab = &story.lab;
            scope.spawn(|| {
                lab.apply(&claims);
                lab.apply(&used.map(|name| pod(name, name)));
            });
            lab.wait("some of fifty are made", || Ok(story.promised().len() > before + 3));
            for program in ["hostdir", "csi-provisioner"] {
                story.signal(node, &leader, program, "STOP");
            }
        });
        let paused = Instant::now();
        let made = story.promised().len() - before;
        story.tell(&format!("the leader stands still; {made} volumes are made"));
        assert!(made < 50, "too late");
        story.lab.wait("another leads", || Ok(story.holder() != leader));
        story.tell("another leads");
        for name in used {
            story.lab.running(name);
        }
        // Of what is deleted now the old leader still thinks that it is there, or to be made.
        story.lab.delete("pod", "paused-0");
        for name in ["paused-0", "paused-2", "paused-48"] {
            story.lab.delete("pvc", name);
        }
        std::thread::sleep(Duration::from_secs(40).saturating_sub(paused.elapsed()));
        for program in ["hostdir", "csi-provisioner"] {
            story.signal(node, &leader, program, "CONT");
        }
        story.tell("the old leader goes on");
    }
    story
        .lab
        .wait("47 of fifty are left", || Ok(story.bound().len() == before + 47));
    story.binds_within(Instant::now(), 15, "a claim was made after that");
    assert_eq!(story.promised().len(), before + 48, "as many as were asked for");
    story.end();
}

#[needs(Root, Go, Cluster)]
fn ghost_6_the_node_is_made_again_under_the_same_name() {
    let story = Story::begin("ghost-6", "ghost 6. Node deleted and made again, the ghost lives");
    let (ghost, node) = story.leader();
    {
        let haunted = Haunted::new(&story, node);
        haunted.stop_kubelet();
        // It cannot see that its Node is another: its driver hangs, and its sidecar renews.
        story.signal(node, &ghost, "hostdir", "STOP");
        haunted.delete_node();
        let anew = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": haunted.name()}});
        story.lab.kubectl().apply(&anew.to_string()).unwrap();
        story.tell("a Node of the same name is made");
        story.binds_within(Instant::now(), 40, "the new Node");
        assert_ne!(story.holder(), ghost);
        // And it stays so when the ghost is heard of again.
        story.signal(node, &ghost, "hostdir", "CONT");
        let new = story.holder();
        story.keeps_the_lease(&new, Instant::now(), 15);
    }
    story.end();
}

#[needs(Root, Go, Cluster)]
fn ghost_7_nobody_is_fit_and_then_one_is() {
    let story = Story::begin("ghost-7", "ghost 7. all controllers hang, then one recovers");
    let (leader, at) = story.leader();
    let transitions = story.transitions();
    let places: Vec<_> = story.lab.controllers().iter().map(|pod| story.place_of(pod)).collect();
    let (other, beside) = places.iter().find(|(name, _)| *name != leader).unwrap();
    {
        let _haunted = [Haunted::new(&story, at), Haunted::new(&story, *beside)];
        story.signal(at, &leader, "hostdir", "STOP");
        story.signal(*beside, other, "csi-provisioner", "STOP");
        story.tell("the leader's driver hangs; the other controller's sidecar does, its driver looks on");
        story.keeps_the_lease(&leader, Instant::now(), 35);
        let report = format!("{:#}", story.ask_who_leads(other).unwrap_err());
        assert!(report.contains("it must not lead"), "{report}");
        story.signal(*beside, other, "hostdir", "STOP");
        story.tell("the other's driver hangs, too");
        story.keeps_the_lease(&leader, Instant::now(), 6);
        assert_eq!(story.transitions(), transitions);
        for program in ["hostdir", "csi-provisioner"] {
            story.signal(*beside, other, program, "CONT");
        }
        story.tell("the other recovers");
        story.binds_within(Instant::now(), 15, "it recovered");
        assert_eq!((&story.holder(), story.transitions()), (other, transitions + 1));
    }
    story.end();
}

/// How often the API server is frozen: more often at night.
fn frosts() -> usize {
    if std::env::var_os("HOSTDIR_NIGHT").is_some() {
        10
    } else {
        5
    }
}

#[needs(Root, Go, Cluster)]
fn ghost_8_a_leader_that_is_well_is_left_alone() {
    let story = Story::begin(
        "ghost-8",
        "ghost 8. API server slow, and frozen again and again for 8 s",
    );
    // A sidecar ends after nine seconds without an answer: a machine that stalls for that long is no news of ours.
    let left_alone = (0..3).any(|_| story.is_left_alone_in_frost());
    assert!(
        left_alone,
        "this machine stalls too long to tell whether a leader is left alone"
    );
    story.end();
}

impl Story {
    /// Freezes the API server, and slows it down. Nothing can be told (false) if this machine froze it for longer than that.
    fn is_left_alone_in_frost(&self) -> bool {
        let (leader, _) = self.leader();
        let transitions = self.transitions();
        let _thaw = Thaw(&self.lab);
        let mut longest = Duration::ZERO;
        for _ in 0..frosts() {
            let claim = self.claim();
            longest = longest.max(self.freeze(8.0, 5.0));
            self.lab
                .wait("a claim is bound between two frosts", || self.is_bound(&claim));
        }
        self.tell(&format!(
            "frozen again and again, for {:.1} s at most",
            longest.as_secs_f64()
        ));
        // Two seconds for whatever is asked.
        let claim = self.claim();
        for _ in 0..6 {
            longest = longest.max(self.freeze(1.7, 0.3));
        }
        self.tell("slow for 12 s");
        self.lab.wait("a claim is bound", || self.is_bound(&claim));
        assert_eq!(self.hand_over(), None, "somebody was deposed");
        if longest >= Duration::from_millis(8800) {
            self.tell("this machine froze it for too long: once more");
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

/// Two processes under one name, one of which outlives the Pod with the Pod's token, and rises whenever it ends.
#[needs(Root, Go, Cluster)]
fn ghost_9_a_ghost_that_rises_again_and_again() {
    let story = Story::begin("ghost-9", "ghost 9. a ghost in a loop, with its old token");
    let kubectl = story.lab.kubectl();
    story.lab.join_network().unwrap();
    let (name, node) = story.leader();
    let token = story.token(Some(&name));
    {
        let haunted = Haunted::new(&story, node);
        haunted.stop_kubelet();
        let ghost = Ghost::rise(&story, node, &name, &token);
        let args = ["delete", "pod", &name, "-n", NAMESPACE, "--force", "--grace-period=0"];
        kubectl.run(&args).unwrap();
        let gone = Instant::now();
        story.tell("its Pod is deleted; the ghost has its token, and rises whenever it ends");
        story.lab.wait("another leads", || Ok(story.holder() != name));
        story.binds_within(gone, 15, "its Pod's end");
        let new = story.holder();
        // The API server takes a token for ten seconds longer than it should.
        story.keeps_the_lease(&new, gone, 15);
        while gone.elapsed() < Duration::from_secs(45) {
            assert_eq!(story.holder(), new, "the ghost leads");
            let error = story
                .hold(&token, LEASE, &name)
                .expect_err("with a dead token")
                .to_string();
            assert!(error.contains("nauthorized"), "{error}");
            std::thread::sleep(Duration::from_millis(500));
        }
        story.binds_within(Instant::now(), 15, "a claim was made");
        story.tell(&format!("it has risen {} times, and never led", ghost.risings()));
        assert!(ghost.risings() > 1);
    }
    story.end();
}

/// What the chart can be updated by without anybody noticing.
#[needs(Root, Go, Cluster)]
fn ghost_10_a_rolling_update_under_load() {
    let story = Story::begin("ghost-10", "ghost 10. a rolling update of the controllers under load");
    let (leader, _) = story.leader();
    let kubectl = story.lab.kubectl();
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
            let (claim, made) = (story.claim(), Instant::now());
            story.lab.wait("a claim is bound", || story.is_bound(&claim));
            waits.push(made.elapsed());
        }
        update.join().unwrap();
    });
    let longest = waits.iter().max().expect("there were claims");
    story.tell(&format!(
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
    if let Some(note) = story.hand_over() {
        story.tell(&format!("one that was killed as the leader was deposed: {note}"));
        let from = format!("from {leader} ");
        assert!(
            !note.contains(&from),
            "the leader has not let go of the Lease when it was told to end"
        );
    }
    story.end();
}

/// Who may write the Leases: a token that is bound to a living Pod, in that Pod's name.
#[needs(Root, Go, Cluster)]
fn nobody_holds_a_lease_in_anothers_name() {
    let story = Story::begin("ghost-policy", "who may write the Leases, and who says who leads");
    story.lab.join_network().unwrap();
    let (leader, _) = story.leader();
    let other = story
        .lab
        .controllers()
        .iter()
        .map(name_of)
        .find(|name| *name != leader)
        .unwrap();
    let hold = |token: &str, lease: &str, holder: &str| story.hold(token, lease, holder);
    let (unbound, bound) = (story.token(None), story.token(Some(&other)));
    for (what, refused) in [
        ("without a pod", hold(&unbound, LEASE, &other)),
        ("in the leader's name", hold(&bound, LEASE, &leader)),
        ("empty, of another", hold(&bound, LEASE, "")),
        ("another's heartbeat", hold(&bound, &leader, &other)),
        ("a heartbeat without a pod", hold(&unbound, &other, &other)),
    ] {
        let error = refused.expect_err(what).to_string();
        assert!(error.contains(POLICY), "{what}: {error}");
    }
    // An administrator cannot either, by a slip; but can delete it.
    let patch = r#"{"spec":{"holderIdentity":"me"}}"#;
    let slip = story
        .lab
        .kubectl()
        .run(&["patch", "lease", LEASE, "-n", NAMESPACE, "--type=merge", "-p", patch]);
    assert!(format!("{:#}", slip.unwrap_err()).contains("only a controller of hostdir"));
    hold(&bound, &other, &other).expect("its own heartbeat");

    // Each Lease has its own leader, and who leads by one stands by for the other.
    hold(&bound, RESIZER_LEASE, &other).expect("another Lease, in its own name");
    let report = story.ask_who_leads(&leader).unwrap();
    let of_resizer = report.find(RESIZER_LEASE).expect("both Leases");
    let blocks = [
        (&report[..of_resizer], &leader, &other),
        (&report[of_resizer..], &other, &leader),
    ];
    for (block, holder, idle) in blocks {
        for line in [
            &format!("holder           {holder}"),
            "verdict          it leads",
            &format!("stands by        {idle}"),
        ] {
            assert!(block.contains(line), "{line:?} is not in\n{block}\nof\n{report}");
        }
    }
    let metrics = story.lab.http(&story.lab.controllers()[0], "metrics").unwrap();
    let line = format!("hostdir_leader{{lease=\"{LEASE}\",holder=\"{leader}\"}} 1");
    assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    story.end();
}

impl Story {
    /// A token of the controllers' service account, bound to a pod if one is named.
    fn token(&self, pod: Option<&str>) -> String {
        token(&self.lab, "hostdir-controller", pod)
    }

    fn renewed(&self) -> Value {
        self.lease()["spec"]["renewTime"].clone()
    }

    fn place_of(&self, pod: &Value) -> (String, usize) {
        let node = pod["spec"]["nodeName"].as_str().unwrap();
        (name_of(pod), self.number_of(node))
    }

    /// Writes a holder into a Lease, with a token.
    fn hold(&self, token: &str, lease: &str, holder: &str) -> kube::Result<()> {
        let writer = Holder::of(token.to_owned());
        let start = Instant::now();
        loop {
            let object = self.lab.kubectl().get(&["lease", lease, "-n", NAMESPACE]).unwrap();
            let mut object: Lease = serde_json::from_value(object).unwrap();
            object.spec.as_mut().unwrap().holder_identity = Some(holder.to_owned());
            match writer.put_lease(&object) {
                // Its holder has renewed meanwhile.
                Err(kube::Error::Api(status)) if status.code == 409 && start.elapsed() < PATIENCE => {}
                other => return other,
            }
        }
    }

    /// What `hostdir leader` prints in a controller's container.
    fn ask_who_leads(&self, controller: &str) -> Result<String> {
        let args = [
            "exec", "-n", NAMESPACE, controller, "-c", "hostdir", "--", "/hostdir", "leader",
        ];
        self.lab.kubectl().run(&args)
    }

    /// People are told that a ghost led, who has it now, and why: by Events, the log and a metric.
    fn says_who_led(&self, ghost: &str) {
        let kubectl = self.lab.kubectl();
        for (kind, name) in [("lease", LEASE), ("deployment", "hostdir-controller")] {
            self.lab.wait(&format!("an Event is on the {kind}"), || {
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
