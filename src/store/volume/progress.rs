//! Progress of the disk: by it a slow disk is told from one that hangs.
//!
//! A time limit on the disk begins anew whenever less is dirty or unsynced than
//! before. So that a long sync is not one silent step, what it covers is pushed
//! to the disk before it, in slices, and what is written to the page cache
//! meanwhile, which the sync brings to the disk as well, is no more than a slice
//! or what the disk takes in a second.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::super::cache::Record;

/// The most bytes of a slice, and the most places that it is about: a disk that
/// seeks needs as long for a few scattered blocks as for many in a row.
const SLICE_MAX: u64 = 4 << 20;
pub(super) const SLICE_RUNS_MAX: usize = 256;

/// When the disk made progress.
#[derive(Debug)]
pub(super) struct Progress {
    /// The last time.
    at: Instant,
    /// Since when it has had work without a pause.
    busy: Option<Instant>,
    /// Bytes a second that it took when it was seen last.
    rate: u64,
}

impl Progress {
    pub fn new(now: Instant) -> Progress {
        Progress {
            at: now,
            busy: None,
            rate: 0,
        }
    }

    /// Notes how long the disk took for so many bytes.
    pub fn took(&mut self, bytes: u64, time: Duration) {
        let micros = (time.as_micros() as u64).max(1);
        self.rate = bytes.saturating_mul(1_000_000) / micros;
    }

    /// Bytes that may be written to the page cache while a sync runs.
    pub fn ahead_max(&self) -> u64 {
        self.rate.max(SLICE_MAX)
    }

    /// Something came closer to stable storage.
    pub fn made(&mut self, now: Instant) {
        self.at = now;
    }

    /// The last time that something did.
    pub fn at(&self) -> Instant {
        self.at
    }

    /// When the patience with a request that waits since then began.
    pub fn since(&self, since: Instant) -> Instant {
        self.at.max(since)
    }

    /// Notes whether the disk has work.
    pub fn set_busy(&mut self, busy: bool, now: Instant) {
        match (busy, self.busy) {
            (true, None) => self.busy = Some(now),
            (false, _) => self.busy = None,
            (true, Some(_)) => {}
        }
    }

    /// Since when the disk has had work and brought nothing to an end.
    pub fn silent_since(&self) -> Option<Instant> {
        self.busy.map(|busy| self.at.max(busy))
    }

    /// `true` if the disk has had work for so long and brought nothing to an
    /// end.
    pub fn hangs(&self, now: Instant, patience: Duration) -> bool {
        let since = self.silent_since();
        since.is_some_and(|since| now.saturating_duration_since(since) >= patience)
    }
}

/// Cuts what a sync covers into slices of the file, of (offset, length), in the
/// order of their places, each of at most so many places. `place` says where a
/// block's sectors are: the block, and a mask of sectors. Empty if all of it is one
/// slice.
pub(super) fn slices(
    records: &[Record],
    block: u64,
    runs_max: usize,
    place: impl Fn(u64, u64) -> (u64, u64),
) -> VecDeque<(u64, u64)> {
    let sectors = records.iter().map(Record::sectors);
    let ranges = sectors.filter(|(_, mask)| *mask != 0);
    let mut ranges: Vec<(u64, u64)> = ranges.map(|(block, mask)| place(block, mask)).collect();
    ranges.sort_unstable();
    let mut slices = VecDeque::new();
    // Of the slice at hand: begin, end, bytes, runs.
    let mut slice: Option<(u64, u64, u64, usize)> = None;
    for (at, len) in ranges {
        let end = at + len;
        slice = Some(match slice {
            Some((start, last, bytes, runs)) => {
                let apart = usize::from(at > last);
                if bytes + block > SLICE_MAX || runs + apart > runs_max {
                    slices.push_back((start, last - start));
                    (at, end, block, 1)
                } else {
                    (start, last.max(end), bytes + block, runs + apart)
                }
            }
            None => (at, end, block, 1),
        });
    }
    match slice {
        Some((start, last, ..)) if !slices.is_empty() => {
            slices.push_back((start, last - start));
            slices
        }
        _ => VecDeque::new(),
    }
}
