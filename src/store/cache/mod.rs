//! Blocks in memory: which sectors of which block are here, which of them the
//! image does not have yet, and which block gives way to another.
//!
//! No I/O happens here. A slot's life:
//!
//! ```text
//! Free -> Dirty -> Planned -> Writing -> Written -> Clean -> Free
//!           ^---------- failed --+---------'
//! ```
//!
//! A slot with dirty sectors is never written again. A write to its block makes
//! a new version in another slot, which takes over every sector of the old one
//! and then its place in the index. An old version that was being written back
//! lives on until that ends; until then the new one waits with its own.
//!
//! All extents are sectors of the backing, not of the export.

mod again;
mod epochs;
mod generations;
mod idle;
mod index;
mod kept;
mod lists;
mod reads;
mod shrink;
mod versions;
mod writeback;

use std::time::Instant;

use shadow::{Extent, Lba, SECTOR};

use super::arena::{Arena, runs};
use super::fair::{self, Shares};
use crate::sys::buffer::Body;

use epochs::Epochs;
use generations::Generations;
use index::{Index, NONE};
use lists::Lists;

pub use epochs::Epoch;
pub use writeback::{Record, Run};

/// The most blocks that one request touches: 255 sectors, begun anywhere.
const PIECES_MAX: usize = 255 / 8 + 2;
/// The part of the dirty slots that is kept for initiators that have few.
const HEADROOM_SHARE: u64 = 32;
/// How many slots can be passed over in the time of one look-up.
const LOOKUP_COST: u64 = 8;
/// So many slots must be allowed to be dirty, or a long write never has room.
pub const DIRTY_MIN: u64 = PIECES_MAX as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Holds nothing; perhaps still lent out.
    Free,
    /// As on stable storage.
    Clean,
    /// Must be written back; in the queue.
    Dirty,
    /// Must be written back; in the plan.
    Planned,
    /// Being written back.
    Writing,
    /// Written back, not synced.
    Written,
    /// Has dirty sectors that the image does not take, and no others; on no
    /// account.
    Kept,
}

/// The rest of a block of which only a part is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    /// It is not needed, as far as known.
    No,
    /// It is to be read.
    Wanted,
    /// It is being read.
    Begun,
}

/// What every read looks at: so little that all of it stays in the processor's
/// cache.
#[derive(Clone, Copy, Debug, Default)]
struct Hot {
    /// The block that the slot holds, as in its [`Meta`].
    block: u64,
    /// Sectors that are here.
    valid: u64,
}

/// What else is known of a slot.
#[derive(Clone, Copy, Debug)]
struct Meta {
    block: u64,
    state: State,
    /// Whether this is the block's present version.
    present: bool,
    /// Whether an older version of the block is still being written back.
    waits: bool,
    /// The rest of it, without which it cannot be written.
    reads: Reads,
    /// Whether one of its write-backs failed.
    failed: bool,
    /// Its generation modulo 2, as `Generations::line` returns it.
    line: u8,
    /// Write-backs under way.
    writes: u16,
    /// Sectors that are not on stable storage.
    dirty: u64,
    /// The version of the block; no two are equal.
    sequence: u64,
    epoch: Epoch,
    /// Sectors still to be handed to the disk, while Writing; those that must be here
    /// before, while their rest is wanted.
    unsent: u64,
    /// Sectors of the last write-back.
    sent: u64,
    /// Its neighbours in its list.
    previous: u32,
    next: u32,
    /// Whose write made it dirty.
    owner: fair::Queue,
    /// The operation that must not lose this slot.
    guard: u32,
    /// Reads of the disk that must not lose this block.
    holds: u32,
}

/// How much of an extent the cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// No sector.
    None,
    /// Some sectors.
    Some,
    /// Every sector.
    All,
}

/// There is no slot for it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The cache. See the head of this file.
#[derive(Debug)]
pub struct Cache {
    arena: Arena,
    /// Sectors of a block.
    sectors: u64,
    /// The disk takes whole groups of so many sectors.
    group: u32,
    meta: Vec<Meta>,
    hot: Vec<Hot>,
    /// Which slots were used since the clock's hand was there.
    referenced: Vec<bool>,
    index: Index,
    free: Vec<u32>,
    /// Slots that hold nothing but are still pinned.
    pinned: Vec<u32>,
    hand: u32,
    /// The dirty slots.
    lists: Lists,
    generations: Generations,
    /// Blocks to be written back next, in their order.
    plan: std::collections::VecDeque<u64>,
    /// A slot with sectors left to hand to the disk.
    partial: Option<u32>,
    /// Versions written back that the next sync covers.
    written: Vec<Record>,
    /// Discards that a failed sync was to cover, until they are done again.
    undone: Vec<Record>,
    /// Slots with dirty sectors, and those of them that are kept.
    dirty: u32,
    kept: u32,
    /// Who has how many of those that are not kept.
    owned: Shares,
    /// Whose write is being taken.
    writer: fair::Queue,
    dirty_max: u32,
    sequence: u64,
    operation: u32,
    epochs: Epochs,
    /// Blocks lately missed; one that is missed again is worth a slot.
    ghosts: Vec<u64>,
    /// Whether only the first step of the arena can have space.
    is_released: bool,
    /// Some steps could not be given back; no new try before this.
    release_at: Option<Instant>,
}

/// One block's part of an extent.
#[derive(Clone, Copy, Debug)]
struct Piece {
    block: u64,
    /// First sector of the block.
    first: u32,
    count: u32,
    /// Where its bytes are among those of the extent.
    at: usize,
}

impl Piece {
    fn mask(self) -> u64 {
        if self.count == 64 {
            u64::MAX
        } else {
            ((1u64 << self.count) - 1) << self.first
        }
    }

    /// Where its bytes begin in the slot, and how many they are.
    fn bytes(self) -> (usize, usize) {
        (
            self.first as usize * SECTOR as usize,
            self.count as usize * SECTOR as usize,
        )
    }
}

impl Cache {
    /// An empty cache in `arena`, of which up to `dirty_max` slots may be dirty;
    /// the disk takes whole blocks of `align` bytes.
    pub fn new(arena: Arena, align: usize, dirty_max: u32) -> Cache {
        let count = arena.count();
        let epochs = Epochs::new();
        let empty = Meta {
            block: 0,
            sequence: 0,
            epoch: epochs.current(),
            dirty: 0,
            unsent: 0,
            sent: 0,
            line: 0,
            writes: 0,
            failed: false,
            state: State::Free,
            present: false,
            waits: false,
            reads: Reads::No,
            owner: fair::Queue::OURS,
            guard: 0,
            holds: 0,
            previous: NONE,
            next: NONE,
        };
        Cache {
            sectors: arena.block() as u64 / SECTOR,
            group: (align as u64 / SECTOR).max(1) as u32,
            meta: vec![empty; count as usize],
            hot: vec![Hot::default(); count as usize],
            referenced: vec![false; count as usize],
            index: Index::new(count),
            free: arena.with_room().flatten().rev().collect(),
            is_released: true,
            release_at: None,
            pinned: Vec::new(),
            hand: 0,
            lists: Lists::new(),
            generations: Generations::default(),
            plan: std::collections::VecDeque::new(),
            partial: None,
            written: Vec::new(),
            undone: Vec::new(),
            dirty: 0,
            kept: 0,
            owned: Shares::new(u64::from(count), 0),
            writer: fair::Queue::OURS,
            dirty_max: dirty_max.clamp(1, count),
            sequence: 0,
            operation: 0,
            epochs,
            ghosts: vec![u64::MAX; (count as usize * 2).next_power_of_two()],
            arena,
        }
    }

    /// The memory.
    pub fn arena(&mut self) -> &mut Arena {
        &mut self.arena
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Whether any sector is not on stable storage, but for those that the image
    /// does not take.
    pub fn has_dirty(&self) -> bool {
        self.dirty > self.kept
    }

    /// No more slots than these may be dirty from now on.
    pub fn limit_dirty(&mut self, slots: u32) {
        // Where less room was to be had than was asked for, some stays for what
        // is clean and for new versions.
        let (usable, all) = (self.arena.usable(), self.arena.count());
        let most = if usable < all { usable / 4 * 3 } else { all };
        self.dirty_max = slots.clamp(1, most.max(1));
    }

    /// Slots with dirty sectors, and how many there may be.
    pub fn dirty(&self) -> (u32, u32) {
        (self.dirty, self.dirty_max)
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.arena.usable()
    }

    /// A slot of the next step, if there is room for one more.
    fn grow(&mut self) -> Option<u32> {
        let Some(slots) = self.arena.grow() else {
            self.limit_dirty(self.dirty_max);
            return None;
        };
        self.is_released = false;
        self.free.extend(slots.rev());
        self.free.pop()
    }

    /// The whole blocks around an extent.
    pub fn blocks_around(&self, extent: Extent) -> Extent {
        let start = extent.start().0 / self.sectors * self.sectors;
        let end = extent.end().0.next_multiple_of(self.sectors);
        Extent::new(Lba(start), end - start).unwrap_or(extent)
    }

    fn pieces(&self, extent: Extent) -> impl Iterator<Item = Piece> + use<> {
        let sectors = self.sectors;
        let (mut lba, end) = (extent.start().0, extent.end().0);
        let start = lba;
        std::iter::from_fn(move || {
            if lba >= end {
                return None;
            }
            let first = (lba % sectors) as u32;
            let count = (end - lba).min(sectors - u64::from(first)) as u32;
            let piece = Piece {
                block: lba / sectors,
                first,
                count,
                at: ((lba - start) * SECTOR) as usize,
            };
            lba += u64::from(count);
            Some(piece)
        })
    }

    fn find(&self, block: u64) -> Option<u32> {
        self.index.find(block, |slot| self.hot[slot as usize].block)
    }

    /// The data of an extent that lies within one block, all of it here.
    pub fn hit(&mut self, extent: Extent) -> Option<Body> {
        let first = extent.start().0 % self.sectors;
        if first + extent.count() > self.sectors {
            return None;
        }
        let piece = Piece {
            block: extent.start().0 / self.sectors,
            first: first as u32,
            count: extent.count() as u32,
            at: 0,
        };
        let slot = self.find(piece.block)?;
        if self.hot[slot as usize].valid & piece.mask() != piece.mask() {
            return None;
        }
        self.referenced[slot as usize] = true;
        let (at, len) = piece.bytes();
        self.arena.lend(slot, at, len)
    }

    /// `true` if a sector of this block is not on stable storage.
    pub fn is_unsynced(&self, block: Extent) -> bool {
        let slot = self.find(block.start().0 / self.sectors);
        slot.is_some_and(|slot| self.is_unsynced_slot(slot))
    }

    /// What is kept waits for nothing.
    fn is_unsynced_slot(&self, slot: u32) -> bool {
        let meta = &self.meta[slot as usize];
        meta.present && !matches!(meta.state, State::Clean | State::Kept | State::Free)
    }

    /// A block of these extents that is not on stable storage, if there is one.
    /// The extents are in order and do not overlap.
    pub fn unsynced_in(&self, extents: &[Extent]) -> Option<Extent> {
        if self.dirty == self.kept {
            return None;
        }
        let held = self.held_in(extents).into_iter();
        let mut unsynced = held.filter(|(slot, _)| self.is_unsynced_slot(*slot));
        let block = self.meta[unsynced.next()?.0 as usize].block;
        Extent::new(Lba(block * self.sectors), self.sectors)
    }

    /// The slots of the blocks that are here of these extents, which are in order
    /// and do not overlap, and the sectors of the extents in each.
    fn held_in(&self, extents: &[Extent]) -> Vec<(u32, u64)> {
        let sectors: u64 = extents.iter().map(|extent| extent.count()).sum();
        let blocks = sectors / self.sectors + 2 * extents.len() as u64;
        let mut held: Vec<(u32, u64)> = Vec::new();
        // A look-up costs more than a slot that is passed over.
        if blocks <= u64::from(self.slots()) / LOOKUP_COST {
            for piece in extents.iter().flat_map(|extent| self.pieces(*extent)) {
                let Some(slot) = self.find(piece.block) else {
                    continue;
                };
                match held.last_mut() {
                    Some((last, mask)) if *last == slot => *mask |= piece.mask(),
                    _ => held.push((slot, piece.mask())),
                }
            }
            return held;
        }
        for (slot, meta) in (0u32..).zip(&self.meta) {
            let mask = match meta.state {
                State::Free => 0,
                _ => self.mask_in(meta.block, extents),
            };
            if mask != 0 && self.find(meta.block) == Some(slot) {
                held.push((slot, mask));
            }
        }
        held
    }

    /// The sectors of a block that are in extents, which are in order and do not
    /// overlap.
    fn mask_in(&self, block: u64, extents: &[Extent]) -> u64 {
        let (first, end) = (block * self.sectors, (block + 1) * self.sectors);
        let behind = extents.partition_point(|extent| extent.end().0 <= first);
        let within = extents[behind..].iter().take_while(|e| e.start().0 < end);
        within.fold(0, |mask, extent| {
            let from = extent.start().0.max(first) - first;
            let count = extent.end().0.min(end) - first - from;
            mask | ((u64::MAX >> (64 - count)) << from)
        })
    }

    /// Whether all of an extent is here.
    pub fn covers(&self, extent: Extent) -> bool {
        self.presence(extent) == Presence::All
    }

    /// Takes a write: when this returns it survives the process. All of it, or
    /// nothing and `Full`.
    pub fn write(&mut self, extent: Extent, data: &[u8], now: Instant) -> Result<Epoch, Full> {
        self.write_up_to(extent, data, now, self.dirty_max)
    }

    /// The same for an initiator, which has its share of the dirty slots.
    pub fn write_for(
        &mut self,
        queue: fair::Queue,
        extent: Extent,
        data: &[u8],
        now: Instant,
    ) -> Result<Epoch, Full> {
        self.writer = queue;
        let written = self.write(extent, data, now);
        self.writer = fair::Queue::OURS;
        written
    }

    /// The same where so many slots may be dirty.
    pub fn write_up_to(
        &mut self,
        extent: Extent,
        data: &[u8],
        now: Instant,
        dirty_max: u32,
    ) -> Result<Epoch, Full> {
        self.operation = self.operation.wrapping_add(1);
        let mut slots = [NONE; PIECES_MAX];
        let mut fresh = 0;
        // First every slot that will be needed, then the writing.
        for piece in self.pieces(extent) {
            let found = self.find(piece.block);
            if let Some(slot) = found {
                self.meta[slot as usize].guard = self.operation;
            }
            let state = found.map(|slot| self.meta[slot as usize].state);
            let more = matches!(state, None | Some(State::Clean))
                || found.is_some_and(|slot| self.is_older(slot));
            fresh += u32::from(more);
        }
        // What is kept has a bound of its own.
        let (most, fresh) = (u64::from(dirty_max), u64::from(fresh));
        // One that comes later has what becomes clean until both have as much.
        let headroom = match self.owned.is_alone(self.writer) {
            true => 0,
            false => most / HEADROOM_SHARE,
        };
        let writer = self.writer;
        // A slot is left for what must be completed before it can be written back.
        let fits = u64::from(self.dirty) + fresh < u64::from(self.arena.usable());
        let admits = || fits && self.owned.admits_of(most, headroom, writer, fresh);
        let mut room = fresh == 0 || admits();
        for (piece, slot) in self.pieces(extent).zip(&mut slots) {
            if room && self.in_place(piece.block).is_none() {
                match self.take_slot() {
                    Some(taken) => *slot = taken,
                    None => room = false,
                }
            }
        }
        if !room {
            self.free
                .extend(slots.into_iter().filter(|slot| *slot != NONE));
            return Err(Full);
        }
        for (piece, slot) in self.pieces(extent).zip(slots) {
            let (_, len) = piece.bytes();
            self.write_piece(piece, slot, &data[piece.at..piece.at + len], now);
        }
        Ok(self.epochs.current())
    }

    fn publish(&mut self, slot: u32, dirty: u64) {
        self.sequence += 1;
        let meta = &mut self.meta[slot as usize];
        meta.sequence = self.sequence;
        meta.dirty = dirty;
        meta.unsent = 0;
        meta.writes = 0;
        meta.failed = false;
        meta.reads = Reads::No;
        meta.present = true;
        let (block, line) = (meta.block, meta.line);
        let generation = self.generations.of_line(line);
        self.referenced[slot as usize] = true;
        self.arena
            .publish(slot, self.sequence, block, dirty, generation);
    }

    /// Forgets extents, whose sectors the disk has made zeros. Nothing of them is
    /// dirty. They are in order and do not overlap.
    pub fn forget(&mut self, extents: &[Extent]) {
        for (slot, mask) in self.held_in(extents) {
            if self.meta[slot as usize].state == State::Kept {
                self.forget_kept(slot, mask);
            }
            let meta = &self.meta[slot as usize];
            if meta.state == State::Kept {
                self.hot[slot as usize].valid &= !mask;
                continue;
            }
            debug_assert_eq!(meta.state, State::Clean);
            let hot = &mut self.hot[slot as usize];
            hot.valid &= !mask;
            // A read of other sectors of the block may hold it; then it goes when
            // its slot is wanted.
            if hot.valid == 0 && meta.holds == 0 && !meta.waits {
                self.index.remove(meta.block, slot);
                self.release(slot);
            }
        }
    }

    /// A slot to write into: a free one, or that of a clean block which was not
    /// used for the longest time (by the clock's measure).
    fn take_slot(&mut self) -> Option<u32> {
        while let Some(slot) = self.free.pop() {
            // Looked at again: the arena takes no write to a slot that is pinned.
            if !self.arena.is_lent(slot) {
                return Some(slot);
            }
            self.pinned.push(slot);
        }
        let arena = &self.arena;
        if let Some(at) = self.pinned.iter().position(|slot| !arena.is_lent(*slot)) {
            return Some(self.pinned.swap_remove(at));
        }
        if let Some(slot) = self.grow() {
            return Some(slot);
        }
        for _ in 0..2 * self.meta.len() {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.arena.count();
            let meta = &mut self.meta[slot as usize];
            let is_needed = meta.guard == self.operation || meta.holds > 0 || meta.waits;
            if meta.state != State::Clean || is_needed {
                continue;
            }
            if std::mem::take(&mut self.referenced[slot as usize]) {
                continue;
            }
            if !self.arena.is_lent(slot) {
                let block = meta.block;
                meta.state = State::Free;
                meta.present = false;
                self.index.remove(block, slot);
                return Some(slot);
            }
        }
        None
    }

    /// A slot holds nothing any more.
    fn release(&mut self, slot: u32) {
        let meta = &mut self.meta[slot as usize];
        debug_assert_eq!(meta.holds, 0, "slot {slot} is held");
        meta.state = State::Free;
        meta.present = false;
        if self.arena.is_lent(slot) {
            self.pinned.push(slot);
        } else {
            self.free.push(slot);
        }
    }
}

#[cfg(test)]
mod tests;
