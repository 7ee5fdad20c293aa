//! Converts objects of the API server to core types and back.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use jiff::Timestamp;
use kube::api::{DynamicObject, ObjectMeta};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::api::{
    self, ADOPT_DATA, ClaimReference, DELETE_DATA, DirectorySpec, FINALIZER, HostNodeStatus, HostVolumeSpec,
    HostVolumeStatus, LEAVE_DATA, PV_GONE,
};
use crate::volume::controller::cache::NodeState;
use crate::volume::host_volume::{Decision, HostVolume, NewHostVolume, StatusReason};
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::pool_status::PoolStatus;
use crate::volume::record::{Claim, Directory, VolumeSpec};
use crate::volume::room::{Limits, OVERCOMMIT_MAX, Space};
use crate::volume::size::Bytes;

/// The object for a new volume.
pub(super) fn new_host_volume(new: &NewHostVolume) -> api::HostVolume {
    let NewHostVolume { id, node, pool, spec } = new;
    let VolumeSpec {
        name,
        claim,
        bytes,
        directory,
    } = spec;
    let claim = claim.as_ref().map(|claim| ClaimReference {
        namespace: claim.namespace.clone(),
        name: claim.name.clone(),
    });
    api::HostVolume {
        metadata: ObjectMeta {
            name: Some(id.to_string()),
            finalizers: Some(vec![FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: HostVolumeSpec {
            node: node.to_string(),
            pool: pool.to_string(),
            name: name.clone(),
            capacity: bytes.quantity(),
            claim,
            directory: DirectorySpec {
                mode: format!("{:04o}", directory.mode),
                uid: directory.uid,
                gid: directory.gid,
            },
        },
        status: None,
    }
}

/// # Errors
/// A field has a value that hostdir does not write.
pub(super) fn host_volume(object: api::HostVolume) -> anyhow::Result<HostVolume> {
    let id = VolumeId::parse(object.metadata.name.as_deref().unwrap_or_default())?;
    read(&id, object).with_context(|| format!("HostVolume {id} cannot be read; was it written by hand?"))
}

/// Decodes a HostVolume. If only its place and its size can be read, they are returned with the reason: its room counts all the
/// same, and its data is not without an owner.
///
/// # Errors
/// Not even that can be read.
pub(super) fn any_host_volume(object: DynamicObject) -> anyhow::Result<HostVolume> {
    let DynamicObject { metadata, data, .. } = object;
    let id = VolumeId::parse(metadata.name.as_deref().unwrap_or_default())?;
    let whole = decode(metadata.clone(), &data).and_then(|object| read(&id, object));
    whole.or_else(|why| {
        let mut spec = json!({"name": id, "directory": {"mode": "0770", "uid": 0, "gid": 0}});
        for field in ["node", "pool", "capacity"] {
            spec[field] = data["spec"][field].clone();
        }
        let object = decode(metadata, &json!({ "spec": spec }));
        let Ok(volume) = object.and_then(|object| read(&id, object)) else {
            return Err(why);
        };
        Ok(HostVolume {
            unreadable: Some(format!("{why:#}")),
            ..volume
        })
    })
}

fn decode(metadata: ObjectMeta, data: &Value) -> anyhow::Result<api::HostVolume> {
    Ok(api::HostVolume {
        metadata,
        spec: HostVolumeSpec::deserialize(&data["spec"]).context("spec")?,
        status: Option::deserialize(&data["status"]).context("status")?,
    })
}

fn read(id: &VolumeId, object: api::HostVolume) -> anyhow::Result<HostVolume> {
    let api::HostVolume { metadata, spec, status } = object;
    let HostVolumeStatus {
        phase,
        pool_id,
        reason,
        message,
        conditions,
    } = status.unwrap_or_default();
    let uid: Uuid = metadata.uid.as_deref().context("no UID")?.parse().context("UID")?;
    let finalizers = metadata.finalizers.unwrap_or_default();
    Ok(HostVolume {
        id: id.clone(),
        uid,
        version: metadata.resource_version.context("no resourceVersion")?,
        node: NodeName::parse(&spec.node)?,
        pool: PoolName::parse(&spec.pool)?,
        spec: volume_spec(spec)?,
        phase,
        made_on: pool_id.map(|id| id.parse()).transpose().context("status.poolId")?,
        status_reason: message.map(|message| StatusReason {
            reason: reason.unwrap_or_default(),
            message,
        }),
        released: conditions.iter().any(|is| is.type_ == PV_GONE && is.status == "True"),
        deleting: metadata.deletion_timestamp.is_some(),
        unreadable: None,
        decision: decision(uid, &metadata.annotations.unwrap_or_default()),
        held: finalizers.iter().any(|name| name == FINALIZER),
        other_finalizers: finalizers.into_iter().filter(|name| name != FINALIZER).collect(),
        created: metadata.creation_timestamp.context("no creationTimestamp")?.0,
    })
}

fn decision(uid: Uuid, annotations: &BTreeMap<String, String>) -> Decision {
    let named = |name: &str| annotations.get(name).and_then(|text| text.parse::<Uuid>().ok());
    Decision {
        delete: named(DELETE_DATA) == Some(uid),
        leave: named(LEAVE_DATA) == Some(uid),
        adopt: named(ADOPT_DATA),
    }
}

fn volume_spec(spec: HostVolumeSpec) -> anyhow::Result<VolumeSpec> {
    let DirectorySpec { mode, uid, gid } = spec.directory;
    let mode = u32::from_str_radix(&mode, 8).ok().filter(|mode| *mode <= 0o7777);
    let claim = spec.claim;
    Ok(VolumeSpec {
        name: spec.name,
        claim: claim.map(|ClaimReference { namespace, name }| Claim { namespace, name }),
        bytes: spec.capacity.parse()?,
        directory: Directory {
            mode: mode.context("spec.directory.mode is not an octal mode")?,
            uid,
            gid,
        },
    })
}

/// `last` is what the API server has: it still gives the id and the filesystem of a pool that cannot be used.
pub(super) fn pool_status(name: &PoolName, status: &PoolStatus, last: Option<&api::PoolStatus>) -> api::PoolStatus {
    let space = status.space.as_ref().ok();
    let last = last.filter(|_| space.is_none());
    let size = space.map(|space| space.size());
    // On btrfs, what metadata uses changes the size.
    let rounded = |bytes: Bytes, size| bytes.rounded_down(Limits::step(size)).quantity();
    let kept = |now: Option<String>, last: Option<&String>| now.or_else(|| last.cloned());
    let enforcement = status.enforcement.as_ref();
    api::PoolStatus {
        name: name.to_string(),
        id: kept(
            status.id.map(|id| id.to_string()),
            last.and_then(|last| last.id.as_ref()),
        ),
        filesystem: kept(
            status.filesystem.clone(),
            last.and_then(|last| last.filesystem.as_ref()),
        ),
        total: size.map(|size| rounded(size, size)),
        free: space.zip(size).map(|(space, size)| rounded(space.available, size)),
        foreign: space.map(|_| status.foreign.quantity()),
        reserve: status.limits.reserve.to_string(),
        overcommit: status.limits.overcommit,
        quota: enforcement.map(|quota| quota.as_ref().map_or_else(|_| "none".into(), ToString::to_string)),
        quota_message: enforcement.and_then(|quota| quota.clone().err()),
        // If no volume has a limit, `quota` says so; this count would change with every volume.
        unlimited: match enforcement {
            Some(Ok(_)) => u32::try_from(status.unenforced).unwrap_or(u32::MAX),
            Some(Err(_)) | None => 0,
        },
        message: status.space.clone().err(),
    }
}

/// The pools that a node has published.
///
/// # Errors
/// A field has a value that hostdir does not write.
pub(super) fn pools(object: &DynamicObject) -> anyhow::Result<BTreeMap<PoolName, PoolStatus>> {
    let status = Option::<HostNodeStatus>::deserialize(&object.data["status"]).context("status")?;
    let pools = status.unwrap_or_default().pools;
    let read = |pool: &api::PoolStatus| anyhow::Ok((PoolName::parse(&pool.name)?, read_pool(pool)?));
    let read = |pool: &api::PoolStatus| read(pool).with_context(|| format!("pool {:?}", pool.name));
    pools.iter().map(read).collect()
}

/// Whether pods can be sent to a Node, decoded no further than that.
pub(super) fn node_state(node: &Value) -> NodeState {
    let taints = node["spec"]["taints"].as_array().into_iter().flatten();
    // kubectl cordon sets a taint as well.
    let mut keep_away = taints.filter(|taint| taint["effect"] != "PreferNoSchedule" && taint["key"] != UNSCHEDULABLE);
    NodeState {
        ready: is_ready(node),
        cordoned: node["spec"]["unschedulable"] == true,
        tainted: keep_away.next().is_some(),
    }
}

/// Whether a Node or a Pod has the condition Ready.
pub(super) fn is_ready(object: &Value) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    let is_ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    conditions.into_iter().flatten().any(is_ready)
}

/// The taint of a cordoned node.
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// The room of a pool, as a controller determines it from what the node has published. `None` if that is no usable pool.
pub(super) fn room(status: &api::PoolStatus, allocated: Bytes) -> Option<Bytes> {
    let PoolStatus {
        limits, space, foreign, ..
    } = read_pool(status).ok()?;
    Some(limits.room(space.ok()?, foreign, allocated))
}

/// The current time, as conditions have it.
pub(super) fn now() -> String {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

fn read_pool(status: &api::PoolStatus) -> anyhow::Result<PoolStatus> {
    let quantity = |text: &Option<String>| text.as_deref().map(str::parse::<Bytes>).transpose();
    let space = match (quantity(&status.total)?, quantity(&status.free)?) {
        (Some(total), Some(available)) => Ok(Space {
            total,
            available,
            used: total.less(available),
            ..Space::default()
        }),
        _ => Err(status.message.clone().unwrap_or_default()),
    };
    let overcommit = status.overcommit;
    ensure!(
        (0.0..=OVERCOMMIT_MAX).contains(&overcommit),
        "overcommit is {overcommit}"
    );
    Ok(PoolStatus {
        limits: Limits {
            reserve: status.reserve.parse()?,
            overcommit,
        },
        id: status.id.as_deref().map(str::parse).transpose()?,
        filesystem: status.filesystem.clone(),
        foreign: quantity(&status.foreign)?.unwrap_or_default(),
        space,
        // Controllers do not look at quotas.
        enforcement: None,
        unenforced: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::record::Phase;

    /// As hostdir 389b711 wrote them. Every later version must read these.
    #[test]
    fn objects_of_earlier_versions_are_read() {
        let object = serde_json::json!({
            "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostVolume",
            "metadata": {
                "name": "pvc-1", "uid": "0b5bd0f0-5b0f-4b0e-8b0a-5b5b5b5b5b5b", "resourceVersion": "42",
                "creationTimestamp": "2026-08-01T10:20:30Z", "finalizers": ["hostdir.csi/node", "example.org/other"],
            },
            "spec": {
                "node": "node-1", "pool": "default", "name": "pvc-1", "capacity": "10Mi",
                "claim": {"namespace": "default", "name": "data"}, "directory": {"mode": "0770", "uid": 0, "gid": 0},
            },
            "status": {"phase": "Ready", "poolId": "ee05fa5e-7c0e-46f5-9f6a-9f3cc9a1d7a2"},
        });
        let volume = host_volume(serde_json::from_value(object).unwrap()).unwrap();
        assert_eq!((volume.phase, volume.spec.bytes), (Phase::Ready, Bytes(10 << 20)));
        assert_eq!(
            volume.made_on.unwrap().to_string(),
            "ee05fa5e-7c0e-46f5-9f6a-9f3cc9a1d7a2"
        );
        assert_eq!(volume.other_finalizers, ["example.org/other"]);
        let object = serde_json::json!({
            "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostNode", "metadata": {"name": "node-1"}, "spec": {},
            "status": {
                "version": "0.1.0", "orphans": [], "orphanCount": 0,
                "pools": [
                    {"name": "default", "id": "ee05fa5e-7c0e-46f5-9f6a-9f3cc9a1d7a2", "filesystem": "ext4", "total": "100Gi",
                     "free": "40Gi", "foreign": "0", "reserve": "5%", "overcommit": 1.0, "quota": "none", "unlimited": 0},
                    {"name": "gone", "reserve": "0", "overcommit": 1.0, "unlimited": 0, "message": "its disk is missing"},
                ],
            },
        });
        let pools = pools(&serde_json::from_value(object).unwrap()).unwrap();
        let usable = |name: &str| pools[&PoolName::parse(name).unwrap()].space.clone();
        assert_eq!(usable("default").unwrap().available, Bytes(40 << 30));
        assert_eq!(usable("gone").unwrap_err(), "its disk is missing");
    }

    #[test]
    fn what_can_be_read_of_a_volume_counts() {
        let object = |change: fn(&mut Value)| {
            let mut object = json!({
                "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostVolume",
                "metadata": {
                    "name": "pvc-1", "uid": "0b5bd0f0-5b0f-4b0e-8b0a-5b5b5b5b5b5b", "resourceVersion": "42",
                    "creationTimestamp": "2026-08-01T10:20:30Z",
                },
                "spec": {
                    "node": "node-1", "pool": "default", "name": "pvc-1", "capacity": "10Mi",
                    "directory": {"mode": "0770", "uid": 0, "gid": 0},
                },
                "status": {"phase": "Ready"},
            });
            change(&mut object);
            any_host_volume(serde_json::from_value(object).unwrap())
        };
        assert_eq!(object(|_| {}).unwrap().unreadable, None);
        for change in [
            (|object| object["spec"]["directory"]["uid"] = json!(4_294_967_296_u64)) as fn(&mut Value),
            |object| object["status"]["phase"] = json!("Moving"),
            |object| object["status"]["poolId"] = json!("x"),
            |object| object["spec"]["claim"] = json!(7),
        ] {
            let volume = object(change).unwrap();
            assert!(volume.unreadable.is_some());
            assert_eq!((volume.node.as_str(), volume.spec.bytes), ("node-1", Bytes(10 << 20)));
        }
        for change in [
            (|object| object["spec"]["node"] = json!("")) as fn(&mut Value),
            |object| object["spec"]["capacity"] = json!("much"),
            |object| object["spec"] = Value::Null,
        ] {
            object(change).unwrap_err();
        }
    }
}
