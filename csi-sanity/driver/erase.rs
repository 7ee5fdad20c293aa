//! The eraser removes everything in a deleted volume, and nothing else.

use super::place::Place;
use hostdir_lab::attributes::encrypt;
use hostdir_lab::hostile_tree;
use hostdir_lab::scratch::{mounts_below, names};
use hostdir_lab::{needs, wait_until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{self, SFlag, mknod};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;

#[needs(Root)]
fn the_eraser_removes_special_files_and_follows_no_links() {
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
fn a_million_files_are_erased_while_other_volumes_are_served() {
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
        "DeleteVolume waited for the eraser"
    );
    // Meanwhile other volumes are created, used and deleted, one of them under the same name.
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

/// Whatever a tenant makes is erased.
#[needs(Root, FileFlags)]
fn any_tree_of_a_hostile_tenant_is_erased() {
    let place = Place::new();
    // The tenant must find its way to the volume.
    fs::set_permissions(place.scratch.path(""), fs::Permissions::from_mode(0o711)).unwrap();
    for (seed, root) in (0..8).flat_map(|seed| [(seed, false), (seed, true)]) {
        place.used_volume("pvc-1");
        let data = place.data("pvc-1");
        fs::set_permissions(&data, fs::Permissions::from_mode(0o777)).unwrap();
        place.client.publish("pvc-1", &place.target()).unwrap();
        hostile_tree::grow(&place.target(), &place.scratch.path("outside"), seed, root);
        assert!(!names(&data).is_empty(), "seed {seed}: there is no tree");
        place.client.unpublish("pvc-1", &place.target()).unwrap();
        place.client.delete("pvc-1").unwrap();
        let trash = place.scratch.path("pool/trash");
        wait_until(&format!("the tree of seed {seed} is erased (root: {root})"), || {
            names(&trash).is_empty()
        });
    }
    place.check_outside();
}

/// Nothing can be moved out of an encrypted directory whose key is gone.
#[needs(Root, Encryption)]
fn encrypted_directories_are_erased_without_their_key() {
    let place = Place::on_disk(&["mkfs.ext4", "-q", "-O", "encrypt"]);
    place.used_volume("pvc-1");
    let secret = place.data("pvc-1").join("secret");
    fs::create_dir(&secret).unwrap();
    let key = encrypt(&secret);
    let mut deep = secret.clone();
    for level in 0..50 {
        deep.push(format!("level-{level}"));
        fs::create_dir(&deep).unwrap();
        fs::write(deep.join("file"), "secret").unwrap();
        symlink("/", deep.join("link")).unwrap();
    }
    for number in 0..300 {
        fs::create_dir_all(secret.join(format!("dir-{number}/dir"))).unwrap();
    }
    key.remove();
    assert!(!secret.join("dir-1").exists(), "the directory is not locked");
    place.delete_and_wait("pvc-1");
}

#[needs(Root)]
fn mounts_inside_a_deleted_volume_are_not_erased() {
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
    // Everything else is erased; the mount points are erased once they are unmounted.
    for mount_point in mounts_below(&place.scratch.path("pool")) {
        umount2(&mount_point, MntFlags::empty()).unwrap();
    }
    let place = place.restart();
    wait_until("the trash is empty", || {
        names(place.scratch.path("pool/trash")).is_empty()
    });
    place.check_outside();
}
