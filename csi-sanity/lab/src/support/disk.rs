//! Disks for tests: image files with filesystems that have quotas, mounted here or in a UML machine.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};

use super::scratch::names;

/// A filesystem that has quotas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filesystem {
    Xfs,
    Ext4,
    Btrfs,
}

impl Filesystem {
    pub const ALL: [Self; 3] = [Self::Xfs, Self::Ext4, Self::Btrfs];

    /// The filesystem type as mount(8) expects it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xfs => "xfs",
            Self::Ext4 => "ext4",
            Self::Btrfs => "btrfs",
        }
    }

    pub fn named(name: &str) -> Self {
        let found = Self::ALL.into_iter().find(|filesystem| filesystem.name() == name);
        found.unwrap_or_else(|| panic!("{name} is not a known filesystem"))
    }

    /// Whether volumes are limited by project quotas.
    pub fn has_projects(self) -> bool {
        self != Self::Btrfs
    }

    /// Makes an image file with an empty filesystem. Returns its path.
    pub fn make(self, dir: &Path, mib: u64) -> PathBuf {
        let image = dir.join(format!("{}.img", self.name()));
        let args: &[&str] = match self {
            Self::Xfs => &["mkfs.xfs", "-q", "-K"],
            Self::Ext4 => &["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota"],
            Self::Btrfs => &["mkfs.btrfs", "-q", "-K"],
        };
        make_image(&image, mib, args);
        image
    }

    /// Mounts a device with this filesystem, with quotas or without.
    pub fn mount(self, device: &Path, at: &Path, quotas: bool) {
        let options = (self.has_projects() && quotas).then_some("prjquota");
        mount(Some(device), at, Some(self.name()), MsFlags::empty(), options)
            .unwrap_or_else(|errno| panic!("mount {} at {}: {errno}", device.display(), at.display()));
    }
}

/// Makes an image file with the filesystem that this command makes.
fn make_image(image: &Path, mib: u64, mkfs: &[&str]) {
    let file = File::create(image).expect("make an image");
    file.set_len(mib << 20).expect("size an image");
    run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(image));
}

/// Mounts an image file on a loop device, which the kernel releases with the mount.
pub fn mount_image(image: &Path, at: &Path) {
    run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(at));
}

/// Mounts a new filesystem, which this command makes on an image file beside the mount point, with the extension `img`.
pub fn mount_new(at: &Path, mib: u64, mkfs: &[&str]) {
    let image = at.with_extension("img");
    make_image(&image, mib, mkfs);
    mount_image(&image, at);
}

/// Runs a program, which must succeed. Returns its standard output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The ids of projects or subvolumes that quotas know on the whole disk, except those of the filesystem itself.
pub fn known_to_quotas(filesystem: Filesystem, disk: &Path) -> Vec<u64> {
    if !filesystem.has_projects() {
        // The kernel removes the quota group of a deleted subvolume with the next commit, which this forces.
        run(Command::new("btrfs").args(["filesystem", "sync"]).arg(disk));
        let shown = run(Command::new("btrfs").args(["filesystem", "show"]).arg(disk));
        let uuid = shown
            .split_whitespace()
            .skip_while(|word| *word != "uuid:")
            .nth(1)
            .expect("a UUID");
        let groups = names(Path::new("/sys/fs/btrfs").join(uuid).join("qgroups"));
        return groups
            .iter()
            .filter_map(|name| name.split_once('_')?.1.parse().ok())
            .filter(|id| *id >= 256)
            .collect();
    }
    run(Command::new("sync").arg("-f").arg(disk));
    let report = run(Command::new("repquota").args(["-P", "-n", "-v"]).arg(disk));
    let ids = report.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let id: u64 = fields.first()?.strip_prefix('#')?.parse().ok()?;
        // The fields: flags, then used, soft and hard limits of blocks and inodes; a grace time only if a limit is exceeded.
        let counts: Vec<u64> = fields[2..].iter().filter_map(|field| field.parse().ok()).collect();
        (id != 0 && counts.iter().any(|count| *count > 0)).then_some(id)
    });
    ids.collect()
}

/// `struct btrfs_ioctl_quota_ctl_args`.
#[repr(C)]
struct Control {
    command: u64,
    status: u64,
}

mod raw {
    nix::ioctl_readwrite!(quota_control, 0x94, 40, super::Control);
    nix::ioctl_none!(rescan_wait, 0x94, 46);
}

/// Enables quotas on a btrfs filesystem, and waits until they are counted: `btrfs quota enable`, which in Debian has no
/// `--simple`.
pub fn enable_btrfs_quotas(at: &Path, simple: bool) {
    // BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA, BTRFS_QUOTA_CTL_ENABLE
    let command = if simple { 4 } else { 1 };
    let mut control = Control { command, status: 0 };
    let dir = File::open(at).expect("open a filesystem");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&dir);
    #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
    // SAFETY: the structure has the size that the ioctl's number encodes, and outlives the call.
    unsafe { raw::quota_control(fd, &raw mut control) }.expect("enable quotas");
    if !simple {
        #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
        // SAFETY: the call takes no argument.
        unsafe { raw::rescan_wait(fd) }.expect("wait for the rescan");
    }
}
