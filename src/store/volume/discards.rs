//! Discards: in the image, or, while there is a shadow, as bits of that.
//!
//! A discard waits for writes before it, and for reads under way, in its own
//! range; a write behind it waits if it overlaps that range, and so does a read
//! from the moment when nothing in the range is dirty any more. All else passes.
//! What an overlap means is settled by whole blocks of the cache, since a block
//! cannot be forgotten while a part of it is dirty or being read.
//!
//! One job at a time takes all discards that are ready, as ranges that neither
//! overlap nor touch. If it fails, each of them is tried by itself.

use std::collections::VecDeque;
use std::time::Instant;

use shadow::{Chunk, Extent, Lba, SECTOR};

use super::super::disk::{Job, JobId};
use super::super::fair::{Initiator, Queue, Shares};
use super::freeze::{Destination, FORGET, Stage};
use super::reads::WaitingRead;
use super::syncs::Waiter;
use super::{DISCARD, Refused, Token, Volume};

/// Discards that may wait, and how many of the places are kept for initiators
/// that have few. Each has 64 ranges at most.
const DISCARDS_MAX: u64 = 64;
const HEADROOM: u64 = 16;

/// How far a discard has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// A write before it waits for a slot.
    Queued,
    /// Its range is being written back.
    Cleaning,
    /// Reads of its range wait behind it, and it waits for those before.
    Clean,
    /// The disk has it.
    Submitted,
}

/// A discard that has not ended.
#[derive(Debug)]
struct Discard {
    /// Whose; `None` for the zeros that a thaw merges.
    host: Option<(Token, Queue)>,
    since: Instant,
    sequence: u64,
    extents: Vec<Extent>,
    /// The whole blocks around them, in order, and around all of them together.
    blocks: Vec<Extent>,
    hull: Extent,
    durable: bool,
    progress: Progress,
    /// A block in its range that was dirty when it was looked at last.
    dirty: Option<Extent>,
    /// `true` if it shares its job with no other, since one with others failed.
    alone: bool,
}

impl Discard {
    fn overlaps(&self, extent: Extent) -> bool {
        let at = self.blocks.partition_point(|b| b.end() <= extent.start());
        self.blocks.get(at).is_some_and(|b| b.overlaps(extent))
    }
}

/// The discards that have not ended, in the order in which they came.
#[derive(Debug)]
pub(super) struct Discards {
    list: VecDeque<Discard>,
    places: Shares,
    /// What is left to be written as zeros over ends that are no whole chunk,
    /// once the chunks are done.
    edges: Option<Vec<(Queue, Extent)>>,
}

impl Discards {
    pub fn new() -> Discards {
        Discards {
            list: VecDeque::with_capacity(DISCARDS_MAX as usize + 1),
            places: Shares::new(DISCARDS_MAX, HEADROOM),
            edges: None,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// `true` if the disk has some of them.
    pub fn is_submitted(&self) -> bool {
        self.submitted().next().is_some()
    }

    fn submitted(&self) -> impl Iterator<Item = &Discard> {
        let submitted = |discard: &&Discard| discard.progress == Progress::Submitted;
        self.list.iter().filter(submitted)
    }

    /// `true` if one waits for dirty data in its range.
    pub fn is_cleaning(&self) -> bool {
        self.list.iter().any(|discard| discard.dirty.is_some())
    }

    /// `true` if a discard that came before the request of this number overlaps
    /// its extent.
    pub fn precede(&self, sequence: u64, extent: Extent) -> bool {
        let mut before = self.list.iter().take_while(|d| d.sequence < sequence);
        before.any(|discard| discard.overlaps(extent))
    }

    /// `true` if a read of this extent waits.
    pub fn exclude_read(&self, extent: Extent) -> bool {
        let excludes = |discard: &Discard| {
            let begun = matches!(discard.progress, Progress::Clean | Progress::Submitted);
            begun && discard.overlaps(extent)
        };
        self.list.iter().any(excludes)
    }

    /// An end of a discard was written, or what was kept is to be written, which
    /// may be in the range of another.
    pub fn dirtied(&mut self, edge: Extent) {
        let mut list = self.list.iter_mut();
        while let Some(other) = list.find(|d| d.progress == Progress::Clean && d.overlaps(edge)) {
            other.progress = Progress::Cleaning;
        }
    }

    /// When the first of those came that the disk does not have. The zeros of a
    /// thaw are not given up.
    pub fn oldest(&self) -> Option<Instant> {
        let waits =
            |discard: &&Discard| discard.progress != Progress::Submitted && discard.host.is_some();
        self.list.iter().find(waits).map(|discard| discard.since)
    }

    /// Removes those that the disk does not have and that are to go; returns
    /// whose they were.
    pub fn remove(&mut self, goes: impl Fn(Instant, &[Extent]) -> bool) -> Vec<Token> {
        let mut tokens = Vec::new();
        let places = &mut self.places;
        self.list.retain(|discard| {
            let goes =
                discard.progress != Progress::Submitted && goes(discard.since, &discard.extents);
            if let Some((token, queue)) = discard.host.filter(|_| goes) {
                places.release(queue, 1);
                tokens.push(token);
            }
            !goes || discard.host.is_none()
        });
        tokens
    }
}

/// Extents in their order, those that overlap or touch made one.
pub(super) fn joined(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_unstable_by_key(|extent| extent.start());
    let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match joined.last_mut() {
            Some(last) if extent.start() <= last.end() => *last = last.hull(extent),
            _ => joined.push(extent),
        }
    }
    joined
}

impl Volume {
    /// Discards sectors, which are zeros afterwards; like a write in every other
    /// respect.
    pub fn discard(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
        initiator: Initiator,
        extents: &[Extent],
        durable: bool,
    ) -> Result<(), Refused> {
        self.last_request = now;
        if self.is_degraded() {
            return Err(Refused::Degraded);
        }
        // Its ends may need a chunk each; what it covers whole needs none.
        let ends = 2 * self.cache.block_bytes() / SECTOR * extents.len() as u64;
        let queue = initiator.queue;
        if !self.discards.places.admits(queue, 1) || self.holds_writes(now, ends) {
            return Err(Refused::NoRoom);
        }
        let extents: Vec<Extent> = extents.iter().map(|e| self.absolute(*e)).collect();
        let token = token().ok_or(Refused::NoRoom)?;
        if self.queue_discard(now, Some((token, queue)), extents, durable) {
            self.discards.places.take(queue, 1);
        } else {
            self.complete(token, None, true);
        }
        Ok(())
    }

    /// Puts zeros that a thaw merges behind the discards.
    pub(super) fn queue_zeros(&mut self, now: Instant, extents: Vec<Extent>) -> bool {
        self.queue_discard(now, None, extents, false)
    }

    /// Returns `false` if there is nothing to be discarded.
    fn queue_discard(
        &mut self,
        now: Instant,
        host: Option<(Token, Queue)>,
        extents: Vec<Extent>,
        durable: bool,
    ) -> bool {
        let blocks = extents.iter().map(|e| self.cache.blocks_around(*e));
        let blocks = joined(blocks.collect());
        let Some(hull) = blocks.iter().copied().reduce(Extent::hull) else {
            return false;
        };
        let sequence = self.next_sequence();
        self.discards.list.push_back(Discard {
            host,
            since: now,
            sequence,
            extents,
            blocks,
            hull,
            durable,
            progress: Progress::Queued,
            dirty: None,
            alone: false,
        });
        true
    }

    /// Goes on with the discards as far as they go.
    pub(super) fn start_discards(&mut self, now: Instant) {
        if self.discards.edges.is_some() {
            return self.zero_edges(now);
        }
        let busy = self.discards.is_submitted() || self.health.trials() > 0;
        if self.discards.is_empty() || busy || !self.may_discard() {
            return;
        }
        let mut ready: Vec<usize> = Vec::new();
        for index in 0..self.discards.list.len() {
            self.prepare_discard(index);
            let discard = &self.discards.list[index];
            let begins = discard.progress == Progress::Clean
                && (shadow::fault!("discard-passes-reads")
                    || !discard.blocks.iter().any(|blocks| self.is_filling(*blocks)));
            if !begins {
                continue;
            }
            // The zeros of a thaw go by themselves, too.
            let alone = discard.alone || discard.host.is_none();
            if !alone || ready.is_empty() {
                ready.push(index);
            }
            if alone {
                break;
            }
        }
        if ready.is_empty() {
            return;
        }
        if self.discards.list[ready[0]].host.is_none() {
            ready.truncate(1);
        }
        let mut extents = Vec::new();
        for index in &ready {
            let discard = &mut self.discards.list[*index];
            discard.progress = Progress::Submitted;
            extents.extend_from_slice(&discard.extents);
        }
        if self.discards.list[ready[0]].host.is_none() {
            return self.start_zeros(now, &extents);
        }
        let extents = joined(extents);
        let view = self.view.as_ref().filter(|_| self.discards_in_shadow());
        match view.map(|view| view.split(&extents)) {
            Some((runs, edges)) => {
                // They are written as those of the one who asked first.
                let host = self.discards.submitted().find_map(|discard| discard.host);
                let edges = edges.into_iter();
                let edges = edges.filter_map(|edge| Some((host?.1, edge))).collect();
                self.discards.edges = Some(edges);
                self.submit_forget(runs);
            }
            None => self.submit_discard(DISCARD, &extents),
        }
    }

    pub(super) fn submit_discard(&mut self, id: JobId, extents: &[Extent]) {
        self.redo.begins();
        for extent in extents {
            let (at, len) = (extent.byte_start(), extent.byte_len());
            self.cache.arena().write_begins(at, len);
        }
        let ranges = extents.iter().map(|e| (e.byte_start(), e.byte_len()));
        self.disk.submit(id, Job::Discard(ranges.collect()));
    }

    /// Looks how far a discard may go. What would undo this waits behind the
    /// discard, but for the ends of another one.
    fn prepare_discard(&mut self, index: usize) {
        let discard = &self.discards.list[index];
        let mut progress = discard.progress;
        let mut dirty = None;
        // What was kept may have been tried, and be written since.
        if progress == Progress::Clean && !self.keeps_nothing() {
            progress = Progress::Cleaning;
        }
        if progress == Progress::Queued {
            let mut writes = self.writes.iter();
            let older = |write: &super::WaitingWrite| {
                write.sequence < discard.sequence && discard.overlaps(write.extent)
            };
            if !writes.any(|(_, write)| older(write)) {
                progress = Progress::Cleaning;
            }
        }
        if progress == Progress::Cleaning {
            // What a merge is bringing will be dirty.
            let merges = discard.blocks.iter().any(|blocks| self.is_merging(*blocks));
            let still = discard.dirty.filter(|block| self.cache.is_unsynced(*block));
            dirty = still.or_else(|| self.cache.unsynced_in(&discard.blocks));
            if shadow::fault!("discard-passes-writes") {
                dirty = None;
            }
            if dirty.is_none() && !merges {
                progress = Progress::Clean;
            }
        }
        let discard = &mut self.discards.list[index];
        discard.progress = progress;
        discard.dirty = dirty;
    }

    /// The chunks of the discards are zeros by the shadow's bits.
    fn forgotten(&mut self, ok: bool, now: Instant) {
        if !ok {
            return self.discard_ended(false, now);
        }
        let all = self.discards.submitted().flat_map(|d| d.extents.clone());
        let extents = joined(all.collect());
        if let Some(view) = &self.view {
            let runs = view.split(&extents).0.into_iter();
            let whole = runs.filter_map(|(first, count)| view.extent(first, count));
            self.cache.forget(&whole.collect::<Vec<Extent>>());
        }
        self.zero_edges(now);
    }

    /// Writes zeros over what a discard covers only in part.
    fn zero_edges(&mut self, now: Instant) {
        static ZEROS: [u8; 64 * SECTOR as usize] = [0; 64 * SECTOR as usize];
        if self.freezing.is_forgetting() {
            return;
        }
        while let Some(&(queue, edge)) = self.discards.edges.as_ref().and_then(|edges| edges.last())
        {
            let zeros = &ZEROS[..edge.byte_len() as usize];
            if self.cache.write_for(queue, edge, zeros, now).is_err() {
                return;
            }
            if let Some(edges) = &mut self.discards.edges {
                edges.pop();
            }
            self.discards.dirtied(edge);
        }
        self.discard_ended(true, now);
    }

    /// The job of all discards that the disk had has ended.
    pub(super) fn discard_ended(&mut self, ok: bool, now: Instant) {
        if ok {
            self.made_progress(now);
        }
        let in_shadow = self.discards.edges.take().is_some();
        let many = self.discards.submitted().count() > 1;
        // In the shadow it is forgotten already, but for what was written.
        if ok && !in_shadow {
            let ended = self.discards.submitted().filter(|d| d.host.is_some());
            let extents = joined(ended.flat_map(|d| d.extents.clone()).collect());
            self.forget_discarded(&extents, now);
        }
        let mut index = 0;
        while let Some(discard) = self.discards.list.get_mut(index) {
            if discard.progress != Progress::Submitted {
                index += 1;
            } else if !ok && many {
                discard.progress = Progress::Clean;
                discard.alone = true;
                index += 1;
            } else if let Some(discard) = self.discards.list.remove(index) {
                self.end_discard(discard, in_shadow, ok, now);
            }
        }
        for _ in 0..self.held_reads.len() {
            self.start_held_read(now);
        }
    }

    fn end_discard(&mut self, discard: Discard, in_shadow: bool, ok: bool, now: Instant) {
        let Some((token, queue)) = discard.host else {
            return self.zeros_ended(ok, now);
        };
        self.discards.places.release(queue, 1);
        if ok {
            let epoch = if in_shadow {
                self.cache.record_outside(now)
            } else {
                let again = self.redo.ended(&discard.extents);
                self.cache.record_discard(again, now)
            };
            if discard.durable || self.needs_bits() {
                self.until_synced.push_back(Waiter {
                    token,
                    epoch,
                    since: now,
                    flush: false,
                    // In the shadow its ends are written.
                    extent: in_shadow.then_some(discard.hull),
                });
                return;
            }
        }
        self.complete(token, None, ok);
    }

    fn forget_discarded(&mut self, extents: &[Extent], now: Instant) {
        for extent in extents {
            self.overtake_fills(*extent);
        }
        self.cache.forget(extents);
        // What is kept in the same blocks is dirty from here on.
        for extent in extents {
            self.landed(*extent, now);
        }
    }

    /// Takes the reads that a discard held up, as far as there is room.
    pub(super) fn start_held_reads(&mut self, now: Instant) {
        while self.start_held_read(now) {}
    }

    /// Takes the first of them; `false` if it waits on. Then it is the last.
    fn start_held_read(&mut self, now: Instant) -> bool {
        let Some(held) = self.held_reads.pop_front() else {
            return false;
        };
        let WaitingRead {
            token,
            queue,
            extent,
        } = held;
        if !self.discards.exclude_read(extent) {
            match self.read_absolute(now, || Some(token), queue, extent) {
                Ok(super::Read::Ready(body)) => {
                    self.complete(token, Some(body), true);
                    return true;
                }
                Ok(super::Read::Parked) => return true,
                // What is under way makes room when it ends.
                Err(_) => {}
            }
        }
        self.held_reads.push_back(held);
        false
    }

    /// `true` if the disk is doing a discard. One whose ends are yet to be written
    /// as zeros goes on in the cache.
    pub(super) fn is_discarding(&self) -> bool {
        let in_image = self.discards.is_submitted() && self.discards.edges.is_none();
        in_image || self.redo.is_in_flight() || self.freezing.is_forgetting()
    }

    /// Whether a discard may begin now.
    fn may_discard(&self) -> bool {
        let shadow = self.discards_in_shadow() && self.syncing.is_none();
        let image = matches!(
            self.freezing.stage,
            Stage::Running | Stage::Creating { made: false, .. } | Stage::Held { .. }
        );
        shadow || (image && !self.redo.is_pending() && !self.redo.is_full())
    }

    /// Whether discards are bits of the shadow now.
    fn discards_in_shadow(&self) -> bool {
        matches!(self.freezing.stage, Stage::Frozen | Stage::Thawing)
    }

    /// Makes chunks zeros in the shadow's bitmap.
    fn submit_forget(&mut self, runs: Vec<(u64, u64)>) {
        let (Some(view), Some(side)) = (&mut self.view, &mut self.freezing.side) else {
            return;
        };
        let zeros = runs.into_iter();
        let zeros = zeros.map(|(first, count)| (first, count, Chunk::Zero));
        let commit = view.map.plan_runs(zeros);
        let pages = commit.pages.clone();
        self.freezing.forgetting = Some(commit);
        let data_first = false;
        side.disk.submit(FORGET, Job::Commit { data_first, pages });
    }

    pub(super) fn forget_ended(&mut self, ok: bool, now: Instant) {
        let commit = self.freezing.forgetting.take();
        self.settle(commit, ok);
        let trusted = shadow::fault!("failed-bits-sync-trusted");
        if !ok && !trusted && self.destination() == Some(Destination::Shadow) {
            // The sync that failed was of the data there as well.
            self.cache.write_again(now);
        }
        self.forgotten(ok, now);
    }

    /// Ends discards that wait and reach behind the end of the image: they are
    /// not done.
    pub(super) fn fail_discards_behind(&mut self, end: Lba) {
        let is_behind = |_, extents: &[Extent]| extents.iter().any(|e| e.end() > end);
        for token in self.discards.remove(is_behind) {
            self.complete(token, None, false);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn extents(list: &[(u64, u64)]) -> Vec<Extent> {
        let extent = |&(start, count)| Extent::new(Lba(start), count).unwrap();
        list.iter().map(extent).collect()
    }

    #[test]
    fn what_overlaps_or_touches_is_joined() {
        for (list, expected) in [
            (&[(0, 8), (8, 8)][..], &[(0, 16)][..]),
            (&[(20, 4), (0, 8)], &[(0, 8), (20, 4)]),
            (&[(0, 8), (2, 2), (30, 1), (7, 3)], &[(0, 10), (30, 1)]),
            (&[], &[]),
        ] {
            assert_eq!(joined(extents(list)), extents(expected));
        }
    }
}
