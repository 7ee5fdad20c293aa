//! The work for a volume, done by bare system calls: no socket, no checks, no allocation.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Gid, Uid, fchown};

/// As long as a record of hostdir.
const RECORD: [u8; 420] = [b'x'; 420];

/// A pool without a driver.
pub(crate) struct Bare {
    dir: PathBuf,
    volumes: File,
    trash: File,
}

impl Bare {
    pub(crate) fn new(dir: &Path) -> Self {
        for name in ["new", "volumes", "trash", "pods"] {
            fs::create_dir_all(dir.join(name)).expect("make a directory");
        }
        let open = |name| File::open(dir.join(name)).expect("open a directory");
        Self {
            volumes: open("volumes"),
            trash: open("trash"),
            dir: dir.to_owned(),
        }
    }

    /// Takes one volume through its life. Returns the time of each step.
    pub(crate) fn cycle(&self, name: &str) -> [Duration; 4] {
        let steps: [fn(&Self, &str) -> std::io::Result<()>; 4] =
            [Self::create, Self::publish, Self::unpublish, Self::delete];
        let times = steps.map(|step| {
            let start = Instant::now();
            step(self, name).expect("a bare system call");
            start.elapsed()
        });
        self.erase(name);
        times
    }

    fn create(&self, name: &str) -> std::io::Result<()> {
        let new = self.dir.join("new").join(name);
        fs::create_dir(&new)?;
        write(&new.join("volume.json"))?;
        File::open(&new)?.sync_all()?;
        fs::rename(&new, self.dir.join("volumes").join(name))?;
        self.volumes.sync_all()
    }

    fn publish(&self, name: &str) -> std::io::Result<()> {
        let volume = self.dir.join("volumes").join(name);
        let opened = File::open(&volume)?;
        let data = volume.join("data");
        fs::create_dir(&data)?;
        let data = File::open(data)?;
        fchown(&data, Some(Uid::from_raw(0)), Some(Gid::from_raw(0)))?;
        fchmod(&data, Mode::from_bits_truncate(0o770))?;
        data.sync_all()?;
        opened.sync_all()?;
        write(&volume.join("volume.json.new"))?;
        fs::rename(volume.join("volume.json.new"), volume.join("volume.json"))?;
        opened.sync_all()?;
        let target = self.dir.join("pods").join(name);
        fs::create_dir(&target)?;
        Ok(bind(&data, &File::open(target)?)?)
    }

    fn unpublish(&self, name: &str) -> std::io::Result<()> {
        let target = self.dir.join("pods").join(name);
        umount2(&target, MntFlags::UMOUNT_NOFOLLOW)?;
        fs::remove_dir(target)
    }

    fn delete(&self, name: &str) -> std::io::Result<()> {
        fs::rename(self.dir.join("volumes").join(name), self.dir.join("trash").join(name))?;
        self.trash.sync_all()?;
        self.volumes.sync_all()
    }

    /// The system call behind NodeGetVolumeStats and GetCapacity.
    pub(crate) fn space(&self) {
        fstatvfs(&self.volumes).expect("statvfs");
    }

    /// The system calls behind Probe, which tests that the pool is writable.
    pub(crate) fn probe(&self) {
        let path = self.dir.join("probe");
        File::create(&path)
            .and_then(|_| fs::remove_file(path))
            .expect("make and remove a file");
    }

    /// Erases a volume. Not measured, because hostdir erases in the background.
    fn erase(&self, name: &str) {
        let trash = self.dir.join("trash").join(name);
        fs::remove_file(trash.join("volume.json")).expect("remove the record");
        fs::remove_dir(trash.join("data")).expect("remove the data");
        fs::remove_dir(trash).expect("remove the volume");
    }
}

/// Writes a record and syncs it.
pub(crate) fn write(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&RECORD)?;
    file.sync_all()
}

/// Makes a bind mount by open_tree(2), mount_setattr(2) and move_mount(2).
#[expect(unsafe_code, reason = "system calls without a safe wrapper")]
fn bind(data: &File, target: &File) -> nix::Result<()> {
    let empty = c"";
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.unsigned_abs();
    // SAFETY: the path is NUL-terminated and static.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, data.as_raw_fd(), empty.as_ptr(), flags) };
    let tree = i32::try_from(Errno::result(tree)?).expect("a descriptor");
    // SAFETY: the kernel has just returned the descriptor.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    let attributes = libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is NUL-terminated and static; the structure outlives the call.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(set)?;
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: the paths are NUL-terminated and static.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty.as_ptr(),
            target.as_raw_fd(),
            empty.as_ptr(),
            flags,
        )
    };
    Errno::result(moved).map(drop)
}
