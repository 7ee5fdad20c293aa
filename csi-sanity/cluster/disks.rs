//! Disks that are swapped, missing or new.

use crate::lab::{Lab, PATIENCE, lab};
use crate::mode::Mode;
use crate::objects::{claim_of, class, on_node, pod};
use hostdir_lab::needs;
use serde_json::{Value, json};
use std::time::Instant;

/// A pool `disk` on nodes 2 and 3, on disks that can be removed: directories of this machine, bind-mounted on the nodes.
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

    /// Restarts the drivers: a pool on another disk is opened only at start.
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

    /// Why the pool `disk` of a node cannot be used, as the HostNode says; empty if it can be used.
    fn message(&self, node: usize) -> String {
        let name = format!("node-{}", node + 1);
        let object = self.0.kubectl().get(&["hostnode", &name]).unwrap();
        let pools = object["status"]["pools"].as_array().unwrap();
        let disk = pools.iter().find(|pool| pool["name"] == "disk").unwrap();
        disk["message"].as_str().unwrap_or_default().to_owned()
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
fn a_swapped_or_new_disk_is_never_mistaken_for_the_old_one() {
    let lab = lab(
        Mode::Elected,
        "disks",
        "6. disks swapped, missing and new: mounted rightly or refused",
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

/// A disk that hangs is published by its node and forgotten again, and pods on it can end.
#[needs(Root, Go, Cluster, LoopDevices)]
fn a_disk_that_hangs_is_published_and_stops_nothing_else() {
    let lab = lab(Mode::Elected, "hang", "a disk hangs: it is published, and pods end");
    let disks = Disks(&lab);
    disks.sh(0, &format!("rm -rf {}", lab.shared_dir().display()));
    let image = format!("{}/disk.img", lab.shared_dir().display());
    let make = format!(
        "mkdir -p {dir} /mnt/disk && truncate -s 64M {image} && mkfs.ext4 -q {image} && mount -o loop {image} /mnt/disk
         mkdir /mnt/disk/hostdir",
        dir = lab.shared_dir().display()
    );
    disks.sh(1, &make);
    lab.install(&[
        r#"pools=[{"name":"default","path":"/var/lib/hostdir"},{"name":"disk","path":"/mnt/disk/hostdir"}]"#,
    ]);
    lab.apply(&[
        class(Mode::Elected.driver(), "disk", &json!({"pool": "disk"}), "Delete", &[]),
        Disks::claim("slow"),
        lab.claim("other", "10Mi"),
    ]);
    disks.start("slow", "node-2");
    lab.running("slow");
    let frozen = FrozenDisk::freeze(&disks, 1);
    let since = Instant::now();
    lab.wait("the disk is said to hang", || {
        Ok(disks.message(1).contains("its disk hangs"))
    });
    println!("    published after {:.1} s", since.elapsed().as_secs_f64());
    disks.start("other", "node-2");
    lab.running("other");
    lab.delete("pod", "slow");
    drop(frozen);
    lab.wait("the disk is used again", || Ok(disks.message(1).is_empty()));
    disks.start("slow", "node-2");
    lab.running("slow");
    for name in ["slow", "other"] {
        lab.delete("pod", name);
        lab.delete("pvc", name);
    }
    lab.kubectl().run(&["delete", "storageclass", "disk"]).unwrap();
    lab.install(&[]);
    drop(disks);
    lab.nothing_is_left();
}

/// A frozen disk on a node. It thaws when this is dropped: frozen, it could not even be unmounted.
struct FrozenDisk<'a>(&'a Disks<'a>, usize);

impl<'a> FrozenDisk<'a> {
    fn freeze(disks: &'a Disks<'a>, node: usize) -> Self {
        disks.sh(node, "fsfreeze -f /mnt/disk");
        Self(disks, node)
    }
}

impl Drop for FrozenDisk<'_> {
    fn drop(&mut self) {
        let _ = self.0.0.nodes[self.1].sh("fsfreeze -u /mnt/disk");
    }
}

/// Nodes 2 and 3 have swapped their disks.
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
    // No new volume is made on the wrong disk either, since volumes of the right one are missing.
    lab.apply(&[Disks::claim("more")]);
    disks.start("more", "node-2");
    lab.described("pod", "more", "did not have enough free storage");
}

/// The disk of node 2 is not mounted at boot, and its pool is configured without `requireMount`: hostdir makes a new pool
/// in an empty directory.
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

/// A new disk replaces a broken one: the volumes on the broken disk are deleted, and new ones are made.
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
