//! The space of the arena that nothing has used for a while.

use std::time::{Duration, Instant};

use super::{Cache, State};

/// Steps of the arena are given back after so long without a request.
const CACHE_IDLE: Duration = Duration::from_secs(60);
/// No more steps than these at once, so that requests are not kept waiting.
const STEPS_MAX: usize = 16;

impl Cache {
    /// When [`release_idle`](Cache::release_idle) is to be called, if ever, if no
    /// request comes after the one of this time.
    pub fn release_at(&self, last_request: Instant) -> Option<Instant> {
        let idle = last_request + CACHE_IDLE;
        let at = self.release_at.map_or(idle, |at| at.max(idle));
        (!self.is_released).then_some(at)
    }

    /// Gives the space of slots back that hold nothing but clean blocks, some steps
    /// of the arena at a time. The others are tried again later.
    pub fn release_idle(&mut self, now: Instant) {
        let (mut given_back, mut has_more, mut are_left) = (0, false, false);
        for step in self.arena.steps().rev() {
            let slots = self.arena.slots_of(step);
            // The first step stays.
            if step == 0 || !self.arena.has_space(slots.start) {
                continue;
            }
            if given_back == STEPS_MAX {
                // The others at once, after the requests that have come.
                has_more = true;
                break;
            }
            if !slots.clone().all(|slot| self.is_idle(slot)) || !self.arena.give_back(step) {
                are_left = true;
                continue;
            }
            given_back += 1;
            for slot in slots {
                let meta = &mut self.meta[slot as usize];
                if meta.state == State::Clean {
                    meta.state = State::Free;
                    meta.present = false;
                    self.index.remove(meta.block, slot);
                }
            }
        }
        self.free.retain(|slot| self.arena.has_space(*slot));
        self.pinned.retain(|slot| self.arena.has_space(*slot));
        self.is_released = !has_more && !are_left;
        self.release_at = (are_left && !has_more).then(|| now + CACHE_IDLE);
    }

    /// Whether a slot holds nothing that is needed.
    fn is_idle(&self, slot: u32) -> bool {
        let meta = &self.meta[slot as usize];
        let state = matches!(meta.state, State::Free | State::Clean);
        let is_needed = meta.holds > 0 || (meta.present && meta.waits);
        state && !is_needed && !self.arena.is_lent(slot)
    }
}
