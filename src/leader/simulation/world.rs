//! The simulated world: machines, Pods, sidecars, drivers, and an API server.

use crate::leader::*;
use fastrand::Rng;
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::process::{Health, Process};

/// The elections: every Pod has a sidecar for each.
pub(super) const LEASES: [&str; 2] = ["hostdir-csi", "external-resizer-hostdir-csi"];
pub(super) const STEP: f64 = 0.2;
/// Lease duration, renew deadline and retry period, as the chart sets them.
pub(super) const TERM: f64 = 10.0;
pub(super) const DEADLINE: f64 = 9.0;
pub(super) const RETRY: f64 = 2.0;
/// A holder that has been fit for this long must not be deposed.
const SETTLED: f64 = 30.0;

#[derive(Debug)]
pub(super) struct Machine {
    /// When its kubelet is alive again; a time in the past if it is alive now.
    pub(super) kubelet: f64,
    /// When its Node is registered again.
    pub(super) registered: f64,
    /// When `ready` was last right: the API server notices a dead kubelet after 50 s.
    seen: f64,
    ready: bool,
    /// Until then it has no network.
    pub(super) cut_off: f64,
}

impl Machine {
    pub(super) fn new() -> Self {
        Self {
            kubelet: 0.0,
            registered: 0.0,
            seen: 0.0,
            ready: true,
            cut_off: 0.0,
        }
    }
}

/// An election, as the API server has it.
pub(super) struct Held {
    pub(super) election: Election,
    pub(super) renewals: u64,
    pub(super) hand_overs: Vec<f64>,
    /// When something was last finished.
    pub(super) worked: f64,
    /// Since when some controller is fit but no fit one leads.
    pub(super) missed: Option<f64>,
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) now: f64,
    pub(super) seed: u64,
    pub(super) machines: Vec<Machine>,
    pub(super) processes: Vec<Process>,
    pub(super) wanted: usize,
    names: u64,
    pub(super) leases: [Held; 2],
    pub(super) beats: BTreeMap<String, Heartbeat>,
    /// Until `frozen` the API server answers nobody, and until `slow` it answers slowly.
    pub(super) frozen: f64,
    pub(super) slow: f64,
    /// Until then it refuses what hostdir writes to Leases.
    pub(super) refusing: f64,
    /// Until then some answers to what hostdir writes are lost.
    pub(super) lossy: f64,
    /// Until then no sidecar can do its work.
    pub(super) useless: f64,
    /// When a sidecar was last stuck.
    pub(super) stuck: f64,
    /// The views at earlier steps while the API server is slow, latest last.
    pub(super) past: Vec<View>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let count = rng.usize(2..=5);
        let held = || Held {
            election: Election {
                holder: String::new(),
                term: 10,
                acquired: Timestamp::UNIX_EPOCH,
                renewal: Timestamp::UNIX_EPOCH,
                handed_over: None,
            },
            renewals: 0,
            hand_overs: Vec::new(),
            worked: 0.0,
            missed: None,
        };
        let mut world = Self {
            now: 0.0,
            seed,
            machines: (0..count).map(|_| Machine::new()).collect(),
            processes: Vec::new(),
            wanted: rng.usize(1..=count),
            names: 0,
            leases: [held(), held()],
            beats: BTreeMap::new(),
            frozen: 0.0,
            slow: 0.0,
            refusing: f64::NEG_INFINITY,
            lossy: 0.0,
            useless: 0.0,
            stuck: f64::NEG_INFINITY,
            past: Vec::new(),
            rng,
        };
        world.replace_pods();
        world
    }

    pub(super) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + self.rng.f64() * (high - low)
    }

    /// Whether a process reaches the API server at this moment.
    pub(super) fn reaches(&self, process: usize) -> bool {
        self.now >= self.frozen && self.now >= self.machines[self.processes[process].machine].cut_off
    }

    /// What a process sees. A later one of `past` is used if it reads an old copy.
    pub(super) fn view(&self, process: usize, past: Option<usize>) -> View {
        let process = &self.processes[process];
        let gone = self.machines[process.machine].registered > self.now;
        View {
            own: Own {
                uid: process.exists.then(|| process.name.clone()),
                node_gone: gone.then(|| process.machine.to_string()),
            },
            ..past.map_or_else(|| self.shared_view(), |index| self.past[index].clone())
        }
    }

    fn shared_view(&self) -> View {
        let elections = LEASES.iter().zip(&self.leases);
        let elections = elections.map(|(lease, held)| ((*lease).to_owned(), held.election.clone()));
        View {
            elections: elections.collect(),
            heartbeats: self.beats.clone(),
            own: Own::default(),
        }
    }

    pub(super) fn hold(&mut self, lease: usize, name: &str) {
        let held = &mut self.leases[lease];
        let is_new = held.election.holder != name;
        name.clone_into(&mut held.election.holder);
        if let Some(process) = self.processes.iter().find(|process| process.name == name) {
            held.election.renewal = process.clock(self.now);
            if is_new {
                held.election.acquired = held.election.renewal;
            }
        }
        held.renewals += 1;
    }

    /// Creates missing Pods, as the Deployment does, on machines with a live kubelet.
    fn replace_pods(&mut self) {
        let stays = |process: &&mut Process| process.exists && process.ending.is_none();
        let there = self.processes.iter_mut().filter(|process| stays(process)).count();
        // Scaled down: the Deployment deletes Pods.
        let too_many = self.processes.iter_mut().filter(stays);
        for process in too_many.take(there.saturating_sub(self.wanted)) {
            process.ending = Some(self.now);
        }
        for _ in there..self.wanted {
            let usable = |number: &usize| {
                let machine = &self.machines[*number];
                machine.ready && machine.kubelet <= self.now && machine.registered <= self.now
            };
            let taken = |number: &usize| self.processes.iter().any(|one| one.exists && one.machine == *number);
            let (others, free): (Vec<_>, Vec<_>) = (0..self.machines.len()).filter(usable).partition(taken);
            // As the chart asks: not two on one node, if possible.
            let choice = self.rng.choice(if free.is_empty() { others } else { free });
            let Some(machine) = choice else { return };
            self.names += 1;
            // Names are not sorted by age.
            let name = format!("{:02}-{}", self.rng.u8(..), self.names);
            // An image may have to be pulled.
            let most = if self.now > 0.0 && self.rng.u8(0..4) == 0 {
                60.0
            } else {
                4.0
            };
            let start = self.now + self.between(1.0, most);
            let (rate, ahead) = (self.between(0.9, 1.1), self.between(0.0, 1000.0));
            self.processes.push(Process::new(name, machine, start, rate, ahead));
        }
    }

    pub(super) fn step(&mut self) {
        self.now += STEP;
        self.tend_machines();
        self.replace_pods();
        for process in 0..self.processes.len() {
            self.tend_pod(process);
            for lease in 0..LEASES.len() {
                self.run_sidecar(process, lease);
            }
            self.run_driver(process);
        }
        // Dead processes without a Pod go, and so do the heartbeat Leases of deleted Pods.
        self.processes.retain(|process| process.exists || !process.is_dead());
        let exists = |name: &String| self.processes.iter().any(|one| one.name == *name && one.exists);
        self.beats.retain(|name, _| exists(name));
        if self.now < self.slow {
            self.past.push(self.shared_view());
            if self.past.len() > 10 {
                self.past.remove(0);
            }
        } else {
            self.past.clear();
        }
        self.check();
    }

    fn tend_machines(&mut self) {
        for machine in &mut self.machines {
            let well = machine.kubelet <= self.now && machine.registered <= self.now && machine.cut_off <= self.now;
            if well == machine.ready {
                machine.seen = self.now;
            } else if self.now - machine.seen > if well { 5.0 } else { 50.0 } {
                machine.ready = well;
            }
        }
    }

    /// What the kubelet, the garbage collector and the eviction manager do.
    fn tend_pod(&mut self, number: usize) {
        let delay = self.between(40.0, 60.0);
        // How long a sidecar that is told to stop goes on renewing, because its workers are busy.
        let busy = self.between(0.0, 30.0);
        let now = self.now;
        let process = &mut self.processes[number];
        let machine = &self.machines[process.machine];
        if machine.registered > now {
            let at = *process.collected.get_or_insert(now + delay);
            process.exists &= now < at;
        } else {
            process.collected = None;
        }
        if machine.kubelet > now {
            return;
        }
        if !process.exists || process.ending.is_some() {
            // The kubelet stops the containers of deleted Pods: the driver ends, and so do sidecars when their work is done.
            process.driver = Health::Dead(f64::INFINITY);
            let told = *process.told.get_or_insert(now + busy);
            if now >= told {
                self.stop_sidecars(number);
            }
            return;
        }
        if matches!(process.driver, Health::Dead(until) if until <= now) {
            process.driver = Health::Well;
        }
        for sidecar in &mut process.sidecars {
            if matches!(sidecar.health, Health::Dead(until) if until <= now) {
                sidecar.restart();
            }
        }
    }

    /// A healthy sidecar releases its Lease when it stops.
    fn stop_sidecars(&mut self, number: usize) {
        let reaches = self.reaches(number);
        let process = &mut self.processes[number];
        process.exists = false;
        let name = process.name.clone();
        for lease in 0..LEASES.len() {
            let sidecar = &mut self.processes[number].sidecars[lease];
            let releases = sidecar.leads && sidecar.health == Health::Well && reaches;
            sidecar.health = Health::Dead(f64::INFINITY);
            if releases && self.leases[lease].election.holder == name {
                self.hold(lease, "");
            }
        }
    }

    pub(super) fn hand_over(&mut self, due: &TakeOver, name: &str) {
        let (now, seed) = (self.now, self.seed);
        let lease = LEASES
            .iter()
            .position(|lease| *lease == due.lease)
            .expect("a known Lease");
        let deposed = self.processes.iter().find(|process| process.name == due.holder);
        let settled = deposed
            .and_then(|process| process.sidecars[lease].fit)
            .is_some_and(|since| now - since > SETTLED);
        assert!(
            !settled || self.refusing_lately(),
            "seed {seed}, {now:.1} s: {name} deposes a holder that was fit: {due:?}"
        );
        self.hold(lease, name);
        let held = &mut self.leases[lease];
        held.election.handed_over = Some(due.note(Timestamp::UNIX_EPOCH + Duration::from_secs_f64(now), name));
        held.hand_overs.push(now);
        assert!(
            held.recent(now) <= 8,
            "seed {seed}, {now:.1} s: a storm of hand-overs at {:?}",
            held.hand_overs
        );
    }

    /// Whether hostdir could not write its heartbeats a moment ago.
    fn refusing_lately(&self) -> bool {
        self.now - self.refusing < SETTLED
    }
}

impl Held {
    /// What waits: a claim comes every five seconds, and whoever works finishes all of them.
    pub(super) fn waiting(&self, now: f64) -> BTreeSet<String> {
        let came = std::iter::successors(Some(now - now % 5.0), |last| Some(last - 5.0));
        let waits = came.take_while(|came| *came > self.worked.max(now - 120.0));
        waits.map(|came| format!("claim {came}")).collect()
    }

    /// How many hand-overs there were in the last ten minutes.
    pub(super) fn recent(&self, now: f64) -> usize {
        self.hand_overs.iter().filter(|at| now - **at < 600.0).count()
    }
}
