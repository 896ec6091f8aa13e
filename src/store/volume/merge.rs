//! The merge: what the shadow has comes into the cache as if a host had written
//! it, but below all that hosts have written, and goes to the image from there.
//!
//! A chunk is read from the shadow, and what the cache has of it is laid over.
//! So it is whole in the cache, and stays there until the image is synced and
//! the bit is cleared. If the bit is cleared already when the chunk has been
//! read, a host's write has brought it to the image in between, and what was
//! read is older.

use std::time::{Duration, Instant};

use shadow::{Chunk, Extent};

use super::reads::{AHEAD_STEP, Fill};
use super::{DISCARD, Volume};
use crate::freeze::OnStop;

/// Without a request for so long the merge takes what it can get.
const QUIET: Duration = Duration::from_millis(20);
/// The share of the dirty slots that it takes then, in percent.
const QUIET_SHARE: u64 = 80;
/// Reads of the shadow under way at a time, then and otherwise, and how long
/// the latter are.
const QUIET_FILLS: usize = 4;
const BUSY_FILLS: usize = 1;
const BUSY_STEP: usize = 64 << 10;
/// How long after a read of the shadow failed the merge goes on.
const RETRY: Duration = Duration::from_secs(1);
/// Chunks that are made zeros at a time.
const ZEROS_MAX: u64 = 1 << 18;
/// Runs of them.
const ZERO_RUNS_MAX: usize = 64;

/// How far the merge has come.
#[derive(Debug, Default)]
pub(super) struct Merge {
    /// The chunk to go on with.
    cursor: u64,
    /// Chunks that were read, or are being read, and are in the shadow still.
    outstanding: u64,
    /// Reads under way.
    fills: usize,
    /// Whether the turn of zeros is awaited.
    zeros: bool,
    /// Runs of zeros being made so in the image.
    zeroing: Vec<(u64, u64)>,
    /// Those that are, until the next sync.
    zeroed: Vec<(u64, u64)>,
    /// When the shadow is read again, after that has failed.
    retry_at: Option<Instant>,
}

impl Merge {
    pub fn is_idle(&self) -> bool {
        self.fills == 0 && !self.zeros
    }

    pub fn fills(&self) -> usize {
        self.fills
    }

    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    pub fn take_zeroed(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.zeroed)
    }

    /// So many chunks are in the shadow no more.
    pub fn committed(&mut self, chunks: u64) {
        self.outstanding = self.outstanding.saturating_sub(chunks);
    }
}

impl Volume {
    /// Starts as much of the merge as it may have now.
    pub(super) fn merge(&mut self, now: Instant) {
        let keeps = self.draining && self.freezing.on_stop == OnStop::Keep;
        self.merge.retry_at.take_if(|at| *at <= now);
        if keeps || self.merge.retry_at.is_some() || self.trouble.is_degraded() {
            return;
        }
        let asked = now.saturating_duration_since(self.last_request) < QUIET;
        let busy = asked && !self.draining;
        let (share, fills, step) = if busy {
            (u64::from(self.options.merge_share), BUSY_FILLS, BUSY_STEP)
        } else {
            (QUIET_SHARE, QUIET_FILLS, AHEAD_STEP)
        };
        if self.merge.fills == 0 && !self.cache.has_unsynced() && self.syncing.is_none() {
            // What was counted and is not there came to the image by other ways.
            self.merge.outstanding = 0;
        }
        let quota = (u64::from(self.freezing.dirty_max) * share / 100).max(1);
        let waits = self.merge.zeros;
        while !waits && self.merge.fills < fills && self.merge.outstanding < quota {
            let room = quota - self.merge.outstanding;
            if !self.merge_next(now, room, step) {
                break;
            }
        }
        // Written back and synced by halves, so that the next ones come in
        // meanwhile; the last of them when there is no more.
        let half = self.merge.outstanding >= quota.div_ceil(2);
        let last = self.merge.fills == 0 && self.merge.outstanding > 0;
        let zeroed = !self.merge.zeroed.is_empty();
        if (half || last || zeroed) && self.flushing.is_none() {
            self.flushing = Some(self.cache.close_epoch());
        }
    }

    /// Begins with the next run of the shadow; `false` if there is none that
    /// could be begun with.
    fn merge_next(&mut self, now: Instant, room: u64, step: usize) -> bool {
        let Some(view) = self.view.as_ref().filter(|_| !self.free.is_empty()) else {
            return false;
        };
        let Some(first) = view.map.next_present(self.merge.cursor) else {
            // Once more from the start for what was passed over, when all that
            // was not is done.
            let again = self.merge.outstanding == 0 && self.merge.fills == 0 && !view.is_plain();
            if again && self.merge.cursor != 0 {
                self.merge.cursor = 0;
                return true;
            }
            return false;
        };
        let most = (step as u64 / view.geometry.chunk()).min(room).max(1);
        let (chunk, count) = view.map.run(first, first + most);
        self.merge.cursor = first + count;
        if chunk == Chunk::Zero {
            // Those made zeros already are in the shadow until the next sync.
            if !self.merge.zeros && self.merge.zeroed.is_empty() {
                let extents = self.zero_runs();
                self.merge.zeros = self.queue_zeros(now, extents);
            }
            return false;
        }
        let (Some(span), Some(parts)) = (
            view.extent(first, count),
            view.extent(first, count).and_then(|span| view.parts(span)),
        ) else {
            return true;
        };
        // A discard of it waits until nothing of it is dirty.
        if self.discards.precede(u64::MAX, span) {
            return false;
        }
        let Ok(buf) = self.buffer_for(span) else {
            self.merge.cursor = first;
            return false;
        };
        let fill = Fill::merging(span, self.cache.hold(span));
        // There is room: a number is free.
        let _ = self.gather(fill, parts, buf);
        self.merge.fills += 1;
        self.merge.outstanding += count;
        true
    }

    /// A run of the shadow was read, or could not be.
    pub(super) fn merge_fill_ended(&mut self, span: Extent, data: Option<&mut [u8]>, now: Instant) {
        self.merge.fills -= 1;
        if data.is_some() {
            // A part of the way to the image.
            self.made_progress(now);
        }
        let Some(view) = &self.view else { return };
        let first = view.geometry.chunk_of(span.byte_start());
        let last = view
            .geometry
            .chunk_of(span.byte_start() + span.byte_len() - 1);
        let Some(data) = data else {
            // Tried again, after the others; and the disk has said so.
            self.merge.committed(last - first + 1);
            self.merge.retry_at = Some(now + RETRY);
            return;
        };
        for chunk in first..=last {
            let extent = view.extent(chunk, 1);
            let extent = extent.filter(|_| view.map.get(chunk) == Chunk::Data);
            let taken = match extent {
                Some(extent) if !self.cache.is_dirty(extent) => {
                    let at = (extent.byte_start() - span.byte_start()) as usize;
                    let bytes = &mut data[at..at + extent.byte_len() as usize];
                    self.cache.overlay(extent, bytes);
                    let most = self.freezing.dirty_max;
                    self.cache.write_up_to(extent, bytes, now, most).is_ok()
                }
                // On its way already.
                _ => false,
            };
            if !taken {
                self.merge.committed(1);
            }
        }
    }

    /// The next runs of chunks that are zeros by the shadow's bits.
    fn zero_runs(&self) -> Vec<Extent> {
        let Some(view) = &self.view else {
            return Vec::new();
        };
        let (mut cursor, mut total, mut extents) = (0, 0, Vec::new());
        while let Some(first) = view.map.next_present(cursor) {
            let (chunk, count) = view.map.run(first, first + ZEROS_MAX - total);
            cursor = first + count;
            if chunk == Chunk::Zero {
                total += count;
                extents.extend(view.extent(first, count));
            }
            if total >= ZEROS_MAX || extents.len() >= ZERO_RUNS_MAX {
                break;
            }
        }
        extents
    }

    /// The turn of the zeros has come: nothing of these extents is dirty, and what
    /// comes for them waits. What was written since they were queued is no zeros
    /// any more.
    pub(super) fn start_zeros(&mut self, now: Instant, extents: &[Extent]) {
        let Some(view) = &self.view else { return };
        let mut zeros = Vec::new();
        for extent in extents {
            let end = extent.byte_start() + extent.byte_len();
            let end = view.geometry.chunk_of(end - 1) + 1;
            let mut first = view.geometry.chunk_of(extent.byte_start());
            while first < end {
                let (chunk, count) = view.map.run(first, end);
                if chunk == Chunk::Zero {
                    self.merge.zeroing.push((first, count));
                    zeros.extend(view.extent(first, count));
                }
                first += count;
            }
        }
        if zeros.is_empty() {
            self.discard_ended(false, now);
        } else {
            self.submit_discard(DISCARD, &zeros);
        }
    }

    pub(super) fn zeros_ended(&mut self, ok: bool, now: Instant) {
        self.merge.zeros = false;
        let zeroing = std::mem::take(&mut self.merge.zeroing);
        // What a failed sync may have taken back is made zeros again.
        if ok && !self.redo.has_failed_meanwhile() {
            self.merge.zeroed.extend(zeroing);
            // For the next sync, behind which the bits are cleared.
            self.cache.record_outside(now);
        } else {
            self.merge.retry_at = Some(now + RETRY);
        }
    }
}
