//! Hostile and broken input gets a clear error, and nothing outside the pool is touched.

use super::place::Place;
use hostdir::csi::proto::ValidateVolumeCapabilitiesRequest;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir_lab::client::{capability, create_request};
use hostdir_lab::needs;
use hostdir_lab::scratch::{is_mounted, names};
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use tonic::{Code, Status};

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
        (in_pods("file/a"), Code::InvalidArgument, "not a directory"),
        (in_pods("link"), Code::FailedPrecondition, "not a directory"),
        (in_pods("dangling"), Code::FailedPrecondition, "not a directory"),
        (in_pods("file"), Code::FailedPrecondition, "not a directory"),
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

    // A mount of another hostdir volume is left alone, too.
    place.client.publish("pvc-2", &target).unwrap();
    assert_eq!(
        place.client.publish("pvc-1", &target).unwrap_err().code(),
        Code::AlreadyExists
    );
    place
        .client
        .unpublish("pvc-1", &target)
        .expect_err("unpublish of pvc-1 unmounted pvc-2");
    assert!(is_mounted(&target));
    place.client.unpublish("pvc-2", &target).unwrap();
}

#[needs(Root)]
fn a_huge_request_gets_a_short_refusal_and_a_short_log() {
    let place = Place::new();
    place.client.create("pvc-1").unwrap();
    let target = "x".repeat(1 << 20);
    let status = place.client.unpublish_at("pvc-1", &target).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().len() < 4096);
    assert!(
        place.process.log_to_its_end().len() < 64 << 10,
        "the whole request was logged"
    );
}
