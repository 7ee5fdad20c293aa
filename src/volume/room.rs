//! The room of a pool: how much of it may still be allocated to volumes.

use thiserror::Error;

use super::size::{Bytes, InvalidSize};

/// Size and use of the filesystem below a pool, see statvfs(3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Space {
    /// Size of the filesystem.
    pub(crate) total: Bytes,
    /// What an unprivileged writer can still use.
    pub(crate) available: Bytes,
    pub(crate) used: Bytes,
    pub(crate) inodes: u64,
    /// Inodes that an unprivileged writer can still use.
    pub(crate) inodes_available: u64,
    pub(crate) inodes_used: u64,
}

impl Space {
    /// Size of the filesystem as in df(1): what it keeps for root does not count.
    pub(crate) fn size(self) -> Bytes {
        self.used.plus(self.available)
    }
}

/// The largest overcommit that is accepted.
pub(crate) const OVERCOMMIT_MAX: f64 = 1000.0;

/// The administrator's limits for a pool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Limits {
    /// Never allocated.
    pub(crate) reserve: Reserve,
    /// How many times the pool's size may be allocated: at 1, no byte is allocated twice.
    pub(crate) overcommit: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            reserve: Reserve::Bytes(Bytes(0)),
            overcommit: 1.0,
        }
    }
}

/// The part of a pool that is never allocated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reserve {
    Bytes(Bytes),
    /// Percent of the size of the filesystem, 0 to 100.
    Percent(f64),
}

/// Why a text is not a [`Reserve`].
#[derive(Debug, Error)]
pub(crate) enum InvalidReserve {
    #[error(transparent)]
    Size(#[from] InvalidSize),
    #[error("{0:?} is not a percentage of a disk: write 0% to 100%")]
    Percent(String),
}

impl std::str::FromStr for Reserve {
    type Err = InvalidReserve;

    fn from_str(text: &str) -> Result<Self, InvalidReserve> {
        match text.strip_suffix('%') {
            None => Ok(Self::Bytes(text.parse()?)),
            Some(number) => match number.parse::<f64>() {
                Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Self::Percent(percent)),
                Ok(_) | Err(_) => Err(InvalidReserve::Percent(text.to_owned())),
            },
        }
    }
}

impl std::fmt::Display for Reserve {
    /// In the form that `from_str` reads.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(bytes) => f.write_str(&bytes.quantity()),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Limits {
    /// Largest step in which free space is reported, see [`Limits::step`].
    const STEP_MAX: Bytes = Bytes(64 << 20);

    /// Steps in which free space of a filesystem of this size is reported: external-provisioner rewrites a
    /// CSIStorageCapacity object whenever a byte of it changes (pkg/capacity/capacity.go), and a busy disk changes every second.
    pub(crate) fn step(total: Bytes) -> Bytes {
        Bytes(total.0 / 1024)
            .clamp(Bytes::MIB, Self::STEP_MAX)
            .rounded_down(Bytes::MIB)
    }

    /// What may be allocated in total, on a filesystem of which `allocated` bytes are allocated to volumes and that held `foreign`
    /// bytes when the pool was made: (size − what others use) × overcommit − reserve.
    ///
    /// Measuring what others use would mean measuring every volume. Instead, it is taken to be `foreign` (or all bytes in use now,
    /// if that is less), or the bytes in use beyond those allocated, whichever is more.
    pub(crate) fn capacity(self, space: Space, foreign: Bytes, allocated: Bytes) -> Bytes {
        let others = foreign
            .min(space.used)
            .max(space.used.less(allocated))
            .rounded_down(Self::step(space.size()));
        scaled(space.size().less(others), self.overcommit).less(self.reserve(space))
    }

    /// The largest volume that may be created now: what of [`Limits::capacity`] is not allocated, and never more than
    /// free space × overcommit.
    pub(crate) fn room(self, space: Space, foreign: Bytes, allocated: Bytes) -> Bytes {
        let unallocated = self.capacity(space, foreign, allocated).less(allocated);
        let free = scaled(space.available.less(self.reserve(space)), self.overcommit);
        let free = free.rounded_down(Self::step(space.size()));
        unallocated.min(free).rounded_down(Bytes::MIB)
    }

    fn reserve(self, space: Space) -> Bytes {
        match self.reserve {
            Reserve::Bytes(bytes) => bytes,
            Reserve::Percent(percent) => scaled(space.size(), percent / 100.0),
        }
    }
}

/// `bytes × factor`; the factor is finite and not negative ([`Limits`] is checked where it is read).
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a pool's room is exact to 53 bits, which is a byte in 8 PiB; `as` saturates"
)]
fn scaled(bytes: Bytes, factor: f64) -> Bytes {
    Bytes((bytes.0 as f64 * factor) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space(total: u64, available: u64) -> Space {
        Space {
            total: Bytes(total << 30),
            available: Bytes(available << 30),
            used: Bytes((total - available) << 30),
            ..Space::default()
        }
    }

    #[test]
    fn room_is_size_less_reserve_and_what_is_allocated() {
        let limits = Limits {
            reserve: "10%".parse().unwrap(),
            overcommit: 1.0,
        };
        assert_eq!(limits.room(space(100, 95), Bytes(0), Bytes(30 << 30)), Bytes(60 << 30));
    }

    #[test]
    fn what_others_use_is_no_room() {
        assert_eq!(
            Limits::default().room(space(100, 5), Bytes(0), Bytes(0)),
            Bytes(5 << 30)
        );
    }

    #[test]
    fn what_others_had_is_no_room_although_volumes_are_unwritten() {
        // Others used 180 of 250 GiB before; 60 GiB are allocated, and none of them is written yet.
        let room = |allocated: u64| Limits::default().room(space(250, 70), Bytes(180 << 30), Bytes(allocated << 30));
        assert_eq!(room(0), Bytes(70 << 30));
        assert_eq!(room(60), Bytes(10 << 30));
    }

    #[test]
    fn what_volumes_have_written_is_not_counted_twice() {
        assert_eq!(
            Limits::default().room(space(100, 50), Bytes(0), Bytes(50 << 30)),
            Bytes(50 << 30)
        );
    }

    #[test]
    fn overcommit_allocates_more_than_there_is() {
        let limits = Limits {
            overcommit: 3.0,
            ..Limits::default()
        };
        assert_eq!(
            limits.room(space(100, 100), Bytes(0), Bytes(120 << 30)),
            Bytes(180 << 30)
        );
    }

    #[test]
    fn nothing_is_left_when_all_is_allocated() {
        assert_eq!(
            Limits::default().room(space(10, 10), Bytes(0), Bytes(11 << 30)),
            Bytes(0)
        );
    }

    #[test]
    fn reserves_are_read() {
        assert_eq!("5Gi".parse::<Reserve>().unwrap(), Reserve::Bytes(Bytes(5 << 30)));
        for text in ["5Gi", "7.5%", "0"] {
            assert_eq!(text.parse::<Reserve>().unwrap().to_string(), text);
        }
        for text in ["101%", "-1%", "NaN%", "%", "x", ""] {
            assert!(text.parse::<Reserve>().is_err(), "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn a_volume_never_makes_more_room(total in 1_u64..1 << 50, free in 0.0..=1.0_f64, allocated in 0_u64..1 << 50, more in 0_u64..1 << 50) {
            let available = scaled(Bytes(total), free);
            let used = Bytes(total).less(available);
            let space = Space { total: Bytes(total), available, used, ..Space::default() };
            let room = Limits::default().room(space, Bytes(0), Bytes(allocated));
            prop_assert!(room.plus(Bytes(allocated)) <= Bytes(total).max(Bytes(allocated)));
            prop_assert!(room <= available);
            prop_assert!(Limits::default().room(space, Bytes(0), Bytes(allocated).plus(Bytes(more))) <= room);
        }
    }
}
