//! Broken pools: absent, read-only, full, replaced, damaged.

use super::place::Place;
use hostdir_lab::scene::start;
use hostdir_lab::scratch::{names, remount};
use hostdir_lab::{Client, Driver, Process, Scratch, needs, wait_until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{self, SFlag, mknod};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use tonic::Code;

#[needs(Root)]
fn broken_records_are_named_and_unknown_files_left_alone() {
    let place = Place::new();
    let volumes = place.scratch.path("pool/volumes");
    for id in ["torn", "newer", "foreign", "missing", "restored", "fine"] {
        place.used_volume(id);
        fs::write(place.data(id).join("file"), "data").unwrap();
    }
    fs::write(volumes.join("torn/volume.json"), "{\"format\": 1, \"id").unwrap();
    let record = fs::read_to_string(volumes.join("newer/volume.json")).unwrap();
    fs::write(
        volumes.join("newer/volume.json"),
        record.replace("\"format\": 1", "\"format\": 2"),
    )
    .unwrap();
    fs::copy(volumes.join("fine/volume.json"), volumes.join("foreign/volume.json")).unwrap();
    fs::remove_file(volumes.join("missing/volume.json")).unwrap();
    fs::create_dir(volumes.join("Not A Volume")).unwrap();
    fs::write(volumes.join("README"), "notes").unwrap();

    let saved = fs::read(volumes.join("restored/volume.json")).unwrap();
    fs::write(volumes.join("restored/volume.json"), "").unwrap();

    let place = place.restart();
    place.client.publish("restored", &place.target()).unwrap_err();
    fs::write(volumes.join("restored/volume.json"), saved).unwrap();
    wait_until("the record is read again", || {
        place.client.publish("restored", &place.target()).is_ok()
    });
    place.client.unpublish("restored", &place.target()).unwrap();
    place.delete_and_wait("restored");
    for (id, word) in [
        ("torn", "EOF"),
        ("newer", "format 2"),
        ("foreign", "volume fine"),
        ("missing", "missing"),
    ] {
        for status in [
            place.client.publish(id, &place.target()).unwrap_err(),
            place.client.create(id).unwrap_err(),
        ] {
            assert_eq!(status.code(), Code::FailedPrecondition);
            assert!(
                status.message().contains(word) && status.message().contains(id),
                "{word}: {status}"
            );
        }
        assert!(place.data(id).join("file").exists(), "the data of {id} was removed");
        place.delete_and_wait(id);
    }
    assert_eq!(place.client.list(0), ["fine"]);
    assert_eq!(names(&volumes), ["Not A Volume", "README", "fine"]);
}

/// Starts the driver, and checks that it reports its pool as unusable with a message that contains `word`.
fn unusable(driver: &Driver, word: &str) -> (Process, Client) {
    let (process, client) = start(driver);
    let status = client.probe().expect_err(word);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(word), "{word:?} is not in {status}");
    assert_eq!(client.create("pvc-1").unwrap_err().code(), Code::Unavailable);
    assert_eq!(client.delete("pvc-1").unwrap_err().code(), Code::Unavailable);
    assert_eq!(client.capacity("default"), 0);
    (process, client)
}

#[needs(Root)]
fn a_pool_that_is_a_link_or_a_file_is_refused() {
    let scratch = Scratch::new();
    let real = scratch.mkdir("real");
    symlink(&real, scratch.path("link")).unwrap();
    fs::write(scratch.path("file"), "x").unwrap();
    let driver = |pool: PathBuf| Driver::new(&scratch).pool("default", &pool);
    drop(unusable(&driver(scratch.path("link")), "symbolic link"));
    drop(unusable(&driver(scratch.path("link/pool")), "symbolic link"));
    drop(unusable(&driver(scratch.path("file")), "not a directory"));
    drop(unusable(&driver(scratch.path("no/such/parent")), "cannot be made"));
    assert_eq!(names(&real), [""; 0]);
}

#[needs(Root)]
fn an_absent_pool_is_used_as_soon_as_it_exists() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("disk/pool"));
    let (_process, client) = unusable(&driver, "does not exist");
    scratch.mkdir("disk");
    client.probe().expect("the pool's parent directory exists now");
    client.create("pvc-1").unwrap();
}

#[needs(Root)]
fn a_disk_that_is_not_mounted_is_not_mistaken_for_an_empty_pool() {
    let scratch = Scratch::new();
    let disk = scratch.mkdir("disk");
    let config = format!(
        "pools: [{{name: default, path: {}/pool, requireMount: true}}]\n",
        disk.display()
    );
    fs::write(scratch.path("config.yaml"), config).unwrap();
    let driver = Driver::new(&scratch)
        .arg("--config")
        .arg(scratch.path("config.yaml").display().to_string());
    drop(unusable(&driver, "requireMount is set"));
    assert_eq!(names(&disk), [""; 0], "a pool was made on the wrong filesystem");
    fs::create_dir(disk.join("pool")).unwrap();
    drop(unusable(&driver, "not on a disk of its own"));
    assert_eq!(names(disk.join("pool")), [""; 0]);
    scratch.tmpfs("disk", "16M");
    fs::create_dir(disk.join("pool")).unwrap();
    let (_process, client) = start(&driver);
    client.probe().expect("the disk is mounted");
}

#[needs(Root)]
fn a_directory_with_foreign_files_does_not_become_a_pool() {
    let scratch = Scratch::new();
    let dir = scratch.mkdir("dir");
    fs::create_dir_all(dir.join("trash/important")).unwrap();
    fs::write(dir.join("notes"), "mine").unwrap();
    fs::create_dir(dir.join("lost+found")).unwrap();
    let driver = Driver::new(&scratch).pool("default", &dir);
    let (_process, client) = unusable(&driver, "not empty (2 entries, such as notes, trash)");
    assert_eq!(
        names(&dir),
        ["lost+found", "notes", "trash"],
        "something was made there"
    );
    fs::remove_file(dir.join("notes")).unwrap();
    fs::rename(dir.join("trash/important"), scratch.path("important")).unwrap();
    wait_until("the pool is made", || client.create("pvc-1").is_ok());
}

#[needs(Root)]
fn a_read_only_pool_says_so() {
    let scratch = Scratch::new();
    let disk = scratch.tmpfs("disk", "16M");
    let driver = Driver::new(&scratch).pool("default", &disk);
    let target = scratch.mkdir("pods").join("a");
    let (process, client) = start(&driver);
    client.create("pvc-1").unwrap();
    client.publish("pvc-1", &target).unwrap();
    drop((process, client));
    remount(&disk, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY);
    let (_process, client) = start(&driver);
    let status = client.probe().unwrap_err();
    assert!(status.message().contains("Read-only file system"), "{status}");
    assert_eq!(client.create("pvc-2").unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(client.capacity("default"), 0);
    client
        .unpublish("pvc-1", &target)
        .expect("unpublish works on a read-only disk");
    let status = client.delete("pvc-1").unwrap_err();
    assert!(status.message().contains("Read-only file system"), "{status}");
    assert!(disk.join("volumes/pvc-1/data").exists());
    // The volume can still be read.
    client
        .publish("pvc-1", &target)
        .expect_err("a writable mount on a read-only disk");
    let mount = hostdir_lab::Mount {
        read_only: true,
        ..hostdir_lab::Mount::default()
    };
    client.publish_as("pvc-1", &target.to_string_lossy(), mount).unwrap();
}

#[needs(Root)]
fn a_full_pool_answers_clearly_and_deletes_still_work() {
    let scratch = Scratch::new();
    let disk = scratch.tmpfs("disk", "4M");
    let (_process, client) = start(&Driver::new(&scratch).pool("default", &disk));
    let target = scratch.mkdir("pods").join("a");
    for id in ["pvc-1", "pvc-2"] {
        client.create(id).unwrap();
    }
    client.publish("pvc-1", &target).unwrap();
    while fs::write(target.join(format!("fill-{}", names(&target).len())), vec![0; 64 << 10]).is_ok() {}
    let _ = fs::write(target.join("last"), vec![0; 1]);
    client.probe().expect("a full pool is usable");
    wait_until("there is no room", || client.capacity("default") == 0);
    let status = client.create("pvc-3").unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    let status = client.publish("pvc-2", &scratch.path("pods/b")).unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("No space left"), "{status}");
    client.unpublish("pvc-1", &target).unwrap();
    client.delete("pvc-1").unwrap();
    wait_until("the trash is empty", || names(disk.join("trash")).is_empty());
    client
        .publish("pvc-2", &scratch.path("pods/b"))
        .expect("there is room again");
}

#[needs(Root)]
fn a_pool_without_its_identity_is_refused_while_it_has_volumes() {
    let place = Place::new();
    place.used_volume("pvc-1");
    let identity = place.scratch.path("pool/.hostdir/pool.json");
    let content = fs::read(&identity).unwrap();
    let Place { scratch, process, .. } = place;
    process.kill();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    fs::remove_file(&identity).unwrap();
    drop(unusable(&driver, "pool.json is missing"));
    assert!(!identity.exists());
    fs::write(&identity, "{").unwrap();
    drop(unusable(&driver, "pool.json cannot be read"));
    fs::write(&identity, content).unwrap();
    let (_process, client) = start(&driver);
    assert_eq!(client.list(0), ["pvc-1"]);
}

#[needs(Root)]
fn a_pool_with_another_id_than_configured_is_refused() {
    let scratch = Scratch::new();
    let pool = scratch.path("pool");
    let expecting = |id: &str| {
        let config = format!("pools: [{{name: default, path: {}, poolId: {id}}}]\n", pool.display());
        fs::write(scratch.path("config.yaml"), config).unwrap();
        let config = scratch.path("config.yaml").display().to_string();
        Driver::new(&scratch).arg("--config").arg(config)
    };
    let other = "00000000-0000-4000-8000-000000000000";
    drop(unusable(&expecting(other), other));
    assert!(
        !pool.join(".hostdir/pool.json").exists(),
        "a new pool was made in place of the configured one"
    );
    start(&Driver::new(&scratch).pool("default", &pool)).0.kill();
    let identity = fs::read_to_string(pool.join(".hostdir/pool.json")).unwrap();
    let identity: serde_json::Value = serde_json::from_str(&identity).unwrap();
    let id = identity["id"].as_str().unwrap();
    let (process, client) = unusable(&expecting(other), other);
    assert!(
        client.probe().unwrap_err().message().contains(id),
        "the message does not name the pool's own id"
    );
    process.kill();
    let (_process, client) = start(&expecting(id));
    client.create("pvc-1").unwrap();
}

#[needs(Root)]
fn one_bad_pool_does_not_stop_the_others() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .pool("bad", &scratch.path("no/disk"));
    let (_process, client) = start(&driver);
    client.probe().expect("sidecars exit when Probe fails");
    let probe = std::process::Command::new(hostdir_lab::harness::hostdir())
        .args(["probe", "--ready", "--endpoint"])
        .arg(format!("unix://{}", driver.socket.display()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&probe.stderr);
    assert!(
        !probe.status.success() && text.contains("pool bad") && !text.contains("pool default"),
        "{text}"
    );
    client.create("pvc-1").unwrap();
    client.publish("pvc-1", &scratch.mkdir("pods").join("a")).unwrap();
}

#[needs(Root)]
fn a_delete_fails_if_the_trash_directory_is_missing() {
    let place = Place::new();
    place.used_volume("pvc-1");
    fs::remove_dir(place.scratch.path("pool/trash")).unwrap();
    let status = place.client.delete("pvc-1").unwrap_err();
    assert!(status.message().contains("restart hostdir"), "{status}");
    assert!(place.data("pvc-1").exists());
    assert_eq!(place.client.list(0), ["pvc-1"]);
    let place = place.restart();
    place.delete_and_wait("pvc-1");
}

#[needs(Root)]
fn a_pool_opens_although_its_trash_cannot_be_erased() {
    let place = Place::new();
    // An unfinished volume, whose name in the trash is taken by a directory that cannot be erased.
    let taken = place.scratch.path("pool/trash/pvc-1.0.0");
    for dir in [&place.scratch.path("pool/.hostdir/new/pvc-1.0"), &taken] {
        fs::create_dir_all(dir.join("data")).unwrap();
    }
    mount(
        Some("tmpfs"),
        &taken.join("data"),
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let place = place.restart();
    place.client.probe().expect("the pool is open");
    place.used_volume("pvc-1");
    umount2(&taken.join("data"), MntFlags::empty()).unwrap();
    place.restart().delete_and_wait("pvc-1");
}

#[needs(Root)]
fn links_and_mounts_inside_the_pool_are_not_followed() {
    let place = Place::new();
    // A link that stays in the volume's own directory.
    place.used_volume("pvc-1");
    fs::rename(place.data("pvc-1"), place.data("pvc-1").with_file_name("elsewhere")).unwrap();
    symlink("elsewhere", place.data("pvc-1")).unwrap();
    place
        .client
        .publish("pvc-1", &place.target())
        .expect_err("a link was mounted");
    place.used_volume("pvc-2");
    let covered = place.data("pvc-2");
    mount(Some("tmpfs"), &covered, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    place
        .client
        .publish("pvc-2", &place.target())
        .expect_err("another filesystem was mounted");
    umount2(&covered, MntFlags::empty()).unwrap();
    place.client.publish("pvc-2", &place.target()).unwrap();
}

#[needs(Root)]
fn records_that_are_not_files_and_pools_of_another_format_are_refused() {
    let place = Place::new();
    place.used_volume("pvc-1");
    let record = place.scratch.path("pool/volumes/pvc-1/volume.json");
    fs::remove_file(&record).unwrap();
    mknod(&record, SFlag::S_IFIFO, stat::Mode::from_bits_truncate(0o600), 0).unwrap();
    let place = place.restart();
    assert_eq!(
        place.client.publish("pvc-1", &place.target()).unwrap_err().code(),
        Code::FailedPrecondition
    );
    let identity = place.scratch.path("pool/.hostdir/pool.json");
    let content = fs::read_to_string(&identity).unwrap();
    let change = |from: &str, to: &str| {
        assert!(content.contains(from));
        fs::write(&identity, content.replace(from, to)).unwrap();
    };
    let Place { scratch, process, .. } = place;
    process.kill();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("pool"));
    change("\"format\": 1", "\"format\": 2");
    drop(unusable(&driver, "format 2"));
    // Earlier versions of hostdir did not write "foreign".
    let foreign = content
        .split("\"foreign\"")
        .next()
        .unwrap()
        .trim_end()
        .trim_end_matches(',')
        .to_owned();
    fs::write(&identity, format!("{foreign}\n}}")).unwrap();
    let (_process, client) = start(&driver);
    client.probe().unwrap();
}

#[needs(Root)]
fn publishing_a_volume_whose_directory_was_removed_says_so() {
    let place = Place::new();
    place.client.create("pvc-1").unwrap();
    fs::rename(place.scratch.path("pool/volumes/pvc-1"), place.scratch.path("moved")).unwrap();
    let status = place.client.publish("pvc-1", &place.target()).unwrap_err();
    assert!(
        status.message().contains("delete the volume and create it again"),
        "{status}"
    );
    place.client.delete("pvc-1").unwrap();
    place.client.create("pvc-1").unwrap();
}
