//! Sizes that the kernel enforces: on XFS, ext4 and btrfs in a machine of our own, and on btrfs here.

mod inside;
mod place;
mod power;
mod scenarios;
mod wishes;

use std::path::PathBuf;
use std::time::Instant;

use nix::unistd::geteuid;

use crate::support::disk::{Filesystem, enable_btrfs_quotas, run};
use crate::support::uml::{Files, Machine};
use crate::support::{Scratch, skipped};
use hostdir_cluster::tools;
use place::Place;

/// Size of the disks, in MiB: XFS takes none below 300, and a thousand subvolumes take room.
const DISK: u64 = 1536;

/// The calls that change what quotas know.
const CRASHES: &str = "crash::first_publish crash::expand crash::delete_and_erase";

fn in_a_machine(filesystem: Filesystem, tests: &str, files: Files) {
    let name = format!("{tests} on {}", filesystem.name());
    if let Some(machine) = Machine::new(&name, filesystem, DISK) {
        machine.run(tests, files, &[]);
    }
}

#[test]
fn sizes_hold_on_xfs() {
    in_a_machine(Filesystem::Xfs, "quota::inside::", Files::InMemory);
}

#[test]
fn sizes_hold_on_ext4() {
    in_a_machine(Filesystem::Ext4, "quota::inside::", Files::InMemory);
}

#[test]
fn sizes_hold_on_btrfs() {
    in_a_machine(Filesystem::Btrfs, "quota::inside::", Files::InMemory);
}

/// What `crash` does to a pool without quotas, it does to one with them.
#[test]
fn death_at_every_step_leaves_limits_and_projects_whole_on_xfs() {
    in_a_machine(Filesystem::Xfs, CRASHES, Files::OnDisk);
}

#[test]
fn death_at_every_step_leaves_limits_and_projects_whole_on_ext4() {
    in_a_machine(Filesystem::Ext4, CRASHES, Files::OnDisk);
}

#[test]
fn failure_at_every_step_leaves_limits_and_projects_whole_on_xfs() {
    in_a_machine(Filesystem::Xfs, "faults::publish_and_expand", Files::OnDisk);
}

#[test]
fn sizes_hold_on_btrfs_of_this_machine() {
    on_this_machine("sizes_hold_on_btrfs_of_this_machine", false);
}

#[test]
fn sizes_hold_on_btrfs_of_this_machine_with_simple_quotas() {
    on_this_machine("sizes_hold_on_btrfs_of_this_machine_with_simple_quotas", true);
}

#[test]
fn death_and_failure_at_every_step_leave_quota_groups_whole_on_btrfs_of_this_machine() {
    let test = "death_and_failure_at_every_step_on_btrfs";
    if !btrfs_is_here(test) {
        return;
    }
    let Some(scratch) = Scratch::new(test) else { return };
    let disk = btrfs(&scratch, false);
    // The same tests in a process of their own, whose files are on that disk.
    let tests = ["crash::", "faults::every_step_may_fail_with_eio"];
    let program = std::env::current_exe().expect("the path of this program");
    run(std::process::Command::new(program).args(tests).env("TMPDIR", disk));
}

/// Whether btrfs can be had here; if not, that is said.
fn btrfs_is_here(test: &str) -> bool {
    let known = std::fs::read_to_string("/proc/filesystems").expect("read /proc/filesystems");
    let why = if !geteuid().is_root() {
        "it needs root, to mount".to_owned()
    } else if !known.contains("btrfs") {
        "the kernel has no btrfs".to_owned()
    } else if let Err(why) = tools::mkfs_btrfs() {
        format!("{why:#}")
    } else {
        return true;
    };
    skipped(test, &why);
    false
}

/// A filesystem with quotas on a loop device, which goes with the mount.
fn btrfs(scratch: &Scratch, simple: bool) -> PathBuf {
    let image = Filesystem::Btrfs.make(&scratch.path(""), DISK);
    let disk = scratch.mkdir("disk");
    run(std::process::Command::new("mount")
        .args(["-o", "loop"])
        .arg(image)
        .arg(&disk));
    enable_btrfs_quotas(&disk, simple);
    disk
}

/// The scenarios on a loop device.
fn on_this_machine(test: &str, simple: bool) {
    if !btrfs_is_here(test) {
        return;
    }
    for (name, scenario) in scenarios::ALL {
        let Some(scratch) = Scratch::new(test) else { return };
        let disk = btrfs(&scratch, simple);
        let start = Instant::now();
        scenario(&Place::new(scratch, disk, Filesystem::Btrfs, simple));
        println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
    }
}
