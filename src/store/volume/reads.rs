//! Reads: from the cache, from the page cache, by fills; and reading ahead.
//!
//! What must wait for the disk waits here, each initiator's in a queue of its
//! own, and the disk gets no more than it needs (see the window). So those who
//! ask for much leave others their turn.

use std::time::Instant;

use shadow::{Extent, Lba, SECTOR};

use super::super::cache::Presence;
use super::super::disk::{Disk, DiskError, Origin, Part};
use super::super::fair::{self, Initiator, Passed};
use super::{Job, Queue, Read, Refused, Token, Under, Volume};
use crate::sys::buffer::{Body, Buf, BufSlice};

/// Bytes of one step of reading ahead.
pub(super) const AHEAD_STEP: usize = 256 << 10;
/// Steps of reading ahead that may be under way.
const AHEAD_MAX: usize = 8;
/// Steps of all readers that may be under way together, which bounds the memory
/// that they take.
const AHEAD_FILLS_MAX: usize = 16;
/// Prefetches into the page cache that may be in flight.
const PREFETCHES_MAX: usize = 16;
/// The part of the reads that the disk may have while a sync is waited for. The
/// kernel writes little at a time beside reads that wait (writeback throttling).
const SYNC_SHARE: usize = 8;
/// Verifies in flight. Nobody waits for their data, and each is long for the few
/// bytes that ask for it.
const VERIFIES_MAX: usize = 2;
/// Reads in flight that complete blocks: few, since all else that needs the disk waits
/// behind them.
const COMPLETES_MAX: usize = 16;
/// For so many reads after one that had to wait for the disk the page cache is
/// told what comes next.
const COLD: u16 = 4096;
/// Reads in a row, each behind the one before, that make a sequential reader.
const SEQUENTIAL: u32 = 3;

/// A read of the disk into the cache.
#[derive(Debug)]
pub(super) struct Fill {
    span: Extent,
    waiters: Vec<(Token, Extent)>,
    /// Whether the cache is to keep what comes.
    keep: bool,
    /// Whether it completes blocks that are to be written back whole.
    completes: bool,
    /// Whether it brings what a thaw has to merge.
    merges: bool,
    /// Who only wants to know whether it can be read.
    verifies: Option<Token>,
    /// Whether it reads the shadow.
    gathers: bool,
    /// Whether a write came meanwhile: what is read may be older than it.
    stale: bool,
    /// Blocks that were here when it began, held until it ends: written back and
    /// driven out in between, they would be missed in what was read before.
    held: Vec<u64>,
}

impl Fill {
    /// One that brings what a thaw has to merge; it holds these blocks already.
    pub fn merging(span: Extent, held: Vec<u64>) -> Fill {
        Fill {
            merges: true,
            held,
            ..Fill::of(span)
        }
    }

    /// `true` if it is for an initiator that wants the data, now or soon.
    fn is_read(&self) -> bool {
        !self.merges && !self.completes && self.verifies.is_none()
    }

    /// One that nobody waits for.
    pub fn of(span: Extent) -> Fill {
        Fill {
            span,
            waiters: Vec::new(),
            keep: false,
            completes: false,
            merges: false,
            verifies: None,
            gathers: false,
            stale: false,
            held: Vec::new(),
        }
    }
}

/// A read, or a verify, that waits for the disk or behind a discard.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitingRead {
    pub token: Token,
    pub queue: Queue,
    pub extent: Extent,
}

/// A sequential reader, or what may become one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stream {
    who: u64,
    next: u64,
    length: u32,
    /// Read ahead up to here.
    ahead: u64,
    /// Reads for which the disk is still taken to be behind the page cache.
    cold: u16,
}

impl Volume {
    /// Reads sectors, at once if they are in memory; else the request is given
    /// a token. `extent` is within the bounds and not empty.
    pub fn read(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
        initiator: Initiator,
        extent: Extent,
    ) -> Result<Read, Refused> {
        self.last_request = now;
        let extent = self.absolute(extent);
        let result = self.read_absolute(now, token, initiator.queue, extent);
        let waits = matches!(result, Ok(Read::Parked));
        self.follow(initiator.stream, extent, waits);
        result
    }

    pub(super) fn read_absolute(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
        queue: Queue,
        extent: Extent,
    ) -> Result<Read, Refused> {
        if self.discards.exclude_read(extent) {
            let token = token().ok_or(Refused::NoRoom)?;
            self.held_reads.push_back(WaitingRead {
                token,
                queue,
                extent,
            });
            return Ok(Read::Parked);
        }
        let must_wait = self.must_wait(now);
        match self.read_memory(extent, must_wait)? {
            Some(body) => Ok(Read::Ready(body)),
            None => self.read_later(now, token, queue, extent),
        }
    }

    /// `true` if a read that needs the disk has to wait for its turn.
    fn must_wait(&self, now: Instant) -> bool {
        !self.reads.is_empty() || self.reading >= self.reads_max(now)
    }

    /// Reads what is in the cache or in the page cache. If it `must_wait` otherwise,
    /// the kernel is not made to read anything: what it reads has no turn.
    fn read_memory(&mut self, extent: Extent, must_wait: bool) -> Result<Option<Body>, Refused> {
        if let Some(body) = self.cache.hit(extent) {
            return Ok(Some(body));
        }
        let len = extent.byte_len() as usize;
        let presence = self.cache.presence(extent);
        let all_here = presence == Presence::All;
        if !all_here && self.options.direct {
            return Ok(None);
        }
        let mut buf = self.bufs.take().ok_or(Refused::NoRoom)?;
        let range = if all_here {
            Some(0..len)
        } else {
            self.try_now(extent, &mut buf, must_wait)
        };
        let Some(range) = range else {
            self.bufs.put(buf);
            return Ok(None);
        };
        let mut slice = BufSlice { buf, range };
        if presence != Presence::None {
            self.cache.overlay(extent, &mut slice);
        }
        Ok(Some(Body::Buf(slice)))
    }

    /// Reads from the page cache if that needs no waiting; says where in `buf`
    /// the data is. A block that was missed lately too is read whole and kept.
    fn try_now(
        &mut self,
        extent: Extent,
        buf: &mut [u8],
        must_wait: bool,
    ) -> Option<std::ops::Range<usize>> {
        let block = self.cache.blocks_around(extent);
        let one = block.byte_len() as usize == self.cache.arena().block();
        if one && self.cache.is_wanted_again(extent) && self.is_within(block) {
            let whole = &mut buf[..block.byte_len() as usize];
            if self.view_now(block.byte_start(), whole, must_wait) {
                self.cache.keep(block, whole);
                let at = (extent.byte_start() - block.byte_start()) as usize;
                return Some(at..at + extent.byte_len() as usize);
            }
            return None;
        }
        let range = 0..extent.byte_len() as usize;
        self.view_now(extent.byte_start(), &mut buf[range.clone()], must_wait)
            .then_some(range)
    }

    /// Reads from wherever the content is, if all of that is in the page cache.
    fn view_now(&self, mut at: u64, mut buf: &mut [u8], must_wait: bool) -> bool {
        let read = |disk: &dyn Disk, buf: &mut [u8], at: u64| {
            let may = !must_wait || disk.is_cached(at, buf.len() as u64);
            may && disk.try_now(buf, at)
        };
        let view = self.view.as_ref().filter(|view| !view.is_plain());
        let (Some(view), Some(side)) = (view, &self.freezing.side) else {
            return read(&*self.disk, buf, at);
        };
        let end = at + buf.len() as u64;
        while at < end {
            let Part { origin, len } = view.run(at, end);
            let (piece, rest) = buf.split_at_mut(len);
            let here = match origin {
                Origin::Image(at) => read(&*self.disk, piece, at),
                Origin::Shadow(at) => read(&*side.disk, piece, at),
                Origin::Zeros => {
                    piece.fill(0);
                    true
                }
            };
            if !here {
                return false;
            }
            (at, buf) = (at + len as u64, rest);
        }
        true
    }

    fn is_within(&self, extent: Extent) -> bool {
        let start = self.bounds.start / SECTOR;
        extent.start().0 >= start && extent.end().0 <= start + self.bounds.sectors
    }

    /// Has a read wait: for a fill that brings it anyway, for one of its own, or
    /// for its initiator's turn.
    fn read_later(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
        queue: Queue,
        extent: Extent,
    ) -> Result<Read, Refused> {
        if let Some(id) = self.fill_for(extent) {
            let token = token().ok_or(Refused::NoRoom)?;
            self.join(id, token, extent);
            return Ok(Read::Parked);
        }
        self.window.asked(now, queue);
        if !self.must_wait(now) && !self.free.is_empty() {
            self.fill_one(now, token, extent)?;
            return Ok(Read::Parked);
        }
        if self.reads.is_full() {
            return Err(Refused::NoRoom);
        }
        let token = token().ok_or(Refused::NoRoom)?;
        let waiting = WaitingRead {
            token,
            queue,
            extent,
        };
        let pushed = self
            .reads
            .push(queue, fair::cost(extent.byte_len()), waiting);
        pushed.map_err(|_| Refused::NoRoom)?;
        Ok(Read::Parked)
    }

    /// How many reads the disk may have now. A sync waits for them twice, once
    /// with the write-back and once itself, so they leave it room.
    fn reads_max(&self, now: Instant) -> usize {
        let size = self.window.size(now);
        if self.until_synced.is_empty() {
            size
        } else {
            size / SYNC_SHARE
        }
    }

    /// A fill in flight that brings all of an extent; not one that a write has
    /// overtaken, which could be that of this reader.
    fn fill_for(&self, extent: Extent) -> Option<u32> {
        let brings = |id: &u32| {
            let Some(Under::Fill(fill)) = &self.under[*id as usize] else {
                return false;
            };
            let inside = fill.span.start() <= extent.start() && extent.end() <= fill.span.end();
            inside && !fill.stale && !fill.merges
        };
        self.fills.iter().copied().find(brings)
    }

    fn join(&mut self, id: u32, token: Token, extent: Extent) {
        if let Some(Under::Fill(fill)) = &mut self.under[id as usize] {
            fill.waiters.push((token, extent));
        }
    }

    /// Starts a fill for a read.
    fn fill_one(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
        extent: Extent,
    ) -> Result<(), Refused> {
        let span = if self.options.direct {
            self.clip(extent)
        } else {
            extent
        };
        let buf = self.buffer_for(span)?;
        let Some(token) = token() else {
            self.give_back(buf);
            return Err(Refused::NoRoom);
        };
        self.window.began(now);
        self.fill(
            Fill {
                waiters: vec![(token, extent)],
                keep: self.options.direct,
                ..Fill::of(span)
            },
            buf,
        )
    }

    /// Starts reads that have waited, each initiator's in its turn.
    pub(super) fn start_reads(&mut self, now: Instant) {
        while self.reading < self.reads_max(now) && !self.free.is_empty() {
            let Some(queue) = self.reads.turn(Passed::default()) else {
                return;
            };
            let Some(&waiting) = self.reads.head(queue) else {
                return;
            };
            let WaitingRead { token, extent, .. } = waiting;
            if self.discards.exclude_read(extent) {
                self.held_reads.push_back(waiting);
            } else if let Some(id) = self.fill_for(extent) {
                self.join(id, token, extent);
            } else {
                match self.read_memory(extent, false) {
                    Ok(Some(body)) => self.complete(token, Some(body), true),
                    Ok(None) if self.fill_one(now, || Some(token), extent).is_ok() => {}
                    // There is no memory now.
                    _ => return,
                }
            }
            self.reads.pop(queue);
        }
    }

    /// The whole blocks around an extent, as far as they are in the window.
    pub(super) fn clip(&self, extent: Extent) -> Extent {
        let blocks = self.cache.blocks_around(extent);
        let first = self.bounds.start / SECTOR;
        let start = blocks.start().0.max(first);
        let end = blocks.end().0.min(first + self.bounds.sectors);
        Extent::new(Lba(start), end.saturating_sub(start)).unwrap_or(extent)
    }

    pub(super) fn buffer_for(&mut self, span: Extent) -> Result<Buf, Refused> {
        let len = span.byte_len() as usize;
        let small = len + 2 * self.options.align <= self.bufs.len;
        let buf = if small {
            self.bufs.take()
        } else {
            self.big_bufs.take()
        };
        buf.ok_or(Refused::NoRoom)
    }

    /// Starts a fill.
    fn fill(&mut self, mut fill: Fill, buf: Buf) -> Result<(), Refused> {
        if self.free.is_empty() {
            self.give_back(buf);
            return Err(Refused::NoRoom);
        }
        self.reading += usize::from(fill.is_read());
        self.verifying += usize::from(fill.verifies.is_some());
        self.completing += usize::from(fill.completes);
        fill.held = self.cache.hold(fill.span);
        let view = self.view.as_ref().filter(|view| !view.is_plain());
        if let Some(parts) = view.and_then(|view| view.parts(fill.span)) {
            return self.gather(fill, parts, buf);
        }
        let job = Job::Read {
            at: fill.span.byte_start(),
            len: fill.span.byte_len() as usize,
            buf,
        };
        let id = self.submit(Under::Fill(fill), job)?;
        self.fills.push(id);
        Ok(())
    }

    /// Starts a fill from more than the image.
    pub(super) fn gather(
        &mut self,
        mut fill: Fill,
        parts: Vec<Part>,
        buf: Buf,
    ) -> Result<(), Refused> {
        fill.gathers = true;
        let id = self.submit_on_shadow(Under::Fill(fill), Job::Gather { parts, buf })?;
        self.gathers += 1;
        self.fills.push(id);
        Ok(())
    }

    /// Reads blocks whole that are to be written back whole.
    pub(super) fn fill_wanted(&mut self) {
        while self.completing < COMPLETES_MAX && !self.free.is_empty() {
            let Some(span) = self.cache.take_wanted() else {
                return;
            };
            let fill = Fill {
                completes: true,
                ..Fill::of(span)
            };
            let begun = self.buffer_for(span).and_then(|buf| self.fill(fill, buf));
            if begun.is_err() {
                self.cache.not_completed(span);
                return;
            }
        }
    }

    /// A write came: fills under way may bring what was there before it.
    pub(super) fn overtake_fills(&mut self, extent: Extent) {
        if shadow::fault!("fill-not-stale") {
            return;
        }
        for id in &self.fills {
            if let Some(Under::Fill(fill)) = &mut self.under[*id as usize] {
                fill.stale |= fill.span.overlaps(extent);
            }
        }
    }

    /// Whether a fill is bringing something of an extent.
    pub(super) fn is_filling(&self, extent: Extent) -> bool {
        self.fills.iter().any(|id| {
            matches!(&self.under[*id as usize], Some(Under::Fill(f)) if f.span.overlaps(extent))
        })
    }

    /// `true` if a merge is bringing something of an extent, which it will write.
    pub(super) fn is_merging(&self, extent: Extent) -> bool {
        let merges = |id: &u32| matches!(&self.under[*id as usize], Some(Under::Fill(f)) if f.merges && f.span.overlaps(extent));
        self.merge.fills() > 0 && self.fills.iter().any(merges)
    }

    pub(super) fn fill_ended(
        &mut self,
        fill: Fill,
        data: Option<BufSlice>,
        error: Option<&DiskError>,
        now: Instant,
    ) {
        self.gathers -= usize::from(fill.gathers);
        self.reading -= usize::from(fill.is_read());
        self.reads_ended += usize::from(fill.is_read());
        self.verifying -= usize::from(fill.verifies.is_some());
        self.completing -= usize::from(fill.completes);
        if fill.merges {
            let mut data = data;
            self.merge_fill_ended(fill.span, data.as_deref_mut(), now);
            if let Some(data) = data {
                self.give_back(data.buf);
            }
            self.cache.unhold(&fill.held);
            return;
        }
        if let Some(token) = fill.verifies {
            self.complete(token, None, data.is_some());
        }
        let Some(mut data) = data else {
            self.cache.unhold(&fill.held);
            for (token, extent) in fill.waiters {
                self.failed_read(token, extent);
            }
            if fill.completes {
                self.cache.not_completed(fill.span);
                self.not_completed(fill.span, error, now);
            }
            return;
        };
        if fill.completes {
            self.cache.complete(fill.span, &data, now);
            self.cache.not_completed(fill.span);
        }
        if fill.keep && !fill.stale {
            self.cache.keep(fill.span, &data);
        }
        let mut waiters = fill.waiters.into_iter();
        let last = waiters.next_back();
        let place = |extent: Extent| {
            let at = (extent.byte_start() - fill.span.byte_start()) as usize;
            at..at + extent.byte_len() as usize
        };
        for (token, extent) in waiters {
            let slice = &mut data[place(extent)];
            self.cache.overlay(extent, slice);
            let copy = self.bufs.take().map(|mut buf| {
                buf[..slice.len()].copy_from_slice(slice);
                Body::Buf(BufSlice {
                    buf,
                    range: 0..slice.len(),
                })
            });
            let ok = copy.is_some();
            self.complete(token, copy, ok);
        }
        match last {
            Some((token, extent)) => {
                let range = place(extent);
                self.cache.overlay(extent, &mut data[range.clone()]);
                let start = data.range.start;
                data.range = start + range.start..start + range.end;
                self.complete(token, Some(Body::Buf(data)), true);
            }
            None => self.give_back(data.buf),
        }
        self.cache.unhold(&fill.held);
    }

    /// The disk could not read; what was written meanwhile may still be here.
    fn failed_read(&mut self, token: Token, extent: Extent) {
        let mut body = None;
        if self.cache.covers(extent) {
            if let Some(buf) = self.bufs.take() {
                let mut slice = BufSlice {
                    buf,
                    range: 0..extent.byte_len() as usize,
                };
                self.cache.overlay(extent, &mut slice);
                body = Some(Body::Buf(slice));
            }
        }
        let ok = body.is_some();
        self.complete(token, body, ok);
    }

    /// Looks whether sectors can be read: from the disk, unless the cache has
    /// them.
    pub fn verify(
        &mut self,
        now: Instant,
        token: impl FnOnce() -> Option<Token>,
        initiator: Initiator,
        extent: Extent,
    ) -> Result<(), Refused> {
        self.last_request = now;
        let extent = self.absolute(extent);
        let queue = initiator.queue;
        if self.verifies.is_full() {
            return Err(Refused::NoRoom);
        }
        let token = token().ok_or(Refused::NoRoom)?;
        if self.cache.covers(extent) {
            self.complete(token, None, true);
            return Ok(());
        }
        let waiting = WaitingRead {
            token,
            queue,
            extent,
        };
        let pushed = self
            .verifies
            .push(queue, fair::cost(extent.byte_len()), waiting);
        pushed.map_err(|_| Refused::NoRoom)?;
        self.start_verifies();
        Ok(())
    }

    /// Starts verifies that wait, a few at a time, each initiator's in its turn.
    pub(super) fn start_verifies(&mut self) {
        while self.verifying < VERIFIES_MAX && !self.free.is_empty() {
            let Some(queue) = self.verifies.turn(Passed::default()) else {
                return;
            };
            let Some(&WaitingRead { token, extent, .. }) = self.verifies.head(queue) else {
                return;
            };
            if self.begin_verify(token, extent).is_err() {
                return;
            }
            self.verifies.pop(queue);
        }
    }

    fn begin_verify(&mut self, token: Token, extent: Extent) -> Result<(), Refused> {
        let parts = self.view.as_ref().and_then(|view| view.parts(extent));
        if parts.is_some() {
            // The way of a read, whose data nobody is sent.
            let span = if self.options.direct {
                self.clip(extent)
            } else {
                extent
            };
            let buf = self.buffer_for(span)?;
            return self.fill(
                Fill {
                    verifies: Some(token),
                    ..Fill::of(span)
                },
                buf,
            );
        }
        let job = Job::Verify {
            at: extent.byte_start(),
            len: extent.byte_len() as usize,
        };
        self.submit(Under::Verify(token), job)?;
        self.verifying += 1;
        Ok(())
    }

    /// Follows a reader, and reads ahead of it if it goes on in a row.
    fn follow(&mut self, who: u64, extent: Extent, waits: bool) {
        let (start, end) = (extent.start().0, extent.end().0);
        let known = self
            .streams
            .iter()
            .position(|s| s.who == who && s.next == start);
        let Some(index) = known else {
            let stream = Stream {
                who,
                next: end,
                length: 1,
                ahead: 0,
                cold: 0,
            };
            self.streams[self.stream_next] = stream;
            self.stream_next = (self.stream_next + 1) % self.streams.len();
            return;
        };
        let window = self.options.read_ahead / SECTOR;
        let limit = self.bounds.start / SECTOR + self.bounds.sectors;
        let stream = &mut self.streams[index];
        stream.next = end;
        stream.length = stream.length.saturating_add(1);
        stream.cold = if waits {
            COLD
        } else {
            stream.cold.saturating_sub(1)
        };
        // What the page cache has need not be announced to it.
        let pointless = !self.options.direct && stream.cold == 0;
        if stream.length < SEQUENTIAL || window == 0 || pointless {
            return;
        }
        // In whole steps, so that what is read ahead is read in large pieces.
        let step = AHEAD_STEP as u64 / SECTOR;
        let mut ahead = stream.ahead.max(end.next_multiple_of(8));
        let mut steps = Vec::new();
        while ahead < end + window && ahead + step <= limit && steps.len() < AHEAD_MAX {
            steps.push(ahead);
            ahead += step;
        }
        stream.ahead = ahead;
        for start in steps {
            self.read_ahead(Extent::new(Lba(start), step));
        }
    }

    fn read_ahead(&mut self, span: Option<Extent>) {
        let Some(span) = span else { return };
        if self.options.direct {
            let under = |id: &&u32| matches!(&self.under[**id as usize], Some(Under::Fill(f)) if f.keep && f.waiters.is_empty());
            let busy = self.fills.iter().filter(under).count() >= AHEAD_FILLS_MAX;
            if !busy && !self.discards.exclude_read(span) && !self.cache.covers(span) {
                let fill = Fill {
                    keep: true,
                    ..Fill::of(span)
                };
                // Only a favour: without room there is none.
                let _ = self.buffer_for(span).and_then(|buf| self.fill(fill, buf));
            }
        } else if self.prefetches < PREFETCHES_MAX {
            let job = Job::Prefetch {
                at: span.byte_start(),
                len: span.byte_len(),
            };
            let begun = self.submit(Under::Prefetch, job);
            self.prefetches += usize::from(begun.is_ok());
        }
    }
}
