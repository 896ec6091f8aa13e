//! Whether someone else has changed the image since its targets died.

use shadow::stamp::{Clocks, Stamp};

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
    /// nanoseconds; not of those before which the clock was set.
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
    /// What these arenas know. A time of then means nothing after the clock was set:
    /// a change by someone else may have an earlier one.
    pub fn of<'a>(heads: impl Iterator<Item = &'a Head> + Clone, now: Clocks) -> Seen {
        let holds = |head: &&Head| head.clock.is_none_or(|clock| now.is_as_at(clock));
        let in_flight = heads.clone().filter(|head| head.in_flight).filter(holds);
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
    use crate::store::arena::{Arena, ImageId};

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

    /// The arena of a process that died with writes in flight: its heartbeat in
    /// seconds, and how far the clock was ahead of the time since the boot then.
    fn died(heartbeat: u64, ahead: Option<u64>) -> Head {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("arena");
        drop(Arena::create(&path, [0; 2], &ImageId::default(), 4096, 2).unwrap());
        let mut head = Head::read(&path).unwrap();
        head.heartbeat = heartbeat * SECOND;
        head.in_flight = true;
        head.clock = ahead.map(|seconds| seconds * SECOND);
        head.stamp = Some(STAMP);
        head
    }

    #[test]
    fn a_clock_that_was_set_refuses_and_never_loses() {
        let now = |ahead: u64| Clocks {
            real: 0,
            offset: ahead * SECOND + 1000,
        };
        let judge = |head: &Head, now, mtime: u64| {
            let changed = Seen::of([head].into_iter(), now).judge(&at(mtime, mtime));
            changed == Change::None
        };
        // Never set.
        assert!(judge(&died(110, Some(50)), now(50), 111));
        assert!(!judge(&died(110, Some(50)), now(50), 113));
        // An hour ahead until after the death: what is written then has a time before
        // the heartbeat.
        assert!(!judge(&died(3710, Some(3650)), now(50), 115));
        // Nor is our own write believed then, and the image that nobody wrote is.
        assert!(!judge(&died(3710, Some(3650)), now(50), 3711));
        assert!(judge(&died(3710, Some(3650)), now(50), 100));
        // Set forward after the death.
        assert!(!judge(&died(110, Some(50)), now(3650), 3715));
        assert!(!judge(&died(110, Some(50)), now(3650), 111));
        // Set while the process lived, and noticed by it; killed before that.
        assert!(!judge(&died(112, Some(50)), now(50), 3711));
        assert!(judge(&died(112, Some(50)), now(50), 113));
        assert!(!judge(&died(112, Some(0)), now(50), 113));
        // One that was set does not speak for one that was not, nor against it.
        let (good, set) = (died(110, Some(50)), died(3710, Some(3650)));
        let both = Seen::of([&good, &set].into_iter(), now(50));
        assert_eq!(both.judge(&at(111, 111)), Change::None);
        assert_eq!(both.judge(&at(115, 115)), Change::Foreign);
        // aoede 0.1.0 kept no such offset.
        assert!(judge(&died(110, None), now(50), 111));
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
