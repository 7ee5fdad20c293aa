//! Who could lead, as heartbeats say.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;

use super::view::Heartbeat;

/// How long heartbeats may be missing: four are due in that time.
pub(super) const SILENT: Duration = Duration::from_secs(12);
/// How long a controller may have no heartbeat at all: it is deleted with its Pod. If somebody deletes it by mistake, it is back
/// with the next one.
const ABSENT: Duration = Duration::from_secs(5);

/// A value, and how long it was observed.
#[derive(Clone, Debug)]
pub(super) struct Seen<T> {
    pub(super) value: T,
    pub(super) age: Duration,
}

impl<T: PartialEq> Seen<T> {
    /// Notes a value, `elapsed` after the previous look. Returns whether it replaces a different value.
    pub(super) fn note(slot: &mut Option<Self>, value: T, elapsed: Duration) -> bool {
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

/// What is known of a controller that leads, or may lead, one election.
#[derive(Debug, Default)]
pub(super) struct Candidate {
    /// The last heartbeat that said that it could lead: when it was sent, and how long ago it came.
    heartbeat: Option<Seen<Option<Timestamp>>>,
    /// Its Node, once it has sent a heartbeat.
    pub(super) node: Option<String>,
    /// How long it has had no heartbeat, if it has none.
    absent: Option<Duration>,
    /// Whether its latest heartbeat says that it could lead, and why not if it says that.
    able: bool,
    why: Option<String>,
}

impl Candidate {
    pub(super) fn note(&mut self, lease: &str, heartbeat: Option<&Heartbeat>, elapsed: Duration) {
        let able = heartbeat.filter(|heartbeat| heartbeat.can_lead(lease));
        self.able = able.is_some();
        self.node = heartbeat.map(|heartbeat| heartbeat.node.clone()).or(self.node.take());
        self.absent = match (heartbeat, self.absent) {
            (Some(_), _) => None,
            (None, None) => Some(Duration::ZERO),
            (None, Some(age)) => Some(age + elapsed),
        };
        self.why = heartbeat.and_then(|heartbeat| heartbeat.cannot_lead(lease).map(str::to_owned));
        let last = self.heartbeat.as_ref().and_then(|seen| seen.value);
        Seen::note(&mut self.heartbeat, able.map_or(last, |beat| Some(beat.sent)), elapsed);
    }

    /// How long it has sent no such heartbeat, as observed from here.
    pub(super) fn silence(&self) -> Duration {
        self.heartbeat.as_ref().map_or(Duration::ZERO, |seen| seen.age)
    }

    /// Why it must not lead.
    pub(super) fn guilt(&self) -> Option<Guilt> {
        let silence = self.silence();
        let absent = self.absent.is_some_and(|age| age >= ABSENT);
        (absent || silence >= SILENT).then(|| Guilt {
            silence: if absent { Duration::MAX } else { silence },
            why: self.why.clone(),
        })
    }

    pub(super) fn may_lead(&self) -> bool {
        self.able && self.silence() < SILENT
    }
}

/// Why a holder must not lead: it has sent no heartbeat that says that it could.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Guilt {
    /// For how long; [`Duration::MAX`] if it has no heartbeat.
    pub(crate) silence: Duration,
    /// Why it could not lead, if its heartbeats say so.
    pub(crate) why: Option<String>,
}

impl Guilt {
    /// Why the sender of a heartbeat could not lead an election, judged by a single look. `silence` is how long ago the
    /// heartbeat was sent.
    pub(crate) fn at_first_sight(lease: &str, heartbeat: Option<&Heartbeat>, silence: Duration) -> Option<Self> {
        let could = heartbeat.is_some_and(|heartbeat| heartbeat.can_lead(lease) && silence < SILENT);
        (!could).then(|| Self {
            silence: heartbeat.map_or(Duration::MAX, |_| silence),
            why: heartbeat.and_then(|heartbeat| heartbeat.cannot_lead(lease).map(str::to_owned)),
        })
    }

    /// The reason as one word, for metrics.
    pub(crate) fn reason(&self) -> &'static str {
        if self.why.is_some() { "Unable" } else { "Silent" }
    }
}

impl fmt::Display for Guilt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.why, self.silence) {
            (Some(why), _) => f.write_str(why),
            (None, Duration::MAX) => f.write_str("it has no heartbeat: its Pod is gone, or it never sent one"),
            (None, silence) => write!(f, "its driver has sent no heartbeat for {} s", silence.as_secs()),
        }
    }
}
