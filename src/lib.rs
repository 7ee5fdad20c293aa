//! hostdir turns directories on a node's own disks into Kubernetes volumes: a CSI driver.
//!
//! A tour of the house:
//!
//! - [`volume`] is the core: what a volume is and the verbs on it (create, publish, unpublish, delete). It knows neither
//!   gRPC nor Kubernetes nor system calls; what it asks of these is a handful of traits.
//! - [`csi`] is the gRPC edge. It takes requests apart, calls one verb, and turns refusals into status codes.
//! - [`linux`] is the edge to the kernel: pools on disk, bind mounts, the eraser. Every path below a pool is resolved
//!   from an open descriptor, and nowhere else is unsafe code.
//! - [`leader`] decides who must not lead, and who takes over: a second core, that knows nothing of volumes.
//! - [`k8s`] is the edge to the API server: the book of promises, the watches, what nodes and controllers do unasked.
//! - [`config`] reads the command line and the configuration file, [`run`] joins the rest and serves until SIGTERM;
//!   [`metrics`] is what all count in, and [`http`] shows it.
//!
//! Dependencies point one way: `run` to the edges, these to `volume`. The edges never see each other.
//!
//! A call walks like this: socket → `csi::controller` or `csi::node` takes it apart → [`volume::Driver`] (a node) or
//! [`volume::Elected`] (a controller) decides → its ports, answered by `linux` or `k8s`, act → the answer or the refusal goes
//! back through `csi`.

pub mod config;
pub mod csi;
pub mod http;
pub mod k8s;
pub mod leader;
pub mod linux;
pub mod metrics;
pub mod run;
pub mod volume;
