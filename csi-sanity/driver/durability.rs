//! What is answered for is durable: the order of system calls, and syncs that fail.

use hostdir_lab::faults::{Fault, Step};
use hostdir_lab::scene::start;
use hostdir_lab::scratch::names;
use hostdir_lab::{Driver, Scratch, needs};
use nix::errno::Errno;
use tonic::Code;

#[needs(Root)]
fn a_sync_that_failed_is_made_good_before_the_next_answer() {
    let scratch = Scratch::new();
    let driver = Driver::new(&scratch)
        .pool("default", &scratch.path("pool"))
        .with_faults();
    let (process, client) = start(&driver);
    client.create("pvc-0").unwrap();
    // The third sync is that of the directory into which the volume was renamed.
    process.faults().arm(Step::Named("fsync", 2), Fault::Fail(Errno::EIO));
    assert_eq!(client.create("pvc-1").unwrap_err().code(), Code::Unavailable);
    process.faults().arm(Step::Never, Fault::Die);
    client.create("pvc-1").unwrap();
    let steps = process.faults().disarm();
    assert!(steps.contains(&"fsync"), "answered without a sync: {steps:?}");
    assert_eq!(names(scratch.path("pool/volumes")), ["pvc-0", "pvc-1"]);
    assert!(client.capacity("default") > 0);
}

#[needs(Root)]
fn steps_come_in_the_order_that_a_power_cut_demands() {
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
        // The only use of openat: to read the mount table, which grows with the node's pods.
        assert!(!steps.contains(&"openat"), "a call reads the mount table: {steps:?}");
        steps.into_iter().filter(|step| kept.contains(step)).collect()
    };
    // The record, the directory it is in; the rename, the directory that it is renamed into.
    let create = changes(&|| drop(client.create("pvc-1").unwrap()));
    assert_eq!(create, ["mkdirat", "write", "fsync", "fsync", "renameat2", "fsync"]);
    // The directory and its name before the record that speaks of it; the record before the mount, which has its options before
    // anybody sees it.
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
    // Where it is gone to, and where it is gone from; what the eraser does later is not asked here.
    let delete = changes(&|| client.delete("pvc-1").unwrap());
    assert_eq!(delete[..3], ["renameat2", "fsync", "fsync"]);
}

#[needs(Root)]
fn what_a_restart_finds_is_made_durable_before_it_is_answered_for() {
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
        "answered for what was never synced: {steps:?}"
    );
}
