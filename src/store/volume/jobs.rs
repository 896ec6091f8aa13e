//! Jobs on their way to the disk and back.

use std::time::Instant;

use super::super::disk::{DiskError, Done, Job, JobId, JobKind};
use super::freeze::{COMMIT, FORGET, STEP};
use super::redo::REDO;
use super::syncs::PUSH;
use super::{DISCARD, PARKED_MAX, Refused, SAVE, SYNC, Under, Volume, reads};
use crate::sys::buffer::{Buf, BufSlice};

impl Volume {
    pub(super) fn finish(&mut self, done: Done, now: Instant) {
        let ok = done.result.is_ok();
        let mut failed = None;
        if let Err(error) = done.result {
            match error.kind {
                JobKind::Read => self.failures.reads += 1,
                JobKind::Write => self.failures.writes += 1,
                JobKind::Sync => self.failures.syncs += 1,
                JobKind::Save => {}
                JobKind::Step => return self.step_ended(Err(error), now),
            }
            // Numbered jobs tell of theirs.
            if done.id.0 < PARKED_MAX as u64 {
                failed = Some(error);
            } else {
                self.last_error = Some(error);
            }
        }
        match done.id {
            PUSH => self.pushed(ok, now),
            SYNC => self.image_synced(ok, now),
            COMMIT => self.sync_ended(ok, now),
            FORGET => self.forget_ended(ok, now),
            STEP => self.step_ended(Ok(()), now),
            DISCARD => self.discard_ended(ok, now),
            REDO => self.redo_ended(ok, now),
            SAVE => {
                if let Some(token) = self.save.take() {
                    self.complete(token, None, ok);
                }
            }
            JobId(id) => self.finish_job(id as u32, done.data, failed, now),
        }
    }

    fn finish_job(
        &mut self,
        id: u32,
        data: Option<BufSlice>,
        error: Option<DiskError>,
        now: Instant,
    ) {
        let ok = error.is_none();
        let Some(under) = self.under.get_mut(id as usize).and_then(Option::take) else {
            debug_assert!(false, "a job ended twice");
            return;
        };
        self.free.push(id);
        match under {
            Under::Fill(fill) => {
                self.fills.retain(|other| *other != id);
                self.fill_ended(fill, data.filter(|_| ok), error.as_ref(), now);
                self.last_error = error.or(self.last_error.take());
            }
            Under::Write { slots, to_shadow } => {
                self.writing -= 1;
                self.write_ended(&slots, to_shadow, error, now);
            }
            Under::Try => self.try_ended(id, data, error, now),
            Under::Verify(token) => {
                self.verifying -= 1;
                self.complete(token, None, ok);
                self.last_error = error.or(self.last_error.take());
            }
            Under::Prefetch => self.prefetches -= 1,
        }
    }

    /// Hands a job to the disk, under a number by which it is found again.
    pub(super) fn submit(&mut self, under: Under, job: Job) -> Result<u32, Refused> {
        if let Job::Write(segments) = &job {
            for segment in segments {
                let len = segment.pieces.iter().map(|piece| piece.len() as u64).sum();
                self.cache.arena().write_begins(segment.at, len);
            }
        }
        if let Job::Try { at, data } = &job {
            self.cache.arena().write_begins(*at, data.len() as u64);
        }
        let Some(id) = self.free.pop() else {
            if let Job::Read { buf, .. } = job {
                self.give_back(buf);
            }
            return Err(Refused::NoRoom);
        };
        self.under[id as usize] = Some(under);
        self.disk.submit(JobId(u64::from(id)), job);
        Ok(id)
    }

    /// Hands a job to what knows image and shadow.
    pub(super) fn submit_on_shadow(&mut self, under: Under, job: Job) -> Result<u32, Refused> {
        let (Some(side), Some(id)) = (&mut self.freezing.side, self.free.pop()) else {
            if let Job::Gather { buf, .. } = job {
                self.give_back(buf);
            }
            return Err(Refused::NoRoom);
        };
        self.under[id as usize] = Some(under);
        side.disk.submit(JobId(u64::from(id)), job);
        Ok(id)
    }

    pub(super) fn give_back(&mut self, buf: Buf) {
        if buf.len() >= reads::AHEAD_STEP {
            self.big_bufs.put(buf);
        } else {
            self.bufs.put(buf);
        }
    }
}
