//! Every controller's watch over the leader, and over itself. What it decides by is in [`crate::leader`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, join_all};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::Api;
use kube::runtime::events::{EventType, Recorder};
use kube::{Client, Resource, ResourceExt};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::election::{Elections, HAND_OVER, Reading};
use super::{Problem, Refusal, events, request_within};
use crate::leader::{LeaseState, Obstacle, TakeOver, Verdict, Watchdog, identity};
use crate::metrics::Metrics;
use crate::volume::{Fence, Reason};

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(2);
/// When it looks again whose turn it is.
const TURN: Duration = Duration::from_secs(1);
/// How often it gives a sign of life.
const BEAT: Duration = Duration::from_secs(5);
/// When it is tried again to give one: others do not wait for long.
const RETRY: Duration = Duration::from_secs(1);
/// How long whoever is asked whether it is well may take.
const ANSWER: Duration = Duration::from_secs(2);
/// What took longer to read than this shows the world as it was.
const FRESH: Duration = Duration::from_secs(5);
/// An API server that starts refuses what it takes a moment later (it answers before it knows all Pods and rights). One that
/// has refused everything for so long means it.
const REFUSED: Duration = Duration::from_secs(15);

/// Asks somebody whether it is well.
pub type Check = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>;

/// Whom it watches over.
pub struct GuardConfig {
    /// The namespace of the Leases and of the controllers.
    pub namespace: String,
    /// The name of this controller's Pod.
    pub pod: String,
    /// The label selector of the controllers' Pods.
    pub controllers: String,
    /// Whether the driver of this controller answers.
    pub driver: Check,
    /// Whether a sidecar of this controller answers, for each by the name of the Lease that it is elected by.
    pub sidecars: BTreeMap<String, Check>,
}

/// The watch of a controller.
pub struct Guard {
    config: GuardConfig,
    me: String,
    elections: Elections,
    client: Client,
    herald: Herald,
    fence: Arc<Fence>,
    metrics: Arc<Metrics>,
}

impl Guard {
    /// A watch that closes `fence` when it finds that its own controller is the ghost.
    #[must_use]
    pub fn new(config: GuardConfig, client: Client, fence: Arc<Fence>, metrics: Arc<Metrics>) -> Self {
        let names = config.sidecars.keys().cloned().collect();
        let elections = Elections::new(client.clone(), &config.namespace, names, config.controllers.clone());
        Self {
            me: identity(&config.pod),
            elections,
            herald: Herald {
                client: client.clone(),
                recorder: events::recorder(client.clone(), config.pod.clone()),
                namespace: config.namespace.clone(),
                pod: config.pod.clone(),
            },
            client,
            config,
            fence,
            metrics,
        }
    }

    /// Watches until this controller is a ghost: then it must end, and this says why.
    pub async fn run(self) -> anyhow::Error {
        let why = tokio::select! {
            why = self.give_signs() => why,
            why = self.watch() => why,
        };
        self.fence.close(&why);
        let pod = &self.config.pod;
        error!(pod, why, "this controller is a ghost: it refuses all work and ends");
        anyhow::anyhow!("controller {pod} is a ghost: {why}")
    }

    /// Gives signs of life while there is life, until they are refused.
    async fn give_signs(&self) -> String {
        let mut last = None;
        let mut failing = Failing::default();
        let mut begun = false;
        loop {
            let mut pause = RETRY;
            match self.give_sign(last.take()).await {
                Ok(lease) => {
                    failing.ended("heartbeats are given again");
                    last = Some(lease);
                    pause = BEAT;
                    begun = true;
                }
                // It has to see all volumes and nodes first.
                Err(Sign::Ill(_)) if !begun => {}
                Err(Sign::Ill(why)) => {
                    self.metrics.failed("heartbeat");
                    failing.refused = None;
                    failing.because(&why, "no heartbeat: this controller does not answer on its own socket");
                }
                Err(Sign::Problem(problem)) => {
                    self.metrics.failed("heartbeat");
                    if let Some(why) = failing.refused(problem, true, Instant::now()) {
                        return why;
                    }
                }
            }
            sleep(pause).await;
        }
    }

    async fn give_sign(&self, last: Option<Lease>) -> Result<Lease, Sign> {
        well(&self.config.driver).await.map_err(Sign::Ill)?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.config.namespace);
        let pod = &self.config.pod;
        let uid = match &last {
            Some(lease) => lease.owner_references().first().map(|owner| owner.uid.clone()),
            None => request_within(FRESH, "read its own Pod", pods.get_metadata_opt(pod))
                .await
                .map_err(Sign::Problem)?
                .and_then(|pod| pod.metadata.uid),
        };
        // Without a Pod there is nobody to give signs for: the watch sees that, too.
        let uid = uid.ok_or(Sign::Problem(Problem::NotFound("read its own Pod")))?;
        self.elections.beat(pod, &uid, last).await.map_err(Sign::Problem)
    }

    /// Looks at the elections, and takes over where that is due, until it finds that it must end.
    async fn watch(&self) -> String {
        let (start, mut dog) = (Instant::now(), Watchdog::new(self.me.clone()));
        let (mut reading, mut writing) = (Failing::default(), Failing::default());
        let mut told = BTreeMap::new();
        let mut claims = BTreeMap::new();
        loop {
            let began = Instant::now();
            let (read, fit) = tokio::join!(timeout(FRESH, self.elections.read()), self.fit());
            let mut pause = PERIOD;
            match read {
                // This process may have stood still with the answer at hand.
                Ok(_) | Err(_) if began.elapsed() > FRESH => {
                    self.metrics.failed("watch the election");
                    reading.refused = None;
                    reading.because("it did not answer in time", "cannot watch the election; trying again");
                }
                Ok(Ok(seen)) => {
                    reading.ended("the election can be watched again");
                    self.note_claims(&seen, &mut claims);
                    match dog.look(start.elapsed(), &seen.view, &fit) {
                        Verdict::Ghost(why) => return why,
                        Verdict::Watching { take_overs, leases } => {
                            self.tell(&leases, &mut told);
                            if leases.values().any(|lease| lease.obstacle == Some(Obstacle::Turn)) {
                                pause = TURN;
                            }
                            if take_overs.is_empty() {
                                writing.ended("no Lease has to be taken over any more");
                            }
                            for due in take_overs {
                                match self.take_over(&seen, due, &mut claims).await {
                                    Ok(()) => writing.ended("the Lease can be written again"),
                                    // Decided anew, and at once: the ghost has renewed meanwhile, and will again.
                                    Err(Problem::Conflict(_)) => {
                                        writing.refused = None;
                                        pause = Duration::ZERO;
                                    }
                                    Err(problem) => {
                                        self.metrics.failed("hand over");
                                        if let Some(why) = writing.refused(problem, true, Instant::now()) {
                                            return why;
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
                Ok(Err(problem)) => {
                    self.metrics.failed("watch the election");
                    if let Some(why) = reading.refused(problem, false, Instant::now()) {
                        return why;
                    }
                }
                // It took longer than `FRESH`, see above.
                Err(_) => {}
            }
            sleep(pause.saturating_sub(began.elapsed())).await;
        }
    }

    /// The Leases that this controller could lead by.
    async fn fit(&self) -> BTreeSet<String> {
        let sidecars = self
            .config
            .sidecars
            .iter()
            .map(|(lease, check)| async move { well(check).await.is_ok().then(|| lease.clone()) });
        let (driver, sidecars) = tokio::join!(well(&self.config.driver), join_all(sidecars));
        if driver.is_err() {
            BTreeSet::new()
        } else {
            sidecars.into_iter().flatten().collect()
        }
    }

    /// Says what is new about the elections, in the log and the metrics.
    fn tell(&self, leases: &BTreeMap<String, LeaseState>, told: &mut BTreeMap<String, String>) {
        self.metrics.clear_leaders();
        for (lease, state) in leases {
            self.metrics
                .set_leader(lease, state.holder.as_deref(), state.silence, state.leaderless);
            let news = match (&state.holder, &state.guilt, state.obstacle) {
                (None, ..) => "nobody leads; the sidecars elect somebody".to_owned(),
                (Some(holder), None, _) => format!("{holder} leads"),
                (Some(holder), Some(guilt), Some(obstacle)) if obstacle != Obstacle::Turn => {
                    format!(
                        "{holder} leads and must not: {}. Not taking over: {obstacle}",
                        guilt.reason()
                    )
                }
                // It is told when it has happened.
                (Some(_), Some(_), _) => continue,
            };
            if told.get(lease) != Some(&news) {
                info!(lease, "{news}");
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
        // One whose answer was lost may take effect yet: what it wrote must be known again.
        let undecided = claims.remove(&name).filter(|(_, before)| before.holder == due.holder);
        let note = undecided.map_or_else(|| due.note(Timestamp::now(), &self.me), |(note, _)| note);
        claims.insert(name.clone(), (note.clone(), due));
        let written = self.elections.hand_over(lease, &self.me, &note).await?;
        if let Some((_, due)) = claims.remove(&name) {
            self.announce(&due, &written);
        }
        Ok(())
    }

    /// Finds the hand-overs that have taken effect though nobody said so.
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

    /// Says that a Lease was taken from a ghost: in the log, the metrics, and where people look.
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
            "{holder}{place} held Lease {name}, and must not lead: {guilt}. {} has it now and leads within seconds",
            self.me
        );
        warn!(lease = name, from = holder, reason = guilt.reason(), "{note}");
        tokio::spawn(self.herald.clone().write_events(lease.object_ref(&()), note));
    }
}

/// Hand-overs that were asked for, by Lease, until it is known what became of them: what is then written on the Lease.
type Claims = BTreeMap<String, (String, TakeOver)>;

/// Who tells people.
#[derive(Clone)]
struct Herald {
    client: Client,
    recorder: Recorder,
    namespace: String,
    pod: String,
}

impl Herald {
    /// Says it on the Lease and on the Deployment.
    async fn write_events(self, lease: ObjectReference, note: String) {
        let event = events::event(EventType::Warning, "LeaderReplaced", "HandOver", &note);
        for reference in [Some(lease), self.deployment().await].into_iter().flatten() {
            let write = self.recorder.publish(&event, &reference);
            if let Err(problem) = request_within(FRESH, "write an event", write).await {
                warn!(why = %Reason::from(problem), "no event is written");
            }
        }
    }

    /// The Deployment that this controller's Pod belongs to, by way of its ReplicaSet.
    async fn deployment(&self) -> Option<ObjectReference> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let sets: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &self.namespace);
        let pod = request_within(FRESH, "read its own Pod", pods.get_metadata(&self.pod));
        let set = controller(pod.await.ok()?.owner_references(), "ReplicaSet")?;
        let set = request_within(FRESH, "read its ReplicaSet", sets.get_metadata(&set.name));
        let owner = controller(set.await.ok()?.owner_references(), "Deployment")?;
        Some(ObjectReference {
            api_version: Some(owner.api_version),
            kind: Some(owner.kind),
            namespace: Some(self.namespace.clone()),
            name: Some(owner.name),
            uid: Some(owner.uid),
            ..ObjectReference::default()
        })
    }
}

fn controller(owners: &[OwnerReference], kind: &str) -> Option<OwnerReference> {
    owners.iter().find(|owner| owner.kind == kind).cloned()
}

/// Why no sign of life was given.
enum Sign {
    Ill(String),
    Problem(Problem),
}

async fn well(check: &Check) -> Result<(), String> {
    match timeout(ANSWER, check()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
    }
}

/// Something that is tried again and again, and said once when it begins to fail.
#[derive(Default)]
struct Failing {
    why: Option<String>,
    refused: Option<Instant>,
}

impl Failing {
    fn ended(&mut self, what: &str) {
        self.refused = None;
        if self.why.take().is_some() {
            info!("{what}");
        }
    }

    fn because(&mut self, why: &str, what: &str) {
        if self.why.as_deref() != Some(why) {
            warn!(why, "{what}");
            self.why = Some(why.to_owned());
        }
    }

    /// Why this process must end, if that follows from a problem: a token that is refused is that of a Pod that is gone.
    /// Where only we may write (`ours`), so is one that may not.
    fn refused(&mut self, problem: Problem, ours: bool, now: Instant) -> Option<String> {
        let meant = match &problem {
            Problem::Refused(Refusal::Unauthorized, _) => true,
            Problem::Refused(Refusal::Forbidden, _) => ours,
            _ => false,
        };
        let why = Reason::from(problem).to_string();
        if !meant {
            self.refused = None;
        } else if now - *self.refused.get_or_insert(now) >= REFUSED {
            return Some(format!("the API server refuses it: {why}"));
        }
        self.because(&why, "cannot take part in the election; trying again");
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::k8s::api;

    fn refused(how: Refusal) -> Problem {
        Problem::Refused(how, api("try", "no".into()))
    }

    /// After how many seconds of a refusal each second it is meant.
    fn until_meant(failing: &mut Failing, how: Refusal, ours: bool) -> Option<u64> {
        let start = Instant::now();
        (0..100).find(|second| {
            let now = start + Duration::from_secs(*second);
            failing.refused(refused(how), ours, now).is_some()
        })
    }

    #[test]
    fn only_a_refusal_that_lasts_is_meant() {
        let meant = |how, ours| until_meant(&mut Failing::default(), how, ours);
        assert_eq!(meant(Refusal::Unauthorized, false), Some(15));
        assert_eq!(meant(Refusal::Unauthorized, true), Some(15));
        assert_eq!(meant(Refusal::Forbidden, true), Some(15));
        // A right that an administrator has taken away is no proof of anything.
        assert_eq!(meant(Refusal::Forbidden, false), None);
    }

    #[test]
    fn any_other_answer_in_between_begins_anew() {
        let mut failing = Failing::default();
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), true, at(0)), None);
        assert_eq!(failing.refused(Problem::Conflict("try"), true, at(14)), None);
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), true, at(15)), None);
        failing.ended("it works again");
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), true, at(31)), None);
        let why = failing.refused(refused(Refusal::Unauthorized), true, at(46)).unwrap();
        assert!(why.contains("cannot try: no"), "{why}");
    }
}
