//! Makes a volume of this node match its HostVolume, and writes into the HostVolume what cannot be done.

use std::sync::Arc;

use serde_json::json;
use tracing::{info, warn};

use super::assignments::ApiAssignments;
use super::found::Found;
use crate::k8s::events::Events;
use crate::volume::error::subject;
use crate::volume::host_volume::{Assignments as _, HostVolume, HostVolumeStore as _, StatusReason};
use crate::volume::record::Phase;
use crate::volume::{Error, Node, Reason};

/// A task that failed, named as in the metric `hostdir_errors`.
pub(super) struct Failed {
    pub(super) task: &'static str,
    pub(super) why: Reason,
}

/// Returns an error handler that adds the name of the task.
fn in_task(task: &'static str) -> impl Fn(Reason) -> Failed {
    move |why| Failed { task, why }
}

pub(super) struct Reconciler {
    pub(super) node: Arc<Node>,
    pub(super) assignments: Arc<ApiAssignments>,
    pub(super) events: Events,
}

impl Reconciler {
    /// Deletes a volume that is to be deleted; marks one whose data is lost or back; expands one that is to grow.
    /// Idempotent.
    pub(super) fn reconcile(&self, volume: &HostVolume, found: Found<'_>) -> Result<(), Failed> {
        if volume.deleting {
            return self.delete(volume).map_err(in_task("delete a volume"));
        }
        self.write_phase(volume, found).map_err(in_task("write a status"))?;
        match found {
            Found::Record(record) if volume.spec.bytes > record.spec.bytes => self.grow(volume),
            _ => Ok(()),
        }
    }

    /// Deletes the data, and then removes the finalizer of the HostVolume; or writes into the HostVolume why it cannot.
    fn delete(&self, volume: &HostVolume) -> Result<(), Reason> {
        match self.node.delete_of(&volume.id, volume.uid) {
            Ok(()) => {
                // If the HostVolume has changed meanwhile, the watch shows it again.
                if self.assignments.store.remove_finalizer(volume)? {
                    info!(volume.id = %volume.id, node = %self.node.name(), "finalizer removed");
                }
                Ok(())
            }
            Err(Error { reason, .. }) => {
                let word = match *reason {
                    Reason::Mounted(_) => StatusReason::MOUNTED,
                    Reason::PoolUnusable { .. } => "PoolUnusable",
                    _ => "Failed",
                };
                self.write_reason(volume, volume.phase, word, &reason.to_string())
                    .map(drop)
            }
        }
    }

    /// Corrects the phase by what was found.
    fn write_phase(&self, volume: &HostVolume, found: Found<'_>) -> Result<(), Reason> {
        match (volume.phase, found) {
            (Phase::Ready | Phase::Lost, Found::Broken | Found::Unusable(_) | Found::Nothing) => {
                self.mark_lost(volume, found)
            }
            (Phase::Lost, Found::Record(_)) => self.mark_found(volume),
            // The API server was restored from a backup that is older than the volume's first use.
            (Phase::Claimed, Found::Record(record)) if record.ready => self.assignments.mark_ready(record),
            _ => Ok(()),
        }
    }

    fn mark_lost(&self, volume: &HostVolume, found: Found<'_>) -> Result<(), Reason> {
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
            Found::Unknown | Found::Record(_) | Found::Nothing => (
                "DataMissing",
                format!(
                    "its data is not on this node: it was made on pool {made_on}; bring that disk back, or delete the claim \
                     to give up its data"
                ),
            ),
        };
        let is_new = volume.phase != Phase::Lost;
        if self.write_reason(volume, Phase::Lost, word, &message)? && is_new {
            let note = format!("{}{message}", self.subject(volume));
            self.events.warn(volume, "VolumeLost", &note);
        }
        Ok(())
    }

    fn mark_found(&self, volume: &HostVolume) -> Result<(), Reason> {
        let status = json!({"phase": Phase::Ready, "reason": null, "message": null});
        if self.assignments.write_status(volume, &status)? {
            info!(volume.id = %volume.id, node = %self.node.name(), "the data of a volume is back");
            let note = format!("{}its data is back", self.subject(volume));
            self.events.tell(volume, "VolumeFound", &note);
        }
        Ok(())
    }

    /// Carries out an expansion that was requested while no pod used the volume.
    fn grow(&self, volume: &HostVolume) -> Result<(), Failed> {
        let grown = self.node.grow_to(&volume.id, volume.uid, volume.spec.bytes);
        grown
            .map(drop)
            .map_err(|error| in_task("expand a volume")(*error.reason))
    }

    /// Writes phase, reason and message, unless the HostVolume has them already. Returns whether they were written.
    fn write_reason(&self, volume: &HostVolume, phase: Phase, reason: &str, message: &str) -> Result<bool, Reason> {
        let wanted = StatusReason {
            reason: reason.to_owned(),
            message: message.chars().take(1000).collect(),
        };
        if volume.phase == phase && volume.status_reason.as_ref() == Some(&wanted) {
            return Ok(false);
        }
        let StatusReason { reason, message } = wanted;
        let status = json!({"phase": phase, "reason": reason, "message": message});
        let written = self.assignments.write_status(volume, &status)?;
        if written {
            let phase = phase.as_str();
            warn!(volume.id = %volume.id, node = %self.node.name(), phase, reason, message, "HostVolume status written");
        }
        Ok(written)
    }

    fn subject(&self, volume: &HostVolume) -> String {
        subject(Some(&volume.id), Some(self.node.name()))
    }
}
