//! What the image does not take: sectors that the cache keeps for it.
//!
//! A version whose dirty sectors are all of bad ranges is kept: it is in no
//! queue and on no account, so nothing waits for it. A newer version takes its
//! place as that of any other does.

use std::time::Instant;

use shadow::{Extent, Lba};

use super::{Cache, State, runs};

impl Cache {
    /// How many slots are kept.
    pub fn kept(&self) -> u32 {
        self.kept
    }

    /// The block of a slot that is being written back.
    pub fn block_of(&self, slot: u32) -> Option<Extent> {
        let block = self.meta[slot as usize].block;
        Extent::new(Lba(block * self.sectors), self.sectors)
    }

    /// The first run of dirty sectors of an extent that lies in one block.
    pub fn dirty_run(&self, extent: Extent) -> Option<Extent> {
        let piece = self.pieces(extent).next()?;
        let slot = self.find(piece.block)?;
        let mask = self.meta[slot as usize].dirty & piece.mask();
        let (first, count) = runs(mask).next()?;
        Extent::new(
            Lba(piece.block * self.sectors + u64::from(first)),
            u64::from(count),
        )
    }

    /// Nothing of a version can be written: it is kept.
    pub(super) fn set_kept(&mut self, slot: u32) {
        let meta = &mut self.meta[slot as usize];
        meta.state = State::Kept;
        meta.unsent = 0;
        let owner = meta.owner;
        self.owned.release(owner, 1);
        self.kept += 1;
    }

    /// The image may take these sectors now: what is kept of their blocks is to
    /// be written back.
    pub fn write_kept(&mut self, extent: Extent, now: Instant) {
        for piece in self.pieces(extent) {
            let kept = |slot: &u32| self.meta[*slot as usize].state == State::Kept;
            if let Some(slot) = self.find(piece.block).filter(kept) {
                let epoch = self.epochs.current();
                self.epochs.add(epoch, true, now);
                let meta = &mut self.meta[slot as usize];
                meta.epoch = epoch;
                meta.state = State::Dirty;
                meta.waits = false;
                meta.failed = false;
                let owner = meta.owner;
                self.owned.take(owner, 1);
                self.kept -= 1;
                self.queue_back(slot);
            }
        }
    }

    /// Forgets sectors of a kept slot; without any left it is clean.
    pub(super) fn forget_kept(&mut self, slot: u32, mask: u64) {
        let meta = &mut self.meta[slot as usize];
        meta.dirty &= !mask;
        if meta.dirty == 0 {
            meta.state = State::Clean;
            self.dirty -= 1;
            self.kept -= 1;
            self.arena.retire(slot);
        } else {
            let dirty = meta.dirty;
            self.arena.narrow(slot, dirty);
        }
    }
}
