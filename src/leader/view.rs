//! What one look at the API server shows.

use std::collections::BTreeMap;

use jiff::Timestamp;

/// The holder identity of a pod's sidecar: its host name, which is the pod's name, as csi-lib-utils sanitizes it
/// (leaderelection/leader_election.go, `sanitizeName`).
pub(crate) fn identity(pod: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    pod.chars().map(plain).collect()
}

/// The Lease of an election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Election {
    /// Who leads, by [`identity`]; empty if nobody does.
    pub(crate) holder: String,
    /// Seconds without a renewal after which anybody may take the Lease.
    pub(crate) term: u64,
    /// When the holder got the Lease, by the holder's clock.
    pub(crate) acquired: Timestamp,
    /// When the Lease was last renewed, by the holder's clock.
    pub(crate) renewal: Timestamp,
    /// The note of the last hand-over; every hand-over writes a different one.
    pub(crate) handed_over: Option<String>,
}

/// What is known of a Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeState {
    /// There is no such Node.
    Gone,
    /// Its kubelet does not report, or reports that it is not ready.
    NotReady,
    Ready,
}

/// The Pod of a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControllerPod {
    /// Its UID: a later Pod of the same name has another.
    pub(crate) uid: String,
    /// Whether its containers are ready, as the kubelet reports.
    pub(crate) ready: bool,
    /// Whether it is being deleted.
    pub(crate) ending: bool,
    pub(crate) node: String,
    /// What is known of that Node.
    pub(crate) node_state: NodeState,
}

/// The whole view, as read at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// The watched elections whose Leases exist, by the names of the Leases.
    pub(crate) elections: BTreeMap<String, Election>,
    /// The controllers, by [`identity`].
    pub(crate) controllers: BTreeMap<String, ControllerPod>,
    /// When each controller, by [`identity`], sent its last heartbeat, by its own clock.
    pub(crate) heartbeats: BTreeMap<String, Timestamp>,
}
