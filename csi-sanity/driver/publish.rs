//! Volumes are mounted as requested; a wrong or empty directory is never mounted in place of a volume.

use hostdir::csi::proto::CreateVolumeRequest;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir_lab::client::{create_request, map};
use hostdir_lab::scene::start;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Driver, Mount, Process, Scratch, needs, wait_until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tonic::Code;

/// A driver with one pool, and a directory for targets.
pub(super) struct Node {
    pub(super) scratch: Scratch,
    pub(super) process: Process,
    pub(super) client: Client,
    pub(super) pods: PathBuf,
}

impl Node {
    pub(super) fn new() -> Self {
        let scratch = Scratch::new();
        let (process, client) = start(&driver(&scratch));
        let pods = scratch.mkdir("pods");
        Self {
            scratch,
            process,
            client,
            pods,
        }
    }

    pub(super) fn restart(self) -> Self {
        let Self {
            scratch,
            process,
            client,
            pods,
        } = self;
        process.kill();
        drop(client);
        let (process, client) = start(&driver(&scratch));
        Self {
            scratch,
            process,
            client,
            pods,
        }
    }

    pub(super) fn target(&self, name: &str) -> PathBuf {
        self.pods.join(name)
    }

    pub(super) fn publish_as(&self, target: &Path, mount: Mount) -> Result<(), tonic::Status> {
        self.client.publish_as("pvc-1", &target.to_string_lossy(), mount)
    }
}

pub(super) fn driver(scratch: &Scratch) -> Driver {
    Driver::new(scratch).pool("default", &scratch.path("pool"))
}

/// The options of the mount at a path, from the mount table.
pub(super) fn options(path: &Path) -> String {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(4) == path.to_str())
        .expect("the path is mounted");
    line.split(' ').nth(5).unwrap().to_owned()
}

#[needs(Root)]
fn the_first_publish_makes_the_directory_and_later_ones_find_the_data() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    let data = node.scratch.path("pool/volumes/pvc-1/data");
    assert!(!data.exists(), "data/ was made before the first publish");
    node.client.publish("pvc-1", &target).unwrap();
    let made = fs::metadata(&target).unwrap();
    assert_eq!((made.mode() & 0o7777, made.uid(), made.gid()), (0o770, 0, 0));
    fs::write(target.join("file"), "kept").unwrap();
    node.client.unpublish("pvc-1", &target).unwrap();
    assert!(!target.exists());
    let node = node.restart();
    node.client.publish("pvc-1", &target).unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "kept");
}

#[needs(Root)]
fn a_pod_that_is_not_root_writes_through_its_group() {
    let node = Node::new();
    for path in [node.scratch.path(""), node.pods.clone()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let write = |target: &Path, user: u32, group: u32| {
        let touch = Command::new("touch")
            .arg(target.join("file"))
            .uid(user)
            .gid(group)
            .output()
            .unwrap();
        touch.status.success()
    };
    node.client.create("pvc-1").unwrap();
    let target = node.target("a");
    node.client.publish("pvc-1", &target).unwrap();
    assert!(!write(&target, 1000, 2000), "a user without any right could write");
    // What the kubelet does for fsGroup 2000 (fsGroupPolicy File): SetVolumeOwnership, pkg/volume/volume_linux.go.
    chown(&target, None, Some(2000)).unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o2770)).unwrap();
    assert!(write(&target, 1000, 2000), "a user with fsGroup could not write");
    let file = fs::metadata(target.join("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (1000, 2000));
    // A later publish does not change owner and mode.
    node.client.unpublish("pvc-1", &target).unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    assert_eq!(fs::metadata(&target).unwrap().gid(), 2000);

    // Without fsGroup the StorageClass can name the owner.
    let parameters = map(&[("uid", "1000"), ("gid", "1000"), ("mode", "0700")]);
    node.client
        .create_as(CreateVolumeRequest {
            parameters,
            ..create_request("pvc-2")
        })
        .unwrap();
    let target = node.target("b");
    node.client.publish("pvc-2", &target).unwrap();
    assert!(write(&target, 1000, 1000), "the owner could not write");
}

type Flags = &'static [&'static str];

#[needs(Root)]
fn mount_options_are_set_before_anybody_sees_the_mount() {
    let node = Node::new();
    node.client.create("pvc-1").unwrap();
    let cases: [(&str, bool, Mode, Flags, Flags); 5] = [
        ("plain", false, Mode::SingleNodeMultiWriter, &[], &["rw"]),
        ("read-only", true, Mode::SingleNodeMultiWriter, &[], &["ro"]),
        ("reader", false, Mode::SingleNodeReaderOnly, &[], &["ro"]),
        ("option", false, Mode::SingleNodeWriter, &["ro"], &["ro"]),
        (
            "all",
            false,
            Mode::SingleNodeWriter,
            &["nosuid", "nodev", "noexec", "noatime"],
            &["rw", "nosuid", "nodev", "noexec", "noatime"],
        ),
    ];
    for (name, read_only, mode, flags, expected) in cases {
        let target = node.target(name);
        let wanted = Mount {
            mode,
            read_only,
            flags: flags.to_vec(),
            ..Mount::default()
        };
        node.publish_as(&target, wanted.clone()).unwrap();
        let options = options(&target);
        for option in expected {
            assert!(
                options.split(',').any(|set| set == *option),
                "{name}: {option} is not in {options}"
            );
        }
        let written = fs::write(target.join("file"), "x");
        assert_eq!(written.is_err(), expected.contains(&"ro"), "{name}: {written:?}");
        node.publish_as(&target, wanted).expect("publish is idempotent");
        let other = Mount {
            read_only: !expected.contains(&"ro"),
            ..Mount::default()
        };
        let status = node
            .publish_as(&target, other)
            .expect_err("other options at the same target");
        assert_eq!(status.code(), Code::AlreadyExists, "{name}: {status}");
    }
}

#[needs(Root)]
fn a_missing_data_directory_is_an_error_and_never_made_again() {
    let node = Node::new();
    let target = node.target("a");
    for (id, lost) in [("pvc-1", "volumes/pvc-1/data"), ("pvc-2", "volumes/pvc-2")] {
        let volume = node.client.create(id).unwrap();
        node.client.publish(id, &target).unwrap();
        node.client.unpublish(id, &target).unwrap();
        fs::rename(node.scratch.path("pool").join(lost), node.scratch.path("elsewhere")).unwrap();
        let status = node.client.publish(id, &target).unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains(&volume.volume_context["poolId"]), "{status}");
        assert!(
            !target.exists() && !node.scratch.path("pool").join(lost).exists(),
            "publish made {lost} or the target"
        );
        fs::rename(node.scratch.path("elsewhere"), node.scratch.path("pool").join(lost)).unwrap();
        node.client.publish(id, &target).expect("the directory is back");
        node.client.unpublish(id, &target).unwrap();
    }
}

#[needs(Root)]
fn a_new_disk_is_not_mistaken_for_the_old_one() {
    let scratch = Scratch::new();
    let disk = scratch.tmpfs("disk", "16M");
    let pool = disk.join("pool");
    let driver = Driver::new(&scratch).pool("default", &pool);
    let (process, client) = start(&driver);
    let volume = client.create("pvc-1").unwrap();
    let target = scratch.mkdir("pods").join("a");
    client.publish("pvc-1", &target).unwrap();
    client.unpublish("pvc-1", &target).unwrap();

    // Another disk is mounted over the old one while the driver runs.
    let other_disk = || {
        mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=16M")).unwrap();
        fs::create_dir(&pool).unwrap();
    };
    other_disk();
    for status in [
        client.create("pvc-2").unwrap_err(),
        client.publish("pvc-1", &target).unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("unmounted or replaced"), "{status}");
    }
    wait_until("the pool is not ready", || {
        client
            .probe()
            .is_err_and(|status| status.code() == Code::FailedPrecondition)
    });
    assert_eq!(
        client.delete("pvc-1").unwrap_err().code(),
        Code::Unavailable,
        "the volume may be on the old disk"
    );
    umount2(&disk, MntFlags::empty()).unwrap();
    wait_until("the old disk is back", || client.probe().is_ok());
    client.publish("pvc-1", &target).unwrap();
    client.unpublish("pvc-1", &target).unwrap();
    process.kill();

    // A new disk, found at start.
    other_disk();
    let (_process, client) = start(&driver);
    let mount = Mount {
        context: volume.volume_context.clone(),
        ..Mount::default()
    };
    let status = client
        .publish_as("pvc-1", &target.to_string_lossy(), mount)
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let new = client.create("pvc-2").unwrap().volume_context["poolId"].clone();
    for id in [&volume.volume_context["poolId"], &new] {
        assert!(
            status.message().contains(id.as_str()),
            "{status} does not name pool {id}"
        );
    }
    assert!(!target.exists());
}

#[needs(Root)]
fn mounts_inside_a_volume_do_not_show_in_the_pod() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    fs::create_dir(target.join("dir")).unwrap();
    node.client.unpublish("pvc-1", &target).unwrap();
    let dir = node.scratch.path("pool/volumes/pvc-1/data/dir");
    mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    fs::write(dir.join("foreign"), "x").unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    assert_eq!(names(target.join("dir")), [""; 0]);
}

#[needs(Root)]
fn statistics_need_the_path_where_the_volume_is_mounted() {
    let node = Node::new();
    let target = node.target("a");
    let path = target.to_string_lossy().into_owned();
    node.client.create("pvc-1").unwrap();
    assert_eq!(node.client.stats("pvc-1", &path).unwrap_err().code(), Code::NotFound);
    node.client.publish("pvc-1", &target).unwrap();
    let usage = node.client.stats("pvc-1", &path).unwrap();
    assert_eq!(usage.len(), 2, "bytes and inodes");
    assert!(
        usage
            .iter()
            .all(|unit| unit.total > 0 && unit.used > 0 && unit.available > 0),
        "{usage:?}"
    );
    for (id, path) in [
        ("pvc-2", path.as_str()),
        ("pvc-1", "/"),
        ("pvc-1", "some/path"),
        ("pvc-1", "/no/such"),
    ] {
        assert_eq!(node.client.stats(id, path).unwrap_err().code(), Code::NotFound);
    }
}
