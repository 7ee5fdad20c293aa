//! Hostile and broken input: a clear error, and nothing outside the pool is touched.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use hostdir::csi::proto::ValidateVolumeCapabilitiesRequest;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{self, SFlag, mknod};
use tonic::{Code, Status};

use hostdir_lab::client::{capability, create_request};
use hostdir_lab::scene::start;
use hostdir_lab::scratch::{is_mounted, mounts_below, names, remount};
use hostdir_lab::{Client, Driver, Process, Scratch, needs, wait_until};

/// A driver, and things beside its pool that must stay as they are.
struct Place {
    scratch: Scratch,
    process: Process,
    client: Client,
    outside: Vec<(PathBuf, String)>,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        let outside = [
            "etc/passwd",
            "pods/neighbour/file",
            "volumes/pvc-1/volume.json",
            "outside/file",
        ];
        let outside = outside.map(|name| {
            fs::create_dir_all(scratch.path(name).parent().unwrap()).unwrap();
            fs::write(scratch.path(name), name).unwrap();
            (scratch.path(name), name.to_owned())
        });
        let (process, client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
        Self {
            scratch,
            process,
            client,
            outside: outside.to_vec(),
        }
    }

    fn target(&self) -> PathBuf {
        self.scratch.path("pods/target")
    }

    fn data(&self, id: &str) -> PathBuf {
        self.scratch.path("pool/volumes").join(id).join("data")
    }

    /// A volume that a pod has used.
    fn used_volume(&self, id: &str) {
        self.client.create(id).unwrap();
        self.client.publish(id, &self.target()).unwrap();
        self.client.unpublish(id, &self.target()).unwrap();
    }

    fn delete_and_wait(&self, id: &str) {
        self.client.delete(id).unwrap();
        let trash = self.scratch.path("pool/trash");
        wait_until("the trash is empty", || names(&trash).is_empty());
        self.check_outside();
    }

    fn restart(self) -> Self {
        let Self {
            scratch,
            process,
            client,
            outside,
        } = self;
        process.kill();
        drop(client);
        let (process, client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
        Self {
            scratch,
            process,
            client,
            outside,
        }
    }

    fn check_outside(&self) {
        for (path, content) in &self.outside {
            let now = fs::read_to_string(path).unwrap_or_else(|error| panic!("{} was harmed: {error}", path.display()));
            assert_eq!(now, *content, "{} was changed", path.display());
        }
    }
}

#[needs(Root)]
fn hostile_volume_ids_reach_nothing() {
    let place = Place::new();
    let client = &place.client;
    let long = "a".repeat(129);
    let target = place.target();
    let ids = [
        "../../etc",
        "..",
        ".",
        "/etc",
        "/",
        "a/b",
        "a/../b",
        ".hostdir",
        "",
        "a\0b",
        "a\nb",
        "ä",
        "\u{202e}x",
        &long,
        "PVC-1",
        "pvc_1",
        "-a",
        "pvc-1/data",
        "$(id)",
        "a;b",
        "*",
        "%2e%2e",
    ];
    for id in ids {
        let validate = ValidateVolumeCapabilitiesRequest {
            volume_id: id.to_owned(),
            volume_capabilities: vec![capability(Mode::SingleNodeWriter, &[])],
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        let answers: [(&str, Result<(), Status>); 5] = [
            ("delete", client.delete(id)),
            ("publish", client.publish(id, &target)),
            ("unpublish", client.unpublish(id, &target)),
            ("stats", client.stats(id, "/").map(drop)),
            (
                "validate",
                client
                    .wait(client.controller().validate_volume_capabilities(validate))
                    .map(drop),
            ),
        ];
        for (call, answer) in answers {
            let status = answer.expect_err(id);
            assert_eq!(status.code(), Code::InvalidArgument, "{call} of {id:?}: {status}");
            assert!(
                status.message().contains("volume_id") || status.message().contains("volume id"),
                "{status}"
            );
        }
    }
    place.check_outside();
    assert!(!target.exists());
    assert_eq!(names(place.scratch.path("pool")), [".hostdir", "trash", "volumes"]);
}

#[needs(Root)]
fn hostile_names_become_harmless_ids() {
    let place = Place::new();
    for name in [
        "../../etc",
        "/etc",
        "..",
        ".hostdir",
        "a b",
        "ÄÖÜ",
        "$(reboot)",
        "PVC-1",
        &"x".repeat(128),
    ] {
        let volume = place.client.create(name).unwrap();
        assert!(
            volume.volume_id.starts_with("hash-"),
            "{name} became {}",
            volume.volume_id
        );
        assert_eq!(place.client.create(name).unwrap(), volume);
        place.client.publish(&volume.volume_id, &place.target()).unwrap();
        place.client.unpublish(&volume.volume_id, &place.target()).unwrap();
        place.client.delete(&volume.volume_id).unwrap();
    }
    for name in ["", "a\0b", "a\nb", "\u{7f}", &"x".repeat(129)] {
        let status = place.client.create_as(create_request(name)).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name:?}");
    }
    place.check_outside();
}

#[needs(Root)]
fn hostile_targets_are_refused() {
    let place = Place::new();
    let pods = place.scratch.path("pods");
    place.used_volume("pvc-1");
    symlink(place.scratch.path("outside"), pods.join("link")).unwrap();
    symlink("/nowhere", pods.join("dangling")).unwrap();
    fs::write(pods.join("file"), "in the way").unwrap();
    let in_pods = |name: &str| pods.join(name).display().to_string();
    let cases = [
        ("pods/a".to_owned(), Code::InvalidArgument, "absolute"),
        (in_pods("../pods/a"), Code::InvalidArgument, "'..'"),
        (in_pods("./a"), Code::InvalidArgument, "'.'"),
        ("/".to_owned(), Code::InvalidArgument, "root"),
        (in_pods("a\0b"), Code::InvalidArgument, "NUL"),
        (format!("/{}", "a/".repeat(3000)), Code::InvalidArgument, "longer"),
        (in_pods("link/a"), Code::InvalidArgument, "symbolic link"),
        (in_pods("missing/a"), Code::InvalidArgument, "does not exist"),
        (in_pods("file/a"), Code::InvalidArgument, "no directory"),
        (in_pods("link"), Code::FailedPrecondition, "no directory"),
        (in_pods("dangling"), Code::FailedPrecondition, "no directory"),
        (in_pods("file"), Code::FailedPrecondition, "no directory"),
        (in_pods("neighbour"), Code::FailedPrecondition, "files in it"),
    ];
    for (target, code, word) in cases {
        let status = place
            .client
            .publish_as("pvc-1", &target, hostdir_lab::Mount::default())
            .expect_err(&target);
        assert_eq!(status.code(), code, "{target:.80}: {status}");
        assert!(
            status.message().contains(word) && status.message().contains("pvc-1"),
            "{word}: {status}"
        );
        if code == Code::FailedPrecondition {
            place
                .client
                .unpublish_at("pvc-1", &target)
                .expect_err("unpublish removed what hostdir did not make");
        }
        place.check_outside();
    }
    assert_eq!(fs::read_to_string(pods.join("file")).unwrap(), "in the way");
    assert_eq!(fs::read_link(pods.join("dangling")).unwrap(), Path::new("/nowhere"));
    assert_eq!(names(place.scratch.path("outside")), ["file"]);
    assert!(!pods.join("missing").exists());
}

#[needs(Root)]
fn a_foreign_mount_at_the_target_is_left_alone() {
    let place = Place::new();
    place.used_volume("pvc-1");
    place.used_volume("pvc-2");
    let target = place.target();
    let foreign = place.scratch.tmpfs("pods/target", "1M");
    fs::write(foreign.join("file"), "foreign").unwrap();
    let status = place.client.publish("pvc-1", &target).unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    let status = place.client.unpublish("pvc-1", &target).unwrap_err();
    assert!(status.message().contains("not this volume"), "{status}");
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "foreign");
    umount2(&target, MntFlags::empty()).unwrap();

    // Another volume of ours is as foreign.
    place.client.publish("pvc-2", &target).unwrap();
    assert_eq!(
        place.client.publish("pvc-1", &target).unwrap_err().code(),
        Code::AlreadyExists
    );
    place
        .client
        .unpublish("pvc-1", &target)
        .expect_err("the wrong volume was unmounted");
    assert!(is_mounted(&target));
    place.client.unpublish("pvc-2", &target).unwrap();
}

#[needs(Root)]
fn whatever_a_tenant_plants_is_erased_and_leads_nowhere() {
    let place = Place::new();
    place.used_volume("pvc-1");
    let data = place.data("pvc-1");
    let mode = stat::Mode::from_bits_truncate(0o600);
    for dir in ["", "dir", "dir/deep"] {
        let dir = data.join(dir);
        fs::create_dir_all(&dir).unwrap();
        symlink(place.scratch.path("outside"), dir.join("link-to-dir")).unwrap();
        symlink(place.scratch.path("outside/file"), dir.join("link-to-file")).unwrap();
        symlink("/", dir.join("link-to-root")).unwrap();
        symlink("..", dir.join("link-up")).unwrap();
        mknod(&dir.join("fifo"), SFlag::S_IFIFO, mode, 0).unwrap();
        mknod(&dir.join("disk"), SFlag::S_IFBLK, mode, stat::makedev(7, 0)).unwrap();
        mknod(&dir.join("null"), SFlag::S_IFCHR, mode, stat::makedev(1, 3)).unwrap();
        drop(UnixListener::bind(dir.join("socket")).unwrap());
        fs::hard_link(place.scratch.path("outside/file"), dir.join("hard-link")).unwrap();
        fs::write(dir.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8 \n")), "x").unwrap();
        fs::write(dir.join("n".repeat(255)), "x").unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o000)).unwrap();
    }
    place.delete_and_wait("pvc-1");
    assert_eq!(fs::metadata(place.scratch.path("outside/file")).unwrap().nlink(), 1);
}

#[needs(Root)]
fn a_data_directory_that_became_a_link_is_not_followed() {
    let place = Place::new();
    place.used_volume("pvc-1");
    fs::remove_dir(place.data("pvc-1")).unwrap();
    symlink(place.scratch.path("outside"), place.data("pvc-1")).unwrap();
    place
        .client
        .publish("pvc-1", &place.target())
        .expect_err("a link was mounted");
    assert!(!place.target().exists());
    place.delete_and_wait("pvc-1");

    // A whole volume directory replaced by a link.
    place.used_volume("pvc-2");
    fs::rename(place.scratch.path("pool/volumes/pvc-2"), place.scratch.path("moved")).unwrap();
    symlink(place.scratch.path("moved"), place.scratch.path("pool/volumes/pvc-2")).unwrap();
    place
        .client
        .publish("pvc-2", &place.target())
        .expect_err("a link was mounted");
    place.delete_and_wait("pvc-2");
    assert!(place.scratch.path("moved/data").exists());
}

#[needs(Root)]
fn a_tree_of_4000_levels_is_erased() {
    let place = Place::new();
    place.used_volume("pvc-1");
    let mut dir: std::os::fd::OwnedFd = fs::File::open(place.data("pvc-1")).unwrap().into();
    for _ in 0..4000 {
        stat::mkdirat(&dir, "d", stat::Mode::S_IRWXU).unwrap();
        let flags = nix::fcntl::OFlag::O_DIRECTORY;
        dir = nix::fcntl::openat(&dir, "d", flags, stat::Mode::empty()).unwrap();
    }
    drop(dir);
    place.delete_and_wait("pvc-1");
}

#[needs(Root)]
fn a_million_files_are_erased_while_others_are_served() {
    let place = Place::new();
    place.used_volume("pvc-1");
    let dir = fs::File::open(place.data("pvc-1")).unwrap();
    for number in 0..1_000_000 {
        stat::mknodat(
            &dir,
            format!("{number}").as_str(),
            SFlag::S_IFREG,
            stat::Mode::S_IRWXU,
            0,
        )
        .unwrap();
    }
    drop(dir);
    place.client.delete("pvc-1").unwrap();
    assert!(
        !names(place.scratch.path("pool/trash")).is_empty(),
        "the delete waited for the eraser"
    );
    // Another volume lives its whole life meanwhile, also one of the same name.
    for id in ["pvc-1", "pvc-2"] {
        place.used_volume(id);
        place.client.delete(id).unwrap();
    }
    hostdir_lab::wait_for(std::time::Duration::from_mins(10), "the trash is empty", || {
        names(place.scratch.path("pool/trash")).is_empty()
    });
}

#[needs(Root, FileFlags)]
fn immutable_files_are_erased() {
    let place = Place::new();
    place.used_volume("pvc-1");
    let data = place.data("pvc-1");
    fs::create_dir_all(data.join("dir/deep")).unwrap();
    for name in ["file", "log", "dir/file", "dir/deep/file"] {
        fs::write(data.join(name), "x").unwrap();
    }
    let flags = [
        ("+i", "file"),
        ("+a", "log"),
        ("+i", "dir/deep/file"),
        ("+i", "dir/deep"),
        ("+a", "dir"),
        ("+i", ""),
    ];
    for (flag, name) in flags {
        let output = Command::new("chattr")
            .arg(flag)
            .arg(data.join(name))
            .output()
            .expect("run chattr");
        assert!(
            output.status.success(),
            "chattr: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    assert!(fs::write(data.join("file"), "y").is_err(), "chattr has no effect");
    place.delete_and_wait("pvc-1");
}

#[needs(Root)]
fn what_is_mounted_in_a_deleted_volume_is_not_erased() {
    let place = Place::new();
    place.used_volume("pvc-1");
    let data = place.data("pvc-1");
    for name in ["dir/on-dir", "plain"] {
        fs::create_dir_all(data.join(name)).unwrap();
    }
    fs::write(data.join("dir/on-file"), "").unwrap();
    let mounts = [
        ("outside", data.join("dir/on-dir")),
        ("outside/file", data.join("dir/on-file")),
    ];
    for (from, to) in &mounts {
        mount(
            Some(&place.scratch.path(from)),
            to,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
    }
    place.client.delete("pvc-1").unwrap();
    place.process.wait_for_log("something is mounted on it");
    place.check_outside();
    // All the rest is gone, and so are these as soon as nothing is mounted there.
    for mount_point in mounts_below(&place.scratch.path("pool")) {
        umount2(&mount_point, MntFlags::empty()).unwrap();
    }
    let place = place.restart();
    wait_until("the trash is empty", || {
        names(place.scratch.path("pool/trash")).is_empty()
    });
    place.check_outside();
}

#[needs(Root)]
fn broken_and_foreign_things_in_the_pool_are_named_and_left_alone() {
    let place = Place::new();
    let volumes = place.scratch.path("pool/volumes");
    for id in ["torn", "newer", "foreign", "missing", "fine"] {
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

    let place = place.restart();
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
        assert!(place.data(id).join("file").exists(), "data of {id} was touched");
        place.delete_and_wait(id);
    }
    assert_eq!(place.client.list(0), ["fine"]);
    assert_eq!(names(&volumes), ["Not A Volume", "README", "fine"]);
}

/// The driver with this pool; it starts, but says what is wrong with the pool.
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
    drop(unusable(&driver(scratch.path("file")), "no directory"));
    drop(unusable(&driver(scratch.path("no/such/parent")), "cannot be made"));
    assert_eq!(names(&real), [""; 0]);
}

#[needs(Root)]
fn a_pool_that_is_absent_is_used_as_soon_as_it_is_there() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch).pool("default", &scratch.path("disk/pool"));
    let (_process, client) = unusable(&driver, "does not exist");
    scratch.mkdir("disk");
    client.probe().expect("it is there now");
    client.create("pvc-1").unwrap();
}

#[needs(Root)]
fn a_disk_that_is_not_mounted_is_not_taken_for_an_empty_pool() {
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
        .expect("pods end on a read-only disk");
    let status = client.delete("pvc-1").unwrap_err();
    assert!(status.message().contains("Read-only file system"), "{status}");
    assert!(disk.join("volumes/pvc-1/data").exists());
    // What is there can still be read.
    client
        .publish("pvc-1", &target)
        .expect_err("writable on a read-only disk");
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
    client.probe().expect("a full pool is no broken pool");
    assert_eq!(client.capacity("default"), 0);
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
fn a_pool_is_the_one_that_was_written_down_or_refused() {
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
        "a pool was made in its place"
    );
    start(&Driver::new(&scratch).pool("default", &pool)).0.kill();
    let identity = fs::read_to_string(pool.join(".hostdir/pool.json")).unwrap();
    let identity: serde_json::Value = serde_json::from_str(&identity).unwrap();
    let id = identity["id"].as_str().unwrap();
    let (process, client) = unusable(&expecting(other), other);
    assert!(client.probe().unwrap_err().message().contains(id), "both ids are named");
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
    client.probe().expect("sidecars end when this fails");
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
fn a_trash_that_somebody_removed_is_no_success() {
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
fn what_lies_in_the_trash_does_not_keep_a_pool_from_opening() {
    let place = Place::new();
    // Half a volume, and the name it would get in the trash taken by something that cannot be erased.
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
fn links_and_mounts_inside_the_pool_are_not_walked_through() {
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
fn records_that_are_no_files_and_pools_of_another_format_are_refused() {
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
    // What an earlier hostdir did not write is not missed.
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
fn a_volume_whose_directory_was_removed_says_so() {
    let place = Place::new();
    place.client.create("pvc-1").unwrap();
    fs::rename(place.scratch.path("pool/volumes/pvc-1"), place.scratch.path("moved")).unwrap();
    let status = place.client.publish("pvc-1", &place.target()).unwrap_err();
    assert!(
        status.message().contains("delete the volume and make it anew"),
        "{status}"
    );
    place.client.delete("pvc-1").unwrap();
    place.client.create("pvc-1").unwrap();
}

#[needs(Root)]
fn whatever_is_in_a_request_the_refusal_is_short() {
    let place = Place::new();
    place.client.create("pvc-1").unwrap();
    let target = "x".repeat(1 << 20);
    let status = place.client.unpublish_at("pvc-1", &target).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().len() < 4096);
    assert!(place.process.log().len() < 64 << 10, "the log took it all");
}
