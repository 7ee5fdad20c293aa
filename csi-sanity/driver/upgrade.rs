//! A pool of an earlier version is served without conversion: its volumes, records and mounts stay.
//!
//! The files are those that hostdir 389b711 wrote. If `HOSTDIR_OLD_BINARY` names a binary of that version, it writes them instead.

use std::fs;
use std::path::Path;

use hostdir_lab::golden::{POOL, record};
use hostdir_lab::scratch::{is_mounted, names};
use hostdir_lab::{Driver, Scratch, needs, wait_until};
use nix::mount::{MsFlags, mount};

const CONTENT: &str = "written under 389b711";

/// Makes a pool with two volumes: one has a file and is mounted at `target`, the other was never used.
fn make_old_pool(scratch: &Scratch, pool: &Path, target: &Path) {
    if let Some(old) = std::env::var_os("HOSTDIR_OLD_BINARY") {
        let mut process = Driver::new(scratch).binary(old).pool("default", pool).spawn();
        let client = process.connect_ready();
        client.create("used").unwrap();
        client.create("unused").unwrap();
        client.publish("used", target).unwrap();
        fs::write(target.join("file"), CONTENT).unwrap();
        process.kill();
        for file in [
            ".hostdir/pool.json",
            "volumes/used/volume.json",
            "volumes/unused/volume.json",
        ] {
            println!("{file}:\n{}", fs::read_to_string(pool.join(file)).unwrap());
        }
        return;
    }
    for dir in [".hostdir/new", "trash", "volumes/used/data", "volumes/unused"] {
        fs::create_dir_all(pool.join(dir)).unwrap();
    }
    fs::write(pool.join(".hostdir/pool.json"), POOL).unwrap();
    fs::write(pool.join("volumes/used/volume.json"), record("used", "ready", None)).unwrap();
    fs::write(
        pool.join("volumes/unused/volume.json"),
        record("unused", "claimed", None),
    )
    .unwrap();
    fs::write(pool.join("volumes/used/data/file"), CONTENT).unwrap();
    fs::create_dir(target).unwrap();
    let data = pool.join("volumes/used/data");
    mount(Some(&data), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

#[needs(Root)]
fn a_pool_of_an_earlier_version_keeps_its_volumes_and_mounts() {
    let scratch = Scratch::new();
    let (pool, pods) = (scratch.path("pool"), scratch.mkdir("pods"));
    let (target, other) = (pods.join("target"), pods.join("other"));
    make_old_pool(&scratch, &pool, &target);
    let mut process = Driver::new(&scratch).pool("default", &pool).spawn();
    let client = process.connect_ready();
    client.probe().unwrap();
    assert_eq!(client.list(0), ["unused", "used"]);
    assert!(is_mounted(&target));
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), CONTENT);
    // A repeated create finds the volume, and the existing mount is known.
    assert_eq!(client.create("used").unwrap().volume_id, "used");
    client.delete("used").expect_err("a mounted volume was deleted");
    client.stats("used", &target.to_string_lossy()).unwrap();
    client.publish("used", &other).unwrap();
    assert_eq!(fs::read_to_string(other.join("file")).unwrap(), CONTENT);
    client.unpublish("used", &target).unwrap();
    client.unpublish("used", &other).unwrap();
    client.publish("unused", &target).unwrap();
    client.unpublish("unused", &target).unwrap();
    client.delete("used").unwrap();
    client.delete("unused").unwrap();
    assert!(names(pool.join("volumes")).is_empty());
    wait_until("the trash is empty", || names(pool.join("trash")).is_empty());
}
