//! The engine of io_uring: the kernel does reads, writes and syncs while the
//! loop goes on; a few threads do what it has no operation for, and what it did
//! only in part.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use shadow::stamp::Stamp;

use super::align::around;
use super::disk::{Backing, Disk, DiskError, Done, Job, JobId, JobKind, Segment};
use super::image::Image;
use super::pool::Pool;
use super::volume::PARKED_MAX;
use crate::sys::buffer::{Body, Buf, BufSlice};
use crate::sys::uring::{Ended, Held, Uring};

/// Threads of each lane for the rest: a discard and a state save may be slow, and
/// a write still has one.
const HELPERS: usize = 3;

/// What must be known of a job to make something of its result.
#[derive(Clone, Copy, Debug)]
struct Asked {
    at: u64,
    len: usize,
}

/// The kernel's queue as the engine uses it. A seam: the tests put one there
/// that ends operations as they wish.
pub trait Ring {
    /// Begins a read of `len` bytes at `offset`. What it was given comes back if
    /// there is no room.
    fn read(&mut self, id: u64, buf: Buf, len: usize, offset: u64) -> Result<(), Held>;
    /// Begins a write of the pieces, one behind the other, at `offset`.
    fn write(&mut self, id: u64, pieces: Vec<Body>, offset: u64) -> Result<(), Held>;
    /// Begins a sync of all data written before.
    fn sync(&mut self, id: u64) -> Result<(), Held>;
    /// Hands everything to the kernel.
    fn submit(&mut self) -> io::Result<()>;
    /// `true` if an operation has ended.
    fn has_ended(&mut self) -> bool;
    /// An operation that ended, if one has.
    fn reap(&mut self) -> Option<Ended>;
}

impl Ring for Uring {
    fn read(&mut self, id: u64, buf: Buf, len: usize, offset: u64) -> Result<(), Held> {
        Uring::read(self, id, buf, len, offset)
    }
    fn write(&mut self, id: u64, pieces: Vec<Body>, offset: u64) -> Result<(), Held> {
        Uring::write(self, id, pieces, offset)
    }
    fn sync(&mut self, id: u64) -> Result<(), Held> {
        Uring::sync(self, id)
    }
    fn submit(&mut self) -> io::Result<()> {
        Uring::submit(self)
    }
    fn has_ended(&mut self) -> bool {
        Uring::has_ended(self)
    }
    fn reap(&mut self) -> Option<Ended> {
        Uring::reap(self)
    }
}

/// See the head of this file.
pub struct UringDisk<R: Ring = Uring> {
    // Before the image, which it works on: fields go in this order.
    ring: R,
    asked: Vec<Option<Asked>>,
    helpers: Pool,
    image: Arc<dyn Backing>,
    /// `true` if the image is read and written past the page cache.
    direct: bool,
    event: Arc<EventFd>,
    /// Whether the kernel took not all that it was handed.
    refused: bool,
}

impl UringDisk {
    /// An engine on an image; an error where the kernel gives no io_uring.
    /// It writes this event when jobs have ended.
    pub fn start(image: Arc<Image>, event: Arc<EventFd>) -> io::Result<UringDisk> {
        let ring = Uring::new(image.as_fd(), PARKED_MAX as u32 + 8, event.as_fd())?;
        let direct = image.is_direct();
        UringDisk::with(ring, image, direct, event)
    }
}

impl<R: Ring> UringDisk<R> {
    fn with(
        ring: R,
        image: Arc<dyn Backing>,
        direct: bool,
        event: Arc<EventFd>,
    ) -> io::Result<UringDisk<R>> {
        let helpers = Pool::start_with(Arc::clone(&image), HELPERS, Arc::clone(&event))?;
        let asked = vec![None; PARKED_MAX + 8];
        Ok(UringDisk {
            ring,
            asked,
            helpers,
            image,
            direct,
            event,
            refused: false,
        })
    }

    /// Remembers a job under a number of ours: that of the volume's may be any.
    fn number(id: JobId) -> usize {
        // The volume counts from 0 up, and from the top down for the few that
        // are single.
        if id.0 < PARKED_MAX as u64 {
            id.0 as usize
        } else {
            PARKED_MAX + (u64::MAX - id.0) as usize
        }
    }

    fn ended(&mut self, ended: Ended) -> Option<Done> {
        let id = JobId(ended.id);
        let asked = self
            .asked
            .get_mut(Self::number(id))
            .and_then(Option::take)?;
        let Asked { at, len } = asked;
        let (start, whole) = around(at, len, self.image.align());
        let error = |kind, offset, source| {
            Err(DiskError {
                kind,
                name: self.image.name(),
                offset,
                parts: Vec::new(),
                source,
            })
        };
        let again = matches!(&ended.result, Err(e) if matches!(
            e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)));
        let done = |data, result| Some(Done { id, data, result });
        // Done in part only, or not now: a thread does all of it, or learns why
        // that cannot be; of a write also which part of it.
        let rest = match (ended.held, ended.result) {
            (Held::Read(buf), Ok(read)) if read == whole => {
                let offset = (at - start) as usize;
                let range = offset..offset + len;
                return done(Some(BufSlice { buf, range }), Ok(()));
            }
            (Held::Write(_), Ok(written))
                if written == len || shadow::fault!("uring-short-write") =>
            {
                return done(None, Ok(()));
            }
            (Held::Sync, Ok(_)) => return done(None, Ok(())),
            (Held::Read(_), Err(e)) if !again => {
                return done(None, error(JobKind::Read, Some(at), e));
            }
            (Held::Sync, Err(e)) if !again => return done(None, error(JobKind::Sync, None, e)),
            (Held::Read(buf), _) => Job::Read { at, len, buf },
            (Held::Write(pieces), _) => Job::Write(vec![Segment { at, pieces }]),
            (Held::Sync, _) => Job::Sync,
        };
        self.helpers.submit(id, rest);
        None
    }
}

impl<R: Ring> Disk for UringDisk<R> {
    fn submit(&mut self, id: JobId, job: Job) {
        let number = Self::number(id);
        let (asked, refused) = match job {
            Job::Read { at, len, buf } => {
                let (start, whole) = around(at, len, self.image.align());
                (Asked { at, len }, self.ring.read(id.0, buf, whole, start))
            }
            // Through the page cache a write is a copy, and the kernel would
            // hand each to a thread of its own; here one thread takes them all.
            Job::Write(mut segments) if segments.len() == 1 && self.direct => {
                let Some(Segment { at, pieces }) = segments.pop() else {
                    return;
                };
                let len = pieces.iter().map(|piece| piece.len()).sum();
                (Asked { at, len }, self.ring.write(id.0, pieces, at))
            }
            Job::Sync => (Asked { at: 0, len: 0 }, self.ring.sync(id.0)),
            other => return self.helpers.submit(id, other),
        };
        match refused {
            Ok(()) => self.asked[number] = Some(asked),
            // No room in the ring: a thread does it.
            Err(Held::Read(buf)) => {
                self.helpers.submit(
                    id,
                    Job::Read {
                        at: asked.at,
                        len: asked.len,
                        buf,
                    },
                );
            }
            Err(Held::Write(pieces)) => {
                let segment = Segment {
                    at: asked.at,
                    pieces,
                };
                self.helpers.submit(id, Job::Write(vec![segment]));
            }
            Err(Held::Sync) => self.helpers.submit(id, Job::Sync),
        }
    }

    fn kick(&mut self) {
        // What the kernel does not take now it is handed in the next turn.
        self.refused = self.ring.submit().is_err();
    }

    fn reap(&mut self) -> Option<Done> {
        loop {
            if let Some(done) = self.helpers.reap() {
                return Some(done);
            }
            let ended = self.ring.reap()?;
            if let Some(done) = self.ended(ended) {
                return Some(done);
            }
        }
    }

    fn stamp(&self) -> Option<Stamp> {
        self.image.stamp()
    }

    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.image.read_now(buf, offset)
    }

    fn is_cached(&self, offset: u64, len: u64) -> bool {
        self.image.is_cached(offset, len)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn has_done(&mut self) -> bool {
        self.refused || self.helpers.has_done() || self.ring.has_ended()
    }
}

#[cfg(test)]
mod tests;
