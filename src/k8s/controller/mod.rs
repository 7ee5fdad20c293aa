//! A controller of elected mode: it keeps its cache of all nodes and volumes up to date with API watches.

mod backlog;
mod gc;
mod released;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::watcher::Config;
use kube::{Client, ResourceExt};

use super::watch::{self, Follower, Unreadable, follow, undecoded};
use super::{api, convert};
use crate::metrics::Metrics;
use crate::volume::controller::cache::{ClusterCache, List};
use crate::volume::id::{NodeName, VolumeId};

use backlog::{Claims, Classes};

pub(crate) use backlog::Backlog;
pub(crate) use gc::{Gc, GcConfig};

/// Objects in one page of a list: larger pages cost memory, smaller ones cost requests.
const PAGE: u32 = 1000;

/// The pods of `hostdir node`.
pub(crate) struct Agents {
    pub(crate) namespace: String,
    /// Their label selector.
    pub(crate) selector: String,
}

/// Keeps the cache and the backlog up to date, forever. Without `agents`, every node is believed to run hostdir.
pub(crate) async fn feed(
    client: Client,
    cache: Arc<ClusterCache>,
    backlog: Arc<Backlog>,
    agents: Option<Agents>,
    metrics: Arc<Metrics>,
) {
    let config = || Config::default().page_size(PAGE);
    let volumes = undecoded::<api::HostVolume>(client.clone());
    let host_nodes = undecoded::<api::HostNode>(client.clone());
    let nodes = undecoded::<Node>(client.clone());
    let persistent = undecoded::<PersistentVolume>(client.clone());
    let claims = undecoded::<PersistentVolumeClaim>(client.clone());
    let classes = undecoded::<StorageClass>(client.clone());
    let agents = async {
        let Some(Agents { namespace, selector }) = agents else {
            return std::future::pending().await;
        };
        let pods = Api::namespaced_with(client, &namespace, &ApiResource::erase::<Pod>(&()));
        let followed = AgentPods::new(&cache);
        follow(
            "watch hostdir's pods",
            pods,
            config().labels(&selector),
            &metrics,
            followed,
        )
        .await;
    };
    tokio::join!(
        follow("watch HostVolumes", volumes, config(), &metrics, Volumes(&cache)),
        follow("watch HostNodes", host_nodes, config(), &metrics, HostNodes(&cache)),
        follow("watch Nodes", nodes, config(), &metrics, Nodes(&cache)),
        follow(
            "watch PersistentVolumes",
            persistent,
            config(),
            &metrics,
            PersistentVolumes(&cache, &backlog)
        ),
        follow("watch claims", claims, config(), &metrics, Claims(&backlog)),
        follow("watch StorageClasses", classes, config(), &metrics, Classes(&backlog)),
        agents,
    );
}

struct Volumes<'a>(&'a ClusterCache);

impl Follower for Volumes<'_> {
    type Key = VolumeId;
    const KIND: &'static str = "HostVolume";

    fn applied(&self, object: DynamicObject) -> Result<VolumeId, Unreadable<VolumeId>> {
        let volume = watch::host_volume(object)?;
        self.0.apply(&volume);
        watch::readable(volume.id, volume.unreadable)
    }

    fn gone(&self, object: DynamicObject) {
        if let Some((id, uid)) = watch::identity(&object) {
            self.0.forget(&id, uid);
        }
    }

    fn retain(&self, listed: &BTreeSet<VolumeId>) {
        self.0.retain_volumes(listed);
    }

    const LISTENS: bool = true;

    fn heard(&self, heard: bool) {
        self.0.set_deaf(List::HostVolumes, (!heard).then(Instant::now));
    }
}

fn node_name(object: &DynamicObject) -> Result<NodeName, Unreadable<NodeName>> {
    NodeName::parse(&object.name_any()).map_err(|error| Unreadable {
        key: None,
        why: error.into(),
    })
}

struct HostNodes<'a>(&'a ClusterCache);

impl Follower for HostNodes<'_> {
    type Key = NodeName;
    const KIND: &'static str = "HostNode";

    fn applied(&self, object: DynamicObject) -> Result<NodeName, Unreadable<NodeName>> {
        let node = node_name(&object)?;
        match convert::pools(&object) {
            Ok(pools) => {
                self.0.set_pools(node.clone(), pools);
                Ok(node)
            }
            // What it said before may no longer be true.
            Err(why) => {
                self.0.forget_pools(&node);
                let key = Some(node);
                Err(Unreadable { key, why })
            }
        }
    }

    fn gone(&self, object: DynamicObject) {
        if let Ok(node) = node_name(&object) {
            self.0.forget_pools(&node);
        }
    }

    fn retain(&self, listed: &BTreeSet<NodeName>) {
        self.0.retain_pools(listed);
    }

    const LISTENS: bool = true;

    fn heard(&self, heard: bool) {
        self.0.set_deaf(List::HostNodes, (!heard).then(Instant::now));
    }
}

struct Nodes<'a>(&'a ClusterCache);

impl Follower for Nodes<'_> {
    type Key = NodeName;
    const KIND: &'static str = "Node";

    fn applied(&self, object: DynamicObject) -> Result<NodeName, Unreadable<NodeName>> {
        let node = node_name(&object)?;
        self.0.set_node(node.clone(), convert::node_state(&object.data));
        Ok(node)
    }

    fn gone(&self, object: DynamicObject) {
        if let Ok(node) = node_name(&object) {
            self.0.node_is_gone(&node);
        }
    }

    fn retain(&self, listed: &BTreeSet<NodeName>) {
        self.0.retain_nodes(listed);
    }

    const LISTENS: bool = true;

    fn heard(&self, heard: bool) {
        self.0.set_deaf(List::Nodes, (!heard).then(Instant::now));
    }
}

struct PersistentVolumes<'a>(&'a ClusterCache, &'a Backlog);

impl Follower for PersistentVolumes<'_> {
    type Key = VolumeId;
    const KIND: &'static str = "PersistentVolume";

    fn applied(&self, object: DynamicObject) -> Result<VolumeId, Unreadable<VolumeId>> {
        self.1.note_volume(&object);
        let id = VolumeId::for_name(&object.name_any());
        self.0.set_persistent(&id, true);
        Ok(id)
    }

    fn gone(&self, object: DynamicObject) {
        self.1.forget_volume(&object);
        self.0.set_persistent(&VolumeId::for_name(&object.name_any()), false);
    }

    fn retain(&self, listed: &BTreeSet<VolumeId>) {
        self.1.retain_volumes(listed);
        self.0.retain_persistent(listed);
    }
}

/// The pods of `hostdir node`: two of one node may overlap in a rollout.
struct AgentPods<'a> {
    cache: &'a ClusterCache,
    /// The node of each pod that has one, and whether the pod is Ready.
    pods: Mutex<BTreeMap<String, (NodeName, bool)>>,
}

impl<'a> AgentPods<'a> {
    fn new(cache: &'a ClusterCache) -> Self {
        let pods = Mutex::default();
        Self { cache, pods }
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, (NodeName, bool)>)) {
        // The next event corrects what a panic leaves behind.
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut pods);
        let mut agents = BTreeMap::new();
        for (node, ready) in pods.values() {
            *agents.entry(node.clone()).or_default() |= ready;
        }
        self.cache.set_agents(agents);
    }
}

impl Follower for AgentPods<'_> {
    type Key = String;
    const KIND: &'static str = "Pod";

    fn applied(&self, object: DynamicObject) -> Result<String, Unreadable<String>> {
        let name = object.name_any();
        let node = object.data["spec"]["nodeName"].as_str().unwrap_or_default();
        let node = NodeName::parse(node).ok();
        let ready = convert::is_ready(&object.data) && object.metadata.deletion_timestamp.is_none();
        self.change(|pods| match node {
            Some(node) => drop(pods.insert(name.clone(), (node, ready))),
            None => drop(pods.remove(&name)),
        });
        Ok(name)
    }

    fn gone(&self, object: DynamicObject) {
        self.change(|pods| drop(pods.remove(&object.name_any())));
    }

    fn retain(&self, listed: &BTreeSet<String>) {
        self.change(|pods| pods.retain(|name, _| listed.contains(name)));
    }
}
