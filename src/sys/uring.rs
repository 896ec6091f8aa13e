//! io_uring: reads, writes and syncs that the kernel does while we go on.
//!
//! Whatever the kernel reads from or writes into belongs to the entry of its
//! operation until that has ended: buffers come in by value and go out with the
//! result, and dropping the queue waits for all that is under way.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::buffer::{Body, Buf};

/// Operations handed to the kernel at once.
const ENTRIES: u32 = 256;

/// What an operation holds on to.
#[derive(Debug)]
pub enum Held {
    /// The buffer of a read.
    Read(Buf),
    /// The pieces of a write.
    Write(Vec<Body>),
    /// Nothing: a sync.
    Sync,
}

#[derive(Debug)]
struct Operation {
    id: u64,
    held: Held,
    /// What the kernel is told of the pieces; it may look until the end.
    vectors: Vec<libc::iovec>,
}

/// An operation that ended.
#[derive(Debug)]
pub struct Ended {
    /// Its number, as given.
    pub id: u64,
    /// What it held.
    pub held: Held,
    /// Bytes, or what went wrong.
    pub result: io::Result<usize>,
}

/// A queue of operations on one file.
pub struct Uring {
    ring: IoUring,
    file: RawFd,
    operations: Vec<Option<Operation>>,
    free: Vec<u32>,
    /// Handed to us, and not to the kernel yet.
    unsubmitted: usize,
}

// SAFETY: the raw pointers in it are those of `vectors`, which point into memory
// that the same entry owns; nothing is bound to a thread.
unsafe impl Send for Uring {}

impl Uring {
    /// A queue for up to `operations` operations at a time on a file that
    /// outlives it. `event` is written when operations end.
    pub fn new(file: BorrowedFd, operations: u32, event: BorrowedFd) -> io::Result<Uring> {
        let ring = IoUring::builder()
            .setup_cqsize(operations.next_power_of_two().max(2 * ENTRIES))
            .build(ENTRIES)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Uring {
            ring,
            file: file.as_raw_fd(),
            operations: std::iter::repeat_with(|| None)
                .take(operations as usize)
                .collect(),
            free: (0..operations).rev().collect(),
            unsubmitted: 0,
        })
    }

    /// Reads `len` bytes at `offset` into the beginning of the buffer. What it
    /// was given comes back if there is no room.
    pub fn read(&mut self, id: u64, mut buf: Buf, len: usize, offset: u64) -> Result<(), Held> {
        if len > buf.len() {
            return Err(Held::Read(buf));
        }
        let start = buf.as_mut_ptr();
        let entry = opcode::Read::new(types::Fd(self.file), start, len as u32).offset(offset);
        self.push(id, Held::Read(buf), Vec::new(), |_| entry.build())
    }

    /// Writes the pieces, one behind the other, at `offset`.
    pub fn write(&mut self, id: u64, pieces: Vec<Body>, offset: u64) -> Result<(), Held> {
        let vectors = pieces
            .iter()
            .map(|piece| libc::iovec {
                iov_base: piece.as_ptr().cast_mut().cast(),
                iov_len: piece.len(),
            })
            .collect();
        let file = types::Fd(self.file);
        self.push(id, Held::Write(pieces), vectors, |vectors| {
            opcode::Writev::new(file, vectors.as_ptr(), vectors.len() as u32)
                .offset(offset)
                .build()
        })
    }

    /// Returns once all data written before is on stable storage.
    pub fn sync(&mut self, id: u64) -> Result<(), Held> {
        let entry = opcode::Fsync::new(types::Fd(self.file)).flags(types::FsyncFlags::DATASYNC);
        self.push(id, Held::Sync, Vec::new(), |_| entry.build())
    }

    fn push(
        &mut self,
        id: u64,
        held: Held,
        vectors: Vec<libc::iovec>,
        entry: impl FnOnce(&[libc::iovec]) -> squeue::Entry,
    ) -> Result<(), Held> {
        if self.ring.submission().is_full() && self.submit().is_err() {
            return Err(held);
        }
        let Some(slot) = self.free.pop() else {
            return Err(held);
        };
        let operation = self.operations[slot as usize].insert(Operation { id, held, vectors });
        let entry = entry(&operation.vectors).user_data(u64::from(slot));
        // SAFETY: buffers and vectors that the entry points to are owned by
        // `operations[slot]`, whose heap memory does not move, until its
        // completion was taken in `reap`; Drop waits for that. The file is open
        // as long, by the caller's promise.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            self.unsubmitted += 1;
            return Ok(());
        }
        self.free.push(slot);
        let operation = self.operations[slot as usize].take();
        Err(operation.map_or(Held::Sync, |operation| operation.held))
    }

    /// Hands everything to the kernel.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(taken) => self.unsubmitted -= taken.min(self.unsubmitted),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue must be emptied first.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether an operation has ended.
    pub fn has_ended(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// An operation that ended, if one has.
    pub fn reap(&mut self) -> Option<Ended> {
        let completion = self.ring.completion().next()?;
        let slot = completion.user_data() as u32;
        let operation = self.operations.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        let result = match completion.result() {
            bytes @ 0.. => Ok(bytes as usize),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        };
        Some(Ended {
            id: operation.id,
            held: operation.held,
            result,
        })
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let all = self.operations.len();
        while self.free.len() < all {
            if self.ring.submit_and_wait(1).is_err() {
                // Memory that the kernel may still write into is never given
                // back.
                std::mem::forget(std::mem::take(&mut self.operations));
                return;
            }
            while self.reap().is_some() {}
        }
    }
}
