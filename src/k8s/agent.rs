//! A node's side of the book: which volumes are promised to it, which of them it is to delete, which it has lost.
//!
//! It works from one watch of its own HostVolumes. Nothing here is needed to mount a volume whose data is on the node:
//! that needs no API server.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher::{Config, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::api::HostVolume;
use super::events::Events;
use super::publisher::Publisher;
use super::watch::{Follower, follow};
use super::{Problem, api, ask, book, convert};
use crate::metrics::Metrics;
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::ports::{Hindrance, Ledger, Promise, Stage, Unusable};
use crate::volume::record::{Phase, Record};
use crate::volume::{Driver, Error, Held, Reason};

/// How often a node looks at its pools and its promises without being asked to.
const PERIOD: Duration = Duration::from_secs(10);

/// How often it tries again to delete what cannot be deleted yet.
const RETRY: Duration = Duration::from_secs(1);

/// How often marking a volume is tried again when its HostVolume changes meanwhile.
const CONFLICTS: usize = 3;

/// The ledger of a node.
pub struct Agent {
    node: NodeName,
    client: Client,
    volumes: Api<HostVolume>,
    events: Events,
    runtime: Handle,
    metrics: Arc<Metrics>,
    promises: Mutex<BTreeMap<VolumeId, Promise>>,
    /// Whether the list of promises has been seen whole.
    complete: AtomicBool,
    changed: Notify,
}

impl Agent {
    /// The ledger of a node, empty until [`Agent::run`] fills it.
    #[must_use]
    pub fn new(node: NodeName, client: Client, runtime: Handle, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            events: Events::new(client.clone(), node.to_string(), runtime.clone()),
            volumes: Api::all(client.clone()),
            node,
            client,
            runtime,
            metrics,
            promises: Mutex::default(),
            complete: AtomicBool::new(false),
            changed: Notify::new(),
        })
    }

    /// Follows the promises and carries out what is asked, for ever: what it returns is why it cannot go on.
    pub async fn run(self: Arc<Self>, driver: Arc<Driver>) -> anyhow::Error {
        let fields = format!("spec.node={}", self.node);
        let watch = watcher(self.volumes.clone(), Config::default().fields(&fields));
        let follower = Promises {
            agent: Arc::clone(&self),
            listed: BTreeSet::new(),
        };
        let metrics = Arc::clone(&self.metrics);
        tokio::select! {
            () = follow("watch HostVolumes", watch, &metrics, follower) => anyhow::anyhow!("the watch has ended"),
            error = Arc::clone(&self).work(driver) => error,
        }
    }

    async fn work(self: Arc<Self>, driver: Arc<Driver>) -> anyhow::Error {
        let mut passes = Passes {
            publisher: Publisher::new(&self.node, self.client.clone(), self.runtime.clone()),
            deleting: HashMap::new(),
            whole: None,
        };
        loop {
            let (agent, driver) = (Arc::clone(&self), Arc::clone(&driver));
            let pass = move || {
                passes.pass(&agent, &driver);
                passes
            };
            // Disks block.
            passes = match tokio::task::spawn_blocking(pass).await {
                Ok(passes) => passes,
                Err(panic) => return anyhow::anyhow!("the agent panicked, which is a bug: {panic}"),
            };
            let wait = if passes.deleting.is_empty() { PERIOD } else { RETRY };
            let _ = tokio::time::timeout(wait, self.changed.notified()).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Promise>> {
        // A cache, put right by the next event.
        self.promises.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        let verb = "read its HostVolume";
        match ask(&self.runtime, verb, self.volumes.get(id.as_str())) {
            Ok(object) => convert::promise(object)
                .map(Some)
                .map_err(|error| api(verb, format!("{error:#}"))),
            Err(Problem::NotFound) => Ok(None),
            Err(problem) => Err(problem.into_reason(verb)),
        }
    }

    /// Writes the status of a HostVolume that is still of the version that was read; says whether it was.
    fn write_status(&self, promise: &Promise, status: &Value) -> Result<bool, Reason> {
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
            Err(Problem::Conflict | Problem::NotFound) => Ok(false),
            Err(problem) => Err(problem.into_reason(verb)),
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

    /// Begins a pass soon.
    fn wake(&self) {
        self.changed.notify_one();
    }
}

impl Ledger for Agent {
    fn promise(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        let known = self.lock().get(id).cloned();
        match known {
            Some(promise) => Ok(Some(promise)),
            // The watch may be late.
            None => self.read(id),
        }
    }

    fn keep(&self, record: &Record) -> Result<(), Reason> {
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
            promise = self.read(&record.id)?;
        }
        Err(api(
            "mark its HostVolume as Ready",
            "the object changes all the time".into(),
        ))
    }
}

/// What goes from one pass over promises and pools to the next.
struct Passes {
    publisher: Publisher,
    /// What is being deleted, since when.
    deleting: HashMap<VolumeId, Instant>,
    /// When everything was last looked at.
    whole: Option<Instant>,
}

impl Passes {
    fn pass(&mut self, agent: &Agent, driver: &Driver) {
        self.delete(agent, driver);
        if self.whole.is_some_and(|last| last.elapsed() < PERIOD) {
            return;
        }
        self.whole = Some(Instant::now());
        let mut orphans = Vec::new();
        if agent.complete.load(Ordering::Acquire) {
            let (held, unusable) = driver.inventory();
            mark_lost(agent, &held, &unusable);
            orphans = find_orphans(agent, driver, held);
        }
        agent.metrics.set_orphans(orphans.len());
        if let Err(reason) = self.publisher.publish(driver, &agent.metrics, &orphans) {
            agent.metrics.failed("publish pools");
            warn!(node = %agent.node, why = %reason, "cannot publish what the pools are like; trying again");
        }
    }

    /// Deletes what is to be deleted.
    fn delete(&mut self, agent: &Agent, driver: &Driver) {
        let deleting: Vec<Promise> = agent
            .lock()
            .values()
            .filter(|promise| promise.deleting)
            .cloned()
            .collect();
        self.deleting
            .retain(|id, _| deleting.iter().any(|promise| promise.id == *id));
        for promise in deleting {
            self.deleting.entry(promise.id.clone()).or_insert_with(Instant::now);
            match delete(agent, driver, &promise) {
                Ok(()) => {}
                Err(reason) => {
                    agent.metrics.failed("delete a volume");
                    warn!(volume.id = %promise.id, node = %agent.node, why = %reason, "cannot delete a volume yet");
                }
            }
        }
        let oldest = self.deleting.values().map(Instant::elapsed).max().unwrap_or_default();
        agent.metrics.set_deletes(self.deleting.len(), oldest);
    }
}

/// Deletes one volume and lets go of its HostVolume, or says there why not.
fn delete(agent: &Agent, driver: &Driver, promise: &Promise) -> Result<(), Reason> {
    match driver.delete_of(&promise.id, promise.uid) {
        Ok(()) => {
            let verb = "take the finalizer off its HostVolume";
            match ask(&agent.runtime, verb, book::release(&agent.volumes, promise)) {
                Ok(_) | Err(Problem::NotFound) => {
                    info!(volume.id = %promise.id, node = %agent.node, "volume let go of");
                }
                // It has changed: the watch brings it again.
                Err(Problem::Conflict) => {}
                Err(problem) => return Err(problem.into_reason(verb)),
            }
            Ok(())
        }
        Err(Error { reason, .. }) => {
            let word = match *reason {
                Reason::Mounted(_) => Hindrance::MOUNTED,
                Reason::PoolUnusable { .. } => "PoolUnusable",
                _ => "Failed",
            };
            say(agent, promise, promise.stage, word, &reason.to_string())
        }
    }
}

/// Writes into a HostVolume how far it has come and what hinders it, if that is not there already.
fn say(agent: &Agent, promise: &Promise, stage: Stage, word: &str, message: &str) -> Result<(), Reason> {
    let message: String = message.chars().take(1000).collect();
    let hindrance = Hindrance {
        reason: word.to_owned(),
        message,
    };
    if promise.stage == stage && promise.hindrance.as_ref() == Some(&hindrance) {
        return Ok(());
    }
    let Hindrance { reason, message } = hindrance;
    warn!(volume.id = %promise.id, node = %agent.node, reason, message, "said of a volume");
    let phase = match stage {
        Stage::Claimed => "Claimed",
        Stage::Ready => "Ready",
        Stage::Lost => "Lost",
    };
    let status = json!({"phase": phase, "reason": reason, "message": message});
    agent.write_status(promise, &status).map(drop)
}

/// Says of volumes whose data is not here that it is lost, and of those whose data is back that it is not.
fn mark_lost(agent: &Agent, held: &[Held], unusable: &[(PoolName, Unusable)]) {
    let here: BTreeSet<(&VolumeId, Option<uuid::Uuid>)> = held
        .iter()
        .map(|held| (&held.id, held.record.as_ref().and_then(|record| record.uid)))
        .collect();
    let broken: BTreeSet<&VolumeId> = held
        .iter()
        .filter(|held| held.record.is_none())
        .map(|held| &held.id)
        .collect();
    let promises: Vec<Promise> = agent.lock().values().cloned().collect();
    for promise in promises.iter().filter(|promise| !promise.deleting) {
        let is_here = here.contains(&(&promise.id, Some(promise.uid)));
        let said = match promise.stage {
            Stage::Ready | Stage::Lost if !is_here => lost(agent, promise, &broken, unusable),
            Stage::Lost => found(agent, promise),
            Stage::Claimed | Stage::Ready => Ok(()),
        };
        if let Err(reason) = said {
            agent.metrics.failed("write a status");
            warn!(volume.id = %promise.id, node = %agent.node, why = %reason, "cannot write a status; trying again");
        }
    }
}

fn lost(
    agent: &Agent,
    promise: &Promise,
    broken: &BTreeSet<&VolumeId>,
    unusable: &[(PoolName, Unusable)],
) -> Result<(), Reason> {
    let made_on = promise.made_on.map_or_else(|| "unknown".into(), |id| id.to_string());
    let (word, message) = if broken.contains(&promise.id) {
        let why = "its record cannot be read; restore volume.json from a backup";
        ("RecordBroken", why.to_owned())
    } else if let Some((pool, why)) = unusable.first() {
        let message = format!("it was made on pool {made_on}; pool {pool} cannot be used: {why}");
        ("PoolUnusable", message)
    } else {
        let message = format!(
            "its data is not on this node: it was made on pool {made_on}; bring that disk back, or delete the claim if \
             the data is given up"
        );
        ("DataMissing", message)
    };
    let is_new = promise.stage != Stage::Lost;
    say(agent, promise, Stage::Lost, word, &message)?;
    if is_new {
        let note = format!("volume {} on node {}: {message}", promise.id, agent.node);
        agent.events.warn(promise, "VolumeLost", &note);
    }
    Ok(())
}

fn found(agent: &Agent, promise: &Promise) -> Result<(), Reason> {
    let status = json!({"phase": "Ready", "reason": null, "message": null});
    if agent.write_status(promise, &status)? {
        info!(volume.id = %promise.id, node = %agent.node, "the data of a volume is back");
        let note = format!("volume {} on node {}: its data is back", promise.id, agent.node);
        agent.events.tell(promise, "VolumeFound", &note);
    }
    Ok(())
}

/// Volumes on the pools that no HostVolume speaks of. What never had data is discarded; the rest is only named.
fn find_orphans(agent: &Agent, driver: &Driver, held: Vec<Held>) -> Vec<Held> {
    let is_promised = |held: &Held| {
        let promises = agent.lock();
        let promise = promises.get(&held.id);
        let uid = held.record.as_ref().and_then(|record| record.uid);
        // A record that cannot be read is taken for the one that is promised.
        promise.is_some_and(|promise| held.record.is_none() || uid == Some(promise.uid))
    };
    let mut orphans = Vec::new();
    for held in held {
        if is_promised(&held) {
            continue;
        }
        let unused = held
            .record
            .as_ref()
            .filter(|record| record.phase == Phase::Claimed)
            .and_then(|record| record.uid);
        match unused {
            Some(uid) => discard_unused(agent, driver, &held.id, uid),
            None => orphans.push(held),
        }
    }
    orphans
}

/// A first publish may just be under way, with a watch that is late: only the API server knows.
fn discard_unused(agent: &Agent, driver: &Driver, id: &VolumeId, uid: uuid::Uuid) {
    let discarded = match agent.read(id) {
        Ok(Some(promise)) if promise.uid == uid => Ok(()),
        Ok(_) => driver.delete_of(id, uid).map_err(|error| *error.reason),
        Err(reason) => Err(reason),
    };
    if let Err(reason) = discarded {
        agent.metrics.failed("discard an unused volume");
        warn!(volume.id = %id, node = %agent.node, why = %reason, "cannot discard a volume that was never used; trying again");
    }
}

/// Takes in the watch.
struct Promises {
    agent: Arc<Agent>,
    listed: BTreeSet<VolumeId>,
}

impl Promises {
    fn apply(&self, object: HostVolume) -> Option<VolumeId> {
        match convert::promise(object) {
            Ok(promise) if promise.node == self.agent.node => {
                let id = promise.id.clone();
                if promise.deleting {
                    self.agent.wake();
                }
                self.agent.lock().insert(id.clone(), promise);
                Some(id)
            }
            Ok(_) => None,
            Err(error) => {
                warn!(error = format!("{error:#}"), "ignoring a HostVolume");
                None
            }
        }
    }
}

impl Follower<HostVolume> for Promises {
    fn begin(&mut self) {
        self.listed.clear();
    }

    fn listed(&mut self, object: HostVolume) {
        let id = self.apply(object);
        self.listed.extend(id);
    }

    fn end(&mut self) {
        let listed = std::mem::take(&mut self.listed);
        self.agent.lock().retain(|id, _| listed.contains(id));
        self.agent.complete.store(true, Ordering::Release);
        self.agent.wake();
    }

    fn applied(&mut self, object: HostVolume) {
        self.apply(object);
    }

    fn gone(&mut self, object: HostVolume) {
        let uid = object.uid();
        if let Ok(id) = VolumeId::parse(&object.name_any()) {
            let mut promises = self.agent.lock();
            if promises
                .get(&id)
                .is_some_and(|known| Some(known.uid.to_string()) == uid)
            {
                promises.remove(&id);
            }
        }
    }
}
