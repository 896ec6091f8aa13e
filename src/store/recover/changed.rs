//! Whether someone else has changed the image since its targets died.

use shadow::stamp::Stamp;

use super::super::arena::{Head, latest};

/// How much later than the last heartbeat a write that was in flight may have
/// changed the image, in nanoseconds.
const SLACK: u64 = 2_000_000_000;

/// What the arenas of an image, of all its exported ranges, know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// How it looked last; `None` if only aoede 0.1.0 has seen it.
    stamp: Option<Stamp>,
    /// The last heartbeat of those that had writes in flight, real time in
    /// nanoseconds.
    in_flight: Option<u64>,
}

/// What has become of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing, or what was in flight.
    None,
    /// Its content is the same; name, owner or permissions may have changed.
    Touched,
    /// Someone else wrote to it, or put another content in its place.
    Foreign,
}

impl Seen {
    pub fn of<'a>(heads: impl Iterator<Item = &'a Head> + Clone) -> Seen {
        let in_flight = heads.clone().filter(|head| head.in_flight);
        Seen {
            stamp: latest(heads.filter_map(|head| head.stamp)),
            in_flight: in_flight.map(|head| head.heartbeat).max(),
        }
    }

    /// Judges how the image looks now.
    ///
    /// A time that went back, or is later than any write in flight could have
    /// made it, is not of our making. Nor is another size. A clock that was set
    /// in between leads to a refusal, never to a loss.
    pub fn judge(&self, now: &Stamp) -> Change {
        let until = self.in_flight.map(|at| at.saturating_add(SLACK));
        let Some(stamp) = self.stamp else {
            // By the rule of aoede 0.1.0.
            return match until {
                Some(until) if now.mtime <= until => Change::None,
                _ => Change::Foreign,
            };
        };
        let ours = stamp.mtime..=until.unwrap_or(0);
        if now.size != stamp.size {
            Change::Foreign
        } else if now.mtime == stamp.mtime && now.ctime == stamp.ctime {
            Change::None
        } else if now.mtime == stamp.mtime {
            match ours.contains(&now.ctime) {
                // A write in flight may leave the times of one tick.
                true => Change::None,
                false => Change::Touched,
            }
        } else if ours.contains(&now.mtime) {
            Change::None
        } else {
            Change::Foreign
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const STAMP: Stamp = Stamp {
        mtime: 100 * SECOND,
        ctime: 100 * SECOND,
        size: 4096,
        looked: 5,
    };

    fn at(mtime: u64, ctime: u64) -> Stamp {
        Stamp {
            mtime: mtime * SECOND,
            ctime: ctime * SECOND,
            ..STAMP
        }
    }

    #[test]
    fn without_writes_in_flight_only_the_last_stamp_is_ours() {
        let seen = Seen {
            stamp: Some(STAMP),
            in_flight: None,
        };
        assert_eq!(seen.judge(&STAMP), Change::None);
        // chmod, mv, link.
        assert_eq!(seen.judge(&at(100, 101)), Change::Touched);
        // Written; restored with its old time by cp -p; of another size.
        assert_eq!(seen.judge(&at(101, 101)), Change::Foreign);
        assert_eq!(seen.judge(&at(99, 101)), Change::Foreign);
        let longer = Stamp {
            size: 8192,
            ..STAMP
        };
        assert_eq!(seen.judge(&longer), Change::Foreign);
    }

    #[test]
    fn writes_in_flight_are_ours_until_two_seconds_after_the_heartbeat() {
        let seen = Seen {
            stamp: Some(STAMP),
            in_flight: Some(110 * SECOND),
        };
        for (mtime, change) in [
            (99, Change::Foreign),
            (100, Change::None),
            (112, Change::None),
            (113, Change::Foreign),
        ] {
            assert_eq!(seen.judge(&at(mtime, mtime.max(100))), change, "{mtime}");
        }
    }

    #[test]
    fn what_0_1_0_has_seen_is_judged_by_its_heartbeat() {
        let seen = Seen {
            stamp: None,
            in_flight: Some(110 * SECOND),
        };
        assert_eq!(seen.judge(&at(50, 120)), Change::None);
        assert_eq!(seen.judge(&at(112, 112)), Change::None);
        assert_eq!(seen.judge(&at(113, 113)), Change::Foreign);
        assert_eq!(Seen::default().judge(&at(0, 0)), Change::Foreign);
    }
}
