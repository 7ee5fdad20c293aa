//! A controller of elected mode: it keeps its cache of all nodes and volumes up to date with API watches.

mod gc;

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::watcher::{Config, watcher};
use kube::{Client, ResourceExt};
use tracing::warn;

use super::watch::{self, Follower, follow};
use super::{api, convert};
use crate::metrics::Metrics;
use crate::volume::controller::cache::ClusterCache;
use crate::volume::id::{NodeName, VolumeId};

pub(crate) use gc::{Gc, GcConfig};

/// Objects in one page of a list: larger pages cost memory, smaller ones cost requests.
const PAGE: u32 = 1000;

/// Keeps the cache up to date, forever.
pub(crate) async fn feed(client: Client, cache: Arc<ClusterCache>, metrics: Arc<Metrics>) {
    let config = || Config::default().page_size(PAGE);
    let volumes = watcher(Api::<api::HostVolume>::all(client.clone()), config());
    let host_nodes = watcher(Api::<api::HostNode>::all(client.clone()), config());
    let nodes = watcher(Api::<PartialObjectMeta<Node>>::all(client), config());
    tokio::join!(
        follow("watch HostVolumes", volumes, &metrics, Volumes(&cache)),
        follow("watch HostNodes", host_nodes, &metrics, HostNodes(&cache)),
        follow("watch Nodes", nodes, &metrics, Nodes(&cache)),
    );
}

struct Volumes<'a>(&'a ClusterCache);

impl Follower<api::HostVolume> for Volumes<'_> {
    type Key = VolumeId;

    fn applied(&self, object: api::HostVolume) -> Option<VolumeId> {
        let volume = watch::read(object)?;
        self.0.apply(&volume);
        Some(volume.id)
    }

    fn gone(&self, object: api::HostVolume) {
        if let Some((id, uid)) = watch::identity(&object) {
            self.0.forget(&id, uid);
        }
    }

    fn retain(&self, listed: &BTreeSet<VolumeId>) {
        self.0.retain_volumes(listed);
    }
}

fn node_name(object: &impl ResourceExt) -> Option<NodeName> {
    NodeName::parse(&object.name_any()).ok()
}

struct HostNodes<'a>(&'a ClusterCache);

impl Follower<api::HostNode> for HostNodes<'_> {
    type Key = NodeName;

    fn applied(&self, object: api::HostNode) -> Option<NodeName> {
        match convert::pools(&object) {
            Ok((node, pools)) => self.0.set_pools(node, pools),
            Err(error) => warn!(error = format!("{error:#}"), "ignoring a HostNode that cannot be read"),
        }
        node_name(&object)
    }

    fn gone(&self, object: api::HostNode) {
        if let Some(node) = node_name(&object) {
            self.0.forget_pools(&node);
        }
    }

    fn retain(&self, listed: &BTreeSet<NodeName>) {
        self.0.retain_pools(listed);
    }
}

struct Nodes<'a>(&'a ClusterCache);

impl Follower<PartialObjectMeta<Node>> for Nodes<'_> {
    type Key = NodeName;

    fn applied(&self, object: PartialObjectMeta<Node>) -> Option<NodeName> {
        let node = node_name(&object)?;
        self.0.node_exists(node.clone());
        Some(node)
    }

    fn gone(&self, object: PartialObjectMeta<Node>) {
        if let Some(node) = node_name(&object) {
            self.0.node_is_gone(&node);
        }
    }

    fn retain(&self, listed: &BTreeSet<NodeName>) {
        self.0.retain_nodes(listed);
    }
}
