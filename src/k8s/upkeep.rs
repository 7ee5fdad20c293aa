//! What a node does about its promises, pass by pass: delete what is to be deleted, say what is lost and what is back, find
//! what nobody promised.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::timeout;
use tracing::{info, warn};
use uuid::Uuid;

use super::agent::{Agent, PERIOD};
use super::publisher::Publisher;
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::ports::{Book as _, Hindrance, Ledger, Promise, Stage, Unusable};
use crate::volume::record::{Phase, Record};
use crate::volume::{Driver, Error, Held, Reason};

/// How often what cannot be deleted yet is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The deletes of a node. Each has a thread of its own: one on a disk that hangs holds up no other.
pub(super) struct Deletes {
    agent: Arc<Agent>,
    driver: Arc<Driver>,
    /// Those that are being tried at this moment.
    running: Mutex<HashSet<VolumeId>>,
}

impl Deletes {
    pub(super) fn new(agent: Arc<Agent>, driver: Arc<Driver>) -> Arc<Self> {
        let running = Mutex::default();
        Arc::new(Self { agent, driver, running })
    }

    /// Tries them whenever there is a new one, and those that are left every second, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        // Since when this process has known of each.
        let mut known: HashMap<VolumeId, Instant> = HashMap::new();
        loop {
            let deleting: Vec<Promise> = self
                .agent
                .lock()
                .values()
                .filter(|promise| promise.deleting)
                .cloned()
                .collect();
            known.retain(|id, _| deleting.iter().any(|promise| promise.id == *id));
            for promise in deleting {
                known.entry(promise.id.clone()).or_insert_with(Instant::now);
                self.try_one(promise);
            }
            let oldest = known.values().map(Instant::elapsed).max().unwrap_or_default();
            self.agent.metrics.set_deletes(known.len(), oldest);
            let wait = if known.is_empty() { PERIOD } else { RETRY };
            let _ = timeout(wait, self.agent.changed.notified()).await;
        }
    }

    fn try_one(self: &Arc<Self>, promise: Promise) {
        if !self.running().insert(promise.id.clone()) {
            return;
        }
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let _running = Running(&this, &promise.id);
            if let Err(reason) = delete(&this.agent, &this.driver, &promise) {
                this.agent.metrics.failed("delete a volume");
                warn!(volume.id = %promise.id, node = %this.agent.node, why = %reason, "cannot delete a volume yet");
            }
        });
    }

    fn running(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        // Every change is one statement.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A delete that is being tried, until it ends, however it ends.
struct Running<'a>(&'a Deletes, &'a VolumeId);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running().remove(self.1);
    }
}

/// For how long a pool must be unusable before its volumes are said to be lost: a large one takes a while to open, and an
/// administrator to mount its disk.
const PATIENCE: Duration = Duration::from_secs(30);

/// What goes from one look around to the next.
pub(super) struct Rounds {
    publisher: Publisher,
    /// The pools that cannot be used, and since when.
    unusable: HashMap<PoolName, Instant>,
}

impl Rounds {
    pub(super) fn new(publisher: Publisher) -> Self {
        Self {
            publisher,
            unusable: HashMap::new(),
        }
    }

    /// Looks at all promises and pools, and publishes what they are like.
    pub(super) fn look_around(&mut self, agent: &Agent, driver: &Driver) {
        let mut orphans = Vec::new();
        if agent.complete.load(Ordering::Acquire) {
            // First the promises, then the disks: what is Ready among the first was on a disk before.
            let mut promises: Vec<Promise> = agent.lock().values().cloned().collect();
            let (held, unusable) = driver.inventory();
            self.unusable.retain(|pool, _| unusable.contains_key(pool));
            for pool in unusable.keys() {
                self.unusable.entry(pool.clone()).or_insert_with(Instant::now);
            }
            let bear_with = |pool: &PoolName| self.unusable.get(pool).is_some_and(|since| since.elapsed() < PATIENCE);
            promises.retain(|promise| !bear_with(&promise.pool));
            if let Err(reason) = mark(agent, &promises, &held, &unusable) {
                agent.metrics.failed("write a status");
                warn!(node = %agent.node, why = %reason, "cannot write what has become of volumes; trying again");
            }
            follow_expansions(agent, driver, &promises, &held);
            orphans = find_orphans(agent, driver, held);
        }
        agent.metrics.set_orphans(orphans.len());
        if let Err(reason) = self.publisher.publish(driver, &agent.metrics, &orphans) {
            agent.metrics.failed("publish pools");
            warn!(node = %agent.node, why = %reason, "cannot publish what the pools are like; trying again");
        }
    }
}

/// Deletes one volume and lets go of its HostVolume, or says there why not.
fn delete(agent: &Agent, driver: &Driver, promise: &Promise) -> Result<(), Reason> {
    match driver.delete_of(&promise.id, promise.uid) {
        Ok(()) => {
            // If it has changed meanwhile, the watch brings it again.
            if agent.book.release(promise)? {
                info!(volume.id = %promise.id, node = %agent.node, "volume let go of");
            }
            Ok(())
        }
        Err(Error { reason, .. }) => {
            let word = match *reason {
                Reason::Mounted(_) => Hindrance::MOUNTED,
                Reason::PoolUnusable { .. } => "PoolUnusable",
                _ => "Failed",
            };
            say(agent, promise, promise.stage, word, &reason.to_string()).map(drop)
        }
    }
}

/// Writes into a HostVolume how far it has come and what hinders it, if that is not there already; says whether it did.
fn say(agent: &Agent, promise: &Promise, stage: Stage, word: &str, message: &str) -> Result<bool, Reason> {
    let message: String = message.chars().take(1000).collect();
    let hindrance = Hindrance {
        reason: word.to_owned(),
        message,
    };
    if promise.stage == stage && promise.hindrance.as_ref() == Some(&hindrance) {
        return Ok(false);
    }
    let Hindrance { reason, message } = hindrance;
    let phase = match stage {
        Stage::Claimed => "Claimed",
        Stage::Ready => "Ready",
        Stage::Lost => "Lost",
    };
    let status = json!({"phase": phase, "reason": reason, "message": message});
    let written = agent.write_status(promise, &status)?;
    if written {
        warn!(volume.id = %promise.id, node = %agent.node, phase, reason, message, "said of a volume");
    }
    Ok(written)
}

/// Says of volumes whose data is not here that it is lost, and of those whose data is here that it is. Ends at the first
/// that cannot be written: the others will fare no better.
fn mark(
    agent: &Agent,
    promises: &[Promise],
    held: &[Held],
    unusable: &HashMap<PoolName, Unusable>,
) -> Result<(), Reason> {
    let here: HashMap<(&VolumeId, Uuid), &Record> = held
        .iter()
        .filter_map(|held| {
            let record = held.record.as_ref()?;
            Some(((&held.id, record.uid?), record))
        })
        .collect();
    let broken: BTreeSet<&VolumeId> = held
        .iter()
        .filter(|held| held.record.is_none())
        .map(|held| &held.id)
        .collect();
    for promise in promises.iter().filter(|promise| !promise.deleting) {
        match (promise.stage, here.get(&(&promise.id, promise.uid))) {
            (Stage::Ready | Stage::Lost, None) => lost(agent, promise, &broken, unusable)?,
            (Stage::Lost, Some(_)) => found(agent, promise)?,
            // The API server was restored from a time before the volume was first used.
            (Stage::Claimed, Some(record)) if record.phase == Phase::Ready => agent.keep(record)?,
            (Stage::Claimed | Stage::Ready, _) => {}
        }
    }
    Ok(())
}

/// Lets volumes have what was promised to them while no pod used them, or this node was away.
fn follow_expansions(agent: &Agent, driver: &Driver, promises: &[Promise], held: &[Held]) {
    let known: HashMap<(&VolumeId, Uuid), &Promise> = promises
        .iter()
        .filter(|promise| !promise.deleting)
        .map(|promise| ((&promise.id, promise.uid), promise))
        .collect();
    for record in held.iter().filter_map(|held| held.record.as_ref()) {
        let promise = record.uid.and_then(|uid| known.get(&(&record.id, uid)));
        let Some(promise) = promise.filter(|promise| promise.bytes > record.bytes) else {
            continue;
        };
        if let Err(error) = driver.follow_promise(&promise.id, promise.uid, promise.bytes) {
            agent.metrics.failed("expand a volume");
            warn!(volume.id = %promise.id, node = %agent.node, why = %error.reason, "cannot expand a volume; trying again");
        }
    }
}

fn lost(
    agent: &Agent,
    promise: &Promise,
    broken: &BTreeSet<&VolumeId>,
    unusable: &HashMap<PoolName, Unusable>,
) -> Result<(), Reason> {
    let made_on = promise.made_on.map_or_else(|| "unknown".into(), |id| id.to_string());
    let (word, message) = if broken.contains(&promise.id) {
        let why = "its record cannot be read; restore volume.json from a backup and restart hostdir there";
        ("RecordBroken", why.to_owned())
    } else if let Some(why) = unusable.get(&promise.pool) {
        let message = format!(
            "it was made on pool {made_on}; pool {} cannot be used: {why}",
            promise.pool
        );
        ("PoolUnusable", message)
    } else {
        let message = format!(
            "its data is not on this node: it was made on pool {made_on}; bring that disk back, or delete the claim if \
             the data is given up"
        );
        ("DataMissing", message)
    };
    let is_new = promise.stage != Stage::Lost;
    if say(agent, promise, Stage::Lost, word, &message)? && is_new {
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
    let of_self_test =
        |held: &Held| held.id.is_of_self_test() && held.record.as_ref().is_some_and(|record| record.uid.is_none());
    let unpromised: Vec<Held> = held
        .into_iter()
        .filter(|held| !is_promised(agent, held) && !of_self_test(held))
        .collect();
    if unpromised.is_empty() {
        return unpromised;
    }
    // Some may have been deleted since they were seen on the disk.
    let (still_held, _) = driver.inventory();
    let mut orphans = Vec::new();
    for held in unpromised {
        if !still_held.contains(&held) {
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

fn is_promised(agent: &Agent, held: &Held) -> bool {
    let promises = agent.lock();
    let promise = promises.get(&held.id);
    let uid = held.record.as_ref().and_then(|record| record.uid);
    // A record that cannot be read is taken for the one that is promised.
    promise.is_some_and(|promise| held.record.is_none() || uid == Some(promise.uid))
}

/// A first publish may just be under way, with a watch that is late: only the API server knows.
fn discard_unused(agent: &Agent, driver: &Driver, id: &VolumeId, uid: Uuid) {
    let discarded = match agent.book.look_up(id) {
        Ok(Some(promise)) if promise.uid == uid => Ok(()),
        Ok(_) => driver.delete_of(id, uid).map_err(|error| *error.reason),
        Err(reason) => Err(reason),
    };
    if let Err(reason) = discarded {
        agent.metrics.failed("discard an unused volume");
        warn!(volume.id = %id, node = %agent.node, why = %reason, "cannot discard a volume that was never used; trying again");
    }
}
