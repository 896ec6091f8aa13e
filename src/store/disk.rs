//! The seam between a volume, which orders, and an engine, which does.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use shadow::stamp::Stamp;
use shadow::{BlockFile, Geometry, Page};

use super::align;
use super::split::{self, NotWritten};
use super::state::StateFile;
use crate::sys::buffer::{Body, Buf, BufSlice};

/// Which job, in the volume's own numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// What an engine works on: a file, and what files can do beyond bytes.
pub trait Backing: BlockFile {
    /// Fills `buf` if that needs no waiting; `false` if it would.
    fn read_now(&self, _buf: &mut [u8], _offset: u64) -> bool {
        false
    }

    /// `true` if [`read_now`](Backing::read_now) would find these bytes, or if that
    /// is not known. To ask begins no read.
    fn is_cached(&self, _offset: u64, _len: u64) -> bool {
        true
    }

    /// Makes these bytes zeros and gives their room back.
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Offsets and lengths of reads and writes must be multiples of this.
    fn align(&self) -> usize {
        1
    }

    /// Writes all of the pieces, one behind the other, at `offset`.
    fn write_pieces(&self, pieces: &[Body], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for piece in pieces {
            self.write_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes out what the page cache has of these bytes, and waits for it; makes
    /// nothing durable.
    fn push(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// Says that these bytes will be read soon.
    fn prefetch(&self, _offset: u64, _len: u64) {}

    /// Offsets and lengths of discards must be multiples of this.
    fn discard_align(&self) -> usize {
        self.align()
    }

    /// Fills `buf` from several places, one behind the other. Only what knows
    /// image and shadow can.
    fn gather(&self, _parts: &[Part], _buf: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes a step of a freeze. Only what knows the shadow's names can.
    fn step(&self, _step: &Step) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// How the file looks to the kernel now; `None` where that says nothing of
    /// its content.
    fn stamp(&self) -> Option<Stamp> {
        None
    }

    /// What to call it in messages.
    fn name(&self) -> String {
        "memory".into()
    }
}

impl Backing for shadow::MemoryFile {
    fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.read_at(buf, offset).is_ok()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; len as usize], offset)
    }
}

/// One piece of work. A buffer travels with its job and comes back with it.
#[derive(Debug)]
pub enum Job {
    /// Reads `len` bytes at `at` into the buffer, which has an alignment's room
    /// to spare on both sides.
    Read {
        /// Offset in the backing.
        at: u64,
        /// How many bytes.
        len: usize,
        /// Where they go.
        buf: Buf,
    },
    /// Reads from several places into the buffer, one behind the other.
    Gather {
        /// The places.
        parts: Vec<Part>,
        /// Where they go.
        buf: Buf,
    },
    /// Writes runs, each of whole aligned blocks.
    Write(Vec<Segment>),
    /// Writes bytes that a disk has refused before. What shares a block with
    /// them and is not given is read first.
    Try {
        /// Offset in the backing.
        at: u64,
        /// The data, as far into its buffer as `at` is into its block.
        data: BufSlice,
    },
    /// Says that so many bytes will be read soon.
    Prefetch {
        /// Offset in the backing.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// Reads and forgets.
    Verify {
        /// Offset in the backing.
        at: u64,
        /// How many bytes.
        len: usize,
    },
    /// Discards ranges of (offset, length).
    Discard(Vec<(u64, u64)>),
    /// Writes out a part of what the page cache has, so that the sync behind it
    /// is short.
    Push {
        /// Offset in the backing.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// Everything written before to stable storage.
    Sync,
    /// Pages of a shadow's bitmap to stable storage; before them, if so said,
    /// the data that they speak of.
    Commit {
        /// Whether there is data that must be there first.
        data_first: bool,
        /// The pages.
        pages: Vec<Page>,
    },
    /// A step of a freeze.
    Step(Step),
    /// Saves the state an export has from the wire.
    Save {
        /// Where.
        file: Arc<StateFile>,
        /// What.
        text: String,
    },
}

/// Where bytes are that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// At this offset of the image.
    Image(u64),
    /// At this offset of the shadow.
    Shadow(u64),
    /// Nowhere; they are zeros.
    Zeros,
}

/// Bytes that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where.
    pub origin: Origin,
    /// How many.
    pub len: usize,
}

/// A step of a freeze that changes files. Each may be repeated after it failed.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Makes the shadow as PATH.new, on stable storage, and records where it is.
    Create {
        /// Names it, and is part of its checksums.
        uuid: [u8; 16],
        /// The generation of what will go there.
        generation: u64,
        /// What it is to cover.
        geometry: Geometry,
        /// Bytes of the disk to take for it at once.
        reserve: u64,
    },
    /// Renames PATH.new to PATH: the image is quiesced.
    Appear,
    /// Makes PATH another inode, and marks the shadow as one to be merged.
    Seal,
    /// Takes so many bytes of the disk at once, no more and no less.
    Reserve(u64),
    /// Gives back what was taken at once.
    Release,
    /// Removes the shadow, its marker and its record.
    Vanish,
}

/// A run of bytes to be written.
#[derive(Debug)]
pub struct Segment {
    /// Offset in the backing.
    pub at: u64,
    /// The data, one piece behind the other, unchanged until the job has ended.
    pub pieces: Vec<Body>,
}

/// What kind of job a result belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// [`Job::Read`], [`Job::Gather`], [`Job::Verify`] or [`Job::Prefetch`].
    Read,
    /// [`Job::Write`], [`Job::Try`] or [`Job::Discard`].
    Write,
    /// [`Job::Push`], [`Job::Sync`] or [`Job::Commit`].
    Sync,
    /// [`Job::Step`].
    Step,
    /// [`Job::Save`].
    Save,
}

/// A job that ended.
#[derive(Debug)]
pub struct Done {
    /// Which.
    pub id: JobId,
    /// Of a read the data; of [`Job::Try`] what was given.
    pub data: Option<BufSlice>,
    /// How it went.
    pub result: Result<(), DiskError>,
}

/// Why a job failed, in words for the log.
#[derive(Debug)]
pub struct DiskError {
    /// The kind of job.
    pub kind: JobKind,
    /// On what.
    pub name: String,
    /// At which byte, where that means something.
    pub offset: Option<u64>,
    /// Of a [`Job::Write`] the bytes that were not written, of (offset, length);
    /// none if that is not known.
    pub parts: Vec<(u64, u64)>,
    /// Why.
    pub source: io::Error,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            JobKind::Read => "read",
            JobKind::Write => "write",
            JobKind::Sync => "sync",
            JobKind::Step => "freeze or thaw",
            JobKind::Save => "save",
        };
        write!(f, "{}: {what} failed", self.name)?;
        if let Some(offset) = self.offset {
            write!(f, " at sector {}", offset / shadow::SECTOR)?;
        }
        write!(f, ": {}", self.source)
    }
}

impl std::error::Error for DiskError {}

/// An engine that does jobs. Jobs that are under way together may end in any
/// order.
pub trait Disk {
    /// Takes a job, which may wait for [`kick`](Disk::kick) to begin.
    fn submit(&mut self, id: JobId, job: Job);
    /// Begins all that was taken.
    fn kick(&mut self) {}
    /// A job that ended, if one has.
    fn reap(&mut self) -> Option<Done>;
    /// A read answered from memory, or `false` at once. The kernel may begin to read
    /// what is not there.
    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool;
    /// `true` if [`try_now`](Disk::try_now) would find these bytes, or if that is not
    /// known. To ask begins no read.
    fn is_cached(&self, _offset: u64, _len: u64) -> bool {
        true
    }
    /// How the image looks to the kernel now; does not wait for the disk.
    fn stamp(&self) -> Option<Stamp> {
        None
    }
    /// Is written each time jobs have ended, so it is to be watched for edges;
    /// `None` if they end in `submit`.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;
    /// Whether a look at [`reap`](Disk::reap) is worth it; costs nothing.
    fn has_done(&mut self) -> bool;
}

impl Job {
    /// `true` if the job only reads, so that nothing durable waits for it.
    pub(super) fn is_read(&self) -> bool {
        matches!(
            self,
            Job::Read { .. } | Job::Gather { .. } | Job::Prefetch { .. } | Job::Verify { .. }
        )
    }

    /// Does the job, on whatever thread this is.
    pub(super) fn run(self, id: JobId, backing: &dyn Backing) -> Done {
        let fail = |kind, offset, result: io::Result<()>| {
            result.map_err(|source| DiskError {
                kind,
                name: backing.name(),
                offset,
                parts: Vec::new(),
                source,
            })
        };
        let mut data = None;
        let result = match self {
            Job::Read { at, len, mut buf } => {
                let (range, result) = match align::read(backing, at, len, &mut buf) {
                    Ok(range) => (range, Ok(())),
                    Err(e) => (0..0, Err(e)),
                };
                data = Some(BufSlice { buf, range });
                fail(JobKind::Read, Some(at), result)
            }
            Job::Gather { parts, mut buf } => {
                let len = parts.iter().map(|part| part.len).sum();
                let result = backing.gather(&parts, &mut buf[..len]);
                data = Some(BufSlice { buf, range: 0..len });
                fail(JobKind::Read, None, result)
            }
            Job::Write(segments) => {
                split::write(backing, &segments).map_err(|NotWritten { parts, source }| DiskError {
                    kind: JobKind::Write,
                    name: backing.name(),
                    offset: parts.first().map(|(at, _)| *at),
                    parts,
                    source,
                })
            }
            Job::Try {
                at,
                data: mut tried,
            } => {
                let result = align::write(backing, at, &mut tried);
                data = Some(tried);
                fail(JobKind::Write, Some(at), result)
            }
            Job::Prefetch { at, len } => {
                backing.prefetch(at, len);
                Ok(())
            }
            Job::Verify { at, len } => {
                let result = align::verify(backing, at, len);
                fail(JobKind::Read, Some(at), result)
            }
            Job::Discard(ranges) => {
                let bad = ranges
                    .iter()
                    .find_map(|&(at, len)| align::discard(backing, at, len).err().map(|e| (at, e)));
                match bad {
                    Some((at, e)) => fail(JobKind::Write, Some(at), Err(e)),
                    None => Ok(()),
                }
            }
            Job::Push { at, len } => fail(JobKind::Sync, Some(at), backing.push(at, len)),
            Job::Sync => fail(JobKind::Sync, None, backing.sync()),
            Job::Commit { data_first, pages } => {
                fail(JobKind::Sync, None, commit(backing, data_first, &pages))
            }
            Job::Step(step) => fail(JobKind::Step, None, backing.step(&step)),
            Job::Save { file, text } => file.save(&text).map_err(|e| DiskError {
                kind: JobKind::Save,
                name: e.path.display().to_string(),
                offset: None,
                parts: Vec::new(),
                source: e.source,
            }),
        };
        Done { id, data, result }
    }
}

/// A page says that data is where it is: the data must be there before.
fn commit(backing: &dyn Backing, data_first: bool, pages: &[Page]) -> io::Result<()> {
    if data_first && !shadow::fault!("bits-before-data-sync") {
        backing.sync()?;
    }
    for page in pages {
        backing.write_at(&page.bytes, page.offset)?;
    }
    if pages.is_empty() {
        Ok(())
    } else {
        backing.sync()
    }
}
