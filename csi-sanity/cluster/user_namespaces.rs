//! Pods in user namespaces: volumes are theirs as anybody's, and where such pods are asked for, no other gets a volume.

use anyhow::Result;
use serde_json::{Value, json};

use crate::lab::{Lab, PATIENCE, lab};
use crate::mode::Mode;
use crate::objects::{on_node, pod, with};
use hostdir_lab::needs;

#[needs(Root, Go, Cluster)]
fn pods_have_volumes_in_user_namespaces_and_nowhere_else_where_that_is_asked() {
    let title = "pods in user namespaces, and no others where that is asked";
    let lab = lab(Mode::Elected, "user-namespaces", title);
    let here = json!({"matchLabels": {"kubernetes.io/metadata.name": lab.namespace}});
    lab.install(&[&format!("requireUserNamespaces={here}")]);
    lab.apply(&[lab.claim("data", "10Mi")]);
    lab.wait("a pod of the host's users is refused", || {
        Ok(is_refused(&lab, &pod("pod", "data")))
    });
    let ephemeral =
        json!([{"name": "data", "ephemeral": {"volumeClaimTemplate": {"spec": lab.claim("", "1Mi")["spec"]}}}]);
    assert!(
        is_refused(&lab, &with(pod("pod", ""), "volumes", ephemeral)),
        "a pod whose claim is made for it"
    );
    let without = json!([{"name": "data", "emptyDir": {}}]);
    tried(&lab, &with(pod("pod", ""), "volumes", without)).expect("a pod without a claim");

    let apart = || on_node(with(pod("pod", "data"), "hostUsers", json!(false)), "node-1");
    lab.apply(&[apart()]);
    lab.running("pod");
    let users = lab.exec("pod", "cat /proc/self/uid_map").unwrap();
    let users: Vec<&str> = users.split_whitespace().collect();
    assert!(users[0] == "0" && users[1] != "0", "no user namespace: {users:?}");
    lab.exec("pod", "echo mine > /data/file").unwrap();
    let file = lab.on_disk(&lab.volume_of("data"), "file");
    // The mount is mapped back, so that whoever has the volume next finds the same owner.
    assert_eq!(lab.nodes[0].sh(&format!("stat -c %u {file}")).unwrap(), "0\n");
    lab.delete("pod", "pod");
    lab.apply(&[apart()]);
    lab.running("pod");
    assert_eq!(lab.exec("pod", "cat /data/file").unwrap(), "mine\n");
    lab.delete_all(PATIENCE);
    lab.nothing_is_left();
    lab.install(&[]);
}

/// Whether the API server refuses a pod for want of a user namespace.
fn is_refused(lab: &Lab, pod: &Value) -> bool {
    let refusal = tried(lab, pod).err();
    refusal.is_some_and(|error| format!("{error:#}").contains("needs \"hostUsers: false\" in its spec"))
}

/// Whether the API server would take an object into the test's namespace.
fn tried(lab: &Lab, object: &Value) -> Result<String> {
    let args = ["create", "--dry-run=server", "-n", &lab.namespace, "-f", "-"];
    lab.kubectl().feed(&args, &object.to_string())
}
