//! Looks at the elections again and again, and carries out what the [`Watchdog`] decides.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Resource, ResourceExt};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::failing::Failing;
use super::leases::{HAND_OVER, Reading};
use super::{FRESH, Guard};
use crate::k8s::client::Problem;
use crate::leader::{LeaseState, Obstacle, TakeOver, Verdict, View, Watchdog};

/// How often to look.
const PERIOD: Duration = Duration::from_secs(2);
/// When to look again while waiting for this controller's turn.
const TURN: Duration = Duration::from_secs(1);

/// What is kept from one look to the next.
struct Memory {
    start: Instant,
    watchdog: Watchdog,
    reading: Failing,
    writing: Failing,
    /// What was last logged, by Lease.
    told: BTreeMap<String, String>,
    claims: Claims,
}

impl Memory {
    fn new(me: String) -> Self {
        Self {
            start: Instant::now(),
            watchdog: Watchdog::new(me),
            reading: Failing::default(),
            writing: Failing::default(),
            told: BTreeMap::new(),
            claims: Claims::new(),
        }
    }
}

/// Hand-overs whose outcome is not known yet, by Lease, each with the note that it writes on the Lease.
type Claims = BTreeMap<String, (String, TakeOver)>;

/// What to do after a look.
enum Next {
    Pause(Duration),
    /// This controller must end, and why.
    Ghost(String),
}

impl Guard {
    /// Looks at the elections, and takes over where that is due, until it finds that it must end.
    pub(super) async fn run_watchdog(&self) -> String {
        let mut memory = Memory::new(self.me.clone());
        loop {
            let began = Instant::now();
            match self.look_once(&mut memory).await {
                Next::Ghost(why) => return why,
                Next::Pause(pause) => sleep(pause.saturating_sub(began.elapsed())).await,
            }
        }
    }

    async fn look_once(&self, memory: &mut Memory) -> Next {
        let began = Instant::now();
        let read = timeout(FRESH, self.elections.read()).await;
        // This process may have been paused after the answer arrived.
        let late = began.elapsed() > FRESH;
        match read {
            Ok(Ok(seen)) if !late => {
                memory.reading.ended("the election can be watched again");
                self.note_claims(&seen, &mut memory.claims);
                self.note_leases(&seen.view);
                let verdict = memory.watchdog.look(memory.start.elapsed(), &seen.view);
                self.act(&seen, verdict, memory).await
            }
            Ok(Err(problem)) if !late => {
                self.metrics.failed("watch the election");
                let end = memory.reading.refused(problem, Instant::now());
                end.map_or(Next::Pause(PERIOD), Next::Ghost)
            }
            Ok(_) | Err(_) => {
                self.metrics.failed("watch the election");
                let why = "the API server did not answer in time";
                memory.reading.refused = None;
                memory.reading.because(why, "cannot watch the election; trying again");
                Next::Pause(PERIOD)
            }
        }
    }

    async fn act(&self, seen: &Reading, verdict: Verdict, memory: &mut Memory) -> Next {
        let (take_overs, leases) = match verdict {
            Verdict::Ghost(why) => return Next::Ghost(why),
            Verdict::Watching { take_overs, leases } => (take_overs, leases),
        };
        self.tell(seen, &leases, &mut memory.told);
        let waits = leases.values().any(|lease| lease.obstacle == Some(Obstacle::Turn));
        let mut pause = if waits { TURN } else { PERIOD };
        if take_overs.is_empty() {
            memory.writing.ended("no Lease needs to be taken over any more");
        }
        for due in take_overs {
            match self.take_over(seen, due, &mut memory.claims).await {
                Ok(()) => memory.writing.ended("the Lease can be written again"),
                // Look again at once: the ghost has renewed the Lease meanwhile, and will again.
                Err(Problem::Conflict(_)) => {
                    memory.writing.refused = None;
                    pause = Duration::ZERO;
                }
                Err(problem) => {
                    self.metrics.failed("hand over");
                    if let Some(why) = memory.writing.refused(problem, Instant::now()) {
                        return Next::Ghost(why);
                    }
                }
            }
        }
        Next::Pause(pause)
    }

    /// Notes which Leases this controller holds.
    fn note_leases(&self, view: &View) {
        let held = view.elections.iter().filter(|(_, election)| election.holder == self.me);
        *self.leads.lock().unwrap_or_else(PoisonError::into_inner) = held.map(|(lease, _)| lease.clone()).collect();
    }

    /// Reports what is new about the elections, in the log and the metrics.
    fn tell(&self, seen: &Reading, leases: &BTreeMap<String, LeaseState>, told: &mut BTreeMap<String, String>) {
        self.metrics.clear_leaders();
        for (lease, state) in leases {
            self.metrics
                .set_leader(lease, state.holder.as_deref(), state.silence, state.leaderless);
            self.metrics.set_candidates(lease, state.candidates);
            let news = match (&state.holder, &state.guilt, state.obstacle) {
                (None, ..) if state.nobody => "nobody leads, and nobody could lead".to_owned(),
                (None, ..) => "nobody leads; the sidecars elect a leader".to_owned(),
                (Some(holder), None, _) => format!("{holder} leads"),
                (Some(holder), Some(guilt), _) if state.nobody => {
                    let reason = guilt.reason();
                    format!("{holder} holds the Lease but must not lead ({reason}), and nobody else could lead")
                }
                (Some(holder), Some(guilt), Some(obstacle)) if obstacle != Obstacle::Turn => {
                    let reason = guilt.reason();
                    format!("{holder} leads but must not lead ({reason}); not taking over: {obstacle}")
                }
                // The hand-over is announced when it has happened.
                (Some(_), Some(_), _) => continue,
            };
            if told.get(lease) != Some(&news) {
                info!(lease, "{news}");
                if state.nobody {
                    let why = state
                        .guilt
                        .as_ref()
                        .map_or_else(String::new, |guilt| format!(": {guilt}"));
                    self.announce_nobody(seen, lease, &format!("{news}{why}"));
                }
                told.insert(lease.clone(), news);
            }
        }
        told.retain(|lease, _| leases.contains_key(lease));
    }

    async fn take_over(&self, seen: &Reading, due: TakeOver, claims: &mut Claims) -> Result<(), Problem> {
        let Some(lease) = seen.leases.get(&due.lease) else {
            return Ok(());
        };
        let name = due.lease.clone();
        // A hand-over whose answer was lost may still take effect: the same note lets it be recognized.
        let undecided = claims.remove(&name).filter(|(_, before)| before.holder == due.holder);
        let note = undecided.map_or_else(|| due.note(Timestamp::now(), &self.me), |(note, _)| note);
        claims.insert(name.clone(), (note.clone(), due));
        let written = self.elections.hand_over(lease, &self.me, &note).await?;
        if let Some((_, due)) = claims.remove(&name) {
            self.announce(&due, &written);
        }
        Ok(())
    }

    /// Finds the hand-overs that took effect although their answer was lost.
    fn note_claims(&self, seen: &Reading, claims: &mut Claims) {
        claims.retain(|name, (note, due)| {
            let Some(lease) = seen.leases.get(name) else {
                return false;
            };
            let took_effect = lease.annotations().get(HAND_OVER) == Some(note);
            if took_effect {
                self.announce(due, lease);
            }
            !took_effect
        });
    }

    /// Announces that a Lease was taken from a ghost: in the log, the metrics and Events.
    fn announce(&self, due: &TakeOver, lease: &Lease) {
        let TakeOver {
            lease: name,
            holder,
            node,
            guilt,
        } = due;
        self.metrics.handed_over(name, guilt.reason());
        let place = node
            .as_ref()
            .map_or_else(String::new, |node| format!(" on node {node}"));
        let note = format!(
            "{holder}{place} held Lease {name} but must not lead: {guilt}; {} holds it now and leads within seconds",
            self.me
        );
        warn!(lease = name, from = holder, reason = guilt.reason(), "{note}");
        let event = self
            .announcer
            .clone()
            .write_events("LeaderReplaced", lease.object_ref(&()), note);
        tokio::spawn(event);
    }

    /// Announces that nobody could lead.
    fn announce_nobody(&self, seen: &Reading, lease: &str, note: &str) {
        if let Some(object) = seen.leases.get(lease) {
            let note = format!("{note}. Correct what `hostdir leader` says about each controller");
            let event = self
                .announcer
                .clone()
                .write_events("NobodyCanLead", object.object_ref(&()), note);
            tokio::spawn(event);
        }
    }
}
