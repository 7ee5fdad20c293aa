//! Every controller watches the leader and itself: it sends heartbeats, and takes over the Lease of a leader that must not
//! lead. [`crate::leader`] makes the decisions.

mod events;
mod failing;
mod leases;
mod report;
mod watchdog;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::{Client, ResourceExt};
use tokio::time::{sleep, timeout};
use tracing::error;

use crate::k8s::client::{Problem, request_within};
use crate::leader::identity;
use crate::metrics::Metrics;
use crate::volume::Fence;
use events::Announcer;
use failing::Failing;
use leases::Elections;

pub(crate) use report::report;

/// How often to send a heartbeat.
const BEAT: Duration = Duration::from_secs(5);
/// When to try again after a failed heartbeat: others do not wait long.
const RETRY: Duration = Duration::from_secs(1);
/// How long a driver or a sidecar may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// An answer that took longer than this is out of date.
const FRESH: Duration = Duration::from_secs(5);

/// Asks a driver or a sidecar whether it works.
pub(crate) type Check = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>;

pub(crate) struct GuardConfig {
    /// The namespace of the Leases and of the controllers.
    pub(crate) namespace: String,
    /// The name of this controller's Pod.
    pub(crate) pod: String,
    /// The label selector of the controllers' Pods.
    pub(crate) controllers: String,
    /// Whether the driver of this controller answers.
    pub(crate) driver: Check,
    /// Whether each sidecar of this controller answers, by the name of the Lease that it is elected by.
    pub(crate) sidecars: BTreeMap<String, Check>,
}

/// Watches the elections for one controller.
pub(crate) struct Guard {
    config: GuardConfig,
    me: String,
    elections: Elections,
    client: Client,
    announcer: Announcer,
    fence: Arc<Fence>,
    metrics: Arc<Metrics>,
}

impl Guard {
    /// Closes `fence` when this controller is a ghost.
    pub(crate) fn new(config: GuardConfig, client: Client, fence: Arc<Fence>, metrics: Arc<Metrics>) -> Self {
        let names = config.sidecars.keys().cloned().collect();
        let elections = Elections::new(client.clone(), &config.namespace, names, config.controllers.clone());
        Self {
            me: identity(&config.pod),
            elections,
            announcer: Announcer::new(client.clone(), config.namespace.clone(), config.pod.clone()),
            client,
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

    /// Sends heartbeats while the driver answers, until the API server refuses them. Returns why.
    async fn give_heartbeats(&self) -> String {
        let mut last = None;
        let mut failing = Failing::default();
        let mut begun = false;
        loop {
            let mut pause = RETRY;
            match self.give_heartbeat(last.take()).await {
                Ok(lease) => {
                    failing.ended("heartbeats are sent again");
                    last = Some(lease);
                    pause = BEAT;
                    begun = true;
                }
                // A starting driver does not answer until it has seen all volumes and nodes.
                Err(Silence::Driver(_)) if !begun => {}
                Err(Silence::Driver(why)) => {
                    self.metrics.failed("heartbeat");
                    failing.refused = None;
                    failing.because(&why, "no heartbeat: this controller does not answer on its own socket");
                }
                Err(Silence::Problem(problem)) => {
                    self.metrics.failed("heartbeat");
                    if let Some(why) = failing.refused(problem, true, Instant::now()) {
                        return why;
                    }
                }
            }
            sleep(pause).await;
        }
    }

    async fn give_heartbeat(&self, last: Option<Lease>) -> Result<Lease, Silence> {
        answers(&self.config.driver).await.map_err(Silence::Driver)?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.config.namespace);
        let pod = &self.config.pod;
        let uid = match &last {
            Some(lease) => lease.owner_references().first().map(|owner| owner.uid.clone()),
            None => request_within(FRESH, "read its own Pod", pods.get_metadata_opt(pod))
                .await
                .map_err(Silence::Problem)?
                .and_then(|pod| pod.metadata.uid),
        };
        // Without a Pod there is no heartbeat to send; the watchdog sees that, too.
        let uid = uid.ok_or(Silence::Problem(Problem::NotFound("read its own Pod")))?;
        self.elections.beat(pod, &uid, last).await.map_err(Silence::Problem)
    }
}

/// Why no heartbeat was sent.
enum Silence {
    /// The driver does not answer.
    Driver(String),
    Problem(Problem),
}

async fn answers(check: &Check) -> Result<(), String> {
    match timeout(ANSWER, check()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
    }
}
