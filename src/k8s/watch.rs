//! Watches that keep a controller's registry up to date.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;

use futures::{Stream, TryStreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, watcher::Config};
use kube::{Client, ResourceExt};
use tracing::{info, warn};

use super::api::{HostNode, HostVolume};
use super::{convert, with_causes};
use crate::metrics::Metrics;
use crate::volume::id::{NodeName, VolumeId};
use crate::volume::registry::Registry;

/// Objects in one page of a list: more cost memory, fewer cost requests.
const PAGE: u32 = 1000;

/// Keeps the registry up to date, for ever.
pub async fn feed(client: Client, registry: Arc<Registry>, metrics: Arc<Metrics>) {
    let config = Config::default().page_size(PAGE);
    let volumes = follow(
        "watch HostVolumes",
        watcher(Api::<HostVolume>::all(client.clone()), config.clone()),
        &metrics,
        Volumes {
            registry: Arc::clone(&registry),
            listed: BTreeSet::new(),
        },
    );
    let host_nodes = follow(
        "watch HostNodes",
        watcher(Api::<HostNode>::all(client.clone()), config.clone()),
        &metrics,
        HostNodes {
            registry: Arc::clone(&registry),
            listed: BTreeSet::new(),
        },
    );
    let nodes = follow(
        "watch Nodes",
        watcher(Api::<PartialObjectMeta<Node>>::all(client), config),
        &metrics,
        Nodes {
            registry,
            listed: BTreeSet::new(),
        },
    );
    tokio::join!(volumes, host_nodes, nodes);
}

/// Whoever takes in the events of a watch.
pub(super) trait Follower<K> {
    /// A list begins.
    fn begin(&mut self);
    /// An object is on the list.
    fn listed(&mut self, object: K);
    /// The list is whole.
    fn end(&mut self);
    /// An object is new or has changed.
    fn applied(&mut self, object: K);
    /// An object is gone.
    fn gone(&mut self, object: K);
}

/// Follows a watch for ever. It is tried again, ever more seldom, when it fails.
pub(super) async fn follow<K: Debug + Send + 'static>(
    what: &'static str,
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send,
    metrics: &Metrics,
    mut follower: impl Follower<K>,
) {
    let mut events = pin!(events.default_backoff());
    let mut failing = false;
    loop {
        match events.try_next().await {
            Ok(Some(event)) => {
                if std::mem::take(&mut failing) {
                    info!(what, "the API server answers again");
                }
                match event {
                    Event::Init => follower.begin(),
                    Event::InitApply(object) => follower.listed(object),
                    Event::InitDone => follower.end(),
                    Event::Apply(object) => follower.applied(object),
                    Event::Delete(object) => follower.gone(object),
                }
            }
            Ok(None) => return,
            Err(error) => {
                metrics.failed(what);
                if !std::mem::replace(&mut failing, true) {
                    warn!(
                        what,
                        why = with_causes(&error),
                        "the API server does not answer; trying again"
                    );
                }
            }
        }
    }
}

struct Volumes {
    registry: Arc<Registry>,
    listed: BTreeSet<VolumeId>,
}

impl Volumes {
    fn apply(&self, object: HostVolume) -> Option<VolumeId> {
        match convert::promise(object) {
            Ok(promise) => {
                self.registry.apply(&promise);
                Some(promise.id)
            }
            Err(error) => {
                warn!(error = format!("{error:#}"), "ignoring a HostVolume");
                None
            }
        }
    }
}

impl Follower<HostVolume> for Volumes {
    fn begin(&mut self) {
        self.listed.clear();
    }

    fn listed(&mut self, object: HostVolume) {
        let id = self.apply(object);
        self.listed.extend(id);
    }

    fn end(&mut self) {
        self.registry.replace(&std::mem::take(&mut self.listed));
    }

    fn applied(&mut self, object: HostVolume) {
        self.apply(object);
    }

    fn gone(&mut self, object: HostVolume) {
        if let (Ok(id), Some(Ok(uid))) = (
            VolumeId::parse(&object.name_any()),
            object.metadata.uid.map(|uid| uid.parse()),
        ) {
            self.registry.forget(&id, uid);
        }
    }
}

struct HostNodes {
    registry: Arc<Registry>,
    listed: BTreeSet<NodeName>,
}

impl Follower<HostNode> for HostNodes {
    fn begin(&mut self) {
        self.listed.clear();
    }

    fn listed(&mut self, object: HostNode) {
        self.listed.extend(NodeName::parse(&object.name_any()).ok());
        self.applied(object);
    }

    fn end(&mut self) {
        self.registry.retain_published(&std::mem::take(&mut self.listed));
    }

    fn applied(&mut self, object: HostNode) {
        match convert::published(&object) {
            Ok((node, pools)) => self.registry.publish(node, pools),
            Err(error) => warn!(error = format!("{error:#}"), "ignoring a HostNode"),
        }
    }

    fn gone(&mut self, object: HostNode) {
        if let Ok(node) = NodeName::parse(&object.name_any()) {
            self.registry.unpublish(&node);
        }
    }
}

struct Nodes {
    registry: Arc<Registry>,
    listed: BTreeSet<NodeName>,
}

impl Follower<PartialObjectMeta<Node>> for Nodes {
    fn begin(&mut self) {
        self.listed.clear();
    }

    fn listed(&mut self, object: PartialObjectMeta<Node>) {
        self.listed.extend(NodeName::parse(&object.name_any()).ok());
        self.applied(object);
    }

    fn end(&mut self) {
        self.registry.retain_nodes(&std::mem::take(&mut self.listed));
    }

    fn applied(&mut self, object: PartialObjectMeta<Node>) {
        if let Ok(node) = NodeName::parse(&object.name_any()) {
            self.registry.node_is_there(node);
        }
    }

    fn gone(&mut self, object: PartialObjectMeta<Node>) {
        if let Ok(node) = NodeName::parse(&object.name_any()) {
            self.registry.node_is_gone(&node);
        }
    }
}
