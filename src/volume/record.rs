//! `volume.json`: what is known about one volume, kept beside its data.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};
use uuid::Uuid;

use super::id::VolumeId;
use super::size::Bytes;

/// Identity of a pool: random, made once, kept on the pool's own disk. It tells a disk from its replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct PoolId(Uuid);

impl PoolId {
    /// A new identity from random bytes.
    pub(crate) fn from_random(bytes: [u8; 16]) -> Self {
        Self(uuid::Builder::from_random_bytes(bytes).into_uuid())
    }

    #[cfg(test)]
    pub(crate) fn random() -> Self {
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

/// The PersistentVolumeClaim that a volume was made for, if external-provisioner names it (`--extra-create-metadata`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// Owner and permission bits of a volume's top directory when it is made. Later changes are the tenant's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Directory {
    /// Permission bits, with set-user-id, set-group-id and sticky: at most 0o7777.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Default for Directory {
    /// root:root and 0770: root in a pod can write at once, any other user through `fsGroup` (the kubelet gives the
    /// directory to that group), and nobody else on the node can.
    fn default() -> Self {
        Self {
            mode: 0o770,
            uid: 0,
            gid: 0,
        }
    }
}

/// What CreateVolume asked for, wherever the volume is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeSpec {
    /// The name CreateVolume was called with.
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) claim: Option<Claim>,
    /// The size that is allocated to the volume.
    pub(crate) bytes: Bytes,
    pub(crate) directory: Directory,
}

/// The phase of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Phase {
    /// Its room is allocated. No disk has ever had its data.
    #[default]
    Claimed,
    /// Its node has its data. From here on, a missing directory means lost data.
    Ready,
    /// Its node had its data, and does not have it now.
    Lost,
}

impl Phase {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Claimed => "Claimed",
            Self::Ready => "Ready",
            Self::Lost => "Lost",
        }
    }
}

/// One volume, as recorded on its pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    /// Version of this format. Records with any other than [`Record::FORMAT`] are refused.
    pub(crate) format: u32,
    /// The volume's id, equal to the name of the directory that this record is in.
    pub(crate) id: VolumeId,
    /// The UID of its HostVolume, if there is one: it distinguishes the volume from an earlier one of the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uid: Option<Uuid>,
    /// The UIDs of earlier HostVolumes whose data this was: PersistentVolumes may still name them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) adopted: Vec<Uuid>,
    #[serde(flatten)]
    pub(crate) spec: VolumeSpec,
    /// The project that its files are in, where the filesystem limits by project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) project: Option<u32>,
    /// The pool it was made on.
    pub(crate) pool_id: PoolId,
    /// Whether a pod has ever used it.
    #[serde(rename = "phase", serialize_with = "as_phase", deserialize_with = "is_ready")]
    pub(crate) ready: bool,
    pub(crate) created: Timestamp,
}

impl Record {
    pub(crate) const FORMAT: u32 = 1;

    /// Whether the volume is that of this HostVolume, or of one whose data it has adopted.
    pub(crate) fn is_of(&self, uid: Uuid) -> bool {
        self.uid == Some(uid) || self.adopted.contains(&uid)
    }
}

/// The phases that a record can have: no record says that data is lost.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum RecordedPhase {
    Claimed,
    Ready,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn as_phase<S: Serializer>(ready: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    let phase = if *ready {
        RecordedPhase::Ready
    } else {
        RecordedPhase::Claimed
    };
    phase.serialize(serializer)
}

fn is_ready<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    RecordedPhase::deserialize(deserializer).map(|phase| matches!(phase, RecordedPhase::Ready))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records as hostdir 389b711 wrote them. Every later version must read these.
    #[test]
    fn records_of_earlier_versions_are_read() {
        let claimed = r#"{"format":1,"id":"pvc-1","name":"pvc-1","bytes":1073741824,"directory":{"mode":504,"uid":0,"gid":0},
            "poolId":"6b1f9a64-8d0e-4a3c-9a57-1f0a8c1d2e3f","phase":"claimed","created":"2026-01-02T03:04:05.678Z"}"#;
        let record: Record = serde_json::from_str(claimed).unwrap();
        assert!(!record.ready && record.uid.is_none() && record.project.is_none() && record.spec.claim.is_none());
        assert_eq!(record.spec.bytes, Bytes(1 << 30));
        let ready = r#"{
  "format": 1,
  "id": "pvc-2",
  "uid": "0b5bd0f0-5b0f-4b0e-8b0a-5b5b5b5b5b5b",
  "name": "pvc-2",
  "claim": {
    "namespace": "default",
    "name": "data"
  },
  "bytes": 10485760,
  "project": 1073741825,
  "directory": {
    "mode": 1528,
    "uid": 1000,
    "gid": 2000
  },
  "poolId": "6b1f9a64-8d0e-4a3c-9a57-1f0a8c1d2e3f",
  "phase": "ready",
  "created": "2026-01-02T03:04:05.678Z"
}"#;
        let record: Record = serde_json::from_str(ready).unwrap();
        assert!(record.ready);
        assert_eq!(record.project, Some(1_073_741_825));
        // An earlier hostdir can read what this one writes: the same keys with the same values, in any order.
        let written: serde_json::Value = serde_json::to_value(&record).unwrap();
        assert_eq!(written, serde_json::from_str::<serde_json::Value>(ready).unwrap());
    }

    #[test]
    fn a_phase_that_no_record_has_is_refused() {
        let lost = r#"{"format":1,"id":"a","name":"a","bytes":1,"directory":{"mode":504,"uid":0,"gid":0},
            "poolId":"6b1f9a64-8d0e-4a3c-9a57-1f0a8c1d2e3f","phase":"lost","created":"2026-01-02T03:04:05Z"}"#;
        assert!(serde_json::from_str::<Record>(lost).is_err());
    }
}
