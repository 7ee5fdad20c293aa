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
use uuid::Uuid;

use super::api::{HostNode, HostVolume};
use super::{convert, with_causes};
use crate::metrics::Metrics;
use crate::volume::id::{NodeName, VolumeId};
use crate::volume::ports::Promise;
use crate::volume::registry::Registry;

/// Objects in one page of a list: more cost memory, fewer cost requests.
const PAGE: u32 = 1000;

/// Keeps the registry up to date, for ever.
pub async fn feed(client: Client, registry: Arc<Registry>, metrics: Arc<Metrics>) {
    let config = || Config::default().page_size(PAGE);
    let volumes = watcher(Api::<HostVolume>::all(client.clone()), config());
    let host_nodes = watcher(Api::<HostNode>::all(client.clone()), config());
    let nodes = watcher(Api::<PartialObjectMeta<Node>>::all(client), config());
    tokio::join!(
        follow("watch HostVolumes", volumes, &metrics, Volumes(&registry)),
        follow("watch HostNodes", host_nodes, &metrics, HostNodes(&registry)),
        follow("watch Nodes", nodes, &metrics, Nodes(&registry)),
    );
}

/// Whoever takes in what a watch shows.
pub(super) trait Follower<K> {
    /// What tells the objects apart.
    type Key: Ord;

    /// Takes in an object that is new or has changed: which one, unless it cannot be read.
    fn applied(&self, object: K) -> Option<Self::Key>;
    /// Forgets an object that is gone.
    fn gone(&self, object: K);
    /// Forgets all but these: they are on a list that is whole.
    fn retain(&self, listed: &BTreeSet<Self::Key>);
}

/// Follows a watch for ever. It is tried again, ever more seldom, when it fails.
pub(super) async fn follow<K: Debug + Send + 'static, F: Follower<K>>(
    what: &'static str,
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send,
    metrics: &Metrics,
    follower: F,
) {
    let mut events = pin!(events.default_backoff());
    let mut failing = false;
    let mut listed = BTreeSet::new();
    loop {
        match events.try_next().await {
            Ok(Some(event)) => {
                if std::mem::take(&mut failing) {
                    info!(what, "the API server answers again");
                }
                match event {
                    Event::Init => listed.clear(),
                    Event::InitApply(object) => listed.extend(follower.applied(object)),
                    Event::InitDone => follower.retain(&std::mem::take(&mut listed)),
                    Event::Apply(object) => drop(follower.applied(object)),
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

/// The promise that an object is; one that cannot be read is said so and left alone.
pub(super) fn read(object: HostVolume) -> Option<Promise> {
    convert::promise(object)
        .inspect_err(|error| warn!(error = format!("{error:#}"), "ignoring a HostVolume"))
        .ok()
}

/// Which promise an object is, whatever else is in it.
pub(super) fn identity(object: &HostVolume) -> Option<(VolumeId, Uuid)> {
    let id = VolumeId::parse(&object.name_any()).ok()?;
    let uid = object.uid()?.parse().ok()?;
    Some((id, uid))
}

struct Volumes<'a>(&'a Registry);

impl Follower<HostVolume> for Volumes<'_> {
    type Key = VolumeId;

    fn applied(&self, object: HostVolume) -> Option<VolumeId> {
        let promise = read(object)?;
        self.0.apply(&promise);
        Some(promise.id)
    }

    fn gone(&self, object: HostVolume) {
        if let Some((id, uid)) = identity(&object) {
            self.0.forget(&id, uid);
        }
    }

    fn retain(&self, listed: &BTreeSet<VolumeId>) {
        self.0.replace(listed);
    }
}

fn node_name(object: &impl ResourceExt) -> Option<NodeName> {
    NodeName::parse(&object.name_any()).ok()
}

struct HostNodes<'a>(&'a Registry);

impl Follower<HostNode> for HostNodes<'_> {
    type Key = NodeName;

    fn applied(&self, object: HostNode) -> Option<NodeName> {
        match convert::published(&object) {
            Ok((node, pools)) => self.0.publish(node, pools),
            Err(error) => warn!(error = format!("{error:#}"), "ignoring a HostNode"),
        }
        node_name(&object)
    }

    fn gone(&self, object: HostNode) {
        if let Some(node) = node_name(&object) {
            self.0.unpublish(&node);
        }
    }

    fn retain(&self, listed: &BTreeSet<NodeName>) {
        self.0.retain_published(listed);
    }
}

struct Nodes<'a>(&'a Registry);

impl Follower<PartialObjectMeta<Node>> for Nodes<'_> {
    type Key = NodeName;

    fn applied(&self, object: PartialObjectMeta<Node>) -> Option<NodeName> {
        let node = node_name(&object)?;
        self.0.node_is_there(node.clone());
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
