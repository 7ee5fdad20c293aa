//! Every controller watches the leader and itself: it sends heartbeats, which say what it could lead, and takes over the Lease of
//! a leader that must not lead. [`crate::leader`] makes the decisions.

mod events;
mod failing;
mod leases;
mod report;
mod watchdog;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, join_all};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use tokio::time::{sleep, timeout};
use tracing::{error, warn};

use crate::k8s::client::Problem;
use crate::k8s::controller::Backlog;
use crate::leader::identity;
use crate::metrics::Metrics;
use crate::volume::Fence;
use events::Announcer;
use failing::Failing;
use leases::Elections;
use work::Work;

pub(crate) use report::report;

/// How often to send a heartbeat.
const BEAT: Duration = Duration::from_secs(3);
/// When to try again after a failed heartbeat: others do not wait long.
const RETRY: Duration = Duration::from_secs(1);
/// How long a driver or a sidecar may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// After how long a driver that does not answer its own socket ends: the kubelet starts it anew, and if there is no kubelet, it
/// is in nobody's way.
const HUNG: Duration = Duration::from_mins(1);
/// How often to ask whether the admission policy is in force.
const POLICY: Duration = Duration::from_mins(5);
/// An answer that took longer than this is out of date.
const FRESH: Duration = Duration::from_secs(5);

/// Asks whether the driver works.
type Check = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>;
/// Gets a path from a sidecar over HTTP; fails unless the status is a success.
pub(crate) type Get = Arc<dyn Fn(&'static str) -> BoxFuture<'static, anyhow::Result<String>> + Send + Sync>;

pub(crate) struct GuardConfig {
    /// The namespace of the Leases and of the controllers.
    pub(crate) namespace: String,
    /// The name of this controller's Pod.
    pub(crate) pod: String,
    /// Whether the driver of this controller answers on its own socket.
    pub(crate) alive: Check,
    /// Whether it also works.
    pub(crate) ready: Check,
    /// Each sidecar of this controller, by the name of the Lease that it is elected by.
    pub(crate) sidecars: BTreeMap<String, Get>,
}

/// Watches the elections for one controller.
pub(crate) struct Guard {
    config: GuardConfig,
    me: String,
    elections: Elections,
    work: Work,
    /// The Leases that this controller holds, as it last saw.
    leads: Mutex<BTreeSet<String>>,
    announcer: Announcer,
    fence: Arc<Fence>,
    metrics: Arc<Metrics>,
}

impl Guard {
    /// Closes `fence` when this controller is a ghost.
    pub(crate) fn new(
        config: GuardConfig,
        client: Client,
        backlog: Arc<Backlog>,
        fence: Arc<Fence>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let names = config.sidecars.keys().cloned().collect();
        Self {
            me: identity(&config.pod),
            elections: Elections::new(client.clone(), &config.namespace, names, config.pod.clone()),
            work: Work::new(backlog),
            leads: Mutex::default(),
            announcer: Announcer::new(client, config.namespace.clone(), config.pod.clone()),
            config,
            fence,
            metrics,
        }
    }

    /// Runs until this controller is a ghost and must end; returns why.
    pub(crate) async fn run(self) -> anyhow::Error {
        let why = tokio::select! {
            why = self.give_heartbeats() => why,
            why = self.run_watchdog() => why,
        };
        self.fence.close(&why);
        let pod = &self.config.pod;
        error!(pod, why, "this controller is a ghost: it refuses all work and exits");
        anyhow::anyhow!("controller {pod} is a ghost: {why}")
    }

    /// Sends heartbeats while the driver answers, until this controller must end. Returns why.
    async fn give_heartbeats(&self) -> String {
        let mut last: Option<Lease> = None;
        let mut sent: Option<Instant> = None;
        let mut failing = Failing::default();
        let mut alive = Instant::now();
        let mut policy: Option<Instant> = None;
        loop {
            let mut pause = RETRY;
            match self.give_heartbeat(last.as_ref()).await {
                Ok(lease) => {
                    failing.ended("heartbeats are sent again");
                    self.work.api_answered(
                        sent.replace(Instant::now())
                            .map_or(Duration::ZERO, |sent| sent.elapsed()),
                    );
                    if policy.is_none_or(|asked| asked.elapsed() >= POLICY) {
                        policy = Some(Instant::now());
                        self.check_policy(&lease).await;
                    }
                    last = Some(lease);
                    pause = BEAT;
                    alive = Instant::now();
                }
                Err(Silence::Driver(why)) => {
                    if answers(&self.config.alive).await.is_ok() {
                        alive = Instant::now();
                    }
                    // A starting driver is not ready until it has seen all volumes and nodes.
                    if sent.is_some() {
                        self.metrics.failed("heartbeat");
                        failing.refused = None;
                        failing.because(&why, "no heartbeat: this controller does not work");
                    }
                    if alive.elapsed() >= HUNG {
                        return format!("its driver has not answered for {} s: {why}", alive.elapsed().as_secs());
                    }
                }
                Err(Silence::Problem(problem)) => {
                    alive = Instant::now();
                    self.metrics.failed("heartbeat");
                    // Somebody has changed or deleted it: it is read again.
                    if matches!(problem, Problem::Conflict(_) | Problem::NotFound(_)) && last.take().is_some() {
                        pause = Duration::ZERO;
                    }
                    if let Some(why) = failing.refused(problem, Instant::now()) {
                        return why;
                    }
                }
            }
            sleep(pause).await;
        }
    }

    /// Says so if the admission policy for Leases is not in force: a copied kubeconfig, or a token that outlives its Pod, could
    /// then hold a Lease.
    async fn check_policy(&self, heartbeat: &Lease) {
        // The next heartbeat meets the same problem.
        if let Ok(in_force) = self.elections.policy_is_in_force(heartbeat).await {
            self.metrics.set_lease_policy_missing(!in_force);
            if !in_force {
                warn!(
                    "the admission policy for Leases is not in force: upgrade or install hostdir again to restore it"
                );
            }
        }
    }

    async fn give_heartbeat(&self, last: Option<&Lease>) -> Result<Lease, Silence> {
        let leads = self.leads.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sidecars = self.config.sidecars.iter().map(async |(lease, sidecar)| {
            let why = self.work.cannot_lead(lease, sidecar, leads.contains(lease)).await;
            (lease.clone(), why)
        });
        let (ready, elections) = tokio::join!(answers(&self.config.ready), join_all(sidecars));
        ready.map_err(Silence::Driver)?;
        let elections = elections.into_iter().collect();
        self.elections.beat(&elections, last).await.map_err(Silence::Problem)
    }
}

/// Why no heartbeat was sent.
enum Silence {
    /// The driver does not answer, or does not work.
    Driver(String),
    Problem(Problem),
}

async fn answers(check: &Check) -> Result<(), String> {
    in_time(check()).await.map_err(|error| format!("{error:#}"))
}

/// Waits for an answer, but not for long.
async fn in_time<T>(answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let answer = timeout(ANSWER, answer).await;
    answer.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {} s", ANSWER.as_secs())))
}
