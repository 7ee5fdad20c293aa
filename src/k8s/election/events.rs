//! Writes Events that say that a Lease was taken from a ghost, or that nobody could lead.

use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::Api;
use kube::runtime::events::{EventType, Recorder};
use kube::{Client, ResourceExt};
use tracing::warn;

use super::FRESH;
use crate::k8s::client::request_within;
use crate::k8s::events;
use crate::volume::Reason;

#[derive(Clone)]
pub(super) struct Announcer {
    client: Client,
    recorder: Recorder,
    namespace: String,
    pod: String,
}

impl Announcer {
    /// Writes Events in the name of this Pod.
    pub(super) fn new(client: Client, namespace: String, pod: String) -> Self {
        Self {
            recorder: events::recorder(client.clone(), pod.clone()),
            client,
            namespace,
            pod,
        }
    }

    /// Writes a warning on the Lease and on the Deployment.
    pub(super) async fn write_events(self, reason: &'static str, lease: ObjectReference, note: String) {
        let event = events::event(EventType::Warning, reason, "HandOver", &note);
        for reference in [Some(lease), self.deployment().await].into_iter().flatten() {
            let write = self.recorder.publish(&event, &reference);
            if let Err(problem) = request_within(FRESH, "write an event", write).await {
                warn!(why = %Reason::from(problem), "cannot write an Event");
            }
        }
    }

    /// The Deployment that this controller's Pod belongs to, found through its ReplicaSet.
    async fn deployment(&self) -> Option<ObjectReference> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let sets: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &self.namespace);
        let pod = request_within(FRESH, "read its own Pod", pods.get_metadata(&self.pod));
        let set = controller(pod.await.ok()?.owner_references(), "ReplicaSet")?;
        let set = request_within(FRESH, "read its ReplicaSet", sets.get_metadata(&set.name));
        let owner = controller(set.await.ok()?.owner_references(), "Deployment")?;
        Some(ObjectReference {
            api_version: Some(owner.api_version),
            kind: Some(owner.kind),
            namespace: Some(self.namespace.clone()),
            name: Some(owner.name),
            uid: Some(owner.uid),
            ..ObjectReference::default()
        })
    }
}

fn controller(owners: &[OwnerReference], kind: &str) -> Option<OwnerReference> {
    owners.iter().find(|owner| owner.kind == kind).cloned()
}
