//! Sectors that the image does not take.
//!
//! A write-back that failed is split down to the sectors that failed. These are
//! bad ranges: the cache keeps what hosts wrote there, and the rest of the image
//! is written as before. A write to a bad range is tried on the disk at once,
//! and is acknowledged only when it landed, so that a host can make a disk remap
//! a sector. What is kept is tried again now and then. What lands clears its
//! range, and then goes the way of all writes.
//!
//! There are no bad ranges while there is a shadow: image and shadow must not
//! differ by what the cache keeps, so a failure then is one of the whole image.

mod ranges;

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use shadow::{Extent, Lba, SECTOR};

use super::super::disk::{DiskError, Job};
use super::syncs::Waiter;
use super::{Completed, Queue, Token, Under, Volume, Write};
use crate::sys::buffer::BufSlice;
use crate::text::count;

use ranges::Ranges;

/// The part of the cache that may be kept for bad ranges; beyond, and beyond
/// [`RANGES_MAX`](ranges::RANGES_MAX) of them, the image as a whole takes no
/// writes.
const KEPT_SHARE: u32 = 8;
/// Writes to bad ranges that are looked at in a turn: each is compared with those
/// before it.
const TRIALS_MAX: usize = 64;
/// How often what is kept is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How often failed writes are written about.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// A host's write to a bad range.
#[derive(Debug)]
pub(super) struct Trial {
    pub token: Token,
    pub queue: Queue,
    pub since: Instant,
    pub extent: Extent,
    pub data: BufSlice,
    pub durable: bool,
}

/// Sectors that are being tried.
#[derive(Debug)]
struct Flight {
    job: u32,
    /// The sectors, and those that share a block of the disk with them.
    span: Extent,
    /// Whose write it is; `None` if it is what the cache keeps.
    trial: Option<Trial>,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// The bad ranges.
    ranges: Ranges,
    /// Writes to them, in their order, that wait for others of the same sectors.
    waiting: VecDeque<Trial>,
    flights: Vec<Flight>,
    /// When the next look at all that is kept begins, and where it has come to.
    retry_at: Option<Instant>,
    cursor: Option<u64>,
    logged: Option<Instant>,
    /// Failed writes since.
    unlogged: u64,
}

impl Health {
    /// No bad ranges, under a cache with blocks of so many sectors.
    pub fn new(block: u64) -> Health {
        Health {
            ranges: Ranges::new(block),
            ..Health::default()
        }
    }

    /// `true` if there are no bad ranges and no write to one has not ended.
    pub fn is_good(&self) -> bool {
        self.ranges.is_empty() && self.flights.is_empty() && self.waiting.is_empty()
    }

    /// `true` if a write to this extent has to be tried, or has to wait for one
    /// that is.
    pub fn concerns(&self, extent: Extent) -> bool {
        !self.is_good()
            && (self.ranges.hull_in(extent).is_some()
                || self.is_tried(extent)
                || self
                    .waiting
                    .iter()
                    .any(|trial| trial.extent.overlaps(extent)))
    }

    /// `true` if something of this extent is being tried.
    pub fn is_tried(&self, extent: Extent) -> bool {
        let touches = |flight: &Flight| {
            let trial = flight.trial.as_ref();
            flight.span.overlaps(extent) || trial.is_some_and(|t| t.extent.overlaps(extent))
        };
        self.flights.iter().any(touches)
    }

    /// `true` if a write to a bad range waits.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// `true` if something is being tried.
    pub fn is_trying(&self) -> bool {
        !self.flights.is_empty()
    }

    /// How many writes wait or are tried.
    pub fn trials(&self) -> usize {
        self.waiting.len() + self.flights.len()
    }

    /// The bad sectors of the block that begins with this one, as a mask.
    pub fn mask(&self, first: u64) -> u64 {
        self.ranges.mask(first)
    }

    /// Returns when the sectors that the cache keeps are tried again.
    pub fn deadline(&self) -> Option<Instant> {
        self.retry_at
            .filter(|_| !self.ranges.is_empty() && self.cursor.is_none())
    }

    /// Returns when the oldest write to a bad range came.
    pub fn oldest_since(&self) -> Option<Instant> {
        let flights = self.flights.iter().filter_map(|f| f.trial.as_ref());
        flights.chain(&self.waiting).map(|trial| trial.since).min()
    }
}

impl Volume {
    /// `true` if the image takes all writes.
    pub(super) fn is_well(&self) -> bool {
        self.health.is_good() && self.cache.kept() == 0
    }

    /// `true` if the cache keeps nothing for bad ranges.
    pub(super) fn keeps_nothing(&self) -> bool {
        self.health.ranges.is_empty() && self.cache.kept() == 0
    }

    /// A write-back has ended.
    pub(super) fn write_ended(
        &mut self,
        slots: &[u32],
        to_shadow: bool,
        error: Option<DiskError>,
        now: Instant,
    ) {
        let Some(error) = error else {
            for slot in slots {
                self.cache.write_ended(*slot, true, now);
            }
            return self.made_progress(now);
        };
        let is_known = !to_shadow && self.view.is_none() && !error.parts.is_empty();
        let failed = |block: Option<Extent>| {
            let parts = error.parts.iter();
            let mut parts =
                parts.filter_map(|(at, len)| Extent::new(Lba(at / SECTOR), len / SECTOR));
            !is_known || block.is_none_or(|block| parts.any(|part| part.overlaps(block)))
        };
        for slot in slots {
            let ok = !failed(self.cache.block_of(*slot));
            self.cache.write_ended(*slot, ok, now);
        }
        if is_known {
            self.found_bad(&error.parts, &error.source, now);
        } else {
            self.failed(now);
            self.last_error = Some(error);
        }
    }

    /// What must be read so that blocks can be written whole cannot be: what of
    /// it the cache does not have is as good as bad.
    pub(super) fn not_completed(&mut self, span: Extent, error: Option<&DiskError>, now: Instant) {
        let Some(error) = error.filter(|_| self.view.is_none()) else {
            return self.failed(now);
        };
        let group = (self.options.align as u64 / SECTOR).max(1);
        let groups = span.start().0 / group..span.end().0.div_ceil(group);
        let groups = groups.filter_map(|n| Extent::new(Lba(n * group), group));
        let parts: Vec<(u64, u64)> = groups
            .filter(|group| !self.cache.covers(*group))
            .map(|group| (group.byte_start(), group.byte_len()))
            .collect();
        self.found_bad(&parts, &error.source, now);
    }

    /// A write to the image has failed in these parts, of (offset, length).
    pub(super) fn found_bad(&mut self, parts: &[(u64, u64)], source: &io::Error, now: Instant) {
        let mut fits = true;
        for (at, len) in parts {
            let Some(extent) = Extent::new(Lba(at / SECTOR), len / SECTOR) else {
                continue;
            };
            fits &= self.health.ranges.add(extent);
            self.fail_waiters_of(extent);
        }
        // No flush waits while something is kept, which is on no account.
        self.fail_flushes();
        let first = parts.first().map_or(0, |(at, _)| *at);
        self.tell_bad(first, source, now);
        self.health.retry_at.get_or_insert(now + RETRY);
        if !fits {
            self.degrade(now);
        }
    }

    /// Gives the image up as a whole if too much is kept.
    pub(super) fn watch_kept(&mut self, now: Instant) {
        if self.has_kept_too_much() && !self.trouble.is_degraded() {
            self.degrade(now);
        }
    }

    /// `true` if more of the cache is kept for bad ranges than may be.
    pub(super) fn has_kept_too_much(&self) -> bool {
        let kept = self
            .health
            .ranges
            .blocks()
            .max(u64::from(self.cache.kept()));
        kept > u64::from((self.cache.slots() / KEPT_SHARE).max(1))
    }

    /// Ends writes that wait for these sectors to be on the disk.
    fn fail_waiters_of(&mut self, extent: Extent) {
        for list in [&mut self.until_synced, &mut self.until_written] {
            let touches =
                |waiter: &Waiter| waiter.extent.is_some_and(|other| other.overlaps(extent));
            let mut index = 0;
            while let Some(waiter) = list.get(index) {
                if touches(waiter) {
                    let token = waiter.token;
                    list.remove(index);
                    self.completed.push_back(Completed {
                        token,
                        data: None,
                        ok: false,
                    });
                } else {
                    index += 1;
                }
            }
        }
    }

    /// Takes a host's write to a bad range.
    pub(super) fn push_trial(&mut self, trial: Trial) {
        self.health.waiting.push_back(trial);
    }

    /// Begins what waits and can be tried now.
    pub(super) fn start_trials(&mut self, now: Instant) {
        if self.redo.is_pending() {
            return;
        }
        let mut waiting = std::mem::take(&mut self.health.waiting);
        let later = waiting.split_off(waiting.len().min(TRIALS_MAX));
        while let Some(trial) = waiting.pop_front() {
            let earlier = self.health.waiting.iter();
            let blocked = self.health.is_tried(trial.extent)
                || earlier.clone().any(|t| t.extent.overlaps(trial.extent));
            if blocked {
                self.health.waiting.push_back(trial);
                continue;
            }
            let left = match self.health.ranges.hull_in(trial.extent) {
                Some(bad) => self.submit_trial(bad, trial).err(),
                None => self.take_trial(trial, now),
            };
            self.health.waiting.extend(left);
        }
        self.health.waiting.extend(later);
        self.start_retry(now);
    }

    /// The sectors to be written so that these bad ones of an extent are: whole
    /// blocks where the extent and the cache have all of them, so that nothing
    /// needs to be read.
    fn span_of(&self, bad: Extent, extent: Extent) -> Extent {
        let whole = self.clip(bad);
        let group = self.options.align as u64 / SECTOR;
        let mut start = whole.start().0.max(extent.start().0);
        let mut end = whole.end().0.min(extent.end().0);
        let has = |from: u64, to: u64| {
            Extent::new(Lba(from), to - from).is_some_and(|rest| self.cache.covers(rest))
        };
        if start > whole.start().0 && has(whole.start().0, start) {
            start = whole.start().0;
        }
        if end < whole.end().0 && has(end, whole.end().0) {
            end = whole.end().0;
        }
        // What is left to be read must be bad: what is good may be written
        // meanwhile.
        if group > 1 && start % group != 0 {
            start = bad.start().0;
        }
        if group > 1 && end % group != 0 {
            end = bad.end().0;
        }
        Extent::new(Lba(start), end - start).unwrap_or(bad)
    }

    /// Tries a host's write; gives it back if there is no room for that now.
    fn submit_trial(&mut self, bad: Extent, trial: Trial) -> Result<(), Trial> {
        let span = self.span_of(bad, trial.extent);
        // The cache has them as they were before what is being tried.
        if self.health.is_tried(span) && !shadow::fault!("trials-overlap") {
            return Err(trial);
        }
        let Some(mut data) = self.cached(span) else {
            return Err(trial);
        };
        // The host's sectors over those of the cache.
        let first = trial.extent.start().0.max(span.start().0);
        let end = trial.extent.end().0.min(span.end().0);
        let at = |from: Extent| ((first - from.start().0) * SECTOR) as usize;
        let len = ((end - first) * SECTOR) as usize;
        let source = &trial.data[at(trial.extent)..][..len];
        data[at(span)..][..len].copy_from_slice(source);
        match self.submit_flight(span, data) {
            Some(flight) => {
                flight.trial = Some(trial);
                Ok(())
            }
            None => Err(trial),
        }
    }

    /// A buffer with what the cache has of an extent, placed as the disk wants
    /// it.
    fn cached(&mut self, span: Extent) -> Option<BufSlice> {
        let align = self.options.align as u64;
        let offset = (span.byte_start() % align) as usize;
        let buf = self.buffer_for(span).ok()?;
        let range = offset..offset + span.byte_len() as usize;
        if buf.len() < range.end + align as usize {
            self.give_back(buf);
            return None;
        }
        let mut data = BufSlice { buf, range };
        self.cache.overlay(span, &mut data);
        Some(data)
    }

    fn submit_flight(&mut self, span: Extent, data: BufSlice) -> Option<&mut Flight> {
        let at = span.byte_start();
        let span = self.groups_around(span);
        let job = self.submit(Under::Try, Job::Try { at, data }).ok()?;
        self.health.flights.push(Flight {
            job,
            span,
            trial: None,
        });
        self.health.flights.last_mut()
    }

    /// Tries what is kept, one run of sectors after the other.
    fn start_retry(&mut self, now: Instant) {
        let health = &mut self.health;
        if health.ranges.is_empty() {
            (health.retry_at, health.cursor) = (None, None);
            return;
        }
        if health.cursor.is_none() && health.retry_at.is_some_and(|at| at <= now) {
            health.cursor = Some(0);
        }
        let is_retrying = health.flights.iter().any(|flight| flight.trial.is_none());
        if is_retrying || self.is_discarding() {
            return;
        }
        while let Some(cursor) = self.health.cursor {
            let Some(bad) = self.health.ranges.next(cursor) else {
                self.health.cursor = None;
                self.health.retry_at = Some(now + RETRY);
                return;
            };
            self.health.cursor = Some(bad.end().0);
            let waiting = self.health.waiting.iter();
            let is_tried = self.health.is_tried(bad)
                || waiting.clone().any(|trial| trial.extent.overlaps(bad));
            if is_tried {
                continue;
            }
            let Some(kept) = self.cache.dirty_run(bad) else {
                // Nothing is kept for it.
                self.health.ranges.clear(bad);
                continue;
            };
            self.health.cursor = Some(kept.end().0);
            let span = self.span_of(kept, kept);
            if self.health.is_tried(span) {
                continue;
            }
            if let Some(data) = self.cached(span) {
                let _ = self.submit_flight(span, data);
            }
            return;
        }
    }

    /// Sectors that were tried have landed, or not.
    pub(super) fn try_ended(
        &mut self,
        job: u32,
        data: Option<BufSlice>,
        error: Option<DiskError>,
        now: Instant,
    ) {
        if let Some(data) = data {
            self.give_back(data.buf);
        }
        let mut flights = self.health.flights.iter();
        let Some(index) = flights.position(|flight| flight.job == job) else {
            return;
        };
        let Flight { span, trial, .. } = self.health.flights.swap_remove(index);
        let error = error.filter(|_| !shadow::fault!("failed-trial-acknowledged"));
        if let Some(error) = error {
            if let Some(trial) = trial {
                self.tell_bad(span.byte_start(), &error.source, now);
                self.fail_trial(trial);
            }
            return;
        }
        self.made_progress(now);
        self.landed(span, now);
        // Before all that waits for it. More of its sectors may be bad meanwhile.
        let trial = trial.and_then(|trial| match self.health.ranges.hull_in(trial.extent) {
            Some(_) => Some(trial),
            None => self.take_trial(trial, now),
        });
        if let Some(trial) = trial {
            self.health.waiting.push_front(trial);
        }
    }

    /// An extent with all that shares a block of the disk with it.
    fn groups_around(&self, extent: Extent) -> Extent {
        let group = (self.options.align as u64 / SECTOR).max(1);
        let start = extent.start().0 / group * group;
        let end = extent.end().0.next_multiple_of(group);
        Extent::new(Lba(start), end - start).unwrap_or(extent)
    }

    /// The image has taken sectors: they are of no bad range any more.
    pub(super) fn landed(&mut self, span: Extent, now: Instant) {
        if self.keeps_nothing() {
            return;
        }
        let span = self.groups_around(span);
        self.clear_bad(span);
        self.cache.write_kept(span, now);
        self.discards.dirtied(self.cache.blocks_around(span));
    }

    /// Takes sectors off the bad ranges, and says so if these were the last.
    pub(super) fn clear_bad(&mut self, span: Extent) {
        if self.health.ranges.is_empty() {
            return;
        }
        self.health.ranges.clear(span);
        if self.health.ranges.is_empty() {
            let (export, image) = (self.export(), self.image());
            log::warn!(
                "{export}: {image}: the disk takes writes again: no sector is kept in the cache \
                 any more"
            );
        }
    }

    /// A write whose sectors the disk takes goes the way of all writes; comes back
    /// while there is no slot for it.
    fn take_trial(&mut self, trial: Trial, now: Instant) -> Option<Trial> {
        let Trial {
            token,
            queue,
            since,
            extent,
            data,
            durable,
        } = trial;
        match self.cache.write_for(queue, extent, &data, now) {
            Ok(epoch) => {
                self.overtake_fills(extent);
                self.write_bytes.release(queue, data.len() as u64);
                self.bufs.put(data.buf);
                if self.wait_for(now, token, extent, epoch, durable) == Write::Done {
                    self.complete(token, None, true);
                }
            }
            Err(_) => {
                return Some(Trial {
                    token,
                    queue,
                    since,
                    extent,
                    data,
                    durable,
                });
            }
        }
        None
    }

    fn fail_trial(&mut self, trial: Trial) {
        self.write_bytes
            .release(trial.queue, trial.data.len() as u64);
        self.bufs.put(trial.data.buf);
        self.complete(trial.token, None, false);
    }

    /// Ends the writes to bad ranges of which this is true: they were not done.
    pub(super) fn fail_trials(&mut self, ends: impl Fn(&Trial) -> bool) {
        let waiting = std::mem::take(&mut self.health.waiting);
        let (ended, waiting): (VecDeque<Trial>, _) = waiting.into_iter().partition(&ends);
        self.health.waiting = waiting;
        let flights = self.health.flights.iter_mut();
        // What is being tried goes on, and is nobody's.
        let tried = flights.filter_map(|flight| flight.trial.take_if(|trial| ends(trial)));
        let ended: Vec<Trial> = tried.chain(ended).collect();
        for trial in ended {
            self.fail_trial(trial);
        }
    }

    /// Says that sectors could not be written, not too often.
    fn tell_bad(&mut self, at: u64, source: &io::Error, now: Instant) {
        let health = &mut self.health;
        health.unlogged += 1;
        let is_due = health.logged.is_none_or(|last| now - last >= LOG_INTERVAL);
        if !is_due {
            return;
        }
        health.logged = Some(now);
        let others = match std::mem::take(&mut health.unlogged) - 1 {
            0 => String::new(),
            others => format!(" ({others} more since this was said last)"),
        };
        let kept = health.ranges.sectors();
        let lba = at.saturating_sub(self.bounds.start) / SECTOR;
        log::error!(
            "{}: {}: write failed at LBA {lba}: {source}{others}; {} kept in the cache, \
             retried every {} s",
            self.export(),
            self.image(),
            count(kept, "sector"),
            RETRY.as_secs()
        );
    }
}
