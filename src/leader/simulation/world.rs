//! The simulated world: machines, Pods, sidecars, drivers, and an API server.

use crate::leader::*;
use fastrand::Rng;
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::time::Duration;

pub(super) const LEASE: &str = "hostdir-csi";
pub(super) const STEP: f64 = 0.2;
/// Lease duration, renew deadline and retry period, as the chart sets them.
pub(super) const TERM: f64 = 10.0;
pub(super) const DEADLINE: f64 = 9.0;
pub(super) const RETRY: f64 = 2.0;
/// When some controller is fit, a fit one leads within this time: the quiet after a storm, a judgement, and a hand-over.
pub(super) const BOUND: f64 = 330.0;
/// A holder that has been fit for this long must not be deposed.
pub(super) const SETTLED: f64 = 30.0;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Health {
    Well,
    /// Until then it holds its sockets open and does nothing.
    Hung(f64),
    /// Its kubelet, if that is alive, starts it again at this time.
    Dead(f64),
}

#[derive(Debug)]
pub(super) struct Machine {
    /// When its kubelet is alive again; a time in the past if it is alive now.
    pub(super) kubelet: f64,
    /// When its Node is registered again.
    pub(super) registered: f64,
    /// When `ready` was last right: the API server notices a dead kubelet after 50 s.
    pub(super) seen: f64,
    pub(super) ready: bool,
    /// Until then it has no network.
    pub(super) cut_off: f64,
}

/// What an elector remembers.
#[derive(Debug, Default)]
pub(super) struct Sidecar {
    pub(super) leads: bool,
    pub(super) seen: Option<(String, u64)>,
    pub(super) seen_at: f64,
    pub(super) renewed: f64,
    pub(super) next: f64,
}

/// A controller: what runs, and what the API server says about it.
pub(super) struct Process {
    pub(super) name: String,
    pub(super) machine: usize,
    pub(super) rate: f64,
    pub(super) driver: Health,
    pub(super) sidecar: Health,
    pub(super) elector: Sidecar,
    /// Whether the Pod object exists, is being deleted, and is ready.
    pub(super) exists: bool,
    pub(super) ending: bool,
    pub(super) ready: bool,
    /// Since when `ready` is wrong.
    pub(super) differs: Option<f64>,
    /// When the Pod is deleted because its Node is gone.
    pub(super) collected: Option<f64>,
    pub(super) dog: Watchdog,
    pub(super) next_look: f64,
    /// A read in progress: when it was sent, when its answer arrives, the view and the version.
    pub(super) reading: Option<(f64, f64, View, u64)>,
    pub(super) next_beat: f64,
    /// How many seconds its clock is ahead.
    pub(super) ahead: f64,
    /// Since when it is fit.
    pub(super) fit: Option<f64>,
}

impl Process {
    fn clock(&self, now: f64) -> Timestamp {
        Timestamp::UNIX_EPOCH + Duration::from_secs_f64(now * self.rate + self.ahead)
    }
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) now: f64,
    pub(super) seed: u64,
    pub(super) machines: Vec<Machine>,
    pub(super) processes: Vec<Process>,
    pub(super) wanted: usize,
    pub(super) names: u64,
    pub(super) election: Election,
    pub(super) renewals: u64,
    pub(super) version: u64,
    pub(super) beats: Vec<(String, Timestamp)>,
    /// Until `frozen` the API server answers nobody, and until `slow` it answers slowly.
    pub(super) frozen: f64,
    pub(super) slow: f64,
    /// The views and versions at earlier steps, latest last.
    pub(super) past: Vec<(View, u64)>,
    pub(super) hand_overs: Vec<f64>,
    /// Since when some controller is fit but no fit one leads.
    pub(super) missed: Option<f64>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let count = rng.usize(2..=5);
        let mut world = Self {
            now: 0.0,
            seed,
            machines: (0..count).map(|_| machine()).collect(),
            processes: Vec::new(),
            wanted: rng.usize(2..=3.min(count)),
            names: 0,
            election: Election {
                holder: String::new(),
                term: 10,
                acquired: Timestamp::UNIX_EPOCH,
                renewal: Timestamp::UNIX_EPOCH,
                handed_over: None,
            },
            renewals: 0,
            version: 0,
            beats: Vec::new(),
            frozen: 0.0,
            slow: 0.0,
            past: Vec::new(),
            hand_overs: Vec::new(),
            missed: None,
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

    pub(super) fn view(&self) -> View {
        let state = |machine: &Machine| match machine {
            gone if gone.registered > self.now => NodeState::Gone,
            ready if ready.ready => NodeState::Ready,
            _ => NodeState::NotReady,
        };
        let controllers = self.processes.iter().filter(|process| process.exists).map(|process| {
            let controller = ControllerPod {
                uid: process.name.clone(),
                ready: process.ready,
                ending: process.ending,
                node: process.machine.to_string(),
                node_state: state(&self.machines[process.machine]),
            };
            (process.name.clone(), controller)
        });
        View {
            elections: [(LEASE.to_owned(), self.election.clone())].into(),
            controllers: controllers.collect(),
            heartbeats: self.beats.iter().cloned().collect(),
        }
    }

    pub(super) fn hold(&mut self, name: &str) {
        let is_new = self.election.holder != name;
        name.clone_into(&mut self.election.holder);
        if let Some(process) = self.processes.iter().find(|process| process.name == name) {
            self.election.renewal = process.clock(self.now);
            if is_new {
                self.election.acquired = self.election.renewal;
            }
        }
        self.renewals += 1;
        self.version += 1;
    }

    /// Creates missing Pods, as the Deployment does, on machines with a live kubelet.
    pub(super) fn replace_pods(&mut self) {
        let there = self
            .processes
            .iter()
            .filter(|process| process.exists && !process.ending)
            .count();
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
            let rate = self.between(0.9, 1.1);
            let ahead = self.between(0.0, 1000.0);
            self.processes.push(Process {
                dog: Watchdog::new(name.clone()),
                name,
                machine,
                rate,
                driver: Health::Dead(start),
                sidecar: Health::Dead(start),
                elector: Sidecar::default(),
                exists: true,
                ending: false,
                ready: false,
                differs: None,
                collected: None,
                next_look: 0.0,
                reading: None,
                next_beat: 0.0,
                ahead,
                fit: None,
            });
        }
    }

    pub(super) fn step(&mut self) {
        self.now += STEP;
        self.tend_machines();
        self.replace_pods();
        for process in 0..self.processes.len() {
            self.tend_pod(process);
            self.run_sidecar(process);
            self.run_driver(process);
        }
        // Dead processes without a Pod go, and so do the heartbeat Leases of deleted Pods.
        let dead = |process: &Process| {
            let dead = |health| matches!(health, Health::Dead(_));
            dead(process.driver) && dead(process.sidecar) && !process.exists
        };
        self.processes.retain(|process| !dead(process));
        let exists = |name: &String| self.processes.iter().any(|one| one.name == *name && one.exists);
        self.beats.retain(|(name, _)| exists(name));
        let view = self.view();
        self.past.push((view, self.version));
        if self.past.len() > 10 {
            self.past.remove(0);
        }
        self.check();
    }

    pub(super) fn tend_machines(&mut self) {
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
    pub(super) fn tend_pod(&mut self, number: usize) {
        let delay = self.between(40.0, 60.0);
        let (now, grace) = (self.now, self.between(5.0, 15.0));
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
        if !process.exists || process.ending {
            // The kubelet stops the containers of deleted Pods. A healthy sidecar releases the Lease when it stops.
            let released =
                process.elector.leads && process.sidecar == Health::Well && self.election.holder == process.name;
            process.exists = false;
            process.driver = Health::Dead(f64::INFINITY);
            process.sidecar = Health::Dead(f64::INFINITY);
            if released && now >= self.frozen && now >= machine.cut_off {
                self.hold("");
            }
            return;
        }
        for health in [&mut process.driver, &mut process.sidecar] {
            if matches!(health, Health::Dead(until) if *until <= now) {
                *health = Health::Well;
                process.elector = Sidecar::default();
            }
        }
        let well = process.driver == Health::Well && process.sidecar == Health::Well;
        if well == process.ready {
            process.differs = None;
        } else if now - *process.differs.get_or_insert(now) > if well { 1.0 } else { grace } {
            process.ready = well;
        }
    }

    pub(super) fn run_sidecar(&mut self, number: usize) {
        let (now, reaches) = (self.now, self.reaches(number));
        let jitter = self.between(1.0, 2.2);
        let recall = self.between(0.0, 60.0);
        let process = &mut self.processes[number];
        match process.sidecar {
            Health::Well => {}
            Health::Hung(until) if until <= now => process.sidecar = Health::Well,
            Health::Hung(_) | Health::Dead(_) => return,
        }
        let elector = &mut process.elector;
        match process.driver {
            // The sidecar notices only at its next call, and then exits.
            Health::Dead(_) if elector.leads && recall > 0.2 => {}
            Health::Dead(_) if elector.leads => {
                process.sidecar = Health::Dead(now + 1.0);
                return;
            }
            // Without a driver that answers, the sidecar does not join the election.
            Health::Dead(_) | Health::Hung(_) if elector.seen.is_none() => return,
            _ => {}
        }
        if now < elector.next {
            return;
        }
        let holds = self.election.holder == process.name;
        let record = (self.election.holder.clone(), self.renewals);
        let rate = process.rate;
        if elector.leads {
            elector.next = now + RETRY / rate;
            if reaches && holds {
                elector.renewed = now;
                let name = process.name.clone();
                self.hold(&name);
            } else if (now - elector.renewed) * rate > DEADLINE {
                process.sidecar = Health::Dead(now + 1.0);
            }
            return;
        }
        elector.next = now + RETRY * jitter / rate;
        if !reaches {
            return;
        }
        if elector.seen.as_ref() != Some(&record) {
            elector.seen = Some(record);
            elector.seen_at = now;
        }
        if holds || self.election.holder.is_empty() || (now - elector.seen_at) * rate > TERM {
            elector.leads = true;
            elector.renewed = now;
            let name = process.name.clone();
            self.hold(&name);
        }
    }

    pub(super) fn run_driver(&mut self, number: usize) {
        let (now, reaches) = (self.now, self.reaches(number));
        let slow = if now < self.slow {
            self.between(0.5, 3.0)
        } else {
            self.between(0.0, 0.2)
        };
        let old = self.rng.usize(0..10);
        let process = &mut self.processes[number];
        match process.driver {
            Health::Well => {}
            Health::Hung(until) if until <= now => process.driver = Health::Well,
            Health::Hung(_) => return,
            Health::Dead(_) => {
                process.dog = Watchdog::new(process.name.clone());
                process.reading = None;
                return;
            }
        }
        if now >= process.next_beat && reaches {
            process.next_beat = now + (5.0 + slow) / process.rate;
            let beat = (process.name.clone(), process.clock(now));
            if process.exists {
                self.beats.retain(|(name, _)| *name != beat.0);
                self.beats.push(beat);
            }
        } else if now >= process.next_beat {
            process.next_beat = now + 1.0 / process.rate;
        }
        if let Some((asked, arrives, ..)) = &process.reading
            && now >= *arrives
        {
            let fresh = (now - asked) * process.rate < 5.0;
            let (_, _, view, version) = process.reading.take().expect("seen just now");
            if fresh {
                self.look(number, &view, version);
            }
        } else if process.reading.is_none() && now >= process.next_look && reaches {
            let (view, version) = match self.past.len().checked_sub(old + 1) {
                Some(index) if now < self.slow => self.past[index].clone(),
                _ => (self.view(), self.version),
            };
            let process = &mut self.processes[number];
            process.reading = Some((now, now + slow, view, version));
            process.next_look = now + 2.0 / process.rate;
        }
    }

    pub(super) fn look(&mut self, number: usize, view: &View, version: u64) {
        let reaches = self.reaches(number);
        let now = self.now;
        let process = &mut self.processes[number];
        let answers = process.sidecar == Health::Well && process.elector.seen.is_some();
        let fit: BTreeSet<String> = answers.then(|| LEASE.to_owned()).into_iter().collect();
        let monotonic = Duration::from_secs_f64(now * process.rate);
        match process.dog.look(monotonic, view, &fit) {
            Verdict::Ghost(_) => process.driver = Health::Dead(now + 1.0),
            Verdict::Watching { take_overs, leases } => {
                if leases.values().any(|lease| lease.obstacle == Some(Obstacle::Turn)) {
                    process.next_look = now + 1.0 / process.rate;
                }
                let name = process.name.clone();
                for due in take_overs {
                    if reaches && self.version == version {
                        self.hand_over(&due, &name);
                    } else {
                        self.processes[number].next_look = now;
                    }
                }
            }
        }
    }

    pub(super) fn hand_over(&mut self, due: &TakeOver, name: &str) {
        let (now, seed) = (self.now, self.seed);
        let deposed = self.processes.iter().find(|process| process.name == due.holder);
        let settled = deposed
            .and_then(|process| process.fit)
            .is_some_and(|since| now - since > SETTLED);
        assert!(
            !settled,
            "seed {seed}, {now:.1} s: {name} deposes a holder that was fit: {due:?}"
        );
        self.hold(name);
        self.election.handed_over = Some(due.note(Timestamp::UNIX_EPOCH + Duration::from_secs_f64(now), name));
        self.hand_overs.push(now);
        let recent = self.hand_overs.iter().filter(|at| now - **at < 600.0).count();
        assert!(
            recent <= 8,
            "seed {seed}, {now:.1} s: a storm of hand-overs at {:?}",
            self.hand_overs
        );
    }
}

pub(super) fn machine() -> Machine {
    Machine {
        kubelet: 0.0,
        registered: 0.0,
        seen: 0.0,
        ready: true,
        cut_off: 0.0,
    }
}
