//! What one look at the API server shows.

use std::collections::BTreeMap;

use jiff::Timestamp;

/// The holder identity of a pod's sidecar: its host name, which is the pod's name, with what csi-lib-utils does to it
/// (leaderelection/leader_election.go, `sanitizeName`).
pub(crate) fn identity(pod: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    pod.chars().map(plain).collect()
}

/// A Lease that an election is held by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Election {
    /// Who leads, by [`identity`]; empty if nobody does.
    pub(crate) holder: String,
    /// Seconds after which a Lease that is not renewed is anybody's.
    pub(crate) term: u64,
    /// When the holder got it, by its own clock.
    pub(crate) acquired: Timestamp,
    /// When it was renewed last, by the clock of the holder.
    pub(crate) renewal: Timestamp,
    /// Changes with every hand-over.
    pub(crate) handed_over: Option<String>,
}

/// What is known of a Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeState {
    /// There is no such Node.
    Gone,
    /// Its kubelet has not reported, or not well.
    NotReady,
    Ready,
}

/// The Pod of a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControllerPod {
    /// Its UID: another Pod of the same name is another.
    pub(crate) uid: String,
    /// Whether its containers are ready, by the kubelet's word.
    pub(crate) ready: bool,
    /// Whether it is being deleted.
    pub(crate) ending: bool,
    pub(crate) node: String,
    /// What is known of that Node.
    pub(crate) node_state: NodeState,
}

/// All of it, as read at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// The elections that are watched, by the names of their Leases; those that there are.
    pub(crate) elections: BTreeMap<String, Election>,
    /// The controllers, by [`identity`].
    pub(crate) controllers: BTreeMap<String, ControllerPod>,
    /// The last heartbeat of a controller, by its own clock, by [`identity`].
    pub(crate) heartbeats: BTreeMap<String, Timestamp>,
}
