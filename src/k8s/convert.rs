//! Objects of the API server as core types, and back. An object that cannot be read is one that somebody has written by
//! hand: it is said so, and left alone.

use std::collections::BTreeMap;

use anyhow::Context;
use kube::ResourceExt;
use kube::api::ObjectMeta;

use super::api::{
    ClaimReference, DirectorySpec, FINALIZER, HostNode, HostVolume, HostVolumeSpec, HostVolumeStatus, Phase, PoolStatus,
};
use crate::volume::PoolState;
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::ports::{Draft, Hindrance, Promise, Space, Stage};
use crate::volume::record::{Claim, Directory};
use crate::volume::registry::PublishedPool;
use crate::volume::room::Limits;
use crate::volume::size::Bytes;

/// A HostVolume for a draft.
pub(super) fn draft(draft: &Draft) -> HostVolume {
    let Draft {
        id,
        name,
        claim,
        node,
        pool,
        bytes,
        directory,
    } = draft;
    let claim = claim.as_ref().map(|claim| ClaimReference {
        namespace: claim.namespace.clone(),
        name: claim.name.clone(),
    });
    HostVolume {
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

/// The promise that a HostVolume is.
pub(super) fn promise(object: HostVolume) -> anyhow::Result<Promise> {
    let id = VolumeId::parse(object.metadata.name.as_deref().unwrap_or_default())?;
    read(&id, object).with_context(|| format!("HostVolume {id} cannot be read; was it written by hand?"))
}

fn read(id: &VolumeId, object: HostVolume) -> anyhow::Result<Promise> {
    let HostVolume { metadata, spec, status } = object;
    let HostVolumeSpec {
        node,
        pool,
        name,
        capacity,
        claim,
        directory,
    } = spec;
    let HostVolumeStatus {
        phase,
        pool_id,
        reason,
        message,
    } = status.unwrap_or_default();
    let mode = u32::from_str_radix(&directory.mode, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777);
    let made_on = pool_id.map(|id| id.parse()).transpose().context("status.poolId")?;
    Ok(Promise {
        id: id.clone(),
        uid: metadata.uid.context("no UID")?.parse().context("UID")?,
        version: metadata.resource_version.context("no resourceVersion")?,
        name,
        claim: claim.map(|ClaimReference { namespace, name }| Claim { namespace, name }),
        node: NodeName::parse(&node)?,
        pool: PoolName::parse(&pool)?,
        bytes: capacity.parse()?,
        directory: Directory {
            mode: mode.context("spec.directory.mode is no octal mode")?,
            uid: directory.uid,
            gid: directory.gid,
        },
        stage: match phase {
            Phase::Claimed => Stage::Claimed,
            Phase::Ready => Stage::Ready,
            Phase::Lost => Stage::Lost,
        },
        made_on,
        hindrance: message.map(|message| Hindrance {
            reason: reason.unwrap_or_default(),
            message,
        }),
        deleting: metadata.deletion_timestamp.is_some(),
        holders: metadata
            .finalizers
            .unwrap_or_default()
            .into_iter()
            .filter(|name| name != FINALIZER)
            .collect(),
        created: metadata.creation_timestamp.context("no creationTimestamp")?.0,
    })
}

/// What a node says of a pool.
pub(super) fn pool_status(state: &PoolState, last: Option<&PoolStatus>) -> PoolStatus {
    let PoolState { config, condition } = state;
    let (facts, message) = match condition {
        Ok(facts) => (Some(facts), None),
        Err(why) => (None, Some(why.to_string())),
    };
    // What was known of it is still known when it cannot be used.
    let last = last.filter(|_| facts.is_none());
    PoolStatus {
        name: config.name.to_string(),
        id: facts
            .map(|facts| facts.id.to_string())
            .or_else(|| last.and_then(|last| last.id.clone())),
        filesystem: facts
            .map(|facts| facts.filesystem.clone())
            .or_else(|| last.and_then(|last| last.filesystem.clone())),
        total: facts.map(|facts| facts.space.used.plus(facts.space.available).quantity()),
        free: facts.map(|facts| {
            let space = facts.space;
            space
                .available
                .rounded_down(Limits::step(space.used.plus(space.available)))
                .quantity()
        }),
        foreign: facts.map(|facts| facts.foreign.quantity()),
        reserve: config.limits.reserve.to_string(),
        overcommit: config.limits.overcommit,
        quota: facts.map(|facts| {
            let means = facts.enforcement.as_ref();
            means.map_or_else(|_| "none".into(), ToString::to_string)
        }),
        quota_message: facts.and_then(|facts| facts.enforcement.clone().err()),
        // Where all are, that is said once, and not anew for every volume that comes or goes.
        unlimited: facts
            .filter(|facts| facts.enforcement.is_ok())
            .map_or(0, |facts| u32::try_from(facts.unlimited).unwrap_or(u32::MAX)),
        message,
    }
}

/// What a node published of its pools; one that cannot be read is left out.
pub(super) fn published(object: &HostNode) -> anyhow::Result<(NodeName, BTreeMap<PoolName, PublishedPool>)> {
    let node = NodeName::parse(&object.name_any())?;
    let pools = object.status.iter().flat_map(|status| &status.pools);
    let read = |pool: &PoolStatus| anyhow::Ok((PoolName::parse(&pool.name)?, published_pool(pool)?));
    let pools = pools
        .map(read)
        .collect::<anyhow::Result<_>>()
        .with_context(|| format!("HostNode {node} cannot be read"))?;
    Ok((node, pools))
}

fn published_pool(status: &PoolStatus) -> anyhow::Result<PublishedPool> {
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
    Ok(PublishedPool {
        id: status.id.as_deref().map(str::parse).transpose()?,
        filesystem: status.filesystem.clone(),
        space,
        foreign: quantity(&status.foreign)?.unwrap_or_default(),
        limits: Limits {
            reserve: status.reserve.parse()?,
            overcommit: status.overcommit,
        },
    })
}
