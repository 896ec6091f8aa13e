//! An image that became smaller.

use std::time::Instant;

use shadow::Lba;

use super::{Cache, Reads, State};

impl Cache {
    /// Forgets what lies behind the new end of the image: when the image grows
    /// again, other data may be there. Returns the number of sectors that were
    /// dirty and are dropped.
    ///
    /// A version that has no dirty sector left counts as written, so that the
    /// next sync takes it off its account.
    pub fn cut(&mut self, end: Lba, now: Instant) -> u64 {
        debug_assert!(!self.generations.draining);
        let mut dropped = 0;
        for slot in 0..self.meta.len() as u32 {
            let meta = &self.meta[slot as usize];
            let kept = end.0.saturating_sub(meta.block * self.sectors);
            if meta.state == State::Free || kept >= self.sectors {
                continue;
            }
            let kept = (1 << kept) - 1;
            self.hot[slot as usize].valid &= kept;
            let (state, reads) = (meta.state, meta.reads);
            // What is missing may be behind the new end.
            if reads == Reads::Wanted {
                self.end_reads(slot);
            }
            if state != State::Clean {
                dropped += self.cut_dirty(slot, kept, now);
            }
        }
        if dropped > 0 {
            // The image may have failed to take what is dropped now. A sync that
            // succeeds shows that it is well again.
            self.record_outside(now);
        }
        dropped
    }

    /// Leaves a version only the dirty sectors of this mask; returns the number
    /// of those that it loses.
    fn cut_dirty(&mut self, slot: u32, kept: u64, now: Instant) -> u64 {
        let meta = &mut self.meta[slot as usize];
        let lost = meta.dirty & !kept;
        if lost == 0 {
            return 0;
        }
        meta.dirty &= kept;
        meta.sent &= kept;
        meta.unsent &= kept;
        let meta = *meta;
        if meta.present && meta.dirty == 0 {
            self.arena.retire(slot);
        } else if meta.present {
            self.arena.narrow(slot, meta.dirty);
        }
        match meta.state {
            State::Dirty | State::Planned if meta.dirty == 0 => {
                if meta.state == State::Dirty {
                    self.queue_remove(slot);
                }
                let meta = &mut self.meta[slot as usize];
                meta.sent = 0;
                meta.state = State::Written;
                self.record(slot);
            }
            State::Kept if meta.dirty == 0 => self.forget_kept(slot, u64::MAX),
            State::Writing if meta.unsent == 0 && meta.writes == 0 => self.writing_ended(slot, now),
            _ => {}
        }
        // Of an older version, a newer one holds and loses the same sectors.
        if meta.present {
            u64::from(lost.count_ones())
        } else {
            0
        }
    }
}
