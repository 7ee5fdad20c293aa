//! The simulated processes of a controller: a driver with the real watchdog, and sidecars with electors.

use crate::leader::*;
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::time::Duration;

use super::world::{DEADLINE, LEASES, RETRY, TERM, World};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Health {
    Well,
    /// Until then it holds its sockets open and does nothing.
    Hung(f64),
    /// Its kubelet, if that is alive, starts it again at this time.
    Dead(f64),
}

/// A sidecar, with what its elector remembers.
#[derive(Debug)]
pub(super) struct Sidecar {
    pub(super) health: Health,
    pub(super) leads: bool,
    seen: Option<(String, u64)>,
    seen_at: f64,
    renewed: f64,
    next: f64,
    /// Until then it finishes nothing.
    pub(super) stuck: f64,
    /// When it last finished something, and how much it has.
    worked: f64,
    finished: u64,
    /// What its driver knows of its work.
    pub(super) queue: Queue,
    /// Since when it is fit.
    pub(super) fit: Option<f64>,
}

impl Default for Sidecar {
    fn default() -> Self {
        Self {
            health: Health::Well,
            leads: false,
            seen: None,
            seen_at: 0.0,
            renewed: 0.0,
            next: 0.0,
            stuck: 0.0,
            worked: 0.0,
            finished: 0,
            queue: Queue::default(),
            fit: None,
        }
    }
}

impl Sidecar {
    /// Starts anew after it has ended. Its driver remembers what it knew.
    pub(super) fn restart(&mut self) {
        let queue = std::mem::take(&mut self.queue);
        *self = Self {
            queue,
            ..Self::default()
        };
    }

    fn answers(&self) -> bool {
        self.health == Health::Well && self.seen.is_some()
    }
}

/// A controller: what runs, and what the API server says about it.
pub(super) struct Process {
    pub(super) name: String,
    pub(super) machine: usize,
    rate: f64,
    pub(super) driver: Health,
    pub(super) sidecars: [Sidecar; 2],
    /// Whether the Pod object exists, and since when it is being deleted.
    pub(super) exists: bool,
    pub(super) ending: Option<f64>,
    /// When its sidecars stop, after they were told to.
    pub(super) told: Option<f64>,
    /// When the Pod is deleted because its Node is gone.
    pub(super) collected: Option<f64>,
    dog: Watchdog,
    next_look: f64,
    /// A read in progress: when it was sent, when its answer arrives, and the view.
    reading: Option<(f64, f64, View)>,
    next_beat: f64,
    /// The Leases that it held at its last look.
    leads: BTreeSet<String>,
    /// How many seconds its clock is ahead.
    pub(super) ahead: f64,
}

impl Process {
    pub(super) fn new(name: String, machine: usize, start: f64, rate: f64, ahead: f64) -> Self {
        let sidecar = || Sidecar {
            health: Health::Dead(start),
            ..Sidecar::default()
        };
        Self {
            dog: Watchdog::new(name.clone()),
            name,
            machine,
            rate,
            driver: Health::Dead(start),
            sidecars: [sidecar(), sidecar()],
            exists: true,
            ending: None,
            told: None,
            collected: None,
            next_look: 0.0,
            reading: None,
            next_beat: 0.0,
            leads: BTreeSet::new(),
            ahead,
        }
    }

    pub(super) fn clock(&self, now: f64) -> Timestamp {
        // Whatever the jumps, it is after 1970.
        Timestamp::UNIX_EPOCH + Duration::from_secs_f64(1e6 + now * self.rate + self.ahead)
    }

    fn monotonic(&self, now: f64) -> Duration {
        Duration::from_secs_f64(now * self.rate)
    }

    pub(super) fn is_dead(&self) -> bool {
        let dead = |health| matches!(health, Health::Dead(_));
        dead(self.driver) && self.sidecars.iter().all(|sidecar| dead(sidecar.health))
    }

    /// Hangs the driver and the sidecars.
    pub(super) fn hang(&mut self, until: f64) {
        self.driver = Health::Hung(until);
        for sidecar in &mut self.sidecars {
            sidecar.health = Health::Hung(until);
        }
    }

    /// Whether it does the work of an election if it leads, as far as it is concerned.
    pub(super) fn works(&self, lease: usize, now: f64) -> bool {
        let sidecar = &self.sidecars[lease];
        // A Pod that is being deleted works until its kubelet, if that is alive, stops it.
        let there = self.exists && self.driver == Health::Well;
        there && sidecar.answers() && sidecar.stuck <= now
    }
}

impl World {
    pub(super) fn run_sidecar(&mut self, number: usize, lease: usize) {
        let (now, reaches) = (self.now, self.reaches(number));
        let jitter = self.between(1.0, 2.2);
        let recall = self.between(0.0, 60.0);
        let useless = self.useless > now || !reaches;
        let process = &mut self.processes[number];
        let (name, rate, driver) = (process.name.clone(), process.rate, process.driver);
        let sidecar = &mut process.sidecars[lease];
        match sidecar.health {
            Health::Well => {}
            Health::Hung(until) if until <= now => sidecar.health = Health::Well,
            Health::Hung(_) | Health::Dead(_) => return,
        }
        match driver {
            // The sidecar notices only at its next call, and then exits.
            Health::Dead(_) if sidecar.leads && recall > 0.2 => {}
            Health::Dead(_) if sidecar.leads => {
                sidecar.health = Health::Dead(now + 1.0);
                return;
            }
            // Without a driver that answers, the sidecar does not join the election.
            Health::Dead(_) | Health::Hung(_) if sidecar.seen.is_none() => return,
            _ => {}
        }
        if sidecar.leads && driver == Health::Well && sidecar.stuck <= now && !useless && now - sidecar.worked > 1.0 {
            sidecar.worked = now;
            sidecar.finished += 1;
            self.leases[lease].worked = now;
        }
        if now < sidecar.next {
            return;
        }
        let held = &self.leases[lease];
        let holds = held.election.holder == name;
        if sidecar.leads {
            sidecar.next = now + RETRY / rate;
            if reaches && holds {
                sidecar.renewed = now;
                self.hold(lease, &name);
            } else if (now - sidecar.renewed) * rate > DEADLINE {
                sidecar.health = Health::Dead(now + 1.0);
            }
            return;
        }
        sidecar.next = now + RETRY * jitter / rate;
        if !reaches {
            return;
        }
        let record = (held.election.holder.clone(), held.renewals);
        if sidecar.seen.as_ref() != Some(&record) {
            sidecar.seen = Some(record);
            sidecar.seen_at = now;
        }
        if holds || held.election.holder.is_empty() || (now - sidecar.seen_at) * rate > TERM {
            sidecar.leads = true;
            sidecar.renewed = now;
            self.hold(lease, &name);
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
                for sidecar in &mut process.sidecars {
                    sidecar.queue = Queue::default();
                }
                return;
            }
        }
        if now >= process.next_beat {
            let sent = reaches && now >= self.refusing;
            process.next_beat = now + if sent { 3.0 + slow } else { 1.0 } / process.rate;
            self.beat(number, sent);
        }
        let process = &mut self.processes[number];
        if let Some((asked, arrives, _)) = &process.reading
            && now >= *arrives
        {
            let fresh = (now - asked) * process.rate < 5.0;
            let (.., view) = process.reading.take().expect("seen just now");
            if fresh {
                self.look(number, &view);
            }
        } else if process.reading.is_none() && now >= process.next_look && reaches {
            let past = self.past.len().checked_sub(old + 1).filter(|_| now < self.slow);
            let view = self.view(number, past);
            let process = &mut self.processes[number];
            process.reading = Some((now, now + slow, view));
            process.next_look = now + 2.0 / process.rate;
        }
    }

    /// Says which elections a controller could lead.
    fn beat(&mut self, number: usize, sent: bool) {
        let now = self.now;
        let process = &mut self.processes[number];
        let monotonic = process.monotonic(now);
        let mut elections = std::collections::BTreeMap::new();
        for ((lease, sidecar), held) in LEASES.iter().zip(&mut process.sidecars).zip(&self.leases) {
            let leads = process.leads.contains(*lease);
            let finished = sidecar.finished;
            let waiting = held.waiting(now);
            sidecar.queue.look(monotonic, leads, &waiting, finished, 0);
            let why = sidecar.queue.stuck().map(str::to_owned);
            let silent = (!sidecar.answers()).then(|| "its sidecar does not answer".to_owned());
            elections.insert((*lease).to_owned(), silent.or(why));
        }
        let heartbeat = Heartbeat {
            sent: process.clock(now),
            node: process.machine.to_string(),
            elections,
        };
        if sent && process.exists {
            self.beats.insert(process.name.clone(), heartbeat);
        }
    }

    fn look(&mut self, number: usize, view: &View) {
        let (now, reaches) = (self.now, self.reaches(number));
        let process = &mut self.processes[number];
        let monotonic = process.monotonic(now);
        let name = process.name.clone();
        let held = view.elections.iter().filter(|(_, election)| election.holder == name);
        process.leads = held.map(|(lease, _)| lease.clone()).collect();
        match process.dog.look(monotonic, view) {
            Verdict::Ghost(_) => process.driver = Health::Dead(now + 1.0),
            Verdict::Watching { take_overs, leases } => {
                if leases.values().any(|lease| lease.obstacle == Some(Obstacle::Turn)) {
                    process.next_look = now + 1.0 / process.rate;
                }
                for due in take_overs {
                    self.try_to_take_over(number, view, &due, reaches);
                }
            }
        }
    }

    /// As production does: the Lease is read again, and its holder and its note must be those that were judged.
    fn try_to_take_over(&mut self, number: usize, view: &View, due: &TakeOver, reaches: bool) {
        let lease = LEASES
            .iter()
            .position(|lease| *lease == due.lease)
            .expect("a known Lease");
        let (then, is) = (&view.elections[&due.lease], &self.leases[lease].election);
        let same = (&then.holder, &then.handed_over) == (&is.holder, &is.handed_over);
        let done = reaches && same && self.now >= self.refusing;
        let name = self.processes[number].name.clone();
        if done {
            self.hand_over(due, &name);
        }
        if !done || (self.now < self.lossy && self.rng.bool()) {
            // It looks again at once.
            self.processes[number].next_look = self.now;
        }
    }
}
