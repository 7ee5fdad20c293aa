//! Sends heartbeats while this controller works, and finds when it must end.

use std::ops::ControlFlow;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::coordination::v1::Lease;
use tokio::time::sleep;
use tracing::warn;

use super::failing::Failing;
use super::{Check, Guard, in_time};
use crate::k8s::client::Problem;

/// How often to send a heartbeat.
const BEAT: Duration = Duration::from_secs(3);
/// When to try again after a failed heartbeat: others do not wait long.
const RETRY: Duration = Duration::from_secs(1);
/// After how long a driver that does not answer its own socket ends: the kubelet starts it anew, and if there is no kubelet, it
/// is in nobody's way.
const HUNG: Duration = Duration::from_mins(1);
/// How often to ask whether the admission policy is in force.
const POLICY: Duration = Duration::from_mins(5);

/// Why no heartbeat was sent.
enum Silence {
    /// The driver does not answer, or does not work.
    Driver(String),
    Problem(Problem),
}

/// What is remembered from one heartbeat to the next.
struct Memory {
    /// The Lease as the last heartbeat returned it, and when that was.
    last: Option<Lease>,
    sent: Option<Instant>,
    /// When the driver last answered.
    alive: Instant,
    policy_asked: Option<Instant>,
    failing: Failing,
}

/// How long to wait before the next heartbeat, or why this controller must end.
type Next = ControlFlow<String, Duration>;

impl Guard {
    /// Sends heartbeats while the driver answers, until this controller must end. Returns why.
    pub(super) async fn give_heartbeats(&self) -> String {
        let mut memory = Memory {
            last: None,
            sent: None,
            alive: Instant::now(),
            policy_asked: None,
            failing: Failing::default(),
        };
        loop {
            let next = match self.give_heartbeat(memory.last.as_ref()).await {
                Ok(lease) => self.heartbeat_was_sent(lease, &mut memory).await,
                Err(Silence::Driver(why)) => self.driver_is_silent(&why, &mut memory).await,
                Err(Silence::Problem(problem)) => self.heartbeat_was_refused(problem, &mut memory),
            };
            match next {
                ControlFlow::Continue(pause) => sleep(pause).await,
                ControlFlow::Break(why) => return why,
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

    async fn heartbeat_was_sent(&self, lease: Lease, memory: &mut Memory) -> Next {
        memory.failing.ended("heartbeats are sent again");
        memory.alive = Instant::now();
        let before = memory.sent.replace(Instant::now());
        self.work
            .api_answered(before.map_or(Duration::ZERO, |before| before.elapsed()));
        if memory.policy_asked.is_none_or(|asked| asked.elapsed() >= POLICY) {
            memory.policy_asked = Some(Instant::now());
            self.check_policy(&lease).await;
        }
        memory.last = Some(lease);
        Next::Continue(BEAT)
    }

    async fn driver_is_silent(&self, why: &str, memory: &mut Memory) -> Next {
        if answers(&self.config.alive).await.is_ok() {
            memory.alive = Instant::now();
        }
        // A starting driver is not ready until it has seen all volumes and nodes.
        if memory.sent.is_some() {
            self.metrics.failed("heartbeat");
            memory.failing.refused = None;
            memory
                .failing
                .because(why, "no heartbeat: this controller does not work");
        }
        let silence = memory.alive.elapsed();
        if silence >= HUNG {
            return Next::Break(format!(
                "its driver has not answered for {} s: {why}",
                silence.as_secs()
            ));
        }
        Next::Continue(RETRY)
    }

    fn heartbeat_was_refused(&self, problem: Problem, memory: &mut Memory) -> Next {
        memory.alive = Instant::now();
        self.metrics.failed("heartbeat");
        let changed = matches!(problem, Problem::Conflict(_) | Problem::NotFound(_));
        if let Some(why) = memory.failing.refused(problem, Instant::now()) {
            return Next::Break(why);
        }
        // Somebody has changed or deleted it: it is read again at once.
        let pause = if changed && memory.last.take().is_some() {
            Duration::ZERO
        } else {
            RETRY
        };
        Next::Continue(pause)
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
}

async fn answers(check: &Check) -> Result<(), String> {
    in_time(check()).await.map_err(|error| format!("{error:#}"))
}
