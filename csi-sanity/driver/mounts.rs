//! Several mounts of a volume, mounts that are in the way, and unmounting.

use super::publish::Node;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir_lab::scene::start;
use hostdir_lab::scratch::{is_mounted, names};
use hostdir_lab::{Driver, Mount, Scratch, needs};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use tonic::Code;

#[needs(Root)]
fn read_write_once_pod_allows_a_single_mount() {
    let node = Node::new();
    node.client.create("pvc-1").unwrap();
    let alone = || Mount {
        mode: Mode::SingleNodeSingleWriter,
        ..Mount::default()
    };
    let (first, second) = (node.target("first"), node.target("second"));
    node.publish_as(&first, alone()).unwrap();
    node.publish_as(&first, alone()).expect("publish is idempotent");
    for mount in [alone(), Mount::default()] {
        let status = node.publish_as(&second, mount).unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(
            status.message().contains("first"),
            "the message does not name the first target: {status}"
        );
    }
    let node = node.restart();
    assert_eq!(
        node.publish_as(&second, alone()).unwrap_err().code(),
        Code::FailedPrecondition,
        "the restart forgot the access mode"
    );
    node.client.unpublish("pvc-1", &first).unwrap();
    node.publish_as(&second, alone()).unwrap();
    // After an administrator's umount(8) the volume can be mounted elsewhere, too.
    umount2(&second, MntFlags::empty()).unwrap();
    let third = node.target("third");
    node.publish_as(&third, alone()).unwrap();
}

#[needs(Root)]
fn read_write_once_allows_many_mounts_on_the_node() {
    let node = Node::new();
    node.client.create("pvc-1").unwrap();
    for (name, mode) in [
        ("a", Mode::SingleNodeMultiWriter),
        ("b", Mode::SingleNodeMultiWriter),
        ("c", Mode::SingleNodeWriter),
    ] {
        node.publish_as(
            &node.target(name),
            Mount {
                mode,
                ..Mount::default()
            },
        )
        .unwrap();
        fs::write(node.target(name).join(name), "x").unwrap();
    }
    assert_eq!(names(node.target("a")), ["a", "b", "c"]);
}

#[needs(Root)]
fn unpublish_is_idempotent_and_removes_stacked_mounts() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client
        .unpublish("pvc-1", &target)
        .expect("the volume was never published");
    node.client
        .unpublish("pvc-1", &node.target("no/such/parent"))
        .expect("the target has no parent");
    node.client.publish("pvc-1", &target).unwrap();
    umount2(&target, MntFlags::empty()).unwrap();
    node.client
        .unpublish("pvc-1", &target)
        .expect("the volume was unmounted by hand");
    assert!(!target.exists());
    // Mounted twice at one target.
    node.client.publish("pvc-1", &target).unwrap();
    let data = node.scratch.path("pool/volumes/pvc-1/data");
    mount(Some(&data), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    node.client.unpublish("pvc-1", &target).unwrap();
    assert!(!target.exists() && data.exists());
    // A volume that does not exist.
    node.client
        .unpublish("pvc-unknown", &target)
        .expect("the target does not exist");
}

#[needs(Root)]
fn unpublishing_a_mount_in_use_fails_with_the_reason() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    let open = fs::File::create(target.join("file")).unwrap();
    let status = node.client.unpublish("pvc-1", &target).unwrap_err();
    assert!(
        status.message().contains("pvc-1") && status.message().contains("EBUSY"),
        "{status}"
    );
    assert!(is_mounted(&target));
    drop(open);
    node.client.unpublish("pvc-1", &target).unwrap();
}

#[needs(Root)]
fn a_mounted_volume_is_not_deleted() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    let node = node.restart();
    let status = node.client.delete("pvc-1").unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(&target.display().to_string()), "{status}");
    fs::write(target.join("file"), "still here").unwrap();
    node.client.unpublish("pvc-1", &target).unwrap();
    node.client.delete("pvc-1").unwrap();
    node.client.delete("pvc-1").expect("delete is idempotent");
}

#[needs(Root)]
fn unpublish_works_without_the_pool() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    fs::rename(node.scratch.path("pool"), node.scratch.path("moved")).unwrap();
    fs::write(node.scratch.path("pool"), "in the way").unwrap();
    let node = node.restart();
    assert_eq!(node.client.probe().unwrap_err().code(), Code::FailedPrecondition);
    node.client.unpublish("pvc-1", &target).unwrap();
    assert!(!target.exists());
    assert!(node.scratch.path("moved/volumes/pvc-1/data").exists());
}

#[needs(Root)]
fn a_volume_whose_mount_is_covered_is_still_mounted() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    fs::write(target.join("file"), "kept").unwrap();
    mount(Some("tmpfs"), &target, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    assert_eq!(
        node.client.delete("pvc-1").unwrap_err().code(),
        Code::FailedPrecondition
    );
    assert_eq!(
        node.client
            .stats("pvc-1", &target.to_string_lossy())
            .unwrap_err()
            .code(),
        Code::NotFound
    );
    let node = node.restart();
    assert_eq!(
        node.client.delete("pvc-1").unwrap_err().code(),
        Code::FailedPrecondition,
        "the restart forgot the mount"
    );
    umount2(&target, MntFlags::empty()).unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "kept");
    node.client.unpublish("pvc-1", &target).unwrap();
    node.client.delete("pvc-1").unwrap();
}

#[needs(Root)]
fn a_mount_of_the_same_path_on_another_filesystem_is_not_ours() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client.publish("pvc-1", &target).unwrap();
    node.client.unpublish("pvc-1", &target).unwrap();
    let foreign = node.scratch.tmpfs("foreign", "1M").join("volumes/pvc-1/data");
    fs::create_dir_all(&foreign).unwrap();
    fs::create_dir(node.target("b")).unwrap();
    mount(
        Some(&foreign),
        &node.target("b"),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let node = node.restart();
    node.client.delete("pvc-1").expect("the volume is not mounted");
}

#[needs(Root)]
fn one_target_has_one_access_mode() {
    let node = Node::new();
    let in_mode = |mode| Mount {
        mode,
        ..Mount::default()
    };
    node.client.create("pvc-1").unwrap();
    node.publish_as(&node.target("a"), in_mode(Mode::SingleNodeSingleWriter))
        .unwrap();
    let status = node
        .publish_as(&node.target("a"), in_mode(Mode::SingleNodeMultiWriter))
        .unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    let status = node
        .publish_as(&node.target("b"), in_mode(Mode::SingleNodeMultiWriter))
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
}

#[needs(Root)]
fn remounting_the_pool_changes_answers_only_if_it_becomes_read_only() {
    let scratch = Scratch::new();
    let disk = scratch.tmpfs("disk", "16M");
    let (_process, client) = start(&Driver::new(&scratch).pool("default", &disk));
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    client.create("pvc-1").unwrap();
    client.publish("pvc-1", &a).unwrap();
    let change = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    hostdir_lab::scratch::remount(&disk, change | MsFlags::MS_NODEV);
    client.publish("pvc-1", &a).expect("publish is idempotent");
    hostdir_lab::scratch::remount(&disk, change | MsFlags::MS_RDONLY);
    let status = client.publish("pvc-1", &b).unwrap_err();
    assert!(status.message().contains("read-only"), "{status}");
    assert!(!b.exists());
}
