//! Block to slot, in memory that is allocated once.

/// No slot.
pub(super) const NONE: u32 = u32::MAX;

/// A hash table whose chains run through an array with a place for each slot.
#[derive(Debug)]
pub(super) struct Index {
    buckets: Vec<u32>,
    chain: Vec<u32>,
}

/// Spreads neighbours, which are what a disk is asked for (Fibonacci hashing).
pub(super) fn hash(block: u64) -> u64 {
    block.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20
}

impl Index {
    pub fn new(slots: u32) -> Index {
        let buckets = (slots as usize * 2).next_power_of_two();
        Index {
            buckets: vec![NONE; buckets],
            chain: vec![NONE; slots as usize],
        }
    }

    fn bucket(&self, block: u64) -> usize {
        hash(block) as usize & (self.buckets.len() - 1)
    }

    /// The slot of a block; `block_of` tells what block a slot holds.
    pub fn find(&self, block: u64, block_of: impl Fn(u32) -> u64) -> Option<u32> {
        let mut slot = self.buckets[self.bucket(block)];
        while slot != NONE {
            if block_of(slot) == block {
                return Some(slot);
            }
            slot = self.chain[slot as usize];
        }
        None
    }

    /// Adds a slot for a block that has none.
    pub fn insert(&mut self, block: u64, slot: u32) {
        let bucket = self.bucket(block);
        self.chain[slot as usize] = self.buckets[bucket];
        self.buckets[bucket] = slot;
    }

    /// Takes the slot of a block out.
    pub fn remove(&mut self, block: u64, slot: u32) {
        let after = self.chain[slot as usize];
        self.relink(block, slot, after);
    }

    /// Puts another slot in the place of a block's.
    pub fn replace(&mut self, block: u64, old: u32, new: u32) {
        self.chain[new as usize] = self.chain[old as usize];
        self.relink(block, old, new);
    }

    /// Makes what points to `slot` point to `to`.
    fn relink(&mut self, block: u64, slot: u32, to: u32) {
        let bucket = self.bucket(block);
        let mut at = self.buckets[bucket];
        if at == slot {
            self.buckets[bucket] = to;
            return;
        }
        while at != NONE {
            let next = self.chain[at as usize];
            if next == slot {
                self.chain[at as usize] = to;
                return;
            }
            at = next;
        }
    }
}
