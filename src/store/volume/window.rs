//! How many reads the disk has at a time.
//!
//! What the disk has been given it does in an order of its own, so whoever gave
//! it most gets most of it. An initiator that is alone may keep it as full as it
//! likes. While several ask, or writes and syncs go on beside the reads, the disk
//! gets so many reads as it does in [`FLIGHT_TIME`]; the rest wait in the volume,
//! where each initiator has its turn.

use std::time::{Duration, Instant};

use super::super::fair::Queue;

/// The most reads in flight.
pub(super) const READS_MAX: usize = 256;
/// The most while several ask is what the disk does in this time, but not less
/// than this.
const FLIGHT_TIME: Duration = Duration::from_millis(20);
const SHARED_MIN: u64 = 8;
/// How long after another initiator asked the disk is taken to be shared.
const SHARED_FOR: Duration = Duration::from_secs(1);
/// What a read is taken to cost the disk before any has ended.
const PER_READ: Duration = Duration::from_millis(1);
/// The weight of what is measured: one part of so many.
const SMOOTH: u64 = 8;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Window {
    /// Nanoseconds between two reads that end, while the disk is busy.
    per_read: u64,
    /// Since when the disk is busy with reads, or when the last of them ended.
    busy_since: Option<Instant>,
    shared_until: Option<Instant>,
    /// Who asked last.
    last: Option<Queue>,
}

impl Window {
    pub fn new() -> Window {
        Window {
            per_read: PER_READ.as_nanos() as u64,
            busy_since: None,
            shared_until: None,
            last: None,
        }
    }

    /// An initiator's read needs the disk.
    pub fn asked(&mut self, now: Instant, queue: Queue) {
        if self.last.is_some_and(|last| last != queue) {
            self.share(now);
        }
        self.last = Some(queue);
    }

    /// Something besides one initiator's reads needs the disk.
    pub fn share(&mut self, now: Instant) {
        self.shared_until = Some(now + SHARED_FOR);
    }

    /// A read is given to the disk.
    pub fn began(&mut self, now: Instant) {
        self.busy_since.get_or_insert(now);
    }

    /// So many reads have ended since the last time, and so many are in flight
    /// still.
    pub fn ended(&mut self, now: Instant, count: usize, left: usize) {
        if let (Some(since), true) = (self.busy_since, count > 0) {
            let per_read = now.saturating_duration_since(since).as_nanos() as u64 / count as u64;
            self.per_read = (self.per_read * (SMOOTH - 1) + per_read) / SMOOTH;
            self.busy_since = (left > 0).then_some(now);
        }
    }

    /// Returns how many reads may be in flight now.
    pub fn size(&self, now: Instant) -> usize {
        if self.shared_until.is_none_or(|until| until <= now) {
            return READS_MAX;
        }
        let reads = FLIGHT_TIME.as_nanos() as u64 / self.per_read.max(1);
        reads.clamp(SHARED_MIN, READS_MAX as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const BOB: [u8; 6] = [2, 0, 0, 0, 0, 2];

    /// Lets a disk end so many reads, one each time.
    fn run(window: &mut Window, now: &mut Instant, reads: usize, each: Duration) {
        for _ in 0..reads {
            window.began(*now);
            *now += each;
            window.ended(*now, 1, 1);
        }
    }

    #[test]
    fn the_disk_of_one_initiator_is_as_full_as_it_likes() {
        let (mut window, mut now) = (Window::new(), Instant::now());
        for _ in 0..10 {
            window.asked(now, Queue::of(ALICE));
            run(&mut window, &mut now, 10, Duration::from_millis(8));
            assert_eq!(window.size(now), READS_MAX);
        }
    }

    #[test]
    fn a_shared_disk_gets_what_it_does_in_a_moment_and_not_less_than_a_few() {
        let (mut window, mut now) = (Window::new(), Instant::now());
        for (each, expected) in [
            (2_000, 9..=11),
            (8_000, 8..=8),
            (100, 180..=200),
            (1, 256..=256),
        ] {
            run(&mut window, &mut now, 200, Duration::from_micros(each));
            window.asked(now, Queue::of(ALICE));
            window.asked(now, Queue::of(BOB));
            let size = window.size(now);
            assert!(expected.contains(&size), "{size} at {each} us a read");
        }
        // Alone again.
        now += SHARED_FOR;
        assert_eq!(window.size(now), READS_MAX);
    }

    #[test]
    fn the_time_in_which_nothing_is_read_makes_no_disk_slow() {
        let (mut window, mut now) = (Window::new(), Instant::now());
        for _ in 0..100 {
            window.began(now);
            now += Duration::from_micros(100);
            window.ended(now, 1, 0);
            now += Duration::from_secs(1);
        }
        window.share(now);
        assert!(window.size(now) > 150);
    }
}
