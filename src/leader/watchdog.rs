//! Which holder is guilty, which controller may take over, and when.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;

use super::candidate::{Candidate, Guilt, Seen};
use super::view::{Election, View};

/// The most that a gap between two looks counts: unobserved time counts against nobody.
const SEEN: Duration = Duration::from_secs(5);
/// How long a new leader may take to send a heartbeat.
const BEGIN: Duration = Duration::from_secs(8);
/// How long a Lease may have no holder, and no controller that could be one, before that is said: controllers may be starting.
const VACANT: Duration = Duration::from_secs(30);
/// How long a controller waits for each one ranked before it.
const RANK: Duration = Duration::from_secs(1);
/// How long after a hand-over no controller makes another: the term of a Lease, the time until the new leader notices, and
/// the time until the old one gives up.
const QUIET: Duration = Duration::from_secs(45);
/// This many hand-overs within [`STORM_WINDOW`] are a storm.
const STORM: usize = 3;
const STORM_WINDOW: Duration = Duration::from_mins(10);
/// How long after the last hand-over of a storm no controller makes another.
const STORM_QUIET: Duration = Duration::from_mins(5);

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
    /// How long nobody has held the Lease.
    vacant: Duration,
    /// The holder, and everybody who sends heartbeats.
    candidates: BTreeMap<String, Candidate>,
}

impl LeaseHistory {
    fn note(&mut self, lease: &str, view: &View, elapsed: Duration) {
        let election = &view.elections[lease];
        let named: BTreeSet<&String> = view.heartbeats.keys().chain([&election.holder]).collect();
        self.candidates.retain(|name, _| named.contains(name));
        for name in named {
            let candidate = self.candidates.entry(name.clone()).or_default();
            candidate.note(lease, view.heartbeats.get(name), elapsed);
        }
        self.note_holder(election, elapsed);
    }

    fn note_holder(&mut self, election: &Election, elapsed: Duration) {
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

    /// Why the holder must not lead. A new holder has [`BEGIN`] to start.
    fn guilt(&self, election: &Election) -> Option<Guilt> {
        let held = self.holder.as_ref().map_or(Duration::ZERO, |holder| holder.age);
        let guilt = self.candidates[&election.holder].guilt();
        guilt.filter(|_| held >= BEGIN)
    }

    /// How many controllers come before `me`; `None` if it may not lead itself.
    fn rank(&self, me: &str, holder: &str) -> Option<u32> {
        let mut others = self
            .candidates
            .iter()
            .filter(|(name, one)| *name != holder && one.may_lead());
        let position = others.position(|(name, _)| name == me)?;
        u32::try_from(position).ok()
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
    /// The Node that the holder runs on, or ran on when it sent its last heartbeat.
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
    /// It could not lead itself.
    Unable,
    /// The last hand-over is too recent.
    Quiet,
    /// Others come first.
    Turn,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Itself => "this controller is the holder itself",
            Self::Unable => "this controller could not lead either",
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
    /// How long the holder has sent no heartbeat that says that it could lead.
    pub(crate) silence: Duration,
    /// How many controllers could lead, the holder among them.
    pub(crate) candidates: usize,
    /// Whether nobody leads, or one that must not, and nobody could.
    pub(crate) nobody: bool,
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
    /// What was last seen of this controller's own Pod and Node, if one of them is gone.
    gone: Option<String>,
    watches: BTreeMap<String, LeaseHistory>,
}

impl Watchdog {
    /// The watchdog of the controller with this [`identity`](super::identity).
    pub(crate) fn new(me: String) -> Self {
        Self {
            me,
            uid: None,
            last: None,
            gone: None,
            watches: BTreeMap::new(),
        }
    }

    /// Judges what was seen at `now`, a time by a monotonic clock of this process. The view must be fresh: it must not have
    /// taken longer than five seconds to read.
    pub(crate) fn look(&mut self, now: Duration, view: &View) -> Verdict {
        let elapsed = self
            .last
            .map_or(Duration::ZERO, |last| now.saturating_sub(last).min(SEEN));
        self.last = Some(now);
        if let Some(why) = self.am_ghost(view) {
            return Verdict::Ghost(why);
        }
        self.watches.retain(|lease, _| view.elections.contains_key(lease));
        let mut take_overs = Vec::new();
        let mut leases = BTreeMap::new();
        for (lease, election) in &view.elections {
            let watch = self.watches.entry(lease.clone()).or_default();
            watch.note(lease, view, elapsed);
            let state = watch.judge(election, elapsed, &self.me);
            if let (Some(guilt), None) = (&state.guilt, state.obstacle) {
                take_overs.push(TakeOver {
                    lease: lease.clone(),
                    holder: election.holder.clone(),
                    node: watch.candidates[&election.holder].node.clone(),
                    guilt: guilt.clone(),
                });
            }
            leases.insert(lease.clone(), state);
        }
        Verdict::Watching { take_overs, leases }
    }

    /// Whether this controller's own Pod or Node is gone. One look can miss an object if an old copy was read; two in a row
    /// cannot.
    fn am_ghost(&mut self, view: &View) -> Option<String> {
        let gone = match (&view.own.uid, &self.uid, &view.own.node_gone) {
            (Some(now), Some(then), _) if now != then => {
                return Some("its Pod is gone, and another Pod has its name".into());
            }
            (None, ..) => Some("its Pod no longer exists".to_owned()),
            (_, _, Some(node)) => Some(format!("its Node {node} no longer exists")),
            _ => None,
        };
        if self.uid.is_none() {
            self.uid.clone_from(&view.own.uid);
        }
        let before = std::mem::replace(&mut self.gone, gone);
        self.gone.clone().filter(|_| before.is_some())
    }
}

impl LeaseHistory {
    fn judge(&mut self, election: &Election, elapsed: Duration, me: &str) -> LeaseState {
        let vacant = election.holder.is_empty() || self.is_expired(election);
        let guilt = self.guilt(election).filter(|_| !vacant);
        self.vacant = if vacant { self.vacant + elapsed } else { Duration::ZERO };
        let candidates = self.candidates.values().filter(|one| one.may_lead()).count();
        self.guilty = match (&guilt, self.guilty) {
            (None, _) => None,
            (Some(_), None) => Some(Duration::ZERO),
            (Some(_), Some(age)) => Some(age + elapsed),
        };
        let obstacle = self.guilty.and_then(|waited| match self.rank(me, &election.holder) {
            _ if election.holder == me => Some(Obstacle::Itself),
            None => Some(Obstacle::Unable),
            _ if self.is_quiet() => Some(Obstacle::Quiet),
            Some(rank) => (waited < RANK * rank).then_some(Obstacle::Turn),
        });
        LeaseState {
            holder: (!vacant).then(|| election.holder.clone()),
            silence: self.candidates[&election.holder].silence(),
            candidates,
            nobody: candidates == 0 && (guilt.is_some() || self.vacant >= VACANT),
            leaderless: if vacant || guilt.is_some() {
                elapsed
            } else {
                Duration::ZERO
            },
            guilt,
            obstacle,
        }
    }
}

#[cfg(test)]
#[path = "watchdog_tests.rs"]
mod tests;
