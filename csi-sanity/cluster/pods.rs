//! What pods can rely on: persistent data, access modes, mount options, reclaim policies.

use serde_json::json;

use crate::lab::{PATIENCE, lab};
use crate::mode::{Mode, in_both_modes};
use crate::objects::{claim_of, class, on_node, pod, stateful_set, with, with_mount};

in_both_modes![
    data_survives_pods_drivers_kubelets_and_power_cuts,
    the_pods_of_a_stateful_set_return_to_their_nodes,
    pods_share_volumes_as_access_modes_and_mount_options_say,
    delete_frees_the_space_and_retain_keeps_the_data,
];

fn data_survives_pods_drivers_kubelets_and_power_cuts(mode: Mode) {
    let mut lab = lab(
        mode,
        "data-stays",
        "1. data survives a new pod, driver, kubelet, power cut",
    );
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    lab.exec("pod", "echo precious > /data/file").unwrap();
    let check = |lab: &crate::lab::Lab, after: &str| {
        let read = lab
            .exec("pod", "cat /data/file")
            .unwrap_or_else(|error| panic!("after {after}: {error:#}"));
        assert_eq!(read, "precious\n", "after {after}");
    };

    lab.delete("pod", "pod");
    lab.apply(&[on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    check(&lab, "a new pod");

    let restarts = lab.restarts_of_driver("node-1");
    lab.kill_driver(0);
    lab.wait("the driver is back", || Ok(lab.restarts_of_driver("node-1") > restarts));
    check(&lab, "a new driver");
    lab.delete("pod", "pod");
    lab.apply(&[on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    check(&lab, "a new driver and a new pod");

    lab.nodes[0].kill_kubelet().unwrap();
    check_mounted(&lab);
    lab.nodes[0].start_kubelet().unwrap();
    lab.delete("pod", "pod");
    lab.apply(&[on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    check(&lab, "a new kubelet and a new pod");

    let before = lab.get("pod", "pod").unwrap()["status"]["containerStatuses"][0]["containerID"].clone();
    lab.nodes[0].cut_power().unwrap();
    lab.power_on(0).unwrap();
    lab.wait("the pod runs again", || {
        let status = lab.get("pod", "pod")?["status"]["containerStatuses"][0].clone();
        Ok(status["containerID"] != before && status["ready"] == true)
    });
    check(&lab, "a power cut");
    lab.delete("pod", "pod");
    lab.delete("pvc", "data");
    lab.nothing_is_left();
}

fn check_mounted(lab: &crate::lab::Lab) {
    assert_eq!(lab.mounts(), 1, "the volume is not mounted without the kubelet");
}

fn the_pods_of_a_stateful_set_return_to_their_nodes(mode: Mode) {
    let lab = lab(
        mode,
        "stateful",
        "2. StatefulSet: one volume per node, pods return to theirs",
    );
    lab.apply(&[stateful_set("set", 3, &lab.claim("data", "10Mi"))]);
    let name = |number: usize| format!("set-{number}");
    // The claim template is named `data`, like the volume that the pods mount at /data.
    let nodes: Vec<String> = (0..3).map(|number| lab.running(&name(number))).collect();
    let mut sorted = nodes.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, ["node-1", "node-2", "node-3"]);
    for number in 0..3 {
        lab.exec(&name(number), &format!("echo {number} > /data/file")).unwrap();
    }
    let args = ["delete", "pods", "-n", &lab.namespace, "-l", "app=set", "--wait"];
    lab.kubectl().run(&args).unwrap();
    for (number, node) in nodes.iter().enumerate() {
        assert_eq!(lab.running(&name(number)), *node, "set-{number} went to another node");
        assert_eq!(
            lab.exec(&name(number), "cat /data/file").unwrap(),
            format!("{number}\n")
        );
    }
    lab.delete("statefulset", "set");
    lab.wait("the claims are deleted with the StatefulSet", || {
        Ok(lab.kubectl().list(&["pvc", "-n", &lab.namespace])?.is_empty())
    });
    lab.nothing_is_left();
}

fn pods_share_volumes_as_access_modes_and_mount_options_say(mode: Mode) {
    let lab = lab(
        mode,
        "sharing",
        "3. fsGroup, read-only, RWOP, shared RWO, subPath, options",
    );
    let not_root = json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000, "runAsNonRoot": true});
    let reader = with_mount(on_node(pod("reader", "data"), "node-1"), "readOnly", json!(true));
    let sub = with_mount(on_node(pod("sub", "data"), "node-1"), "subPath", json!("below/here"));
    lab.apply(&[
        lab.claim("data", "10Mi"),
        on_node(with(pod("writer", "data"), "securityContext", not_root), "node-1"),
    ]);
    lab.running("writer");
    lab.exec(
        "writer",
        "test $(id -u) = 1000; echo mine > /data/file; test $(stat -c %g /data/file) = 2000",
    )
    .unwrap();

    // Two more pods on the node share the volume: one read-only, one a subPath of it.
    lab.apply(&[reader, sub]);
    lab.running("reader");
    assert_eq!(lab.exec("reader", "cat /data/file").unwrap(), "mine\n");
    let refused = lab.exec("reader", "echo no > /data/file").unwrap_err();
    assert!(format!("{refused:#}").contains("Read-only"), "{refused:#}");
    lab.running("sub");
    lab.exec("sub", "echo part > /data/file").unwrap();
    assert_eq!(lab.exec("writer", "cat /data/below/here/file").unwrap(), "part\n");

    // ReadWriteOncePod: the second pod waits until the first is gone.
    lab.apply(&[
        claim_of("alone", "10Mi", lab.mode.release(), "ReadWriteOncePod"),
        on_node(pod("first", "alone"), "node-1"),
    ]);
    lab.running("first");
    lab.apply(&[on_node(pod("second", "alone"), "node-1")]);
    lab.described("pod", "second", "ReadWriteOncePod");
    lab.delete("pod", "first");
    lab.running("second");

    // Mount options of a StorageClass.
    lab.apply(&[class(
        lab.mode.driver(),
        "careful",
        &json!({}),
        "Delete",
        &["nosuid", "nodev", "noexec", "noatime"],
    )]);
    lab.apply(&[
        claim_of("options", "10Mi", "careful", "ReadWriteOnce"),
        on_node(pod("options", "options"), "node-1"),
    ]);
    lab.running("options");
    let volume = lab.volume_of("options");
    let mounts = lab.nodes[0]
        .sh(&format!(
            "grep '/volumes/{volume}/data /var/lib/kubelet' /proc/self/mountinfo"
        ))
        .unwrap();
    for option in ["nosuid", "nodev", "noexec", "noatime"] {
        assert!(mounts.contains(option), "{option} is not in {mounts}");
    }
    // runc mounts the volume again in the container, and keeps only noatime of these options.
    assert!(
        lab.exec("options", "mount")
            .unwrap()
            .lines()
            .any(|line| line.contains(" /data ") && line.contains("noatime"))
    );
    lab.delete_all(PATIENCE);
    lab.kubectl().run(&["delete", "storageclass", "careful"]).unwrap();
    lab.nothing_is_left();
}

fn delete_frees_the_space_and_retain_keeps_the_data(mode: Mode) {
    let lab = lab(mode, "reclaim", "4. Delete frees the space, Retain keeps the data");
    lab.wait("capacity is published", || {
        Ok(lab.capacity(mode.release(), "node-1")? > 0)
    });
    let before = lab.capacity(mode.release(), "node-1").unwrap();
    // The disk has other users, too, who take and free some GiB meanwhile.
    lab.apply(&[lab.claim("data", "10Gi"), on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    lab.wait("the capacity is lower", || {
        Ok(lab.capacity(mode.release(), "node-1")? + (5 << 30) < before)
    });
    lab.delete("pod", "pod");
    lab.delete("pvc", "data");
    lab.nothing_is_left();
    lab.wait("the capacity is back", || {
        Ok(lab.capacity(mode.release(), "node-1")? + (4 << 30) > before)
    });

    // Retain: the data stays, and a new claim for the volume gets it back, as deploy/README.md says.
    lab.apply(&[class(lab.mode.driver(), "kept", &json!({}), "Retain", &[])]);
    lab.apply(&[
        claim_of("kept", "10Mi", "kept", "ReadWriteOnce"),
        on_node(pod("pod", "kept"), "node-1"),
    ]);
    lab.running("pod");
    lab.exec("pod", "echo kept > /data/file").unwrap();
    let volume = lab.volume_of("kept");
    lab.delete("pod", "pod");
    lab.delete("pvc", "kept");
    lab.wait("the volume is released", || {
        Ok(lab.kubectl().get(&["pv", &volume])?["status"]["phase"] == "Released")
    });
    assert_eq!(
        lab.nodes[0]
            .sh(&format!("cat {}", lab.on_disk(&volume, "file")))
            .unwrap(),
        "kept\n"
    );
    lab.kubectl()
        .run(&[
            "patch",
            "pv",
            &volume,
            "--type=json",
            "-p",
            r#"[{"op":"remove","path":"/spec/claimRef"}]"#,
        ])
        .unwrap();
    let mut again = claim_of("again", "10Mi", "kept", "ReadWriteOnce");
    again["spec"]["volumeName"] = volume.clone().into();
    lab.apply(&[again, pod("pod", "again")]);
    assert_eq!(lab.running("pod"), "node-1");
    assert_eq!(lab.exec("pod", "cat /data/file").unwrap(), "kept\n");
    lab.kubectl()
        .run(&[
            "patch",
            "pv",
            &volume,
            "-p",
            r#"{"spec":{"persistentVolumeReclaimPolicy":"Delete"}}"#,
        ])
        .unwrap();
    lab.delete("pod", "pod");
    lab.delete("pvc", "again");
    lab.kubectl().run(&["delete", "storageclass", "kept"]).unwrap();
    lab.nothing_is_left();
}
