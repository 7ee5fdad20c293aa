//! `volume.json`: what is known of one volume, kept beside its data.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::id::VolumeId;
use super::size::Bytes;

/// Identity of a pool: random, made once, kept on the pool's own disk. It tells a disk from its replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PoolId(Uuid);

impl PoolId {
    /// A new identity.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl std::str::FromStr for PoolId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        text.parse().map(Self)
    }
}

impl std::fmt::Display for PoolId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The claim (PVC) a volume was made for, where external-provisioner passes it on (`--extra-create-metadata`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Namespace of the claim.
    pub namespace: String,
    /// Name of the claim.
    pub name: String,
}

/// Owner and permission bits of a volume's top directory when it is made. Later changes are the tenant's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Permission bits, with set-user-id, set-group-id and sticky: at most 0o7777.
    pub mode: u32,
    /// Owning user.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
}

impl Default for Directory {
    /// root:root and 0770: root in a pod can write at once, any other user through `fsGroup` (the kubelet gives the
    /// group the directory), and nobody else on the node can.
    fn default() -> Self {
        Self {
            mode: 0o770,
            uid: 0,
            gid: 0,
        }
    }
}

/// How far a volume has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Promised; nobody has ever seen its directory.
    Claimed,
    /// Its directory exists, and a pod may have written into it: from here on a missing directory is lost data.
    Ready,
}

/// One volume, as recorded on its pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Version of this format; [`Record::FORMAT`]. Another one is refused, not guessed at.
    pub format: u32,
    /// The volume's id, equal to the name of the directory this record lies in.
    pub id: VolumeId,
    /// The UID of its HostVolume, where there is one: it tells the volume from an earlier one of the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<Uuid>,
    /// The name CreateVolume was called with.
    pub name: String,
    /// The claim it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
    /// Size promised.
    pub bytes: Bytes,
    /// The project that its files are in, where the filesystem limits by project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<u32>,
    /// Owner and mode of the top directory.
    pub directory: Directory,
    /// The pool it was made on.
    pub pool_id: PoolId,
    /// How far it has come.
    pub phase: Phase,
    /// When it was made.
    pub created: Timestamp,
}

impl Record {
    /// The version written and understood.
    pub const FORMAT: u32 = 1;
}
