//! Failures and upgrades: no room, wrong settings, missing disks, no network, and what Events say about them.

use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::needs;
use serde_json::json;

use crate::lab::{Lab, PATIENCE, Thaw, lab};
use crate::mode::{Mode, in_both_modes};
use crate::objects::{claim_of, class, on_node, pod};

in_both_modes![
    pods_go_where_there_is_room_and_wait_where_there_is_none,
    upgrades_and_uninstalls_leave_pods_alone,
    events_name_what_is_wrong_with_a_storage_class,
    a_self_test_passes_on_a_node,
    a_pod_keeps_its_volume_while_the_network_is_cut_and_the_api_server_hangs,
];

fn pods_go_where_there_is_room_and_wait_where_there_is_none(mode: Mode) {
    let lab = lab(mode, "room", "7. a pod goes where there is room; without room it waits");
    for node in ["node-1", "node-2", "node-3"] {
        lab.wait("capacity is published", || Ok(lab.capacity(mode.release(), node)? > 0));
    }
    // Nodes 2 and 3 have 1 GiB each.
    lab.apply(&[lab.claim("big", "10Gi"), pod("big", "big")]);
    assert_eq!(lab.running("big"), "node-1");
    lab.apply(&[lab.claim("huge", "100Ti"), pod("huge", "huge")]);
    lab.described("pod", "huge", "did not have enough free storage");
    lab.apply(&[
        lab.claim("elsewhere", "10Gi"),
        on_node(pod("elsewhere", "elsewhere"), "node-2"),
    ]);
    lab.described("pod", "elsewhere", "did not have enough free storage");
    lab.delete_all(PATIENCE);
    lab.nothing_is_left();
}

fn upgrades_and_uninstalls_leave_pods_alone(mode: Mode) {
    let lab = lab(
        mode,
        "upgrade",
        "8. helm upgrade and uninstall leave pods and data alone",
    );
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    let volume = lab.volume_of("data");
    let id = mount_id(&lab);
    let watch = MountWatch::start(&lab, &volume);
    lab.install(&["logLevel=\"debug\""]);
    assert_eq!(mount_id(&lab), id, "the volume was remounted");
    watch.check();

    lab.helm(&["uninstall", mode.release(), "--namespace", NAMESPACE, "--wait"])
        .unwrap();
    assert_eq!(mount_id(&lab), id, "the volume was remounted");
    watch.check();
    drop(watch);
    lab.exec("pod", "echo still here > /data/file").unwrap();

    lab.install(&[]);
    lab.delete("pod", "pod");
    lab.apply(&[on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    assert_eq!(lab.exec("pod", "cat /data/file").unwrap(), "still here\n");
    lab.delete("pod", "pod");
    lab.delete("pvc", "data");
    lab.nothing_is_left();
}

/// The mount id of the only CSI mount on the first node.
fn mount_id(lab: &Lab) -> String {
    let id = lab.nodes[0]
        .sh("grep ' /var/lib/kubelet/pods/.*kubernetes.io~csi' /proc/self/mountinfo | cut -d' ' -f1")
        .unwrap();
    assert!(
        id.trim().parse::<u64>().is_ok(),
        "there is not exactly one mount: {id:?}"
    );
    id
}

/// Checks the kubelet's mount of a volume on the first node every 20 ms, and records when it is missing. A container would
/// not notice, because it has its own mounts.
struct MountWatch<'a> {
    lab: &'a Lab,
    seen: std::cell::Cell<usize>,
}

impl<'a> MountWatch<'a> {
    const DIR: &'static str = "/run/mount-watch";

    fn start(lab: &'a Lab, volume: &str) -> Self {
        let mark = lab.on_disk(volume, "mark");
        let mount = format!("$(echo /var/lib/kubelet/pods/*/volumes/kubernetes.io~csi/{volume}/mount)");
        let script = format!(
            "touch {mark}; mkdir {dir}; : > {dir}/looks; mount={mount}; test -e $mount/mark
             setsid sh -c \"while test -d {dir}; do
                 if test -e $mount/mark; then echo x >> {dir}/looks; else echo x >> {dir}/gone; fi
                 sleep 0.02
             done\" > /dev/null 2>&1 < /dev/null &",
            dir = Self::DIR
        );
        lab.nodes[0].sh(&script).unwrap();
        Self { lab, seen: 0.into() }
    }

    /// Checks that the mount was never missing since the last check, and that the watch runs.
    fn check(&self) {
        let looks = || self.count("looks");
        self.lab
            .wait("the mount watch runs", || Ok(looks() > self.seen.get() + 10));
        self.seen.set(looks());
        assert_eq!(self.count("gone"), 0, "the mount was missing for a moment");
    }

    fn count(&self, file: &str) -> usize {
        let script = format!("cat {}/{file} 2>/dev/null | wc -l", Self::DIR);
        self.lab.nodes[0].sh(&script).unwrap().trim().parse().unwrap()
    }
}

impl Drop for MountWatch<'_> {
    fn drop(&mut self) {
        let _ = self.lab.nodes[0].sh(&format!("rm -rf {}", Self::DIR));
    }
}

fn events_name_what_is_wrong_with_a_storage_class(mode: Mode) {
    let lab = lab(
        mode,
        "causes",
        "kubectl describe says what is wrong with a StorageClass",
    );
    lab.apply(&[
        class(lab.mode.driver(), "typo", &json!({"poool": "default"}), "Delete", &[]),
        class(lab.mode.driver(), "no-pool", &json!({"pool": "fast"}), "Delete", &[]),
        claim_of("typo", "10Mi", "typo", "ReadWriteOnce"),
        claim_of("no-pool", "10Mi", "no-pool", "ReadWriteOnce"),
        pod("typo", "typo"),
        pod("no-pool", "no-pool"),
    ]);
    lab.described("pvc", "typo", "unknown field `poool`");
    lab.described("pvc", "no-pool", "has no pool fast (it has: default)");
    lab.delete_all(PATIENCE);
    lab.kubectl()
        .run(&["delete", "storageclass", "typo", "no-pool"])
        .unwrap();
    lab.nothing_is_left();
}

fn a_self_test_passes_on_a_node(mode: Mode) {
    let lab = lab(mode, "self-test", "hostdir selftest in hostdir's pod on a node");
    let pod = lab.driver_on("node-2")["metadata"]["name"].as_str().unwrap().to_owned();
    let exec = [
        "exec", "-n", NAMESPACE, &pod, "-c", "hostdir", "--", "/hostdir", "selftest",
    ];
    let table = lab
        .kubectl()
        .run(&[&exec[..], &["--endpoint=unix:///csi/csi.sock"]].concat())
        .unwrap();
    assert!(table.contains("selftest-default is gone"), "{table}");
    lab.nothing_is_left();
}

#[needs(Root, Go, Cluster)]
fn events_name_a_disk_that_is_no_longer_mounted() {
    let mode = Mode::Elected;
    let mut lab = lab(
        mode,
        "no-disk",
        "kubectl describe names a disk that is no longer mounted",
    );
    // A pod comes back for its volume, but the pool's disk is not mounted.
    let pools = json!([
        {"name": "default", "path": mode.pool()},
        {"name": "disk", "path": "/mnt/disk/hostdir", "requireMount": true},
    ]);
    lab.nodes[0]
        .sh("mkdir -p /mnt/disk && mount -t tmpfs -o size=64M tmpfs /mnt/disk && mkdir /mnt/disk/hostdir")
        .unwrap();
    lab.install(&[&format!("pools={pools}")]);
    lab.apply(&[
        class(lab.mode.driver(), "disk", &json!({"pool": "disk"}), "Delete", &[]),
        claim_of("disk", "10Mi", "disk", "ReadWriteOnce"),
        on_node(pod("disk", "disk"), "node-1"),
    ]);
    lab.running("disk");
    lab.exec("disk", "echo kept > /data/file").unwrap();
    lab.delete("pod", "disk");
    // The disk is not mounted at boot.
    lab.nodes[0].cut_power().unwrap();
    lab.power_on(0).unwrap();
    lab.apply(&[on_node(pod("disk", "disk"), "node-1")]);
    lab.described("pod", "disk", "pool disk cannot be used: /mnt/disk/hostdir");
    // `hostdir probe --ready` in hostdir's own pod says so, too.
    let asked = ["probe", "--ready", "--endpoint=unix:///csi/csi.sock"];
    let pod = format!("pod/{}", lab.driver_on("node-1")["metadata"]["name"].as_str().unwrap());
    let exec = ["exec", "-n", NAMESPACE, &pod, "-c", "hostdir", "--", "/hostdir"];
    let said = lab.kubectl().run(&[&exec[..], &asked].concat()).unwrap_err();
    assert!(
        format!("{said:#}").contains("not ready: pool disk: /mnt/disk/hostdir"),
        "{said:#}"
    );
    lab.wait("the HostVolume is Lost, after half a minute", || {
        let volume = lab.kubectl().get(&["hostvolume", &lab.volume_of("disk")])?;
        Ok(volume["status"]["phase"] == "Lost")
    });
    lab.kubectl()
        .run(&["delete", "pods", "--all", "-n", &lab.namespace, "--wait"])
        .unwrap();
    // The disk is lost forever, and leaves the configuration.
    lab.install(&[]);
    let volume = lab.volume_of("disk");
    lab.delete("pvc", "disk");
    lab.wait("the delete waits for somebody to give up the data", || {
        let volume = lab.kubectl().get(&["hostvolume", &volume])?;
        Ok(volume["status"]["reason"] == "PoolRemoved")
    });
    let uid = lab.kubectl().get(&["hostvolume", &volume]).unwrap()["metadata"]["uid"].clone();
    let given_up = format!("hostdir.csi/leave-data={}", uid.as_str().unwrap());
    lab.kubectl()
        .run(&["annotate", "hostvolume", &volume, &given_up])
        .unwrap();
    lab.kubectl().run(&["delete", "storageclass", "disk"]).unwrap();
    lab.nothing_is_left();
}

fn a_pod_keeps_its_volume_while_the_network_is_cut_and_the_api_server_hangs(mode: Mode) {
    let lab = lab(mode, "cut-off", "a pod keeps its volume without network and API server");
    lab.apply(&[lab.claim("data", "10Mi"), on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    let volume = lab.volume_of("data");
    let reached = |path: &str| {
        lab.kubectl()
            .run(&["get", "--raw", path, "--request-timeout=2s"])
            .is_ok()
    };
    let answers = || reached("/readyz");
    let node_answers = || reached("/api/v1/nodes/node-1/proxy/healthz");
    let id = mount_id(&lab);

    lab.freeze_api_server(true).unwrap();
    let thaw = Thaw(&lab);
    assert!(!answers(), "the API server is not frozen");
    // Without the API server, a restarted driver mounts and unmounts a volume that is ready.
    lab.kill_driver(0);
    let client = lab.driver_client(0);
    let pods = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~csi";
    let target = lab.nodes[0]
        .sh(&format!("echo {pods}/{volume}"))
        .unwrap()
        .trim()
        .to_owned()
        + "/while-frozen";
    client.publish(&volume, target.as_ref()).unwrap();
    lab.nodes[0].sh(&format!("echo x > {target}/while-frozen")).unwrap();
    assert_eq!(lab.mounts(), 2);
    client.unpublish(&volume, target.as_ref()).unwrap();
    assert_eq!(lab.mounts(), 1);
    assert!(!answers(), "the API server was not frozen all the time");
    drop(thaw);
    lab.wait("the API server answers again", || Ok(answers()));

    lab.stop_api_server().unwrap();
    lab.wait("the API server is stopped", || Ok(!answers()));
    assert_eq!(mount_id(&lab), id);
    lab.start_api_server().unwrap();
    lab.wait("the API server answers again", || Ok(answers()));

    lab.wait("the kubelet answers", || Ok(node_answers()));
    lab.cut_network(0, true).unwrap();
    assert!(!node_answers(), "the network is not cut");
    assert_eq!(mount_id(&lab), id);
    lab.cut_network(0, false).unwrap();
    lab.wait("the node is back", || {
        Ok(lab.exec("pod", "cat /data/while-frozen").is_ok())
    });
    lab.wait_ready(3).unwrap();

    lab.delete("pod", "pod");
    lab.delete("pvc", "data");
    lab.nothing_is_left();
}
