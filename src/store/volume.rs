//! The export's disk as its target sees it: sectors in, sectors out, never
//! waiting.
//!
//! Reads are answered from the cache, else from the page cache if that needs no
//! waiting, else by a fill. Writes go into the cache, and from there, in large
//! runs and in the order of their places, to the image. Rules kept here:
//!
//! - A read sees every write acknowledged before it: what is dirty lies over
//!   what the disk has. A fill that a write overtook is not kept.
//! - What waits for stable storage waits for an epoch (see the cache): one sync
//!   serves all that wait. Data grows no older than `max_dirty_age`.
//! - A discard comes when all before it in its range is on the disk and nothing
//!   of it is being read; what comes behind it and overlaps waits.
//! - Memory is bounded: what has no slot waits, in a queue of its initiator, and
//!   all queues together are bounded in bytes.

mod bufs;
mod discards;
mod freeze;
mod frozen;
mod health;
mod jobs;
mod marks;
mod merge;
mod progress;
mod reads;
mod redo;
mod room;
mod syncs;
mod view;
mod window;
mod writes;

use std::collections::VecDeque;
use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shadow::{Extent, Lba, SECTOR};

use super::cache::{Cache, Epoch};
use super::disk::{Disk, DiskError, Done, Job, JobId, JobKind};
use super::fair::{FairQueue, Queue, Shares};
use super::state::StateFile;
use crate::freeze::WhenFull;
use crate::sys::buffer::{Body, Buf};
use crate::text::count;

use bufs::Bufs;
use discards::Discards;
use freeze::Freezing;
use health::Health;
use marks::Marks;
use merge::Merge;
use progress::Progress;
use reads::{Fill, Stream, WaitingRead};
use redo::Redo;
use syncs::{Gather, Syncing, Trouble, Waiter};
use view::View;
use window::Window;
use writes::WaitingWrite;

pub use freeze::{LeftShadow, ShadowSide};
pub use room::shadow_limit_min;

/// The most requests of one initiator that wait for the disk, and jobs in flight.
pub const PARKED_MAX: usize = 1024;
/// Requests besides of initiators that have few.
pub const PARKED_HEADROOM: usize = 64;
/// The part of the bytes that may wait that initiators which have few of them may
/// have besides.
const HEADROOM_SHARE: usize = 16;
/// Results taken in at a time. Their replies leave before more are looked at,
/// so that initiators ask for more while the disk is still busy: a long queue is
/// kept full by small steps, not by waves.
const REAP_MAX: usize = 8;
/// Sequential readers that are told apart.
const STREAMS: usize = 32;

/// The caller's name for a request that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u32);

/// The part of the backing that is the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The byte of the backing where the export begins.
    pub start: u64,
    /// How many sectors it has.
    pub sectors: u64,
}

/// Why a request was not taken; nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too much is under way already.
    NoRoom,
    /// The disk below does not take writes any more.
    Degraded,
}

/// How a read went on.
#[derive(Debug)]
pub enum Read {
    /// Here is the data.
    Ready(Body),
    /// It comes later, as [`Completed`].
    Parked,
}

/// How a write went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// It is where it survives us.
    Done,
    /// It ends later, as [`Completed`].
    Parked,
}

/// A request that ended.
#[derive(Debug)]
pub struct Completed {
    /// Whose.
    pub token: Token,
    /// The data of a read.
    pub data: Option<Body>,
    /// Whether it was done, all of it.
    pub ok: bool,
}

/// What the disk below failed to do, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failures {
    /// Reads.
    pub reads: u64,
    /// Writes and discards.
    pub writes: u64,
    /// Syncs.
    pub syncs: u64,
}

/// How a volume treats its disk.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// Name of the export in log lines, such as `e1.1`.
    pub export: String,
    /// Name of the image in log lines: its path as it was given.
    pub image: String,
    /// The disk takes whole blocks of so many bytes.
    pub align: usize,
    /// There is no page cache between the disk and us.
    pub direct: bool,
    /// A write is acknowledged when the image has it, since our memory would
    /// not survive us.
    pub write_through: bool,
    /// Bytes that a request may carry.
    pub request_max: usize,
    /// Bytes of data that may wait for a slot.
    pub parked_max: usize,
    /// By then a write is on stable storage.
    pub max_dirty_age: Duration,
    /// After so long without a request all that is dirty is written back.
    pub idle_flush: Duration,
    /// So long a durable write waits for a disk that makes no progress.
    pub io_patience: Duration,
    /// Bytes read ahead of a sequential reader.
    pub read_ahead: u64,
    /// Jobs that write at the same time.
    pub write_depth: usize,
    /// The share of the dirty slots that a merge may have while hosts are
    /// asking, in percent.
    pub merge_share: u32,
    /// What happens when a shadow can take no more.
    pub shadow_full: WhenFull,
    /// So long writes are left unanswered at most.
    pub hold_max: Duration,
    /// A freeze that lasts so long thaws by itself; zero for never.
    pub freeze_max: Duration,
}

/// A job under way.
#[derive(Debug)]
enum Under {
    Fill(Fill),
    Write {
        slots: Vec<u32>,
        to_shadow: bool,
    },
    /// Sectors of bad ranges.
    Try,
    Verify(Token),
    Prefetch,
}

const SYNC: JobId = JobId(u64::MAX);
const SAVE: JobId = JobId(u64::MAX - 1);
const DISCARD: JobId = JobId(u64::MAX - 2);

/// See the head of this file.
pub struct Volume {
    disk: Box<dyn Disk>,
    cache: Cache,
    bounds: Bounds,
    options: VolumeOptions,
    bufs: Bufs,
    big_bufs: Bufs,
    under: Vec<Option<Under>>,
    free: Vec<u32>,
    /// Of `under`: the fills, and how many writes.
    fills: Vec<u32>,
    writing: usize,
    streams: [Stream; STREAMS],
    stream_next: usize,
    /// Writes that wait for a slot or behind others, and who has how many bytes.
    writes: FairQueue<WaitingWrite>,
    write_bytes: Shares,
    write_marks: Marks,
    discards: Discards,
    redo: Redo,
    /// Of the last write or discard that had to wait.
    sequence: u64,
    held_reads: VecDeque<WaitingRead>,
    /// Reads, and verifies, that wait for the disk.
    reads: FairQueue<WaitingRead>,
    verifies: FairQueue<WaitingRead>,
    /// How many of each the disk has; and of reads how many it may have.
    reading: usize,
    verifying: usize,
    /// Fills in flight that complete blocks.
    completing: usize,
    /// Reads that the disk has ended since the window was last told.
    reads_ended: usize,
    window: Window,
    prefetches: usize,
    until_written: VecDeque<Waiter>,
    until_synced: VecDeque<Waiter>,
    /// The epoch that is flushed for age, idleness or the end.
    flushing: Option<Epoch>,
    draining: bool,
    syncing: Option<Syncing>,
    freezing: Freezing,
    /// What is known of the shadow's content, while there is one.
    view: Option<View>,
    merge: Merge,
    /// Of the fills: those that read the shadow.
    gathers: usize,
    sync_began: Instant,
    /// The epoch that the next sync is for.
    round: Option<Epoch>,
    gather: Option<Gather>,
    save: Option<Token>,
    completed: VecDeque<Completed>,
    last_request: Instant,
    trouble: Trouble,
    progress: Progress,
    health: Health,
    failures: Failures,
    last_error: Option<DiskError>,
}

impl Volume {
    /// A volume on `disk` with `cache` before it.
    pub fn new(
        now: Instant,
        disk: Box<dyn Disk>,
        mut cache: Cache,
        bounds: Bounds,
        options: VolumeOptions,
    ) -> Volume {
        // What a process before us wrote may not be synced: the first flush
        // syncs in any case.
        cache.record_outside(now);
        let request_max = options.request_max;
        Volume {
            disk,
            bounds,
            bufs: Bufs {
                len: 0,
                free: Vec::new(),
                max: PARKED_MAX,
            },
            big_bufs: Bufs {
                len: reads::AHEAD_STEP,
                free: Vec::new(),
                max: 8,
            },
            under: std::iter::repeat_with(|| None).take(PARKED_MAX).collect(),
            free: (0..PARKED_MAX as u32).rev().collect(),
            fills: Vec::with_capacity(PARKED_MAX),
            writing: 0,
            streams: [Stream::default(); STREAMS],
            stream_next: 0,
            writes: FairQueue::new(PARKED_MAX + PARKED_HEADROOM),
            write_bytes: Shares::new(
                (options.parked_max + options.parked_max / HEADROOM_SHARE) as u64,
                (options.parked_max / HEADROOM_SHARE) as u64,
            ),
            write_marks: Marks::new(),
            discards: Discards::new(),
            redo: Redo::default(),
            sequence: 0,
            held_reads: VecDeque::new(),
            reads: FairQueue::new(PARKED_MAX + PARKED_HEADROOM),
            verifies: FairQueue::new(PARKED_MAX + PARKED_HEADROOM),
            reading: 0,
            reads_ended: 0,
            verifying: 0,
            completing: 0,
            window: Window::new(),
            prefetches: 0,
            until_written: VecDeque::new(),
            until_synced: VecDeque::new(),
            flushing: None,
            draining: false,
            syncing: None,
            freezing: Freezing::new(cache.dirty().1),
            view: None,
            merge: Merge::default(),
            gathers: 0,
            sync_began: now,
            round: None,
            gather: None,
            save: None,
            completed: VecDeque::new(),
            last_request: now,
            trouble: Trouble::default(),
            progress: Progress::new(now),
            health: Health::new(cache.block_bytes() / SECTOR),
            failures: Failures::default(),
            last_error: None,
            cache,
            options,
        }
        .with_request_max(request_max)
    }

    fn with_request_max(mut self, bytes: usize) -> Volume {
        self.set_request_max(bytes);
        self
    }

    /// How many sectors there are.
    pub fn sectors(&self) -> u64 {
        self.bounds.sectors
    }

    /// The backing has another size now. What was written behind its new end is
    /// dropped: to write it there would make the image grow again.
    pub fn resize(&mut self, now: Instant, bounds: Bounds) {
        self.note_image();
        let gone = self.bounds.sectors.saturating_sub(bounds.sectors);
        self.bounds = bounds;
        let end = Lba(bounds.start / SECTOR + bounds.sectors);
        let Some(gone) = Extent::new(end, gone).filter(|gone| !gone.is_empty()) else {
            return;
        };
        self.overtake_fills(gone);
        let dropped = self.cache.cut(end, now);
        if dropped > 0 {
            log::warn!(
                "{}: {}: the image became smaller: {} behind its new end were not written to \
                 it yet and are dropped",
                self.export(),
                self.image(),
                count(dropped, "sector")
            );
        }
        self.clear_bad(gone);
        self.fail_waiting_behind(end);
        self.fail_trials(|trial| trial.extent.end() > end);
    }

    /// Notes how the image looks now, which others than its writes have changed
    /// with our knowledge.
    pub fn note_image(&mut self) {
        let stamp = self.disk.stamp();
        self.cache.arena().set_stamp(stamp);
    }

    /// Takes over acknowledged sectors that the image did not take when they were
    /// replayed: offset in the image, and the bytes. `false` if the cache has no
    /// room for all of them.
    pub fn restore(&mut self, now: Instant, pieces: &[(u64, Vec<u8>)]) -> bool {
        pieces.iter().all(|(at, bytes)| {
            let mut at = *at;
            bytes.chunks(self.cache.arena().block()).all(|bytes| {
                let len = bytes.len() as u64;
                let extent = Extent::new(Lba(at / SECTOR), len / SECTOR);
                at += len;
                extent.is_some_and(|extent| self.cache.write(extent, bytes, now).is_ok())
            })
        })
    }

    /// Gives room of the arena back that nothing has used for a while.
    fn release_idle_cache(&mut self, now: Instant) {
        let at = self.cache.release_at(self.last_request);
        if at.is_some_and(|at| at <= now) {
            self.cache.release_idle(now);
        }
    }

    /// Requests may carry so many bytes from now on.
    pub fn set_request_max(&mut self, bytes: usize) {
        let block = self.cache.arena().block().max(self.options.align);
        self.bufs.resize(bytes + 2 * block);
    }

    /// What the disk below failed to do.
    pub fn failures(&self) -> Failures {
        self.failures
    }

    /// Whether writes are refused since the disk does not take them.
    pub fn is_degraded(&self) -> bool {
        self.trouble.is_degraded()
    }

    /// Name of the export in log lines.
    pub(super) fn export(&self) -> &str {
        &self.options.export
    }

    /// Name of the image in log lines.
    pub(super) fn image(&self) -> &str {
        &self.options.image
    }

    /// The last failure that was not asked for yet.
    pub fn take_error(&mut self) -> Option<DiskError> {
        self.last_error.take()
    }

    /// A buffer for a request's worth of bytes.
    pub fn buffer(&mut self) -> Option<Buf> {
        self.bufs.take()
    }

    /// Takes back a buffer that went out with a reply.
    pub fn recycle(&mut self, buf: Buf) {
        self.give_back(buf);
    }

    /// Saves the wire's state; one at a time.
    pub fn save(&mut self, token: Token, file: Arc<StateFile>, text: String) {
        debug_assert!(self.save.is_none());
        self.save = Some(token);
        self.disk.submit(SAVE, Job::Save { file, text });
    }

    /// From now on all that is dirty goes to stable storage at once, as before
    /// an orderly end.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether nothing is under way, and, while draining, nothing is left that
    /// is not on stable storage.
    pub fn is_idle(&self) -> bool {
        let dirty = self.draining && (self.cache.has_unsynced() || !self.is_well());
        self.free.len() == PARKED_MAX
            && (self.has_no_waiting_writes() || self.leaves_parked())
            && self.health.trials() == 0
            && self.held_reads.is_empty()
            && self.reads.is_empty()
            && self.verifies.is_empty()
            && self.until_written.is_empty()
            && self.until_synced.is_empty()
            && self.syncing.is_none()
            && self.save.is_none()
            && self.completed.is_empty()
            && (!self.draining || self.may_stop())
            && !dirty
    }

    /// The file that holds what is not on the image, if it has a name.
    pub fn arena_path(&mut self) -> Option<std::path::PathBuf> {
        self.cache.arena().path().map(std::path::Path::to_owned)
    }

    /// Takes that file away, when nothing in it is needed any more.
    pub fn remove_arena(&mut self) -> std::io::Result<()> {
        let keeps = self.cache.kept() > 0 && !shadow::fault!("arena-of-what-is-kept-removed");
        if self.cache.has_unsynced() || keeps {
            Ok(())
        } else {
            self.cache.arena().remove()
        }
    }

    /// Notes in the arena that we live, at this real time in nanoseconds.
    pub fn set_alive(&mut self, nanoseconds: u64) {
        self.cache.arena().set_heartbeat(nanoseconds);
    }

    /// What to poll for results; `None` if they are there at once.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.disk.wake_fd()
    }

    /// Whether the disk has something to take in.
    pub fn has_done(&mut self) -> bool {
        let side = self.freezing.side.as_mut();
        self.disk.has_done() || side.is_some_and(|side| side.disk.has_done())
    }

    /// Takes in what the disk has done, and starts what has to be done now. To
    /// be called after requests, when the disk wakes us, and at
    /// [`deadline`](Volume::deadline).
    pub fn advance(&mut self, now: Instant) {
        for _ in 0..REAP_MAX {
            let Some(done) = self.disk.reap() else { break };
            self.finish(done, now);
        }
        // Of its own number: reads of the image that never end must not keep
        // what frozen writes wait for from being seen.
        for _ in 0..REAP_MAX {
            let Some(done) = self.reap_shadow() else {
                break;
            };
            self.heed(&done, now);
            self.finish(done, now);
        }
        let ended = std::mem::take(&mut self.reads_ended);
        self.window.ended(now, ended, self.reading);
        self.advance_freeze(now);
        self.start_held_reads(now);
        self.start_redo(now);
        self.start_waiting(now);
        self.start_trials(now);
        self.watch_kept(now);
        if self.is_thaw_due() {
            // What had waited has filled the shadow.
            self.advance_freeze(now);
            self.start_waiting(now);
        }
        self.start_writing(now);
        // First those whose sync has ended: the next one is for whom it came
        // too early.
        self.end_waiting(now);
        self.start_sync(now);
        // Last: the disk may take things in their order.
        self.start_reads(now);
        self.start_verifies();
        self.progress.set_busy(self.has_disk_work(), now);
        self.disk.kick();
        if self.cache.arena().is_writing() && !self.is_writing() {
            let stamp = self.disk.stamp();
            self.cache.arena().writes_ended(stamp);
        }
        self.release_idle_cache(now);
    }

    fn reap_shadow(&mut self) -> Option<Done> {
        self.freezing.side.as_mut()?.disk.reap()
    }

    /// Looks whether the shadow's filesystem has room.
    fn heed(&mut self, done: &Done, now: Instant) {
        let error = done.result.as_ref().err();
        let kind = error.map(|error| error.source.kind());
        if let Some(StorageFull | QuotaExceeded | FileTooLarge) = kind {
            if matches!(error, Some(error) if error.kind != JobKind::Step) {
                self.shadow_is_full(now, true);
            }
        }
    }

    /// Whether the disk may be changing the image now.
    pub fn is_writing(&self) -> bool {
        self.writing > 0 || self.is_discarding() || self.health.is_trying()
    }

    /// Whether the disk has something to bring to stable storage.
    fn has_disk_work(&self) -> bool {
        let trials = self.health.trials() > 0;
        self.is_writing() || self.syncing.is_some() || self.freezing.step || trials
    }

    /// Whether reads wait for the disk.
    pub fn is_reading(&self) -> bool {
        self.fills.len() > self.merge.fills() || !self.reads.is_empty()
    }

    /// When [`advance`](Volume::advance) is to be called even if nothing
    /// happens.
    pub fn deadline(&self) -> Option<Instant> {
        let mut deadline = self.trouble.retry_at();
        let freeze = self.freeze_deadline();
        // What is kept is not tried before discards that are to be done again.
        let retry = self.health.deadline().filter(|_| !self.redo.is_pending());
        let mut by = |time: Instant| {
            deadline = Some(deadline.map_or(time, |other| other.min(time)));
        };
        for time in freeze.into_iter().chain(retry) {
            by(time);
        }
        let failing = self.trouble.is_failing();
        for list in [&self.until_synced, &self.until_written] {
            if let Some(waiter) = list.iter().find(|waiter| waiter.is_impatient(failing)) {
                by(self.progress.since(waiter.since) + self.options.io_patience);
            }
        }
        let silent = self.progress.silent_since();
        let silent = silent.or(failing.then_some(self.progress.at()));
        let waiting = self.oldest_waiting().into_iter();
        let oldest = waiting.chain(self.health.oldest_since()).min();
        if let (Some(silent), Some(oldest)) = (silent, oldest) {
            by(silent.max(oldest) + self.options.io_patience);
        }
        if let Some(at) = self.cache.release_at(self.last_request) {
            by(at);
        }
        if let Some(oldest) = self.cache.oldest().filter(|_| self.flushing.is_none()) {
            by(oldest + self.options.max_dirty_age / 2);
            by(self.last_request + self.options.idle_flush);
        }
        // Only where a sync could begin and waits for company.
        let may = self.destination().is_some() && !self.freezing.is_forgetting();
        let could = may && self.syncing.is_none() && self.cache.awaiting_sync() > 0;
        let waits = could && !self.trouble.is_failing() && !self.until_synced.is_empty();
        if let Some(gather) = self.gather.filter(|_| waits) {
            by(gather.until);
        }
        deadline
    }

    /// A request that ended, if one has.
    pub fn next_completed(&mut self) -> Option<Completed> {
        self.completed.pop_front()
    }

    /// An extent of the export as one of the backing.
    fn absolute(&self, extent: Extent) -> Extent {
        let start = Lba(self.bounds.start / SECTOR + extent.start().0);
        Extent::new(start, extent.count()).unwrap_or(extent)
    }

    fn complete(&mut self, token: Token, data: Option<Body>, ok: bool) {
        self.completed.push_back(Completed { token, data, ok });
    }
}

#[cfg(test)]
mod tests;
