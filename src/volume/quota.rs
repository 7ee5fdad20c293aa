//! Quotas: whether the kernel limits volumes to their sizes, and what the administrator has configured.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::size::Bytes;

/// Quotas of a pool, as configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QuotaConfig {
    /// Whether to limit volumes.
    pub(crate) policy: QuotaPolicy,
    /// The project ids to use, on filesystems that limit by project.
    pub(crate) projects: ProjectRange,
    /// How many inodes a volume may have for each GiB of its size; no limit if `None`.
    pub(crate) inodes_per_gib: Option<u64>,
}

impl QuotaConfig {
    /// How many inodes a volume of this size may have, including its top directory. Part of a GiB counts as a whole GiB.
    pub(crate) fn inodes(&self, size: Bytes) -> Option<u64> {
        self.inodes_per_gib
            .map(|per_gib| per_gib.saturating_mul(size.0.div_ceil(Bytes::GIB.0)))
    }
}

/// Whether to limit the volumes of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum QuotaPolicy {
    /// Limit all of them, or else refuse the pool.
    Required,
    /// Limit them where the filesystem supports it; elsewhere, HostNode and log say that they are not limited.
    #[default]
    Auto,
    /// Limit none, and remove limits that were set before.
    Off,
}

/// Which quotas limit the volumes of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuotaKind {
    /// Project quotas of XFS or ext4.
    Projects,
    /// Quota groups of btrfs.
    Qgroups,
    /// Simple quotas of btrfs (Linux 6.7).
    SimpleQuotas,
}

impl fmt::Display for QuotaKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Projects => "project quotas",
            Self::Qgroups => "quota groups",
            Self::SimpleQuotas => "simple quotas",
        })
    }
}

/// A range of project ids. On one filesystem, a range should be used by one hostdir pool and by nothing else; otherwise, ids
/// in use are skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProjectRange {
    pub(crate) first: u32,
    pub(crate) last: u32,
}

impl Default for ProjectRange {
    /// The ids from 2^30 to 2^31 - 1: far from the small numbers that people choose by hand, and from the ids of the kubelet
    /// (from 1048577, `pkg/volume/util/fsquota`) and of container runtimes.
    fn default() -> Self {
        Self {
            first: 1 << 30,
            last: (1 << 31) - 1,
        }
    }
}

impl ProjectRange {
    /// Whether an id is in the range.
    pub(crate) fn contains(self, id: u32) -> bool {
        (self.first..=self.last).contains(&id)
    }

    /// All ids of the range, each once, beginning `offset` (modulo its length) after the first.
    pub(crate) fn from(self, offset: u64) -> impl Iterator<Item = u32> + use<> {
        let Self { first, last } = self;
        let count = u64::from(last) - u64::from(first) + 1;
        (0..count).map(move |step| {
            let behind = (offset % count + step) % count;
            first + u32::try_from(behind).unwrap_or_default()
        })
    }
}

/// A text that is not a range of project ids.
#[derive(Debug, Error)]
#[error("{0:?} is not a range of project ids: write FIRST-LAST, such as 1000000-1999999, from 1 to 4294967294")]
pub(crate) struct InvalidProjects(String);

impl FromStr for ProjectRange {
    type Err = InvalidProjects;

    /// Reads `FIRST-LAST`. Zero means no project, and the largest number is not a valid id (`INVALID_PROJID`,
    /// include/linux/projid.h).
    fn from_str(text: &str) -> Result<Self, InvalidProjects> {
        let range = text
            .split_once('-')
            .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)));
        match range {
            Some((first, last)) if 0 < first && first <= last && last < u32::MAX => Ok(Self { first, last }),
            Some(_) | None => Err(InvalidProjects(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(
            "5-9".parse::<ProjectRange>().unwrap(),
            ProjectRange { first: 5, last: 9 }
        );
        for text in ["", "5", "9-5", "0-5", "1-4294967295", "1-99999999999", "a-b", "-5-9"] {
            assert!(text.parse::<ProjectRange>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_range_is_gone_through_once_from_anywhere() {
        let range = ProjectRange { first: 5, last: 8 };
        assert_eq!(range.from(0).collect::<Vec<_>>(), [5, 6, 7, 8]);
        assert_eq!(range.from(u64::MAX).collect::<Vec<_>>(), [8, 5, 6, 7]);
        let all = ProjectRange {
            first: 1,
            last: u32::MAX - 1,
        };
        assert_eq!(all.from(0).next(), Some(1));
    }

    #[test]
    fn inodes_grow_with_the_size() {
        let quotas = QuotaConfig {
            inodes_per_gib: Some(1000),
            ..QuotaConfig::default()
        };
        assert_eq!(quotas.inodes(Bytes(1)), Some(1000));
        assert_eq!(quotas.inodes(Bytes(3 << 30)), Some(3000));
        assert_eq!(QuotaConfig::default().inodes(Bytes(1)), None);
    }
}
