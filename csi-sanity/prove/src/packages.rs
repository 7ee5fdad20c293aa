//! Debian packages that tests need. `cargo prove` installs them first; tests install nothing.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::{output, text_of};

/// A package, recognized as installed by a file that tests use.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// The package's name in Debian.
    pub name: &'static str,
    /// The file.
    pub file: &'static str,
}

const fn package(name: &'static str, file: &'static str) -> Package {
    Package { name, file }
}

/// For btrfs on a loop device.
pub const BTRFS: &[Package] = &[package("btrfs-progs", "/usr/sbin/mkfs.btrfs")];

/// For User-Mode Linux, and XFS and ext4 with project quotas in it.
pub const UML: &[Package] = &[
    package("user-mode-linux", "/usr/bin/linux.uml"),
    package("kmod", "/usr/sbin/insmod"),
    package("xfsprogs", "/usr/sbin/mkfs.xfs"),
    package("e2fsprogs", "/usr/sbin/mkfs.ext4"),
    package("quota", "/usr/sbin/repquota"),
];

/// For the cluster: runc's library, and the shell of its pods.
pub const CLUSTER: &[Package] = &[
    package("libseccomp-dev", "/usr/include/seccomp.h"),
    package("busybox-static", "/usr/bin/busybox"),
    package("iproute2", "/usr/sbin/ip"),
];

/// How long to wait for another apt-get: an image that updates itself at its first boot takes minutes.
const PATIENCE: Duration = Duration::from_mins(15);

/// The packages that are not installed.
#[must_use]
pub fn missing(packages: &[Package]) -> Vec<Package> {
    let is_missing = |package: &&Package| !Path::new(package.file).exists();
    packages.iter().filter(is_missing).copied().collect()
}

/// Whether this process can install packages at all.
#[must_use]
pub fn can_be_installed() -> bool {
    Path::new("/usr/bin/apt-get").exists() && is_root()
}

/// Whether this process runs as root: then root owns its directory in proc(5).
fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Installs all packages that are missing. Waits for another apt-get that runs.
///
/// # Errors
/// A package cannot be installed.
pub fn install() -> Result<()> {
    let missing = missing(&[BTRFS, UML, CLUSTER].concat());
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    eprintln!("prove: installing Debian packages: {}", names.join(" "));
    apt_get(&["update", "-q"])?;
    apt_get(&[&["install", "-y", "-q", "--no-install-recommends"], &names[..]].concat())?;
    for package in missing {
        ensure!(
            Path::new(package.file).exists(),
            "the package {} is installed, but has no file {}",
            package.name,
            package.file
        );
    }
    Ok(())
}

fn apt_get(args: &[&str]) -> Result<()> {
    let start = Instant::now();
    loop {
        let mut command = Command::new("apt-get");
        command
            .args(["-o", "DPkg::Lock::Timeout=60"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            // The English message about a lock is searched for below.
            .env("LC_ALL", "C");
        let ended = output(&mut command)?;
        let error = match text_of(&ended) {
            Ok(_) => return Ok(()),
            Err(error) => error.context(format!("apt-get {}", args.join(" "))),
        };
        // `update` has a lock of its own, for which apt-get does not wait.
        if !format!("{error:#}").contains("Could not get lock") {
            bail!(error);
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "gave up waiting for another apt-get: {error:#}"
        );
        eprintln!("prove: another apt-get is running; waiting for it");
        std::thread::sleep(Duration::from_secs(5));
    }
}

/// A message about missing packages, and how to install them.
#[must_use]
pub fn remedy(missing: &[Package]) -> String {
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    format!(
        "Debian packages are not installed: {}; `cargo prove prepare` installs all that the tests need",
        names.join(", ")
    )
}
