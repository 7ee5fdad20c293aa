//! Who is guilty, who may take over, and when.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;

use super::guilt::{Guilt, SILENT, Standing};
use super::view::{ControllerPod, Election, View};

/// Gaps between two looks that are longer than this count as unobserved: what was not seen counts against nobody.
const SEEN: Duration = Duration::from_secs(5);
/// A watchdog that has just started waits this long for a heartbeat, even if the holder's sidecar has renewed for longer than
/// [`SILENT`] since the last one. One is due in that time.
const WAITED: Duration = Duration::from_secs(6);
/// Looks further apart than this are not continuous.
const GLANCE: Duration = Duration::from_secs(3);
/// How long a new leader may take to become ready, or to give a heartbeat.
const BEGIN: Duration = Duration::from_secs(8);
/// How long a controller waits for each one ranked before it.
const RANK: Duration = Duration::from_secs(1);
/// Extra ranks a controller yields if it never saw the holder's Pod.
const STRANGER: usize = 3;
/// How long after a hand-over nobody makes another: the term of a Lease, the time until a new leader knows, and the time until
/// an old one gives up.
const QUIET: Duration = Duration::from_secs(45);
/// This many hand-overs within [`STORM_WINDOW`] are a storm.
const STORM: usize = 3;
const STORM_WINDOW: Duration = Duration::from_mins(10);
/// How long after the last hand-over of a storm nobody makes another.
const STORM_QUIET: Duration = Duration::from_mins(5);

/// A value, and for how long it has been seen to be that.
#[derive(Clone, Debug)]
struct Seen<T> {
    value: T,
    age: Duration,
}

impl<T: PartialEq> Seen<T> {
    /// Takes note of a value, `elapsed` after the last time; whether it is another one.
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

/// What is known of one who leads or may lead.
#[derive(Debug, Default)]
struct Suspect {
    standing: Option<Seen<Standing>>,
    heartbeat: Option<Seen<Option<Timestamp>>>,
    /// For how long that heartbeat was the last, with no look missing in between.
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

    /// For how long it has been silent: as seen from here, or by its own clock, which is that of its sidecar, too.
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

    /// Why it must not lead. `node` is where it is, as far as known, `held` for how long it has held the Lease: what was before that counts for little.
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

/// One Lease, over time.
#[derive(Debug, Default)]
struct LeaseHistory {
    holder: Option<Seen<String>>,
    renewal: Option<Seen<Timestamp>>,
    handed_over: Option<Seen<Option<String>>>,
    /// How long ago hand-overs were seen, the latest first.
    hand_overs: VecDeque<Duration>,
    /// For how long this holder has been guilty; nothing before it was.
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
            // Whoever begins to look goes by the clock of the holder for how long ago it was.
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

/// A hand-over that is due: write the own name into this Lease, at the version that was just read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TakeOver {
    pub(crate) lease: String,
    pub(crate) holder: String,
    /// The Node it runs on, or ran on when its Pod was seen last.
    pub(crate) node: Option<String>,
    pub(crate) guilt: Guilt,
}

impl TakeOver {
    /// What is written on the Lease: when it went from whom to whom (`me`), and why.
    pub(crate) fn note(&self, now: Timestamp, me: &str) -> String {
        format!("{now}: from {} to {me}, because {}", self.holder, self.guilt)
    }
}

impl Election {
    /// Whether its holder has it by the last hand-over, as [`TakeOver::note`] says.
    fn is_handed_over(&self) -> bool {
        let to = format!(" to {}, because ", self.holder);
        self.handed_over.as_ref().is_some_and(|note| note.contains(&to))
    }
}

/// Why a controller leaves a guilty holder alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// It is the holder itself.
    Itself,
    /// Its driver or its sidecar does not answer.
    Unfit,
    /// Its own Pod, Node or heartbeat is not what it should be.
    Standing,
    /// There was a hand-over a short while ago.
    Quiet,
    /// Others may come first, or the holder has been guilty for one look only.
    Turn,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Itself => "it is this controller itself",
            Self::Unfit => "the driver or the sidecar of this controller does not answer",
            Self::Standing => "the Pod, the Node or the heartbeat of this controller is not well",
            Self::Quiet => "there was a hand-over a short while ago, and another would be a storm",
            Self::Turn => "this controller waits for its turn",
        })
    }
}

/// What is known of one election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseState {
    /// Who holds the Lease; nobody if it is empty or has expired.
    pub(crate) holder: Option<String>,
    /// For how long its holder has given no heartbeat.
    pub(crate) silence: Duration,
    /// Why the holder must not lead.
    pub(crate) guilt: Option<Guilt>,
    /// For how long it was seen that nobody led who may, since the last look.
    pub(crate) leaderless: Duration,
    /// Why this controller leaves a guilty holder alone.
    pub(crate) obstacle: Option<Obstacle>,
}

/// What follows from a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The one who looks is itself the ghost, and must end: why.
    Ghost(String),
    /// The world is well, or not.
    Watching {
        /// What is to be done about it.
        take_overs: Vec<TakeOver>,
        /// The elections, by the names of their Leases.
        leases: BTreeMap<String, LeaseState>,
    },
}

/// One who looks, and remembers.
#[derive(Debug)]
pub(crate) struct Watchdog {
    me: String,
    /// The UID of the own Pod, once it was seen.
    uid: Option<String>,
    last: Option<Duration>,
    suspects: BTreeMap<String, Suspect>,
    /// The Nodes that controllers were on when they were seen last, for as long as this one lives: with it go the others, at
    /// the next update, so that there are never many.
    places: BTreeMap<String, String>,
    watches: BTreeMap<String, LeaseHistory>,
}

impl Watchdog {
    /// One who looks for the controller of this [`identity`](super::identity).
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

    /// Takes in what was seen at `now`, a time by a clock of one's own that never goes back. A view must be fresh: whatever
    /// took longer than five seconds to read is not one.
    ///
    /// `fit` are the Leases that this controller could lead by: it answers, and so does the sidecar that holds such a Lease.
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

    /// One look can be wrong about what is not there, if an old copy was read. Two are not.
    fn am_ghost(&self, view: &View) -> Option<String> {
        let me = view.controllers.get(&self.me);
        if let (Some(pod), Some(uid)) = (me, &self.uid)
            && pod.uid != *uid
        {
            return Some("its Pod is gone, and another has its name".into());
        }
        let standing = self.suspects.get(&self.me)?.standing.as_ref()?;
        if standing.age.is_zero() {
            return None;
        }
        match standing.value {
            Standing::PodGone => Some("its Pod does not exist any more".into()),
            Standing::NodeGone => me.map(|pod| format!("its Node {} does not exist any more", pod.node)),
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
                // One more: one look can be wrong about what is not there.
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

    /// How many may come before this controller; nothing if it may not lead. Who has never seen the holder's Pod cannot say
    /// where the ghost is, and comes after all who can.
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
