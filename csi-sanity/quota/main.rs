//! Sizes that the kernel enforces, on XFS, ext4 and btrfs in machines of User-Mode Linux (UML) and on this machine's btrfs;
//! and power cuts.
//!
//! This program runs outside and inside: outside it starts UML machines ([`hostdir_lab::uml`]), which run this program
//! again with the tests that need `Guest`.

mod guest;
mod place;
mod policy;
mod power;
mod scenarios;

use std::path::{Path, PathBuf};
use std::time::Instant;

use hostdir_lab::attributes::make_immutable;
use hostdir_lab::disk::{Filesystem, enable_btrfs_quotas, known_to_quotas, mount_image};
use hostdir_lab::scene::{Call, Scene, start};
use hostdir_lab::uml::{self, Files, Machine};
use hostdir_lab::{Scratch, needs, steps, wait_until};
use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use place::Place;

fn main() -> std::process::ExitCode {
    hostdir_lab::harness::main(env!("CARGO_BIN_EXE_hostdir"))
}

/// Size of the disks, in MiB: XFS needs at least 300, and a thousand subvolumes take space.
const DISK: u64 = 1536;

#[needs(Root, Uml)]
fn sizes_hold_on_xfs() {
    Machine::new(Filesystem::Xfs, DISK).run("guest::", Files::InMemory, &[]);
}

#[needs(Root, Uml)]
fn sizes_hold_on_ext4() {
    Machine::new(Filesystem::Ext4, DISK).run("guest::", Files::InMemory, &[]);
}

#[needs(Root, Uml)]
fn sizes_hold_on_btrfs() {
    Machine::new(Filesystem::Btrfs, DISK).run("guest::", Files::InMemory, &[]);
}

/// A pool with quotas survives death at every step, as one without quotas does (`driver/crash.rs`).
#[needs(Root, Uml)]
fn limits_and_projects_survive_death_at_every_step_on_xfs() {
    Machine::new(Filesystem::Xfs, DISK).run("guest_dies_", Files::OnDisk, &[]);
}

#[needs(Root, Uml)]
fn limits_and_projects_survive_death_at_every_step_on_ext4() {
    Machine::new(Filesystem::Ext4, DISK).run("guest_dies_", Files::OnDisk, &[]);
}

#[needs(Root, Uml)]
fn limits_and_projects_survive_failure_at_every_step_on_xfs() {
    Machine::new(Filesystem::Xfs, DISK).run("guest_fails_", Files::OnDisk, &[]);
}

/// Only the calls that change quotas.
#[needs(Guest)]
fn guest_dies_at_every_step() {
    let calls = [Call::FirstPublish, Call::Expand, Call::DeleteAndErase];
    break_every_step(uml::filesystem(), uml::DISK.as_ref(), &calls, steps::dies_at_every_step);
}

#[needs(Guest)]
fn guest_fails_at_every_step() {
    let calls = [Call::FirstPublish, Call::Expand];
    break_every_step(uml::filesystem(), uml::DISK.as_ref(), &calls, fails_at_every_step);
}

#[needs(Root, Btrfs)]
fn quota_groups_survive_death_at_every_step_on_btrfs_of_this_machine() {
    let scratch = Scratch::new();
    let disk = btrfs(&scratch, false);
    break_every_step(Filesystem::Btrfs, &disk, &Call::ALL, steps::dies_at_every_step);
}

#[needs(Root, Btrfs)]
fn quota_groups_survive_failure_at_every_step_on_btrfs_of_this_machine() {
    let scratch = Scratch::new();
    let disk = btrfs(&scratch, false);
    break_every_step(Filesystem::Btrfs, &disk, &Call::ALL, fails_at_every_step);
}

fn fails_at_every_step(scene: &Scene, call: Call) {
    steps::fails_at_every_step(scene, call, Errno::EIO);
}

/// Breaks every step of `calls` on a pool that requires quotas: each volume must then be enforced, or refused. In the end
/// quotas must know the same ids as before.
fn break_every_step(filesystem: Filesystem, disk: &Path, calls: &[Call], break_steps: fn(&Scene, Call)) {
    let before = known_to_quotas(filesystem, disk);
    let scene = Scene::with_quotas_in(disk);
    for call in calls {
        break_steps(&scene, *call);
        // A new process finishes what the last one left undone when it opens the pool.
        let (_process, _client) = start(&scene.healthy());
        wait_until("quotas know no volume's id any more", || {
            known_to_quotas(filesystem, disk) == before
        });
    }
}

#[needs(Root, Btrfs)]
fn sizes_hold_on_btrfs_of_this_machine() {
    on_this_machine(false);
}

#[needs(Root, Btrfs)]
fn sizes_hold_on_btrfs_of_this_machine_with_simple_quotas() {
    on_this_machine(true);
}

/// XFS of this machine has no quotas, but flags of links.
#[needs(Root, FlagsOfLinks)]
fn immutable_links_and_pipes_are_erased_on_xfs_of_this_machine() {
    let scratch = Scratch::new();
    let disk = mounted(Filesystem::Xfs, &scratch);
    let place = Place::new(scratch, disk, Filesystem::Xfs, false);
    let served = place.serve("quota: auto");
    let target = served.volume("pvc-1", 16);
    for dir in ["", "dir"] {
        let dir = target.join(dir);
        std::fs::create_dir_all(&dir).expect("make a directory");
        std::os::unix::fs::symlink("/", dir.join("link")).expect("make a link");
        mkfifo(&dir.join("pipe"), Mode::S_IRWXU).expect("make a pipe");
        for name in ["link", "pipe"] {
            make_immutable(&dir.join(name)).expect("make it immutable");
            std::fs::remove_file(dir.join(name)).expect_err("it is immutable");
        }
    }
    served.clear(&["pvc-1"]);
    served.trash_empties();
}

/// Mounts a new filesystem from a loop device.
fn mounted(filesystem: Filesystem, scratch: &Scratch) -> PathBuf {
    let image = filesystem.make(&scratch.path(""), DISK);
    let disk = scratch.mkdir("disk");
    mount_image(&image, &disk);
    disk
}

/// Mounts a btrfs with quotas.
fn btrfs(scratch: &Scratch, simple: bool) -> PathBuf {
    let disk = mounted(Filesystem::Btrfs, scratch);
    enable_btrfs_quotas(&disk, simple);
    disk
}

/// Runs all scenarios on this machine's btrfs.
fn on_this_machine(simple: bool) {
    for (name, scenario) in scenarios::ALL {
        let scratch = Scratch::new();
        let disk = btrfs(&scratch, simple);
        let start = Instant::now();
        scenario(&Place::new(scratch, disk, Filesystem::Btrfs, simple));
        println!("    {name}: {:.1} s", start.elapsed().as_secs_f64());
    }
}
