//! Disks that are swapped, missing or new.

use crate::lab::{Lab, PATIENCE, lab};
use crate::mode::Mode;
use crate::objects::{claim_of, class, on_node, pod};
use hostdir_lab::needs;
use serde_json::{Value, json};

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
