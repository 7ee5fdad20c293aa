//! What hostdir's tests share: the harness, the driver as a process, and a real Kubernetes of several nodes on one machine.
//!
//! *The harness* ([`harness`]): a test says what it needs of the machine.
//!
//! *The driver as a process*: [`Driver`] starts it, [`Client`] calls it over its socket, [`Scratch`] is a directory to work
//! in, [`faults`] makes its system calls fail, [`disk`] has filesystems with quotas, and [`uml`] has machines whose power
//! can be cut.
//!
//! *The cluster*: upstream's own programs (etcd, kube-apiserver, controller-manager, scheduler, kubelet, containerd, runc,
//! the CSI sidecars), run as in production. Only node-driver-registrar is replaced, by a stand-in. A node is a set of
//! namespaces (`machine`) for network, mounts, host name and processes, with its own `/var/lib`, `/run`, `/var/log` and
//! `/opt`, so that every program keeps its production paths. Killing its process 1 cuts its power. [`Cluster::up`] makes a
//! cluster. Everything in it goes when the process that made it ends for any reason: parent-death signals end the
//! namespaces, the janitor (`janitor`) removes files and cgroups.

mod cgroup;
pub mod cluster;
mod control_plane;
pub mod harness;
mod images;
mod janitor;
pub mod kubectl;
mod machine;
mod node;
mod pki;
mod reader;
pub mod sanity;
mod support;

pub use cluster::Cluster;
pub use hostdir_lab_needs::needs;
pub use hostdir_prove as prove;
pub use kubectl::Kubectl;
pub use node::Node;
pub use support::*;

// The code that `#[needs]` generates names this crate, also in the crate's own tests.
extern crate self as hostdir_lab;
