//! How fast replies may leave to one initiator: as fast as they can, until it
//! speaks of congestion. Then half as fast, and twice as fast again for each
//! half second in which it does not.

use std::time::{Duration, Instant};

/// The slowest, in bytes per second.
const RATE_MIN: u64 = 1_000_000;
/// What an initiator is taken to get that was never measured: a full gigabit
/// link, in bytes per second.
const RATE_UNKNOWN: u64 = 125_000_000;
/// From here on there is no limit, in bytes per second: more than an export can
/// send.
const RATE_FREE: u64 = 4_000_000_000;
/// Without news of congestion for so long the rate doubles.
const DOUBLING: Duration = Duration::from_millis(500);
/// How long replies are counted for a measure, and how long at least.
const PERIOD: Duration = Duration::from_millis(500);
const PERIOD_MIN: Duration = Duration::from_millis(50);
/// How far replies may run ahead of the rate, so that not each waits alone.
const BURST: Duration = Duration::from_millis(2);

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Pace {
    number: Option<u64>,
    limit: Option<Limit>,
    since: Instant,
    bytes: u64,
    /// Measured over the period before.
    rate: Option<u64>,
}

/// A bucket that empties at a rate.
#[derive(Clone, Copy, Debug)]
struct Limit {
    rate: u64,
    doubles: Instant,
    /// When all that left or waits is paid for.
    paid: Instant,
}

impl Pace {
    pub fn new(now: Instant) -> Pace {
        Pace {
            number: None,
            limit: None,
            since: now,
            bytes: 0,
            rate: None,
        }
    }

    /// The initiator speaks of congestion; the same number as the last time is
    /// the same congestion.
    pub fn congestion(&mut self, now: Instant, number: u64) {
        if self.number.replace(number) == Some(number) {
            return;
        }
        self.settle(now);
        let (before, paid) = match self.limit {
            Some(limit) => (limit.rate, limit.paid),
            None => (self.measured(now), now),
        };
        self.limit = Some(Limit {
            rate: (before / 2).max(RATE_MIN),
            doubles: now + DOUBLING,
            paid,
        });
    }

    /// There is no limit any more.
    pub fn free(&mut self) {
        self.limit = None;
    }

    /// A reply of so many bytes is ready: when it may leave, if not now.
    pub fn due(&mut self, now: Instant, bytes: usize) -> Option<Instant> {
        self.count(now, bytes);
        self.settle(now);
        let limit = self.limit.as_mut()?;
        let start = limit.paid.max(now);
        let takes = bytes as u64 * 1_000_000_000 / limit.rate;
        limit.paid = start + Duration::from_nanos(takes);
        start.checked_sub(BURST).filter(|due| *due > now)
    }

    /// Doubles the rate for the time that has passed.
    fn settle(&mut self, now: Instant) {
        while let Some(limit) = self.limit.as_mut().filter(|limit| now >= limit.doubles) {
            limit.rate *= 2;
            limit.doubles += DOUBLING;
            if limit.rate >= RATE_FREE {
                self.limit = None;
            }
        }
    }

    fn count(&mut self, now: Instant, bytes: usize) {
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= PERIOD {
            self.rate = Some(per_second(self.bytes, elapsed));
            (self.since, self.bytes) = (now, 0);
        }
        self.bytes += bytes as u64;
    }

    /// What the initiator got lately, in bytes per second.
    fn measured(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.since);
        match self.rate {
            Some(rate) if elapsed < PERIOD => rate,
            None if elapsed < PERIOD_MIN => RATE_UNKNOWN,
            _ => per_second(self.bytes, elapsed),
        }
    }
}

fn per_second(bytes: u64, elapsed: Duration) -> u64 {
    let nanos = elapsed.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(pace: &Pace) -> Option<u64> {
        pace.limit.map(|limit| limit.rate)
    }

    #[test]
    fn without_congestion_nothing_waits() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        for n in 0..10_000 {
            assert_eq!(pace.due(now + Duration::from_micros(n), 9000), None);
        }
    }

    #[test]
    fn another_number_halves_and_time_doubles() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        pace.congestion(now, 7);
        assert_eq!(rate(&pace), Some(RATE_UNKNOWN / 2));
        // The same number is no news.
        pace.congestion(now, 7);
        assert_eq!(rate(&pace), Some(RATE_UNKNOWN / 2));
        for number in 0..20 {
            pace.congestion(now, number);
        }
        assert_eq!(rate(&pace), Some(RATE_MIN));
        let mut expected = RATE_MIN;
        while expected < RATE_FREE {
            assert_eq!(rate(&pace), Some(expected));
            now += DOUBLING - Duration::from_millis(1);
            pace.due(now, 0);
            assert_eq!(rate(&pace), Some(expected));
            now += Duration::from_millis(1);
            pace.due(now, 0);
            expected *= 2;
        }
        assert_eq!(rate(&pace), None);
    }

    #[test]
    fn the_first_halving_is_of_what_it_was() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        // 8 MB/s for more than a period.
        for n in 0..700 {
            let now = start + Duration::from_millis(n);
            assert_eq!(pace.due(now, 8000), None);
        }
        pace.congestion(start + Duration::from_millis(700), 1);
        let rate = rate(&pace).unwrap();
        assert!((3_900_000..4_100_000).contains(&rate), "{rate}");
    }

    #[test]
    fn replies_leave_at_the_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for number in 0..20 {
            pace.congestion(start, number);
        }
        // 200 replies of 1000 bytes at 1 MB/s: one each millisecond, but for
        // the first few.
        let due: Vec<Duration> = (0..200)
            .map(|_| {
                pace.due(start, 1000)
                    .map_or(Duration::ZERO, |at| at - start)
            })
            .collect();
        assert_eq!(due[..3], [Duration::ZERO; 3]);
        for (n, due) in due.iter().enumerate().skip(3) {
            assert_eq!(*due, Duration::from_millis(n as u64) - BURST);
        }
    }
}
