//! Writes: into the cache, to the image, to stable storage; discards; and what
//! happens when the disk fails.

use std::time::{Duration, Instant};

use shadow::Extent;

use super::super::cache::Epoch;
use super::super::disk::Segment;
use super::{DISCARD, SYNC};
use super::{Job, Refused, Token, Under, Volume, Write};
use crate::sys::buffer::BufSlice;

/// The most blocks of one write to the image.
const RUN_MAX: usize = 64;
/// Jobs that write to the page cache at the same time, and runs of each.
const JOBS: usize = 4;
const RUNS_MAX: usize = 64;
/// The part of a sync's time that the next one waits for those it served, and
/// the most of it.
const GATHER_SHARE: u32 = 3;
const GATHER_MAX: Duration = Duration::from_micros(400);
/// How long after a failure the disk is tried again, and how long once it is
/// given up.
const RETRY: Duration = Duration::from_millis(500);
const PROBE: Duration = Duration::from_secs(5);
/// Rounds that fail, or the time since the first did, until the disk is given
/// up.
const ROUNDS_MAX: u32 = 3;
const FAILING_MAX: Duration = Duration::from_secs(30);

/// A write that waits for a slot, or a discard in its turn.
#[derive(Debug)]
pub(super) enum ParkedWrite {
    Write {
        token: Token,
        since: Instant,
        extent: Extent,
        data: BufSlice,
        durable: bool,
    },
    Discard {
        token: Token,
        since: Instant,
        extents: Vec<Extent>,
        durable: bool,
    },
}

impl ParkedWrite {
    pub fn since(&self) -> Instant {
        match self {
            ParkedWrite::Write { since, .. } | ParkedWrite::Discard { since, .. } => *since,
        }
    }
}

/// How far the discard at the head of the parked list has come.
#[derive(Debug, Default)]
pub(super) struct Discarding {
    /// What it is about, once nothing is dirty any more.
    hull: Option<Extent>,
    /// Whether the disk has it.
    submitted: bool,
}

impl Discarding {
    pub fn is_submitted(&self) -> bool {
        self.submitted
    }

    /// Whether a request for this extent has to wait.
    pub fn excludes(&self, extent: Extent) -> bool {
        self.hull.is_some_and(|hull| hull.overlaps(extent))
    }
}

/// A request that waits until an epoch is written, or synced.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiter {
    token: Token,
    epoch: Epoch,
    pub since: Instant,
    /// A flush is told of a failure; a write waits for the next try.
    flush: bool,
}

impl Waiter {
    /// Whether it is told that it failed when it has waited for too long.
    pub fn is_impatient(&self, failing: bool) -> bool {
        failing || !self.flush
    }
}

/// How many durable writes are expected soon, and until when a sync waits for
/// them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gather {
    expected: usize,
    pub until: Instant,
}

/// What the disk's failures have come to.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    since: Option<Instant>,
    /// What was there at the last failure: when all of it is on stable storage
    /// the trouble is over.
    epoch: Option<Epoch>,
    /// Whether it was a sync that failed last.
    sync_failed: bool,
    rounds: u32,
    retry_at: Option<Instant>,
    degraded: bool,
}

impl Trouble {
    pub fn is_degraded(&self) -> bool {
        self.degraded
    }

    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Whether it has failed and not succeeded since.
    pub fn is_failing(&self) -> bool {
        self.since.is_some()
    }

    /// Whether the disk is left alone for now.
    fn rests(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|at| now < at)
    }
}

impl Volume {
    /// Writes sectors; a `durable` write ends when it is on stable storage. One
    /// that does not end at once is given a token, as may be one that is refused.
    /// `extent` is within the bounds, not empty, and as long as `data`.
    pub fn write(
        &mut self,
        now: Instant,
        mut token: impl FnMut() -> Option<Token>,
        extent: Extent,
        data: &[u8],
        durable: bool,
    ) -> Result<Write, Refused> {
        self.last_request = now;
        if self.trouble.degraded {
            return Err(Refused::Degraded);
        }
        let extent = self.absolute(extent);
        let waits = durable || self.options.write_through;
        let mut given = None;
        // In order: nothing overtakes what waits already.
        if self.parked.is_empty() {
            if waits {
                given = Some(token().ok_or(Refused::NoRoom)?);
            }
            if let Ok(epoch) = self.cache.write(extent, data, now) {
                self.overtake_fills(extent);
                return Ok(match given {
                    Some(token) => self.wait_for(now, token, epoch, durable),
                    None => Write::Done,
                });
            }
        }
        let room = self.parked.len() < super::PARKED_MAX
            && (self.parked_bytes == 0
                || self.parked_bytes + data.len() <= self.options.parked_max);
        let buf = if room { self.bufs.take() } else { None };
        let mut buf = buf.ok_or(Refused::NoRoom)?;
        let Some(token) = given.or_else(token) else {
            self.bufs.put(buf);
            return Err(Refused::NoRoom);
        };
        buf[..data.len()].copy_from_slice(data);
        let data = BufSlice {
            buf,
            range: 0..data.len(),
        };
        self.parked_bytes += data.len();
        self.parked.push_back(ParkedWrite::Write {
            token,
            since: now,
            extent,
            data,
            durable,
        });
        Ok(Write::Parked)
    }

    /// What a write that the cache has taken still waits for.
    fn wait_for(&mut self, now: Instant, token: Token, epoch: Epoch, durable: bool) -> Write {
        let waiter = Waiter {
            token,
            epoch,
            since: now,
            flush: false,
        };
        if durable {
            self.until_synced.push_back(waiter);
        } else if self.options.write_through {
            self.until_written.push_back(waiter);
        } else {
            return Write::Done;
        }
        Write::Parked
    }

    /// Discards sectors, which are zeros afterwards; like a write in every other
    /// respect.
    pub fn discard(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
        extents: &[Extent],
        durable: bool,
    ) -> Result<(), Refused> {
        self.last_request = now;
        if self.trouble.degraded {
            return Err(Refused::Degraded);
        }
        if self.parked.len() >= super::PARKED_MAX {
            return Err(Refused::NoRoom);
        }
        let token = token().ok_or(Refused::NoRoom)?;
        let extents: Vec<Extent> = extents.iter().map(|e| self.absolute(*e)).collect();
        self.parked.push_back(ParkedWrite::Discard {
            token,
            since: now,
            extents,
            durable,
        });
        Ok(())
    }

    /// Ends once all that ended before is on stable storage.
    pub fn flush(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
    ) -> Result<(), Refused> {
        let token = token().ok_or(Refused::NoRoom)?;
        let epoch = self.cache.close_epoch();
        self.until_synced.push_back(Waiter {
            token,
            epoch,
            since: now,
            flush: true,
        });
        Ok(())
    }

    /// Takes what waits for a slot, in order, as far as it goes.
    pub(super) fn start_parked(&mut self, now: Instant) {
        while let Some(front) = self.parked.pop_front() {
            match front {
                ParkedWrite::Write {
                    token,
                    since,
                    extent,
                    data,
                    durable,
                } => {
                    let len = data.len();
                    let Ok(epoch) = self.cache.write(extent, &data, now) else {
                        let again = ParkedWrite::Write {
                            token,
                            since,
                            extent,
                            data,
                            durable,
                        };
                        self.parked.push_front(again);
                        return;
                    };
                    self.overtake_fills(extent);
                    self.parked_bytes -= len;
                    self.bufs.put(data.buf);
                    if self.wait_for(now, token, epoch, durable) == Write::Done {
                        self.complete(token, None, true);
                    }
                }
                discard @ ParkedWrite::Discard { .. } => {
                    self.parked.push_front(discard);
                    self.start_discard();
                    return;
                }
            }
        }
    }

    /// Goes on with the discard at the head of the parked list.
    fn start_discard(&mut self) {
        let Some(ParkedWrite::Discard { extents, .. }) = self.parked.front() else {
            return;
        };
        if self.discarding.submitted || self.cache.dirty().0 > 0 {
            return;
        }
        // Reads from now on wait behind it, and it waits for those before: of
        // the whole blocks, since it may take a block out that a fill holds.
        let hull = extents.iter().copied().reduce(Extent::hull);
        let hull = hull.map(|hull| self.cache.blocks_around(hull));
        self.discarding.hull = hull;
        if hull.is_some_and(|hull| self.is_filling(hull)) {
            return;
        }
        let ranges = extents
            .iter()
            .map(|e| (e.byte_start(), e.byte_len()))
            .collect();
        self.discarding.submitted = true;
        self.disk.submit(DISCARD, Job::Discard(ranges));
    }

    pub(super) fn discard_ended(&mut self, ok: bool, now: Instant) {
        self.discarding = Discarding::default();
        self.end_discard(ok, now);
        while let Some((token, extent)) = self.held_reads.pop_front() {
            match self.read_absolute(|| Some(token), extent) {
                Ok(super::Read::Ready(body)) => self.complete(token, Some(body), true),
                Ok(super::Read::Parked) => {}
                Err(_) => self.complete(token, None, false),
            }
        }
    }

    fn end_discard(&mut self, ok: bool, now: Instant) {
        let Some(ParkedWrite::Discard {
            token,
            extents,
            durable,
            ..
        }) = self.parked.pop_front()
        else {
            return;
        };
        if ok {
            for extent in extents {
                self.overtake_fills(extent);
                self.cache.forget(extent);
            }
            let epoch = self.cache.record_outside(now);
            if durable {
                self.until_synced.push_back(Waiter {
                    token,
                    epoch,
                    since: now,
                    flush: false,
                });
                return;
            }
        }
        self.complete(token, None, ok);
    }

    /// Up to which epoch the cache is to be written back now.
    fn urgent(&self) -> Option<Epoch> {
        let last = |list: &std::collections::VecDeque<Waiter>| list.back().map(|w| w.epoch);
        let waited = last(&self.until_synced)
            .max(last(&self.until_written))
            .max(self.flushing)
            .max(self.round);
        let (dirty, max) = self.cache.dirty();
        let pressed = dirty > max / 4 * 3 || !self.parked.is_empty();
        if pressed {
            Some(self.cache.epoch())
        } else {
            waited
        }
    }

    pub(super) fn start_writing(&mut self, now: Instant) {
        self.flush_by_time(now);
        if self.trouble.rests(now) {
            return;
        }
        self.trouble.retry_at = None;
        self.trouble.sync_failed = false;
        let Some(until) = self.urgent() else { return };
        // A disk is given many writes at once; the page cache a few jobs, each
        // of many copies.
        let direct = self.options.direct;
        let (depth, most) = if direct {
            (self.options.write_depth, 1)
        } else {
            (JOBS, RUNS_MAX)
        };
        while self.writing < depth && !self.free.is_empty() {
            let (mut segments, mut slots) = (Vec::new(), Vec::new());
            while segments.len() < most {
                let Some(run) = self.cache.next_run(until, RUN_MAX, &|_, dirty| dirty) else {
                    break;
                };
                segments.push(Segment {
                    at: run.extent.byte_start(),
                    pieces: run.pieces,
                });
                slots.extend(run.slots);
            }
            if segments.is_empty() {
                break;
            }
            // There is room: a number was free.
            let _ = self.submit(Under::Write(slots), Job::Write(segments));
            self.writing += 1;
        }
        self.fill_wanted();
    }

    /// Flushes what is old, or all when nothing is asked of us.
    fn flush_by_time(&mut self, now: Instant) {
        if self
            .flushing
            .is_some_and(|epoch| self.cache.is_synced(epoch))
        {
            self.flushing = None;
        }
        if self.flushing.is_some() {
            return;
        }
        let Some(oldest) = self.cache.oldest() else {
            return;
        };
        let old = now.saturating_duration_since(oldest) >= self.options.max_dirty_age / 2;
        let idle = now.saturating_duration_since(self.last_request) >= self.options.idle_flush;
        let discard = matches!(self.parked.front(), Some(ParkedWrite::Discard { .. }));
        if old || idle || self.draining || discard {
            self.flushing = Some(self.cache.close_epoch());
        }
    }

    pub(super) fn start_sync(&mut self, now: Instant) {
        // Where a write has failed, what could be written is not left to wait
        // for what cannot; where a sync has failed, the disk is left alone.
        let failing = self.trouble.is_failing() && !self.trouble.sync_failed && self.writing == 0;
        let rests = self.trouble.rests(now) && !failing;
        if self.syncing.is_some() || rests || self.cache.awaiting_sync() == 0 {
            return;
        }
        self.open_round(now);
        let ready = |epoch: Option<Epoch>| {
            epoch.is_some_and(|e| self.cache.is_written(e) && !self.cache.is_synced(e))
        };
        // Without anyone waiting: when an eighth of the cache is written and
        // only a sync is missing to make it clean, or a write needs a slot.
        let many = self.cache.awaiting_sync() >= self.cache.slots() as usize / 8;
        let pressed = !self.parked.is_empty() && self.writing == 0;
        if ready(self.round) || ready(self.flushing) || many || pressed || failing {
            self.round = None;
            self.sync_began = now;
            self.syncing = Some(self.cache.begin_sync());
            self.disk.submit(SYNC, Job::Sync);
        }
    }

    /// Settles what the next sync is for: all that waits now. What comes later
    /// waits for the one after it.
    fn open_round(&mut self, now: Instant) {
        if self.round.is_some_and(|epoch| self.cache.is_synced(epoch)) {
            self.round = None;
        }
        let Some(front) = self.until_synced.front().filter(|_| self.round.is_none()) else {
            return;
        };
        // Those served last are about to write again; a sync begun without them
        // would make them wait for a whole one more.
        let waiting = self.until_synced.len();
        if !front.flush
            && self
                .gather
                .is_some_and(|g| waiting < g.expected && now < g.until)
        {
            return;
        }
        self.gather = None;
        let is_open = front.epoch == self.cache.epoch();
        self.round = Some(if is_open {
            self.cache.close_epoch()
        } else {
            front.epoch
        });
    }

    pub(super) fn sync_ended(&mut self, ok: bool, now: Instant) {
        let Some(records) = self.syncing.take() else {
            return;
        };
        self.cache.sync_ended(records, ok, now);
        if ok {
            // Not every sync is the end of it: one sector may go on failing
            // while the others are written and synced.
            let over = self
                .trouble
                .epoch
                .is_none_or(|epoch| self.cache.is_synced(epoch));
            if over && std::mem::take(&mut self.trouble).degraded {
                log::warn!("the disk takes writes again");
            }
        } else {
            self.failed(now);
            self.trouble.sync_failed = true;
        }
    }

    /// A write-back or a sync has failed: what it was about stays dirty, and is
    /// tried again after a while.
    pub(super) fn failed(&mut self, now: Instant) {
        for waiter in std::mem::take(&mut self.until_synced) {
            if waiter.flush {
                self.complete(waiter.token, None, false);
            } else {
                self.until_synced.push_back(waiter);
            }
        }
        if self.trouble.rests(now) {
            // Of the same round.
            return;
        }
        let epoch = self.cache.close_epoch();
        let trouble = &mut self.trouble;
        trouble.epoch = Some(epoch);
        trouble.rounds += 1;
        let since = *trouble.since.get_or_insert(now);
        if !trouble.degraded && (trouble.rounds >= ROUNDS_MAX || now - since >= FAILING_MAX) {
            trouble.degraded = true;
            log::error!(
                "the disk does not take writes: new ones are refused, reads go on; \
                 it is tried again every {} s",
                PROBE.as_secs()
            );
        }
        trouble.retry_at = Some(now + if trouble.degraded { PROBE } else { RETRY });
    }

    /// Ends what has waited long enough, well or not.
    pub(super) fn end_waiting(&mut self, now: Instant) {
        let mut served = 0;
        while let Some(waiter) = self.until_synced.front().copied() {
            if !self.cache.is_synced(waiter.epoch) {
                break;
            }
            self.until_synced.pop_front();
            served += usize::from(!waiter.flush);
            self.complete(waiter.token, None, true);
        }
        if served > 0 {
            let patience = now.saturating_duration_since(self.sync_began) / GATHER_SHARE;
            let until = now + patience.min(GATHER_MAX);
            self.gather = Some(Gather {
                expected: served + self.until_synced.len(),
                until,
            });
        }
        while let Some(waiter) = self.until_written.front().copied() {
            if !self.cache.is_written(waiter.epoch) {
                break;
            }
            self.until_written.pop_front();
            self.complete(waiter.token, None, true);
        }
        // A write is told when its patience is over, also by a disk that hangs
        // and says nothing; a flush only by one that fails.
        let patience = self.options.io_patience;
        let failing = self.trouble.is_failing();
        let mut given_up = Vec::new();
        for list in [&mut self.until_synced, &mut self.until_written] {
            let mut index = 0;
            while let Some(waiter) = list.get(index) {
                if now.saturating_duration_since(waiter.since) < patience {
                    break;
                }
                if waiter.is_impatient(failing) {
                    given_up.extend(list.remove(index));
                } else {
                    index += 1;
                }
            }
        }
        for waiter in given_up {
            self.complete(waiter.token, None, false);
        }
        if !failing {
            return;
        }
        let is_old =
            |parked: &ParkedWrite| now.saturating_duration_since(parked.since()) >= patience;
        while self.parked.front().is_some_and(is_old) && !self.discarding.submitted {
            self.give_up_parked(now);
        }
    }

    /// Ends the first that waits for a slot or for its turn: it was not done.
    fn give_up_parked(&mut self, now: Instant) {
        if let Some(ParkedWrite::Discard { .. }) = self.parked.front() {
            self.discard_ended(false, now);
        } else if let Some(ParkedWrite::Write { token, data, .. }) = self.parked.pop_front() {
            self.parked_bytes -= data.len();
            self.bufs.put(data.buf);
            self.complete(token, None, false);
        }
    }
}
