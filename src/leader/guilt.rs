//! Why a controller must not lead, judged by its Pod, its Node and its heartbeat.

use std::fmt;
use std::time::Duration;

use super::view::{ControllerPod, NodeState};

/// How long a Node may be not ready. A kubelet restarts in less.
const NODE_NOT_READY: Duration = Duration::from_mins(1);
/// How long a Pod may be not ready, or terminating (its grace period).
const POD_NOT_READY: Duration = Duration::from_secs(30);
/// How long heartbeats may be missing: four are due in that time.
pub(super) const SILENT: Duration = Duration::from_secs(20);

/// Why a holder must not lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Guilt {
    PodGone,
    NodeGone(String),
    NodeNotReady(String, Duration),
    /// Its Pod was deleted, but does not terminate.
    PodEnding(Duration),
    PodNotReady(Duration),
    /// Its driver does not answer on its own socket, or does not reach the API server.
    Silent(Duration),
}

impl Guilt {
    /// Why a controller could not lead, judged by a single look: conditions that must last for a while count as soon as they
    /// begin. `silence` is how long ago its last heartbeat was, if it ever sent one.
    pub(crate) fn at_first_sight(controller: Option<&ControllerPod>, silence: Option<Duration>) -> Option<Self> {
        let node = controller.map(|one| one.node.as_str());
        let by_standing = Standing::of(controller).guilt(node, Duration::ZERO);
        by_standing.or_else(|| {
            let silence = silence.unwrap_or(Duration::MAX);
            (silence >= SILENT).then_some(Self::Silent(silence))
        })
    }

    /// The reason as one word, for Events and metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::PodGone => "PodGone",
            Self::NodeGone(_) => "NodeGone",
            Self::NodeNotReady(..) => "NodeNotReady",
            Self::PodEnding(_) => "PodEnding",
            Self::PodNotReady(_) => "PodNotReady",
            Self::Silent(_) => "DriverSilent",
        }
    }
}

impl fmt::Display for Guilt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PodGone => f.write_str("its Pod does not exist"),
            Self::NodeGone(node) => write!(f, "its Node {node} does not exist"),
            Self::NodeNotReady(node, age) => write!(f, "its Node {node} is not Ready{}", For(*age)),
            Self::PodEnding(age) => write!(f, "its Pod was deleted and has not terminated{}", For(*age)),
            Self::PodNotReady(age) => write!(f, "its Pod is not Ready{}", For(*age)),
            Self::Silent(Duration::MAX) => f.write_str("its driver has never sent a heartbeat"),
            Self::Silent(age) => write!(f, "its driver has sent no heartbeat{}", For(*age)),
        }
    }
}

/// ` (for … s)`, unless that is less than a second.
struct For(Duration);

impl fmt::Display for For {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            0 => Ok(()),
            seconds => write!(f, " (for {seconds} s)"),
        }
    }
}

/// The state of a controller, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    PodGone,
    NodeGone,
    PodEnding,
    /// What the API server says about the Pod may be out of date.
    NodeNotReady,
    PodNotReady,
    Good,
}

impl Standing {
    pub(super) fn of(controller: Option<&ControllerPod>) -> Self {
        let Some(ControllerPod {
            ready,
            ending,
            node_state,
            ..
        }) = controller
        else {
            return Self::PodGone;
        };
        match node_state {
            NodeState::Gone => Self::NodeGone,
            _ if *ending => Self::PodEnding,
            NodeState::NotReady => Self::NodeNotReady,
            NodeState::Ready if !ready => Self::PodNotReady,
            NodeState::Ready => Self::Good,
        }
    }

    /// The guilt of a controller that is on `node` and has had this standing for `age`.
    pub(super) fn guilt(self, node: Option<&str>, age: Duration) -> Option<Guilt> {
        let node = || node.unwrap_or_default().to_owned();
        match self {
            Self::PodGone => Some(Guilt::PodGone),
            Self::NodeGone => Some(Guilt::NodeGone(node())),
            Self::PodEnding => Some(Guilt::PodEnding(age)),
            Self::NodeNotReady => Some(Guilt::NodeNotReady(node(), age)),
            Self::PodNotReady => Some(Guilt::PodNotReady(age)),
            Self::Good => None,
        }
    }

    /// How long a holder may have this standing.
    pub(super) fn patience(self) -> Duration {
        match self {
            Self::PodGone | Self::NodeGone | Self::Good => Duration::ZERO,
            Self::NodeNotReady => NODE_NOT_READY,
            Self::PodEnding | Self::PodNotReady => POD_NOT_READY,
        }
    }
}
