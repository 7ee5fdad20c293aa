//! HostVolumes that go wrong: unreadable, deleted by hand, without PersistentVolume, on a pool that is gone.

use std::cell::RefCell;
use std::fs;

use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Process, needs};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::pair::{NODE, Pair, on_node, publish};

/// A volume with data, its node, and its controller.
struct Used {
    pair: Pair,
    node: RefCell<(Process, Client)>,
    controller: Client,
    volume: hostdir::csi::proto::Volume,
}

impl Used {
    /// A mounted volume with a file.
    fn new(namespace: &str, title: &str) -> Self {
        let mut pair = Pair::new(namespace, title);
        let mut node = pair.node().start();
        let controller = pair.start_controller();
        let mut request = on_node(&format!("pvc-{namespace}"));
        let claim = [("name", "data"), ("namespace", &pair.lab.namespace)];
        let claim = claim.map(|(key, value)| (format!("csi.storage.k8s.io/pvc/{key}"), value.to_owned()));
        request.parameters.extend(claim);
        let volume = controller.create_as(request).unwrap();
        let client = node.connect();
        let used = Self {
            pair,
            node: RefCell::new((node, client)),
            controller,
            volume,
        };
        used.publish().unwrap();
        fs::write(used.target().join("file"), "precious").unwrap();
        used.wait_for(|object| object["status"]["phase"] == "Ready", "is Ready");
        used
    }

    fn lab(&self) -> &Lab {
        &self.pair.lab
    }

    fn id(&self) -> &str {
        &self.volume.volume_id
    }

    fn target(&self) -> std::path::PathBuf {
        self.pair.scratch.path("target")
    }

    fn publish(&self) -> Result<(), tonic::Status> {
        publish(&self.node.borrow().1, &self.volume, &self.target())
    }

    fn unpublish(&self) {
        self.node.borrow().1.unpublish(self.id(), &self.target()).unwrap();
    }

    fn restart_node(&self) {
        self.node.borrow().0.signal(Signal::SIGKILL);
        self.node.borrow_mut().0.ended();
        let mut node = self.pair.node().start();
        let client = node.connect();
        self.node.replace((node, client));
    }

    fn data_is_there(&self) {
        let file = self.pair.scratch.path(&format!("pool/volumes/{}/data/file", self.id()));
        assert_eq!(fs::read_to_string(file).unwrap(), "precious");
    }

    fn object(&self) -> Value {
        self.lab().kubectl().get(&["hostvolume", self.id()]).unwrap()
    }

    fn uid(&self) -> String {
        self.object()["metadata"]["uid"].as_str().unwrap().to_owned()
    }

    fn wait_for(&self, condition: impl Fn(&Value) -> bool, what: &str) {
        self.lab().wait(&format!("the HostVolume {what}"), || {
            Ok(condition(&self.lab().kubectl().get(&["hostvolume", self.id()])?))
        });
    }

    fn annotate(&self, name: &str, value: &str) {
        let annotation = format!("hostdir.csi/{name}={value}");
        let args = ["annotate", "hostvolume", self.id(), &annotation];
        self.lab().kubectl().run(&args).unwrap();
    }

    fn has_event(&self, reason: &str) {
        self.lab().wait(&format!("there is an Event {reason}"), || {
            Ok(self.lab().kubectl().run(&["events", "-A"])?.contains(reason))
        });
    }

    /// Waits for a condition of the HostNode.
    fn node_condition(&self, type_: &str, status: &str) {
        self.lab().wait(&format!("the HostNode has {type_}={status}"), || {
            Ok(has_condition(
                &self.lab().kubectl().get(&["hostnode", NODE])?,
                type_,
                status,
            ))
        });
    }

    /// Deletes the volume through its controller.
    fn end(self) {
        self.lab().wait("the volume is deleted", || {
            Ok(self.controller.delete(&self.volume.volume_id).is_ok())
        });
        assert_eq!(names(self.pair.scratch.path("pool/volumes")), [""; 0]);
        drop(self.node);
        self.pair.end();
    }
}

pub(crate) fn has_condition(object: &Value, type_: &str, status: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    let is = |condition: &Value| condition["type"] == type_ && condition["status"] == status;
    conditions.into_iter().flatten().any(is)
}

#[needs(Root, Go, Cluster)]
fn a_hostvolume_that_is_deleted_by_hand_keeps_its_data_and_gets_it_back() {
    let used = Used::new("by-hand", "kubectl delete hostvolume, on live data");
    let kubectl = used.lab().kubectl();
    let delete = ["delete", "hostvolume", used.id(), "--wait=false"];
    let refusal = format!("{:#}", kubectl.run(&delete).unwrap_err());
    let uid = used.uid();
    assert!(refusal.contains(&format!("hostdir.csi/delete-data={uid}")), "{refusal}");
    // As if the definition were deleted, which no policy for HostVolumes sees.
    let binding = "validatingadmissionpolicybinding/hostdir-volumes";
    let kept = kubectl.get(&[binding]).unwrap();
    kubectl.run(&["delete", binding]).unwrap();
    used.lab().wait("the policy is no longer in force", || {
        Ok(kubectl
            .run(&["delete", "hostvolume", used.id(), "--dry-run=server"])
            .is_ok())
    });
    kubectl.run(&delete).unwrap();
    used.wait_for(
        |object| object["status"]["reason"] == "DataKept",
        "says that its data is kept",
    );
    used.has_event("DeleteWaits");
    used.has_event("PersistentVolumeClaim/data");
    used.unpublish();
    used.publish().expect("its pod can restart");
    used.data_is_there();
    // The HostVolume goes, and the data stays.
    used.annotate("leave-data", &uid);
    used.lab()
        .wait("the HostVolume is gone", || kubectl.is_gone(&["hostvolume", used.id()]));
    used.has_event("DataLeft");
    used.node_condition("UsedWithoutHostVolume", "True");
    let node = kubectl.get(&["hostnode", NODE]).unwrap();
    assert_eq!(node["status"]["orphanCount"], 0, "it is in use: {node}");
    used.unpublish();
    used.lab().wait("it is listed as an orphan", || {
        let node = kubectl.get(&["hostnode", NODE])?;
        let orphan = &node["status"]["orphans"][0];
        Ok(orphan["id"] == used.id() && orphan["uid"] == uid.as_str())
    });
    used.publish().expect("it can still be mounted");
    // A backup tool makes it anew, under another UID.
    let spec = json!({
        "node": NODE, "pool": "default", "name": used.id(), "capacity": "10Mi",
        "directory": {"mode": "0770", "uid": 0, "gid": 0},
    });
    let anew = json!({
        "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostVolume", "spec": spec,
        "metadata": {"name": used.id(), "finalizers": ["hostdir.csi/node"],
            "annotations": {"hostdir.csi/delete-data": uid}},
    });
    kubectl.apply(&anew.to_string()).unwrap();
    used.wait_for(
        |object| object["status"]["reason"] == "EarlierData",
        "says whose data there is",
    );
    used.annotate("adopt-data", &uid);
    used.wait_for(|object| object["status"]["phase"] == "Ready", "has adopted the data");
    used.has_event("DataAdopted");
    used.node_condition("UsedWithoutHostVolume", "False");
    used.unpublish();
    used.publish()
        .expect("its PersistentVolume names the earlier HostVolume");
    used.data_is_there();
    used.unpublish();
    let mut kept = kept;
    kept["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    kept["metadata"].as_object_mut().unwrap().remove("uid");
    kubectl.apply(&kept.to_string()).unwrap();
    used.end();
}

#[needs(Root, Go, Cluster)]
fn a_volume_on_a_pool_that_left_the_configuration_is_not_said_to_be_gone() {
    let mut pair = Pair::without_pools("removed", "a pool leaves the configuration");
    pair.set_pools(&[("default", 1), ("extra", 1)]);
    let mut node = pair.node().start();
    let controller = pair.start_controller();
    let create = || {
        let mut request = on_node("pvc-removed");
        request.parameters.insert("pool".into(), "extra".into());
        controller.create_as(request)
    };
    let volume = create().unwrap();
    let id = volume.volume_id.as_str();
    let target = pair.scratch.path("target");
    let client = node.connect();
    publish(&client, &volume, &target).unwrap();
    fs::write(target.join("file"), "precious").unwrap();
    client.unpublish(id, &target).unwrap();
    drop(node);
    pair.set_pools(&[("default", 1)]);
    let node = pair.node().start();
    let refusal = controller.delete(id).unwrap_err();
    assert!(
        refusal.message().contains("pool extra, which is not configured"),
        "{refusal:?}"
    );
    let file = pair.scratch.path(&format!("extra/volumes/{id}/data/file"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    // Somebody gives up the data.
    let kubectl = pair.lab.kubectl();
    let uid = kubectl.get(&["hostvolume", id]).unwrap()["metadata"]["uid"]
        .as_str()
        .unwrap()
        .to_owned();
    let annotation = format!("hostdir.csi/leave-data={uid}");
    kubectl.run(&["annotate", "hostvolume", id, &annotation]).unwrap();
    pair.lab.wait("the delete ends", || Ok(controller.delete(id).is_ok()));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    drop(node);
    pair.end();
}

#[needs(Root, Go, Cluster)]
fn a_delete_does_not_wait_for_a_dead_disk_that_somebody_gives_up() {
    let used = Used::new("dead-disk", "leave-data on a dead disk");
    used.unpublish();
    let (pool, gone) = (used.pair.scratch.path("pool"), used.pair.scratch.path("gone"));
    fs::rename(&pool, &gone).unwrap();
    let refusal = used.controller.delete(used.id()).unwrap_err();
    assert!(refusal.message().contains("pool default cannot be used"), "{refusal:?}");
    used.annotate("leave-data", &used.uid());
    used.lab()
        .wait("the delete ends", || Ok(used.controller.delete(used.id()).is_ok()));
    used.has_event("DataLeft");
    // The disk is back.
    fs::rename(&gone, &pool).unwrap();
    used.data_is_there();
    used.lab().wait("it is listed as an orphan", || {
        let node = used.lab().kubectl().get(&["hostnode", NODE])?;
        Ok(node["status"]["orphans"][0]["id"] == used.id())
    });
    fs::rename(pool.join("volumes").join(used.id()), gone).unwrap();
    used.end();
}

#[needs(Root, Go, Cluster)]
fn a_wrong_path_of_a_pool_does_not_mark_all_volumes_at_once() {
    const VOLUMES: usize = 30;
    let mut pair = Pair::new("wrong-path", "a pool is configured at a wrong path");
    let mut node = pair.node().start();
    let controller = pair.start_controller();
    let client = node.connect();
    let target = pair.scratch.path("target");
    let volumes: Vec<String> = (0..VOLUMES)
        .map(|number| {
            let volume = controller.create_as(on_node(&format!("pvc-{number}"))).unwrap();
            publish(&client, &volume, &target).unwrap();
            client.unpublish(&volume.volume_id, &target).unwrap();
            volume.volume_id
        })
        .collect();
    drop(node);
    let (pool, right) = (pair.scratch.path("pool"), pair.scratch.path("right"));
    fs::rename(&pool, &right).unwrap();
    let node = pair.node().start();
    pair.lab.wait("all volumes are Lost", || {
        Ok(node.log().matches("phase=\"Lost\"").count() == VOLUMES)
    });
    let log = node.log();
    let lost = log.lines().filter(|line| line.contains("phase=\"Lost\""));
    let times: Vec<jiff::Timestamp> = lost
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect();
    // The passes are four seconds apart.
    let took = times[VOLUMES - 1].duration_since(times[0]);
    assert!(took.as_secs() >= 2, "all of them within {took:?}");
    drop(node);
    fs::rename(&pool, pair.scratch.path("wrong")).unwrap();
    fs::rename(&right, &pool).unwrap();
    let node = pair.node().start();
    for id in volumes {
        pair.lab
            .wait("the volume is deleted", || Ok(controller.delete(&id).is_ok()));
    }
    drop(node);
    pair.end();
}

#[needs(Root, Go, Cluster)]
fn data_that_can_be_reached_is_deleted_although_it_may_be_left() {
    let used = Used::new("reachable", "leave-data on a healthy disk");
    used.annotate("leave-data", &used.uid());
    let refusal = used.controller.delete(used.id()).unwrap_err();
    assert!(refusal.message().contains("mounted"), "{refusal:?}");
    used.data_is_there();
    used.unpublish();
    used.end();
}

#[needs(Root, Go, Cluster)]
fn a_finalizer_of_somebody_else_keeps_nobody_busy() {
    let used = Used::new("foreign", "a HostVolume with a finalizer of somebody else");
    let kubectl = used.lab().kubectl();
    let finalizers = |finalizers: &Value| {
        let patch = json!({"metadata": {"finalizers": finalizers}}).to_string();
        kubectl
            .run(&["patch", "hostvolume", used.id(), "--type=merge", "-p", &patch])
            .unwrap();
    };
    finalizers(&json!(["hostdir.csi/node", "example.org/other"]));
    used.unpublish();
    let refusal = used.controller.delete(used.id()).unwrap_err();
    assert_eq!(refusal.code(), tonic::Code::Unavailable, "{refusal}");
    used.wait_for(
        |object| object["metadata"]["finalizers"] == json!(["example.org/other"]),
        "has no finalizer of hostdir",
    );
    assert_eq!(names(used.pair.scratch.path("pool/volumes")), [""; 0]);
    let version = || used.object()["metadata"]["resourceVersion"].clone();
    let before = version();
    let refusal = used.controller.delete(used.id()).unwrap_err();
    assert_eq!(refusal.code(), tonic::Code::Unavailable, "{refusal}");
    assert_eq!(version(), before, "somebody writes it again and again");
    assert_eq!(used.node.borrow().0.log().matches("finalizer removed").count(), 1);
    finalizers(&json!([]));
    used.end();
}

#[needs(Root, Go, Cluster)]
fn a_volume_whose_persistent_volume_is_gone_is_shown() {
    let used = Used::new("released", "a PersistentVolume is gone");
    // It never had one.
    used.wait_for(
        |object| has_condition(object, "PersistentVolumeGone", "True"),
        "is marked",
    );
    used.has_event("PersistentVolumeGone");
    let pv = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": used.id()},
        "spec": {
            "capacity": {"storage": "10Mi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "csi": {"driver": "hostdir.csi", "volumeHandle": used.id()},
        },
    });
    let kubectl = used.lab().kubectl();
    kubectl.apply(&pv.to_string()).unwrap();
    used.wait_for(
        |object| has_condition(object, "PersistentVolumeGone", "False"),
        "is not marked any more",
    );
    kubectl.run(&["delete", "pv", used.id()]).unwrap();
    used.unpublish();
    used.end();
}

/// Takes the limits out of a schema that this and later versions check, until this is dropped: as an object that was written when
/// the schema was another one.
struct WithoutLimits<'a>(&'a Lab, String);

impl<'a> WithoutLimits<'a> {
    fn new(lab: &'a Lab) -> Self {
        let crds = hostdir_lab::prove::root().join("deploy/chart/files/crds.yaml");
        let whole = fs::read_to_string(crds).unwrap();
        let schema = "/spec/versions/0/schema/openAPIV3Schema/properties";
        let loosen = json!([
            {"op": "remove", "path": format!("{schema}/spec/properties/directory/properties/uid/maximum")},
            {"op": "remove", "path": format!("{schema}/status/properties/phase/enum")},
        ]);
        let args = ["patch", "crd", "hostvolumes.hostdir.csi", "--type=json", "-p"];
        lab.kubectl()
            .run(&[&args[..], &[&loosen.to_string()]].concat())
            .unwrap();
        let loosen = json!([{"op": "remove", "path": format!("{schema}/status/properties/orphanCount/maximum")}]);
        let args = ["patch", "crd", "hostnodes.hostdir.csi", "--type=json", "-p"];
        lab.kubectl()
            .run(&[&args[..], &[&loosen.to_string()]].concat())
            .unwrap();
        Self(lab, whole)
    }
}

impl Drop for WithoutLimits<'_> {
    fn drop(&mut self) {
        let args = ["replace", "-f", "-"];
        if let Err(error) = self.0.kubectl().feed(&args, &self.1) {
            crate::lab::report(&format!("{error:#}"));
        }
    }
}

#[needs(Root, Go, Cluster)]
fn an_object_that_cannot_be_read_stops_nobody() {
    let used = Used::new("unreadable", "objects that cannot be read");
    let lab = used.lab();
    let kubectl = lab.kubectl();
    let bad_count = r#"{"status":{"version":"0","orphanCount":4294967296}}"#;
    let patch = |kind: &str, name: &str, patch: &str| {
        kubectl.run(&["patch", kind, name, "--subresource=status", "--type=merge", "-p", patch])
    };
    let refusal = format!("{:#}", patch("hostnode", NODE, bad_count).unwrap_err());
    assert!(refusal.contains("orphanCount"), "the schema has no limit: {refusal}");
    let loose = WithoutLimits::new(lab);
    let by_hand = json!({
        "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostVolume", "metadata": {"name": "bad"},
        "spec": {
            "node": NODE, "pool": "default", "name": "bad", "capacity": "1Gi",
            "directory": {"mode": "0770", "uid": 4_294_967_296_u64, "gid": 0},
        },
    });
    lab.wait("the schema has no limits", || {
        Ok(kubectl.apply(&by_hand.to_string()).is_ok())
    });
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "other"}});
    let host_node = json!({
        "apiVersion": "hostdir.csi/v1alpha1", "kind": "HostNode", "metadata": {"name": "other"}, "spec": {},
    });
    kubectl.apply(&format!("{node}\n---\n{host_node}")).unwrap();
    lab.wait("a HostNode has a bad number", || {
        Ok(patch("hostnode", "other", bad_count).is_ok())
    });
    patch("hostvolume", used.id(), r#"{"status":{"phase":"Moving"}}"#).unwrap();
    // The real controllers begin anew, and so does the node: lists come first.
    kubectl
        .run(&["rollout", "restart", "deployment/hostdir-controller", "-n", NAMESPACE])
        .unwrap();
    let wait = [
        "rollout",
        "status",
        "deployment/hostdir-controller",
        "-n",
        NAMESPACE,
        "--timeout=180s",
    ];
    kubectl.run(&wait).expect("controllers become ready");
    let mut wanted: Vec<String> = [("HostVolume", "bad"), ("HostVolume", used.id()), ("HostNode", "other")]
        .map(|(kind, name)| format!("hostdir_object_unreadable{{kind=\"{kind}\",name=\"{name}\"}} 1"))
        .into();
    // What cannot be read has room all the same.
    let bytes = (1_u64 << 30) + (1 << 20);
    wanted.push(format!(
        "hostdir_pool_promised_bytes{{node=\"{NODE}\",pool=\"default\"}} {bytes}"
    ));
    lab.wait("a controller shows what it cannot read", || {
        let controllers = lab.live_controllers();
        let Some(controller) = controllers.first() else {
            return Ok(false);
        };
        let metrics = lab.http(controller, "metrics")?;
        Ok(wanted.iter().all(|line| metrics.contains(line)))
    });
    used.unpublish();
    used.restart_node();
    used.publish().expect("its data is there, whatever its phase");
    used.unpublish();
    let node = kubectl.get(&["hostnode", NODE]).unwrap();
    assert_eq!(node["status"]["orphanCount"], 0, "{node}");
    patch("hostvolume", used.id(), r#"{"status":{"phase":"Ready"}}"#).unwrap();
    kubectl.run(&["delete", "node,hostnode", "other"]).unwrap();
    let bad = kubectl.get(&["hostvolume", "bad"]).unwrap();
    let allow = format!("hostdir.csi/delete-data={}", bad["metadata"]["uid"].as_str().unwrap());
    kubectl.run(&["annotate", "hostvolume", "bad", &allow]).unwrap();
    kubectl.run(&["delete", "hostvolume", "bad"]).unwrap();
    drop(loose);
    used.end();
}
