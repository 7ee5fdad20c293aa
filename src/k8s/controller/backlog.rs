//! What waits for the sidecars: claims without volume, volumes without claim, claims that grow.
//!
//! The rules are those by which external-provisioner (sig-storage-lib-external-provisioner, controller.go, `shouldProvision` and
//! `shouldDelete`) and external-resizer (pkg/controller/controller.go, `pvcNeedResize`) take something up. Only what waits is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;

use crate::k8s::watch::{Follower, Unreadable};
use crate::leader::identity;
use crate::volume::id::VolumeId;
use crate::volume::size::Bytes;

/// What waits for the sidecars of a driver.
pub(crate) struct Backlog {
    driver: String,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Claims without a volume.
    unbound: BTreeMap<String, Unbound>,
    growing: BTreeSet<String>,
    /// PersistentVolumes to be deleted.
    released: BTreeMap<VolumeId, String>,
    /// StorageClasses that bind at once.
    immediate: BTreeSet<String>,
    /// How many claims and PersistentVolumes there were when they were last listed.
    claims: usize,
    volumes: usize,
}

/// A claim without a volume.
enum Unbound {
    /// The scheduler has chosen its node.
    HasNode,
    /// It waits only if its StorageClass binds at once.
    OfClass(String),
}

impl Backlog {
    /// Of the driver with this name.
    pub(crate) fn new(driver: String) -> Self {
        let waiting = Mutex::default();
        Self { driver, waiting }
    }

    /// The queues of the sidecar that is elected by this Lease, each with what waits for it.
    pub(crate) fn of(&self, lease: &str) -> Vec<(String, BTreeSet<String>)> {
        let driver = identity(&self.driver);
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if lease == driver {
            let waits = |claim: &Unbound| match claim {
                Unbound::HasNode => true,
                Unbound::OfClass(class) => waiting.immediate.contains(class),
            };
            let unbound = waiting.unbound.iter().filter(|(_, claim)| waits(claim));
            vec![
                ("claims".to_owned(), unbound.map(|(claim, _)| claim.clone()).collect()),
                ("volumes".to_owned(), waiting.released.values().cloned().collect()),
            ]
        } else if lease.strip_prefix("external-resizer-") == Some(&driver) {
            vec![(format!("{}-pvc", self.driver), waiting.growing.clone())]
        } else {
            Vec::new()
        }
    }

    /// About how many objects a sidecar has to list before it begins.
    pub(crate) fn objects(&self) -> usize {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.claims + waiting.volumes
    }

    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Notes a PersistentVolume.
    pub(super) fn note_volume(&self, volume: &DynamicObject) {
        let (id, name) = (VolumeId::for_name(&volume.name_any()), volume.name_any());
        let is_released = self.is_released(volume);
        self.change(|waiting| {
            if is_released {
                waiting.released.insert(id, format!("PersistentVolume {name}"));
            } else {
                waiting.released.remove(&id);
            }
        });
    }

    /// Forgets a PersistentVolume.
    pub(super) fn forget_volume(&self, volume: &DynamicObject) {
        let id = VolumeId::for_name(&volume.name_any());
        self.change(|waiting| drop(waiting.released.remove(&id)));
    }

    /// Forgets all PersistentVolumes but these.
    pub(super) fn retain_volumes(&self, listed: &BTreeSet<VolumeId>) {
        self.change(|waiting| {
            waiting.volumes = listed.len();
            waiting.released.retain(|id, _| listed.contains(id));
        });
    }

    fn is_released(&self, volume: &DynamicObject) -> bool {
        let (spec, status) = (&volume.data["spec"], &volume.data["status"]);
        let by = volume.annotations().get("pv.kubernetes.io/provisioned-by");
        spec["csi"]["driver"] == self.driver.as_str()
            && spec["persistentVolumeReclaimPolicy"] == "Delete"
            && status["phase"] == "Released"
            && by == Some(&self.driver)
    }

    fn note_claim(&self, claim: &DynamicObject) {
        let name = claim_title(claim);
        let (unbound, grows) = (self.unbound(claim), self.grows(claim));
        self.change(|waiting| {
            waiting.unbound.remove(&name);
            waiting.growing.remove(&name);
            if grows {
                waiting.growing.insert(name);
            } else if let Some(unbound) = unbound {
                waiting.unbound.insert(name, unbound);
            }
        });
    }

    fn is_ours(&self, claim: &DynamicObject) -> bool {
        let annotations = claim.annotations();
        let by = annotations
            .get("volume.kubernetes.io/storage-provisioner")
            .or_else(|| annotations.get("volume.beta.kubernetes.io/storage-provisioner"));
        by == Some(&self.driver)
    }

    /// Whether a claim may wait for a volume.
    fn unbound(&self, claim: &DynamicObject) -> Option<Unbound> {
        let spec = &claim.data["spec"];
        let is_unbound = spec["volumeName"].as_str().unwrap_or_default().is_empty();
        (self.is_ours(claim) && is_unbound && claim.metadata.deletion_timestamp.is_none()).then(|| {
            let has_node = claim.annotations().contains_key("volume.kubernetes.io/selected-node");
            if has_node {
                Unbound::HasNode
            } else {
                Unbound::OfClass(spec["storageClassName"].as_str().unwrap_or_default().to_owned())
            }
        })
    }

    /// Whether a claim waits for its volume to grow, and not for its node.
    fn grows(&self, claim: &DynamicObject) -> bool {
        let (spec, status) = (&claim.data["spec"], &claim.data["status"]);
        let bytes = |value: &Value| value.as_str().and_then(|text| text.parse::<Bytes>().ok());
        let (wanted, has) = (
            bytes(&spec["resources"]["requests"]["storage"]),
            bytes(&status["capacity"]["storage"]),
        );
        let step = status["allocatedResourceStatuses"]["storage"]
            .as_str()
            .unwrap_or_default();
        self.is_ours(claim)
            && status["phase"] == "Bound"
            && wanted.zip(has).is_some_and(|(wanted, has)| wanted > has)
            && !step.starts_with("Node")
            && !step.ends_with("Infeasible")
            && !waits_for_node(claim)
    }
}

/// Whether a claim's volume has grown but for its filesystem, which the node sees to.
fn waits_for_node(claim: &DynamicObject) -> bool {
    let conditions = claim.data["status"]["conditions"].as_array();
    let is = |one: &Value| one["type"] == "FileSystemResizePending" && one["status"] == "True";
    conditions.into_iter().flatten().any(is)
}

fn claim_title(claim: &DynamicObject) -> String {
    format!("claim {}/{}", claim.namespace().unwrap_or_default(), claim.name_any())
}

/// Follows PersistentVolumeClaims.
pub(super) struct Claims<'a>(pub(super) &'a Backlog);

impl Follower for Claims<'_> {
    type Key = String;
    const KIND: &'static str = "PersistentVolumeClaim";

    fn applied(&self, object: DynamicObject) -> Result<String, Unreadable<String>> {
        self.0.note_claim(&object);
        Ok(claim_title(&object))
    }

    fn gone(&self, object: DynamicObject) {
        let name = claim_title(&object);
        self.0.change(|waiting| {
            waiting.unbound.remove(&name);
            waiting.growing.remove(&name);
        });
    }

    fn retain(&self, listed: &BTreeSet<String>) {
        self.0.change(|waiting| {
            waiting.claims = listed.len();
            waiting.unbound.retain(|name, _| listed.contains(name));
            waiting.growing.retain(|name| listed.contains(name));
        });
    }
}

/// Follows StorageClasses.
pub(super) struct Classes<'a>(pub(super) &'a Backlog);

impl Follower for Classes<'_> {
    type Key = String;
    const KIND: &'static str = "StorageClass";

    fn applied(&self, object: DynamicObject) -> Result<String, Unreadable<String>> {
        let name = object.name_any();
        let is_immediate = object.data["volumeBindingMode"] != "WaitForFirstConsumer";
        self.0.change(|waiting| {
            if is_immediate {
                waiting.immediate.insert(name.clone());
            } else {
                waiting.immediate.remove(&name);
            }
        });
        Ok(name)
    }

    fn gone(&self, object: DynamicObject) {
        self.0.change(|waiting| {
            waiting.immediate.remove(&object.name_any());
        });
    }

    fn retain(&self, listed: &BTreeSet<String>) {
        self.0
            .change(|waiting| waiting.immediate.retain(|name| listed.contains(name)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DRIVER: &str = "hostdir.csi";

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    /// A claim that waits for a volume on a node.
    fn claim() -> Value {
        json!({
            "metadata": {"name": "data", "namespace": "shop", "annotations": {
                "volume.kubernetes.io/storage-provisioner": DRIVER,
                "volume.kubernetes.io/selected-node": "node-1",
            }},
            "spec": {"storageClassName": "hostdir", "resources": {"requests": {"storage": "2Gi"}}},
            "status": {"phase": "Pending"},
        })
    }

    fn waits(backlog: &Backlog, lease: &str, queue: usize) -> usize {
        backlog.of(lease)[queue].1.len()
    }

    fn note(backlog: &Backlog, claim: Value) {
        assert!(Claims(backlog).applied(object(claim)).is_ok());
    }

    #[test]
    fn claims_wait_that_external_provisioner_takes_up() {
        let backlog = Backlog::new(DRIVER.into());
        let unbound = || waits(&backlog, "hostdir-csi", 0);
        note(&backlog, claim());
        assert_eq!(unbound(), 1);
        for (path, value) in [
            ("/spec/volumeName", json!("pvc-1")),
            ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z")),
            (
                "/metadata/annotations/volume.kubernetes.io~1storage-provisioner",
                json!("example.org"),
            ),
        ] {
            let mut changed = claim();
            let (parent, name) = path.rsplit_once('/').unwrap();
            changed.pointer_mut(parent).unwrap()[name.replace("~1", "/")] = value;
            note(&backlog, changed);
            assert_eq!(unbound(), 0, "{path}");
            note(&backlog, claim());
        }
        // Without a node only if its class binds at once.
        let mut without = claim();
        let annotations = without.pointer_mut("/metadata/annotations").unwrap();
        annotations
            .as_object_mut()
            .unwrap()
            .remove("volume.kubernetes.io/selected-node");
        note(&backlog, without);
        assert_eq!(unbound(), 0);
        let class = json!({"metadata": {"name": "hostdir"}, "volumeBindingMode": "Immediate"});
        assert!(Classes(&backlog).applied(object(class)).is_ok());
        assert_eq!(unbound(), 1);
        Claims(&backlog).gone(object(claim()));
        assert_eq!(unbound(), 0);
    }

    #[test]
    fn claims_wait_that_external_resizer_takes_up() {
        let backlog = Backlog::new(DRIVER.into());
        let growing = || waits(&backlog, "external-resizer-hostdir-csi", 0);
        let mut bound = claim();
        bound["spec"]["volumeName"] = "pvc-1".into();
        bound["status"] = json!({"phase": "Bound", "capacity": {"storage": "1Gi"}});
        note(&backlog, bound.clone());
        assert_eq!((growing(), waits(&backlog, "hostdir-csi", 0)), (1, 0));
        bound["status"]["allocatedResourceStatuses"] = json!({"storage": "NodeResizePending"});
        note(&backlog, bound.clone());
        assert_eq!(growing(), 0);
        // Kubernetes before 1.32 says it this way only.
        let condition = json!([{"type": "FileSystemResizePending", "status": "True"}]);
        bound["status"] = json!({"phase": "Bound", "capacity": {"storage": "1Gi"}, "conditions": condition});
        note(&backlog, bound.clone());
        assert_eq!(growing(), 0);
        bound["status"] = json!({"phase": "Bound", "capacity": {"storage": "2Gi"}});
        note(&backlog, bound);
        assert_eq!(growing(), 0);
    }

    #[test]
    fn volumes_wait_that_external_provisioner_deletes() {
        let backlog = Backlog::new(DRIVER.into());
        let released = || waits(&backlog, "hostdir-csi", 1);
        let mut volume = json!({
            "metadata": {"name": "pvc-1", "annotations": {"pv.kubernetes.io/provisioned-by": DRIVER}},
            "spec": {"csi": {"driver": DRIVER}, "persistentVolumeReclaimPolicy": "Delete"},
            "status": {"phase": "Released"},
        });
        backlog.note_volume(&object(volume.clone()));
        assert_eq!(released(), 1);
        volume["spec"]["persistentVolumeReclaimPolicy"] = "Retain".into();
        backlog.note_volume(&object(volume));
        assert_eq!(released(), 0);
    }
}
