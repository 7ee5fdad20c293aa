//! Several mounts of a volume, mounts that are in the way, and the end of mounts.

use super::publish::Node;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir_lab::scene::start;
use hostdir_lab::scratch::{is_mounted, names};
use hostdir_lab::{Driver, Mount, Scratch, needs};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use tonic::Code;

#[needs(Root)]
fn read_write_once_pod_is_one_mount_and_no_other() {
    let node = Node::new();
    node.client.create("pvc-1").unwrap();
    let alone = || Mount {
        mode: Mode::SingleNodeSingleWriter,
        ..Mount::default()
    };
    let (first, second) = (node.target("first"), node.target("second"));
    node.publish_as(&first, alone()).unwrap();
    node.publish_as(&first, alone()).expect("the same again is no error");
    for mount in [alone(), Mount::default()] {
        let status = node.publish_as(&second, mount).unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("first"), "it does not say where: {status}");
    }
    let node = node.restart();
    assert_eq!(
        node.publish_as(&second, alone()).unwrap_err().code(),
        Code::FailedPrecondition,
        "forgotten by a restart"
    );
    node.client.unpublish("pvc-1", &first).unwrap();
    node.publish_as(&second, alone()).unwrap();
    // An administrator's umount(8) counts, too.
    umount2(&second, MntFlags::empty()).unwrap();
    let third = node.target("third");
    node.publish_as(&third, alone()).unwrap();
}

#[needs(Root)]
fn read_write_once_is_any_number_of_mounts_on_the_node() {
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
fn unpublish_takes_what_it_finds() {
    let node = Node::new();
    let target = node.target("a");
    node.client.create("pvc-1").unwrap();
    node.client.unpublish("pvc-1", &target).expect("never published");
    node.client
        .unpublish("pvc-1", &node.target("no/such/parent"))
        .expect("no parent");
    node.client.publish("pvc-1", &target).unwrap();
    umount2(&target, MntFlags::empty()).unwrap();
    node.client
        .unpublish("pvc-1", &target)
        .expect("unmounted by somebody else");
    assert!(!target.exists());
    // Mounted twice, as a driver without our care would have left it.
    node.client.publish("pvc-1", &target).unwrap();
    let data = node.scratch.path("pool/volumes/pvc-1/data");
    mount(Some(&data), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    node.client.unpublish("pvc-1", &target).unwrap();
    assert!(!target.exists() && data.exists());
    // Of a volume that is known to nobody any more.
    node.client.unpublish("pvc-unknown", &target).expect("nothing is there");
}

#[needs(Root)]
fn a_mount_in_use_stays_and_says_so() {
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
    node.client.delete("pvc-1").expect("deleting twice is no error");
}

#[needs(Root)]
fn pods_end_although_the_pool_is_gone() {
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
fn a_mount_that_another_one_covers_is_still_a_mount() {
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
        "forgotten by a restart"
    );
    umount2(&target, MntFlags::empty()).unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "kept");
    node.client.unpublish("pvc-1", &target).unwrap();
    node.client.delete("pvc-1").unwrap();
}

#[needs(Root)]
fn a_mount_that_only_looks_like_ours_is_not_ours() {
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
    node.client.delete("pvc-1").expect("it is mounted nowhere");
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
fn a_pool_remounted_under_a_mount_changes_no_answer_but_read_only() {
    let scratch = Scratch::new();
    let disk = scratch.tmpfs("disk", "16M");
    let (_process, client) = start(&Driver::new(&scratch).pool("default", &disk));
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    client.create("pvc-1").unwrap();
    client.publish("pvc-1", &a).unwrap();
    let change = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    hostdir_lab::scratch::remount(&disk, change | MsFlags::MS_NODEV);
    client.publish("pvc-1", &a).expect("it is published");
    hostdir_lab::scratch::remount(&disk, change | MsFlags::MS_RDONLY);
    let status = client.publish("pvc-1", &b).unwrap_err();
    assert!(status.message().contains("read-only"), "{status}");
    assert!(!b.exists());
}
