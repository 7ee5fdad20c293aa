//! The cost of quotas, on btrfs on a loop device: the first publish with and without quotas, statistics of one volume among
//! few and among many, and ControllerExpandVolume compared with the bare calls.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::bare;
use super::rpc::Served;
use super::table::{Samples, Table, percentiles};
use super::{CROWD, CYCLES, target};

/// Size of the sparse disk image.
const DISK: u64 = 20 << 30;

/// Runs the measurements if btrfs with quotas is available.
pub(crate) fn run(dir: &Path, table: &mut Table) {
    let image = dir.join("btrfs.img");
    File::create(&image)
        .and_then(|file| file.set_len(DISK))
        .expect("make an image");
    let disk = dir.join("btrfs");
    fs::create_dir(&disk).expect("make a directory");
    let (image, disk_path) = (image.display().to_string(), disk.display().to_string());
    let commands = [
        &["mkfs.btrfs", "-q", "-K", &image][..],
        &["mount", "-o", "loop", &image, &disk_path],
        &["btrfs", "quota", "enable", &disk_path],
    ];
    let done = |command: &&[&str]| {
        let status = Command::new(command[0]).args(&command[1..]).status();
        status.is_ok_and(|status| status.success())
    };
    if commands.iter().all(done) {
        measure(&disk, table);
    } else {
        table.fact("quotas", "SKIPPED: this machine has no btrfs with quotas");
    }
    // The scratch directory cannot be removed while a disk is mounted in it. Fails if the mount failed.
    let _ = umount2(&disk, MntFlags::MNT_DETACH);
}

fn measure(disk: &Path, table: &mut Table) {
    let start = |name: &str, quota: &str| {
        let dir = disk.join(name);
        fs::create_dir(&dir).expect("make a directory");
        Served::start_with(&dir, &format!("quota: \"{quota}\", overcommit: 1000"))
    };
    let (limited, unlimited) = (start("limited", "required"), start("unlimited", "off"));
    first_publish(&limited, &unlimited, table);
    drop(unlimited);
    growth(&limited, &disk.join("limited"), table);
    statistics(&limited, table);
    limited.fill(CROWD);
    statistics(&limited, table);
    limited.unpublish_all(CROWD);
}

/// Measures the first NodePublishVolume, with and without quotas in turn.
fn first_publish(limited: &Served, unlimited: &Served, table: &mut Table) {
    let (mut with, mut without) = (Samples::default(), Samples::default());
    for number in 0..CYCLES / 2 {
        with.add(&limited.cycle(&format!("with-{number}")));
        without.add(&unlimited.cycle(&format!("without-{number}")));
    }
    let ((with, with_p99), (without, without_p99)) = (percentiles(with.step(1)), percentiles(without.step(1)));
    table.fact(
        "first NodePublishVolume on btrfs, p50 (p99), quotas / none",
        &format!(
            "{with:.0} ({with_p99:.0}) / {without:.0} ({without_p99:.0}) us: {:.2} times",
            with / without
        ),
    );
}

/// Measures NodeGetVolumeStats of one volume, in turn with GetPluginInfo, which shows the cost of any call over the socket.
fn statistics(served: &Served, table: &mut Table) {
    let path = served.make("read");
    let (mut of_stats, mut of_info) = (Vec::new(), Vec::new());
    settle(served, &path);
    (0..CYCLES).for_each(|_| served.stats(&path));
    for _ in 0..10 * CYCLES {
        let start = Instant::now();
        served.stats(&path);
        of_stats.push(start.elapsed());
        let start = Instant::now();
        served.info();
        of_info.push(start.elapsed());
    }
    let count = served.count();
    served.unpublish("read");
    served.delete("read");
    let ((stats, stats_p99), (info, info_p99)) = (percentiles(&of_stats), percentiles(&of_info));
    table.fact(
        &format!("NodeGetVolumeStats / GetPluginInfo on btrfs, {count} volumes, p50 (p99)"),
        &format!("{stats:.0} ({stats_p99:.0}) / {info:.0} ({info_p99:.0}) us"),
    );
}

/// Waits until earlier deletes are erased and btrfs has freed their space: both would take CPU time during the measurement.
fn settle(served: &Served, path: &Path) {
    served.wait_for_eraser();
    btrfs(["subvolume", "sync"], path);
    btrfs(["filesystem", "sync"], path);
}

fn btrfs(command: [&str; 2], path: &Path) {
    let done = Command::new("btrfs").args(command).arg(path).output();
    let done = done.expect("run btrfs");
    assert!(
        done.status.success(),
        "btrfs {command:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// Measures ControllerExpandVolume, in turn with bare calls that set a limit and write a record.
fn growth(served: &Served, dir: &Path, table: &mut Table) {
    served.make("growing");
    let subvolume = dir.join("subvolume");
    btrfs(["subvolume", "create"], &subvolume);
    let (subvolume, records) = (File::open(&subvolume).expect("open"), File::open(dir).expect("open"));
    let (mut of_bare, mut of_served) = (Vec::new(), Vec::new());
    for number in 1..=CYCLES as u64 {
        let size = (number + 1) << 20;
        let start = Instant::now();
        limit(&subvolume, size).expect("limit a quota group");
        bare::write(&dir.join("record.new")).expect("write a record");
        fs::rename(dir.join("record.new"), dir.join("record")).expect("rename a record");
        records.sync_all().expect("sync");
        of_bare.push(start.elapsed());
        let start = Instant::now();
        served.expand("growing", i64::try_from(size).expect("a size"));
        of_served.push(start.elapsed());
    }
    assert!(target(dir, "growing").exists());
    let ((bare, bare_p99), (served_p50, served_p99)) = (percentiles(&of_bare), percentiles(&of_served));
    table.fact(
        "ControllerExpandVolume on btrfs, p50 (p99), hostdir / bare",
        &format!(
            "{served_p50:.0} ({served_p99:.0}) / {bare:.0} ({bare_p99:.0}) us: {:.2} times",
            served_p50 / bare
        ),
    );
    served.unpublish("growing");
    served.delete("growing");
}

/// `BTRFS_IOC_QGROUP_LIMIT` for the subvolume's own quota group, which is group 0 in the call.
#[expect(unsafe_code, reason = "system calls without a safe wrapper")]
fn limit(subvolume: &File, bytes: u64) -> nix::Result<()> {
    // struct btrfs_ioctl_qgroup_limit_args: group, flags (BTRFS_QGROUP_LIMIT_MAX_RFER), maximum, and three unused fields.
    let arguments: [u64; 6] = [0, 1, bytes, 0, 0, 0];
    let number = nix::request_code_read!(0x94, 43, size_of::<[u64; 6]>());
    // SAFETY: the kernel reads a structure of this size, which outlives the call.
    Errno::result(unsafe { libc::ioctl(subvolume.as_raw_fd(), number, arguments.as_ptr()) }).map(drop)
}
