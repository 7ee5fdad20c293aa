//! API watches: a list, and then every change to it, passed to a [`Follower`].

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::pin::pin;

use futures::{Stream, TryStreamExt};
use kube::ResourceExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use tracing::{info, warn};
use uuid::Uuid;

use super::{api, convert};
use crate::metrics::Metrics;
use crate::volume::error::chain;
use crate::volume::host_volume::HostVolume;
use crate::volume::id::VolumeId;

/// Keeps what a watch shows.
pub(super) trait Follower<K> {
    type Key: Ord;

    /// An object is new or has changed. Returns its key, unless the object cannot be read.
    fn applied(&self, object: K) -> Option<Self::Key>;
    /// An object is gone.
    fn gone(&self, object: K);
    /// A list is complete: objects with other keys are gone.
    fn retain(&self, listed: &BTreeSet<Self::Key>);
}

/// Follows a watch forever. A watch that fails is started again, with back-off.
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
                        why = chain(&error),
                        "the API server does not answer; trying again"
                    );
                }
            }
        }
    }
}

/// Converts a HostVolume to the core's type. One that cannot be read is logged and ignored.
pub(super) fn read(object: api::HostVolume) -> Option<HostVolume> {
    convert::host_volume(object)
        .inspect_err(|error| {
            warn!(
                error = format!("{error:#}"),
                "ignoring a HostVolume that cannot be read"
            );
        })
        .ok()
}

/// Id and UID of a HostVolume, even if the rest of it cannot be read.
pub(super) fn identity(object: &api::HostVolume) -> Option<(VolumeId, Uuid)> {
    let id = VolumeId::parse(&object.name_any()).ok()?;
    let uid = object.uid()?.parse().ok()?;
    Some((id, uid))
}
