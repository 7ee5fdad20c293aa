//! Removes what tenants made: without opening what may have side effects, and whatever flags it has.

use std::ffi::{CStr, CString};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::dir::Dir;
use super::sys;
use crate::background::Stopped;
use crate::volume::disk::{DiskError, Inode};

/// Why an entry was not erased to its end.
pub(super) enum Halt {
    /// The eraser is dropped.
    Stopped,
    Failed(DiskError),
}

impl From<Stopped> for Halt {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

impl From<DiskError> for Halt {
    fn from(error: DiskError) -> Self {
        Self::Failed(error)
    }
}

/// Removes an entry of any kind; a directory only when it is empty.
pub(super) fn remove(dir: &Dir, name: &CStr) -> nix::Result<()> {
    // unlink(2) of a directory fails with EISDIR on Linux.
    let attempt = || match dir.unlink(name) {
        Err(Errno::EISDIR) => dir.rmdir(name),
        unlinked => unlinked,
    };
    match attempt() {
        Err(Errno::ENOENT) => Ok(()),
        Err(Errno::EPERM) => loosen(dir, name).and_then(|()| attempt()),
        removed => removed,
    }
}

/// Clears the flags (chattr(1) `+i`, `+a`) that keep an entry, or anything in its directory, from being removed.
pub(super) fn loosen(dir: &Dir, name: &CStr) -> nix::Result<()> {
    if dir.stat(c"")?.is_immutable() {
        sys::clear_immutable(dir)?;
    }
    let stat = dir.stat(name)?;
    if !stat.is_immutable() {
        return Ok(());
    }
    if stat.is_file() || stat.is_dir() {
        let file = dir.open_beneath(name, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty())?;
        return sys::clear_immutable(file);
    }
    // Opening anything else may have side effects.
    sys::clear_immutable_at(dir, name)
}

/// Removes a directory with all that is in it, from within: nothing can be moved out of an encrypted directory whose key is gone
/// (fscrypt_prepare_rename in fs/crypto/hooks.c), but everything in it can be removed. Keeps one descriptor, however deep it is.
/// Calls `pace` after each removal.
pub(super) fn remove_tree(
    parent: &Dir,
    name: &CStr,
    mut pace: impl FnMut() -> Result<(), Stopped>,
) -> Result<nix::Result<()>, Halt> {
    // The directories above the current one, and its name in each.
    let mut above: Vec<(Inode, CString)> = Vec::new();
    let mut dir = parent.child(name)?;
    loop {
        match remove_entries(&dir, &mut pace)? {
            Ok(None) => match above.pop() {
                None => return Ok(remove(parent, name)),
                Some((inode, entry)) => {
                    dir = dir.parent(inode)?;
                    if let Err(errno) = remove(&dir, &entry) {
                        return Ok(Err(errno));
                    }
                }
            },
            Ok(Some(deeper)) => {
                pace()?;
                let child = dir.child(&deeper)?;
                above.push((dir.inode()?, deeper));
                dir = child;
            }
            Err(errno) => return Ok(Err(errno)),
        }
    }
}

/// Removes the entries of a directory, up to the first directory that is not empty: its name is returned.
fn remove_entries(
    dir: &Dir,
    pace: &mut impl FnMut() -> Result<(), Stopped>,
) -> Result<nix::Result<Option<CString>>, Halt> {
    for entry in dir.names()? {
        let entry = entry?;
        match remove(dir, &entry) {
            Ok(()) => pace()?,
            Err(Errno::ENOTEMPTY) => return Ok(Ok(Some(entry))),
            Err(errno) => return Ok(Err(errno)),
        }
    }
    Ok(Ok(None))
}
