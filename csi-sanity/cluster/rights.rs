//! Who may do what: tokens of nodes and controllers, tried against the real roles and admission policies.

use crate::lab::{Lab, lab};
use crate::mode::Mode;
use crate::objects::{on_node, pod};
use hostdir::k8s::api::{HostNode, HostVolume};
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::needs;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// A token of a service account, bound to a pod if one is named.
pub(crate) fn token(lab: &Lab, account: &str, pod: Option<&str>) -> String {
    let mut args = vec!["create", "token", account, "-n", NAMESPACE];
    if let Some(pod) = pod {
        args.extend(["--bound-object-kind=Pod", "--bound-object-name", pod]);
    }
    lab.kubectl().run(&args).unwrap().trim().to_owned()
}

/// Runs kubectl with a token as its only credentials.
fn with_token(lab: &Lab, token: &str, args: &[&str]) -> anyhow::Result<String> {
    let token = format!("--token={token}");
    let who = [
        "--kubeconfig=/dev/null",
        "--server=https://10.42.0.1:443",
        "--insecure-skip-tls-verify",
        &token,
    ];
    lab.kubectl().run(&[&who[..], args].concat())
}

/// A client with a token. kubectl cannot be used for nodes: it reads an object before it patches it, which nodes may not.
pub(crate) struct Holder {
    client: kube::Client,
    runtime: tokio::runtime::Runtime,
}

impl Holder {
    pub(crate) fn of(token: String) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut config = kube::Config::new("https://10.42.0.1:443".parse().unwrap());
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(token.into());
        let client = runtime.block_on(async { kube::Client::try_from(config).unwrap() });
        Self { client, runtime }
    }

    fn patch_volume(&self, name: &str, status: bool, patch: &Value) -> kube::Result<()> {
        let volumes: Api<HostVolume> = Api::all(self.client.clone());
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        self.runtime.block_on(async {
            let patched = if status {
                volumes.patch_status(name, &params, &patch).await
            } else {
                volumes.patch(name, &params, &patch).await
            };
            patched.map(drop)
        })
    }

    pub(crate) fn put_lease(&self, lease: &Lease) -> kube::Result<()> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), NAMESPACE);
        let name = lease.metadata.name.as_deref().unwrap_or_default();
        let params = PostParams::default();
        let put = leases.replace(name, &params, lease);
        self.runtime.block_on(put).map(drop)
    }

    pub(crate) fn create_lease(&self, lease: &Lease) -> kube::Result<()> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), NAMESPACE);
        let params = PostParams::default();
        self.runtime.block_on(leases.create(&params, lease)).map(drop)
    }

    fn patch_node(&self, name: &str, patch: &Value) -> kube::Result<()> {
        let nodes: Api<HostNode> = Api::all(self.client.clone());
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        self.runtime
            .block_on(nodes.patch_status(name, &params, &patch))
            .map(drop)
    }
}

#[needs(Root, Go, Cluster)]
fn nodes_and_controllers_have_only_the_rights_they_need() {
    let lab = lab(Mode::Elected, "privileges", "least privilege of controllers and nodes");
    lab.join_network().unwrap();
    for (name, node) in [("one", "node-1"), ("two", "node-2")] {
        lab.apply(&[lab.claim(name, "10Mi"), on_node(pod(name, name), node)]);
    }
    lab.running("one");
    lab.running("two");
    let (own, other) = (lab.volume_of("one"), lab.volume_of("two"));
    let driver = lab.driver_on("node-1")["metadata"]["name"].as_str().unwrap().to_owned();
    let bound = token(&lab, "hostdir-node", Some(&driver));
    let node = Holder::of(bound.clone());
    let unbound = Holder::of(token(&lab, "hostdir-node", None));
    let said = |message: Value| json!({"status": {"message": message}});
    node.patch_volume(&own, true, &said("tried".into()))
        .expect("a node may change the status of its own volume");
    node.patch_volume(&own, true, &said(Value::Null)).unwrap();
    node.patch_node("node-1", &json!({"status": {"version": "0.1.0"}}))
        .expect("a node may change its own HostNode");
    let finalizers = json!({"metadata": {"finalizers": null}});
    let more = json!({"spec": {"capacity": "1Ti"}});
    for (what, refused) in [
        (
            "the status of another's volume",
            node.patch_volume(&other, true, &said("tried".into())),
        ),
        ("another's finalizer", node.patch_volume(&other, false, &finalizers)),
        (
            "another's HostNode",
            node.patch_node("node-2", &json!({"status": {"pools": []}})),
        ),
        ("the spec of a volume", node.patch_volume(&own, false, &more)),
        (
            "with an unbound token",
            unbound.patch_volume(&own, true, &said("tried".into())),
        ),
    ] {
        let error = refused.expect_err(what).to_string();
        assert!(
            error.contains("a node may") || error.contains("names a node"),
            "{what}: {error}"
        );
    }
    let message = r#"{"status":{"message":"tried"}}"#;
    let node = bound;
    let controller = token(&lab, "hostdir-controller", None);
    for (token, forbidden) in [
        (&node, &["delete", "hostvolume", own.as_str()][..]),
        (&node, &["delete", "hostnode", "node-2"]),
        (&node, &["get", "secrets", "-A"]),
        (&node, &["get", "pods", "-A"]),
        (&node, &["get", "pv"]),
        (&controller, &["get", "secrets", "-A"]),
        (&controller, &["get", "pods", "-A"]),
        (&controller, &["delete", "lease", "hostdir-csi", "-n", NAMESPACE]),
        (&controller, &["label", "node", "node-1", "a=b"]),
        (&controller, &["delete", "node", "node-1"]),
        (&controller, &["delete", "pvc", "one", "-n", lab.namespace.as_str()]),
        (
            &controller,
            &["exec", "-n", lab.namespace.as_str(), "one", "--", "true"],
        ),
        (
            &controller,
            &[
                "patch",
                "hostnode",
                "node-1",
                "--subresource=status",
                "--type=merge",
                "-p",
                message,
            ],
        ),
    ] {
        let error = with_token(&lab, token, forbidden).expect_err(&forbidden.join(" "));
        assert!(format!("{error:#}").contains("orbidden"), "{forbidden:?}: {error:#}");
    }
    // Not even an administrator can change an immutable field.
    let administrator = lab.kubectl().run(&[
        "patch",
        "hostvolume",
        &own,
        "--type=merge",
        "-p",
        r#"{"spec":{"node":"node-3"}}"#,
    ]);
    assert!(format!("{:#}", administrator.unwrap_err()).contains("never change"));
    // Nobody can delete the definition, and with it all volumes, by accident.
    let slip = lab
        .kubectl()
        .run(&["delete", "crd", "hostvolumes.hostdir.csi", "--dry-run=server"]);
    assert!(format!("{:#}", slip.unwrap_err()).contains("the data of every volume"));
    for name in ["one", "two"] {
        lab.delete("pod", name);
        lab.delete("pvc", name);
    }
    lab.nothing_is_left();
}

/// In local mode, each node writes the PersistentVolumes of its own volumes.
#[needs(Root, Go, Cluster)]
fn a_node_of_local_mode_cannot_touch_the_volumes_of_others() {
    let lab = lab(Mode::Local, "own", "PersistentVolumes of other nodes and other drivers");
    lab.join_network().unwrap();
    for (name, node) in [("one", "node-1"), ("two", "node-2")] {
        lab.apply(&[lab.claim(name, "10Mi"), on_node(pod(name, name), node)]);
    }
    lab.running("one");
    lab.running("two");
    let (own, other) = (lab.volume_of("one"), lab.volume_of("two"));
    let foreign = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "foreign"},
        "spec": {
            "capacity": {"storage": "1Mi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "none",
            "csi": {"driver": "example.org", "volumeHandle": "x"},
        },
    });
    lab.kubectl().apply(&foreign.to_string()).unwrap();
    let driver = lab.driver_on("node-1")["metadata"]["name"].as_str().unwrap().to_owned();
    let bound = token(&lab, "hostdir-local", Some(&driver));
    let unbound = token(&lab, "hostdir-local", None);
    let label = |token: &str, name: &str| {
        let patch = r#"{"metadata":{"labels":{"tried":"yes"}}}"#;
        with_token(&lab, token, &["patch", "pv", name, "--type=merge", "-p", patch])
    };
    label(&bound, &own).expect("its own volume");
    for (what, refused) in [
        ("another's volume", label(&bound, &other)),
        ("another driver's volume", label(&bound, "foreign")),
        ("with an unbound token", label(&unbound, &own)),
        (
            "a delete of another's",
            with_token(&lab, &bound, &["delete", "pv", &other, "--wait=false"]),
        ),
    ] {
        let error = format!("{:#}", refused.expect_err(what));
        assert!(error.contains("may write"), "{what}: {error}");
    }
    lab.kubectl().run(&["delete", "pv", "foreign"]).unwrap();
    lab.delete_all(crate::lab::PATIENCE);
    lab.nothing_is_left();
}

#[needs(Root, Go, Cluster)]
fn health_and_metrics_are_served_over_http() {
    let lab = lab(Mode::Elected, "watched", "health and metrics over HTTP");
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), "node-2")]);
    lab.running("pod");
    let controllers = lab.live_controllers();
    assert!(!controllers.is_empty());
    for controller in controllers {
        assert_eq!(lab.http(&controller, "healthz").unwrap(), "ok\n");
        assert_eq!(lab.http(&controller, "readyz").unwrap(), "ok\n");
        lab.metrics_have(
            &controller,
            &[
                "hostdir_volumes{phase=\"Ready\"} 1",
                "hostdir_pool_promised_bytes{node=\"node-2\",pool=\"default\"} 10485760",
            ],
        );
    }
    // The pass that the last test's volumes ended may be to come.
    lab.metrics_have(
        &lab.driver_on("node-2"),
        &[
            "hostdir_csi_call_duration_seconds_count{method=\"NodePublishVolume\",code=\"Ok\"}",
            "hostdir_deletes_pending 0",
            "hostdir_orphans 0",
        ],
    );
    lab.delete("pod", "pod");
    lab.delete("pvc", "data");
    lab.nothing_is_left();
}
