//! The export's disk as its target sees it: sectors in, sectors out, never
//! waiting.
//!
//! Rules kept here:
//! - Jobs that share bytes (whole blocks, where the backing wants those) are
//!   under way one after the other, in the order they came, if one of them
//!   writes. So a write that was acknowledged is what a later read sees, two
//!   writes land in their order, and no read sees half a sector.
//! - One sync at a time; all that waits when it starts is served by it, what
//!   comes later waits for the next.
//! - Memory is bounded: bytes of jobs under way, and their number.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use shadow::Extent;

use super::disk::{Disk, DiskError, Done, Job, JobId, JobKind};
use super::state::StateFile;
use crate::sys::buffer::{Buf, BufSlice};

/// The most jobs under way or waiting for their turn.
pub const JOBS_MAX: usize = 1024;
const SYNC: JobId = JobId(u32::MAX);
const SAVE: JobId = JobId(u32::MAX - 1);

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

/// Too much is under way already; nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// How a read went on.
#[derive(Debug)]
pub enum Read {
    /// Here is the data.
    Ready(BufSlice),
    /// It comes later, as [`Completed`].
    Parked,
}

/// A request that ended.
#[derive(Debug)]
pub struct Completed {
    /// Whose.
    pub token: Token,
    /// The data of a read.
    pub data: Option<BufSlice>,
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

/// Bytes of the backing, whole blocks of it.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
}

/// A job under way or waiting.
#[derive(Debug)]
struct Entry {
    token: Token,
    kind: JobKind,
    span: Span,
    /// What it counts against the limit.
    bytes: usize,
    /// Acknowledged only after a sync.
    durable: bool,
    /// The job itself, while it waits for its turn.
    waiting: Option<Job>,
}

impl Entry {
    fn excludes(&self, span: Span, writes: bool) -> bool {
        let shares = self.span.start < span.end && span.start < self.span.end;
        shares && (writes || self.kind == JobKind::Write)
    }
}

/// See the head of this file.
pub struct Volume {
    disk: Box<dyn Disk>,
    bounds: Bounds,
    align: usize,
    bufs: Bufs,
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    active: Vec<u32>,
    waiting: VecDeque<u32>,
    /// Writes among those two.
    writes: usize,
    parked: usize,
    parked_max: usize,
    /// Who is served by the sync under way, if one is.
    syncing: Option<Vec<Token>>,
    sync_next: Vec<Token>,
    save: Option<Token>,
    completed: VecDeque<Completed>,
    failures: Failures,
    last_error: Option<DiskError>,
}

impl Volume {
    /// A volume on `disk`, whose backing wants whole blocks of `align` bytes.
    /// Requests carry up to `request_max` bytes; those under way hold at most
    /// `parked_max`.
    pub fn new(
        disk: Box<dyn Disk>,
        bounds: Bounds,
        align: usize,
        request_max: usize,
        parked_max: usize,
    ) -> Volume {
        Volume {
            disk,
            bounds,
            align,
            bufs: Bufs {
                len: request_max + 2 * align,
                free: Vec::new(),
            },
            entries: std::iter::repeat_with(|| None).take(JOBS_MAX).collect(),
            free: (0..JOBS_MAX as u32).rev().collect(),
            active: Vec::with_capacity(JOBS_MAX),
            waiting: VecDeque::with_capacity(JOBS_MAX),
            writes: 0,
            parked: 0,
            parked_max,
            syncing: None,
            sync_next: Vec::new(),
            save: None,
            completed: VecDeque::new(),
            failures: Failures::default(),
            last_error: None,
        }
    }

    /// How many sectors there are.
    pub fn sectors(&self) -> u64 {
        self.bounds.sectors
    }

    /// The backing has another size now.
    pub fn resize(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// Requests may carry so many bytes from now on.
    pub fn set_request_max(&mut self, bytes: usize) {
        self.bufs.resize(bytes + 2 * self.align);
    }

    /// What the disk below failed to do.
    pub fn failures(&self) -> Failures {
        self.failures
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
        self.bufs.put(buf);
    }

    /// Reads sectors, at once if they are in memory. `extent` is within the
    /// bounds and not empty.
    pub fn read(&mut self, token: Token, extent: Extent) -> Result<Read, NoRoom> {
        let at = self.bounds.start + extent.byte_start();
        let len = extent.byte_len() as usize;
        let span = self.span(at, len as u64);
        let mut buf = self.bufs.take().ok_or(NoRoom)?;
        if !self.is_excluded(span, false) && self.disk.try_now(&mut buf[..len], at) {
            return Ok(Read::Ready(BufSlice { buf, range: 0..len }));
        }
        let job = Job::Read { at, len, buf };
        self.begin(token, JobKind::Read, span, len, false, job)?;
        Ok(Read::Parked)
    }

    /// Reads sectors and forgets them.
    pub fn verify(&mut self, token: Token, extent: Extent) -> Result<(), NoRoom> {
        let at = self.bounds.start + extent.byte_start();
        let len = extent.byte_len() as usize;
        let span = self.span(at, len as u64);
        self.begin(
            token,
            JobKind::Read,
            span,
            len,
            false,
            Job::Verify { at, len },
        )
    }

    /// Writes sectors; `durable` ones end only after a sync. `extent` is within
    /// the bounds, not empty, and as long as `data`.
    pub fn write(
        &mut self,
        token: Token,
        extent: Extent,
        data: &[u8],
        durable: bool,
    ) -> Result<(), NoRoom> {
        let at = self.bounds.start + extent.byte_start();
        let span = self.span(at, data.len() as u64);
        if !self.has_room(data.len()) {
            return Err(NoRoom);
        }
        let mut buf = self.bufs.take().ok_or(NoRoom)?;
        let start = (at % self.align as u64) as usize;
        let range = start..start + data.len();
        buf[range.clone()].copy_from_slice(data);
        let job = Job::Write {
            at,
            data: BufSlice { buf, range },
        };
        self.begin(token, JobKind::Write, span, data.len(), durable, job)
    }

    /// Discards sectors, which are zeros afterwards; like a write in every other
    /// respect.
    pub fn discard(
        &mut self,
        token: Token,
        extents: &[Extent],
        durable: bool,
    ) -> Result<(), NoRoom> {
        let Some(hull) = extents.iter().copied().reduce(Extent::hull) else {
            self.complete(token, None, true);
            return Ok(());
        };
        let span = self.span(self.bounds.start + hull.byte_start(), hull.byte_len());
        let ranges = extents
            .iter()
            .map(|e| (self.bounds.start + e.byte_start(), e.byte_len()));
        let job = Job::Discard(ranges.collect());
        self.begin(token, JobKind::Write, span, 0, durable, job)
    }

    /// Ends once all that ended before is on stable storage.
    pub fn flush(&mut self, token: Token) {
        self.sync_next.push(token);
        self.start_sync();
    }

    /// Saves the wire's state; one at a time.
    pub fn save(&mut self, token: Token, file: Arc<StateFile>, text: String) {
        debug_assert!(self.save.is_none());
        self.save = Some(token);
        self.disk.submit(SAVE, Job::Save { file, text });
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty()
            && self.waiting.is_empty()
            && self.syncing.is_none()
            && self.save.is_none()
            && self.completed.is_empty()
    }

    /// What to poll for results; `None` if they are there at once.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.disk.wake_fd()
    }

    /// Whether [`next_completed`](Volume::next_completed) is worth a call.
    pub fn has_completed(&self) -> bool {
        !self.completed.is_empty() || self.disk.has_done()
    }

    /// A request that ended, if one has.
    pub fn next_completed(&mut self) -> Option<Completed> {
        while self.completed.is_empty() {
            let done = self.disk.reap()?;
            self.finish(done);
        }
        self.completed.pop_front()
    }

    fn span(&self, at: u64, len: u64) -> Span {
        let align = self.align as u64;
        Span {
            start: at - at % align,
            end: (at + len).next_multiple_of(align),
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        !self.free.is_empty() && (self.parked == 0 || self.parked + bytes <= self.parked_max)
    }

    /// Whether a job under way or waiting must end first.
    fn is_excluded(&self, span: Span, writes: bool) -> bool {
        if self.writes == 0 && !writes {
            return false;
        }
        let mut ids = self.active.iter().chain(&self.waiting);
        ids.any(|id| self.excludes(*id, span, writes))
    }

    fn excludes(&self, id: u32, span: Span, writes: bool) -> bool {
        self.entries[id as usize]
            .as_ref()
            .is_some_and(|entry| entry.excludes(span, writes))
    }

    fn begin(
        &mut self,
        token: Token,
        kind: JobKind,
        span: Span,
        bytes: usize,
        durable: bool,
        job: Job,
    ) -> Result<(), NoRoom> {
        let id = if self.has_room(bytes) {
            self.free.pop()
        } else {
            None
        };
        let Some(id) = id else {
            self.reclaim(job);
            return Err(NoRoom);
        };
        let writes = kind == JobKind::Write;
        let mut entry = Entry {
            token,
            kind,
            span,
            bytes,
            durable,
            waiting: None,
        };
        self.parked += bytes;
        if self.is_excluded(span, writes) {
            entry.waiting = Some(job);
            self.waiting.push_back(id);
        } else {
            self.active.push(id);
            self.disk.submit(JobId(id), job);
        }
        self.writes += usize::from(writes);
        self.entries[id as usize] = Some(entry);
        Ok(())
    }

    fn reclaim(&mut self, job: Job) {
        match job {
            Job::Read { buf, .. } => self.bufs.put(buf),
            Job::Write { data, .. } => self.bufs.put(data.buf),
            _ => {}
        }
    }

    fn finish(&mut self, done: Done) {
        let ok = done.result.is_ok();
        if let Err(error) = done.result {
            match error.kind {
                JobKind::Read => self.failures.reads += 1,
                JobKind::Write => self.failures.writes += 1,
                JobKind::Sync => self.failures.syncs += 1,
                JobKind::Save => {}
            }
            self.last_error = Some(error);
        }
        match done.id {
            SYNC => {
                for token in self.syncing.take().unwrap_or_default() {
                    self.complete(token, None, ok);
                }
                self.start_sync();
            }
            SAVE => {
                if let Some(token) = self.save.take() {
                    self.complete(token, None, ok);
                }
            }
            JobId(id) => self.finish_entry(id, done.data, ok),
        }
    }

    fn finish_entry(&mut self, id: u32, data: Option<BufSlice>, ok: bool) {
        let Some(entry) = self.entries.get_mut(id as usize).and_then(Option::take) else {
            debug_assert!(false, "a job ended twice");
            return;
        };
        self.free.push(id);
        self.active.retain(|other| *other != id);
        self.parked -= entry.bytes;
        self.writes -= usize::from(entry.kind == JobKind::Write);
        let data = match data {
            Some(data) if entry.kind == JobKind::Read && ok => Some(data),
            Some(data) => {
                self.bufs.put(data.buf);
                None
            }
            None => None,
        };
        if entry.durable && ok {
            self.sync_next.push(entry.token);
            self.start_sync();
        } else {
            self.complete(entry.token, data, ok);
        }
        self.start_waiting();
    }

    /// Starts each waiting job that none before it excludes any more.
    fn start_waiting(&mut self) {
        let mut index = 0;
        while let Some(&id) = self.waiting.get(index) {
            let Some(entry) = &self.entries[id as usize] else {
                break;
            };
            let (span, writes) = (entry.span, entry.kind == JobKind::Write);
            let mut before = self.active.iter().chain(self.waiting.iter().take(index));
            if before.any(|other| self.excludes(*other, span, writes)) {
                index += 1;
                continue;
            }
            self.waiting.remove(index);
            if let Some(job) = self.entries[id as usize]
                .as_mut()
                .and_then(|e| e.waiting.take())
            {
                self.active.push(id);
                self.disk.submit(JobId(id), job);
            }
        }
    }

    fn start_sync(&mut self) {
        if self.syncing.is_none() && !self.sync_next.is_empty() {
            self.syncing = Some(std::mem::take(&mut self.sync_next));
            self.disk.submit(SYNC, Job::Sync);
        }
    }

    fn complete(&mut self, token: Token, data: Option<BufSlice>, ok: bool) {
        self.completed.push_back(Completed { token, data, ok });
    }
}

/// Buffers of one length, used again and again.
struct Bufs {
    len: usize,
    free: Vec<Buf>,
}

impl Bufs {
    fn take(&mut self) -> Option<Buf> {
        match self.free.pop() {
            Some(buf) => Some(buf),
            None => Buf::new(self.len).ok(),
        }
    }

    fn put(&mut self, buf: Buf) {
        if buf.len() >= self.len && self.free.len() < JOBS_MAX {
            self.free.push(buf);
        }
    }

    fn resize(&mut self, len: usize) {
        if len > self.len {
            self.free.clear();
        }
        self.len = len;
    }
}

#[cfg(test)]
mod tests;
