//! Which holder is guilty, which controller may take over, and when.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;

use super::guilt::{Guilt, SILENT, Standing};
use super::view::{ControllerPod, Election, View};

/// The most that a gap between two looks counts: unobserved time counts against nobody.
const SEEN: Duration = Duration::from_secs(5);
/// A watchdog that has just started waits this long for a heartbeat, even if the holder's sidecar has renewed the Lease for
/// longer than [`SILENT`] since the last one. A heartbeat is due in that time.
const WAITED: Duration = Duration::from_secs(6);
/// Looks further apart than this are not continuous.
const GLANCE: Duration = Duration::from_secs(3);
/// How long a new leader may take to become ready, or to send a heartbeat.
const BEGIN: Duration = Duration::from_secs(8);
/// How long a controller waits for each one ranked before it.
const RANK: Duration = Duration::from_secs(1);
/// Extra ranks a controller yields if it never saw the holder's Pod.
const STRANGER: usize = 3;
/// How long after a hand-over no controller makes another: the term of a Lease, the time until the new leader notices, and
/// the time until the old one gives up.
const QUIET: Duration = Duration::from_secs(45);
/// This many hand-overs within [`STORM_WINDOW`] are a storm.
const STORM: usize = 3;
const STORM_WINDOW: Duration = Duration::from_mins(10);
/// How long after the last hand-over of a storm no controller makes another.
const STORM_QUIET: Duration = Duration::from_mins(5);

/// A value, and how long it was observed.
#[derive(Clone, Debug)]
struct Seen<T> {
    value: T,
    age: Duration,
}

impl<T: PartialEq> Seen<T> {
    /// Notes a value, `elapsed` after the previous look. Returns whether it replaces a different value.
    fn note(slot: &mut Option<Self>, value: T, elapsed: Duration) -> bool {
        match slot {
            Some(seen) if seen.value == value => {
                seen.age += elapsed;
                false
            }
            Some(_) | None => slot
                .replace(Self {
                    value,
                    age: Duration::ZERO,
                })
                .is_some(),
        }
    }
}

/// What is known of a controller that leads or may lead.
#[derive(Debug, Default)]
struct Suspect {
    standing: Option<Seen<Standing>>,
    heartbeat: Option<Seen<Option<Timestamp>>>,
    /// How long that heartbeat has been the last one, over continuous looks ([`GLANCE`]).
    waited: Duration,
}

impl Suspect {
    fn note(&mut self, controller: Option<&ControllerPod>, heartbeat: Option<Timestamp>, elapsed: Duration) {
        Seen::note(&mut self.standing, Standing::of(controller), elapsed);
        let beats = Seen::note(&mut self.heartbeat, heartbeat, elapsed);
        self.waited = if beats || elapsed > GLANCE {
            Duration::ZERO
        } else {
            self.waited + elapsed
        };
    }

    /// How long it has sent no heartbeat: as observed from here, or by its own clock, which its sidecar shares.
    fn silence(&self, renewal: Timestamp) -> Duration {
        let Some(heartbeat) = &self.heartbeat else {
            return Duration::ZERO;
        };
        let by_its_clock = heartbeat.value.map_or(Duration::ZERO, |last| {
            renewal.duration_since(last).try_into().unwrap_or_default()
        });
        if self.waited >= WAITED {
            heartbeat.age.max(by_its_clock)
        } else {
            heartbeat.age
        }
    }

    /// Why it must not lead. `node` is its Node, if known, and `held` is how long it has held the Lease: a new holder has
    /// [`BEGIN`] to start.
    fn guilt(&self, node: Option<&str>, renewal: Timestamp, held: Duration) -> Option<Guilt> {
        let Seen { value, age } = self.standing.as_ref()?;
        let has_begun = held >= BEGIN;
        let counts = *age >= value.patience() && (has_begun || *value != Standing::PodNotReady);
        let by_standing = value.guilt(node, *age).filter(|_| counts);
        by_standing.or_else(|| {
            let silence = self.silence(renewal);
            (silence >= SILENT && has_begun).then_some(Guilt::Silent(silence))
        })
    }

    /// Whether it may lead.
    fn may_lead(&self) -> bool {
        let good = |seen: &Seen<Standing>| seen.value == Standing::Good;
        let beats = |seen: &Seen<Option<Timestamp>>| seen.value.is_some() && seen.age < SILENT;
        self.standing.as_ref().is_some_and(good) && self.heartbeat.as_ref().is_some_and(beats)
    }
}

/// The observed history of one Lease.
#[derive(Debug, Default)]
struct LeaseHistory {
    holder: Option<Seen<String>>,
    renewal: Option<Seen<Timestamp>>,
    handed_over: Option<Seen<Option<String>>>,
    /// How long ago each hand-over was seen, latest first.
    hand_overs: VecDeque<Duration>,
    /// How long this holder has been guilty; `None` if it is not.
    guilty: Option<Duration>,
}

impl LeaseHistory {
    fn note(&mut self, election: &Election, elapsed: Duration) {
        if Seen::note(&mut self.holder, election.holder.clone(), elapsed) {
            self.guilty = None;
        }
        Seen::note(&mut self.renewal, election.renewal, elapsed);
        for age in &mut self.hand_overs {
            *age += elapsed;
        }
        self.hand_overs.retain(|age| *age < STORM_WINDOW);
        let first = self.handed_over.is_none();
        let another = Seen::note(&mut self.handed_over, election.handed_over.clone(), elapsed);
        if election.handed_over.is_none() {
            return;
        }
        if another {
            self.hand_overs.push_front(Duration::ZERO);
        } else if first && election.is_handed_over() {
            // On the first look, the age of the hand-over is taken from the holder's clock.
            let held = election.renewal.duration_since(election.acquired);
            self.hand_overs.push_front(held.try_into().unwrap_or_default());
        }
    }

    fn is_expired(&self, election: &Election) -> bool {
        let term = Duration::from_secs(election.term);
        self.renewal.as_ref().is_some_and(|renewal| renewal.age >= term)
    }

    fn is_quiet(&self) -> bool {
        let quiet = if self.hand_overs.len() >= STORM {
            STORM_QUIET
        } else {
            QUIET
        };
        self.hand_overs.front().is_some_and(|last| *last < quiet)
    }
}

/// A hand-over that is due: this controller is to write its own name into the Lease, at the version that was just read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TakeOver {
    pub(crate) lease: String,
    pub(crate) holder: String,
    /// The Node that the holder runs on, or ran on when its Pod was last seen.
    pub(crate) node: Option<String>,
    pub(crate) guilt: Guilt,
}

impl TakeOver {
    /// The note that is written on the Lease: when it went from the holder to `me`, and why.
    pub(crate) fn note(&self, now: Timestamp, me: &str) -> String {
        format!("{now}: from {} to {me}, because {}", self.holder, self.guilt)
    }
}

impl Election {
    /// Whether the holder got the Lease by the last hand-over, according to its note ([`TakeOver::note`]).
    fn is_handed_over(&self) -> bool {
        let to = format!(" to {}, because ", self.holder);
        self.handed_over.as_ref().is_some_and(|note| note.contains(&to))
    }
}

/// Why a controller leaves a guilty holder alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// This controller is the holder itself.
    Itself,
    /// Its driver or its sidecar does not answer.
    Unfit,
    /// Its own Pod or Node is not ready, or its heartbeat has stopped.
    Standing,
    /// The last hand-over is too recent.
    Quiet,
    /// Others come first, or the holder has been guilty for only one look.
    Turn,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Itself => "this controller is the holder itself",
            Self::Unfit => "the driver or the sidecar of this controller does not answer",
            Self::Standing => "the Pod or the Node of this controller is not ready, or its heartbeat has stopped",
            Self::Quiet => "the last hand-over is too recent",
            Self::Turn => "this controller waits for its turn",
        })
    }
}

/// What is known of one election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseState {
    /// Who holds the Lease; `None` if it is empty or has expired.
    pub(crate) holder: Option<String>,
    /// How long the holder has sent no heartbeat.
    pub(crate) silence: Duration,
    /// Why the holder must not lead.
    pub(crate) guilt: Option<Guilt>,
    /// How much of the time since the last look counts as time without a leader that may lead.
    pub(crate) leaderless: Duration,
    /// Why this controller leaves a guilty holder alone.
    pub(crate) obstacle: Option<Obstacle>,
}

/// The result of a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// This controller is itself a ghost and must end; the text says why.
    Ghost(String),
    /// This controller goes on watching.
    Watching {
        /// The hand-overs that are due.
        take_overs: Vec<TakeOver>,
        /// The elections, by the names of their Leases.
        leases: BTreeMap<String, LeaseState>,
    },
}

/// Looks at the elections for one controller, and remembers what it saw.
#[derive(Debug)]
pub(crate) struct Watchdog {
    me: String,
    /// The UID of this controller's Pod, once it was seen.
    uid: Option<String>,
    last: Option<Duration>,
    suspects: BTreeMap<String, Suspect>,
    /// The Node that each controller was last seen on. Never pruned: an update replaces this process together with the
    /// others, so there are never many.
    places: BTreeMap<String, String>,
    watches: BTreeMap<String, LeaseHistory>,
}

impl Watchdog {
    /// The watchdog of the controller with this [`identity`](super::identity).
    pub(crate) fn new(me: String) -> Self {
        Self {
            me,
            uid: None,
            last: None,
            suspects: BTreeMap::new(),
            places: BTreeMap::new(),
            watches: BTreeMap::new(),
        }
    }

    /// Judges what was seen at `now`, a time by a monotonic clock of this process. The view must be fresh: it must not have
    /// taken longer than five seconds to read.
    ///
    /// `fit` are the Leases that this controller could hold: it answers, and so does its sidecar for that Lease.
    pub(crate) fn look(&mut self, now: Duration, view: &View, fit: &BTreeSet<String>) -> Verdict {
        let elapsed = self
            .last
            .map_or(Duration::ZERO, |last| now.saturating_sub(last).min(SEEN));
        self.last = Some(now);
        self.note(view, elapsed);
        if let Some(why) = self.am_ghost(view) {
            return Verdict::Ghost(why);
        }
        let mut take_overs = Vec::new();
        let mut leases = BTreeMap::new();
        for (lease, election) in &view.elections {
            let state = self.judge(lease, election, elapsed, fit.contains(lease));
            if let (Some(guilt), None) = (&state.guilt, state.obstacle) {
                take_overs.push(TakeOver {
                    lease: lease.clone(),
                    holder: election.holder.clone(),
                    node: self.places.get(&election.holder).cloned(),
                    guilt: guilt.clone(),
                });
            }
            leases.insert(lease.clone(), state);
        }
        Verdict::Watching { take_overs, leases }
    }

    fn note(&mut self, view: &View, elapsed: Duration) {
        let holders = view.elections.values().map(|election| &election.holder);
        let named: BTreeSet<&String> = view.controllers.keys().chain(holders).chain([&self.me]).collect();
        self.suspects.retain(|name, _| named.contains(name));
        for name in named {
            let suspect = self.suspects.entry(name.clone()).or_default();
            suspect.note(view.controllers.get(name), view.heartbeats.get(name).copied(), elapsed);
        }
        let places = view.controllers.iter();
        self.places
            .extend(places.map(|(name, controller)| (name.clone(), controller.node.clone())));
        self.watches.retain(|lease, _| view.elections.contains_key(lease));
        for (lease, election) in &view.elections {
            self.watches.entry(lease.clone()).or_default().note(election, elapsed);
        }
        if self.uid.is_none() {
            self.uid = view.controllers.get(&self.me).map(|pod| pod.uid.clone());
        }
    }

    /// One look can miss an object if an old copy was read; two in a row cannot.
    fn am_ghost(&self, view: &View) -> Option<String> {
        let me = view.controllers.get(&self.me);
        if let (Some(pod), Some(uid)) = (me, &self.uid)
            && pod.uid != *uid
        {
            return Some("its Pod is gone, and another Pod has its name".into());
        }
        let standing = self.suspects.get(&self.me)?.standing.as_ref()?;
        if standing.age.is_zero() {
            return None;
        }
        match standing.value {
            Standing::PodGone => Some("its Pod no longer exists".into()),
            Standing::NodeGone => me.map(|pod| format!("its Node {} no longer exists", pod.node)),
            _ => None,
        }
    }

    fn judge(&mut self, lease: &str, election: &Election, elapsed: Duration, fit: bool) -> LeaseState {
        let rank = self.rank(&election.holder);
        let is_mine = election.holder == self.me;
        let suspect = &self.suspects[&election.holder];
        let node = self.places.get(&election.holder).map(String::as_str);
        let silence = suspect.silence(election.renewal);
        let watch = self.watches.get_mut(lease).expect("noted just now");
        let vacant = election.holder.is_empty() || watch.is_expired(election);
        let held = watch.holder.as_ref().map_or(Duration::ZERO, |holder| holder.age);
        let guilt = suspect.guilt(node, election.renewal, held).filter(|_| !vacant);
        match (&guilt, watch.guilty) {
            (None, _) => watch.guilty = None,
            (Some(_), None) => watch.guilty = Some(Duration::ZERO),
            (Some(_), Some(age)) => watch.guilty = Some(age + elapsed),
        }
        let obstacle = guilt.as_ref().and_then(|_| {
            let waited = watch.guilty.unwrap_or_default();
            match rank {
                _ if is_mine => Some(Obstacle::Itself),
                _ if !fit => Some(Obstacle::Unfit),
                None => Some(Obstacle::Standing),
                _ if watch.is_quiet() => Some(Obstacle::Quiet),
                // Plus one, because one look can miss an object.
                Some(rank) => (waited < RANK * (rank + 1)).then_some(Obstacle::Turn),
            }
        });
        LeaseState {
            holder: (!vacant).then(|| election.holder.clone()),
            silence,
            leaderless: if vacant || guilt.is_some() {
                elapsed
            } else {
                Duration::ZERO
            },
            guilt,
            obstacle,
        }
    }

    /// How many controllers may come before this one; `None` if it may not lead. A controller that never saw the holder's
    /// Pod cannot tell where the ghost runs, and comes after all that can.
    fn rank(&self, holder: &str) -> Option<u32> {
        let may_lead = |(name, one): &(&String, &Suspect)| name.as_str() != holder && one.may_lead();
        let others: Vec<&String> = self.suspects.iter().filter(may_lead).map(|(name, _)| name).collect();
        let position = others.iter().position(|name| **name == self.me)?;
        let behind = if self.places.contains_key(holder) {
            0
        } else {
            others.len() + STRANGER
        };
        u32::try_from(position + behind).ok()
    }
}

#[cfg(test)]
#[path = "watchdog_tests.rs"]
mod tests;
