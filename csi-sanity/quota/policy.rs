//! What an administrator configures, and does: `required`, `auto` and `off`, quotas that come and go, records that are edited.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use hostdir::csi::proto::volume_usage::Unit;
use tonic::Code;

use super::place::{MIB, Place, Served, as_in_a_container, fill, user_writes};
use hostdir_lab::disk::{Filesystem, run};
use hostdir_lab::scratch::mounts_below;
use hostdir_lab::{uml, wait_until};

pub(super) fn without_quotas_required_refuses_and_auto_says_so(place: &Place) {
    let way_out = match place.filesystem {
        Filesystem::Xfs => "prjquota",
        Filesystem::Ext4 => "tune2fs",
        Filesystem::Btrfs => "btrfs quota enable",
    };
    let served = place.start();
    let refusal = served.client.probe().expect_err("there are no quotas");
    assert!(refusal.message().contains(way_out), "{}", refusal.message());
    let refusal = served.client.create("refused").expect_err("there are no quotas");
    assert_eq!(refusal.code(), Code::Unavailable);
    assert!(refusal.message().contains(way_out), "{}", refusal.message());
    drop(served);

    let served = place.serve("quota: auto");
    let log = served.process.log();
    assert!(
        log.contains("volumes are not limited") && log.contains(way_out),
        "{log}"
    );
    let target = served.volume("free", 16);
    as_in_a_container(|| fill(&target.join("file"), 24 * MIB));
    fs::hard_link(target.join("file"), target.join("link")).expect("link");
    // Counted, file by file, and each but once.
    let (total, used) = served.stats("free", Unit::Bytes);
    assert_eq!(total, 16 * MIB);
    assert!((24 * MIB..25 * MIB).contains(&used), "24 MiB take {used}");
    if place.filesystem.has_projects() {
        assert_eq!(served.stats("free", Unit::Inodes).1, 2, "a directory and a file");
    }
    served.clear(&["free"]);
}

pub(super) fn quotas_that_are_off_lift_limits_and_on_again_set_them(place: &Place) {
    let served = place.start();
    let target = served.volume("limited", 16);
    drop(served);
    let served = place.serve("quota: \"off\"");
    assert!(
        user_writes(&target.join("file"), 24 * MIB),
        "it is limited all the same"
    );
    let free = served.volume("free", 16);
    assert!(user_writes(&free.join("file"), 24 * MIB), "it is limited all the same");
    drop(served);

    let served = place.serve("quota: auto");
    assert!(!user_writes(&target.join("more"), 4 * MIB), "it is not limited again");
    // Made without: it stays so, and that is said.
    assert!(
        served.process.log().contains("volume is not limited to its size"),
        "{}",
        served.process.log()
    );
    drop(served);
    let served = place.start();
    let refusal = served
        .client
        .publish("free", &place.scratch.path("pods").join("elsewhere"))
        .expect_err("all have to be limited");
    assert_eq!(refusal.code(), Code::FailedPrecondition);
    assert!(refusal.message().contains("copy its data"), "{}", refusal.message());
    served.clear(&["limited", "free"]);
}

pub(super) fn ids_in_use_are_given_to_nobody(place: &Place) {
    // Three ids, the first of which somebody else uses.
    let foreign = place.disk.join("foreign-project");
    fs::create_dir(&foreign).expect("make a directory");
    run(Command::new("chattr").args(["-p", "5000"]).arg(&foreign));
    let served = place.serve("quota: required, projectIds: 5000-5002");
    served.volume("first", 16);
    served.volume("second", 16);
    let mut given = ["first", "second"].map(|id| place.project(id));
    given.sort_unstable();
    assert_eq!(given, [5001, 5002]);
    served.create("third", 16);
    let refused = || {
        let refusal = served
            .client
            .publish("third", &place.target("third"))
            .expect_err("no id is left");
        assert!(refusal.message().contains("widen projectIds"), "{}", refusal.message());
    };
    refused();

    // What lies in the trash has its id still.
    let (first, stuck) = (place.project("first"), place.data("first").join("stuck"));
    fs::create_dir(&stuck).expect("make a directory");
    served.unpublish("first");
    place_tmpfs(&stuck);
    served.client.delete("first").expect("delete");
    refused();
    let trash = place.pool.join("trash");
    for mount_point in mounts_below(&trash) {
        nix::mount::umount(&mount_point).expect("unmount");
    }
    // Another delete wakes the eraser.
    served.create("waker", 1);
    served.client.delete("waker").expect("delete");
    served.trash_empties();
    wait_until("the id is given back", || {
        served.client.publish("third", &place.target("third")).is_ok()
    });
    assert_eq!(place.project("third"), first);
    served.clear(&["second", "third"]);
    fs::remove_dir(&foreign).expect("remove a directory");
}

/// The kernel lets an owner take a file out of its project, unless in a user namespace (`fileattr_set_prepare`, fs/file_attr.c):
/// what deploy/README.md tells people to do about tenants they do not trust.
pub(super) fn in_a_user_namespace_no_file_leaves_its_project(place: &Place) {
    let served = place.start();
    let target = served.volume("kept", 16);
    assert!(user_writes(&target.join("file"), MIB));
    let leave = |namespace: &[&str]| {
        let mut command = Command::new(namespace[0]);
        command
            .args(&namespace[1..])
            .args(["chattr", "-p", "0"])
            .arg(target.join("file"));
        command.uid(1000).gid(1000).output().expect("run chattr")
    };
    let inside = ["unshare", "--user", "--map-root-user"];
    let alone = Command::new("unshare")
        .args(&inside[1..])
        .arg("true")
        .uid(1000)
        .gid(1000)
        .status();
    assert!(alone.expect("run unshare").success(), "no user namespace can be made");
    let refused = leave(&inside);
    assert!(!refused.status.success(), "it left: {refused:?}");
    let project = place.project("kept").to_string();
    let shown = run(Command::new("lsattr").arg("-p").arg(target.join("file")));
    assert!(shown.trim_start().starts_with(&project), "{shown}");
    served.clear(&["kept"]);
}

/// Edits a record.
fn edit(place: &Place, id: &str, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let mut record = place.read_record(id);
    change(record.as_object_mut().expect("an object"));
    fs::write(place.record(id), record.to_string()).expect("write a record");
}

/// Refused, in words that hold `words`.
fn refused(served: &Served<'_>, id: &str, words: &str) {
    let target = served.place.target(id);
    let refusal = served.client.publish(id, &target).expect_err(words);
    assert_eq!(refusal.code(), Code::FailedPrecondition, "{refusal:?}");
    assert!(
        refusal.message().contains(words),
        "{words:?} is not in {}",
        refusal.message()
    );
}

/// Mounted, and held to 16 MiB.
fn is_held(served: &Served<'_>, id: &str) {
    let target = served.publish(id);
    assert!(!user_writes(&target.join("much"), 20 * MIB), "{id} is not limited");
    fs::remove_file(target.join("much")).expect("remove");
    served.unpublish(id);
}

pub(super) fn records_that_are_edited_are_told_from_what_is_on_the_disk(place: &Place) {
    let served = place.start();
    let ids = ["another", "none", "zero", "sound"];
    for id in ids {
        served.volume(id, 16);
        served.unpublish(id);
    }
    let [another, none, zero, sound] = ids.map(|id| place.project(id));
    drop(served);
    let set = |id: &str, project: u64| {
        edit(place, id, |record| {
            drop(record.insert("project".into(), project.into()));
        });
    };
    set("another", sound);
    edit(place, "none", |record| drop(record.remove("project")));
    set("zero", 0);

    let served = place.start();
    refused(&served, "another", "both name project");
    refused(&served, "sound", "both name project");
    // The message says what to write.
    refused(&served, "none", &format!("write \"project\": {none}"));
    refused(&served, "zero", &format!("write \"project\": {zero}"));
    drop(served);
    for (id, project) in [("another", another), ("none", none), ("zero", zero)] {
        set(id, project);
    }
    let served = place.start();
    for id in ids {
        is_held(&served, id);
        served.publish(id);
    }
    served.clear(&ids);
}

pub(super) fn directories_that_leave_their_project_are_missed(place: &Place) {
    let served = place.start();
    for id in ["victim", "attacker"] {
        served.volume(id, 16);
        served.unpublish(id);
    }
    let (victim, own) = (place.project("victim"), place.project("attacker"));
    fs::write(place.data("attacker").join("file"), "copied").expect("write");
    // Into none, as after a copy that knows of no projects; and into that of a neighbour.
    for project in [0, victim] {
        run(Command::new("chattr")
            .args(["-p", &project.to_string()])
            .arg(place.data("attacker")));
        refused(&served, "attacker", &format!("chattr -R -f -p {own} DIR"));
        is_held(&served, "victim");
    }
    drop(served);
    let served = place.start();
    refused(&served, "attacker", &format!("chattr -R -f -p {own} DIR"));
    is_held(&served, "victim");
    served.publish("victim");
    assert_eq!(served.stats("victim", Unit::Bytes).0, 16 * MIB);

    // What the message says, does.
    let data = place.data("attacker").display().to_string();
    let cure = format!("chattr -R -f -p {own} {data}; find {data} -type d -exec chattr +P {{}} +");
    run(Command::new("sh").args(["-c", &cure]));
    is_held(&served, "attacker");
    let target = served.publish("attacker");
    assert_eq!(fs::read_to_string(target.join("file")).expect("read"), "copied");

    // Erased while it is in the project of another: that one stays limited.
    run(Command::new("chattr")
        .args(["-R", "-f", "-p", &victim.to_string()])
        .arg(&data));
    served.clear(&["attacker"]);
    is_held_where_it_is(&served, "victim");
    served.clear(&["victim"]);
}

fn is_held_where_it_is(served: &Served<'_>, id: &str) {
    let target = served.place.target(id);
    assert!(
        !user_writes(&target.join("much"), 20 * MIB),
        "{id} is not limited any more"
    );
    fs::remove_file(target.join("much")).expect("remove");
}

pub(super) fn quotas_that_are_switched_off_are_missed(place: &Place) {
    let (off, on): (&[&str], &[&str]) = match place.filesystem {
        Filesystem::Xfs => (
            &["xfs_quota", "-x", "-c", "disable -p"],
            &["xfs_quota", "-x", "-c", "enable -p"],
        ),
        Filesystem::Ext4 => (&["quotaoff", "-P"], &["quotaon", "-P"]),
        // Whatever is switched on again counts anew.
        Filesystem::Btrfs => (&["btrfs", "quota", "disable"], &[]),
    };
    let switch = |args: &[&str]| drop(run(Command::new(args[0]).args(&args[1..]).arg(&place.disk)));
    let served = place.start();
    served.volume("old", 16);
    served.create("new", 16);
    switch(off);
    let elsewhere = place.scratch.path("pods").join("elsewhere");
    for (id, target) in [("old", &elsewhere), ("new", &place.target("new"))] {
        let refusal = served.client.publish(id, target).expect_err("quotas are off");
        assert_eq!(refusal.code(), Code::FailedPrecondition, "{refusal:?}");
        assert!(
            refusal.message().contains("quotas are required"),
            "{}",
            refusal.message()
        );
    }
    // What runs, ends.
    served.unpublish("old");
    if on.is_empty() {
        return;
    }
    switch(on);
    let target = served.publish("new");
    assert!(!user_writes(&target.join("file"), 20 * MIB), "it is not limited");
    served.publish("old");
    served.clear(&["old", "new"]);
}

pub(super) fn another_filesystem_over_the_pool_is_refused(place: &Place) {
    let served = place.start();
    served.volume("below", 16);
    let pool = &place.pool;
    place_tmpfs(pool);
    let refusal = served.client.create("above").expect_err("another filesystem is there");
    assert_eq!(refusal.code(), Code::Unavailable);
    assert!(refusal.message().contains("another directory"), "{}", refusal.message());
    nix::mount::umount(pool).expect("unmount");
    wait_until("it is there again", || served.client.probe().is_ok());
    assert_eq!(served.stats("below", Unit::Bytes).0, 16 * MIB);
    served.clear(&["below"]);
    // The machine's disk is still what it was.
    assert!(Path::new(uml::DEVICE).exists());
}

fn place_tmpfs(at: &Path) {
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, None::<&str>).expect("mount a tmpfs");
}
