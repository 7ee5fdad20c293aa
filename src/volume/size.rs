//! Sizes in bytes, and the ways in which callers and administrators write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Bytes(pub(crate) u64);

impl Bytes {
    pub(crate) const MIB: Self = Self(1 << 20);
    pub(crate) const GIB: Self = Self(1 << 30);

    /// `self - other`, or zero if that would be negative.
    pub(crate) fn less(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// `self + other`, or the largest number if that would overflow.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The size as a Kubernetes quantity, in the largest binary unit that divides it.
    pub(crate) fn quantity(self) -> String {
        let units = [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")];
        let whole = |(shift, _): &(u32, &str)| self.0 != 0 && self.0.trailing_zeros() >= *shift;
        let (shift, unit) = units.into_iter().find(whole).unwrap_or((0, ""));
        format!("{}{unit}", self.0 >> shift)
    }

    /// The largest multiple of `step` that is not larger than `self`.
    pub(crate) fn rounded_down(self, step: Self) -> Self {
        Self(self.0 - self.0 % step.0)
    }
}

impl fmt::Display for Bytes {
    /// For people: exact if the size is a whole number of binary units, else with two decimals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 5] = [(50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in UNITS {
            let whole = self.0 >> shift;
            if whole > 0 {
                let hundredths = (u128::from(self.0 - (whole << shift)) * 100) >> shift;
                return if hundredths == 0 {
                    write!(f, "{whole} {unit}")
                } else {
                    write!(f, "{whole}.{hundredths:02} {unit}")
                };
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// A text that is not a size.
#[derive(Debug, Error)]
#[error("{0:?} is not a size: write a whole number of bytes, optionally followed by Ki, Mi, Gi, Ti, k, M, G or T")]
pub(crate) struct InvalidSize(String);

impl FromStr for Bytes {
    type Err = InvalidSize;

    /// Reads a Kubernetes quantity without a fraction: `10Gi`, `500M`, `1048576`.
    fn from_str(text: &str) -> Result<Self, InvalidSize> {
        let invalid = || InvalidSize(text.to_owned());
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let unit: u64 = match unit {
            "" => 1,
            "k" => 1_000,
            "M" => 1_000_000,
            "G" => 1_000_000_000,
            "T" => 1_000_000_000_000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            _ => return Err(invalid()),
        };
        let number: u64 = number.parse().map_err(|_| invalid())?;
        number.checked_mul(unit).map(Self).ok_or_else(invalid)
    }
}

/// What CreateVolume asks for: at least `required`, at most `limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SizeRange {
    /// Smallest acceptable size; zero if the caller specifies none.
    pub(crate) required: Bytes,
    pub(crate) limit: Option<Bytes>,
}

/// How a volume must grow to have a size in the requested range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Growth {
    /// Not at all: its size is in the range.
    None,
    To(Bytes),
    /// It would have to shrink, or the range is empty.
    Impossible,
}

impl SizeRange {
    /// Size of a volume if the caller specifies none.
    pub(crate) const DEFAULT: Bytes = Bytes::GIB;

    /// Size of the smallest volume: smaller requests get this. On btrfs a limit of some KiB would not even admit the volume's own
    /// directory.
    pub(crate) const MIN: Bytes = Bytes(1 << 20);

    /// Whether a volume of this size is what the caller asked for.
    pub(crate) fn admits(self, size: Bytes) -> bool {
        size >= self.required && self.limit.is_none_or(|limit| size <= limit)
    }

    /// How a volume of this size must grow to have a size in the range.
    pub(crate) fn growth(self, size: Bytes) -> Growth {
        if self.admits(size) {
            Growth::None
        } else if self.required > size && self.admits(self.required) {
            Growth::To(self.required)
        } else {
            Growth::Impossible
        }
    }

    /// The size of a new volume; `None` if none is in the range.
    pub(crate) fn choose(self) -> Option<Bytes> {
        let least = self.required.max(Self::MIN);
        let wish = if self.required == Bytes(0) {
            Self::DEFAULT
        } else {
            least
        };
        let size = self.limit.map_or(wish, |limit| wish.min(limit));
        (size >= least).then_some(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("10Gi", 10 << 30),
            ("2k", 2_000),
            ("3T", 3_000_000_000_000),
        ] {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for text in [
            "",
            "Gi",
            "-1",
            "1.5Gi",
            "1 Gi",
            "1gb",
            "99999999999999999999",
            "99999999Ti",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn sizes_are_shown_for_people() {
        assert_eq!(Bytes(0).to_string(), "0 bytes");
        assert_eq!(Bytes(1 << 30).to_string(), "1 GiB");
        assert_eq!(Bytes((3 << 30) / 2).to_string(), "1.50 GiB");
        assert_eq!(Bytes(u64::MAX).to_string(), "16383.99 PiB");
    }

    #[test]
    fn small_requests_get_the_smallest_volume() {
        let range = |required, limit: Option<u64>| SizeRange {
            required: Bytes(required),
            limit: limit.map(Bytes),
        };
        assert_eq!(range(1, None).choose(), Some(SizeRange::MIN));
        assert_eq!(range(1, Some(2 << 20)).choose(), Some(SizeRange::MIN));
        assert_eq!(range(0, Some(4096)).choose(), None);
        assert_eq!(range(2 << 20, Some(1 << 20)).choose(), None);
    }

    #[test]
    fn volumes_grow_and_never_shrink() {
        let range = |required, limit: Option<u64>| SizeRange {
            required: Bytes(required),
            limit: limit.map(Bytes),
        };
        assert_eq!(range(5, None).growth(Bytes(3)), Growth::To(Bytes(5)));
        assert_eq!(range(5, Some(7)).growth(Bytes(3)), Growth::To(Bytes(5)));
        assert_eq!(range(5, None).growth(Bytes(9)), Growth::None);
        assert_eq!(
            range(5, Some(7)).growth(Bytes(9)),
            Growth::Impossible,
            "it would have to shrink"
        );
        assert_eq!(
            range(5, Some(4)).growth(Bytes(3)),
            Growth::Impossible,
            "the range is empty"
        );
    }

    proptest! {
        #[test]
        fn the_chosen_size_is_admitted(required in 0_u64..1 << 50, above in proptest::option::of(0_u64..1 << 50)) {
            let range = SizeRange { required: Bytes(required), limit: above.map(|above| Bytes(required + above)) };
            match range.choose() {
                Some(size) => prop_assert!(range.admits(size) && size >= SizeRange::MIN),
                None => prop_assert!(range.limit.is_some_and(|limit| limit < SizeRange::MIN)),
            }
        }

        #[test]
        fn quantities_are_read_back(number in 0_u64..1 << 12, shift in 0_u32..50) {
            let bytes = Bytes(number << shift);
            prop_assert_eq!(bytes.quantity().parse::<Bytes>().unwrap(), bytes);
        }
    }
}
