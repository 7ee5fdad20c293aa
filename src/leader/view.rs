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

/// The last heartbeat of a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heartbeat {
    /// When it was sent, by the sender's clock.
    pub(crate) sent: Timestamp,
    /// The Node that the sender runs on.
    pub(crate) node: String,
    /// For each election that the sender takes part in: why it could not lead, or `None` if it could.
    pub(crate) elections: BTreeMap<String, Option<String>>,
}

impl Heartbeat {
    /// Whether the sender could lead this election.
    pub(crate) fn can_lead(&self, lease: &str) -> bool {
        self.elections.get(lease).is_some_and(Option::is_none)
    }

    /// Why the sender could not lead this election, if it says so.
    pub(crate) fn cannot_lead(&self, lease: &str) -> Option<&str> {
        self.elections.get(lease)?.as_deref()
    }
}

/// What the API server says about the controller that looks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Own {
    /// The UID of its Pod; `None` if the Pod is gone. A later Pod of the same name has another.
    pub(crate) uid: Option<String>,
    /// The name of its Node, if the Node is gone.
    pub(crate) node_gone: Option<String>,
}

/// The whole view, as read at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// The watched elections whose Leases exist, by the names of the Leases.
    pub(crate) elections: BTreeMap<String, Election>,
    /// The heartbeats, by the [`identity`] of the sender.
    pub(crate) heartbeats: BTreeMap<String, Heartbeat>,
    pub(crate) own: Own,
}
