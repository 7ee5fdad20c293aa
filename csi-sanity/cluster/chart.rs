//! The chart in a cluster: a real API server takes it, and its service accounts have no rights to spare.

use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::prove::root;

use crate::lab::{Mode, lab};
use hostdir_lab::needs;

#[needs(Root, Go, Cluster)]
fn an_api_server_takes_the_plain_manifests() {
    let lab = lab(Mode::Elected, "dry-run", "server-side dry run of the plain manifests");
    let manifests = std::fs::read_to_string(root().join("deploy/hostdir.yaml")).unwrap();
    let args = [
        "apply",
        "--server-side",
        "--dry-run=server",
        "--force-conflicts",
        "--validate=strict",
        "-f",
        "-",
    ];
    lab.kubectl().feed(&args, &manifests).unwrap();
}

#[needs(Root, Go, Cluster)]
fn the_sidecar_may_do_what_it_needs_and_no_more() {
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
        assert!(!may(forbidden), "it may {}", forbidden.join(" "));
    }
}
