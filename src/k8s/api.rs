//! The objects that hostdir keeps in the API server: `HostVolume` and `HostNode`.
//!
//! Both are cluster-scoped. A HostVolume records a volume: its spec never changes, except that the capacity may grow; the
//! volume's node writes its status. In its HostNode, a node publishes its pools.

#![expect(unreachable_pub, reason = "the derive macro makes private copies of public structs")]
#![expect(clippy::duplicated_attributes, reason = "each is an argument of another printcolumn")]

pub use crate::volume::record::Phase;
use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The finalizer that keeps a HostVolume until its node has moved the data into the trash.
pub const FINALIZER: &str = "hostdir.csi/node";

/// An annotation of a HostVolume, with its own UID: its data may be deleted when it is deleted. DeleteVolume sets it. A HostVolume
/// cannot be deleted without (the chart's admission policy), and a node that is asked nevertheless keeps the data.
pub const DELETE_DATA: &str = "hostdir.csi/delete-data";

/// An annotation of a HostVolume that is being deleted, with its own UID: it may go without its data.
pub const LEAVE_DATA: &str = "hostdir.csi/leave-data";

/// An annotation of a HostVolume that never had data, with the UID of an earlier one of the same name: it takes the data that the
/// earlier one has left on its node.
pub const ADOPT_DATA: &str = "hostdir.csi/adopt-data";

/// A condition of a HostVolume that has data: its PersistentVolume does not exist.
pub const PV_GONE: &str = "PersistentVolumeGone";

/// A volume: recorded by a controller, made by its node when a pod first uses it.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[kube(
    group = "hostdir.csi",
    version = "v1alpha1",
    kind = "HostVolume",
    status = "HostVolumeStatus",
    shortname = "hv",
    selectable = ".spec.node",
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.pool"),
    printcolumn(name = "Capacity", type_ = "string", json_path = ".spec.capacity"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".spec.claim.namespace"),
    printcolumn(name = "Claim", type_ = "string", json_path = ".spec.claim.name"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = ("self.node == oldSelf.node && self.pool == oldSelf.pool && self.name == oldSelf.name", "node, pool and name never change"),
    validation = ("self.directory == oldSelf.directory && has(self.claim) == has(oldSelf.claim) && (!has(self.claim) || self.claim == oldSelf.claim)", "directory and claim never change"),
    validation = ("quantity(self.capacity).compareTo(quantity(oldSelf.capacity)) >= 0", "capacity never shrinks"),
)]
pub struct HostVolumeSpec {
    /// The node that has the volume.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// The pool on that node.
    #[schemars(length(min = 1, max = 63))]
    pub pool: String,
    /// The name that CreateVolume was called with: the name of the PersistentVolume.
    #[schemars(length(min = 1, max = 128))]
    pub name: String,
    /// The size of the volume, as a quantity.
    #[schemars(length(min = 1, max = 32))]
    #[x_kube(validation = ("self.matches('^[0-9]+(k|M|G|T|Ki|Mi|Gi|Ti)?$')", "capacity must be a whole quantity, such as 10Gi"))]
    pub capacity: String,
    /// The claim that the volume was created for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimReference>,
    /// Owner and mode of the volume's directory when it is created.
    pub directory: DirectorySpec,
}

/// A PersistentVolumeClaim.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
pub struct ClaimReference {
    /// Its namespace.
    #[schemars(length(max = 253))]
    pub namespace: String,
    /// Its name.
    #[schemars(length(max = 253))]
    pub name: String,
}

/// Owner and mode of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct DirectorySpec {
    /// Octal mode, such as 0770.
    #[schemars(length(max = 5))]
    pub mode: String,
    /// Owning user.
    #[schemars(range(max = 4_294_967_295_u32))]
    pub uid: u32,
    /// Owning group.
    #[schemars(range(max = 4_294_967_295_u32))]
    pub gid: u32,
}

/// The state of a volume, as its node reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostVolumeStatus {
    /// The phase of the volume.
    #[serde(default)]
    pub phase: Phase,
    /// The id of the pool that has, or had, the volume's data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub pool_id: Option<String>,
    /// Why the node cannot do what is asked, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
    /// Why the node cannot do what is asked, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub message: Option<String>,
    /// What the controllers have noticed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub conditions: Vec<Condition>,
}

/// A condition, as Kubernetes defines it (`metav1.Condition`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What the condition is about, in CamelCase.
    #[serde(rename = "type")]
    #[schemars(length(max = 316))]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    #[schemars(length(max = 16))]
    pub status: String,
    /// Why it has this status, in one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Why it has this status, in a sentence.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// When the status changed last (RFC 3339).
    #[schemars(length(max = 64))]
    pub last_transition_time: String,
}

/// A node that hostdir runs on.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[kube(
    group = "hostdir.csi",
    version = "v1alpha1",
    kind = "HostNode",
    status = "HostNodeStatus",
    shortname = "hn",
    printcolumn(name = "Pools", type_ = "string", json_path = ".status.pools[*].name"),
    printcolumn(name = "Free", type_ = "string", json_path = ".status.pools[*].free"),
    printcolumn(name = "Quota", type_ = "string", json_path = ".status.pools[*].quota"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version"),
    printcolumn(name = "Orphans", type_ = "integer", json_path = ".status.orphanCount"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.pools[*].message",
        priority = 1
    )
)]
pub struct HostNodeSpec {}

/// The state of a node's pools, as the node reports it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostNodeStatus {
    /// The version of hostdir on the node.
    #[schemars(length(max = 64))]
    pub version: String,
    /// The pools of the node.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub pools: Vec<PoolStatus>,
    /// Volumes on the node's pools that have no HostVolume. hostdir never deletes them automatically.
    #[serde(default)]
    #[schemars(length(max = 100))]
    pub orphans: Vec<Orphan>,
    /// How many orphans there are; only the first hundred are listed.
    #[serde(default)]
    #[schemars(range(max = 4_294_967_295_u32))]
    pub orphan_count: u32,
    /// What is wrong with the node's pools as a whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub conditions: Vec<Condition>,
}

/// A pool of a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolStatus {
    /// The name that StorageClasses use.
    #[schemars(length(max = 63))]
    pub name: String,
    /// The id of the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub id: Option<String>,
    /// The type of its filesystem, as mount(8) calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub filesystem: Option<String>,
    /// Size of the filesystem without the part reserved for root, as a quantity. Left out if the pool cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub total: Option<String>,
    /// Free space, as a quantity, rounded down in steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub free: Option<String>,
    /// Space in use on the filesystem when the pool was created, as a quantity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub foreign: Option<String>,
    /// The part that is never allocated: a size, or a share of the filesystem.
    #[schemars(length(max = 32))]
    pub reserve: String,
    /// How many times the pool's size may be allocated.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub overcommit: f64,
    /// Which quotas limit its volumes: `project quotas`, `quota groups`, `simple quotas`, or `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub quota: Option<String>,
    /// Why no quotas limit its volumes, and what to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub quota_message: Option<String>,
    /// How many volumes with data have no limit, although quotas limit the others.
    #[serde(default)]
    #[schemars(range(max = 4_294_967_295_u32))]
    pub unlimited: u32,
    /// Why the pool cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub message: Option<String>,
}

/// A volume that is on a pool but has no HostVolume.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
pub struct Orphan {
    /// The id of the volume: the name of its directory below `volumes/`.
    #[schemars(length(max = 63))]
    pub id: String,
    /// The pool that the volume is on.
    #[schemars(length(max = 63))]
    pub pool: String,
    /// The UID of the HostVolume that it was made for, if its record can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uid: Option<String>,
    /// The claim that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimReference>,
}

/// The CustomResourceDefinitions of both objects.
#[must_use]
pub fn definitions() -> Vec<Value> {
    let definition = |definition| {
        let mut definition = serde_json::to_value(definition).unwrap_or_default();
        // `helm uninstall` must not delete every record of every volume.
        definition["metadata"]["annotations"] = json!({"helm.sh/resource-policy": "keep"});
        definition
    };
    let mut volume = definition(HostVolume::crd());
    // A volume without a status from its node is Claimed.
    let status = "/spec/versions/0/schema/openAPIV3Schema/properties/status";
    if let Some(status) = volume.pointer_mut(status) {
        status["default"] = json!({"phase": "Claimed"});
    }
    vec![volume, definition(HostNode::crd())]
}
