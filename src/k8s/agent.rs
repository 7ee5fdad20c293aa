//! A node's side of the book: which volumes are promised to it, which of them it is to delete, which it has lost.
//!
//! It works from one watch of its own HostVolumes. Nothing here is needed to mount a volume whose data is on the node:
//! that needs no API server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher::{Config, watcher};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::api::HostVolume;
use super::events::Events;
use super::publisher::Publisher;
use super::upkeep::{Deletes, Rounds};
use super::watch::{self, Follower, follow};
use super::{ApiBook, Problem, api, ask, convert};
use crate::metrics::Metrics;
use crate::volume::id::{NodeName, VolumeId};
use crate::volume::ports::{Book as _, Ledger, Promise};
use crate::volume::record::Record;
use crate::volume::{Driver, Reason};

/// How often a node looks at its pools and its promises without being asked to.
pub(super) const PERIOD: Duration = Duration::from_secs(10);

/// How often marking a volume is tried again when its HostVolume changes meanwhile.
const CONFLICTS: usize = 3;

/// The ledger of a node.
pub struct Agent {
    pub(super) node: NodeName,
    client: Client,
    volumes: Api<HostVolume>,
    pub(super) book: ApiBook,
    pub(super) events: Events,
    runtime: Handle,
    pub(super) metrics: Arc<Metrics>,
    promises: Mutex<BTreeMap<VolumeId, Promise>>,
    /// Whether the list of promises has been seen whole.
    pub(super) complete: AtomicBool,
    listed: Notify,
    /// Something is to be deleted.
    pub(super) changed: Notify,
}

impl Agent {
    /// The ledger of a node, empty until [`Agent::run`] fills it.
    #[must_use]
    pub fn new(node: NodeName, client: Client, runtime: Handle, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            events: Events::new(client.clone(), node.to_string(), runtime.clone()),
            volumes: Api::all(client.clone()),
            book: ApiBook::new(client.clone(), runtime.clone()),
            node,
            client,
            runtime,
            metrics,
            promises: Mutex::default(),
            complete: AtomicBool::new(false),
            listed: Notify::new(),
            changed: Notify::new(),
        })
    }

    /// Follows the promises and carries out what is asked, for ever: what it returns is why it cannot go on.
    pub async fn run(self: Arc<Self>, driver: Arc<Driver>) -> anyhow::Error {
        let fields = format!("spec.node={}", self.node);
        let watch = watcher(self.volumes.clone(), Config::default().fields(&fields));
        let metrics = Arc::clone(&self.metrics);
        let deletes = Deletes::new(Arc::clone(&self), Arc::clone(&driver));
        tokio::select! {
            () = follow("watch HostVolumes", watch, &metrics, Promises(&self)) => anyhow::anyhow!("the watch has ended"),
            () = deletes.run() => anyhow::anyhow!("nothing is deleted any more"),
            error = Arc::clone(&self).look_around(driver) => error,
        }
    }

    /// Looks around every now and then, for ever.
    async fn look_around(self: Arc<Self>, driver: Arc<Driver>) -> anyhow::Error {
        let publisher = Publisher::new(&self.node, self.client.clone(), self.runtime.clone());
        let mut rounds = Rounds::new(publisher);
        loop {
            let (agent, driver) = (Arc::clone(&self), Arc::clone(&driver));
            let pass = move || {
                rounds.look_around(&agent, &driver);
                rounds
            };
            // Disks block.
            rounds = match tokio::task::spawn_blocking(pass).await {
                Ok(rounds) => rounds,
                Err(panic) => return anyhow::anyhow!("looking at pools panicked, which is a bug: {panic}"),
            };
            // As soon as the promises are known, and then at leisure.
            let _ = timeout(PERIOD, self.listed.notified()).await;
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Promise>> {
        // A cache, put right by the next event.
        self.promises.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the status of a HostVolume that is still of the version that was read; says whether it was.
    pub(super) fn write_status(&self, promise: &Promise, status: &Value) -> Result<bool, Reason> {
        let verb = "write the status of its HostVolume";
        let patch = Patch::Merge(json!({"metadata": {"resourceVersion": promise.version}, "status": status}));
        let params = PatchParams::default();
        let patched = self.volumes.patch_status(promise.id.as_str(), &params, &patch);
        match ask(&self.runtime, verb, patched) {
            Ok(object) => {
                if let Ok(promise) = convert::promise(object) {
                    self.take_in(promise);
                }
                Ok(true)
            }
            Err(Problem::Conflict(_) | Problem::NotFound(_)) => Ok(false),
            Err(problem) => Err(problem.into()),
        }
    }

    /// Notes a promise as the API server has just answered it, unless the watch has forgotten it since.
    fn take_in(&self, promise: Promise) {
        if let Some(known) = self.lock().get_mut(&promise.id)
            && known.uid == promise.uid
        {
            *known = promise;
        }
    }
}

impl Ledger for Agent {
    fn promise(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        let known = self.lock().get(id).cloned();
        match known {
            Some(promise) => Ok(Some(promise)),
            // The watch may be late.
            None => self.book.look_up(id),
        }
    }

    fn look_up(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        self.book.look_up(id)
    }

    fn keep(&self, record: &Record) -> Result<(), Reason> {
        // Nobody promised it, and nobody asks for its data after the self-test.
        if record.uid.is_none() && record.id.is_of_self_test() {
            return Ok(());
        }
        let made_on = record.pool_id;
        let mut promise = self.promise(&record.id)?;
        for _ in 0..CONFLICTS {
            let found = promise.filter(|promise| Some(promise.uid) == record.uid);
            let Some(current) = found else {
                return Err(Reason::NoSuchVolume);
            };
            match current.made_on {
                _ if current.deleting => return Err(Reason::Deleting),
                Some(there) if there == made_on => return Ok(()),
                Some(there) => return Err(Reason::data_missing(there, &[made_on])),
                None => {}
            }
            let status = json!({"phase": "Ready", "poolId": made_on.to_string(), "reason": null, "message": null});
            if self.write_status(&current, &status)? {
                return Ok(());
            }
            promise = self.book.look_up(&record.id)?;
        }
        Err(api(
            "mark its HostVolume as Ready",
            "the object changes all the time".into(),
        ))
    }
}

/// Takes in the watch.
struct Promises<'a>(&'a Agent);

impl Follower<HostVolume> for Promises<'_> {
    type Key = VolumeId;

    fn applied(&self, object: HostVolume) -> Option<VolumeId> {
        let promise = watch::read(object).filter(|promise| promise.node == self.0.node)?;
        let (id, deleting) = (promise.id.clone(), promise.deleting);
        self.0.lock().insert(id.clone(), promise);
        if deleting {
            self.0.changed.notify_one();
        }
        Some(id)
    }

    fn gone(&self, object: HostVolume) {
        if let Some((id, uid)) = watch::identity(&object) {
            let mut promises = self.0.lock();
            if promises.get(&id).is_some_and(|known| known.uid == uid) {
                promises.remove(&id);
            }
        }
    }

    fn retain(&self, listed: &BTreeSet<VolumeId>) {
        self.0.lock().retain(|id, _| listed.contains(id));
        self.0.complete.store(true, Ordering::Release);
        self.0.listed.notify_one();
    }
}
