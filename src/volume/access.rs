//! How a volume is used: access modes, mount options, and where it is mounted.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

/// The access modes a volume on one node can have (CSI `VolumeCapability.AccessMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::enum_variant_names, reason = "CSI names them so")]
pub(crate) enum AccessMode {
    /// ReadWriteOnce, requested by an orchestrator that does not distinguish the two writer modes below.
    SingleNodeWriter,
    /// Read-only, on one node.
    SingleNodeReaderOnly,
    /// ReadWriteOncePod: one mount only.
    SingleNodeSingleWriter,
    /// ReadWriteOnce: any number of mounts on the node.
    SingleNodeMultiWriter,
}

impl AccessMode {
    /// Whether the volume must have no other mount beside this one.
    pub(crate) fn is_exclusive(self) -> bool {
        match self {
            Self::SingleNodeSingleWriter => true,
            Self::SingleNodeWriter | Self::SingleNodeReaderOnly | Self::SingleNodeMultiWriter => false,
        }
    }

    /// Whether the mount must refuse writes.
    pub(crate) fn is_read_only(self) -> bool {
        match self {
            Self::SingleNodeReaderOnly => true,
            Self::SingleNodeWriter | Self::SingleNodeSingleWriter | Self::SingleNodeMultiWriter => false,
        }
    }
}

/// The options of one bind mount, see mount(8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of its own, and any combination is possible"
)]
pub(crate) struct MountOptions {
    pub(crate) read_only: bool,
    pub(crate) nosuid: bool,
    pub(crate) nodev: bool,
    pub(crate) noexec: bool,
    pub(crate) noatime: bool,
}

/// A mount option that a bind mount of a directory cannot have.
#[derive(Debug, Error)]
#[error("mount option {0:?} is not supported: hostdir supports ro, rw, nosuid, nodev, noexec and noatime")]
pub(crate) struct InvalidOption(String);

impl MountOptions {
    /// Reads the mount options of a StorageClass or PersistentVolume.
    ///
    /// # Errors
    /// An option is not one of `ro`, `rw`, `nosuid`, `nodev`, `noexec`, `noatime`.
    pub(crate) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidOption> {
        let mut parsed = Self::default();
        for option in options {
            match option {
                "ro" => parsed.read_only = true,
                "rw" => parsed.read_only = false,
                "nosuid" => parsed.nosuid = true,
                "nodev" => parsed.nodev = true,
                "noexec" => parsed.noexec = true,
                "noatime" => parsed.noatime = true,
                _ => return Err(InvalidOption(option.to_owned())),
            }
        }
        Ok(parsed)
    }
}

/// Where a volume is mounted: an absolute path without `.` and `..`, below `/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TargetPath(PathBuf);

/// A text that is not a [`TargetPath`], and why.
#[derive(Debug, Error)]
#[error("target path {0:?} {1}")]
pub(crate) struct InvalidTarget(String, &'static str);

impl TargetPath {
    /// Longest path that the kernel accepts, including the final NUL (`PATH_MAX`, limits.h).
    const MAX: usize = 4096;

    /// # Errors
    /// The path is relative, is `/`, contains `.`, `..` or NUL, or is too long.
    pub(crate) fn parse(path: impl Into<PathBuf>) -> Result<Self, InvalidTarget> {
        let path = path.into();
        let text = path.as_os_str().as_encoded_bytes();
        let why = if !path.is_absolute() {
            "must be absolute"
        } else if text.len() >= Self::MAX {
            "is longer than the kernel allows"
        } else if text.contains(&0) {
            "contains a NUL byte"
        } else if text.split(|b| *b == b'/').any(|part| part == b"." || part == b"..") {
            "must not contain '.' or '..'"
        } else if !matches!(path.components().next_back(), Some(Component::Normal(_))) {
            "is the root directory"
        } else {
            // Rebuilt, so that "/a//b/" and "/a/b" are one target.
            return Ok(Self(path.components().collect()));
        };
        // The beginning is enough to recognize the path; a hostile one may be megabytes long.
        let shown = path.to_string_lossy().chars().take(200).collect();
        Err(InvalidTarget(shown, why))
    }

    pub(crate) fn as_path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hostile_targets_are_refused() {
        let long = format!("/{}", "a/".repeat(2048));
        for path in [
            "", "/", "//", "a", "./a", "../a", "/a/../b", "/a/./b", "/..", "/a\0b", &long,
        ] {
            assert!(TargetPath::parse(path).is_err(), "{path:?} was accepted");
        }
    }

    #[test]
    fn one_target_has_one_spelling() {
        assert_eq!(TargetPath::parse("/a//b/").unwrap(), TargetPath::parse("/a/b").unwrap());
    }

    #[test]
    fn unknown_options_are_refused() {
        for option in ["suid", "bind", "remount", "", "nosuid,nodev", "size=1G"] {
            assert!(MountOptions::parse([option]).is_err(), "{option:?} was accepted");
        }
        assert!(MountOptions::parse(["ro", "nodev"]).unwrap().read_only);
    }

    proptest! {
        #[test]
        fn whatever_parses_is_absolute_and_normal(path in "[/.a\\x00\n]{0,20}") {
            if let Ok(target) = TargetPath::parse(path.as_str()) {
                let normal = target.as_path().components().skip(1).all(|c| matches!(c, Component::Normal(_)));
                prop_assert!(target.as_path().is_absolute() && normal);
            }
        }
    }
}
