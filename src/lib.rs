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
//!
//! # On the disk
//!
//! ```text
//! <pool>/.hostdir/pool.json               identity: random id, format, creation time
//! <pool>/.hostdir/lock                    held by the one process that serves the pool
//! <pool>/volumes/<volume id>/volume.json  the record
//! <pool>/volumes/<volume id>/data/        the tenant's directory, and the only thing ever mounted
//! <pool>/trash/<volume id>.<n>/           deleted, being erased
//! ```
//!
//! # The life of a volume
//!
//! *Local mode.* CreateVolume counts the size against the pool; a directory with the record is made aside, synced, and renamed into
//! `volumes/`. The first NodePublishVolume makes `data/` with its owner, mode and limit, and only then the record says `ready`. A
//! detached bind mount gets its options and is attached at the target. NodeUnpublishVolume unmounts, proves it, and removes the
//! target with `rmdir`, never recursively. DeleteVolume is refused while the volume is mounted; it is one rename into `trash/`,
//! whatever the volume holds. The eraser empties the trash in the background.
//!
//! *Elected mode.* CreateVolume chooses a node by what the watches say of pools and volumes, and enters a HostVolume under the
//! volume's name; nothing is on any disk. NodePublishVolume mounts a volume that is on the disk without the API server. Else the
//! HostVolume is looked up, its record is written to the pool, the HostVolume is marked `Ready` with the id of the pool, and only
//! then `data/` is made. DeleteVolume deletes the HostVolume by its UID; its node moves the data into `trash/` and takes its finalizer
//! off, and then the controller answers. A volume that is `Claimed` has no data and needs no node.
//!
//! # What holds
//!
//! - *Whole or not at all.* A volume comes and goes by one rename; records are synced before an answer leaves. Limits are set before
//!   a pod can write, and compared whenever a pool is opened.
//! - *A final error is a proof.* Whoever gets one knows that nothing made for the request remains. What cannot be proven is answered
//!   with `Unavailable`, and the caller tries again.
//! - *Who leads does not matter.* A name is taken by whoever enters it first, a delete names a UID, every change names the version
//!   that it was decided on.
//! - *Nothing a tenant or a hostile id can reach.* Ids are lower-case DNS labels (other names are hashed). Every path below a pool is
//!   opened from a descriptor with openat2(2) `RESOLVE_BENEATH | NO_SYMLINKS | NO_XDEV`; targets without following a link. The
//!   eraser opens no device or FIFO and crosses no mount.
//! - *Secrets* and volume contexts are never logged.

pub mod config;
pub mod csi;
pub mod http;
pub mod k8s;
pub mod leader;
pub mod linux;
pub mod metrics;
pub mod run;
pub mod volume;
