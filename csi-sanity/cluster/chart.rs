//! The chart in a cluster: a real API server accepts the plain manifests, and the service account has no superfluous rights.

use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::prove::root;

use crate::lab::{PATIENCE, lab};
use crate::mode::Mode;
use crate::objects::pod;
use hostdir_lab::needs;

/// Installs hostdir by the commands at the top of deploy/hostdir.yaml instead of by Helm.
#[needs(Root, Go, Cluster)]
fn the_plain_manifests_install_hostdir() {
    let lab = lab(Mode::Elected, "manifests", "hostdir installed from the plain manifests");
    let (definitions, manifests) = ("deploy/chart/files/crds.yaml", "deploy/hostdir.yaml");
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let kubectl = lab.kubectl();
    lab.helm(&["uninstall", Mode::Elected.release(), "--namespace", NAMESPACE, "--wait"])
        .unwrap();
    // The guards outlive the release, as the definitions do.
    for kept in ["hostdir-definitions", "hostdir-volumes"] {
        for kind in ["validatingadmissionpolicy", "validatingadmissionpolicybinding"] {
            kubectl.get(&[kind, kept]).expect("it is kept");
        }
    }
    let slip = kubectl.run(&["delete", "crd", "hostvolumes.hostdir.csi", "--dry-run=server"]);
    assert!(format!("{:#}", slip.unwrap_err()).contains("the data of every volume"));
    let apply = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--validate=strict",
        "-f",
        "-",
    ];
    kubectl.feed(&apply, &read(definitions)).unwrap();
    kubectl.feed(&apply, &read(manifests)).unwrap();
    for workload in ["daemonset/hostdir", "deployment/hostdir-controller"] {
        kubectl
            .run(&["rollout", "status", workload, "-n", NAMESPACE, "--timeout=180s"])
            .unwrap();
    }
    lab.apply(&[lab.claim("data", "10Mi"), pod("pod", "data")]);
    lab.running("pod");
    lab.exec("pod", "echo written > /data/file").unwrap();
    lab.delete_all(PATIENCE);
    lab.nothing_is_left();
    kubectl
        .feed(&["delete", "--wait", "--timeout=180s", "-f", "-"], &read(manifests))
        .unwrap();
    lab.install(&[]);
}

#[needs(Root, Go, Cluster)]
fn the_sidecar_has_only_the_rights_it_needs() {
    let lab = lab(Mode::Local, "rbac", "least privilege of the service account");
    let account = format!("system:serviceaccount:{NAMESPACE}:hostdir-local");
    let may = |args: &[&str]| {
        let args = [&["auth", "can-i", "--as", &account], args].concat();
        lab.kubectl().run(&args).is_ok_and(|answer| answer.trim() == "yes")
    };
    assert!(may(&["create", "persistentvolumes"]) && may(&["list", "persistentvolumeclaims", "-A"]));
    for forbidden in [
        &["get", "secrets", "-A"][..],
        &["create", "pods", "-A"],
        &["create", "pods/exec", "-A"],
        &["list", "nodes"],
        &["update", "nodes"],
        &["delete", "persistentvolumeclaims", "-A"],
        &["list", "pods", "-A"],
        &["create", "serviceaccounts/token", "-A"],
        &["create", "clusterrolebindings"],
        &["impersonate", "users"],
        &["delete", "csistoragecapacities", "-n", "default"],
    ] {
        assert!(!may(forbidden), "the service account may {}", forbidden.join(" "));
    }
}
