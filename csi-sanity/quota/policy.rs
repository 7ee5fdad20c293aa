//! What an administrator configures and changes: quota `required`, `auto` and `off`, quotas switched on and off, edited
//! records.

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

pub(super) fn without_quotas_required_refuses_and_auto_warns(place: &Place) {
    let remedy = match place.filesystem {
        Filesystem::Xfs => "prjquota",
        Filesystem::Ext4 => "tune2fs",
        Filesystem::Btrfs => "btrfs quota enable",
    };
    let served = place.start();
    let refusal = served.client.probe().expect_err("there are no quotas");
    assert!(refusal.message().contains(remedy), "{}", refusal.message());
    let refusal = served.client.create("refused").expect_err("there are no quotas");
    assert_eq!(refusal.code(), Code::Unavailable);
    assert!(refusal.message().contains(remedy), "{}", refusal.message());
    drop(served);

    let served = place.serve("quota: auto");
    served.process.wait_for_log("volumes are not limited");
    served.process.wait_for_log(remedy);
    let target = served.volume("free", 16);
    as_in_a_container(|| fill(&target.join("file"), 24 * MIB));
    fs::hard_link(target.join("file"), target.join("link")).expect("link");
    // Without quotas the driver adds up the files, and counts hard links once.
    let (total, used) = served.stats("free", Unit::Bytes);
    assert_eq!(total, 16 * MIB);
    assert!((24 * MIB..25 * MIB).contains(&used), "24 MiB take {used}");
    if place.filesystem.has_projects() {
        assert_eq!(served.stats("free", Unit::Inodes).1, 2, "a directory and a file");
    }
    served.clear(&["free"]);
}

pub(super) fn quota_off_lifts_limits_and_quota_auto_sets_them_again(place: &Place) {
    let served = place.start();
    let target = served.volume("limited", 16);
    drop(served);
    let served = place.serve("quota: \"off\"");
    assert!(
        user_writes(&target.join("file"), 24 * MIB),
        "volume limited is still limited"
    );
    let free = served.volume("free", 16);
    assert!(user_writes(&free.join("file"), 24 * MIB), "volume free is limited");
    drop(served);

    let served = place.serve("quota: auto");
    assert!(
        !user_writes(&target.join("more"), 4 * MIB),
        "volume limited is not limited again"
    );
    // A volume made without a limit stays unenforced, which is logged.
    served.process.wait_for_log("volume is not limited to its size");
    drop(served);
    let served = place.start();
    let refusal = served
        .client
        .publish("free", &place.scratch.path("pods").join("elsewhere"))
        .expect_err("an unenforced volume was published with quotas required");
    assert_eq!(refusal.code(), Code::FailedPrecondition);
    assert!(refusal.message().contains("copy its data"), "{}", refusal.message());
    served.clear(&["limited", "free"]);
}

pub(super) fn project_ids_in_use_are_not_given_out(place: &Place) {
    // Three project ids, the first of which is in use outside the pool.
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
            .expect_err("no project id is left");
        assert!(refusal.message().contains("widen projectIds"), "{}", refusal.message());
    };
    refused();

    // A volume in the trash keeps its project id until it is erased.
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
    wait_until("the project id is free again", || {
        served.client.publish("third", &place.target("third")).is_ok()
    });
    assert_eq!(place.project("third"), first);
    served.clear(&["second", "third"]);
    fs::remove_dir(&foreign).expect("remove a directory");
}

/// The kernel lets a file's owner take it out of its project, except from a user namespace (`fileattr_set_prepare`,
/// fs/file_attr.c). deploy/README.md recommends user namespaces for untrusted tenants.
pub(super) fn a_file_cannot_leave_its_project_from_a_user_namespace(place: &Place) {
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
    assert!(
        alone.expect("run unshare").success(),
        "this kernel cannot make a user namespace"
    );
    let refused = leave(&inside);
    assert!(!refused.status.success(), "the file left its project: {refused:?}");
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

/// Checks that publishing a volume fails with a message that contains `words`.
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

/// Publishes a volume of 16 MiB, checks that it is limited, and unpublishes it.
fn assert_limited(served: &Served<'_>, id: &str) {
    let target = served.publish(id);
    assert!(
        !user_writes(&target.join("much"), 20 * MIB),
        "volume {id} is not limited"
    );
    fs::remove_file(target.join("much")).expect("remove");
    served.unpublish(id);
}

pub(super) fn edited_records_that_contradict_the_disk_are_refused(place: &Place) {
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
        assert_limited(&served, id);
        served.publish(id);
    }
    served.clear(&ids);
}

pub(super) fn a_directory_that_left_its_project_is_refused(place: &Place) {
    let served = place.start();
    for id in ["victim", "attacker"] {
        served.volume(id, 16);
        served.unpublish(id);
    }
    let (victim, own) = (place.project("victim"), place.project("attacker"));
    fs::write(place.data("attacker").join("file"), "copied").expect("write");
    // Moves the directory out of any project, as a plain copy would, and then into a neighbour's project.
    for project in [0, victim] {
        run(Command::new("chattr")
            .args(["-p", &project.to_string()])
            .arg(place.data("attacker")));
        refused(&served, "attacker", &format!("chattr -R -f -p {own} DIR"));
        assert_limited(&served, "victim");
    }
    drop(served);
    let served = place.start();
    refused(&served, "attacker", &format!("chattr -R -f -p {own} DIR"));
    assert_limited(&served, "victim");
    served.publish("victim");
    assert_eq!(served.stats("victim", Unit::Bytes).0, 16 * MIB);

    // The commands in the message repair the volume.
    let data = place.data("attacker").display().to_string();
    let cure = format!("chattr -R -f -p {own} {data}; find {data} -type d -exec chattr +P {{}} +");
    run(Command::new("sh").args(["-c", &cure]));
    assert_limited(&served, "attacker");
    let target = served.publish("attacker");
    assert_eq!(fs::read_to_string(target.join("file")).expect("read"), "copied");

    // Erasing a volume that is in another's project leaves the other limited.
    run(Command::new("chattr")
        .args(["-R", "-f", "-p", &victim.to_string()])
        .arg(&data));
    served.clear(&["attacker"]);
    assert_still_limited(&served, "victim");
    served.clear(&["victim"]);
}

fn assert_still_limited(served: &Served<'_>, id: &str) {
    let target = served.place.target(id);
    assert!(
        !user_writes(&target.join("much"), 20 * MIB),
        "volume {id} is no longer limited"
    );
    fs::remove_file(target.join("much")).expect("remove");
}

pub(super) fn quotas_switched_off_on_the_filesystem_are_noticed(place: &Place) {
    let (off, on): (&[&str], &[&str]) = match place.filesystem {
        Filesystem::Xfs => (
            &["xfs_quota", "-x", "-c", "disable -p"],
            &["xfs_quota", "-x", "-c", "enable -p"],
        ),
        Filesystem::Ext4 => (&["quotaoff", "-P"], &["quotaon", "-P"]),
        // Enabled again, btrfs would count from scratch.
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
    // A published volume can be unpublished.
    served.unpublish("old");
    if on.is_empty() {
        return;
    }
    switch(on);
    let target = served.publish("new");
    assert!(
        !user_writes(&target.join("file"), 20 * MIB),
        "volume new is not limited"
    );
    served.publish("old");
    served.clear(&["old", "new"]);
}

pub(super) fn a_filesystem_mounted_over_the_pool_is_noticed(place: &Place) {
    let served = place.start();
    served.volume("below", 16);
    let pool = &place.pool;
    place_tmpfs(pool);
    let refusal = served
        .client
        .create("above")
        .expect_err("another filesystem covers the pool");
    assert_eq!(refusal.code(), Code::Unavailable);
    assert!(refusal.message().contains("another directory"), "{}", refusal.message());
    nix::mount::umount(pool).expect("unmount");
    wait_until("the pool is usable again", || served.client.probe().is_ok());
    assert_eq!(served.stats("below", Unit::Bytes).0, 16 * MIB);
    served.clear(&["below"]);
    assert!(Path::new(uml::DEVICE).exists());
}

fn place_tmpfs(at: &Path) {
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, None::<&str>).expect("mount a tmpfs");
}

/// The wall clock of a machine may be set at any moment.
pub(super) fn a_clock_that_jumps_disturbs_no_call(place: &Place) {
    let served = place.start();
    let target = served.volume("kept", 16);
    fs::write(target.join("file"), "before").expect("write");
    for (number, jump) in ["+1 day", "2 days ago", "+1 day"].iter().enumerate() {
        run(Command::new("date").args(["-s", jump]));
        let id = format!("at-{number}");
        served.volume(&id, 16);
        assert_eq!(served.stats(&id, Unit::Bytes).0, 16 * MIB);
        served.expand(&id, 32);
        served.clear(&[&id]);
    }
    assert_eq!(fs::read_to_string(target.join("file")).expect("read"), "before");
    served.client.probe().expect("the driver is ready");
    served.clear(&["kept"]);
}
