//! Simulates controllers in a world where everything fails, thousands of times.
//!
//! Each has the real watchdog in its driver, a sidecar for each of two elections that behaves like client-go's elector
//! (tools/leaderelection/leaderelection.go), a Pod, a Node with a kubelet, and a clock that runs too fast or too slow, and
//! jumps. Reads from the API server may be late and out of date; writes may be refused, and their answers lost. Time advances
//! in steps of 200 ms.

mod process;
mod world;

use process::*;
use world::*;

/// How long faults happen, in seconds, and how long the calm after that lasts.
const FAULTY: f64 = 500.0;
const CALM: f64 = 420.0;

/// When some controller is fit, a fit one leads within this time: the quiet after a hand-over, a judgement, another hand-over,
/// and the time that a sidecar takes to notice.
const BOUND: f64 = 90.0;
/// The same after a storm of hand-overs, or while those whose sidecars did no work are not trusted.
const LATE: f64 = 420.0;

impl World {
    /// Notes which controllers are fit and since when, and checks that a fit one leads in time.
    fn check(&mut self) {
        let now = self.now;
        let calm = [self.frozen, self.slow, self.refusing, self.lossy, self.useless]
            .iter()
            .all(|until| now >= *until);
        for (lease, held) in self.leases.iter_mut().enumerate() {
            let mut leads = false;
            let mut anybody = false;
            for process in &mut self.processes {
                let machine = &self.machines[process.machine];
                let well = process.works(lease, now)
                    && now >= self.useless
                    && machine.registered <= now
                    && machine.cut_off <= now;
                let sidecar = &mut process.sidecars[lease];
                sidecar.fit = well.then(|| sidecar.fit.unwrap_or(now));
                anybody |= well;
                leads |= well && sidecar.leads && held.election.holder == process.name;
            }
            held.missed = (calm && anybody && !leads).then(|| held.missed.unwrap_or(now));
            let missed = held.missed.map_or(0.0, |since| now - since);
            let late = held.recent(now) >= 3 || now - self.stuck < LATE;
            assert!(
                missed < if late { LATE } else { BOUND },
                "seed {}, {now:.1} s: for {missed:.1} s some controller was fit but {:?} held Lease {lease}; hand-overs at {:?}",
                self.seed,
                held.election.holder,
                held.hand_overs
            );
        }
    }

    /// Makes something fail for a random controller.
    fn fault(&mut self) {
        let (now, number) = (self.now, self.rng.usize(0..self.processes.len().max(1)));
        let short = now + self.between(1.0, 60.0);
        let long = now + self.between(10.0, 300.0);
        let brief = now + self.between(1.0, 12.0);
        let for_ever = if self.rng.bool() { f64::INFINITY } else { long };
        let (lease, wanted) = (self.rng.usize(0..2), self.rng.usize(1..=5));
        let jump = self.between(-1000.0, 1000.0);
        let Some(process) = self.processes.get_mut(number) else {
            return;
        };
        let machine = &mut self.machines[process.machine];
        match self.rng.u8(0..18) {
            0 => process.driver = Health::Hung(long),
            1 => process.driver = Health::Dead(short),
            2 => process.sidecars[lease].health = Health::Hung(short),
            3 => process.sidecars[lease].health = Health::Dead(brief),
            4 => process.hang(short),
            5 => machine.cut_off = short,
            6 => machine.kubelet = long,
            // The classic ghost: its kubelet is dead, its Node is deleted, its containers live on.
            7 => (machine.kubelet, machine.registered) = (for_ever, for_ever),
            8 => process.ending = Some(now),
            9 => process.exists = false,
            10 => self.frozen = short,
            11 => self.slow = short,
            12 => (process.sidecars[lease].stuck, self.stuck) = (for_ever, now),
            13 => (self.useless, self.stuck) = (long, long),
            14 => self.refusing = short,
            15 => self.lossy = short,
            16 => self.wanted = wanted,
            _ => process.ahead += jump,
        }
    }

    /// A new version: all Pods are replaced.
    fn roll_out(&mut self) {
        for process in &mut self.processes {
            process.ending = Some(self.now);
        }
    }
}

fn live(seed: u64) {
    let mut world = World::new(seed);
    let mut next = world.between(5.0, 60.0);
    while world.now < FAULTY {
        world.step();
        if world.now >= next {
            next = world.now + world.between(0.5, 60.0);
            if world.rng.u8(0..20) == 0 {
                world.roll_out();
            } else {
                world.fault();
            }
        }
    }
    // Some machines cannot recover; one more machine makes sure that some controller can be fit.
    world.machines.push(Machine::new());
    world.wanted += 1;
    while world.now < FAULTY + CALM {
        world.step();
    }
    for held in &world.leases {
        assert!(
            held.missed.is_none(),
            "seed {seed}: at the end no fit controller leads, and {:?} holds the Lease",
            held.election.holder
        );
    }
}

/// Calls `run` for many seeds, on two threads: 100 seeds, 1,000 in CI, or those that `HOSTDIR_SEEDS=FROM..TO` names.
fn for_each_seed(run: impl Fn(u64) + Sync) {
    let named = std::env::var("HOSTDIR_SEEDS").ok().and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    let many = if std::env::var_os("CI").is_some() { 1000 } else { 100 };
    let seeds = named.unwrap_or(0..many);
    let half = |odd: u64| seeds.clone().filter(|seed| seed % 2 == odd).for_each(&run);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        half(0);
        if let Err(panic) = other.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn whatever_fails_a_fit_one_leads_in_time_and_none_is_deposed() {
    for_each_seed(live);
}

type Blow = fn(&mut Process, &mut Machine);

/// Single failures of the leader in a healthy world, and within how many seconds another controller leads.
const BLOWS: [(&str, Blow, f64); 8] = [
    (
        "driver hung",
        |process, _| process.driver = Health::Hung(f64::INFINITY),
        25.0,
    ),
    (
        "driver dead, no kubelet",
        |process, machine| {
            (process.driver, machine.kubelet) = (Health::Dead(f64::INFINITY), f64::INFINITY);
        },
        25.0,
    ),
    (
        "sidecar hung",
        |process, _| process.sidecars[0].health = Health::Hung(f64::INFINITY),
        20.0,
    ),
    (
        "sidecar does no work",
        |process, _| process.sidecars[0].stuck = f64::INFINITY,
        80.0,
    ),
    ("both hung", |process, _| process.hang(f64::INFINITY), 20.0),
    ("cut off", |_, machine| machine.cut_off = f64::INFINITY, 20.0),
    (
        "Pod gone, driver hung, no kubelet",
        |process, machine| {
            process.driver = Health::Hung(f64::INFINITY);
            (process.exists, machine.kubelet) = (false, f64::INFINITY);
        },
        15.0,
    ),
    (
        "Node gone, driver hung, no kubelet",
        |process, machine| {
            process.driver = Health::Hung(f64::INFINITY);
            (machine.registered, machine.kubelet) = (f64::INFINITY, f64::INFINITY);
        },
        25.0,
    ),
];

#[test]
fn after_one_blow_another_leads_in_time() {
    for_each_seed(|seed| {
        for (blow, strike, bound) in BLOWS {
            let mut world = World::new(seed);
            world.wanted = world.wanted.max(2);
            let wait = 60.0 + world.between(0.0, 10.0);
            while world.now < wait {
                world.step();
            }
            let (struck, at) = (world.leases[0].election.holder.clone(), world.now);
            let before = world.leases[0].hand_overs.len();
            let leader = world.processes.iter_mut().find(|process| process.name == struck);
            let leader = leader.unwrap_or_else(|| panic!("seed {seed}: nobody leads"));
            strike(leader, &mut world.machines[leader.machine]);
            let another = |world: &World| {
                let works = |one: &Process| one.sidecars[0].fit.is_some() && one.sidecars[0].leads;
                let holds = |one: &Process| one.name != struck && one.name == world.leases[0].election.holder;
                world.processes.iter().any(|one| holds(one) && works(one))
            };
            while !another(&world) {
                world.step();
                let after = world.now - at;
                assert!(
                    after < bound,
                    "seed {seed}: {blow}: after {after:.1} s no other controller leads, and {:?} holds the Lease",
                    world.leases[0].election.holder
                );
            }
            let hand_overs = &world.leases[0].hand_overs[before..];
            assert!(
                hand_overs.len() <= 1,
                "seed {seed}: {blow}: more than one hand-over, at {hand_overs:?}"
            );
        }
    });
}

/// If no sidecar can do its work, for example because it may not list claims, a hand-over is tried now and then, and no more.
#[test]
fn where_nobody_works_the_lease_does_not_go_round() {
    for_each_seed(|seed| {
        // It takes as long as five others.
        if seed % 5 > 1 {
            return;
        }
        let mut world = World::new(seed);
        while world.now < 60.0 {
            world.step();
        }
        world.useless = f64::INFINITY;
        let end = world.now + 1800.0;
        while world.now < end {
            world.step();
        }
        for held in &world.leases {
            assert!(held.hand_overs.len() <= 12, "seed {seed}: {:?}", held.hand_overs);
        }
    });
}
