//! Events, where a person would look for them.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tokio::runtime::Handle;
use tracing::warn;

use super::api::HostVolume;
use super::ask;
use crate::volume::Reason;
use crate::volume::ports::Promise;

/// Who writes events. An event that cannot be written is logged, and no reason to stop.
pub(super) struct Events {
    recorder: Recorder,
    runtime: Handle,
}

impl Events {
    pub(super) fn new(client: Client, instance: String, runtime: Handle) -> Self {
        let recorder = recorder(client, instance);
        Self { recorder, runtime }
    }

    /// Something is wrong with a volume: said on its HostVolume, and on its claim where it has one.
    pub(super) fn warn(&self, promise: &Promise, reason: &str, note: &str) {
        self.write(EventType::Warning, promise, reason, note);
    }

    /// Something about a volume is worth to be known.
    pub(super) fn tell(&self, promise: &Promise, reason: &str, note: &str) {
        self.write(EventType::Normal, promise, reason, note);
    }

    fn write(&self, type_: EventType, promise: &Promise, reason: &str, note: &str) {
        let event = event(type_, reason, "Reconcile", note);
        let volume = ObjectReference {
            api_version: Some(HostVolume::api_version(&()).into()),
            kind: Some(HostVolume::kind(&()).into()),
            name: Some(promise.id.to_string()),
            uid: Some(promise.uid.to_string()),
            ..ObjectReference::default()
        };
        for reference in std::iter::once(volume).chain(claim(promise)) {
            if let Err(problem) = ask(
                &self.runtime,
                "write an event",
                self.recorder.publish(&event, &reference),
            ) {
                warn!(volume.id = %promise.id, why = %Reason::from(problem), "no event is written");
            }
        }
    }
}

/// Who writes events in the name of this pod.
pub(super) fn recorder(client: Client, pod: String) -> Recorder {
    let reporter = Reporter {
        controller: "hostdir.csi".into(),
        instance: Some(pod),
    };
    Recorder::new(client, reporter)
}

/// Something that happened, and what was being done then.
pub(super) fn event(type_: EventType, reason: &str, action: &str, note: &str) -> Event {
    Event {
        type_,
        reason: reason.into(),
        // The API server takes 1 kB.
        note: Some(note.chars().take(1000).collect()),
        action: action.into(),
        secondary: None,
    }
}

/// The claim of a volume. external-provisioner names a volume `pvc-` and the UID of its claim, without which
/// `kubectl describe` does not show an event.
fn claim(promise: &Promise) -> Option<ObjectReference> {
    let claim = promise.claim.as_ref()?;
    Some(ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("PersistentVolumeClaim".into()),
        namespace: Some(claim.namespace.clone()),
        name: Some(claim.name.clone()),
        uid: Some(promise.name.strip_prefix("pvc-")?.to_owned()),
        ..ObjectReference::default()
    })
}
