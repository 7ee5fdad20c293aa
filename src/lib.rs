//! hostdir is a CSI driver that turns directories on a node's own disks into Kubernetes volumes.
//!
//! # A tour
//!
//! - [`volume`] is the core: what a volume is and the verbs on it (create, publish, unpublish, delete). It knows neither
//!   gRPC nor Kubernetes nor system calls; it reaches them through a handful of traits.
//! - [`csi`] is the gRPC edge. It parses requests, calls one verb, and turns refusals into status codes.
//! - [`linux`] is the edge to the kernel: pools on disk, bind mounts, quotas, the eraser. Every path below a pool is resolved
//!   from an open descriptor. All unsafe code is in `linux::sys`.
//! - [`k8s`] is the edge to the API server: HostVolumes and HostNodes, API watches, and the background work of nodes and
//!   controllers.
//! - [`leader`] is a second core, which knows nothing of volumes: it decides which controller must not lead and which one
//!   takes over. `k8s::election` carries that out.
//! - [`config`] reads the command line and the configuration file; [`run`] connects all parts and serves until SIGTERM;
//!   [`metrics`] holds the metrics, and [`http`] serves them; [`log`] writes the log; [`background`] starts threads; [`unused`]
//!   names volumes that nobody uses.
//!
//! Dependencies point one way: from `run` to the edges, and from the edges to the cores. The edges never depend on each
//! other.
//!
//! The path of a call: socket → `csi::controller` or `csi::node` parses it → [`volume::Node`] or [`volume::Controller`]
//! decides → its traits, implemented by `linux` and `k8s`, act → `csi` returns the answer or the refusal.
//!
//! # Words of our own
//!
//! | word | meaning |
//! |---|---|
//! | pool | a directory on a node's disk that holds volumes; it has a name and a random id |
//! | HostVolume | the object that records a volume in the API server (elected mode) |
//! | HostNode | the object in which a node publishes its pools |
//! | record | `volume.json`, beside a volume's data |
//! | local mode, elected mode | only pools record volumes; controllers record them as HostVolumes, and sidecars elect a leader |
//! | assigned | said of a volume: a HostVolume records it on this node |
//! | claimed, ready, lost | the phases of a volume: never used; its data is on its node; its data was there and is missing |
//! | allocate, room | to count a size against a pool; the largest size that can still be allocated |
//! | reserve, overcommit | the part of a pool that is never allocated; how many times the pool's size may be allocated |
//! | foreign | bytes in use on the filesystem when the pool was created |
//! | enforced, unenforced | a volume with, or without, a size limit that the kernel enforces |
//! | discard, trash, eraser | to move a volume to the trash by one rename; the directory it goes to; the thread that erases it |
//! | orphan | a volume that is on a pool, has no HostVolume, and is not in use |
//! | delete-data, leave-data, adopt-data | annotations of a HostVolume: what is to become of its data |
//! | adopt | to give a HostVolume the data that an earlier one of the same name has left |
//! | reservation | room that is counted before the API server knows of the volume |
//! | overallocated | said of a pool: more is allocated than it has |
//! | silent | said of a node: not Ready, without a Ready pod of hostdir, or it did not answer lately |
//! | self-test | `hostdir selftest`, and the volumes it makes |
//! | guilty | said of a leader that must not lead; its guilt is the reason |
//! | ghost | a guilty leader that keeps leading: its Pod or Node is gone, its driver hangs, or its sidecar does no work |
//! | heartbeat | a Lease of a controller's own, by which it says that it answers and which elections it could lead |
//! | backlog | what waits for a sidecar: claims without volume, released volumes, claims that grow |
//! | hand-over | a controller writes its own name into a guilty leader's Lease |
//! | fit | a controller that could lead |
//! | fence | closes for good when a controller finds that it is a ghost; from then on the controller changes nothing |
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
//! *Local mode.* CreateVolume allocates the size from the pool; a directory with the record is made in `.hostdir/new/`,
//! synced, and renamed into `volumes/`. The first NodePublishVolume makes `data/` with its owner, mode and limit, and only
//! then sets `ready` in the record. A detached bind mount gets its options and is attached at the target.
//! NodeUnpublishVolume unmounts, checks that the mount is gone, and removes the target with `rmdir`, never recursively.
//! DeleteVolume is refused while the volume is mounted; otherwise it is one rename into `trash/`, however much the volume
//! holds. The eraser empties the trash in the background.
//!
//! *Elected mode.* CreateVolume chooses a node by the pools and volumes that the API watches show, and creates a HostVolume
//! with the volume's name; nothing is written to any disk yet. NodePublishVolume mounts a volume that is already on the disk
//! without asking the API server. Otherwise the node reads the HostVolume, writes its record to the pool, marks the
//! HostVolume `Ready` with the id of the pool, and only then makes `data/`. DeleteVolume deletes the HostVolume by its UID;
//! the volume's node moves the data into `trash/` and removes the finalizer, and then the controller answers. A `Claimed`
//! volume has no data, so its delete needs no node. A HostVolume that is deleted in another way keeps its data: only the
//! annotation `delete-data`, which DeleteVolume or a person sets, says that the data may go.
//!
//! # Guarantees
//!
//! - *All or nothing.* A volume appears and disappears by one rename; records are synced before hostdir answers. Limits are
//!   set before a pod can write, and checked whenever a pool is opened.
//! - *A final error is a proof.* A caller that gets one knows that nothing made for the request remains. If hostdir cannot
//!   prove that, it answers `Unavailable`, and the caller tries again.
//! - *It does not matter who leads.* A name belongs to the controller that records it first, a delete names a UID, and every
//!   change names the version that it was decided on.
//! - *One disk stops only its own pool.* Each pool has threads and descriptors of its own (`linux::threads`); all others only wait
//!   for answers, and give up in time. SIGTERM gives up the socket and the pools before anything is waited for; after SIGKILL the
//!   next process serves every pool but the one on which a thread still hangs.
//! - *Tenants and hostile ids reach nothing outside their volume.* Ids are lower-case DNS labels (other names are hashed).
//!   Every path below a pool is opened from a descriptor with openat2(2) `RESOLVE_BENEATH | NO_SYMLINKS | NO_XDEV`; targets
//!   are opened without following links. The eraser opens no device or FIFO and crosses no mount.
//! - *Secrets* and volume contexts are never logged.

#![expect(
    rustdoc::private_intra_doc_links,
    reason = "these pages are for developers, and are built with --document-private-items"
)]

mod background;
pub mod config;
pub mod csi;
mod http;
pub mod k8s;
mod leader;
mod linux;
mod log;
mod metrics;
pub mod run;
mod unused;
mod volume;
