//! Discards that a failed sync was to cover.
//!
//! A dirty sector is written again from its slot. Of a discard there is no slot,
//! so its record leaves the list of what the next sync covers, and comes back
//! when the [volume](crate::store::volume) has done the discard again. Until
//! then its epoch is not synced.

use std::time::Instant;

use shadow::{Extent, Lba};

use super::{Cache, Epoch, State, runs};

impl Cache {
    /// Records a discard in the image, for the next sync to cover; with `again`
    /// for one that begins after [`done_again`](Cache::done_again).
    pub fn record_discard(&mut self, again: bool, now: Instant) -> Epoch {
        let epoch = self.record_outside(now);
        if let Some(mut record) = self.written.pop() {
            record.is_discard = true;
            let list = if again {
                &mut self.undone
            } else {
                &mut self.written
            };
            list.push(record);
        }
        epoch
    }

    /// `true` if a failed sync was to cover discards that are not done again.
    pub fn has_undone(&self) -> bool {
        !self.undone.is_empty()
    }

    /// All discards that a failed sync was to cover were done again: the next sync
    /// covers them.
    pub fn done_again(&mut self) {
        self.written.append(&mut self.undone);
    }

    /// The dirty sectors that are, or will be, written back now, in the order of
    /// their places.
    pub fn dirty_extents(&self) -> Vec<Extent> {
        let mut extents = Vec::new();
        for (slot, meta) in (0u32..).zip(&self.meta) {
            let is_clean = matches!(meta.state, State::Free | State::Clean);
            if is_clean || self.at_hand(meta.block) != Some(slot) {
                continue;
            }
            let first = meta.block * self.sectors;
            let extent = |(at, count)| Extent::new(Lba(first + u64::from(at)), u64::from(count));
            extents.extend(runs(meta.dirty).filter_map(extent));
        }
        extents.sort_unstable_by_key(|extent| extent.start());
        extents
    }

    /// Forgets what is clean of these extents, which the disk has made zeros.
    /// They are in order and do not overlap.
    pub fn forget_clean(&mut self, extents: &[Extent]) {
        for slot in 0..self.meta.len() {
            let meta = &self.meta[slot];
            if meta.state == State::Free {
                continue;
            }
            let mask = self.mask_in(meta.block, extents);
            self.hot[slot].valid &= !mask | meta.dirty;
        }
    }
}
