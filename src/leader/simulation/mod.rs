//! Simulates controllers in a world where everything fails, thousands of times.
//!
//! Each has the real watchdog in its driver, a sidecar that behaves like client-go's elector
//! (tools/leaderelection/leaderelection.go), a Pod, a Node with a kubelet, and a clock that runs too fast or too slow. Reads
//! from the API server may be late and out of date; writes are checked against the version they name. Time advances in steps
//! of 200 ms.

mod world;

use world::*;

/// How long faults happen, in seconds, and how long the calm after that lasts.
const FAULTY: f64 = 500.0;
const CALM: f64 = 420.0;

impl World {
    /// Notes which controllers are fit and since when, and checks that a fit one leads in time.
    fn check(&mut self) {
        let now = self.now;
        let calm = now >= self.frozen && now >= self.slow;
        let mut leads = false;
        let mut anybody = false;
        for process in &mut self.processes {
            let machine = &self.machines[process.machine];
            let well = process.driver == Health::Well
                && process.sidecar == Health::Well
                && process.elector.seen.is_some()
                && process.exists
                && !process.ending
                && process.ready
                && machine.ready
                && machine.kubelet <= now
                && machine.registered <= now
                && machine.cut_off <= now;
            process.fit = well.then(|| process.fit.unwrap_or(now));
            anybody |= process.fit.is_some();
            leads |= process.fit.is_some() && process.elector.leads && self.election.holder == process.name;
        }
        self.missed = (calm && anybody && !leads).then(|| self.missed.unwrap_or(now));
        let missed = self.missed.map_or(0.0, |since| now - since);
        assert!(
            missed < BOUND,
            "seed {}, {now:.1} s: for {missed:.1} s some controller was fit but {:?} held the Lease; hand-overs at {:?}",
            self.seed,
            self.election.holder,
            self.hand_overs
        );
    }

    /// Makes something fail for a random controller.
    fn fault(&mut self) {
        let (now, number) = (self.now, self.rng.usize(0..self.processes.len().max(1)));
        let short = now + self.between(1.0, 60.0);
        let long = now + self.between(10.0, 300.0);
        let brief = now + self.between(1.0, 12.0);
        let for_ever = if self.rng.bool() { f64::INFINITY } else { long };
        let Some(process) = self.processes.get_mut(number) else {
            return;
        };
        let machine = &mut self.machines[process.machine];
        match self.rng.u8(0..12) {
            0 => process.driver = Health::Hung(long),
            1 => process.driver = Health::Dead(short),
            2 => process.sidecar = Health::Hung(short),
            3 => process.sidecar = Health::Dead(brief),
            4 => (process.driver, process.sidecar) = (Health::Hung(short), Health::Hung(short)),
            5 => machine.cut_off = short,
            6 => machine.kubelet = long,
            // The classic ghost: its kubelet is dead, its Node is deleted, its containers live on.
            7 => (machine.kubelet, machine.registered) = (for_ever, for_ever),
            8 => process.ending = true,
            9 => process.exists = false,
            10 => self.frozen = short,
            _ => self.slow = short,
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
            world.fault();
        }
    }
    // Some machines cannot recover; one more machine makes sure that some controller can be fit.
    world.machines.push(machine());
    while world.now < FAULTY + CALM {
        world.step();
    }
    assert!(
        world.missed.is_none(),
        "seed {seed}: at the end no fit controller leads, and {:?} holds the Lease",
        world.election.holder
    );
}

/// Calls `run` for many seeds, on two threads: 200 seeds, 2,000 in CI, or those that `HOSTDIR_SEEDS=FROM..TO` names.
fn for_each_seed(run: impl Fn(u64) + Sync) {
    let named = std::env::var("HOSTDIR_SEEDS").ok().and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    let many = if std::env::var_os("CI").is_some() { 2000 } else { 200 };
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
        35.0,
    ),
    (
        "driver dead, no kubelet",
        |process, machine| {
            (process.driver, machine.kubelet) = (Health::Dead(f64::INFINITY), f64::INFINITY);
        },
        40.0,
    ),
    (
        "sidecar hung",
        |process, _| process.sidecar = Health::Hung(f64::INFINITY),
        20.0,
    ),
    (
        "both hung",
        |process, _| {
            (process.driver, process.sidecar) = (Health::Hung(f64::INFINITY), Health::Hung(f64::INFINITY));
        },
        20.0,
    ),
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
        15.0,
    ),
    // The API server notices after fifty seconds, and a Node may be not ready for a minute.
    ("no kubelet", |_, machine| machine.kubelet = f64::INFINITY, 130.0),
];

#[test]
fn after_one_blow_another_leads_in_time() {
    for_each_seed(|seed| {
        for (blow, strike, bound) in BLOWS {
            let mut world = World::new(seed);
            let wait = 60.0 + world.between(0.0, 10.0);
            while world.now < wait {
                world.step();
            }
            let (struck, at) = (world.election.holder.clone(), world.now);
            let leader = world.processes.iter_mut().find(|process| process.name == struck);
            let leader = leader.unwrap_or_else(|| panic!("seed {seed}: nobody leads"));
            strike(leader, &mut world.machines[leader.machine]);
            let another = |world: &World| {
                let works = |one: &Process| one.fit.is_some() && one.elector.leads && one.name == world.election.holder;
                world.processes.iter().any(|one| one.name != struck && works(one))
            };
            while !another(&world) {
                world.step();
                let after = world.now - at;
                assert!(
                    after < bound,
                    "seed {seed}: {blow}: after {after:.1} s no other controller leads, and {:?} holds the Lease",
                    world.election.holder
                );
            }
            assert!(
                world.hand_overs.len() <= 1,
                "seed {seed}: {blow}: more than one hand-over, at {:?}",
                world.hand_overs
            );
        }
    });
}
