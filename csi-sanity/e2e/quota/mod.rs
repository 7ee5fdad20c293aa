//! Sizes that the kernel enforces: on XFS, ext4 and btrfs in a machine of our own, and on btrfs here.

mod inside;
mod place;
mod power;
mod scenarios;
mod wishes;

use std::time::Instant;

use nix::unistd::geteuid;

use crate::support::disk::{Filesystem, enable_btrfs_quotas, run};
use crate::support::uml::{Files, Machine};
use crate::support::{Scratch, skipped};
use hostdir_cluster::tools;
use place::Place;

/// Size of the disks, in MiB: XFS takes none below 300, and a thousand subvolumes take room.
const DISK: u64 = 1536;

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
    in_a_machine(Filesystem::Xfs, "crash::", Files::OnDisk);
}

#[test]
fn death_at_every_step_leaves_limits_and_projects_whole_on_ext4() {
    in_a_machine(Filesystem::Ext4, "crash::", Files::OnDisk);
}

#[test]
fn sizes_hold_on_btrfs_of_this_machine() {
    on_this_machine("sizes_hold_on_btrfs_of_this_machine", false);
}

#[test]
fn sizes_hold_on_btrfs_of_this_machine_with_simple_quotas() {
    on_this_machine("sizes_hold_on_btrfs_of_this_machine_with_simple_quotas", true);
}

/// The scenarios on a loop device.
fn on_this_machine(test: &str, simple: bool) {
    if !geteuid().is_root() {
        return skipped(test, "it needs root, to mount");
    }
    let known = std::fs::read_to_string("/proc/filesystems").expect("read /proc/filesystems");
    if !known.contains("btrfs") {
        return skipped(test, "the kernel has no btrfs");
    }
    if let Err(why) = tools::mkfs_btrfs() {
        return skipped(test, &format!("{why:#}"));
    }
    for (name, scenario) in scenarios::ALL {
        let Some(scratch) = Scratch::new(test) else { return };
        let image = Filesystem::Btrfs.make(&scratch.path(""), DISK);
        let disk = scratch.mkdir("disk");
        // The loop device goes with the mount.
        run(std::process::Command::new("mount")
            .args(["-o", "loop"])
            .arg(image)
            .arg(&disk));
        enable_btrfs_quotas(&disk, simple);
        let start = Instant::now();
        scenario(&Place::new(scratch, disk, Filesystem::Btrfs, simple));
        println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
    }
}
