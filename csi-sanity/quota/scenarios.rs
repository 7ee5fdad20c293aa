//! Enforced sizes: what a tenant, its neighbours and an administrator can rely on, on any filesystem with quotas.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hostdir::csi::proto::volume_usage::Unit;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statvfs::statvfs;
use tonic::Code;

use super::place::{MIB, Place, Served, as_in_a_container, fill, user_writes};
use hostdir_lab::attributes::create_subvolume_in;
use hostdir_lab::disk::run;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, SetOnDrop, wait_until};
use hostdir_lab::{hostile_tree, uml};

/// A scenario and its name.
type Named = (&'static str, fn(&Place));

/// All scenarios.
pub(super) const ALL: [Named; 8] = [
    ("a_volume_cannot_exceed_its_size", a_volume_cannot_exceed_its_size),
    (
        "a_volume_grows_while_it_is_written_to",
        a_volume_grows_while_it_is_written_to,
    ),
    (
        "a_deleted_volume_leaves_nothing_behind",
        a_deleted_volume_leaves_nothing_behind,
    ),
    (
        "many_callers_get_volumes_of_their_own",
        many_callers_get_volumes_of_their_own,
    ),
    (
        "inodes_are_limited_or_the_setting_is_refused",
        inodes_are_limited_or_the_setting_is_refused,
    ),
    (
        "a_full_pool_answers_clearly_and_deletes_still_work",
        a_full_pool_answers_clearly_and_deletes_still_work,
    ),
    (
        "links_and_renames_between_volumes_are_refused",
        links_and_renames_between_volumes_are_refused,
    ),
    ("a_restart_restores_limits", a_restart_restores_limits),
];

pub(super) fn a_volume_cannot_exceed_its_size(place: &Place) {
    let served = place.start();
    let (full, neighbour) = (served.volume("full", 16), served.volume("neighbour", 16));
    let written = as_in_a_container(|| fill(&full.join("file"), 64 * MIB));
    assert!(
        (16 * MIB - place.slack()..=16 * MIB).contains(&written),
        "{written} bytes could be written into a volume of 16 MiB"
    );
    assert!(!user_writes(&full.join("more"), 4 * MIB), "a user wrote past the limit");
    let (total, used) = served.stats("full", Unit::Bytes);
    assert_eq!(total, 16 * MIB);
    assert!(
        used.abs_diff(16 * MIB) <= place.slack(),
        "a full volume of 16 MiB uses {used} bytes"
    );
    if place.filesystem.has_projects() {
        let df = statvfs(&full).expect("statvfs");
        assert_eq!(df.blocks() * df.fragment_size(), 16 * MIB, "df shows another size");
    }

    assert!(
        user_writes(&neighbour.join("file"), 12 * MIB),
        "the neighbour could not write 12 of its 16 MiB"
    );
    let (total, used) = served.stats("neighbour", Unit::Bytes);
    assert_eq!(total, 16 * MIB);
    assert!(used.abs_diff(12 * MIB) <= place.slack(), "12 MiB use {used} bytes");
    let pool = statvfs(&place.pool).expect("statvfs");
    assert!(
        pool.blocks_available() * pool.fragment_size() > 100 * MIB,
        "the full volume has filled the pool"
    );
    served.clear(&["full", "neighbour"]);
}

pub(super) fn a_volume_grows_while_it_is_written_to(place: &Place) {
    let served = place.start();
    let target = served.volume("growing", 16);
    let (written, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            as_in_a_container(|| {
                while !stop.load(Ordering::Relaxed) {
                    written.fetch_add(fill(&target.join("file"), MIB), Ordering::Relaxed);
                }
            });
        });
        let _stop = SetOnDrop(&stop);
        wait_until("the volume is nearly full", || {
            written.load(Ordering::Relaxed) >= 12 * MIB
        });
        served.expand("growing", 32);
        wait_until("the writer goes on", || written.load(Ordering::Relaxed) > 20 * MIB);
        assert_eq!(served.stats("growing", Unit::Bytes).0, 32 * MIB);
        wait_until("the volume is full again", || {
            written.load(Ordering::Relaxed) >= 32 * MIB - place.slack()
        });
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("the writer has ended");
    });
    let written = written.load(Ordering::Relaxed);
    assert!(
        written <= 32 * MIB,
        "{written} bytes could be written into a volume of 32 MiB"
    );

    // A volume never shrinks, and never grows beyond the room of the pool.
    let smaller = served
        .client
        .expand("growing", 1 << 20)
        .expect("the volume is already larger");
    assert_eq!(smaller, 32 << 20);
    let refusal = served
        .client
        .expand("growing", 1 << 60)
        .expect_err("the size exceeds the room");
    assert_eq!(refusal.code(), Code::OutOfRange);
    assert!(refusal.message().contains("has room for"), "{}", refusal.message());
    served.clear(&["growing"]);
}

pub(super) fn a_deleted_volume_leaves_nothing_behind(place: &Place) {
    let before = place.known_to_quotas();
    let served = place.start();
    for life in 0..3 {
        live_once(&served, life);
    }
    // btrfs of Linux 6.1, which UML has, sometimes goes read-only some time later ("bad generation").
    if place.filesystem.has_projects() || uml::filesystem_inside().is_none() {
        hostile_trees(&served);
    }
    // An empty volume, and one that was never used.
    served.volume("empty", 16);
    served.clear(&["empty"]);
    served.create("unused", 16);
    served.client.delete("unused").expect("delete");
    wait_until("quotas know no deleted volume's id any more", || {
        let left: Vec<u64> = place.known_to_quotas();
        left.iter().all(|id| before.contains(id))
    });
}

/// Trees of tenants with root and without are erased.
fn hostile_trees(served: &Served<'_>) {
    let scratch = &served.place.scratch;
    // The tenant must find its way to the volume.
    fs::set_permissions(scratch.path(""), fs::Permissions::from_mode(0o711)).expect("open the way");
    for (seed, root) in [(1, false), (2, true)] {
        let target = served.volume("hostile", 16);
        hostile_tree::grow(&target, &scratch.mkdir("outside"), seed, root);
        assert!(!names(&target).is_empty(), "there is no tree");
        served.clear(&["hostile"]);
    }
}

/// A new volume of the same name is empty, and is filled.
fn live_once(served: &Served<'_>, life: usize) {
    let target = served.volume("again", 16);
    let (total, used) = served.stats("again", Unit::Bytes);
    assert_eq!(total, 16 * MIB);
    assert!(
        used <= served.place.slack(),
        "in round {life} the new volume already uses {used} bytes"
    );
    fs::create_dir_all(target.join("a/b/c")).expect("make directories");
    fs::write(target.join("a/b/c/file"), "deep").expect("write");
    as_in_a_container(|| fill(&target.join("file"), 64 * MIB));
    served.clear(&["again"]);
}

/// The number of concurrent callers.
const CALLERS: usize = 16;

pub(super) fn many_callers_get_volumes_of_their_own(place: &Place) {
    let served = place.start();
    let socket = place.scratch.path("csi.sock");
    let name = |caller: usize, number: usize| format!("v-{caller}-{number}");
    // A thousand volumes where hostdir gives out project ids. On btrfs the kernel gives out the ids, and each subvolume
    // costs a commit.
    let each = if place.filesystem.has_projects() { 63 } else { 6 };
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let socket = &socket;
            scope.spawn(move || {
                let client = Client::connect(socket).expect("connect");
                for number in 0..each {
                    let id = name(caller, number);
                    client.create(&id).expect("create");
                    client.publish(&id, &place.target(&id)).expect("publish");
                    client.unpublish(&id, &place.target(&id)).expect("unpublish");
                }
            });
        }
    });
    let ids: HashSet<u64> = names(place.pool.join("volumes"))
        .iter()
        .map(|id| {
            if place.filesystem.has_projects() {
                place.project(id)
            } else {
                // Every subvolume has its own device number.
                fs::metadata(place.data(id)).expect("stat").dev()
            }
        })
        .collect();
    assert_eq!(ids.len(), CALLERS * each, "two volumes share an id");
    let log = served.process.log_to_its_end();
    assert!(!log.contains("WARN"), "{log}");
    // A restart changes no id.
    let served = place.start();
    // Opening a thousand volumes takes more than a second on slow machines.
    wait_until("the pool is open", || served.client.probe().is_ok());
    if place.filesystem.has_projects() {
        let again: HashSet<u64> = names(place.pool.join("volumes"))
            .iter()
            .map(|id| place.project(id))
            .collect();
        assert_eq!(again, ids);
        served.create("one-more", 1);
        served.publish("one-more");
        assert!(!ids.contains(&place.project("one-more")));
    }
    for id in names(place.pool.join("volumes")) {
        let _ = served.client.unpublish(&id, &place.target(&id));
        served.client.delete(&id).expect("delete");
    }
    served.trash_empties();
}

pub(super) fn inodes_are_limited_or_the_setting_is_refused(place: &Place) {
    let served = place.serve("quota: required, inodesPerGiB: 100");
    if !place.filesystem.has_projects() {
        let refusal = served.client.probe().expect_err("btrfs limits no inodes");
        assert!(refusal.message().contains("inodesPerGiB"), "{}", refusal.message());
        return;
    }
    let target = served.volume("many-files", 16);
    let made = as_in_a_container(|| {
        (0..200)
            .take_while(|number| fs::write(target.join(number.to_string()), "").is_ok())
            .count()
    });
    assert_eq!(made, 99, "data/ itself is the hundredth inode");
    assert_eq!(served.stats("many-files", Unit::Inodes), (100, 100));
    served.expand("many-files", 1025);
    assert_eq!(
        served.stats("many-files", Unit::Inodes).0,
        200,
        "the inode limit grows with the size"
    );
    as_in_a_container(|| fs::write(target.join("one-more"), "")).expect("the inode limit is larger now");
    served.clear(&["many-files"]);
}

pub(super) fn a_full_pool_answers_clearly_and_deletes_still_work(place: &Place) {
    let served = place.start();
    let victim = served.volume("victim", 16);
    as_in_a_container(|| fill(&victim.join("file"), 12 * MIB));
    served.create("claimed", 16);
    let foreign = place.disk.join("foreign");
    fill(&foreign, u64::MAX);

    // Each call succeeds, or fails with a clear message.
    let check_answer = |answer: Result<(), tonic::Status>, call: &str| {
        if let Err(status) = answer {
            let known = [Code::ResourceExhausted, Code::OutOfRange, Code::FailedPrecondition];
            assert!(known.contains(&status.code()), "{call}: {status:?}");
            assert!(status.message().contains("node-a"), "{call}: {status:?}");
        }
    };
    check_answer(served.client.create("new").map(drop), "create");
    check_answer(served.client.publish("claimed", &place.target("claimed")), "publish");
    check_answer(served.client.expand("victim", 32 << 20).map(drop), "expand");
    served.client.probe().expect("a full pool is usable");
    assert_eq!(served.stats("victim", Unit::Bytes).0 % MIB, 0);
    let _ = served.client.unpublish("claimed", &place.target("claimed"));
    served.clear(&["victim"]);
    let after = statvfs(&place.pool).expect("statvfs");
    assert!(after.blocks_free() > 0, "the deletes freed no space");

    drop(served);
    let served = place.start();
    fs::remove_file(&foreign).expect("free space");
    let target = served.publish("claimed");
    assert!(
        user_writes(&target.join("file"), 12 * MIB),
        "the freed space cannot be used"
    );
    served.clear(&["claimed"]);
}

pub(super) fn links_and_renames_between_volumes_are_refused(place: &Place) {
    let served = place.start();
    served.volume("from", 16);
    served.volume("to", 16);
    // In the pool itself, where both volumes are below one mount.
    let (from, to) = (place.data("from"), place.data("to"));
    fs::write(from.join("file"), "mine").expect("write");
    fs::create_dir(from.join("dir")).expect("make a directory");
    let exdev = Some(Errno::EXDEV as i32);
    let link = fs::hard_link(from.join("file"), to.join("file")).expect_err("linked");
    assert_eq!(link.raw_os_error(), exdev, "link: {link}");
    for name in ["file", "dir"] {
        let renamed = fs::rename(from.join(name), to.join(name));
        // rename(2) checks the project on XFS and ext4, and the subvolume on btrfs.
        assert_eq!(renamed.expect_err("renamed").raw_os_error(), exdev, "{name}");
    }
    if place.simple {
        subvolumes_with_groups_of_their_own(&served);
    }
    if !place.filesystem.has_projects() {
        subvolumes_of_a_tenant(place);
    }
    served.clear(&["from", "to"]);
}

/// Subvolumes that a tenant makes in a volume count towards its limit with simple quotas, and can be erased.
fn subvolumes_of_a_tenant(place: &Place) {
    let btrfs = |args: &[&str], at: &Path| drop(run(Command::new("btrfs").args(args).arg(at)));
    let nested = place.target("from").join("nested");
    btrfs(&["subvolume", "create"], &nested);
    if place.simple {
        let written = as_in_a_container(|| fill(&nested.join("file"), 64 * MIB));
        assert!(
            written <= 16 * MIB,
            "{written} bytes could be written into a volume of 16 MiB"
        );
        fs::remove_file(nested.join("file")).expect("remove");
    }
    fs::create_dir_all(nested.join("a/b")).expect("make directories");
    // Deeper than a path that BTRFS_IOC_INO_LOOKUP returns.
    let mut bottom: OwnedFd = fs::File::open(&nested).expect("open").into();
    for _ in 0..17 {
        let name = "d".repeat(250);
        mkdirat(&bottom, name.as_str(), Mode::S_IRWXU).expect("make a directory");
        bottom = openat(&bottom, name.as_str(), OFlag::O_DIRECTORY, Mode::empty()).expect("open");
    }
    let bottom_path = format!("/proc/{}/fd/{}", std::process::id(), bottom.as_raw_fd());
    btrfs(&["subvolume", "create"], &Path::new(&bottom_path).join("deepest"));
    drop(bottom);
    let deeper = nested.join("a/b/deeper");
    btrfs(&["subvolume", "create"], &deeper);
    fs::write(deeper.join("file"), "nested").expect("write");
    run(Command::new("chattr").arg("+i").arg(nested.join("a/b")));
    for subvolume in [&deeper, &nested] {
        run(Command::new("btrfs")
            .args(["property", "set"])
            .arg(subvolume)
            .args(["ro", "true"]));
    }
}

/// With simple quotas a tenant can name the groups of a subvolume that it makes: its neighbour's, or none.
fn subvolumes_with_groups_of_their_own(served: &Served<'_>) {
    let place = served.place;
    served.volume("taker", 16);
    served.volume("victim", 16);
    let shown = run(Command::new("btrfs")
        .args(["inspect-internal", "rootid"])
        .arg(place.target("victim")));
    let neighbours: u64 = 26_724 << 48 | shown.trim().parse::<u64>().expect("an id");
    for (name, group) in [("foreign", Some(neighbours)), ("none", None)] {
        let subvolume = place.target("taker").join(name);
        create_subvolume_in(&subvolume, group);
        let inner = subvolume.join("inner");
        run(Command::new("btrfs").args(["subvolume", "create"]).arg(&inner));
        as_in_a_container(|| fill(&subvolume.join("file"), 6 * MIB));
        as_in_a_container(|| fill(&inner.join("file"), 6 * MIB));
    }
    // The kubelet asks every minute.
    let (_, used) = served.stats("taker", Unit::Bytes);
    assert!(used >= 16 * MIB, "only {used} of more than 16 MiB count");
    for name in ["foreign", "none", "none/inner"] {
        let more = place.target("taker").join(name).join("more");
        let written = as_in_a_container(|| fill(&more, 4 * MIB));
        assert!(written < MIB, "{written} more bytes could be written into {name}");
    }
    let (_, used) = served.stats("victim", Unit::Bytes);
    assert!(used < 2 * MIB, "{used} bytes count towards the neighbour's limit");
    served.clear(&["taker", "victim"]);
}

pub(super) fn a_restart_restores_limits(place: &Place) {
    let served = place.start();
    let target = served.volume("kept", 16);
    drop(served);
    // While the driver is down, somebody removes the limit, and the pod goes on writing.
    if place.filesystem.has_projects() {
        let project = place.project("kept").to_string();
        run(Command::new("setquota")
            .args(["-P", &project, "0", "0", "0", "0"])
            .arg(&place.disk));
    } else {
        let group = if place.simple { "26724/" } else { "0/" };
        let shown = run(Command::new("btrfs").args(["inspect-internal", "rootid"]).arg(&target));
        run(Command::new("btrfs")
            .args(["qgroup", "limit", "none"])
            .arg(format!("{group}{}", shown.trim()))
            .arg(&place.disk));
    }
    assert!(
        user_writes(&target.join("before"), 24 * MIB),
        "the limit was not removed"
    );
    let served = place.start();
    assert_eq!(served.stats("kept", Unit::Bytes).0, 16 * MIB);
    assert!(
        !user_writes(&target.join("after"), 4 * MIB),
        "the limit was not set again"
    );
    fs::remove_file(target.join("before")).expect("remove");
    wait_until("there is room again", || user_writes(&target.join("after"), 8 * MIB));
    served.clear(&["kept"]);
}
