//! How much of an extent is here, and what of the disk's answer stays.

use shadow::{Extent, SECTOR};

use super::super::arena::runs;
use super::{Cache, Piece, Presence, State, index};

impl Cache {
    /// How much of an extent is here, in one pass over its blocks.
    pub fn presence(&self, extent: Extent) -> Presence {
        let (mut any, mut all) = (false, true);
        for piece in self.pieces(extent) {
            let valid = self
                .find(piece.block)
                .map_or(0, |s| self.hot[s as usize].valid);
            any |= valid & piece.mask() != 0;
            all &= valid & piece.mask() == piece.mask();
        }
        match (any, all) {
            (_, true) => Presence::All,
            (true, false) => Presence::Some,
            (false, false) => Presence::None,
        }
    }

    /// Copies what is here of an extent over what was read from the disk.
    pub fn overlay(&mut self, extent: Extent, data: &mut [u8]) {
        for piece in self.pieces(extent) {
            let Some(slot) = self.find(piece.block) else {
                continue;
            };
            self.referenced[slot as usize] = true;
            for (first, count) in runs(self.hot[slot as usize].valid & piece.mask()) {
                let part = Piece {
                    first,
                    count,
                    ..piece
                };
                let (from, len) = part.bytes();
                let to = piece.at + (first - piece.first) as usize * SECTOR as usize;
                data[to..to + len].copy_from_slice(self.arena.bytes(slot, from, len));
            }
        }
    }

    /// Keeps the blocks that are here of an extent from being driven out, until
    /// [`unhold`](Cache::unhold): what a read of the disk brings meanwhile may be
    /// older than they are.
    pub fn hold(&mut self, extent: Extent) -> Vec<u64> {
        let mut blocks = Vec::new();
        if shadow::fault!("fill-holds-no-block") {
            return blocks;
        }
        for piece in self.pieces(extent) {
            if let Some(slot) = self.find(piece.block) {
                self.meta[slot as usize].holds += 1;
                blocks.push(piece.block);
            }
        }
        blocks
    }

    /// The opposite of [`hold`](Cache::hold).
    pub fn unhold(&mut self, blocks: &[u64]) {
        for block in blocks {
            if let Some(slot) = self.find(*block) {
                self.meta[slot as usize].holds -= 1;
            }
        }
    }

    /// Whether a block missed now was missed lately, too, and so is worth a
    /// slot: what is read only once would drive out what is read again.
    pub fn is_wanted_again(&mut self, block_of: Extent) -> bool {
        let block = block_of.start().0 / self.sectors;
        let mask = self.ghosts.len() - 1;
        let ghost = &mut self.ghosts[index::hash(block) as usize & mask];
        std::mem::replace(ghost, block) == block
    }

    /// Keeps the whole blocks of what was read from the disk, where nothing of
    /// them is here and there is a slot.
    pub fn keep(&mut self, extent: Extent, data: &[u8]) {
        for piece in self.pieces(extent) {
            if u64::from(piece.count) != self.sectors || self.find(piece.block).is_some() {
                continue;
            }
            self.operation = self.operation.wrapping_add(1);
            let Some(slot) = self.take_slot() else { return };
            let (at, len) = piece.bytes();
            self.arena.write(slot, at, &data[piece.at..piece.at + len]);
            self.fill_slot(slot, piece.block, piece.mask());
            self.referenced[slot as usize] = false;
            let meta = &mut self.meta[slot as usize];
            meta.dirty = 0;
            meta.state = State::Clean;
            meta.present = true;
            self.index.insert(piece.block, slot);
        }
    }
}
