//! What the core asks of the machine it runs on. [`crate::linux`] answers; the tests of the core answer from memory.

use std::error::Error;
use std::path::PathBuf;

use jiff::Timestamp;
use thiserror::Error;
use uuid::Uuid;

use super::access::{MountOptions, TargetPath};
use super::error::Reason;
use super::id::{NodeName, PoolName, VolumeId};
use super::quota::{Means, Quotas};
use super::record::{Claim, Directory, PoolId, Record};
use super::room::Limits;
use super::size::Bytes;

/// A pool as the administrator describes it.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// What StorageClasses call it.
    pub name: PoolName,
    /// The directory, absolute.
    pub path: PathBuf,
    /// Whether the directory must lie on a disk of its own: never take an unmounted disk for an empty pool.
    pub require_mount: bool,
    /// The identity it must have, where the administrator has written it down; any other is refused.
    pub expected: Option<PoolId>,
    /// How much of it may be promised.
    pub limits: Limits,
    /// Whether and how its volumes are held to their sizes.
    pub quotas: Quotas,
}

/// What one volume takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on the disk.
    pub bytes: Bytes,
    /// Inodes; unknown where the filesystem does not count them.
    pub inodes: Option<u64>,
}

/// What is found when the size of a mounted volume is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// What is mounted is not the volume's directory.
    Elsewhere,
    /// Its files are still being counted: ask again.
    Counting,
    /// What it takes.
    Takes(Usage),
}

/// Size and use of the filesystem below a pool, see statvfs(3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Size of the filesystem.
    pub total: Bytes,
    /// What an unprivileged writer can still get.
    pub available: Bytes,
    /// Bytes in use.
    pub used: Bytes,
    /// Inodes in all.
    pub inodes: u64,
    /// Inodes an unprivileged writer can still get.
    pub inodes_available: u64,
    /// Inodes in use.
    pub inodes_used: u64,
}

/// Identity of a directory while the machine is up: what a bind mount and its source have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// A pool that cannot be used now, and what to do about it.
#[derive(Clone, Debug, Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// A step on the disk that failed.
#[derive(Debug, Error)]
#[error("{verb} {path}")]
pub struct DiskError {
    /// What was tried, as a verb.
    pub verb: &'static str,
    /// On what.
    pub path: PathBuf,
    /// What that means for the caller.
    pub kind: DiskErrorKind,
    /// What the kernel said.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

impl DiskError {
    /// What was tried and what the kernel said, on one line.
    #[must_use]
    pub fn with_cause(&self) -> String {
        format!("{self}: {}", self.source)
    }
}

impl From<DiskError> for Unusable {
    fn from(error: DiskError) -> Self {
        Self(error.with_cause())
    }
}

/// What a failed step means for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskErrorKind {
    /// No room for the bytes or the name (ENOSPC, EDQUOT): nothing was changed.
    Full,
    /// Something is in use (EBUSY): nothing was changed.
    Busy,
    /// The step was undone or never begun.
    Failed,
    /// The step took effect, but a power cut may still undo it.
    Unsettled,
}

/// Why a volume could not be mounted or unmounted.
#[derive(Debug, Error)]
pub enum BindError {
    /// The directory of the volume is not there.
    #[error("its directory is missing")]
    NoData,
    /// The target holds a mount of something else, or of the volume with other options.
    #[error("{0}")]
    Conflict(String),
    /// Something is in the way that hostdir did not make.
    #[error("{0}")]
    InTheWay(String),
    /// The target cannot be reached safely.
    #[error("{0}")]
    BadTarget(String),
    /// A system call failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A volume found on a pool that was just opened.
#[derive(Debug)]
pub struct Found {
    /// Name of its directory.
    pub id: VolumeId,
    /// What its record says, or why that cannot be read.
    pub record: Result<Record, String>,
}

/// A pool that was just opened.
pub struct Opened {
    /// Identity of the pool.
    pub id: PoolId,
    /// Name of the filesystem it is on, as mount(8) calls it.
    pub filesystem: String,
    /// Bytes that were in use on the filesystem when the pool was made: none of them a volume's.
    pub foreign: Bytes,
    /// The volumes on it.
    pub volumes: Vec<Found>,
    /// Where its volumes are mounted already.
    pub targets: Vec<(VolumeId, TargetPath)>,
    /// The way to change it.
    pub disk: Box<dyn Disk>,
}

/// One pool, opened and locked by this process.
///
/// Every verb is whole or not at all, and durable when it returns without an error; repeating one is harmless.
pub trait Disk: Send + Sync {
    /// Whether the pool is still the one that was opened, and all that took effect on it is durable (what a failed
    /// sync left open is synced again here). Cheap enough for every call.
    ///
    /// # Errors
    /// It is not: what happened and what to do.
    fn present(&self) -> Result<(), Unusable>;

    /// Whether a file can be made on it. A full pool will do: deletes still work.
    ///
    /// # Errors
    /// It cannot: what happened and what to do.
    fn writable(&self) -> Result<(), Unusable>;

    /// Size and use of the filesystem.
    ///
    /// # Errors
    /// The filesystem does not answer.
    fn space(&self) -> Result<Space, DiskError>;

    /// Records a new volume.
    ///
    /// # Errors
    /// A step failed; unless the error is [`DiskErrorKind::Unsettled`], nothing of the volume is there.
    fn claim(&self, record: &Record) -> Result<(), DiskError>;

    /// Makes the directory of a volume, held to its size where that can be had, and records `record` in place of its last
    /// record. The record as it was written: the disk enters the project that it has chosen.
    ///
    /// # Errors
    /// A step failed; the old record or the new one is there, and an empty directory or none.
    fn prepare(&self, record: &Record) -> Result<Record, DiskError>;

    /// Holds a volume to the size that `record` gives it, and records that in place of its last record.
    ///
    /// # Errors
    /// A step failed; unless the error is [`DiskErrorKind::Unsettled`], the old record is there.
    fn rewrite(&self, record: &Record) -> Result<(), DiskError>;

    /// By what the volumes are held to their sizes, as it is now.
    ///
    /// # Errors
    /// By nothing: why, and what to do about it.
    fn enforcement(&self) -> Result<Means, String>;

    /// Why this volume is held to nothing, although others are.
    fn loose(&self, id: &VolumeId) -> Option<String>;

    /// Looks whether a volume is still held to its size, and holds it again if it can be; else it is loose from now on.
    ///
    /// # Errors
    /// Its directory cannot be opened.
    fn check_limit(&self, record: &Record) -> Result<(), DiskError>;

    /// What a volume takes, if `mounted` is its directory.
    ///
    /// # Errors
    /// It cannot be told.
    fn measure(&self, record: &Record, mounted: Inode) -> Result<Measure, DiskError>;

    /// The directory of a volume, if it is there.
    ///
    /// # Errors
    /// It cannot be told.
    fn data(&self, id: &VolumeId) -> Result<Option<Inode>, DiskError>;

    /// Mounts the directory of a volume at `target`. A mount that is there already, with the same options, will do; says
    /// whether one was made.
    ///
    /// # Errors
    /// Nothing was mounted.
    fn bind(&self, id: &VolumeId, target: &TargetPath, options: MountOptions) -> Result<bool, BindError>;

    /// Takes a volume out of the pool, to be erased in the background. A volume that is not there will do.
    ///
    /// # Errors
    /// A step failed; unless the error is [`DiskErrorKind::Unsettled`], the volume is still there.
    fn discard(&self, id: &VolumeId) -> Result<(), DiskError>;
}

/// The machine.
pub trait Host: Send + Sync {
    /// Opens a pool and locks it.
    ///
    /// # Errors
    /// It cannot be used now; asking again later is worth while.
    fn open(&self, pool: &PoolConfig) -> Result<Opened, Unusable>;

    /// What is mounted at `target`, if anything is.
    ///
    /// # Errors
    /// It cannot be told.
    fn mounted(&self, target: &TargetPath) -> Result<Option<Inode>, BindError>;

    /// Unmounts the volume from `target` and removes the target. A target that is not there will do; says whether one
    /// was. `data` is the directory of the volume, where it is known.
    ///
    /// # Errors
    /// The target holds something that is not proven to be this volume, or a system call failed.
    fn unbind(&self, id: &VolumeId, target: &TargetPath, data: Option<Inode>) -> Result<bool, BindError>;
}

/// How far a promise has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// No disk has ever had data of the volume.
    Claimed,
    /// Its node has its data.
    Ready,
    /// Its node had its data, and does not now.
    Lost,
}

/// Why a promise is not kept, in a word and in a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hindrance {
    /// The word: [`Hindrance::MOUNTED`] and others.
    pub reason: String,
    /// The sentence.
    pub message: String,
}

impl Hindrance {
    /// It cannot be deleted while it is mounted.
    pub const MOUNTED: &str = "Mounted";
}

/// A volume that was promised: a HostVolume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promise {
    /// The volume's id, and the name of the HostVolume.
    pub id: VolumeId,
    /// The UID of the HostVolume.
    pub uid: Uuid,
    /// The version of the HostVolume (`resourceVersion`): a change of another version is refused.
    pub version: String,
    /// The name CreateVolume was called with.
    pub name: String,
    /// The claim it is for.
    pub claim: Option<Claim>,
    /// The node it is promised of.
    pub node: NodeName,
    /// The pool there.
    pub pool: PoolName,
    /// Its size.
    pub bytes: Bytes,
    /// Owner and mode of its top directory.
    pub directory: Directory,
    /// How far it has come.
    pub stage: Stage,
    /// The pool that has, or had, data of it: it must never be made anew.
    pub made_on: Option<PoolId>,
    /// What its node says about it.
    pub hindrance: Option<Hindrance>,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Who has to let go of it before it is gone, beside its node (other finalizers).
    pub holders: Vec<String>,
    /// When it was made.
    pub created: Timestamp,
}

/// Where volumes are promised to this node.
pub trait Ledger: Send + Sync {
    /// The promise of a volume.
    ///
    /// # Errors
    /// It cannot be told.
    fn promise(&self, id: &VolumeId) -> Result<Option<Promise>, Reason>;

    /// The promise of a volume as it is at this moment.
    ///
    /// # Errors
    /// It cannot be told.
    fn look_up(&self, id: &VolumeId) -> Result<Option<Promise>, Reason>;

    /// Notes that from now on there may be data of the volume on the pool of `record`. Repeating it is harmless.
    ///
    /// # Errors
    /// It is not noted, so there must be no data: the volume was deleted meanwhile, or has data elsewhere.
    fn keep(&self, record: &Record) -> Result<(), Reason>;
}

/// The ledger of local mode: a volume is promised where its record is, on the disk, and nowhere else.
pub struct OnDisk;

impl Ledger for OnDisk {
    fn promise(&self, _: &VolumeId) -> Result<Option<Promise>, Reason> {
        Ok(None)
    }

    fn look_up(&self, _: &VolumeId) -> Result<Option<Promise>, Reason> {
        Ok(None)
    }

    fn keep(&self, _: &Record) -> Result<(), Reason> {
        Ok(())
    }
}

/// A volume that is to be promised.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Its id.
    pub id: VolumeId,
    /// The name CreateVolume was called with.
    pub name: String,
    /// The claim it is for.
    pub claim: Option<Claim>,
    /// The node.
    pub node: NodeName,
    /// The pool there.
    pub pool: PoolName,
    /// Its size.
    pub bytes: Bytes,
    /// Owner and mode of its top directory.
    pub directory: Directory,
}

/// The book in which all promises of a cluster are: the API server. What it says is true when it says it.
pub trait Book: Send + Sync {
    /// Promises a volume, unless one is promised under its id: then that one. Says whether it was made.
    ///
    /// # Errors
    /// It cannot be told whether it was.
    fn promise(&self, draft: &Draft) -> Result<(Promise, bool), Reason>;

    /// The promise of a volume.
    ///
    /// # Errors
    /// It cannot be told.
    fn look_up(&self, id: &VolumeId) -> Result<Option<Promise>, Reason>;

    /// Begins to delete the promise of this UID; it is gone when its node has let go of it. What is left of it, if anything.
    ///
    /// # Errors
    /// It cannot be told.
    fn delete(&self, id: &VolumeId, uid: Uuid) -> Result<Option<Promise>, Reason>;

    /// Promises more: so many bytes, if the promise still is of this version; nothing if it is not, else as it is then.
    ///
    /// # Errors
    /// It cannot be told.
    fn expand(&self, promise: &Promise, bytes: Bytes) -> Result<Option<Promise>, Reason>;

    /// Ends a promise that is being deleted in place of its node, if it still is of this version; says whether it did.
    ///
    /// # Errors
    /// It cannot be told.
    fn release(&self, promise: &Promise) -> Result<bool, Reason>;
}
