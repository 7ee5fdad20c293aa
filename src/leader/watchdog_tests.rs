//! Single cases, in a world of three controllers: `a` leads and `b` looks.

use super::super::guilt::*;
use super::super::view::NodeState;
use super::*;

const LEASE: &str = "hostdir-csi";

struct World {
    view: View,
    fit: BTreeSet<String>,
    dog: Watchdog,
    now: Duration,
    /// Which controllers still send heartbeats, and whether the holder renews the Lease.
    beating: BTreeSet<&'static str>,
    renewing: bool,
}

impl World {
    fn new() -> Self {
        let controller = |name: &str| ControllerPod {
            uid: format!("uid-{name}"),
            ready: true,
            ending: false,
            node: format!("node-{name}"),
            node_state: NodeState::Ready,
        };
        let names = ["a", "b", "c"];
        let election = Election {
            holder: "a".into(),
            term: 10,
            acquired: Timestamp::UNIX_EPOCH,
            renewal: Timestamp::UNIX_EPOCH,
            handed_over: None,
        };
        let mut world = Self {
            view: View {
                elections: [(LEASE.to_owned(), election)].into(),
                controllers: names.map(|name| (name.to_owned(), controller(name))).into(),
                heartbeats: names.map(|name| (name.to_owned(), Timestamp::UNIX_EPOCH)).into(),
            },
            fit: [LEASE.to_owned()].into(),
            dog: Watchdog::new("b".into()),
            now: Duration::from_hours(1),
            beating: names.into(),
            renewing: true,
        };
        assert_eq!(world.until(60), None);
        world
    }

    fn pod(&mut self, name: &str) -> &mut ControllerPod {
        self.view.controllers.get_mut(name).unwrap()
    }

    fn election(&mut self) -> &mut Election {
        self.view.elections.get_mut(LEASE).unwrap()
    }

    /// Looks once, `seconds` later.
    fn look(&mut self, seconds: u64) -> Verdict {
        self.now += Duration::from_secs(seconds);
        let clock = Timestamp::UNIX_EPOCH + self.now;
        for name in &self.beating {
            self.view.heartbeats.insert((*name).to_owned(), clock);
        }
        if self.renewing {
            self.election().renewal = clock;
        }
        self.dog.look(self.now, &self.view, &self.fit)
    }

    fn obstacle(&mut self) -> Option<Obstacle> {
        match self.look(2) {
            Verdict::Watching { leases, .. } => leases[LEASE].obstacle,
            Verdict::Ghost(why) => panic!("unexpected ghost: {why}"),
        }
    }

    /// Looks once a second. Returns after how many seconds it takes over, and why; `None` if it does not within `seconds`.
    fn until(&mut self, seconds: u64) -> Option<(u64, Guilt)> {
        (1..=seconds).find_map(|second| match self.look(1) {
            Verdict::Watching { mut take_overs, .. } => take_overs.pop().map(|due| (second, due.guilt)),
            Verdict::Ghost(why) => panic!("unexpected ghost: {why}"),
        })
    }

    /// Like [`World::until`], but without the time in the reason.
    fn reason(&mut self) -> Option<(u64, &'static str)> {
        self.until(120).map(|(after, guilt)| (after, guilt.reason()))
    }
}

#[test]
fn a_holder_in_good_standing_is_left_alone_for_ever() {
    assert_eq!(World::new().until(10_000), None);
}

#[test]
fn who_is_guilty_and_after_how_long() {
    let mut world = World::new();
    world.view.controllers.remove("a");
    assert_eq!(world.reason(), Some((2, "PodGone")));

    let mut world = World::new();
    world.pod("a").node_state = NodeState::Gone;
    assert_eq!(world.reason(), Some((2, "NodeGone")));

    let mut world = World::new();
    world.pod("a").node_state = NodeState::NotReady;
    // The state of the Pod does not count: nobody updates it any more.
    world.pod("a").ready = false;
    assert_eq!(world.reason(), Some((62, "NodeNotReady")));

    let mut world = World::new();
    world.pod("a").ready = false;
    assert_eq!(world.reason(), Some((32, "PodNotReady")));

    let mut world = World::new();
    world.pod("a").ending = true;
    assert_eq!(world.reason(), Some((32, "PodEnding")));

    let mut world = World::new();
    world.beating.remove("a");
    assert_eq!(world.reason(), Some((21, "DriverSilent")));

    // A controller that never sent a heartbeat, such as an old version that knows none; `a` comes before `b`.
    let mut world = World::new();
    world.election().holder = "c".into();
    world.beating.remove("c");
    world.view.heartbeats.remove("c");
    assert_eq!(world.reason(), Some((23, "DriverSilent")));
}

#[test]
fn who_recovers_in_time_is_forgiven() {
    let mut world = World::new();
    for _ in 0..10 {
        world.beating.remove("a");
        assert_eq!(world.until(19), None);
        world.beating.insert("a");
        world.pod("a").ready = false;
        assert_eq!(world.until(29), None);
        world.pod("a").ready = true;
        world.pod("a").node_state = NodeState::NotReady;
        assert_eq!(world.until(59), None);
        world.pod("a").node_state = NodeState::Ready;
    }
}

#[test]
fn a_lease_that_nobody_renews_is_left_to_expire() {
    let mut world = World::new();
    world.renewing = false;
    world.beating.remove("a");
    assert_eq!(world.until(120), None);
    let Verdict::Watching { leases, .. } = world.look(2) else {
        panic!("unexpected ghost")
    };
    assert_eq!(
        (&leases[LEASE].holder, leases[LEASE].leaderless),
        (&None, Duration::from_secs(2))
    );

    let mut world = World::new();
    world.election().holder = String::new();
    assert_eq!(world.until(120), None);
}

#[test]
fn time_in_which_nothing_was_seen_does_not_count() {
    let mut world = World::new();
    world.beating.remove("a");
    world.pod("a").ready = false;
    assert_eq!(world.until(10), None);
    // The API server hangs, or this process does, for an hour.
    world.renewing = false;
    world.election().term = 10_000;
    let Verdict::Watching { take_overs, .. } = world.look(3600) else {
        panic!("unexpected ghost")
    };
    assert_eq!(take_overs, []);
    assert_eq!(world.until(4), None);
    assert_eq!(world.reason(), Some((2, "DriverSilent")));
}

#[test]
fn one_that_has_just_begun_to_look_goes_by_the_clock_of_the_holder() {
    let mut world = World::new();
    world.beating.remove("a");
    // This controller hangs for a minute, in which the holder's sidecar renews.
    world.look(60);
    assert_eq!(world.reason(), Some((7, "DriverSilent")));

    // A heartbeat that comes back within a few seconds clears the holder: the API server may have hung.
    let mut world = World::new();
    world.beating.remove("a");
    world.look(60);
    assert_eq!(world.until(4), None);
    world.beating.insert("a");
    assert_eq!(world.until(60), None);
}

#[test]
fn who_has_just_begun_to_lead_has_time_to_begin() {
    let mut world = World::new();
    world.pod("c").ready = false;
    world.beating.remove("c");
    assert_eq!(world.until(60), None);
    world.election().holder = "c".into();
    assert_eq!(world.until(7), None);
    // It is still not ready and sends no heartbeat; `a` comes before `b`.
    assert_eq!(world.reason(), Some((4, "PodNotReady")));
}

#[test]
fn each_election_is_judged_by_itself() {
    let mut world = World::new();
    let other = Election {
        holder: "c".into(),
        ..world.election().clone()
    };
    world
        .view
        .elections
        .insert("external-resizer-hostdir-csi".into(), other);
    world.view.controllers.remove("c");
    world.fit.insert("external-resizer-hostdir-csi".into());
    world.look(1);
    let Verdict::Watching { take_overs, leases } = world.look(2) else {
        panic!("unexpected ghost")
    };
    let due: Vec<&str> = take_overs.iter().map(|due| due.lease.as_str()).collect();
    assert_eq!(due, ["external-resizer-hostdir-csi"]);
    assert_eq!(leases[LEASE].guilt, None);
}

#[test]
fn who_took_over_tells_where_the_ghost_was() {
    let mut world = World::new();
    world.view.controllers.remove("a");
    world.look(1);
    let Verdict::Watching { take_overs, .. } = world.look(2) else {
        panic!("unexpected ghost")
    };
    assert_eq!(take_overs[0].node.as_deref(), Some("node-a"));
}

#[test]
fn who_is_not_fit_does_not_take_over() {
    let mut world = World::new();
    world.view.controllers.remove("a");
    world.fit.clear();
    assert_eq!((world.obstacle(), world.until(60)), (Some(Obstacle::Unfit), None));
    world.fit.insert(LEASE.into());
    assert!(world.until(1).is_some());

    let mut world = World::new();
    world.view.controllers.remove("a");
    world.pod("b").ready = false;
    assert_eq!((world.obstacle(), world.until(60)), (Some(Obstacle::Standing), None));

    let mut world = World::new();
    world.view.controllers.remove("a");
    world.beating.remove("b");
    world.look(1);
    world.look(1);
    assert_eq!(
        world.until(15).map(|(second, _)| second),
        Some(1),
        "a heartbeat may be late"
    );
    for _ in 0..10 {
        world.look(2);
    }
    assert_eq!(world.obstacle(), Some(Obstacle::Standing));

    let mut world = World::new();
    world.election().holder = "b".into();
    world.pod("b").ready = false;
    for _ in 0..20 {
        world.look(2);
    }
    assert_eq!(world.obstacle(), Some(Obstacle::Itself));
}

#[test]
fn those_that_come_first_have_a_second_each() {
    for (holder, after) in [("a", 2), ("c", 3)] {
        let mut world = World::new();
        world.election().holder = holder.into();
        world.look(1);
        world.view.controllers.remove(holder);
        assert_eq!(world.reason(), Some((after, "PodGone")), "{holder}");
    }
    // A controller that may not lead does not come first.
    let mut world = World::new();
    world.election().holder = "c".into();
    world.look(1);
    world.view.controllers.remove("c");
    world.pod("a").ready = false;
    assert_eq!(world.reason(), Some((2, "PodGone")));
}

#[test]
fn who_has_never_seen_the_ghost_leaves_it_to_those_who_have() {
    let mut world = World::new();
    world.view.controllers.remove("a");
    world.dog = Watchdog::new("b".into());
    // The first look, two controllers that may lead, and three extra ranks.
    assert_eq!(world.reason(), Some((7, "PodGone")));
}

#[test]
fn after_a_hand_over_there_is_quiet_and_after_a_storm_more() {
    let mut world = World::new();
    for (number, quiet) in [45, 45, 300].into_iter().enumerate() {
        world.election().handed_over = Some(number.to_string());
        world.pod("a").node_state = NodeState::Gone;
        // The look that shows the hand-over, and the first look after the quiet time.
        assert_eq!(
            world.until(400).map(|(second, _)| second),
            Some(quiet + 1),
            "hand-over {number}"
        );
    }
    // The first two hand-overs are forgotten after ten minutes.
    world.pod("a").node_state = NodeState::Ready;
    assert_eq!(world.until(300), None);
    world.election().handed_over = Some("last".into());
    world.pod("a").node_state = NodeState::Gone;
    assert_eq!(world.until(400).map(|(second, _)| second), Some(46));
}

#[test]
fn one_that_has_just_begun_to_look_keeps_the_quiet_too() {
    let mut world = World::new();
    world.election().handed_over = Some("from c to a, because its Pod does not exist".into());
    world.election().acquired = Timestamp::UNIX_EPOCH + world.now - Duration::from_secs(20);
    world.dog = Watchdog::new("b".into());
    world.pod("a").node_state = NodeState::Gone;
    assert_eq!(world.until(60).map(|(second, _)| second), Some(25));

    // A holder that was elected since then did not get the Lease by that hand-over.
    let mut world = World::new();
    world.election().handed_over = Some("from a to c, because its Pod does not exist".into());
    world.election().acquired = Timestamp::UNIX_EPOCH + world.now - Duration::from_secs(20);
    world.dog = Watchdog::new("b".into());
    world.pod("a").node_state = NodeState::Gone;
    assert_eq!(world.until(60).map(|(second, _)| second), Some(2));

    // A deleted Lease that a ghost creates again is not a hand-over.
    let mut world = World::new();
    world.election().handed_over = Some("to a".into());
    world.until(60);
    world.election().handed_over = None;
    world.pod("a").node_state = NodeState::Gone;
    assert_eq!(world.until(60).map(|(second, _)| second), Some(2));
}

#[test]
fn another_holder_begins_anew() {
    let mut world = World::new();
    world.view.controllers.remove("a");
    world.look(1);
    // Meanwhile the Lease goes to `c`, which is fit, and then back to the ghost.
    world.election().holder = "c".into();
    assert_eq!(world.until(30), None);
    world.election().holder = "a".into();
    assert_eq!(world.reason(), Some((2, "PodGone")));
}

#[test]
fn who_is_gone_itself_is_the_ghost() {
    let is_ghost = |world: &mut World| {
        let first = world.look(1);
        assert!(!matches!(first, Verdict::Ghost(_)), "a ghost after only one look");
        matches!(world.look(1), Verdict::Ghost(_))
    };
    let mut world = World::new();
    world.view.controllers.remove("b");
    assert!(is_ghost(&mut world));
    let mut world = World::new();
    world.pod("b").node_state = NodeState::Gone;
    assert!(is_ghost(&mut world));
    // A Node without its kubelet may come back, and a terminating Pod still exists.
    let mut world = World::new();
    world.pod("b").node_state = NodeState::NotReady;
    world.pod("b").ending = true;
    assert!(!is_ghost(&mut world));
    let mut world = World::new();
    world.pod("b").uid = "another".into();
    assert!(matches!(world.look(1), Verdict::Ghost(_)));
}
