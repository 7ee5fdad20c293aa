//! What the core needs from the machine it runs on. [`crate::linux`] implements it; tests of the core use an implementation
//! in memory.

use std::error::Error;
use std::path::PathBuf;

use jiff::Timestamp;
use thiserror::Error;

use super::access::{AccessMode, MountOptions, TargetPath};
use super::id::{PoolName, VolumeId};
use super::quota::{QuotaConfig, QuotaKind};
use super::record::{PoolId, Record};
use super::room::{Limits, Space};
use super::size::Bytes;

/// A pool as the administrator configures it.
#[derive(Clone, Debug)]
pub(crate) struct PoolConfig {
    /// The name that StorageClasses use.
    pub(crate) name: PoolName,
    /// The absolute path of its directory.
    pub(crate) path: PathBuf,
    /// Whether the directory must be on a disk of its own. Without this, an unmounted disk may pass for an empty pool.
    pub(crate) require_mount: bool,
    /// `poolId`: a pool with any other identity is refused.
    pub(crate) expected: Option<PoolId>,
    pub(crate) limits: Limits,
    pub(crate) quotas: QuotaConfig,
}

/// What one volume uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) bytes: Bytes,
    /// `None` where the filesystem does not count inodes.
    pub(crate) inodes: Option<u64>,
}

/// The usage of a mounted volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// What is mounted is not the volume's directory.
    Elsewhere,
    /// Its files are still being counted.
    Counting,
    /// They could not all be counted.
    Uncounted,
    Takes(Usage),
}

/// Identity of a directory until the machine reboots. A bind mount has the same identity as its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

/// Why a pool cannot be used now, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub(crate) struct Unusable(pub(crate) String);

/// Why a pool is not the one that was opened.
#[derive(Clone, Debug)]
pub(crate) enum Absent {
    /// The same directory, but its disk was unmounted and mounted again: the pool has to be opened again.
    Remounted,
    Unusable(Unusable),
}

impl From<Absent> for Unusable {
    fn from(absent: Absent) -> Self {
        match absent {
            Absent::Remounted => {
                Self("its disk was mounted again, and the pool is being opened again; the call will be retried".into())
            }
            Absent::Unusable(why) => why,
        }
    }
}

/// How a pool is that is still the one that was opened.
#[derive(Clone, Debug)]
pub(crate) struct Inspection {
    /// Whether a file can be made on it. A full pool is writable: deletes still work.
    pub(crate) writable: Result<(), Unusable>,
    pub(crate) space: Result<Space, Unusable>,
    /// Which quotas limit volumes, or why none do.
    pub(crate) enforcement: Result<QuotaKind, String>,
}

/// A failed step on the disk.
#[derive(Debug, Error)]
#[error("cannot {verb} {path}")]
pub(crate) struct DiskError {
    /// What was tried, as a verb.
    pub(crate) verb: &'static str,
    pub(crate) path: PathBuf,
    /// What the failure means for the caller.
    pub(crate) kind: DiskErrorKind,
    #[source]
    pub(crate) source: Box<dyn Error + Send + Sync>,
}

impl DiskError {
    /// What was tried and what the kernel said, on one line.
    pub(crate) fn with_cause(&self) -> String {
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
pub(crate) enum DiskErrorKind {
    /// No room for the bytes or the name (ENOSPC, EDQUOT): nothing was changed.
    Full,
    /// Something is in use (EBUSY): nothing was changed.
    Busy,
    /// The step was undone or never began.
    Failed,
    /// The step took effect, but a power cut may still undo it.
    Unsettled,
}

/// Whether a step took effect, even if it is not durable yet.
pub(crate) fn took_effect<T>(step: &Result<T, DiskError>) -> bool {
    step.as_ref()
        .err()
        .is_none_or(|error| error.kind == DiskErrorKind::Unsettled)
}

/// Why a volume could not be mounted or unmounted.
#[derive(Debug, Error)]
pub(crate) enum BindError {
    #[error("its directory is missing")]
    NoData,
    /// The target holds a mount of something else, or of the volume with other options.
    #[error("{0}")]
    Conflict(String),
    /// Something is in the way that hostdir did not make.
    #[error("{0}")]
    InTheWay(String),
    /// What is mounted there is not proven to be this volume.
    #[error(
        "what is mounted there is not this volume; hostdir leaves it alone; unmount it by hand if it is not needed"
    )]
    Unproven,
    /// The target cannot be reached safely.
    #[error("{0}")]
    BadTarget(String),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A mount of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) target: TargetPath,
    /// The requested access mode; `None` if the mount was made before this process started.
    pub(crate) mode: Option<AccessMode>,
}

/// A volume on a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PoolVolume {
    /// The name of its directory.
    pub(crate) id: VolumeId,
    /// Its record, or why that cannot be read.
    pub(crate) record: Result<Record, String>,
    /// Where it is mounted, as far as this process knows. Entries are checked before they are relied on.
    pub(crate) mounts: Vec<Mount>,
    /// When it was mounted last or, if it never was, recorded.
    pub(crate) used: Timestamp,
}

impl PoolVolume {
    pub(crate) fn new(id: VolumeId, record: Result<Record, String>) -> Self {
        Self {
            id,
            record,
            mounts: Vec::new(),
            used: Timestamp::now(),
        }
    }
}

/// A pool that was just opened.
pub(crate) struct Opened {
    pub(crate) id: PoolId,
    /// The filesystem it is on, as mount(8) calls it.
    pub(crate) filesystem: String,
    /// Bytes that were in use on the filesystem when the pool was made: none of them a volume's.
    pub(crate) foreign: Bytes,
    pub(crate) volumes: Vec<PoolVolume>,
    /// The verbs on the pool.
    pub(crate) disk: Box<dyn Disk>,
}

/// One pool, opened and locked by this process.
///
/// Every verb takes effect as a whole or not at all, and is durable when it returns without an error; repeating it is
/// harmless. A failed verb has changed nothing, unless its error is [`DiskErrorKind::Unsettled`].
pub(crate) trait Disk: Send + Sync {
    /// Checks that the pool is still the one that was opened. Cheap enough for every call, but it may hang as any other.
    fn present(&self) -> Result<(), Absent>;

    /// Finds out how the pool is. For the thread that opened it.
    fn inspect(&self) -> Result<Inspection, Absent>;

    /// Whether every change that took effect is durable. Does not touch the disk.
    fn is_settled(&self) -> bool;

    /// Makes changes durable that took effect although their sync failed ([`DiskErrorKind::Unsettled`]).
    fn settle(&self) -> Result<(), DiskError>;

    /// Reads a record again that could not be read.
    fn reload(&self, id: &VolumeId) -> Result<Record, String>;

    /// Records a new volume, without a directory.
    fn create(&self, record: &Record) -> Result<(), DiskError>;

    /// Makes the directory of a volume, limited to its size where the filesystem supports it, and then replaces its record.
    /// Returns the record as written: the disk adds the project that it has chosen.
    fn make_directory(&self, record: &Record) -> Result<Record, DiskError>;

    /// Limits a volume to the size in `record`, and then replaces its record.
    fn resize(&self, record: &Record) -> Result<(), DiskError>;

    /// The kind of quotas that limit volumes now.
    ///
    /// # Errors
    /// No quotas limit volumes: why, and what to do about it.
    fn enforcement(&self) -> Result<QuotaKind, String>;

    /// Why this volume is not limited, although others are.
    fn unenforced(&self, id: &VolumeId) -> Option<String>;

    /// Checks the limit of a volume, and sets it again if necessary. If that fails, [`Disk::unenforced`] says why from now
    /// on.
    fn enforce(&self, record: &Record) -> Result<(), DiskError>;

    /// What a volume uses, if `mounted` is its directory.
    fn measure(&self, record: &Record, mounted: Inode) -> Result<Measure, DiskError>;

    /// The directory of a volume, if it exists.
    fn data(&self, id: &VolumeId) -> Result<Option<Inode>, DiskError>;

    /// Mounts the directory of a volume at `target`, unless it is mounted there already with the same options. Returns whether
    /// a mount was made.
    fn bind(&self, id: &VolumeId, target: &TargetPath, options: MountOptions) -> Result<bool, BindError>;

    /// Moves a volume to the trash, to be erased in the background. Idempotent.
    fn discard(&self, id: &VolumeId) -> Result<(), DiskError>;
}

/// The machine.
pub(crate) trait Host: Send + Sync {
    /// Opens a pool and locks it. The calling thread must be the pool's own and hold no open files: it gets descriptors of its own,
    /// and [`Disk::inspect`] is called on it.
    ///
    /// # Errors
    /// The pool cannot be used now; a later call may succeed.
    fn open(&self, pool: &PoolConfig) -> Result<Opened, Unusable>;

    /// What is mounted at `target`, if anything is.
    fn mounted(&self, target: &TargetPath) -> Result<Option<Inode>, BindError>;

    /// Unmounts the volume from `target` and removes the target. Idempotent: returns whether the target existed. `data` is
    /// the directory of the volume, if known.
    ///
    /// # Errors
    /// [`BindError::Unproven`]: what is mounted there is not proven to be this volume; `data` may prove it. Otherwise the target holds
    /// something else, or a system call failed.
    fn unbind(&self, id: &VolumeId, target: &TargetPath, data: Option<Inode>) -> Result<bool, BindError>;
}
