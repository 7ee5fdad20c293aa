//! Writes Events on the objects where people look for them.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tokio::runtime::Handle;
use tracing::warn;

use super::api;
use super::client::ask;
use crate::volume::Reason;
use crate::volume::host_volume::HostVolume;

/// Writes Events about volumes and nodes. An Event that cannot be written is only logged.
pub(super) struct Events {
    recorder: Recorder,
    runtime: Handle,
}

impl Events {
    pub(super) fn new(client: Client, instance: String, runtime: Handle) -> Self {
        let recorder = recorder(client, instance);
        Self { recorder, runtime }
    }

    /// Writes a warning on the HostVolume, and on its claim if it has one.
    pub(super) fn warn(&self, volume: &HostVolume, reason: &str, note: &str) {
        self.write(EventType::Warning, volume, reason, note);
    }

    /// Writes a message on the HostVolume, and on its claim if it has one.
    pub(super) fn tell(&self, volume: &HostVolume, reason: &str, note: &str) {
        self.write(EventType::Normal, volume, reason, note);
    }

    /// Writes an Event on a HostNode: a warning, or the message that a condition is over.
    pub(super) fn of_node(&self, node: &ObjectReference, is_warning: bool, reason: &str, message: &str) {
        let type_ = if is_warning {
            EventType::Warning
        } else {
            EventType::Normal
        };
        self.publish(&event(type_, reason, "Publish", message), node);
    }

    fn write(&self, type_: EventType, volume: &HostVolume, reason: &str, note: &str) {
        let event = event(type_, reason, "Reconcile", note);
        let object = ObjectReference {
            api_version: Some(api::HostVolume::api_version(&()).into()),
            kind: Some(api::HostVolume::kind(&()).into()),
            name: Some(volume.id.to_string()),
            uid: Some(volume.uid.to_string()),
            ..ObjectReference::default()
        };
        for reference in std::iter::once(object).chain(claim(volume)) {
            self.publish(&event, &reference);
        }
    }

    fn publish(&self, event: &Event, about: &ObjectReference) {
        let published = self.recorder.publish(event, about);
        if let Err(problem) = ask(&self.runtime, "write an event", published) {
            let (kind, name) = (&about.kind, &about.name);
            warn!(?kind, ?name, why = %Reason::from(problem), "cannot write an Event");
        }
    }
}

/// Returns a recorder that writes Events in the name of this pod.
pub(super) fn recorder(client: Client, pod: String) -> Recorder {
    let reporter = Reporter {
        controller: "hostdir.csi".into(),
        instance: Some(pod),
    };
    Recorder::new(client, reporter)
}

/// `action` is what was being done.
pub(super) fn event(type_: EventType, reason: &str, action: &str, note: &str) -> Event {
    Event {
        type_,
        reason: reason.into(),
        // The API server accepts at most 1 kB.
        note: Some(note.chars().take(1000).collect()),
        action: action.into(),
        secondary: None,
    }
}

/// The claim of a volume, with its UID: without that, `kubectl describe` does not show the Event. external-provisioner names
/// a volume `pvc-` and the UID of its claim.
fn claim(volume: &HostVolume) -> Option<ObjectReference> {
    let claim = volume.spec.claim.as_ref()?;
    Some(ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("PersistentVolumeClaim".into()),
        namespace: Some(claim.namespace.clone()),
        name: Some(claim.name.clone()),
        uid: Some(volume.spec.name.strip_prefix("pvc-")?.to_owned()),
        ..ObjectReference::default()
    })
}
