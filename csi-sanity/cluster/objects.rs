//! Kubernetes objects as users write them.

use hostdir_lab::cluster::BUSYBOX_IMAGE;
use serde_json::{Value, json};

/// A claim with a StorageClass and an access mode.
pub(crate) fn claim_of(name: &str, size: &str, class: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": class,
            "accessModes": [mode],
            "resources": {"requests": {"storage": size}},
        },
    })
}

/// A StorageClass.
pub(crate) fn class(driver: &str, name: &str, parameters: &Value, reclaim: &str, options: &[&str]) -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": driver,
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": reclaim,
        "parameters": parameters,
        "mountOptions": options,
    })
}

/// A pod that runs until it is deleted, with a claim mounted at `/data`.
pub(crate) fn pod(name: &str, claim: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": pod_spec(&json!({"name": "data", "persistentVolumeClaim": {"claimName": claim}})),
    })
}

fn pod_spec(volume: &Value) -> Value {
    json!({
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": false,
        "containers": [{
            "name": "main",
            "image": BUSYBOX_IMAGE,
            // Ends at once on SIGTERM.
            "args": ["-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        }],
        "volumes": [volume],
    })
}

/// The pod, restricted to a node.
pub(crate) fn on_node(mut pod: Value, node: &str) -> Value {
    pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    pod
}

/// The pod with a field of its spec set.
pub(crate) fn with(mut pod: Value, field: &str, value: Value) -> Value {
    pod["spec"][field] = value;
    pod
}

/// The pod with a field of its volume mount set.
pub(crate) fn with_mount(mut pod: Value, field: &str, value: Value) -> Value {
    pod["spec"]["containers"][0]["volumeMounts"][0][field] = value;
    pod
}

/// A StatefulSet of `replicas` pods, at most one per node, each with a volume.
pub(crate) fn stateful_set(name: &str, replicas: usize, claim: &Value) -> Value {
    let labels = json!({"app": name});
    let apart = json!([{"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}]);
    let mut spec = pod_spec(&json!({"name": "unused", "emptyDir": {}}));
    spec["affinity"] = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": apart}});
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "serviceName": name,
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
            "volumeClaimTemplates": [claim],
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Retain"},
        },
    })
}
