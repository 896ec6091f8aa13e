//! Discards: in their turn, when nothing is dirty and nobody reads what goes; in
//! the image, or, while there is a shadow, as bits of that.

use std::time::Instant;

use shadow::{Chunk, Extent, SECTOR};

use super::super::disk::Job;
use super::freeze::{FORGET, Stage};
use super::reads::WaitingRead;
use super::syncs::Waiter;
use super::writes::ParkedWrite;
use super::{DISCARD, Refused, Token, Volume};

/// How far the discard at the head of the parked list has come.
#[derive(Debug, Default)]
pub(super) struct Discarding {
    /// What it is about, once nothing is dirty any more.
    hull: Option<Extent>,
    /// Whether the disk has it.
    submitted: bool,
    /// What is left to be written as zeros, once the rest is done.
    edges: Option<Vec<Extent>>,
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

impl Volume {
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
        if self.is_degraded() {
            return Err(Refused::Degraded);
        }
        // Its ends may need a chunk each; what it covers whole needs none.
        let ends = 2 * self.cache.block_bytes() / SECTOR * extents.len() as u64;
        if self.parked.len() >= super::PARKED_MAX || self.holds_writes(now, ends) {
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

    /// Whether the first that waits is a discard.
    pub(super) fn is_discarding(&self) -> bool {
        let front = self.parked.front();
        front.is_some_and(|parked| !matches!(parked, ParkedWrite::Write { .. }))
    }

    /// Goes on with the discard at the head of the parked list.
    pub(super) fn start_discard(&mut self, now: Instant) {
        if self.discarding.edges.is_some() {
            return self.zero_edges(now);
        }
        let dirty = self.cache.has_dirty() && !shadow::fault!("discard-passes-writes");
        let tried = self.health.trials() > 0;
        if self.discarding.submitted || dirty || tried || !self.may_discard() {
            return;
        }
        let extents = match self.parked.front() {
            Some(ParkedWrite::Discard { extents, .. }) => extents.clone(),
            Some(ParkedWrite::Zeros { .. }) => return self.start_zeros(now),
            _ => return,
        };
        if !self.begin_discarding(&extents) {
            return;
        }
        let view = self.view.as_ref().filter(|_| self.discards_in_shadow());
        match view.map(|view| view.split(&extents)) {
            Some((chunks, edges)) => {
                self.discarding.edges = Some(edges);
                self.submit_forget(chunks);
            }
            None => {
                let ranges = extents.iter().map(|e| (e.byte_start(), e.byte_len()));
                let ranges = ranges.collect();
                self.submit_discard(ranges);
            }
        }
    }

    pub(super) fn submit_discard(&mut self, ranges: Vec<(u64, u64)>) {
        for (at, len) in &ranges {
            self.cache.arena().write_begins(*at, *len);
        }
        self.disk.submit(DISCARD, Job::Discard(ranges));
    }

    /// Excludes reads of what is about to be discarded; `false` as long as some
    /// are under way.
    pub(super) fn begin_discarding(&mut self, extents: &[Extent]) -> bool {
        // Reads from now on wait behind it, and it waits for those before: of
        // the whole blocks, since it may take a block out that a fill holds.
        let hull = extents.iter().copied().reduce(Extent::hull);
        let hull = hull.map(|hull| self.cache.blocks_around(hull));
        self.discarding.hull = hull;
        self.discarding.submitted = shadow::fault!("discard-passes-reads")
            || !hull.is_some_and(|hull| self.is_filling(hull));
        self.discarding.submitted
    }

    /// The chunks of a discard are zeros by the shadow's bits.
    pub(super) fn forgotten(&mut self, ok: bool, now: Instant) {
        if !ok {
            return self.discard_ended(false, now);
        }
        let extents = match self.parked.front() {
            Some(ParkedWrite::Discard { extents, .. }) => extents.clone(),
            _ => Vec::new(),
        };
        if let Some(view) = &self.view {
            for chunk in view.split(&extents).0 {
                if let Some(extent) = view.extent(chunk, 1) {
                    self.cache.forget(extent);
                }
            }
        }
        self.zero_edges(now);
    }

    /// Writes zeros over what a discard covers only in part.
    fn zero_edges(&mut self, now: Instant) {
        static ZEROS: [u8; 64 * SECTOR as usize] = [0; 64 * SECTOR as usize];
        if self.discarding.submitted && self.freezing.is_forgetting() {
            return;
        }
        while let Some(edge) = self.discarding.edges.as_mut().and_then(Vec::pop) {
            let zeros = &ZEROS[..edge.byte_len() as usize];
            if self.cache.write(edge, zeros, now).is_err() {
                if let Some(edges) = &mut self.discarding.edges {
                    edges.push(edge);
                }
                return;
            }
        }
        self.discard_ended(true, now);
    }

    pub(super) fn discard_ended(&mut self, ok: bool, now: Instant) {
        if ok {
            self.made_progress(now);
        }
        let in_shadow = std::mem::take(&mut self.discarding).edges.is_some();
        self.end_discard(ok, in_shadow, now);
        self.start_held_reads(now);
    }

    /// Takes the reads that a discard held up, as far as there is room.
    pub(super) fn start_held_reads(&mut self, now: Instant) {
        while let Some(held) = self.held_reads.pop_front() {
            let WaitingRead {
                token,
                queue,
                extent,
            } = held;
            if self.discarding.excludes(extent) {
                self.held_reads.push_front(held);
                return;
            }
            match self.read_absolute(now, || Some(token), queue, extent) {
                Ok(super::Read::Ready(body)) => self.complete(token, Some(body), true),
                Ok(super::Read::Parked) => {}
                Err(_) => {
                    // What is under way makes room when it ends.
                    self.held_reads.push_front(held);
                    return;
                }
            }
        }
    }

    fn end_discard(&mut self, ok: bool, in_shadow: bool, now: Instant) {
        let (token, extents, durable) = match self.parked.pop_front() {
            Some(ParkedWrite::Discard {
                token,
                extents,
                durable,
                ..
            }) => (token, extents, durable),
            _ => return self.zeros_ended(ok, now),
        };
        if ok {
            // In the shadow it is forgotten already, but for what was written.
            for extent in extents.into_iter().filter(|_| !in_shadow) {
                self.overtake_fills(extent);
                self.cache.forget(extent);
                self.landed(extent, now);
            }
            let epoch = self.cache.record_outside(now);
            if durable {
                self.until_synced.push_back(Waiter {
                    token,
                    epoch,
                    since: now,
                    flush: false,
                    extent: None,
                });
                return;
            }
        }
        self.complete(token, None, ok);
    }

    /// Whether a discard may begin now.
    pub(super) fn may_discard(&self) -> bool {
        let shadow = self.discards_in_shadow() && self.syncing.is_none();
        let image = matches!(
            self.freezing.stage,
            Stage::Running | Stage::Creating { made: false, .. } | Stage::Held { .. }
        );
        shadow || image
    }

    /// Whether discards are bits of the shadow now.
    pub(super) fn discards_in_shadow(&self) -> bool {
        matches!(self.freezing.stage, Stage::Frozen | Stage::Thawing)
    }

    /// Makes chunks zeros in the shadow's bitmap.
    pub(super) fn submit_forget(&mut self, chunks: Vec<u64>) {
        let (Some(view), Some(side)) = (&mut self.view, &mut self.freezing.side) else {
            return;
        };
        let commit = view
            .map
            .plan(chunks.into_iter().map(|chunk| (chunk, Chunk::Zero)));
        let pages = commit.pages.clone();
        self.freezing.forgetting = Some(commit);
        let data_first = false;
        side.disk.submit(FORGET, Job::Commit { data_first, pages });
    }

    pub(super) fn forget_ended(&mut self, ok: bool, now: Instant) {
        let commit = self.freezing.forgetting.take();
        self.settle(commit, ok);
        self.forgotten(ok, now);
    }
}
