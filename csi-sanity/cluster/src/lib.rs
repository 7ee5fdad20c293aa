//! A real Kubernetes of several nodes on one machine.
//!
//! Upstream's own programs (etcd, kube-apiserver, controller-manager, scheduler, kubelet, containerd, runc, the CSI
//! sidecars), built from the Go modules beside this crate ([`tools`]), run as they do in production. A node is a set of
//! namespaces (`machine`): network, mounts, host name, processes, with a `/var/lib`, `/run`, `/var/log` and `/opt` of its
//! own, so that every program keeps its production paths. Its power switch is the kill of its process 1.
//!
//! [`Cluster::up`] makes one. Everything it makes dies with the process that made it, however that ends: the namespaces
//! by parent-death signals, files and cgroups by the janitor (`janitor`).

mod cgroup;
pub mod cluster;
mod control_plane;
mod images;
mod janitor;
pub mod kubectl;
mod machine;
mod node;
mod pki;
pub mod sanity;
pub mod tools;

pub use cluster::Cluster;
pub use kubectl::Kubectl;
pub use node::Node;
