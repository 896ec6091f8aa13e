//! Room for the shadow: what is taken at once, so that what is acknowledged has
//! its place; the limit; and what happens when there is no more.

use std::time::Instant;

use shadow::SECTOR;

use super::super::cache::DIRTY_MIN;
use super::super::disk::Step;
use super::Volume;
use super::freeze::Stage;
use super::frozen::Thaw;
use crate::freeze::WhenFull;

/// The part of a limit that is taken at once.
const RESERVE_SHARE: u64 = 4;

/// The least limit of a shadow, in bytes, where the cache has blocks of so many:
/// what is taken at once, and as much again.
pub fn shadow_limit_min(block: u64) -> u64 {
    2 * DIRTY_MIN * block
}

impl Volume {
    /// How many slots may be dirty while their only place may be a full disk's
    /// shadow: as many as room is taken for at once.
    pub(super) fn reserve(&self, limit: Option<u64>) -> u32 {
        let block = self.cache.block_bytes();
        let most = limit.map_or(u64::MAX, |limit| limit / RESERVE_SHARE / block);
        most.max(DIRTY_MIN).min(u64::from(self.freezing.dirty_max)) as u32
    }

    /// Whether a write of so many sectors must go unanswered.
    pub(super) fn holds_writes(&mut self, now: Instant, sectors: u64) -> bool {
        match self.freezing.stage {
            Stage::Running => false,
            Stage::Held { .. } => true,
            Stage::Frozen => {
                if self.freezing.full.is_none() && self.is_over_limit(sectors) {
                    self.shadow_is_full(now, false);
                }
                self.freezing.full.is_some()
            }
            _ => false,
        }
    }

    /// Whether the shadow would have more than it may if all that is dirty, and
    /// so many sectors more, went there: data, bitmap, and what was taken at once.
    fn is_over_limit(&self, sectors: u64) -> bool {
        let limit = self.freezing.side.as_ref().and_then(|side| side.limit);
        let (Some(limit), Some(view)) = (limit, &self.view) else {
            return false;
        };
        let (block, geometry) = (self.cache.block_bytes(), view.geometry);
        let (dirty, dirty_max) = self.cache.dirty();
        let more = u64::from(dirty) + (sectors * SECTOR).div_ceil(block) + 1;
        let data = view.map.data_chunks() * geometry.chunk() + more * block;
        // Both copies of each page, the headers, and what the filesystem needs
        // to know where the chunks are.
        let pages = geometry.pages().min(view.map.present() + more);
        let bitmap = (pages + 1) * 8192 + data / 64;
        data + bitmap + u64::from(dirty_max) * block > limit
    }

    /// The shadow can take no more.
    pub(super) fn shadow_is_full(&mut self, now: Instant, no_space: bool) {
        let frozen = matches!(self.freezing.stage, Stage::Frozen);
        if !frozen || self.freezing.thaw.is_some() || self.freezing.full.is_some() {
            return;
        }
        let shadow = self.shadow();
        let why = if no_space {
            "its filesystem is full"
        } else {
            "it has reached its limit"
        };
        match self.options.shadow_full {
            WhenFull::Thaw => {
                log::error!("{shadow}: {why}; thawing");
                self.freezing.thaw = Some(Thaw::Full);
            }
            WhenFull::Hold => {
                log::error!(
                    "{shadow}: {why}; no write is answered until a thaw, which comes by itself \
                     after {} s",
                    self.options.hold_max.as_secs()
                );
                self.freezing.full = Some(now + self.options.hold_max);
                // For what is acknowledged and not there yet.
                if no_space && !self.freezing.step {
                    self.submit_step(Step::Release);
                }
            }
        }
    }
}
