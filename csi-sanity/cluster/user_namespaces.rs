//! Pods in user namespaces can use volumes, and with `requireUserNamespaces` no other pods can.

use anyhow::Result;
use serde_json::{Value, json};

use crate::lab::{Lab, PATIENCE, lab};
use crate::mode::Mode;
use crate::objects::{on_node, pod, with};
use hostdir_lab::needs;

#[needs(Root, Go, Cluster)]
fn require_user_namespaces_refuses_volumes_to_other_pods() {
    let title = "with requireUserNamespaces only pods in user namespaces get volumes";
    let lab = lab(Mode::Elected, "user-namespaces", title);
    let here = json!({"matchLabels": {"kubernetes.io/metadata.name": lab.namespace}});
    lab.install(&[&format!("requireUserNamespaces={here}")]);
    lab.apply(&[lab.claim("data", "10Mi")]);
    lab.wait("a pod without a user namespace is refused", || {
        Ok(is_refused(&lab, &pod("pod", "data")))
    });
    let ephemeral =
        json!([{"name": "data", "ephemeral": {"volumeClaimTemplate": {"spec": lab.claim("", "1Mi")["spec"]}}}]);
    assert!(
        is_refused(&lab, &with(pod("pod", ""), "volumes", ephemeral)),
        "a pod with an ephemeral volume was not refused"
    );
    let without = json!([{"name": "data", "emptyDir": {}}]);
    create_dry_run(&lab, &with(pod("pod", ""), "volumes", without)).expect("a pod without a claim is accepted");

    let apart = || on_node(with(pod("pod", "data"), "hostUsers", json!(false)), "node-1");
    lab.apply(&[apart()]);
    lab.running("pod");
    let users = lab.exec("pod", "cat /proc/self/uid_map").unwrap();
    let users: Vec<&str> = users.split_whitespace().collect();
    assert!(
        users[0] == "0" && users[1] != "0",
        "the pod has no user namespace: {users:?}"
    );
    lab.exec("pod", "echo mine > /data/file").unwrap();
    let file = lab.on_disk(&lab.volume_of("data"), "file");
    // The mount is id-mapped: on the disk the owner is user 0, so that the next pod finds the same owner.
    assert_eq!(lab.nodes[0].sh(&format!("stat -c %u {file}")).unwrap(), "0\n");
    lab.delete("pod", "pod");
    lab.apply(&[apart()]);
    lab.running("pod");
    assert_eq!(lab.exec("pod", "cat /data/file").unwrap(), "mine\n");
    lab.delete_all(PATIENCE);
    lab.nothing_is_left();
    lab.install(&[]);
}

/// Whether the API server refuses a pod because it has no user namespace.
fn is_refused(lab: &Lab, pod: &Value) -> bool {
    let refusal = create_dry_run(lab, pod).err();
    refusal.is_some_and(|error| format!("{error:#}").contains("needs \"hostUsers: false\" in its spec"))
}

/// Creates an object in the test's namespace as a dry run.
fn create_dry_run(lab: &Lab, object: &Value) -> Result<String> {
    let args = ["create", "--dry-run=server", "-n", &lab.namespace, "-f", "-"];
    lab.kubectl().feed(&args, &object.to_string())
}
