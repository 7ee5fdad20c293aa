//! What hostdir's tests share: the harness, the driver as a process, and a real Kubernetes of several nodes on one machine.
//!
//! *The harness* ([`harness`]): a test says what it needs of the machine.
//!
//! *The driver as a process*: [`Driver`] starts it, [`Client`] calls it over its socket, [`Scratch`] is a place to work in,
//! [`faults`] makes its system calls fail, [`disk`] and [`uml`] are filesystems with quotas, and machines whose power can be cut.
//!
//! *The cluster*: upstream's own programs (etcd, kube-apiserver, controller-manager, scheduler, kubelet, containerd, runc, the CSI
//! sidecars; but for node-driver-registrar, for which a stand-in speaks), run as they do in production. A node is a set of
//! namespaces (`machine`): network, mounts, host name, processes, with a `/var/lib`, `/run`, `/var/log` and `/opt` of its own, so
//! that every program keeps its production paths. Its power switch is the kill of its process 1. [`Cluster::up`] makes one.
//! Everything it makes dies with the process that made it, however that ends: the namespaces by parent-death signals, files and
//! cgroups by the janitor (`janitor`).

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
pub mod sanity;
mod support;

pub use cluster::Cluster;
pub use hostdir_lab_needs::needs;
pub use hostdir_prove as prove;
pub use kubectl::Kubectl;
pub use node::Node;
pub use support::*;

// The attribute names this crate, also in its own tests.
extern crate self as hostdir_lab;
