//! Syncs: for whom, when, through which files; and what becomes of a disk that
//! fails.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use shadow::{Chunk, Commit, Extent, SECTOR};

use super::super::cache::{Epoch, Record};
use super::super::disk::{Job, JobId};
use super::freeze::{COMMIT, Stage};
use super::progress::{SLICE_RUNS_MAX, slices};
use super::{Token, Volume};

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

pub(super) const PUSH: JobId = JobId(u64::MAX - 6);

/// A request that waits until an epoch is written, or synced.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiter {
    pub token: Token,
    pub epoch: Epoch,
    pub since: Instant,
    /// A flush is told of a failure; a write waits for the next try.
    pub flush: bool,
    /// Of a write or a discard its sectors.
    pub extent: Option<Extent>,
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
    pub fn rests(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|at| now < at)
    }

    /// The disk is tried again.
    pub fn try_again(&mut self) {
        self.retry_at = None;
        self.sync_failed = false;
    }
}

/// A sync on its way through image and shadow.
pub(super) struct Syncing {
    pub records: Vec<Record>,
    /// The bits that go with it, once the data is there.
    pub commit: Option<Commit>,
    /// Chunks that the merge has made zeros in the image.
    pub zeroed: Vec<(u64, u64)>,
    /// Whether the records' data is in the shadow.
    to_shadow: bool,
    /// What is pushed before it, the slice at hand first.
    slices: VecDeque<(u64, u64)>,
    /// Bytes of the slices that were pushed.
    pushed: u64,
    /// When the slice at hand, or the sync, began.
    step_began: Instant,
}

impl Volume {
    pub(super) fn start_sync(&mut self, now: Instant) {
        // Where a write has failed, what could be written is not left to wait
        // for what cannot; where a sync has failed, the disk is left alone.
        let failing = self.trouble.is_failing() && !self.trouble.sync_failed && self.writing == 0;
        let rests = self.trouble.rests(now) && !failing;
        if self.syncing.is_some() || rests || self.cache.awaiting_sync() == 0 {
            return;
        }
        // One change of the shadow's bits at a time, and none between two files.
        if self.freezing.is_forgetting() || self.destination().is_none() {
            return;
        }
        self.open_round(now);
        let ready = |epoch: Option<Epoch>| {
            epoch.is_some_and(|e| self.cache.is_written(e) && !self.cache.is_synced(e))
        };
        // Without anyone waiting: when an eighth of the cache is written and
        // only a sync is missing to make it clean, or a write needs a slot.
        let many = self.cache.awaiting_sync() >= self.cache.slots() as usize / 8;
        let waits = !self.writes.is_empty() || self.health.has_waiting();
        let pressed = waits && self.writing == 0;
        // What is flushed for its age need not wait for all that another has written.
        let rest = now.saturating_duration_since(self.sync_began);
        let late = self.flushing.is_some()
            && self.cache.has_several_owners()
            && rest >= self.options.max_dirty_age / 4;
        let wanted = [self.round, self.flushing, self.freeze_wants()];
        if wanted.into_iter().any(ready) || many || pressed || late || failing {
            self.round = None;
            self.sync_began = now;
            self.window.share(now);
            self.submit_sync();
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

    /// Begins a sync of what was written back. The bits that go with it are
    /// settled here: of a chunk that is written meanwhile they say the same.
    pub(super) fn submit_sync(&mut self) {
        let records = self.cache.begin_sync();
        self.redo.sync_begins();
        let sectors = self.cache.block_bytes() / SECTOR;
        let frozen = matches!(self.freezing.stage, Stage::Frozen);
        let thawing = matches!(self.freezing.stage, Stage::Thawing);
        let mut syncing = Syncing {
            records,
            commit: None,
            zeroed: Vec::new(),
            to_shadow: frozen,
            slices: VecDeque::new(),
            pushed: 0,
            step_began: self.sync_began,
        };
        if let Some(view) = self.view.as_mut().filter(|_| frozen || thawing) {
            let after = if frozen { Chunk::Data } else { Chunk::Absent };
            let blocks = syncing.records.iter().map(|record| record.sectors());
            let mut chunks: Vec<u64> = blocks
                .filter(|(_, mask)| *mask != 0)
                .flat_map(|(block, mask)| view.chunks(block * sectors, mask))
                .collect();
            if thawing {
                syncing.zeroed = self.merge.take_zeroed();
                let zeroed = syncing.zeroed.iter();
                chunks.extend(zeroed.flat_map(|(first, count)| *first..first + count));
            }
            chunks.retain(|chunk| view.map.get(*chunk) != after);
            // Of a commit that failed the disk may have some: nothing is promised
            // before it says again what the map does.
            if !chunks.is_empty() || view.map.is_doubtful() {
                let changes = chunks.into_iter().map(|chunk| (chunk, after));
                syncing.commit = Some(view.map.plan(changes));
            }
        }
        // Past the page cache there is nothing to push.
        if frozen || !self.options.direct {
            let view = self.view.as_ref().filter(|_| frozen);
            // A disk that reads as well gets as little at a time as it gets reads, or
            // each read would wait for hundreds of writes.
            let runs_max = if self.reads.is_empty() && self.reading == 0 {
                SLICE_RUNS_MAX
            } else {
                self.window.size(self.sync_began) / 2
            };
            syncing.slices = slices(
                &syncing.records,
                sectors * SECTOR,
                runs_max,
                |block, mask| {
                    let first = block * sectors + u64::from(mask.trailing_zeros());
                    let end = block * sectors + 64 - u64::from(mask.leading_zeros());
                    let at = first * SECTOR;
                    let at = view.map_or(at, |view| view.geometry.data_offset(at));
                    (at, (end - first) * SECTOR)
                },
            );
        }
        self.syncing = Some(syncing);
        self.go_on_syncing();
    }

    /// Pushes the next slice, or syncs when all are pushed.
    fn go_on_syncing(&mut self) {
        let Some(syncing) = &self.syncing else { return };
        let frozen = syncing.to_shadow;
        if let Some(&(at, len)) = syncing.slices.front() {
            match &mut self.freezing.side {
                Some(side) if frozen => side.disk.submit(PUSH, Job::Push { at, len }),
                _ => self.disk.submit(PUSH, Job::Push { at, len }),
            }
            return;
        }
        let pages = syncing.commit.as_ref().map(|commit| commit.pages.clone());
        match (&mut self.freezing.side, pages) {
            // The shadow's data, then the bits that speak of it.
            (Some(side), Some(pages)) if frozen => {
                let data_first = true;
                side.disk.submit(COMMIT, Job::Commit { data_first, pages });
            }
            (Some(side), None) if frozen => side.disk.submit(COMMIT, Job::Sync),
            // The image; the bits follow when it has the data.
            (Some(side), Some(pages)) if shadow::fault!("thaw-bits-before-image-sync") => {
                let data_first = false;
                side.disk.submit(COMMIT, Job::Commit { data_first, pages });
            }
            _ => self.disk.submit(super::SYNC, Job::Sync),
        }
    }

    /// A slice was pushed. What could not be written is reported only once: then
    /// the sync has failed.
    pub(super) fn pushed(&mut self, ok: bool, now: Instant) {
        if !ok {
            return self.sync_ended(false, now);
        }
        self.made_progress(now);
        if let Some(syncing) = &mut self.syncing {
            let bytes = syncing.slices.pop_front().map_or(0, |(_, len)| len);
            syncing.pushed += bytes;
            let began = std::mem::replace(&mut syncing.step_began, now);
            self.progress
                .took(bytes, now.saturating_duration_since(began));
        }
        self.go_on_syncing();
    }

    /// Something came closer to stable storage; of a disk that was given up only
    /// a sync shows that.
    pub(super) fn made_progress(&mut self, now: Instant) {
        if !self.trouble.is_degraded() {
            self.progress.made(now);
        }
    }

    /// Bytes that are not on stable storage.
    pub fn left_bytes(&self) -> u64 {
        let dirty = u64::from(self.cache.dirty().0) * self.cache.block_bytes();
        let pushed = self.syncing.as_ref().map_or(0, |syncing| syncing.pushed);
        dirty.saturating_sub(pushed)
    }

    /// When something came closer to stable storage, the last time.
    pub fn progress_at(&self) -> Instant {
        self.progress.at()
    }

    /// The image is synced: now the shadow may forget what it has taken over.
    pub(super) fn image_synced(&mut self, ok: bool, now: Instant) {
        let syncing = self.syncing.as_ref();
        let pages = syncing.and_then(|syncing| syncing.commit.as_ref());
        let pages = pages.filter(|_| ok).map(|commit| commit.pages.clone());
        match (&mut self.freezing.side, pages) {
            (Some(side), Some(pages)) => {
                let data_first = false;
                side.disk.submit(COMMIT, Job::Commit { data_first, pages });
            }
            _ => self.sync_ended(ok, now),
        }
    }

    /// The bits of a sync are on stable storage, or it has failed.
    pub(super) fn settle(&mut self, commit: Option<Commit>, ok: bool) {
        if let (Some(view), Some(commit)) = (&mut self.view, commit) {
            let before = view.map.present();
            view.map.settle(commit, ok);
            self.merge
                .committed(before.saturating_sub(view.map.present()));
        }
    }

    pub(super) fn sync_ended(&mut self, ok: bool, now: Instant) {
        let Some(syncing) = self.syncing.take() else {
            return;
        };
        if ok && syncing.pushed == 0 {
            let bytes = syncing.records.len() as u64 * self.cache.block_bytes();
            let time = now.saturating_duration_since(syncing.step_began);
            self.progress.took(bytes, time);
        }
        self.settle(syncing.commit, ok);
        self.cache.sync_ended(syncing.records, ok, now);
        self.redo.sync_ended(ok);
        if ok {
            self.progress.made(now);
            // Not every sync is the end of it: one sector may go on failing
            // while the others are written and synced.
            let over = self
                .trouble
                .epoch
                .is_none_or(|epoch| self.cache.is_synced(epoch));
            let over = over && !self.has_kept_too_much();
            if over && std::mem::take(&mut self.trouble).degraded {
                log::warn!(
                    "{}: {}: the disk takes writes again",
                    self.export(),
                    self.image()
                );
            }
        } else {
            // Their bits say so still: they are made zeros again.
            self.merge.take_zeroed();
            self.failed(now);
            self.trouble.sync_failed = true;
        }
    }

    /// Tells those who flush that something is not on stable storage.
    pub(super) fn fail_flushes(&mut self) {
        for waiter in std::mem::take(&mut self.until_synced) {
            if waiter.flush {
                self.complete(waiter.token, None, false);
            } else {
                self.until_synced.push_back(waiter);
            }
        }
    }

    /// The image as a whole takes no writes.
    pub(super) fn degrade(&mut self, now: Instant) {
        self.trouble.rounds = ROUNDS_MAX;
        self.failed(now);
    }

    /// A write-back or a sync has failed: what it was about stays dirty, and is
    /// tried again after a while.
    pub(super) fn failed(&mut self, now: Instant) {
        self.fail_flushes();
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
                "{}: {}: the disk does not take writes: new ones are refused, reads go on; \
                 it is tried again every {} s",
                self.options.export,
                self.options.image,
                PROBE.as_secs()
            );
        }
        trouble.retry_at = Some(now + if trouble.degraded { PROBE } else { RETRY });
    }

    /// Ends what has waited long enough, well or not.
    pub(super) fn end_waiting(&mut self, now: Instant) {
        let mut served = 0;
        while let Some(waiter) = self.until_synced.front().copied() {
            let early = shadow::fault!("flush-answered-when-written");
            let enough = early && self.cache.is_written(waiter.epoch);
            if !(self.cache.is_synced(waiter.epoch) || enough) {
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
        // A write is told when the disk has made no progress for so long, also by
        // one that hangs and says nothing; a flush only by one that fails.
        let patience = self.options.io_patience;
        let failing = self.trouble.is_failing();
        let mut given_up = Vec::new();
        for list in [&mut self.until_synced, &mut self.until_written] {
            let mut index = 0;
            while let Some(waiter) = list.get(index) {
                let since = self.progress.since(waiter.since);
                if now.saturating_duration_since(since) < patience {
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
        if failing || self.progress.hangs(now, patience) {
            self.give_up_waiting(now);
        }
    }

    /// Ends what has waited for a slot or for its turn for too long: it was not
    /// done.
    fn give_up_waiting(&mut self, now: Instant) {
        let (patience, progress) = (self.options.io_patience, self.progress.at());
        let is_late =
            |since: Instant| now.saturating_duration_since(since.max(progress)) >= patience;
        self.fail_trials(|trial| is_late(trial.since));
        let writes = self.writes.remove_if(|write| is_late(write.since));
        self.fail_writes(writes);
        for token in self.discards.remove(|since, _| is_late(since)) {
            self.complete(token, None, false);
        }
    }
}
