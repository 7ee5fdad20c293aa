//! The leader that cannot haunt: who leads, whether it can, and who takes over if not.
//!
//! # The ghost
//!
//! external-provisioner elects a leader by a Lease. The leader is whoever renews it, and it renews for as long as its
//! process runs and reaches the API server: also when its Node and its Pod have been deleted (a node whose kubelet is dead
//! runs its containers for ever), and also when the driver beside it hangs or is gone. Nothing is provisioned then, and
//! nothing says why. A Lease is no proof of life, and no fence.
//!
//! # The defence
//!
//! - Nothing here decides what is right: any number of controllers may act at once ([`Elected`](crate::volume::Controller)).
//! - Every controller has a *heartbeat*, a Lease named as its Pod, which it renews only while it answers on its own socket.
//! - Every controller looks at the election every two seconds ([`Watchdog::look`]). A holder is *guilty* ([`Guilt`]) when its
//!   Pod or Node is gone or has not been ready for a while, or when its heartbeat has stopped. A Lease that nobody renews is
//!   left to expire: that is what leases are for.
//! - Whoever is *fit* (answers, has a sidecar that answers, is in good standing itself, and sees the API server as it is now)
//!   then writes its own name into the Lease, at the version it has read. Its sidecar finds itself leading at its next poll;
//!   the ghost's finds that it has lost, and exits. Deleting or emptying the Lease would be drawing lots.
//! - Of several who are fit each waits as many seconds as there are fit ones before it. After a hand-over nobody makes another
//!   for 45 s, and after three in ten minutes for five minutes: then it is not the holder that is ill.
//! - A controller whose own Pod or Node is gone, or whose token is refused, is the ghost: it refuses all work, closes its
//!   socket and exits ([`Verdict`]).
//!
//! All of this is a function of what was seen and when, without clocks, tasks or an API: a simulation tries it against
//! crashes, pauses, partitions, clocks that go wrong and reads that are late. Time is only counted while the API server
//! answers (but for five seconds between two looks): an age says for how long something was *seen* to be so. Only whoever has
//! just begun to look goes by a clock, that of the holder, which writes both its Lease and its heartbeat.

mod guilt;
mod view;
mod watchdog;

#[cfg(test)]
mod simulation;

pub(crate) use guilt::Guilt;
pub(crate) use view::{ControllerPod, Election, NodeState, View, identity};
pub(crate) use watchdog::{LeaseState, Obstacle, TakeOver, Verdict, Watchdog};
