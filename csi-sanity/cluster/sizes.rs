//! The size of a claim is enforced, and a claim grows while its pod runs.

use serde_json::{Value, json};

use crate::lab::{Lab, PATIENCE, lab};
use crate::mode::Mode;
use crate::objects::{claim_of, on_node, pod};
use hostdir_lab::needs;

/// A pool `sized` with quotas, on a disk that only the first node has.
const POOLS: &str = r#"pools=[
    {"name":"default","path":"/var/lib/hostdir"},
    {"name":"sized","path":"/var/lib/sized/disk","requireMount":true,"quota":"required"}]"#;
const CLASSES: &str = r#"storageClasses=[{"name":"hostdir","parameters":{"pool":"default"}},{"name":"sized","parameters":{"pool":"sized"}}]"#;

const MIB: u64 = 1 << 20;

#[needs(Root, Go, Cluster, Btrfs)]
fn a_claim_is_as_large_as_it_says_and_grows_while_its_pod_runs() {
    let title = "the size of a claim is enforced, and a claim grows while its pod runs";
    let lab = lab(Mode::Elected, "sizes", title);
    let disk = Disk::mount(&lab);
    lab.install(&[POOLS, CLASSES]);
    lab.wait("the HostNode shows that the pool has quotas", || {
        Ok(pool_status(&lab)?["quota"] == "quota groups")
    });

    lab.apply(&[
        claim_of("data", "64Mi", "sized", "ReadWriteOnce"),
        on_node(pod("pod", "data"), "node-1"),
    ]);
    lab.running("pod");
    let container = container(&lab);
    let full = lab.exec("pod", &write("first", 100)).unwrap_err();
    assert!(format!("{full:#}").contains("quota"), "{full:#}");
    let written = size(&lab, "first");
    assert!(
        (62 * MIB..=64 * MIB).contains(&written),
        "{written} bytes could be written into a volume of 64 MiB"
    );

    resize(&lab, "128Mi");
    lab.wait("the claim has grown", || Ok(capacity(&lab)? == "128Mi"));
    lab.exec("pod", &write("second", 50)).unwrap();
    assert_eq!(size(&lab, "second"), 50 * MIB);
    let full = lab.exec("pod", &write("third", 50)).unwrap_err();
    assert!(format!("{full:#}").contains("quota"), "{full:#}");
    assert_eq!(container, self::container(&lab), "the container was restarted");

    lab.wait("the kubelet reports the statistics of the volume", || {
        let stats = lab
            .kubectl()
            .run(&["get", "--raw", "/api/v1/nodes/node-1/proxy/stats/summary"])?;
        let stats: Value = serde_json::from_str(&stats)?;
        let pods = stats["pods"].as_array().cloned().unwrap_or_default();
        let volumes = pods
            .iter()
            .flat_map(|pod| pod["volume"].as_array().cloned().unwrap_or_default());
        let ours = volumes.into_iter().find(|volume| {
            volume["pvcRef"]["name"] == "data" && volume["pvcRef"]["namespace"] == lab.namespace.as_str()
        });
        Ok(ours.is_some_and(|volume| {
            let used = volume["usedBytes"].as_u64().unwrap_or_default();
            volume["capacityBytes"] == 128 * MIB && (120 * MIB..=129 * MIB).contains(&used)
        }))
    });

    // A size beyond the room is refused with the room in the message. A smaller size then succeeds.
    resize(&lab, "100Gi");
    lab.described("pvc", "data", "has room for");
    resize(&lab, "160Mi");
    lab.wait("the claim has grown", || Ok(capacity(&lab)? == "160Mi"));

    // The claim grows while no pod uses it.
    lab.delete("pod", "pod");
    resize(&lab, "192Mi");
    let record = format!("cat {}/volumes/{}/volume.json", disk.path, lab.volume_of("data"));
    lab.wait("the node has recorded the new size", || {
        let record: Value = serde_json::from_str(&lab.nodes[0].sh(&record)?)?;
        Ok(record["bytes"] == 192 * MIB)
    });
    lab.apply(&[on_node(pod("pod", "data"), "node-1")]);
    lab.running("pod");
    lab.wait("the claim has grown", || Ok(capacity(&lab)? == "192Mi"));
    lab.exec("pod", &write("fourth", 30)).unwrap();
    lab.delete_all(PATIENCE);
    lab.nothing_is_left();
    lab.wait("the disk is empty", || {
        Ok(lab.nodes[0]
            .sh(&format!("ls {0}/volumes {0}/trash -A | grep -v : || :", disk.path))?
            .trim()
            .is_empty())
    });
    lab.install(&[]);
}

/// A disk with quotas on the first node, until this is dropped.
struct Disk<'a> {
    lab: &'a Lab,
    path: &'static str,
}

impl<'a> Disk<'a> {
    fn mount(lab: &'a Lab) -> Self {
        let path = "/var/lib/sized/disk";
        // Unmounting releases the loop device, and with it the deleted image file.
        let script = format!(
            "truncate -s 1G /var/lib/sized.img
             mkfs.btrfs -q /var/lib/sized.img
             mkdir -p {path}
             mount -o loop /var/lib/sized.img {path}
             rm /var/lib/sized.img
             btrfs quota enable {path}"
        );
        lab.nodes[0].sh(&script).unwrap();
        Self { lab, path }
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.lab.nodes[0].sh(&format!("umount -l {0}; rmdir {0}", self.path)) {
            eprintln!("{error:#}");
        }
    }
}

fn pool_status(lab: &Lab) -> anyhow::Result<Value> {
    let node = lab.kubectl().get(&["hostnode", "node-1"])?;
    let pools = node["status"]["pools"].as_array().cloned().unwrap_or_default();
    Ok(pools
        .into_iter()
        .find(|pool| pool["name"] == "sized")
        .unwrap_or_default())
}

fn write(file: &str, mib: u64) -> String {
    format!("dd if=/dev/zero of=/data/{file} bs=1M count={mib} conv=fsync")
}

fn size(lab: &Lab, file: &str) -> u64 {
    let text = lab.exec("pod", &format!("stat -c %s /data/{file}")).unwrap();
    text.trim().parse().unwrap()
}

fn resize(lab: &Lab, size: &str) {
    let patch = json!({"spec": {"resources": {"requests": {"storage": size}}}}).to_string();
    let args = ["patch", "pvc", "data", "-n", &lab.namespace, "-p", &patch];
    lab.kubectl().run(&args).unwrap();
}

fn capacity(lab: &Lab) -> anyhow::Result<Value> {
    Ok(lab.get("pvc", "data")?["status"]["capacity"]["storage"].clone())
}

fn container(lab: &Lab) -> Value {
    lab.get("pod", "pod").unwrap()["status"]["containerStatuses"][0]["containerID"].clone()
}
