//! The way of dirty sectors to stable storage.
//!
//! Dirty slots stand in lists by age. A plan takes the oldest and sorts them by place; a
//! run is what lies together of it, handed to the disk as one write. When all of
//! a version is written, a record of it waits for the next sync; when that has
//! succeeded, and no newer version came meanwhile, the slot is clean.

use std::time::Instant;

use shadow::{Extent, Lba, SECTOR};

use super::super::fair;
use super::epochs::Epoch;
use super::index::NONE;
use super::{Cache, Reads, State, runs};
use crate::sys::buffer::Body;

/// Sectors that lie together, to be written as one.
#[derive(Debug)]
pub struct Run {
    /// Which.
    pub extent: Extent,
    /// Their bytes, in order.
    pub pieces: Vec<Body>,
    /// The slots they are from.
    pub slots: Vec<u32>,
}

/// Which sectors of a block must be written if some of them are: gets the block
/// and the mask of those.
pub type Shape<'a> = &'a dyn Fn(u64, u64) -> u64;

/// A version that was written back and waits for a sync.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    block: u64,
    /// Sectors that were written.
    mask: u64,
    slot: u32,
    sequence: u64,
    epoch: Epoch,
    /// `true` for a discard, which must be done again after a failed sync.
    pub(super) is_discard: bool,
}

impl Record {
    /// The block, and which of its sectors; none if it stands for no block.
    pub fn sectors(&self) -> (u64, u64) {
        (self.block, self.mask)
    }
}

impl Cache {
    /// The epoch in which writes are counted now.
    pub fn epoch(&self) -> Epoch {
        self.epochs.current()
    }

    /// Ends the epoch; what was written until now is in it or before.
    pub fn close_epoch(&mut self) -> Epoch {
        self.epochs.close()
    }

    /// Whether all of the epoch and before is written back.
    pub fn is_written(&self, epoch: Epoch) -> bool {
        self.epochs.is_written(epoch)
    }

    /// Whether all of the epoch and before is on stable storage.
    pub fn is_synced(&self, epoch: Epoch) -> bool {
        self.epochs.is_synced(epoch)
    }

    /// Since when the oldest sector waits that is not on stable storage.
    pub fn oldest(&self) -> Option<Instant> {
        self.epochs.oldest()
    }

    /// Whether anything is not on stable storage.
    pub fn has_unsynced(&self) -> bool {
        self.epochs.oldest().is_some()
    }

    /// The next run to write, of at most `blocks_max` blocks: from the plan, or
    /// from a new one if versions of epoch `until` or before are queued.
    pub fn next_run(&mut self, until: Epoch, blocks_max: usize, shape: Shape) -> Option<Run> {
        loop {
            if let Some(slot) = self.partial.take() {
                return self.run_from(slot, blocks_max, shape);
            }
            if self.plan.is_empty() && !self.epochs.is_written(until) {
                self.make_plan();
            }
            let block = self.plan.pop_front()?;
            let slot = self.at_hand(block);
            let Some(slot) = slot.filter(|s| self.meta[*s as usize].state == State::Planned) else {
                continue;
            };
            if self.begin_writing(slot, shape) {
                return self.run_from(slot, blocks_max, shape);
            }
        }
    }

    /// Freezes a version for writing; `false` if something of its groups must
    /// be read first.
    fn begin_writing(&mut self, slot: u32, shape: Shape) -> bool {
        let group = self.group;
        let meta = &mut self.meta[slot as usize];
        let dirty = shape(meta.block, meta.dirty);
        let mut mask = dirty;
        if group > 1 {
            mask = 0;
            for (first, count) in runs(dirty) {
                let (low, high) = (
                    first / group * group,
                    (first + count).next_multiple_of(group),
                );
                mask |= super::Piece {
                    block: 0,
                    first: low,
                    count: high - low,
                    at: 0,
                }
                .mask();
            }
        }
        if mask == 0 {
            let epoch = meta.epoch;
            self.set_kept(slot);
            self.epochs.remove(epoch, true);
            return false;
        }
        if mask & !self.hot[slot as usize].valid != 0 {
            self.want(slot, mask);
            return false;
        }
        meta.state = State::Writing;
        meta.unsent = mask;
        meta.sent = mask;
        meta.failed = false;
        true
    }

    /// The run that begins with the first unsent sector of a slot, and goes on
    /// into the blocks behind it that are ready too.
    fn run_from(&mut self, mut slot: u32, blocks_max: usize, shape: Shape) -> Option<Run> {
        let mut run: Option<Run> = None;
        loop {
            let meta = self.meta[slot as usize];
            let (first, count) = runs(meta.unsent).next()?;
            let piece = super::Piece {
                block: meta.block,
                first,
                count,
                at: 0,
            };
            let start = Lba(meta.block * self.sectors + u64::from(first));
            let extent = Extent::new(start, u64::from(count))?;
            let (at, len) = piece.bytes();
            let body = self.arena.lend(slot, at, len)?;
            let meta = &mut self.meta[slot as usize];
            meta.unsent &= !piece.mask();
            meta.writes += 1;
            if meta.unsent != 0 {
                self.partial = Some(slot);
            }
            let run = run.get_or_insert_with(|| Run {
                extent: Extent::new(start, 0).unwrap_or(extent),
                pieces: Vec::new(),
                slots: Vec::new(),
            });
            run.extent = run.extent.hull(extent);
            run.pieces.push(body);
            run.slots.push(slot);
            let block = piece.block + 1;
            let to_the_end = u64::from(first + count) == self.sectors;
            if !to_the_end || run.pieces.len() >= blocks_max {
                break;
            }
            let Some(next) = self.at_hand(block) else {
                break;
            };
            let meta = self.meta[next as usize];
            let ready = matches!(meta.state, State::Planned | State::Dirty)
                && !(meta.waits || meta.reads != Reads::No);
            // Only what can be joined: from its first sector, without reading.
            let whole = self.group == 1
                || self.hot[next as usize].valid.count_ones() as u64 == self.sectors;
            if !ready || shape(meta.block, meta.dirty) & 1 == 0 || !whole {
                break;
            }
            if meta.state == State::Dirty {
                self.queue_remove(next);
            }
            if !self.begin_writing(next, shape) {
                break;
            }
            slot = next;
        }
        run
    }

    /// Completes a block that is being written in parts with what the disk has
    /// of the rest.
    pub fn complete(&mut self, extent: Extent, data: &[u8], now: Instant) {
        let pieces = self.pieces(extent);
        for piece in pieces {
            self.operation = self.operation.wrapping_add(1);
            let Some(old) = self.at_hand(piece.block) else {
                continue;
            };
            let before = self.meta[old as usize];
            let valid = self.hot[old as usize].valid;
            let missing = piece.mask() & !valid;
            if missing == 0 || !matches!(before.state, State::Dirty | State::Planned) {
                continue;
            }
            self.meta[old as usize].guard = self.operation;
            let Some(fresh) = self.take_slot() else {
                continue;
            };
            self.end_reads(old);
            for (first, count) in runs(valid) {
                let (at, len) = super::Piece {
                    first,
                    count,
                    ..piece
                }
                .bytes();
                self.arena.copy(old, fresh, at, len);
            }
            for (first, count) in runs(missing) {
                let (at, len) = super::Piece {
                    first,
                    count,
                    ..piece
                }
                .bytes();
                let from = piece.at + (first - piece.first) as usize * SECTOR as usize;
                self.arena.write(fresh, at, &data[from..from + len]);
            }
            self.fill_slot(fresh, piece.block, valid | missing);
            self.writer = before.owner;
            self.supersede(Some(old), fresh, before.dirty, now);
            self.writer = fair::Queue::OURS;
        }
    }

    /// A write of a part of this slot has ended.
    pub fn write_ended(&mut self, slot: u32, ok: bool, now: Instant) {
        let meta = &mut self.meta[slot as usize];
        meta.failed |= !ok;
        meta.writes -= 1;
        if meta.writes > 0 || (meta.unsent != 0 && !meta.failed) {
            return;
        }
        self.writing_ended(slot, now);
    }

    /// The last write of a version has ended.
    pub(super) fn writing_ended(&mut self, slot: u32, now: Instant) {
        if self.partial == Some(slot) {
            // The rest goes again with the whole of it.
            self.partial = None;
        }
        let meta = self.meta[slot as usize];
        if meta.present {
            // Without a dirty sector, which the end of the image has cut off,
            // there is nothing to write again.
            if meta.failed && meta.dirty != 0 {
                self.meta[slot as usize].state = State::Dirty;
                self.queue_front(slot);
            } else {
                self.meta[slot as usize].state = State::Written;
                self.record(slot);
            }
            return;
        }
        // A newer version has waited for this one.
        let newer = self.at_hand(meta.block);
        if let Some(newer) = newer {
            self.meta[newer as usize].waits = false;
        }
        self.dirty -= 1;
        self.owned.release(meta.owner, 1);
        if meta.failed {
            // In this order: an account without versions is closed.
            self.inherit(newer, meta.epoch, now);
            self.epochs.remove(meta.epoch, true);
        } else {
            self.record(slot);
        }
        self.release(slot);
    }

    pub(super) fn record(&mut self, slot: u32) {
        let meta = self.meta[slot as usize];
        if shadow::fault!("arena-retired-before-sync") {
            self.arena.retire(slot);
        }
        self.epochs.written(meta.epoch);
        self.written.push(Record {
            block: meta.block,
            mask: meta.sent,
            slot,
            sequence: meta.sequence,
            epoch: meta.epoch,
            is_discard: false,
        });
    }

    /// A newer version answers for what an older one did not bring to the disk:
    /// it holds all of it. To be called while the older one still has its
    /// account, which closes with the last that is on it.
    fn inherit(&mut self, newer: Option<u32>, epoch: Epoch, now: Instant) {
        let Some(newer) = newer else { return };
        let meta = self.meta[newer as usize];
        if matches!(meta.state, State::Clean | State::Kept) || meta.epoch <= epoch {
            return;
        }
        let unwritten = meta.state != State::Written;
        self.epochs.add(epoch, unwritten, now);
        self.epochs.remove(meta.epoch, unwritten);
        self.meta[newer as usize].epoch = epoch;
        for record in &mut self.written {
            if record.slot == newer && record.sequence == meta.sequence {
                record.epoch = epoch;
            }
        }
    }

    /// Something was written that has no slot: the next sync covers it.
    pub fn record_outside(&mut self, now: Instant) -> Epoch {
        let epoch = self.epochs.current();
        self.epochs.add(epoch, false, now);
        self.written.push(Record {
            block: u64::MAX,
            mask: 0,
            slot: NONE,
            sequence: 0,
            epoch,
            is_discard: false,
        });
        epoch
    }

    /// How many versions the next sync would cover.
    pub fn awaiting_sync(&self) -> usize {
        self.written.len()
    }

    /// A sync begins: what it covers. What is written from now on belongs to
    /// another epoch.
    pub fn begin_sync(&mut self) -> Vec<Record> {
        self.epochs.close();
        std::mem::take(&mut self.written)
    }

    /// A sync has ended.
    ///
    /// After a failed one nothing that was written since the last good one is
    /// trusted: the kernel may have dropped any of it, and says so only once.
    /// That is what the sync covered, what was written while it ran, and what
    /// is being written now.
    pub fn sync_ended(&mut self, mut records: Vec<Record>, ok: bool, now: Instant) {
        let ok = ok || shadow::fault!("failed-sync-trusted");
        if shadow::fault!("sync-covers-later-writes") {
            records.append(&mut self.written);
        }
        if !ok {
            records.append(&mut self.written);
            for meta in self
                .meta
                .iter_mut()
                .filter(|meta| meta.state == State::Writing)
            {
                meta.failed = !shadow::fault!("writing-trusted-after-failed-sync");
            }
        }
        for record in records {
            let slot = if record.slot == NONE {
                None
            } else {
                Some(record.slot)
            };
            let same = slot.filter(|slot| {
                let meta = &self.meta[*slot as usize];
                meta.present && meta.sequence == record.sequence && meta.state == State::Written
            });
            match (ok, same) {
                (true, Some(slot)) if self.meta[slot as usize].dirty & !record.mask != 0 => {
                    // The rest was not written: it is, or was, of bad ranges.
                    let meta = &mut self.meta[slot as usize];
                    meta.dirty &= !record.mask;
                    meta.state = State::Dirty;
                    let (epoch, dirty) = (meta.epoch, meta.dirty);
                    self.arena.narrow(slot, dirty);
                    self.epochs.unwritten(epoch);
                    self.queue_front(slot);
                }
                (true, Some(slot)) => {
                    self.arena.retire(slot);
                    let meta = &mut self.meta[slot as usize];
                    meta.dirty = 0;
                    meta.state = State::Clean;
                    self.dirty -= 1;
                    self.owned.release(meta.owner, 1);
                    // Not the record's: it may have inherited an older one.
                    let (epoch, block) = (meta.epoch, meta.block);
                    self.epochs.remove(epoch, false);
                    if self.generations.below.get(&block) == Some(&slot) {
                        self.generations.below.remove(&block);
                        self.release(slot);
                    }
                }
                (true, None) => self.epochs.remove(record.epoch, false),
                // All of it was cut off: nothing is to be written again.
                (false, Some(slot)) if self.meta[slot as usize].dirty == 0 => {
                    self.written.push(record);
                }
                (false, Some(slot)) => {
                    let meta = &mut self.meta[slot as usize];
                    meta.state = State::Dirty;
                    let epoch = meta.epoch;
                    self.epochs.unwritten(epoch);
                    self.queue_front(slot);
                }
                (false, None) if record.is_discard => self.undone.push(record),
                (false, None) if record.slot == NONE => self.written.push(record),
                (false, None) => {
                    let newer = self.at_hand(record.block);
                    self.inherit(newer, record.epoch, now);
                    self.epochs.remove(record.epoch, false);
                }
            }
        }
    }

    /// What was written back and not synced must be written again, since it now
    /// belongs elsewhere.
    pub fn write_again(&mut self, now: Instant) {
        let records = self.begin_sync();
        self.sync_ended(records, false, now);
    }

    /// Whether all of these sectors, of one block, will be written back.
    pub fn is_dirty(&self, extent: Extent) -> bool {
        self.pieces(extent).all(|piece| {
            let slot = self.find(piece.block);
            let dirty = slot.map_or(0, |slot| self.meta[slot as usize].dirty);
            dirty & piece.mask() == piece.mask()
        })
    }
}

#[cfg(test)]
impl Cache {
    /// On whose account a record is.
    pub(super) fn epoch_of(&self, record: &Record) -> Epoch {
        let meta = self.meta.get(record.slot as usize);
        let same = meta.filter(|meta| {
            meta.present && meta.sequence == record.sequence && meta.state == State::Written
        });
        same.map_or(record.epoch, |meta| meta.epoch)
    }
}
