//! What only elected mode promises: any number of leaders, nodes that vanish, disks that are not what they were.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hostdir::k8s::api::{HostNode, HostVolume};
use hostdir_lab::cluster::NAMESPACE;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::lab::{Lab, Mode, PATIENCE, lab, report};
use crate::objects::{claim_of, class, on_node, pod};
use crate::scale::many;
use hostdir_lab::{SetOnDrop, needs};

/// Another node than that of the leader, by number.
fn node_without_leader(lab: &Lab) -> (usize, String) {
    let mut leader = None;
    lab.wait("somebody leads", || {
        leader = lab.leader();
        Ok(leader.is_some())
    });
    let (_, leader) = leader.unwrap();
    let other = (0..3).find(|number| lab.nodes[*number].name != leader).unwrap();
    (other, lab.nodes[other].name.clone())
}

#[needs(Root, Go, Cluster)]
fn scenario_1_controllers_touch_no_host_and_volumes_are_where_pods_are() {
    let lab = lab(
        Mode::Elected,
        "apart",
        "1. the leader is on another node and touches no host",
    );
    for controller in lab.controllers() {
        let spec = &controller["spec"];
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
        assert!(spec["hostNetwork"].is_null(), "on the host's network");
        for volume in spec["volumes"].as_array().unwrap() {
            assert!(volume["hostPath"].is_null(), "a controller has a host path: {volume}");
        }
        for container in spec["containers"].as_array().unwrap() {
            let context = &container["securityContext"];
            assert!(context["privileged"].is_null(), "a controller is privileged");
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
        }
    }
    let (number, node) = node_without_leader(&lab);
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), &node)]);
    assert_eq!(lab.running("pod"), node);
    let volume = lab.volume_of("data");
    assert!(lab.is_on_node(number, &volume));
    let object = lab.kubectl().get(&["hostvolume", &volume]).unwrap();
    assert_eq!(object["spec"]["node"], node.as_str());
    assert_eq!(object["status"]["phase"], "Ready");
    assert_eq!(object["spec"]["claim"]["name"], "data");
    lab.delete("pod", "pod");
    let start = Instant::now();
    lab.delete("pvc", "data");
    lab.wait("the directory is gone", || Ok(!lab.is_on_node(number, &volume)));
    report(&format!("deleted and erased in {:.1?}", start.elapsed()));
    lab.nothing_is_left();
}

#[needs(Root, Go, Cluster)]
fn many_claims_while_controllers_are_killed() {
    let title = "100 claims while controllers are killed one by one";
    let lab = lab(Mode::Elected, "killed", title);
    // Long enough for both, the making and the deleting, and then it has to end well.
    let (killed, start) = (Mutex::new(BTreeSet::new()), Instant::now());
    many(&lab, 100, None, || {
        let controllers = lab.controllers();
        if start.elapsed() > Duration::from_secs(80) || controllers.is_empty() {
            return;
        }
        let kill = killed.lock().unwrap().len();
        let pod = &controllers[kill % controllers.len()];
        let name = pod["metadata"]["name"].as_str().unwrap();
        let args = [
            "delete",
            "pod",
            name,
            "-n",
            NAMESPACE,
            "--wait=false",
            "--grace-period=0",
            "--force",
        ];
        // It may be gone already: then it is not counted.
        if lab.kubectl().run(&args).is_ok() {
            killed
                .lock()
                .unwrap()
                .insert(pod["metadata"]["uid"].as_str().unwrap().to_owned());
        }
        std::thread::sleep(Duration::from_secs(2));
    });
    let killed = killed.into_inner().unwrap().len();
    report(&format!("{killed} controllers were killed"));
    assert!(killed >= 10, "only {killed} controllers were killed");
    lab.install(&[]);
}

/// Three controllers that all act at once, with drivers that are stopped most of the time, while this is held.
struct Anarchy<'a> {
    lab: &'a Lab,
    args: Value,
}

impl<'a> Anarchy<'a> {
    fn begin(lab: &'a Lab) -> Self {
        let get = ["deployment", "hostdir-controller", "-n", NAMESPACE];
        let deployment = lab.kubectl().get(&get).unwrap();
        let containers = deployment["spec"]["template"]["spec"]["containers"].as_array().unwrap();
        let provisioner = containers
            .iter()
            .position(|one| one["name"] == "csi-provisioner")
            .unwrap();
        assert_eq!(provisioner, 1);
        let args = containers[provisioner]["args"].clone();
        let without: Vec<&Value> = args
            .as_array()
            .unwrap()
            .iter()
            .filter(|arg| !arg.as_str().unwrap().starts_with("--leader-election"))
            .collect();
        let anarchy = Self {
            lab,
            args: args.clone(),
        };
        anarchy.patch(3, &json!(without));
        anarchy
    }

    fn patch(&self, replicas: usize, args: &Value) {
        let patch = json!([
            {"op": "replace", "path": "/spec/replicas", "value": replicas},
            {"op": "replace", "path": "/spec/template/spec/containers/1/args", "value": args},
        ]);
        let patch = patch.to_string();
        let kubectl = self.lab.kubectl();
        let name = "deployment/hostdir-controller";
        kubectl
            .run(&["patch", name, "-n", NAMESPACE, "--type=json", "-p", &patch])
            .unwrap();
        kubectl
            .run(&["rollout", "status", name, "-n", NAMESPACE, "--timeout=180s"])
            .unwrap();
    }
}

impl Drop for Anarchy<'_> {
    fn drop(&mut self) {
        for node in 0..3 {
            self.lab.signal_drivers(node, "controller", "CONT");
        }
        if !std::thread::panicking() {
            self.patch(2, &self.args.clone());
        }
    }
}

#[needs(Root, Go, Cluster)]
fn scenario_3_three_leaders_at_once_do_no_harm() {
    let lab = lab(
        Mode::Elected,
        "anarchy",
        "3. three provisioners at once, slow drivers, early deletes",
    );
    let mut now = class(Mode::Elected.driver(), "at-once", &json!({}), "Delete", &[]);
    now["volumeBindingMode"] = "Immediate".into();
    lab.apply(&[now, lab.claim("live", "10Mi"), pod("live", "live")]);
    lab.running("live");
    lab.exec("live", "echo alive > /data/file").unwrap();
    let live = lab.volume_of("live");

    let anarchy = Anarchy::begin(&lab);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut turn = 0;
            while !done.load(Ordering::Relaxed) {
                let node = turn % 3;
                turn += 1;
                lab.signal_drivers(node, "controller", "STOP");
                std::thread::sleep(Duration::from_millis(1500));
                lab.signal_drivers(node, "controller", "CONT");
            }
        });
        let _done = SetOnDrop(&done);
        let names: Vec<String> = (0..60).map(|number| format!("short-{number}")).collect();
        for some in names.chunks(20) {
            let claims: Vec<Value> = some
                .iter()
                .map(|name| claim_of(name, "1Mi", "at-once", "ReadWriteOnce"))
                .collect();
            lab.apply(&claims);
            // Some are bound by then, some are just being made, some are not begun.
            std::thread::sleep(Duration::from_secs(2));
            let mut args = vec!["delete", "pvc", "-n", &lab.namespace, "--wait=false"];
            args.extend(some.iter().map(String::as_str));
            lab.kubectl().run(&args).unwrap();
        }
        lab.wait("the short-lived are gone", || {
            Ok(lab.kubectl().list(&["pvc", "-n", &lab.namespace])?.len() == 1)
        });
    });
    let made = |controller: &Value| {
        let metrics = lab.http(controller, "metrics").unwrap_or_default();
        metrics.contains(r#"hostdir_csi_call_duration_seconds_count{method="CreateVolume",code="Ok"}"#)
    };
    let acted = lab.controllers().iter().filter(|controller| made(controller)).count();
    assert!(acted > 1, "only {acted} of three acted");
    drop(anarchy);
    lab.wait("only the living is left", || {
        let left = lab.kubectl().list(&["hostvolumes"])?;
        Ok(left.len() == 1 && left[0]["metadata"]["name"] == live.as_str())
    });
    lab.wait("only its PersistentVolume is left", || {
        Ok(lab.kubectl().list(&["pv"])?.len() == 1)
    });
    assert_eq!(lab.exec("live", "cat /data/file").unwrap(), "alive\n");
    lab.delete("pod", "live");
    lab.delete("pvc", "live");
    lab.kubectl().run(&["delete", "storageclass", "at-once"]).unwrap();
    lab.nothing_is_left();
}

#[needs(Root, Go, Cluster)]
fn pods_and_drivers_restart_without_an_api_server() {
    let lab = lab(Mode::Elected, "no-api", "the API server is away for 15 s");
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    lab.exec("pod", "echo precious > /data/file").unwrap();
    let volume = lab.volume_of("data");
    let file = lab.on_disk(&volume, "file");
    let before = lab.get("pod", "pod").unwrap()["status"]["containerStatuses"][0]["containerID"].clone();

    let driver = lab.driver_processes(0);
    lab.stop_api_server().unwrap();
    let start = Instant::now();
    // The pod's container and the driver both die; the kubelet starts both again, and the volume is where it was.
    lab.kill_driver(0);
    let script = "for p in /proc/[0-9]*; do
        case \"$(tr '\\0' ' ' < $p/cmdline 2>/dev/null)\" in
        '/bin/sh -c trap'*) kill -9 ${p#/proc/} ;;
        esac
    done";
    lab.nodes[0].sh(script).unwrap();
    while start.elapsed() < Duration::from_secs(15) {
        assert_eq!(lab.nodes[0].sh(&format!("cat {file}")).unwrap(), "precious\n");
        assert_eq!(lab.mounts(), 1);
        std::thread::sleep(Duration::from_secs(3));
    }
    let now = lab.driver_processes(0);
    assert!(
        !now.is_empty() && now != driver,
        "the driver was not started again: {driver}{now}"
    );
    lab.start_api_server().unwrap();
    let start = Instant::now();
    lab.wait("the pod runs again", || {
        let status = lab.get("pod", "pod")?["status"]["containerStatuses"][0].clone();
        Ok(status["containerID"] != before && status["ready"] == true)
    });
    report(&format!(
        "the pod is ready again {:.1?} after the API server",
        start.elapsed()
    ));
    assert_eq!(lab.exec("pod", "cat /data/file").unwrap(), "precious\n");
    // Work resumes by itself.
    lab.apply(&[lab.claim("next", "10Mi"), pod("next", "next")]);
    lab.running("next");
    report(&format!(
        "a new claim's pod is ready {:.1?} after the API server",
        start.elapsed()
    ));
    for name in ["pod", "next"] {
        lab.delete("pod", name);
    }
    for name in ["data", "next"] {
        lab.delete("pvc", name);
    }
    lab.nothing_is_left();
    lab.wait_ready(3).unwrap();
}

#[needs(Root, Go, Cluster)]
fn scenario_5_deletes_wait_for_nodes_that_are_off_and_not_for_those_that_are_gone() {
    let mut lab = lab(
        Mode::Elected,
        "vanished",
        "5. a node is off, and then gone, and then back",
    );
    let names = ["off", "gone", "kept"];
    for name in names {
        lab.apply(&[lab.claim(name, "10Mi"), on_node(pod(name, name), "node-1")]);
    }
    for name in names {
        lab.running(name);
        lab.exec(name, &format!("echo {name} > /data/file")).unwrap();
    }
    let [off, gone, kept] = names.map(|name| lab.volume_of(name));

    lab.nodes[0].cut_power().unwrap();
    lab.force_delete_pods();
    lab.kubectl()
        .run(&["delete", "pvc", "off", "-n", &lab.namespace, "--wait=false"])
        .unwrap();
    lab.wait("the delete waits and says for whom", || {
        Ok(lab
            .kubectl()
            .run(&["describe", "pv", &off])?
            .contains("hostdir on node node-1 has not answered"))
    });
    lab.power_on(0).unwrap();
    lab.wait("the delete lands", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.len() == 2 && !lab.is_on_node(0, &off))
    });

    lab.nodes[0].cut_power().unwrap();
    lab.kubectl().run(&["delete", "node", "node-1"]).unwrap();
    let start = Instant::now();
    lab.kubectl()
        .run(&["delete", "pvc", "gone", "-n", &lab.namespace, "--wait=false"])
        .unwrap();
    lab.wait("the delete of a node that is gone lands", || {
        Ok(lab.kubectl().is_gone(&["pv", &gone])? && lab.kubectl().is_gone(&["hostvolume", &gone])?)
    });
    report(&format!(
        "gone {:.0?} after the Node, with a grace of 10 s",
        start.elapsed()
    ));
    assert!(
        lab.kubectl().get(&["hostvolume", &kept]).is_ok(),
        "nobody asked for this one to be deleted"
    );
    let events = lab.kubectl().run(&["events", "-A"]).unwrap();
    assert!(events.contains("NodeGone"), "nobody was told");

    lab.power_on(0).unwrap();
    // A kubelet whose Node is gone takes its time to register it again.
    lab.wait("the node is back", || {
        Ok(lab.kubectl().get(&["node", "node-1"]).is_ok())
    });
    // By then it tries to register plugins once in two minutes only.
    lab.nodes[0].kill_kubelet().unwrap();
    lab.nodes[0].start_kubelet().unwrap();
    lab.wait_ready(3).unwrap();
    lab.wait("what is left is listed", || {
        let node = lab.kubectl().get(&["hostnode", "node-1"])?;
        Ok(node["status"]["orphans"] == json!([{"id": gone, "pool": "default"}]))
    });
    let left = lab.on_disk(&gone, "file");
    assert_eq!(lab.nodes[0].sh(&format!("cat {left}")).unwrap(), "gone\n");
    lab.apply(&[on_node(pod("kept", "kept"), "node-1")]);
    lab.running("kept");
    assert_eq!(lab.exec("kept", "cat /data/file").unwrap(), "kept\n");

    // An administrator takes the orphan away, as deploy/README.md says.
    lab.nodes[0]
        .sh(&format!("rm -r {}/volumes/{gone}", lab.mode.pool()))
        .unwrap();
    lab.kill_driver(0);
    lab.wait("nothing is listed any more", || {
        let node = lab.kubectl().get(&["hostnode", "node-1"])?;
        Ok(node["status"]["orphans"] == json!([]))
    });
    lab.delete("pod", "kept");
    lab.delete("pvc", "kept");
    lab.nothing_is_left();
}

/// A pool `disk` on nodes 2 and 3, on disks that can be pulled: directories of the machine, mounted as disks would be.
struct Disks<'a>(&'a Lab);

impl Disks<'_> {
    fn sh(&self, node: usize, script: &str) -> String {
        self.0.nodes[node].sh(script).unwrap()
    }

    fn plug(&self, node: usize, disk: &str) {
        let dir = format!("{}/{disk}", self.0.shared_dir().display());
        let script = format!("mkdir -p {dir}/hostdir /mnt/disk && mount --bind {dir} /mnt/disk");
        self.sh(node, &script);
    }

    fn pull(&self, node: usize) {
        self.sh(node, "umount -l /mnt/disk");
    }

    /// hostdir takes note of other disks when it starts.
    fn restart(&self) {
        self.0.kill_driver(1);
        self.0.kill_driver(2);
    }

    fn claim(name: &str) -> Value {
        claim_of(name, "10Mi", "disk", "ReadWriteOnce")
    }

    fn start(&self, name: &str, node: &str) {
        self.0.apply(&[on_node(pod(name, name), node)]);
    }

    fn pool_of(&self, name: &str) -> String {
        let volume = self.0.volume_of(name);
        let object = self.0.kubectl().get(&["hostvolume", &volume]).unwrap();
        object["status"]["poolId"].as_str().unwrap().to_owned()
    }

    fn has_its_data(&self, name: &str) {
        self.0.running(name);
        assert_eq!(self.0.exec(name, "cat /data/file").unwrap(), format!("{name}\n"));
    }
}

impl Drop for Disks<'_> {
    fn drop(&mut self) {
        for node in [1, 2] {
            let _ = self.0.nodes[node].sh("umount -l /mnt/disk; rm -rf /mnt/disk");
        }
        let _ = self.0.nodes[0].sh(&format!("rm -rf {}", self.0.shared_dir().display()));
    }
}

#[needs(Root, Go, Cluster)]
fn scenario_6_a_disk_that_is_another_is_never_taken_for_the_one_it_was() {
    let lab = lab(
        Mode::Elected,
        "disks",
        "6. disks swapped, missing and fresh: right or refused",
    );
    let disks = Disks(&lab);
    disks.sh(0, &format!("rm -rf {}", lab.shared_dir().display()));
    disks.plug(1, "a");
    disks.plug(2, "b");
    lab.install(&[
        r#"pools=[{"name":"default","path":"/var/lib/hostdir"},{"name":"disk","path":"/mnt/disk/hostdir"}]"#,
    ]);
    lab.apply(&[
        class(Mode::Elected.driver(), "disk", &json!({"pool": "disk"}), "Delete", &[]),
        Disks::claim("two"),
        Disks::claim("three"),
    ]);
    disks.start("two", "node-2");
    disks.start("three", "node-3");
    for name in ["two", "three"] {
        lab.running(name);
        lab.exec(name, &format!("echo {name} > /data/file")).unwrap();
        lab.delete("pod", name);
    }
    let (a, b) = (disks.pool_of("two"), disks.pool_of("three"));
    assert_ne!(a, b);
    swapped(&disks, &a, &b);
    missing(&disks, &a);
    fresh(&disks, &a);
    lab.kubectl().run(&["delete", "storageclass", "disk"]).unwrap();
    lab.install(&[]);
    drop(disks);
    lab.nothing_is_left();
}

/// Node 2 has the disk of node 3, and the other way round.
fn swapped(disks: &Disks<'_>, a: &str, b: &str) {
    let lab = disks.0;
    disks.pull(1);
    disks.pull(2);
    disks.plug(1, "b");
    disks.plug(2, "a");
    disks.restart();
    disks.start("two", "node-2");
    disks.start("three", "node-3");
    for (name, was, is) in [("two", a, b), ("three", b, a)] {
        lab.described("pod", name, &format!("it was made on pool {was}"));
        lab.described("pod", name, is);
        lab.described("pvc", name, "VolumeLost");
    }
    // A volume for the wrong disk is refused, too: there are volumes of the other one.
    lab.apply(&[Disks::claim("more")]);
    disks.start("more", "node-2");
    lab.described("pod", "more", "did not have enough free storage");
}

/// The disk of node 2 is not mounted at boot, and its pool is not told to require a mount: an empty directory, in which
/// hostdir makes a new pool.
fn missing(disks: &Disks<'_>, a: &str) {
    let lab = disks.0;
    disks.pull(1);
    disks.pull(2);
    disks.plug(2, "b");
    disks.restart();
    disks.has_its_data("three");
    lab.described("pod", "two", &format!("it was made on pool {a}"));
    assert_eq!(
        disks.sh(1, "ls /mnt/disk/hostdir/volumes"),
        "",
        "an empty volume was made"
    );

    disks.plug(1, "a");
    disks.restart();
    disks.has_its_data("two");
    lab.described("pvc", "two", "VolumeFound");
    lab.running("more");
}

/// A fresh disk in place of a broken one: its volumes are given up, and new ones are made.
fn fresh(disks: &Disks<'_>, a: &str) {
    let lab = disks.0;
    lab.delete("pod", "two");
    lab.delete("pod", "more");
    disks.pull(1);
    disks.plug(1, "c");
    disks.restart();
    disks.start("two", "node-2");
    lab.described("pod", "two", &format!("it was made on pool {a}"));
    lab.delete_all(PATIENCE);
    lab.wait("the claims on the broken disk are gone", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.is_empty())
    });
    lab.apply(&[Disks::claim("fresh")]);
    disks.start("fresh", "node-2");
    lab.running("fresh");
    lab.delete("pod", "fresh");
    lab.delete("pvc", "fresh");
}

#[needs(Root, Go, Cluster)]
fn scenario_7_both_modes_live_in_one_cluster() {
    let lab = lab(Mode::Elected, "both", "7. one pod with a volume of each mode");
    let mut both = on_node(pod("both", "mine"), "node-2");
    let other = json!({"name": "other", "persistentVolumeClaim": {"claimName": "other"}});
    both["spec"]["volumes"].as_array_mut().unwrap().push(other);
    let mount = json!({"name": "other", "mountPath": "/other"});
    let mounts = both["spec"]["containers"][0]["volumeMounts"].as_array_mut().unwrap();
    mounts.push(mount);
    lab.apply(&[
        lab.claim("mine", "10Mi"),
        claim_of("other", "10Mi", Mode::Local.release(), "ReadWriteOnce"),
        both,
    ]);
    assert_eq!(lab.running("both"), "node-2");
    let (mine, other) = (lab.volume_of("mine"), lab.volume_of("other"));
    let pools = [(Mode::Elected.pool(), &mine), (Mode::Local.pool(), &other)];
    for (pool, volume) in pools {
        lab.nodes[1]
            .sh(&format!("test -d {pool}/volumes/{volume}/data"))
            .unwrap();
    }
    lab.delete("pod", "both");
    lab.delete("pvc", "mine");
    lab.delete("pvc", "other");
    lab.nothing_is_left();
    lab.wait("the local one is gone, too", || {
        Ok(lab.nodes[1]
            .sh(&format!("ls {}/volumes", Mode::Local.pool()))?
            .is_empty())
    });
}

#[needs(Root, Go, Cluster)]
fn a_claim_that_nobody_ever_used_is_swept_and_others_are_not() {
    let lab = lab(Mode::Elected, "swept", "what nobody ever used is swept");
    let mut now = class(Mode::Elected.driver(), "unused", &json!({}), "Delete", &[]);
    now["volumeBindingMode"] = "Immediate".into();
    lab.apply(&[now, claim_of("unused", "1Mi", "unused", "ReadWriteOnce")]);
    lab.wait("the claim is bound", || {
        Ok(lab.get("pvc", "unused")?["status"]["phase"] == "Bound")
    });
    let bound = lab.volume_of("unused");
    // What a leader leaves behind that dies between making a volume and saying so.
    let left = |name: &str| {
        json!({
            "apiVersion": "hostdir.csi/v1alpha1",
            "kind": "HostVolume",
            "metadata": {"name": name, "finalizers": ["hostdir.csi/node"]},
            "spec": {
                "node": "node-2", "pool": "default", "name": name, "capacity": "1Mi",
                "claim": {"namespace": lab.namespace, "name": "never-was"},
                "directory": {"mode": "0770", "uid": 0, "gid": 0},
            },
        })
    };
    lab.kubectl().apply(&left("pvc-left-behind").to_string()).unwrap();
    lab.wait("what was left behind is swept", || {
        lab.kubectl().is_gone(&["hostvolume", "pvc-left-behind"])
    });
    // The claim that is bound is as old by now.
    assert!(
        lab.kubectl().get(&["hostvolume", &bound]).is_ok(),
        "a bound claim was swept"
    );
    lab.delete("pvc", "unused");
    lab.kubectl().run(&["delete", "storageclass", "unused"]).unwrap();
    lab.nothing_is_left();
}

/// A token of a service account, bound to a pod if one is named.
pub(crate) fn token(lab: &Lab, account: &str, pod: Option<&str>) -> String {
    let mut args = vec!["create", "token", account, "-n", NAMESPACE];
    if let Some(pod) = pod {
        args.extend(["--bound-object-kind=Pod", "--bound-object-name", pod]);
    }
    lab.kubectl().run(&args).unwrap().trim().to_owned()
}

/// Runs kubectl with a token and nothing else.
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

/// A client with a token: kubectl reads what it changes, and for that nodes have no right.
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

    fn patch_node(&self, name: &str, patch: &Value) -> kube::Result<()> {
        let nodes: Api<HostNode> = Api::all(self.client.clone());
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        self.runtime
            .block_on(nodes.patch_status(name, &params, &patch))
            .map(drop)
    }
}

#[needs(Root, Go, Cluster)]
fn nobody_may_do_what_is_not_theirs_to_do() {
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
        .expect("its own volume");
    node.patch_volume(&own, true, &said(Value::Null)).unwrap();
    node.patch_node("node-1", &json!({"status": {"version": "0.1.0"}}))
        .expect("its own HostNode");
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
        ("what was promised", node.patch_volume(&own, false, &more)),
        (
            "without a node",
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
                "hostvolume",
                own.as_str(),
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
    // What never changes cannot be changed by anybody.
    let administrator = lab.kubectl().run(&[
        "patch",
        "hostvolume",
        &own,
        "--type=merge",
        "-p",
        r#"{"spec":{"node":"node-3"}}"#,
    ]);
    assert!(format!("{:#}", administrator.unwrap_err()).contains("never change"));
    // And all data is not deleted by a slip.
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

#[needs(Root, Go, Cluster)]
fn everybody_can_be_watched() {
    let lab = lab(Mode::Elected, "watched", "health and metrics over HTTP");
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), "node-2")]);
    lab.running("pod");
    for controller in lab.controllers() {
        assert_eq!(lab.http(&controller, "healthz").unwrap(), "ok\n");
        assert_eq!(lab.http(&controller, "readyz").unwrap(), "ok\n");
        lab.wait("the controller counts the volume", || {
            let metrics = lab.http(&controller, "metrics")?;
            Ok(metrics.contains("hostdir_volumes{phase=\"Ready\"} 1")
                && metrics.contains("hostdir_pool_promised_bytes{node=\"node-2\",pool=\"default\"} 10485760"))
        });
    }
    let node = lab.driver_on("node-2");
    let metrics = lab.http(&node, "metrics").unwrap();
    for line in [
        "hostdir_csi_call_duration_seconds_count{method=\"NodePublishVolume\",code=\"Ok\"}",
        "hostdir_deletes_pending 0",
        "hostdir_orphans 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    lab.delete("pod", "pod");
    lab.delete("pvc", "data");
    lab.nothing_is_left();
}
