//! Answered calls are durable: the order of system calls, and syncs that fail.

use hostdir_lab::faults::{Fault, Step};
use hostdir_lab::scene::start;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Driver, Scratch, needs};
use nix::errno::Errno;
use tonic::{Code, Status};

/// The steps of a call that is repeated after one of its syncs has failed. There is a volume `pvc-0` before it, and there are
/// `volumes` after it.
fn steps_of_retry(sync: usize, call: impl Fn(&Client) -> Result<(), Status>, volumes: &[&str]) -> Vec<&'static str> {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (process, client) = start(&driver);
    client.create("pvc-0").unwrap();
    process
        .faults()
        .arm(Step::Named("fsync", sync), Fault::Fail(Errno::EIO));
    assert_eq!(call(&client).unwrap_err().code(), Code::Unavailable);
    process.faults().arm(Step::Never, Fault::Die);
    call(&client).unwrap();
    let steps = process.faults().disarm();
    assert_eq!(names(scratch.path("pool/volumes")), volumes);
    assert!(client.capacity("default") > 0);
    steps
}

#[needs(Root)]
fn a_failed_sync_is_repeated_before_the_next_answer() {
    // The third sync is of `volumes/`, into which the volume was renamed.
    let steps = steps_of_retry(2, |client| client.create("pvc-1").map(drop), &["pvc-0", "pvc-1"]);
    assert!(
        steps.contains(&"fsync"),
        "CreateVolume was answered without a sync: {steps:?}"
    );
}

/// A delete is two changes, one of the trash and one of the volumes: the retry must make both durable.
#[needs(Root)]
fn a_failed_sync_of_the_trash_is_repeated_for_both_directories() {
    let steps = steps_of_retry(0, |client| client.delete("pvc-0"), &[]);
    assert!(
        steps.iter().filter(|step| **step == "fsync").count() >= 2,
        "DeleteVolume was answered without both syncs: {steps:?}"
    );
}

#[needs(Root)]
fn system_calls_come_in_an_order_that_survives_power_cuts() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (process, client) = start(&driver);
    let changes = |call: &dyn Fn()| -> Vec<&'static str> {
        process.faults().arm(Step::Never, Fault::Die);
        call();
        let kept = [
            "mkdirat",
            "write",
            "fsync",
            "renameat",
            "renameat2",
            "fchmod",
            "open_tree",
            "mount_setattr",
            "move_mount",
        ];
        let steps = process.faults().disarm();
        // The driver uses openat only to read the mount table, which grows with the node's pods.
        assert!(!steps.contains(&"openat"), "a call reads the mount table: {steps:?}");
        steps.into_iter().filter(|step| kept.contains(step)).collect()
    };
    // Syncs the record and its directory; after the rename, syncs `volumes/`.
    let create = changes(&|| drop(client.create("pvc-1").unwrap()));
    assert_eq!(create, ["mkdirat", "write", "fsync", "fsync", "renameat2", "fsync"]);
    // Syncs `data/` and its parent before the record says `ready`, and the record before the mount. The mount gets its
    // options before it is attached.
    let publish = changes(&|| client.publish("pvc-1", &scratch.path("t")).unwrap());
    assert_eq!(
        publish,
        [
            "mkdirat",
            "fchmod",
            "fsync",
            "fsync",
            "write",
            "fsync",
            "renameat",
            "fsync",
            "mkdirat",
            "open_tree",
            "mount_setattr",
            "move_mount"
        ]
    );
    client.unpublish("pvc-1", &scratch.path("t")).unwrap();
    // Syncs `trash/`, then `volumes/`. The eraser's calls follow later.
    let delete = changes(&|| client.delete("pvc-1").unwrap());
    assert_eq!(delete[..3], ["renameat2", "fsync", "fsync"]);
}

/// A disk that hangs must not keep a failed unpublish from being answered.
#[needs(Root)]
fn an_unmount_that_fails_asks_no_disk() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (process, client) = start(&driver);
    client.create("pvc-1").unwrap();
    client.publish("pvc-1", &scratch.path("t")).unwrap();
    process.faults().arm(Step::Named("umount2", 0), Fault::Fail(Errno::EIO));
    client.unpublish("pvc-1", &scratch.path("t")).unwrap_err();
    let steps = process.faults().disarm();
    assert_eq!(steps.last(), Some(&"umount2"), "{steps:?}");
    client.unpublish("pvc-1", &scratch.path("t")).unwrap();
}

#[needs(Root)]
fn a_volume_found_at_start_is_synced_before_it_is_reported() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (mut process, client) = start(&driver);
    // Dies between the rename and its sync.
    process.faults().arm(Step::Named("fsync", 2), Fault::Die);
    client.create("pvc-1").unwrap_err();
    process.ended();
    let (process, client) = start(&driver);
    client.create("pvc-1").unwrap();
    let steps = process.faults().disarm();
    assert!(
        steps.contains(&"syncfs"),
        "CreateVolume was answered for a volume that was never synced: {steps:?}"
    );
}
