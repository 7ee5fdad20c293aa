//! hostdir turns directories on a node's own disks into Kubernetes volumes: a CSI driver.
//!
//! # A tour
//!
//! - [`volume`] is the core: what a volume is and the verbs on it (create, publish, unpublish, delete). It knows neither
//!   gRPC nor Kubernetes nor system calls; what it asks of these is a handful of traits.
//! - [`csi`] is the gRPC edge. It takes requests apart, calls one verb, and turns refusals into status codes.
//! - [`linux`] is the edge to the kernel: pools on disk, bind mounts, quotas, the eraser. Every path below a pool is resolved
//!   from an open descriptor. All unsafe code is in `linux::sys`.
//! - [`k8s`] is the edge to the API server: HostVolumes and HostNodes, API watches, what nodes and controllers do in the background.
//! - [`leader`] decides who must not lead, and who takes over: a second core, that knows nothing of volumes. `k8s::election` acts.
//! - [`config`] reads the command line and the configuration file, [`run`] joins the rest and serves until SIGTERM;
//!   [`metrics`] is what all count in, and [`http`] serves it.
//!
//! Dependencies point one way: `run` to the edges, these to `volume`. The edges never see each other.
//!
//! A call: socket → `csi::controller` or `csi::node` takes it apart → [`volume::Node`] or [`volume::Controller`] decides → its
//! traits, answered by `linux` or `k8s`, act → the answer or the refusal goes back through `csi`.
//!
//! # Words of our own
//!
//! | word | meaning |
//! |---|---|
//! | pool | a directory on a node's disk that volumes are made in; it has a name and a random id |
//! | HostVolume | the object that records a volume in the API server (elected mode) |
//! | HostNode | the object in which a node publishes its pools |
//! | record | `volume.json`, beside a volume's data |
//! | local mode, elected mode | volumes are recorded on their pools only; volumes are recorded as HostVolumes by controllers, of which the sidecars elect a leader |
//! | assigned | recorded as a HostVolume of this node |
//! | claimed, ready, lost | the phases of a volume: never used; its data is on its node; its data was there and is not |
//! | allocate, room | to count a size against a pool; the largest size that can still be allocated |
//! | reserve, overcommit | what is never allocated; how many times the size may be allocated |
//! | foreign | bytes that others had on the filesystem when the pool was made |
//! | enforced, unenforced | a volume with, or without, a limit that the kernel keeps |
//! | discard, trash, eraser | to take a volume out of the pool by one rename; where it goes; the thread that empties it |
//! | orphan | a volume on a pool that no HostVolume speaks of |
//! | self-test | `hostdir selftest`, and the volumes it makes |
//! | heartbeat | a Lease by which a controller shows that it answers |
//! | guilty | a leader that must not lead, and why |
//! | ghost | a guilty leader that goes on: its Pod or Node is gone, or its driver hangs |
//! | hand-over | a controller writes its own name into the Lease of a guilty leader |
//! | fit | a controller that could lead |
//! | fence | closes for good when a controller finds that it is the ghost; then it changes nothing any more |
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
//! *Local mode.* CreateVolume allocates the size from the pool; a directory with the record is made in `.hostdir/new/`, synced, and
//! renamed into `volumes/`. The first NodePublishVolume makes `data/` with its owner, mode and limit, and only then the record says
//! `ready`. A detached bind mount gets its options and is attached at the target. NodeUnpublishVolume unmounts, proves it, and removes the
//! target with `rmdir`, never recursively. DeleteVolume is refused while the volume is mounted; it is one rename into `trash/`,
//! whatever the volume holds. The eraser empties the trash in the background.
//!
//! *Elected mode.* CreateVolume chooses a node by what the API watches show of pools and volumes, and creates a HostVolume with the
//! volume's name; nothing is on any disk. NodePublishVolume mounts a volume that is on the disk without the API server. Else the
//! HostVolume is looked up, its record is written to the pool, the HostVolume is marked `Ready` with the id of the pool, and only
//! then `data/` is made. DeleteVolume deletes the HostVolume by its UID; its node moves the data into `trash/` and removes its
//! finalizer, and then the controller answers. A volume that is `Claimed` has no data and needs no node.
//!
//! # What holds
//!
//! - *Whole or not at all.* A volume comes and goes by one rename; records are synced before an answer leaves. Limits are set before
//!   a pod can write, and compared whenever a pool is opened.
//! - *A final error is a proof.* Whoever gets one knows that nothing made for the request remains. What cannot be proven is answered
//!   with `Unavailable`, and the caller tries again.
//! - *Who leads does not matter.* A name belongs to whoever records it first, a delete names a UID, every change names the version
//!   that it was decided on.
//! - *Nothing a tenant or a hostile id can reach.* Ids are lower-case DNS labels (other names are hashed). Every path below a pool is
//!   opened from a descriptor with openat2(2) `RESOLVE_BENEATH | NO_SYMLINKS | NO_XDEV`; targets without following a link. The
//!   eraser opens no device or FIFO and crosses no mount.
//! - *Secrets* and volume contexts are never logged.

#![expect(
    rustdoc::private_intra_doc_links,
    reason = "these pages are for developers, and made with --document-private-items"
)]

pub mod config;
pub mod csi;
mod http;
pub mod k8s;
mod leader;
mod linux;
mod metrics;
pub mod run;
mod volume;
