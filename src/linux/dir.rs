//! An open directory: the only way in which hostdir reaches anything below a pool.
//!
//! Every name is resolved with openat2(2) from the descriptor of its parent, never through a symbolic link, never out of the
//! directory, never onto another mount. Anyone who can write below a pool (a tenant in `data/`) can at most make a call
//! fail.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, RenameFlags, ResolveFlag, openat2, renameat2};
use nix::sys::stat::{Mode, UtimensatFlags, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, fsync, unlinkat};

use super::sys::{self, Stat};
use crate::volume::disk::{DiskError, DiskErrorKind, Inode};

/// Only root can enter hostdir's own directories, no tenant and no user of the node.
pub(super) const PRIVATE_DIR: Mode = Mode::S_IRWXU;
const PRIVATE_FILE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Largest file that hostdir reads: its own records are below 2 KiB.
const READ_MAX: u64 = 64 << 10;

/// Longest path in a message, in bytes.
const PATH_SHOWN: usize = 4096;

/// An open directory, and the path it was opened by, for messages.
pub(super) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Dir {
    /// Opens a directory by its absolute path, refusing symbolic links anywhere in it.
    pub(super) fn open(path: &Path) -> Result<Self, DiskError> {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let fd = openat2(AT_FDCWD, path, how).map_err(|errno| failed("open", path.to_owned(), errno))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// The path that it was opened by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a directory in this one, or further below.
    pub(super) fn child(&self, name: &CStr) -> Result<Self, DiskError> {
        let fd = self
            .open_beneath(name, OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())
            .map_err(|errno| self.failed("open", name, errno))?;
        Ok(Self {
            fd,
            path: self.join(name),
        })
    }

    /// Opens a directory in this one, if there is one.
    pub(super) fn find_child(&self, name: &CStr) -> Result<Option<Self>, DiskError> {
        absent(self.child(name))
    }

    /// Opens the directory that this one is in, which must be `expected`.
    pub(super) fn parent(&self, expected: Inode) -> Result<Self, DiskError> {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        let fd = openat2(&self.fd, c"..", how).map_err(|errno| self.failed("open", c"..", errno))?;
        // Paths are for messages: that of a directory below is near enough.
        let path = self.path.clone();
        let parent = Self { fd, path };
        if parent.inode()? != expected {
            // Somebody moves directories there.
            return Err(self.failed("open", c"..", Errno::EAGAIN));
        }
        Ok(parent)
    }

    /// Makes a directory in this one, unless there is one, and opens it.
    pub(super) fn ensure_child(&self, name: &CStr) -> Result<Self, DiskError> {
        match mkdirat(&self.fd, name, PRIVATE_DIR) {
            Ok(()) | Err(Errno::EEXIST) => self.child(name),
            Err(errno) => Err(self.failed("make directory", name, errno)),
        }
    }

    /// Makes a directory in this one and opens it. Fails if the name is taken.
    pub(super) fn make_child(&self, name: &CStr) -> Result<Self, DiskError> {
        mkdirat(&self.fd, name, PRIVATE_DIR).map_err(|errno| self.failed("make directory", name, errno))?;
        self.child(name)
    }

    /// statx(2) of an entry, or of this directory when `name` is empty.
    pub(super) fn stat(&self, name: &CStr) -> nix::Result<Stat> {
        sys::statx(&self.fd, name)
    }

    /// Sets the times of an entry to now.
    pub(super) fn touch(&self, name: &CStr) -> nix::Result<()> {
        let now = TimeSpec::UTIME_NOW;
        utimensat(&self.fd, name, &now, &now, UtimensatFlags::NoFollowSymlink)
    }

    pub(super) fn inode(&self) -> Result<Inode, DiskError> {
        let stat = self.stat(c"").map_err(|errno| self.failed_itself("stat", errno))?;
        Ok(stat.inode)
    }

    /// Reads a small file, if there is one.
    pub(super) fn read(&self, name: &CStr) -> Result<Option<Vec<u8>>, DiskError> {
        // O_NONBLOCK: a FIFO in place of the file must not block us.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
        let fd = match self.open_beneath(name, flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            opened => opened.map_err(|errno| self.failed("open", name, errno))?,
        };
        let mut bytes = Vec::new();
        File::from(fd)
            .take(READ_MAX)
            .read_to_end(&mut bytes)
            .map_err(|error| io_failed("read", self.join(name), error))?;
        Ok(Some(bytes))
    }

    /// Makes a file with this content, or overwrites it, and syncs it.
    pub(super) fn write(&self, name: &CStr, content: &[u8]) -> Result<(), DiskError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
        let fd = self
            .open_beneath(name, flags, PRIVATE_FILE)
            .map_err(|errno| self.failed("create", name, errno))?;
        let mut file = File::from(fd);
        file.write_all(content)
            .map_err(|error| io_failed("write", self.join(name), error))?;
        file.sync_all()
            .map_err(|error| io_failed("sync", self.join(name), error))
    }

    /// Renames an entry in this directory, replacing any entry that has the new name.
    pub(super) fn rename(&self, from: &CStr, to: &CStr) -> Result<(), DiskError> {
        renameat2(&self.fd, from, &self.fd, to, RenameFlags::empty())
            .map_err(|errno| self.failed("rename", from, errno))
    }

    /// Moves an entry into another directory. Fails if the new name is taken.
    pub(super) fn move_to(&self, from: &CStr, dir: &Self, to: &CStr) -> nix::Result<()> {
        renameat2(&self.fd, from, &dir.fd, to, RenameFlags::RENAME_NOREPLACE)
    }

    /// Removes a file, link or other entry that is not a directory.
    pub(super) fn unlink(&self, name: &CStr) -> nix::Result<()> {
        unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir)
    }

    pub(super) fn rmdir(&self, name: &CStr) -> nix::Result<()> {
        unlinkat(&self.fd, name, UnlinkatFlags::RemoveDir)
    }

    /// Makes the entries of this directory durable.
    pub(super) fn sync(&self) -> Result<(), DiskError> {
        fsync(&self.fd).map_err(|errno| self.failed_itself("sync", errno))
    }

    /// The names in this directory, without `.` and `..`, in no particular order. They are read lazily.
    pub(super) fn names(&self) -> Result<Names, DiskError> {
        // A new descriptor, because reading moves the offset.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        self.open_beneath(c".", flags, Mode::empty())
            .and_then(nix::dir::Dir::from_fd)
            .map(|dir| Names {
                dir: dir.into_iter(),
                path: self.path.clone(),
            })
            .map_err(|errno| self.failed_itself("list", errno))
    }

    /// openat2(2) of a name that cannot lead out of this directory.
    pub(super) fn open_beneath(&self, name: &CStr, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        openat2(&self.fd, name, how)
    }

    /// The error of a call on this directory itself.
    pub(super) fn failed_itself(&self, verb: &'static str, errno: Errno) -> DiskError {
        failed(verb, self.path.clone(), errno)
    }

    /// The error of a call on an entry of this directory.
    pub(super) fn failed(&self, verb: &'static str, name: &CStr, errno: Errno) -> DiskError {
        failed(verb, self.join(name), errno)
    }

    /// The path of an entry, for messages. It does not grow beyond what the kernel takes as a path: tenants make directories that are
    /// deeper, and each [`Dir`] keeps its path.
    fn join(&self, name: &CStr) -> PathBuf {
        if self.path.as_os_str().len() + name.count_bytes() > PATH_SHOWN {
            return self.path.clone();
        }
        self.path.join(OsStr::from_bytes(name.to_bytes()))
    }
}

/// The names in a directory.
pub(super) struct Names {
    dir: nix::dir::OwningIter,
    path: PathBuf,
}

impl Iterator for Names {
    type Item = Result<CString, DiskError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.dir.next()? {
                Err(errno) => return Some(Err(failed("list", self.path.clone(), errno))),
                Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => {}
                Ok(entry) => return Some(Ok(entry.file_name().to_owned())),
            }
        }
    }
}

/// The error of a call that changed nothing.
pub(super) fn failed(verb: &'static str, path: PathBuf, errno: Errno) -> DiskError {
    let kind = match errno {
        Errno::ENOSPC | Errno::EDQUOT => DiskErrorKind::Full,
        Errno::EBUSY => DiskErrorKind::Busy,
        _ => DiskErrorKind::Failed,
    };
    DiskError {
        verb,
        path,
        kind,
        source: Box::new(errno),
    }
}

/// `None` if the error is ENOENT.
pub(super) fn absent<T>(result: Result<T, DiskError>) -> Result<Option<T>, DiskError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.source.downcast_ref() == Some(&Errno::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn io_failed(verb: &'static str, path: PathBuf, error: std::io::Error) -> DiskError {
    match error.raw_os_error() {
        Some(raw) => failed(verb, path, Errno::from_raw(raw)),
        None => DiskError {
            verb,
            path,
            kind: DiskErrorKind::Failed,
            source: Box::new(error),
        },
    }
}
