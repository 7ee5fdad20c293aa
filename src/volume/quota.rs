//! Quotas: whether the kernel limits volumes to their sizes, and what the administrator has configured.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::size::Bytes;

/// Quotas of a pool, as configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QuotaConfig {
    /// Whether volumes are to be limited.
    pub(crate) policy: QuotaPolicy,
    /// Where project ids are taken from, on filesystems that limit by project.
    pub(crate) projects: ProjectRange,
    /// How many inodes a volume may have for each GiB of its size; as many as there are, if not given.
    pub(crate) inodes_per_gib: Option<u64>,
}

impl QuotaConfig {
    /// How many inodes a volume of this size may have, its top directory included. A part of a GiB counts as a whole one.
    pub(crate) fn inodes(&self, size: Bytes) -> Option<u64> {
        self.inodes_per_gib
            .map(|per_gib| per_gib.saturating_mul(size.0.div_ceil(Bytes::GIB.0)))
    }
}

/// Whether the volumes of a pool are to be limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum QuotaPolicy {
    /// All of them, or the pool is not used.
    Required,
    /// Where the filesystem can; where it cannot, HostNode and log say so.
    #[default]
    Auto,
    /// None; limits that were set before are lifted.
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

/// A range of project ids. Only one hostdir pool, and nobody else, should use a range on one filesystem; where that is not so, ids
/// in use are passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProjectRange {
    pub(crate) first: u32,
    pub(crate) last: u32,
}

impl Default for ProjectRange {
    /// The second GiB of ids: far from small numbers that people choose by hand, and from those of the kubelet (1048577 and
    /// on, `pkg/volume/util/fsquota`) and of container runtimes.
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

    /// All its ids, beginning with the one that lies `offset` (modulo its length) behind the first.
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

    /// Reads `FIRST-LAST`. Zero is the project of all files that are in none, and the largest number is no id
    /// (`INVALID_PROJID`, include/linux/projid.h).
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
