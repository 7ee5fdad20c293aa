//! A directory and a mount namespace for one test.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// A directory that is removed on drop, in a mount namespace that ends with the test's thread and its children, so that no
/// mount is left behind.
pub struct Scratch {
    dir: TempDir,
}

impl Scratch {
    /// Makes a directory, and moves this thread into a new mount namespace. Needs root.
    #[expect(clippy::new_without_default, reason = "it moves the thread into a mount namespace")]
    pub fn new() -> Self {
        Self::new_in(&std::env::temp_dir())
    }

    /// Like [`Scratch::new`], below `dir`.
    pub fn new_in(dir: &Path) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("make a mount namespace");
        // Mounts made here must not propagate to the machine.
        remount("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        let dir = tempfile::Builder::new()
            .prefix("hostdir-")
            .tempdir_in(dir)
            .expect("make a directory");
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a directory below the scratch directory.
    pub fn mkdir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("make a directory");
        path
    }

    /// Makes a directory below the scratch directory, and mounts a tmpfs of `size` (as in tmpfs(5)) on it.
    pub fn tmpfs(&self, name: &str, size: &str) -> PathBuf {
        let path = self.mkdir(name);
        let options = format!("size={size},mode=0700");
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .expect("mount a tmpfs");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A directory with mounts in it cannot be removed.
        for mount_point in mounts_below(self.dir.path()).into_iter().rev() {
            let flags = nix::mount::MntFlags::MNT_DETACH;
            if let Err(errno) = nix::mount::umount2(&mount_point, flags) {
                eprintln!("cannot unmount {}: {errno}", mount_point.display());
            }
        }
        clear_flags(self.dir.path());
    }
}

/// Removes chattr(1) flags that a failed test left behind.
fn clear_flags(path: &Path) {
    let _ = std::process::Command::new("chattr")
        .args(["-R", "-f", "-i", "-a"])
        .arg(path)
        .output();
}

/// Changes the flags of a mount.
pub fn remount(path: impl AsRef<Path>, flags: MsFlags) {
    mount(None::<&str>, path.as_ref(), None::<&str>, flags, None::<&str>).expect("change a mount");
}

/// The mount points at and below a path, in the order in which they were made.
pub fn mounts_below(path: &Path) -> Vec<PathBuf> {
    // Each test thread has its own mount namespace.
    let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("read the mount table");
    let mount_points = table.lines().filter_map(|line| line.split(' ').nth(4));
    mount_points
        .map(PathBuf::from)
        .filter(|mount_point| mount_point.starts_with(path))
        .collect()
}

/// Whether the path itself is a mount point.
pub fn is_mounted(path: &Path) -> bool {
    mounts_below(path).iter().any(|mount_point| mount_point == path)
}

/// The names in a directory, sorted.
pub fn names(path: impl AsRef<Path>) -> Vec<String> {
    let entries =
        fs::read_dir(path.as_ref()).unwrap_or_else(|error| panic!("list {}: {error}", path.as_ref().display()));
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("list").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
}
