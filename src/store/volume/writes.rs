//! Writes of hosts into the cache, and write-back from there.

use std::time::Instant;

use shadow::{Chunk, Extent, Lba, SECTOR};

use super::super::cache::{Epoch, Run};
use super::super::disk::Segment;
use super::super::fair::{self, Initiator, Passed};
use super::freeze::Destination;
use super::health::Trial;
use super::syncs::Waiter;
use super::{Job, Queue, Refused, Token, Under, Volume, Write};
use crate::sys::buffer::BufSlice;

/// The most blocks of one write to the image.
const RUN_MAX: usize = 64;
/// Jobs that write to the page cache at the same time, and runs of each.
const JOBS: usize = 4;
const RUNS_MAX: usize = 64;
/// Bytes of a job from which on no run is added: each job that ends is progress.
const JOB_BYTES: u64 = 1 << 20;

/// A write that waits: for a slot, or behind a request that overlaps it.
#[derive(Debug)]
pub(super) struct WaitingWrite {
    token: Token,
    pub since: Instant,
    /// Its place in the order of all that had to wait.
    pub sequence: u64,
    pub extent: Extent,
    data: BufSlice,
    durable: bool,
}

impl Volume {
    /// Writes sectors; a `durable` write ends when it is on stable storage. One
    /// that does not end at once is given a token, as may be one that is refused.
    /// `extent` is within the bounds, not empty, and as long as `data`.
    pub fn write(
        &mut self,
        now: Instant,
        mut token: impl FnMut() -> Option<Token>,
        initiator: Initiator,
        extent: Extent,
        data: &[u8],
        durable: bool,
    ) -> Result<Write, Refused> {
        self.last_request = now;
        if self.is_degraded() {
            return Err(Refused::Degraded);
        }
        if self.holds_writes(now, extent.count()) {
            return Err(Refused::NoRoom);
        }
        let extent = self.absolute(extent);
        let waits = durable || self.options.write_through;
        let mut given = None;
        let is_bad = self.health.concerns(extent);
        // It overtakes what waits for a slot, or behind a discard, where it does
        // not overlap that; but nothing of its own initiator.
        let queue = initiator.queue;
        let waits_behind = self.writes.head(queue).is_some() || self.waits_behind(u64::MAX, extent);
        if !waits_behind && !is_bad {
            if waits {
                given = Some(token().ok_or(Refused::NoRoom)?);
            }
            if let Ok(epoch) = self.cache.write_for(queue, extent, data, now) {
                self.overtake_fills(extent);
                return Ok(match given {
                    Some(token) => self.wait_for(now, token, extent, epoch, durable),
                    None => Write::Done,
                });
            }
        }
        let bytes = data.len() as u64;
        let room = !self.writes.is_full()
            && self.health.trials() < super::PARKED_MAX
            && self.write_bytes.admits(queue, bytes);
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
        if !waits_behind && is_bad {
            self.write_bytes.take(queue, bytes);
            self.push_trial(Trial {
                token,
                queue,
                since: now,
                extent,
                data,
                durable,
            });
            return Ok(Write::Parked);
        }
        let write = WaitingWrite {
            token,
            since: now,
            sequence: self.next_sequence(),
            extent,
            data,
            durable,
        };
        let pushed = self.writes.push(queue, fair::cost(bytes), write);
        pushed.map_err(|_| Refused::NoRoom)?;
        self.write_marks.add(extent);
        self.write_bytes.take(queue, bytes);
        Ok(Write::Parked)
    }

    pub(super) fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// `true` if something that overlaps an extent, and came before the request of
    /// this number, has not been done.
    fn waits_behind(&self, sequence: u64, extent: Extent) -> bool {
        if !self.discards.is_empty() && self.discards.precede(sequence, extent) {
            return true;
        }
        // One that waits itself has a mark of its own.
        let own = u16::from(sequence != u64::MAX);
        if self.writes.is_empty() || !self.write_marks.may_overlap(extent, own) {
            return false;
        }
        let older =
            |write: &WaitingWrite| write.sequence < sequence && write.extent.overlaps(extent);
        self.writes.iter().any(|(_, write)| older(write))
    }

    /// `true` if no write or discard waits.
    pub(super) fn has_no_waiting_writes(&self) -> bool {
        self.writes.is_empty() && self.discards.is_empty()
    }

    /// When the first of those came that wait and that the disk does not have.
    pub(super) fn oldest_waiting(&self) -> Option<Instant> {
        let heads = self
            .writes
            .queues()
            .filter_map(|queue| self.writes.head(queue));
        let heads = heads.map(|write| write.since);
        heads.chain(self.discards.oldest()).min()
    }

    /// What a write that the cache has taken still waits for.
    pub(super) fn wait_for(
        &mut self,
        now: Instant,
        token: Token,
        extent: Extent,
        epoch: Epoch,
        durable: bool,
    ) -> Write {
        let waiter = Waiter {
            token,
            epoch,
            since: now,
            flush: false,
            extent: Some(extent),
        };
        if durable || self.needs_bits() {
            self.until_synced.push_back(waiter);
        } else if self.options.write_through {
            self.until_written.push_back(waiter);
        } else {
            return Write::Done;
        }
        Write::Parked
    }

    /// `true` if a change that is acknowledged must have its data and the shadow's
    /// bits on stable storage: no arena has it, and without the bits a start
    /// would read what was in its place before.
    pub(super) fn needs_bits(&self) -> bool {
        let early = shadow::fault!("acknowledged-before-bits");
        self.options.write_through && self.view.is_some() && !early
    }

    /// Lets all that waits for its write-back wait for the bits as well: from now
    /// on there is a shadow.
    pub(super) fn wait_for_bits(&mut self) {
        if self.needs_bits() {
            self.until_synced.append(&mut self.until_written);
            // A group commit serves them in the order of their epochs.
            let waiters = self.until_synced.make_contiguous();
            waiters.sort_by_key(|waiter| waiter.epoch);
        }
    }

    /// Ends once all that ended before is on stable storage.
    pub fn flush(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
    ) -> Result<(), Refused> {
        let token = token().ok_or(Refused::NoRoom)?;
        let epoch = self.cache.close_epoch();
        if !self.keeps_nothing() && !shadow::fault!("flush-forgets-what-is-kept") {
            // What is kept for a bad range is on no stable storage; the rest is
            // to be.
            self.flushing = self.flushing.max(Some(epoch));
            self.complete(token, None, false);
            return Ok(());
        }
        self.until_synced.push_back(Waiter {
            token,
            epoch,
            since: now,
            flush: true,
            extent: None,
        });
        Ok(())
    }

    fn pop_write(&mut self, queue: Queue) -> Option<WaitingWrite> {
        let write = self.writes.pop(queue)?;
        self.write_marks.remove(write.extent);
        Some(write)
    }

    /// Takes what waits as far as it goes, each initiator's in its turn.
    pub(super) fn start_waiting(&mut self, now: Instant) {
        self.start_discards(now);
        let mut passed = Passed::default();
        while let Some(queue) = self.writes.turn(passed) {
            let Some(write) = self.writes.head(queue) else {
                return;
            };
            let (sequence, extent) = (write.sequence, write.extent);
            // When it came, what waits before it had no place in the shadow yet.
            if self.is_shadow_full_for(now, extent.count()) {
                return;
            }
            if self.waits_behind(sequence, extent) {
                passed.add(queue);
                continue;
            }
            if self.health.concerns(extent) {
                let Some(write) = self.pop_write(queue) else {
                    return;
                };
                self.push_trial(Trial {
                    token: write.token,
                    queue,
                    since: write.since,
                    extent,
                    data: write.data,
                    durable: write.durable,
                });
                continue;
            }
            let Some(write) = self.writes.head(queue) else {
                return;
            };
            let Ok(epoch) = self.cache.write_for(queue, extent, &write.data, now) else {
                passed.add(queue);
                continue;
            };
            let Some(write) = self.pop_write(queue) else {
                return;
            };
            self.overtake_fills(extent);
            self.write_bytes.release(queue, write.data.len() as u64);
            self.bufs.put(write.data.buf);
            if self.wait_for(now, write.token, extent, epoch, write.durable) == Write::Done {
                self.complete(write.token, None, true);
            }
        }
    }

    /// Ends what waits and reaches behind the end of the image: it is not done.
    pub(super) fn fail_waiting_behind(&mut self, end: Lba) {
        let writes = self.writes.remove_if(|write| write.extent.end() > end);
        self.fail_writes(writes);
        self.fail_discards_behind(end);
    }

    /// Ends writes that have waited: they are not done.
    pub(super) fn fail_writes(&mut self, writes: Vec<(Queue, WaitingWrite)>) {
        for (queue, write) in writes {
            self.write_marks.remove(write.extent);
            self.write_bytes.release(queue, write.data.len() as u64);
            self.bufs.put(write.data.buf);
            self.complete(write.token, None, false);
        }
    }

    /// Up to which epoch the cache is to be written back now.
    fn urgent(&self) -> Option<Epoch> {
        let last = |list: &std::collections::VecDeque<Waiter>| list.back().map(|w| w.epoch);
        let waited = last(&self.until_synced)
            .max(last(&self.until_written))
            .max(self.flushing)
            .max(self.freeze_wants())
            .max(self.round);
        let (dirty, max) = self.cache.dirty();
        let waits = !self.writes.is_empty() || self.health.has_waiting();
        let pressed = dirty > max / 4 * 3 || waits;
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
        self.trouble.try_again();
        if self.redo.is_pending() {
            return;
        }
        let (Some(until), Some(destination)) = (self.urgent(), self.destination()) else {
            return;
        };
        // A disk is given many writes at once; the page cache a few jobs, each
        // of many copies.
        let to_shadow = destination == Destination::Shadow;
        let direct = self.options.direct && !to_shadow;
        let (depth, most) = if direct {
            (self.options.write_depth, 1)
        } else {
            (JOBS, RUNS_MAX)
        };
        while self.writing < depth && !self.free.is_empty() && (direct || !self.is_far_ahead()) {
            let (mut segments, mut slots, mut bytes) = (Vec::new(), Vec::new(), 0);
            while segments.len() < most && bytes < JOB_BYTES {
                let Some(run) = self.next_run(until, to_shadow) else {
                    break;
                };
                let place = run.extent.byte_start();
                let view = self.view.as_ref().filter(|_| to_shadow);
                segments.push(Segment {
                    at: view.map_or(place, |view| view.geometry.data_offset(place)),
                    pieces: run.pieces,
                });
                bytes += run.extent.byte_len();
                slots.extend(run.slots);
            }
            if segments.is_empty() {
                break;
            }
            // There is room: a number was free.
            let (under, job) = (Under::Write { slots, to_shadow }, Job::Write(segments));
            let _ = if to_shadow {
                self.submit_on_shadow(under, job)
            } else {
                self.submit(under, job)
            };
            self.writing += 1;
            if self.reading > 0 {
                self.window.share(now);
            }
        }
        self.fill_wanted();
    }

    /// `true` if the sync that runs would be long by what is written meanwhile.
    fn is_far_ahead(&self) -> bool {
        let awaiting = self.cache.awaiting_sync() as u64 * self.cache.block_bytes();
        let ahead = awaiting + self.writing as u64 * JOB_BYTES;
        self.syncing.is_some() && ahead >= self.progress.ahead_max()
    }

    /// The next run of what is dirty. Of a chunk that changes its place by this,
    /// all is written: what is new to the shadow, or what the shadow has.
    fn next_run(&mut self, until: Epoch, to_shadow: bool) -> Option<Run> {
        let sectors = self.cache.block_bytes() / SECTOR;
        let Some(view) = self.view.as_ref().filter(|v| to_shadow || !v.is_plain()) else {
            // Bad ranges are there only while there is no shadow.
            let health = &self.health;
            if health.is_good() {
                return self.cache.next_run(until, RUN_MAX, &|_, dirty| dirty);
            }
            let shape = |block: u64, dirty: u64| dirty & !health.mask(block * sectors);
            return self.cache.next_run(until, RUN_MAX, &shape);
        };
        let shape = |block: u64, dirty: u64| {
            view.shape(block * sectors, dirty, |chunk| match chunk {
                Chunk::Absent => to_shadow,
                Chunk::Data => !to_shadow,
                Chunk::Zero => true,
            })
        };
        self.cache.next_run(until, RUN_MAX, &shape)
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
        let discard = self.discards.is_cleaning() || self.redo.is_full();
        if old || idle || self.draining || discard {
            self.flushing = Some(self.cache.close_epoch());
        }
    }
}
