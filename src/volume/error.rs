//! Why the core refuses a call. The gRPC edge maps each [`Reason`] to a status code; here they are sentences for people.

use std::fmt::Display;

use thiserror::Error;
use uuid::Uuid;

use super::access::TargetPath;
use super::disk::{BindError, DiskError, Unusable};
use super::id::{NodeName, PoolName, VolumeId};
use super::record::PoolId;
use super::size::{Bytes, SizeRange};

/// A refusal: of what, where, and why.
#[derive(Debug, Error)]
#[error("{}{reason}", subject(volume.as_ref(), node.as_ref()))]
pub(crate) struct Error {
    /// The volume concerned, if there is one.
    pub(crate) volume: Option<VolumeId>,
    /// The node concerned, or the node that refuses.
    pub(crate) node: Option<NodeName>,
    #[source]
    pub(crate) reason: Box<Reason>,
}

impl Error {
    pub(crate) fn new(volume: Option<&VolumeId>, node: Option<&NodeName>, reason: Reason) -> Self {
        Self {
            volume: volume.cloned(),
            node: node.cloned(),
            reason: Box::new(reason),
        }
    }
}

/// What a message is about, followed by a colon. Every message of hostdir that names a volume begins with it.
pub(crate) fn subject(volume: Option<&impl Display>, node: Option<&NodeName>) -> String {
    match (volume, node) {
        (Some(volume), Some(node)) => format!("volume {volume} on node {node}: "),
        (Some(volume), None) => format!("volume {volume}: "),
        (None, Some(node)) => format!("node {node}: "),
        (None, None) => String::new(),
    }
}

/// Why a call is refused, and what to do about it.
#[derive(Debug, Error)]
pub(crate) enum Reason {
    /// Another call for the same volume or target is running.
    #[error("another call for {0} is still running; the call will be retried")]
    Running(String),
    /// No volume of that id.
    #[error("there is no such volume here")]
    NoSuchVolume,
    /// The name is taken by another volume.
    #[error("a volume of this name already exists with {0}; use another name or delete that volume first")]
    Exists(String),
    /// The requested size range is empty.
    #[error("no size is at least {} and at most {}", .0.required.max(SizeRange::MIN), .0.limit.unwrap_or_default())]
    EmptyRange(SizeRange),
    /// What it uses is not known.
    #[error(
        "its files could not all be counted: it has directories too deep, or too many files; with quotas, which count them, its \
         usage would be known"
    )]
    Uncounted,
    /// The size of the volume is not in the requested range, and the volume cannot grow into it.
    #[error("its size is {has}, and volumes never shrink; request that size or more")]
    Shrink { has: Bytes },
    /// The volume cannot grow that much.
    #[error(
        "it cannot grow to {wanted}: pool {pool} has room for {room} at most; delete volumes there, or request less"
    )]
    NoRoomToGrow {
        pool: PoolName,
        wanted: Bytes,
        /// The largest size that the volume could have.
        room: Bytes,
    },
    /// Quotas are required, and the volume has no limit.
    #[error("quotas are required of pool {pool}, and this volume has no limit: {why}")]
    Unenforced {
        pool: PoolName,
        /// Why, and what to do.
        why: String,
    },
    /// A node is asked to raise the limit of a volume above what is allocated to it.
    #[error(
        "it cannot grow to {wanted} on this node: only {allocated} are allocated to it; expand it at the controller first"
    )]
    NotAllocated { allocated: Bytes, wanted: Bytes },
    /// The topology names only other nodes.
    #[error("the requested topology does not include this node; a volume made here can be used only on this node")]
    OtherNode,
    /// This node has no pool of that name.
    #[error(
        "this node has no pool {wanted} (it has: {known}); correct the StorageClass parameter `pool`, \
         or configure that pool on the node"
    )]
    NoSuchPool { wanted: PoolName, known: String },
    /// The requested size is larger than the room of the pool.
    #[error(
        "{wanted} do not fit in pool {pool}, which has room for {room}; delete volumes there, request less, \
         or schedule the pod to another node"
    )]
    NoRoom {
        pool: PoolName,
        wanted: Bytes,
        /// The largest size that there is room for.
        room: Bytes,
    },
    /// The pool cannot be used now.
    #[error("pool {pool} cannot be used: {why}")]
    PoolUnusable {
        pool: PoolName,
        /// What happened and what to do.
        why: Unusable,
    },
    /// A volume is to be deleted that was made on a pool which is not configured any more.
    #[error(
        "it was made on pool {pool}, which is not configured on this node any more (pools: {known}); configure that pool again, or let \
         the HostVolume go without its data (annotation hostdir.csi/leave-data, see deploy/README.md)"
    )]
    PoolRemoved { pool: PoolName, known: String },
    /// Several pools have a volume of this id.
    #[error(
        "both pool {0} and pool {1} have a volume of this id; move one of the two directories out of its pool's `volumes` \
         folder, and restart hostdir on this node"
    )]
    Ambiguous(PoolName, PoolName),
    #[error("its record cannot be read ({0}); check the disk, restore volume.json from a backup, or delete the volume")]
    BrokenRecord(String),
    /// The volume was used before, and its data is gone.
    #[error(
        "its data is not on this node: it was made on pool {made_on}, and {here}; bring that disk back, \
         or delete the volume to give up its data"
    )]
    DataMissing {
        /// Identity of the pool the volume was made on, as far as known.
        made_on: String,
        here: String,
    },
    #[error("it is mounted at {0}; it can be deleted when that is unmounted (NodeUnpublishVolume)")]
    Mounted(TargetPath),
    /// Another mount of the volume excludes the requested one.
    #[error(
        "it is mounted at {0}, and its access mode (ReadWriteOncePod) allows one mount only; stop the pod that uses it first"
    )]
    Exclusive(TargetPath),
    /// The volume is not mounted where the caller says.
    #[error("it is not mounted at {0}")]
    NotMounted(String),
    /// The volume could not be mounted or unmounted.
    #[error("at {target}: {}", chain(.source))]
    Bind {
        target: TargetPath,
        #[source]
        source: BindError,
    },
    #[error("{}", chain(.0))]
    Disk(#[from] DiskError),
    /// No node that the topology admits can take the volume now.
    #[error("{0}")]
    NoNode(String),
    /// An earlier volume of the same name has left its data here.
    #[error(
        "the pool has the data of an earlier volume of the same name (the UID of its HostVolume is {there}; \
         this volume has {wanted}); to use that data, annotate the HostVolume with hostdir.csi/adopt-data={there}; if it is not \
         needed, move that directory out of the pool's `volumes` folder, and restart hostdir on this node"
    )]
    Predecessor {
        /// The UID of the HostVolume that the data was made for.
        there: String,
        /// The UID of the requested HostVolume.
        wanted: Uuid,
    },
    /// Another volume of the same name has been recorded since.
    #[error(
        "its HostVolume (UID {wanted}) is gone, and the HostVolume of that name now is another one (UID {there}); \
         if HostVolumes were restored from a backup, annotate this one with hostdir.csi/adopt-data={wanted}, and re-create the \
         PersistentVolume with the new UID (deploy/README.md)"
    )]
    Successor {
        /// The UID of the HostVolume that exists now.
        there: Uuid,
        /// The UID of the requested HostVolume.
        wanted: Uuid,
    },
    /// Its HostVolume is being deleted.
    #[error("it is being deleted; the call will be retried")]
    Deleting,
    /// The API server refuses, or does not answer.
    #[error("cannot {verb}: {why}; the call will be retried")]
    Api {
        /// What was tried, as a verb.
        verb: &'static str,
        /// What the API server said.
        why: String,
    },
    /// Something that the call depends on has not happened yet.
    #[error("{0}")]
    Waiting(String),
    /// Its node says why it cannot be deleted.
    #[error("its node says: {0}")]
    InUse(String),
    /// This controller must not change anything any more.
    #[error(
        "this controller has stopped working: {0}; the call will be retried, and another controller will answer it"
    )]
    Fenced(String),
    /// A node in elected mode is asked for what only controllers do.
    #[error(
        "nodes do not create or delete volumes in elected mode, except those of `hostdir selftest`; call a controller"
    )]
    NotOnNodes,
    /// One or more pools cannot be used.
    #[error("not ready: {0}")]
    NotReady(String),
}

impl Reason {
    /// The volume was made on pool `made_on`, but the node has only the pools `here`.
    pub(crate) fn data_missing(made_on: PoolId, here: &[PoolId]) -> Self {
        let here: Vec<String> = here.iter().map(PoolId::to_string).collect();
        let here = format!("the pools of this node are {}", here.join(", "));
        Self::DataMissing {
            made_on: made_on.to_string(),
            here,
        }
    }
}

/// An error with its causes on one line, for messages that leave this process.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some errors of libraries repeat their cause.
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
