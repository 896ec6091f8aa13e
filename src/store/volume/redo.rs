//! Discards that a failed sync may have taken back: they are done again, until
//! a sync that begins after them has succeeded.
//!
//! A write stays in the cache until it is synced, and is written again from
//! there. Of a discard nothing is in the cache, so its extents are kept here.
//!
//! After a failed sync the discards are done again before anything is written
//! back. So all that was written over them since the last good sync is dirty in
//! the cache; these sectors are left out. A host that waits for such a discard
//! is answered when they are written back and synced, too: only then the disk
//! cannot have what was there before the discard.

use std::time::Instant;

use shadow::{Extent, Lba, SECTOR};

use super::super::cache::Epoch;
use super::super::disk::JobId;
use super::Volume;
use super::discards::joined;
use super::freeze::{Destination, Stage};

pub(super) const REDO: JobId = JobId(u64::MAX - 7);
/// Extents of discards that are not on stable storage; with more of them, further
/// discards wait for a sync.
const EXTENTS_MAX: usize = 4096;

/// The discards in the image that are not on stable storage.
#[derive(Debug, Default)]
pub(super) struct Redo {
    /// Done since the last sync began.
    done: Vec<Extent>,
    /// Done before the sync that is in flight.
    covered: Vec<Extent>,
    /// To be done again.
    todo: Vec<Extent>,
    /// Being done again.
    in_flight: Vec<Extent>,
    /// A sync has failed while a discard was in flight: the disk may have done it
    /// before, and lost it.
    failed_meanwhile: bool,
    /// When all of this epoch is written back, the discards that were done again
    /// wait for nothing but a sync.
    written_until: Option<Epoch>,
}

impl Redo {
    /// A discard begins.
    pub fn begins(&mut self) {
        self.failed_meanwhile = false;
    }

    /// A discard was done in the image; returns `true` if it must be done again.
    pub fn ended(&mut self, extents: &[Extent]) -> bool {
        let list = if self.failed_meanwhile {
            &mut self.todo
        } else {
            &mut self.done
        };
        list.extend_from_slice(extents);
        if list.len() >= EXTENTS_MAX {
            *list = joined(std::mem::take(list));
        }
        self.failed_meanwhile
    }

    /// `true` if a sync has failed since the discard that ends now has begun.
    pub fn has_failed_meanwhile(&self) -> bool {
        self.failed_meanwhile
    }

    /// A sync begins: it covers what was done until now.
    pub fn sync_begins(&mut self) {
        self.covered.append(&mut self.done);
    }

    /// A sync has ended.
    pub fn sync_ended(&mut self, ok: bool) {
        if !ok && !shadow::fault!("discard-not-done-again") {
            self.todo.append(&mut self.covered);
            self.todo.append(&mut self.done);
            self.failed_meanwhile = true;
        }
        self.covered.clear();
    }

    /// `true` if no further discard may be done before a sync.
    pub fn is_full(&self) -> bool {
        self.done.len() + self.covered.len() >= EXTENTS_MAX
    }

    /// `true` while discards are to be done again: nothing else changes the image.
    pub fn is_pending(&self) -> bool {
        !self.todo.is_empty() || self.is_in_flight()
    }

    /// `true` while the disk does discards again.
    pub fn is_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }
}

impl Volume {
    /// Does discards again that a failed sync may have taken back.
    pub(super) fn start_redo(&mut self, now: Instant) {
        if !self.redo.is_pending() && !self.settle_redone() {
            return;
        }
        let to_image = self.destination() == Some(Destination::Image);
        if self.is_writing() || !to_image || self.trouble.rests(now) {
            return;
        }
        let end = self.bounds.start / SECTOR + self.bounds.sectors;
        let within = |extent: Extent| {
            let count = extent.end().0.min(end).checked_sub(extent.start().0)?;
            Extent::new(extent.start(), count).filter(|extent| !extent.is_empty())
        };
        let extents = joined(std::mem::take(&mut self.redo.todo));
        let extents: Vec<Extent> = extents.into_iter().filter_map(within).collect();
        let extents = without(&extents, &self.cache.dirty_extents());
        // What is of the new generation does not go to the image now.
        let until = match self.freezing.stage {
            Stage::Freezing { cut } => cut,
            _ => self.cache.close_epoch(),
        };
        self.redo.written_until = Some(until);
        self.flushing = self.flushing.max(Some(until));
        if extents.is_empty() {
            return;
        }
        self.submit_discard(REDO, &extents);
        self.redo.in_flight = extents;
    }

    /// `true` if a failed sync may have taken discards back that are not done again.
    #[cfg(test)]
    pub(super) fn may_miss_discards(&self) -> bool {
        let Redo { done, covered, .. } = &self.redo;
        let syncs = self.syncing.is_some() && !(done.is_empty() && covered.is_empty());
        syncs || self.redo.is_pending() || self.cache.has_undone()
    }

    /// Lets the next sync cover the discards that were done again, if all that was
    /// written over them is written back. Returns `true` if that is not known of
    /// any epoch yet.
    fn settle_redone(&mut self) -> bool {
        match self.redo.written_until {
            Some(until) => {
                if self.cache.is_written(until) {
                    self.redo.written_until = None;
                    self.cache.done_again();
                }
                false
            }
            None => self.cache.has_undone(),
        }
    }

    /// Discards were done again, or could not be.
    pub(super) fn redo_ended(&mut self, ok: bool, now: Instant) {
        let mut extents = std::mem::take(&mut self.redo.in_flight);
        if !ok {
            self.redo.todo.append(&mut extents);
            return self.failed(now);
        }
        for extent in &extents {
            self.overtake_fills(*extent);
        }
        self.cache.forget_clean(&extents);
        self.redo.ended(&extents);
        self.made_progress(now);
    }
}

/// What is in some extents and not in others; each list is in order, without
/// overlaps.
fn without(extents: &[Extent], others: &[Extent]) -> Vec<Extent> {
    let mut rest = Vec::with_capacity(extents.len());
    let mut push = |start: u64, end: u64| {
        if start < end {
            rest.extend(Extent::new(Lba(start), end - start));
        }
    };
    for extent in extents {
        let first = others.partition_point(|other| other.end() <= extent.start());
        let mut start = extent.start().0;
        for other in others[first..].iter().take_while(|o| o.overlaps(*extent)) {
            push(start, other.start().0);
            start = other.end().0;
        }
        push(start, extent.end().0);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::super::discards::tests::extents;
    use super::*;

    #[test]
    fn what_is_dirty_is_left_out() {
        for (list, dirty, expected) in [
            (&[(8, 8)][..], &[][..], &[(8, 8)][..]),
            (&[(8, 8)], &[(0, 8), (16, 1)], &[(8, 8)]),
            (&[(8, 8)], &[(0, 20)], &[]),
            (
                &[(8, 8), (20, 8)],
                &[(4, 6), (12, 1), (15, 6)],
                &[(10, 2), (13, 2), (21, 7)],
            ),
            (&[(8, 8)], &[(8, 1), (15, 1)], &[(9, 6)]),
        ] {
            assert_eq!(without(&extents(list), &extents(dirty)), extents(expected));
        }
    }
}
