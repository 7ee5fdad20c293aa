//! `/proc/self/mountinfo`, see proc_pid_mountinfo(5). Read when a pool is opened, and when nothing else can prove which
//! volume a mount belongs to. Ordinary calls do not read it, because it grows with every mount of the node.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::dir::failed;
use crate::volume::disk::DiskError;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Mount id, as statx(2) returns it.
    pub(super) id: u64,
    /// The path within its filesystem that is mounted.
    pub(super) root: PathBuf,
    pub(super) mount_point: PathBuf,
    /// Type of the filesystem.
    pub(super) filesystem: String,
}

/// All mounts that this process can see.
pub(super) fn read() -> Result<Vec<Entry>, DiskError> {
    const PATH: &str = "/proc/self/mountinfo";
    let text = std::fs::read(PATH).map_err(|error| {
        let errno = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or_default());
        failed("read", PATH.into(), errno)
    })?;
    Ok(parse(&text))
}

/// The mount with this id.
pub(super) fn find(id: u64) -> Result<Option<Entry>, DiskError> {
    Ok(read()?.into_iter().find(|entry| entry.id == id))
}

impl Entry {
    /// The path within the filesystem of a file below this mount.
    pub(super) fn path_in_filesystem(&self, path: &Path) -> Option<PathBuf> {
        let below = path.strip_prefix(&self.mount_point).ok()?;
        Some(self.root.components().chain(below.components()).collect())
    }
}

fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let (_parent, _device) = (fields.next()?, fields.next()?);
    let (root, mount_point) = (path(fields.next()?), path(fields.next()?));
    // Options and a varying number of optional fields end with a "-".
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let filesystem = String::from_utf8_lossy(fields.next()?).into_owned();
    Some(Entry {
        id,
        root,
        mount_point,
        filesystem,
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits (seq_path, fs/seq_file.c).
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = (byte == b'\\').then(|| after.get(..3)).flatten().and_then(octal);
        bytes.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn octal(digits: &[u8]) -> Option<u8> {
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| u8::from_str_radix(digits, 8).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_are_taken_apart() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw\n\
                     22 1 0:21 / / rw - btrfs none rw\n";
        let entries = parse(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].id, 36);
        assert_eq!(entries[0].root, Path::new("/mnt1"));
        assert_eq!(entries[0].mount_point, Path::new("/mnt 2"));
        assert_eq!(entries[0].filesystem, "ext3");
        assert_eq!(entries[1].filesystem, "btrfs");
    }

    #[test]
    fn paths_are_followed_into_the_filesystem() {
        let entry = &parse(b"1 0 8:1 /srv /mnt rw - ext4 /dev/sda1 rw")[0];
        assert_eq!(entry.path_in_filesystem(Path::new("/mnt/a/b")), Some("/srv/a/b".into()));
        assert_eq!(entry.path_in_filesystem(Path::new("/mnt")), Some("/srv".into()));
        assert_eq!(entry.path_in_filesystem(Path::new("/other")), None);
    }

    #[test]
    fn our_own_table_is_readable() {
        let entries = read().unwrap();
        assert!(entries.iter().any(|entry| entry.mount_point == Path::new("/")));
    }

    proptest! {
        #[test]
        fn no_line_can_make_it_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse(&line);
        }
    }
}
