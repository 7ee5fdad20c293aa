//! API watches: a list, and then every change to it, passed to a [`Follower`]. Each object is decoded on its own: one that cannot be
//! read is logged, shown in the metrics, and left alone; the others are followed all the same.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Client, Resource, ResourceExt};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use uuid::Uuid;

use super::convert;
use crate::metrics::Metrics;
use crate::volume::error::chain;
use crate::volume::host_volume::HostVolume;
use crate::volume::id::VolumeId;

/// Keeps what a watch shows.
pub(super) trait Follower {
    type Key: Ord;
    /// The kind of the objects.
    const KIND: &'static str;

    /// An object is new or has changed.
    ///
    /// # Errors
    /// The object cannot be read.
    fn applied(&self, object: DynamicObject) -> Result<Self::Key, Unreadable<Self::Key>>;
    /// An object is gone.
    fn gone(&self, object: DynamicObject);
    /// A list is complete: objects with other keys are gone.
    fn retain(&self, listed: &BTreeSet<Self::Key>);
    /// Whether it matters if the API server is heard. Then a failed watch begins with a new list: one that goes on may have nothing
    /// to say for long.
    const LISTENS: bool = false;
    /// The API server is heard again, or is not heard any more.
    fn heard(&self, _heard: bool) {}
}

/// An object that cannot be read.
pub(super) struct Unreadable<K> {
    /// Its key, if it has one: it exists, although what it says is not known.
    pub(super) key: Option<K>,
    pub(super) why: anyhow::Error,
}

/// All objects of a kind, undecoded.
pub(super) fn undecoded<K: Resource<DynamicType = ()>>(client: Client) -> Api<DynamicObject> {
    Api::all_with(client, &ApiResource::erase::<K>(&()))
}

/// How long to wait for the next objects of a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);

/// The pauses before a list after a watch has failed: from one second to half a minute, while watches fail again within two minutes.
struct Pauses {
    last: Option<Instant>,
    next: Duration,
}

impl Pauses {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(30);
    const CALM: Duration = Duration::from_mins(2);

    fn next(&mut self) -> Duration {
        if self
            .last
            .replace(Instant::now())
            .is_none_or(|last| last.elapsed() >= Self::CALM)
        {
            self.next = Self::FIRST;
        }
        let pause = self.next;
        self.next = (2 * pause).min(Self::LONGEST);
        pause
    }
}

/// Follows a watch forever. A watch that fails is started again, with back-off.
pub(super) async fn follow<F: Follower>(
    what: &'static str,
    objects: Api<DynamicObject>,
    config: Config,
    metrics: &Metrics,
    follower: F,
) {
    let mut following = Following {
        what,
        metrics,
        follower,
        failing: false,
        listing: true,
        listed: BTreeSet::new(),
        unreadable: UnreadableObjects::new(F::KIND, metrics),
    };
    let begin = || Box::pin(watcher(objects.clone(), config.clone()).default_backoff());
    let mut events = begin();
    let mut pauses = Pauses {
        last: None,
        next: Pauses::FIRST,
    };
    loop {
        // A watch may have nothing to say for long; if its connection is silent, it fails by itself.
        let limit = if following.listing { LIST_TIMEOUT } else { Duration::MAX };
        match timeout(limit, events.try_next()).await {
            Ok(Ok(Some(event))) => following.note(event),
            Ok(Ok(None)) => return,
            Ok(Err(error)) => {
                if following.failed(&chain(&error)) && F::LISTENS {
                    sleep(pauses.next()).await;
                    events = begin();
                }
            }
            Err(_) => {
                following.failed("a list is not answered");
                events = begin();
            }
        }
    }
}

struct Following<'a, F: Follower> {
    what: &'static str,
    metrics: &'a Metrics,
    follower: F,
    failing: bool,
    /// Whether a list is awaited, and what of it has come.
    listing: bool,
    listed: BTreeSet<F::Key>,
    unreadable: UnreadableObjects<'a>,
}

impl<F: Follower> Following<'_, F> {
    fn note(&mut self, event: Event<DynamicObject>) {
        // That a list begins does not say that it is answered.
        if !matches!(event, Event::Init) && std::mem::take(&mut self.failing) {
            info!(what = self.what, "the API server answers again");
            self.follower.heard(true);
        }
        match event {
            Event::Init => {
                self.listing = true;
                self.listed.clear();
                self.unreadable.clear();
            }
            Event::InitApply(object) => {
                let key = self.applied(object);
                self.listed.extend(key);
            }
            Event::InitDone => {
                self.listing = false;
                self.follower.retain(&std::mem::take(&mut self.listed));
            }
            Event::Apply(object) => drop(self.applied(object)),
            Event::Delete(object) => {
                self.unreadable.remove(&object.name_any());
                self.follower.gone(object);
            }
        }
    }

    fn applied(&mut self, object: DynamicObject) -> Option<F::Key> {
        let name = object.name_any();
        match self.follower.applied(object) {
            Ok(key) => {
                self.unreadable.remove(&name);
                Some(key)
            }
            Err(Unreadable { key, why }) => {
                self.unreadable.insert(name, &why);
                key
            }
        }
    }

    /// Returns whether this is the first failure since it was heard.
    fn failed(&mut self, why: &str) -> bool {
        self.metrics.failed(self.what);
        let first = !std::mem::replace(&mut self.failing, true);
        if first {
            warn!(what = self.what, why, "the API server does not answer; trying again");
            self.follower.heard(false);
        }
        first
    }
}

/// The objects of one kind that cannot be read, as the metrics show them.
struct UnreadableObjects<'a> {
    kind: &'static str,
    names: BTreeSet<String>,
    metrics: &'a Metrics,
}

impl<'a> UnreadableObjects<'a> {
    fn new(kind: &'static str, metrics: &'a Metrics) -> Self {
        let names = BTreeSet::new();
        Self { kind, names, metrics }
    }

    fn insert(&mut self, name: String, why: &anyhow::Error) {
        let kind = self.kind;
        warn!(
            kind,
            name,
            why = format!("{why:#}"),
            "ignoring an object that cannot be read; correct it, or delete it"
        );
        self.metrics.set_unreadable(kind, &name, true);
        self.names.insert(name);
    }

    fn remove(&mut self, name: &str) {
        if self.names.remove(name) {
            self.metrics.set_unreadable(self.kind, name, false);
        }
    }

    fn clear(&mut self) {
        for name in std::mem::take(&mut self.names) {
            self.metrics.set_unreadable(self.kind, &name, false);
        }
    }
}

/// Decodes a HostVolume, at least its place and its size.
pub(super) fn host_volume(object: DynamicObject) -> Result<HostVolume, Unreadable<VolumeId>> {
    convert::any_host_volume(object).map_err(|why| Unreadable { key: None, why })
}

/// The key of an object of which `unreadable` says why it could be read only in part, if it could not.
pub(super) fn readable<K>(key: K, unreadable: Option<String>) -> Result<K, Unreadable<K>> {
    match unreadable {
        None => Ok(key),
        Some(why) => Err(Unreadable {
            key: Some(key),
            why: anyhow::Error::msg(why),
        }),
    }
}

/// Id and UID of a HostVolume, even if the rest of it cannot be read.
pub(super) fn identity(object: &DynamicObject) -> Option<(VolumeId, Uuid)> {
    let id = VolumeId::parse(&object.name_any()).ok()?;
    let uid = object.uid()?.parse().ok()?;
    Some((id, uid))
}
