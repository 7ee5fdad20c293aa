//! Single cases, in a world of three controllers: `a` leads and `b` looks.

use super::super::view::{Heartbeat, Own};
use super::*;

const LEASE: &str = "hostdir-csi";
const RESIZER: &str = "external-resizer-hostdir-csi";

struct World {
    view: View,
    dog: Watchdog,
    now: Duration,
    /// Which controllers still send heartbeats, and whether the holder renews the Lease.
    beating: BTreeSet<&'static str>,
    renewing: bool,
}

impl World {
    fn new() -> Self {
        let names = ["a", "b", "c"];
        let election = Election {
            holder: "a".into(),
            term: 10,
            acquired: Timestamp::UNIX_EPOCH,
            renewal: Timestamp::UNIX_EPOCH,
            handed_over: None,
        };
        let heartbeat = |name: &str| Heartbeat {
            sent: Timestamp::UNIX_EPOCH,
            node: format!("node-{name}"),
            elections: [(LEASE.to_owned(), None), (RESIZER.to_owned(), None)].into(),
        };
        let mut world = Self {
            view: View {
                elections: [(LEASE.to_owned(), election)].into(),
                heartbeats: names.map(|name| (name.to_owned(), heartbeat(name))).into(),
                own: Own {
                    uid: Some("uid-b".into()),
                    node_gone: None,
                },
            },
            dog: Watchdog::new("b".into()),
            now: Duration::from_hours(1),
            beating: names.into(),
            renewing: true,
        };
        assert_eq!(world.until(60), None);
        world
    }

    /// Lets a controller say that it cannot lead an election, or that it can.
    fn says(&mut self, name: &str, lease: &str, why: Option<&str>) {
        let heartbeat = self.view.heartbeats.get_mut(name).unwrap();
        heartbeat.elections.insert(lease.to_owned(), why.map(str::to_owned));
    }

    fn election(&mut self) -> &mut Election {
        self.view.elections.get_mut(LEASE).unwrap()
    }

    /// Looks once, `seconds` later.
    fn look(&mut self, seconds: u64) -> Verdict {
        self.now += Duration::from_secs(seconds);
        let clock = Timestamp::UNIX_EPOCH + self.now;
        for name in &self.beating {
            self.view.heartbeats.get_mut(*name).unwrap().sent = clock;
        }
        if self.renewing {
            for election in self.view.elections.values_mut() {
                election.renewal = clock;
            }
        }
        self.dog.look(self.now, &self.view)
    }

    fn state(&mut self) -> LeaseState {
        match self.look(2) {
            Verdict::Watching { mut leases, .. } => leases.remove(LEASE).unwrap(),
            Verdict::Ghost(why) => panic!("unexpected ghost: {why}"),
        }
    }

    /// Looks once a second. Returns after how many seconds it takes over, and why; `None` if it does not within `seconds`.
    fn until(&mut self, seconds: u64) -> Option<(u64, TakeOver)> {
        (1..=seconds).find_map(|second| match self.look(1) {
            Verdict::Watching { mut take_overs, .. } => take_overs.pop().map(|due| (second, due)),
            Verdict::Ghost(why) => panic!("unexpected ghost: {why}"),
        })
    }

    /// After how many seconds it takes over.
    fn after(&mut self, seconds: u64) -> Option<u64> {
        self.until(seconds).map(|(after, _)| after)
    }
}

#[test]
fn a_holder_that_beats_is_left_alone_for_ever() {
    assert_eq!(World::new().until(10_000), None);
}

#[test]
fn who_does_not_beat_is_replaced() {
    let mut world = World::new();
    world.beating.remove("a");
    let (after, due) = world.until(60).unwrap();
    assert_eq!(
        (after, due.guilt.reason(), due.node.as_deref()),
        (12, "Silent", Some("node-a"))
    );
    assert_eq!(due.guilt.to_string(), "its driver has sent no heartbeat for 12 s");

    // The heartbeat goes with its Pod.
    let mut world = World::new();
    world.beating.remove("a");
    world.view.heartbeats.remove("a");
    assert_eq!(world.after(60), Some(6));

    // A controller that never sent a heartbeat, such as an old version that knows none.
    let mut world = World::new();
    world.election().holder = "old".into();
    let (after, due) = world.until(60).unwrap();
    // `a` comes before `b`.
    assert_eq!((after, due.guilt.reason()), (10, "Silent"));
}

#[test]
fn who_beats_but_cannot_lead_is_replaced_in_that_election_only() {
    let mut world = World::new();
    let other = Election {
        holder: "a".into(),
        ..world.election().clone()
    };
    world.view.elections.insert(RESIZER.into(), other);
    assert_eq!(world.until(30), None);
    world.says("a", RESIZER, Some("its sidecar does not answer"));
    let (after, due) = world.until(60).unwrap();
    assert_eq!((after, due.lease.as_str(), due.guilt.reason()), (12, RESIZER, "Unable"));
    assert_eq!(due.guilt.to_string(), "its sidecar does not answer");
    assert_eq!(world.state().guilt, None);
}

#[test]
fn where_nobody_could_lead_nobody_takes_over() {
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        world.says(name, LEASE, Some("no work is done"));
    }
    assert_eq!(world.until(300), None);
    let state = world.state();
    assert_eq!((state.candidates, state.nobody), (0, true));
    assert_eq!(state.obstacle, Some(Obstacle::Unable));
    // As soon as one could.
    world.says("b", LEASE, None);
    assert_eq!(world.after(60), Some(1));

    // All sidecars crash: the Lease expires.
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        world.says(name, LEASE, Some("its sidecar does not answer"));
    }
    world.election().holder = String::new();
    assert_eq!(world.until(25), None);
    assert!(!world.state().nobody, "they may be starting");
    assert_eq!(world.until(25), None);
    assert!(world.state().nobody);
}

#[test]
fn who_recovers_in_time_is_forgiven() {
    let mut world = World::new();
    for _ in 0..10 {
        world.beating.remove("a");
        assert_eq!(world.until(11), None);
        world.beating.insert("a");
        assert_eq!(world.until(1), None);
        world.says("a", LEASE, Some("its sidecar does not answer"));
        assert_eq!(world.until(11), None);
        world.says("a", LEASE, None);
        assert_eq!(world.until(1), None);
    }
}

#[test]
fn a_lease_that_nobody_renews_is_left_to_expire() {
    let mut world = World::new();
    world.renewing = false;
    world.beating.remove("a");
    assert_eq!(world.until(120), None);
    let state = world.state();
    assert_eq!((state.holder, state.leaderless), (None, Duration::from_secs(2)));

    let mut world = World::new();
    world.election().holder = String::new();
    assert_eq!(world.until(120), None);
}

#[test]
fn time_in_which_nothing_was_seen_does_not_count() {
    let mut world = World::new();
    world.beating.remove("a");
    assert_eq!(world.until(3), None);
    // The API server hangs, or this process does, for an hour.
    world.renewing = false;
    world.election().term = 10_000;
    let Verdict::Watching { take_overs, .. } = world.look(3600) else {
        panic!("unexpected ghost")
    };
    assert_eq!(take_overs, []);
    assert_eq!(world.after(60), Some(4));
}

#[test]
fn clocks_do_not_matter() {
    let mut world = World::new();
    for hours in [1, 5, 2] {
        // All of them jump.
        world.now = Duration::from_hours(hours * 1000);
        assert_eq!(world.until(60), None);
    }
}

#[test]
fn who_has_just_begun_to_lead_has_time_to_begin() {
    let mut world = World::new();
    world.beating.remove("c");
    assert_eq!(world.until(60), None);
    world.election().holder = "c".into();
    // Until the ninth look it has held the Lease for less than eight seconds; `a` comes before `b`.
    assert_eq!(world.after(60), Some(10));
}

#[test]
fn who_could_not_lead_does_not_take_over() {
    let mut world = World::new();
    world.beating.remove("a");
    world.says("b", LEASE, Some("its sidecar does not answer"));
    assert_eq!(world.until(60), None);
    assert_eq!(world.state().obstacle, Some(Obstacle::Unable));
    world.says("b", LEASE, None);
    assert!(world.until(1).is_some());

    // It could a moment ago.
    let mut world = World::new();
    world.beating.remove("a");
    assert_eq!(world.until(8), None);
    world.says("b", LEASE, Some("its sidecar does not answer"));
    assert_eq!(world.until(11), None);
    assert_eq!(world.state().obstacle, Some(Obstacle::Unable));

    let mut world = World::new();
    world.beating.remove("a");
    world.beating.remove("b");
    assert_eq!(world.until(60), None);
    assert_eq!(world.state().obstacle, Some(Obstacle::Unable));

    let mut world = World::new();
    world.election().holder = "b".into();
    world.beating.remove("b");
    assert_eq!(world.until(60), None);
    assert_eq!(world.state().obstacle, Some(Obstacle::Itself));
}

#[test]
fn those_that_come_first_have_a_second_each() {
    let mut world = World::new();
    world.election().holder = "c".into();
    assert_eq!(world.until(30), None);
    world.beating.remove("c");
    assert_eq!(world.after(60), Some(13));
    // A controller that may not lead does not come first.
    let mut world = World::new();
    world.election().holder = "c".into();
    world.says("a", LEASE, Some("its sidecar does not answer"));
    assert_eq!(world.until(30), None);
    world.beating.remove("c");
    assert_eq!(world.after(60), Some(12));
}

#[test]
fn after_a_hand_over_there_is_quiet_and_after_a_storm_more() {
    let mut world = World::new();
    world.beating.remove("a");
    for (number, quiet) in [45, 45, 300].into_iter().enumerate() {
        world.election().handed_over = Some(number.to_string());
        // The look that shows the hand-over, and the first look after the quiet time.
        assert_eq!(world.after(400), Some(quiet + 1), "hand-over {number}");
    }
    // The first two hand-overs are forgotten after ten minutes.
    world.beating.insert("a");
    assert_eq!(world.until(300), None);
    world.election().handed_over = Some("last".into());
    world.beating.remove("a");
    assert_eq!(world.after(400), Some(46));
}

#[test]
fn one_that_has_just_begun_to_look_keeps_the_quiet_too() {
    let held = |handed_over: &str| {
        let mut world = World::new();
        world.election().handed_over = Some(handed_over.into());
        world.election().acquired = Timestamp::UNIX_EPOCH + world.now - Duration::from_secs(20);
        world.dog = Watchdog::new("b".into());
        world.beating.remove("a");
        world.view.heartbeats.remove("a");
        world.after(60)
    };
    assert_eq!(held("from c to a, because its driver has sent no heartbeat"), Some(25));
    // A holder that was elected since then did not get the Lease by that hand-over. `c` comes after `b`.
    assert_eq!(held("from a to c, because its driver has sent no heartbeat"), Some(9));

    // A deleted Lease that a ghost creates again is not a hand-over.
    let mut world = World::new();
    world.election().handed_over = Some("to a".into());
    world.until(60);
    world.election().handed_over = None;
    world.beating.remove("a");
    assert_eq!(world.after(60), Some(12));
}

#[test]
fn another_holder_begins_anew() {
    let mut world = World::new();
    world.beating.remove("a");
    world.view.heartbeats.remove("a");
    assert_eq!(world.until(4), None);
    // Meanwhile the Lease goes to `c`, which could lead, and then back to the ghost.
    world.election().holder = "c".into();
    assert_eq!(world.until(30), None);
    world.election().holder = "a".into();
    assert_eq!(world.after(60), Some(9));
}

#[test]
fn who_is_gone_itself_is_the_ghost() {
    let is_ghost = |world: &mut World| {
        let first = world.look(1);
        assert!(!matches!(first, Verdict::Ghost(_)), "a ghost after only one look");
        matches!(world.look(1), Verdict::Ghost(_))
    };
    let mut world = World::new();
    world.view.own.uid = None;
    assert!(is_ghost(&mut world));
    let mut world = World::new();
    world.view.own.node_gone = Some("node-b".into());
    assert!(is_ghost(&mut world));
    let mut world = World::new();
    world.view.own.uid = Some("another".into());
    assert!(matches!(world.look(1), Verdict::Ghost(_)));
}
