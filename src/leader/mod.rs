//! Who leads, whether it may, and which controller takes over if not.
//!
//! # The ghost
//!
//! external-provisioner elects a leader by a Lease. The sidecar that renews the Lease leads, and it renews as long as its
//! process runs and reaches the API server: even when its Node and its Pod have been deleted (a node with a dead kubelet
//! runs its containers forever), and even when the driver beside it hangs or is gone. Then nothing is provisioned, and
//! nothing says why. A renewed Lease does not prove that its holder works, and an expired one does not stop it.
//!
//! # The defence
//!
//! - Correctness does not depend on this module: any number of controllers may act at once
//!   ([`Elected`](crate::volume::Controller)).
//! - Every controller has a *heartbeat*, a Lease named after its Pod. It says which elections the controller could lead, and
//!   it is sent only while the driver answers on its own socket. A controller could lead while its sidecar answers and, if it
//!   leads, does its work ([`Queue`]).
//! - Every controller looks at the election every two seconds ([`Watchdog::look`]). There is one reason to replace a holder:
//!   for twelve seconds it has sent no heartbeat that says that it could lead, or its heartbeat is gone, which happens when its
//!   Pod is deleted ([`Guilt`]). A Lease that nobody renews is left to expire.
//! - A controller that could lead itself then writes its own name into the Lease, at the version it has read. Its sidecar finds
//!   itself leading at its next poll; the ghost's sidecar finds that it has lost, and exits. After deleting or emptying the
//!   Lease, any sidecar could get it, even the ghost's.
//! - If several controllers could lead, each waits one second for every one ranked before it. After a hand-over no controller
//!   makes another for 45 s, and after three within ten minutes for five minutes: then the cause is not the holder. If nobody
//!   could lead, nobody takes over, and that is said.
//! - A controller whose own Pod or Node is gone, or whose token is refused, is a ghost: it refuses all work, closes its
//!   socket and exits ([`Verdict`]). So does one whose driver has not answered for a minute.
//!
//! All of this is a function of what was observed and when, without clocks, tasks or an API: a simulation tests it against
//! crashes, pauses, partitions, wrong clocks and late reads. Ages count only time in which the API server answers, at most
//! five seconds between two looks: an age is how long something was *observed*. Only how long ago the last hand-over was is
//! read from a clock, by a controller that has just begun to look: the holder's, which stamps the Lease.

mod candidate;
mod view;
mod watchdog;
mod work;

#[cfg(test)]
mod simulation;

pub(crate) use candidate::Guilt;
pub(crate) use view::{Election, Heartbeat, Own, View, identity};
pub(crate) use watchdog::{LeaseState, Obstacle, TakeOver, Verdict, Watchdog};
pub(crate) use work::Queue;
