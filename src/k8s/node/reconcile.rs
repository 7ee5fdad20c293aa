//! Makes a volume of this node match its HostVolume, and writes into the HostVolume what cannot be done.

use std::sync::Arc;

use serde_json::json;
use tracing::{info, warn};
use uuid::Uuid;

use super::assignments::ApiAssignments;
use super::found::Found;
use crate::k8s::events::Events;
use crate::metrics::Metrics;
use crate::volume::error::subject;
use crate::volume::host_volume::{Assignments as _, Decision, HostVolume, HostVolumeStore as _, StatusReason};
use crate::volume::record::{Phase, Record};
use crate::volume::{Error, Node, Reason};

/// A task that failed, named as in the metric `hostdir_errors`.
pub(super) struct Failed {
    pub(super) task: &'static str,
    pub(super) why: Reason,
}

/// `status.reason` of a volume of which the node has the data of an earlier HostVolume.
const EARLIER_DATA: &str = "EarlierData";

fn earlier_data(volume: &HostVolume, earlier: &Record) -> String {
    let id = &volume.id;
    let claim = earlier.spec.claim.as_ref();
    let claim = claim.map_or_else(
        || "unknown".into(),
        |claim| format!("{}/{}", claim.namespace, claim.name),
    );
    let Some(uid) = earlier.uid else {
        return "the node has the data of a volume of this name that was made in local mode; move it out of the pool's `volumes` \
                folder if it is not needed"
            .into();
    };
    format!(
        "the node has the data of an earlier HostVolume of this name (UID {uid}, claim {claim}); to use that data: kubectl annotate \
         hostvolume {id} hostdir.csi/adopt-data={uid}; if it is not needed, move it out of the pool's `volumes` folder, and restart \
         hostdir on the node"
    )
}

/// What was written to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrote {
    Nothing,
    Status,
}

/// Returns an error handler that adds the name of the task.
fn in_task(task: &'static str) -> impl Fn(Reason) -> Failed {
    move |why| Failed { task, why }
}

pub(super) struct Reconciler {
    pub(super) node: Arc<Node>,
    pub(super) assignments: Arc<ApiAssignments>,
    pub(super) events: Events,
    pub(super) metrics: Arc<Metrics>,
}

/// Whether a disk has to work for the volume: it is to grow, or to get the data of an earlier one.
pub(super) fn needs_disk(volume: &HostVolume, found: Found<'_>) -> bool {
    match found {
        Found::Record(record) => volume.spec.bytes > record.spec.bytes,
        Found::Earlier(record) => volume.decision.adopt.is_some() && volume.decision.adopt == record.uid,
        Found::Unknown | Found::Broken | Found::Unusable(_) | Found::Nothing => false,
    }
}

impl Reconciler {
    /// Deletes a volume that is to be deleted; marks one whose data is lost or back; expands one that is to grow; gives data to one
    /// that is to adopt it. Leaves a volume alone whose HostVolume cannot be read. Idempotent.
    pub(super) fn reconcile(&self, volume: &HostVolume, found: Found<'_>) -> Result<Wrote, Failed> {
        if volume.unreadable.is_some() {
            return Ok(Wrote::Nothing);
        }
        if volume.deleting {
            return self.delete(volume).map_err(in_task("delete a volume"));
        }
        if needs_disk(volume, found) {
            if let Found::Earlier(Record { uid: Some(from), .. }) = found {
                return self.adopt(volume, *from);
            }
            self.write_phase(volume, found).map_err(in_task("write a status"))?;
            return self.grow(volume);
        }
        self.write_phase(volume, found).map_err(in_task("write a status"))
    }

    /// Deletes the data, and then removes the finalizer of the HostVolume; or writes into the HostVolume why it does not.
    fn delete(&self, volume: &HostVolume) -> Result<Wrote, Reason> {
        let Decision { delete, leave, .. } = volume.decision;
        // Other finalizers keep the object.
        if !volume.held {
            return Ok(Wrote::Nothing);
        }
        if leave {
            let unreachable = self.node.unreachable(volume);
            if unreachable.is_some() || !delete {
                return self.leave(volume, unreachable.as_ref());
            }
        }
        if !delete && self.node.may_have_data(volume) {
            return self.refuse_delete(volume);
        }
        let Err(Error { reason, .. }) = self.node.delete_assigned(volume) else {
            // If the HostVolume has changed meanwhile, the watch shows it again.
            if self.assignments.store.remove_finalizer(volume)? {
                info!(volume.id = %volume.id, node = %self.node.name(), "finalizer removed");
            }
            return Ok(Wrote::Status);
        };
        let word = match *reason {
            Reason::Mounted(_) => StatusReason::MOUNTED,
            Reason::PoolUnusable { .. } => "PoolUnusable",
            Reason::PoolRemoved { .. } => "PoolRemoved",
            _ => "Failed",
        };
        self.postpone_delete(volume, word, &reason.to_string())
    }

    /// Somebody deleted the HostVolume, and nobody has said that its data may go: a slip of the hand, or all HostVolumes are deleted
    /// with their definition.
    fn refuse_delete(&self, volume: &HostVolume) -> Result<Wrote, Reason> {
        let HostVolume { id, uid, .. } = volume;
        let message = format!(
            "its HostVolume was deleted, but not through its claim, so its data is kept; to delete the data: kubectl annotate \
             hostvolume {id} hostdir.csi/delete-data={uid}; to keep the data and let the HostVolume go: kubectl annotate hostvolume \
             {id} hostdir.csi/leave-data={uid}"
        );
        self.postpone_delete(volume, "DataKept", &message)
    }

    fn postpone_delete(&self, volume: &HostVolume, word: &str, message: &str) -> Result<Wrote, Reason> {
        let wrote = self.write_reason(volume, volume.phase, word, message)?;
        if wrote == Wrote::Status {
            let note = format!("{}it is not deleted yet: {message}", self.subject(volume));
            self.events.warn(volume, "DeleteWaits", &note);
        }
        Ok(wrote)
    }

    /// Lets a HostVolume go without its data.
    fn leave(&self, volume: &HostVolume, unreachable: Option<&Reason>) -> Result<Wrote, Reason> {
        if !self.assignments.store.remove_finalizer(volume)? {
            return Ok(Wrote::Nothing);
        }
        self.metrics.left();
        let why = unreachable.map_or_else(String::new, |why| format!("; {why}"));
        let note = format!(
            "{}its HostVolume went without its data, as its annotation hostdir.csi/leave-data allows; where there is data, it is \
             listed as an orphan{why}",
            self.subject(volume)
        );
        warn!(volume.id = %volume.id, node = %self.node.name(), "{note}");
        self.events.warn(volume, "DataLeft", &note);
        Ok(Wrote::Status)
    }

    /// Gives the data of an earlier HostVolume to this one. The next pass marks it as `Ready`.
    fn adopt(&self, volume: &HostVolume, from: Uuid) -> Result<Wrote, Failed> {
        let adopted = self.node.adopt(volume, from);
        adopted.map_err(|error| in_task("adopt data")(*error.reason))?;
        let note = format!("{}it has adopted the data of HostVolume {from}", self.subject(volume));
        self.events.tell(volume, "DataAdopted", &note);
        Ok(Wrote::Nothing)
    }

    /// Corrects the phase by what was found.
    fn write_phase(&self, volume: &HostVolume, found: Found<'_>) -> Result<Wrote, Reason> {
        match (volume.phase, found) {
            (Phase::Ready | Phase::Lost, Found::Broken | Found::Unusable(_) | Found::Earlier(_) | Found::Nothing) => {
                self.mark_lost(volume, found)
            }
            (Phase::Lost, Found::Record(_)) => self.mark_found(volume),
            // The API server was restored from a backup that is older than the volume's first use.
            (Phase::Claimed, Found::Record(record)) if record.ready => {
                self.assignments.mark_ready(record).map(|()| Wrote::Status)
            }
            (Phase::Claimed, Found::Earlier(record)) => {
                self.write_reason(volume, Phase::Claimed, EARLIER_DATA, &earlier_data(volume, record))
            }
            _ => Ok(Wrote::Nothing),
        }
    }

    fn mark_lost(&self, volume: &HostVolume, found: Found<'_>) -> Result<Wrote, Reason> {
        let made_on = volume.made_on.map_or_else(|| "unknown".into(), |id| id.to_string());
        let (word, message) = match found {
            Found::Broken => (
                "RecordBroken",
                "its record cannot be read; check the disk, or restore volume.json from a backup".to_owned(),
            ),
            Found::Unusable(why) => (
                "PoolUnusable",
                format!(
                    "it was made on pool {made_on}; pool {} cannot be used: {why}",
                    volume.pool
                ),
            ),
            Found::Earlier(record) => (EARLIER_DATA, earlier_data(volume, record)),
            Found::Unknown | Found::Record(_) | Found::Nothing => (
                "DataMissing",
                format!(
                    "its data is not on this node: it was made on pool {made_on}; bring that disk back, or delete the claim \
                     to give up its data"
                ),
            ),
        };
        let is_new = volume.phase != Phase::Lost;
        let wrote = self.write_reason(volume, Phase::Lost, word, &message)?;
        if wrote == Wrote::Status && is_new {
            let note = format!("{}{message}", self.subject(volume));
            self.events.warn(volume, "VolumeLost", &note);
        }
        Ok(wrote)
    }

    fn mark_found(&self, volume: &HostVolume) -> Result<Wrote, Reason> {
        let status = json!({"phase": Phase::Ready, "reason": null, "message": null});
        if self.assignments.write_status(volume, &status)? {
            info!(volume.id = %volume.id, node = %self.node.name(), "the data of a volume is back");
            let note = format!("{}its data is back", self.subject(volume));
            self.events.tell(volume, "VolumeFound", &note);
        }
        Ok(Wrote::Status)
    }

    /// Carries out an expansion that was requested while no pod used the volume.
    fn grow(&self, volume: &HostVolume) -> Result<Wrote, Failed> {
        let grown = self.node.grow_to(&volume.id, volume.uid, volume.spec.bytes);
        grown
            .map(|_| Wrote::Nothing)
            .map_err(|error| in_task("expand a volume")(*error.reason))
    }

    /// Writes phase, reason and message, unless the HostVolume has them already.
    fn write_reason(&self, volume: &HostVolume, phase: Phase, reason: &str, message: &str) -> Result<Wrote, Reason> {
        let wanted = StatusReason {
            reason: reason.to_owned(),
            message: message.chars().take(1000).collect(),
        };
        if volume.phase == phase && volume.status_reason.as_ref() == Some(&wanted) {
            return Ok(Wrote::Nothing);
        }
        let StatusReason { reason, message } = wanted;
        let status = json!({"phase": phase, "reason": reason, "message": message});
        if !self.assignments.write_status(volume, &status)? {
            return Ok(Wrote::Nothing);
        }
        let phase = phase.as_str();
        warn!(volume.id = %volume.id, node = %self.node.name(), phase, reason, message, "HostVolume status written");
        Ok(Wrote::Status)
    }

    fn subject(&self, volume: &HostVolume) -> String {
        subject(Some(&volume.id), Some(self.node.name()))
    }
}
