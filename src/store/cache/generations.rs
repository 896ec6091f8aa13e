//! Two generations at a time: what was written before a freeze, on its way to
//! the image, and what came after.
//!
//! A version never mixes generations. A write to a block whose older version is
//! not on stable storage yet lifts a new version above it: that one holds every
//! sector, so that reads need look at nothing else, but only its own sectors
//! are dirty. The older version is in the index no more and goes on to the
//! image; the newer generation is not written back before the older one is
//! through.

use std::collections::HashMap;
use std::time::Instant;

use super::{Cache, Epoch, State};

/// What is known of the generations.
#[derive(Debug, Default)]
pub(super) struct Generations {
    /// That of what is written now.
    pub current: u64,
    /// Whether the one before is still on its way.
    pub draining: bool,
    /// Of blocks with a version of each the slot of the older one.
    pub below: HashMap<u64, u32>,
}

impl Generations {
    /// Which of the two queues a slot stands in that is written now.
    pub fn line(&self) -> u8 {
        (self.current & 1) as u8
    }

    /// Which of them is written back now.
    pub fn line_at_hand(&self) -> u8 {
        self.line() ^ u8::from(self.draining)
    }

    /// The generation of the slots of a line.
    pub fn of_line(&self, line: u8) -> u64 {
        self.current - u64::from(line != self.line())
    }
}

impl Cache {
    /// Counts what is written from now on to this generation, at a start.
    pub fn set_generation(&mut self, generation: u64) {
        debug_assert!(!self.has_dirty());
        self.generations.current = generation;
    }

    /// That of what is written now.
    pub fn generation(&self) -> u64 {
        self.generations.current
    }

    /// Begins a generation: what was written until now goes to the image, what
    /// comes stays until [`end_drain`](Cache::end_drain). Returns the last epoch
    /// of what was.
    pub fn begin_generation(&mut self) -> Epoch {
        debug_assert!(!self.generations.draining);
        let last = self.close_epoch();
        self.generations.current += 1;
        self.generations.draining = true;
        last
    }

    /// All of the generation before is on stable storage: from now on the
    /// present one is written back.
    pub fn end_drain(&mut self) {
        debug_assert!(self.generations.below.is_empty());
        self.generations.draining = false;
    }

    /// Whether the slot belongs to the generation that is being drained.
    pub(super) fn is_older(&self, slot: u32) -> bool {
        if shadow::fault!("generations-mixed") {
            return false;
        }
        let meta = &self.meta[slot as usize];
        let dirty = !matches!(meta.state, State::Clean | State::Free);
        self.generations.draining && dirty && meta.line != self.generations.line()
    }

    /// The version of a block that is, or will be, written back now.
    pub(super) fn at_hand(&self, block: u64) -> Option<u32> {
        if !self.generations.draining {
            return self.find(block);
        }
        let below = self.generations.below.get(&block).copied();
        below.or_else(|| self.find(block).filter(|slot| self.is_older(*slot)))
    }

    /// Puts a version that was written into `fresh` above `old`, which is of the
    /// generation before.
    pub(super) fn lift(&mut self, old: u32, fresh: u32, dirty: u64, now: Instant) {
        let block = self.meta[fresh as usize].block;
        self.meta[fresh as usize].holds = self.meta[old as usize].holds;
        self.meta[old as usize].holds = 0;
        self.make_dirty(fresh, dirty, now);
        self.index.replace(block, old, fresh);
        self.generations.below.insert(block, old);
        self.queue_back(fresh);
    }

    /// Puts a version in the place of another of the same generation.
    pub(super) fn replace(&mut self, block: u64, old: u32, fresh: u32) {
        match self.generations.below.get_mut(&block) {
            Some(below) if *below == old => *below = fresh,
            _ => self.index.replace(block, old, fresh),
        }
    }
}
