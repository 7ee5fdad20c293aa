//! Every controller watches the leader and itself: it sends heartbeats, which say what it could lead, and takes over the Lease of
//! a leader that must not lead. [`crate::leader`] makes the decisions.

mod events;
mod failing;
mod heartbeat;
mod leases;
mod report;
mod watchdog;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use kube::Client;
use tokio::time::timeout;
use tracing::error;

use crate::k8s::controller::Backlog;
use crate::leader::identity;
use crate::metrics::Metrics;
use crate::volume::Fence;
use events::Announcer;
use leases::Elections;
use work::Work;

pub(crate) use report::report;

/// How long a driver or a sidecar may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
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
}

/// Waits for an answer, but not for long.
async fn in_time<T>(answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let answer = timeout(ANSWER, answer).await;
    answer.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {} s", ANSWER.as_secs())))
}
