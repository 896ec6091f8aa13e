//! New versions of blocks: each is written into a slot that does not count.

use std::time::Instant;

use super::super::arena::runs;
use super::index::NONE;
use super::{Cache, Hot, Piece, State};

impl Cache {
    /// Says which sectors of which block a slot holds.
    pub(super) fn fill_slot(&mut self, slot: u32, block: u64, valid: u64) {
        let meta = &mut self.meta[slot as usize];
        meta.block = block;
        meta.waits = false;
        self.hot[slot as usize] = Hot { block, valid };
    }

    /// The slot of a block that may be written where it is: it is clean, so
    /// does not count in the arena, and nobody reads it now.
    pub(super) fn in_place(&self, block: u64) -> Option<u32> {
        let slot = self.find(block)?;
        let clean = self.meta[slot as usize].state == State::Clean;
        (clean && !self.arena.is_lent(slot)).then_some(slot)
    }

    pub(super) fn write_piece(&mut self, piece: Piece, fresh: u32, data: &[u8], now: Instant) {
        let (at, _) = piece.bytes();
        let mask = piece.mask();
        let old = self.find(piece.block);
        if fresh == NONE {
            let Some(slot) = old else { return };
            self.arena.write(slot, at, data);
            self.hot[slot as usize].valid |= mask;
            self.make_dirty(slot, mask, now);
            self.queue_back(slot);
            return;
        }
        let before = old.map(|slot| self.meta[slot as usize]);
        let kept = old.map_or(0, |slot| self.hot[slot as usize].valid & !mask);
        if let Some(old) = old {
            for (first, count) in runs(kept) {
                let (at, len) = Piece {
                    first,
                    count,
                    ..piece
                }
                .bytes();
                self.arena.copy(old, fresh, at, len);
            }
        }
        self.arena.write(fresh, at, data);
        self.fill_slot(fresh, piece.block, kept | mask);
        match old.filter(|slot| self.is_older(*slot)) {
            Some(old) => self.lift(old, fresh, mask, now),
            None => self.supersede(old, fresh, before.map_or(0, |m| m.dirty) | mask, now),
        }
    }

    /// Puts a version that was written into `fresh` in the place of `old`.
    pub(super) fn supersede(&mut self, old: Option<u32>, fresh: u32, dirty: u64, now: Instant) {
        let block = self.meta[fresh as usize].block;
        let Some(old) = old else {
            self.make_dirty(fresh, dirty, now);
            self.index.insert(block, fresh);
            self.queue_back(fresh);
            return;
        };
        let before = self.meta[old as usize];
        self.meta[fresh as usize].holds = before.holds;
        self.meta[old as usize].holds = 0;
        match before.state {
            // Not handed to the disk yet: the new version takes its account.
            State::Dirty | State::Planned => {
                if shadow::fault!("arena-retired-before-publish") {
                    self.arena.retire(old);
                }
                self.meta[fresh as usize].line = before.line;
                self.publish(fresh, dirty);
                self.owned.release(before.owner, 1);
                self.owned.take(self.writer, 1);
                let meta = &mut self.meta[fresh as usize];
                meta.owner = self.writer;
                meta.epoch = before.epoch;
                meta.state = before.state;
                meta.waits = before.waits;
                // With all of it here the rest is needed no more.
                if self.hot[fresh as usize].valid.count_ones() as u64 != self.sectors {
                    meta.reads = before.reads;
                    meta.unsent = before.unsent;
                }
                if before.state == State::Dirty {
                    self.queue_replace(old, fresh);
                }
                self.arena.retire(old);
                self.replace(block, old, fresh);
                self.release(old);
            }
            State::Writing => {
                self.make_dirty(fresh, dirty, now);
                self.arena.retire(old);
                self.replace(block, old, fresh);
                self.meta[fresh as usize].waits = !shadow::fault!("writes-of-a-block-overlap");
                self.meta[old as usize].present = false;
                self.queue_back(fresh);
            }
            // Its record stays with the sync that will cover it.
            State::Written | State::Kept | State::Clean | State::Free => {
                self.make_dirty(fresh, dirty, now);
                // One that was cut off may be done before an older one of its block.
                self.meta[fresh as usize].waits = before.waits;
                self.arena.retire(old);
                self.replace(block, old, fresh);
                let dirty = matches!(before.state, State::Written | State::Kept);
                self.dirty -= u32::from(dirty);
                self.kept -= u32::from(before.state == State::Kept);
                if before.state == State::Written {
                    self.owned.release(before.owner, 1);
                }
                self.release(old);
                self.queue_back(fresh);
            }
        }
    }

    /// Makes a version count, on the account of the present epoch.
    pub(super) fn make_dirty(&mut self, slot: u32, dirty: u64, now: Instant) {
        self.meta[slot as usize].line = self.generations.line();
        self.publish(slot, dirty);
        let epoch = self.epochs.current();
        self.epochs.add(epoch, true, now);
        self.dirty += 1;
        self.owned.take(self.writer, 1);
        self.meta[slot as usize].owner = self.writer;
        let meta = &mut self.meta[slot as usize];
        meta.epoch = epoch;
        meta.state = State::Dirty;
    }
}
