//! Replies on their way out of one port.

use std::io;

use crate::sys::buffer::Body;
use crate::sys::packet::{BATCH, PacketSocket};
use crate::wire::HEAD_MAX;
use crate::wire::crc::Sum;

/// Replies that may wait for the kernel; when it takes none, further ones are
/// dropped and the initiators send again.
const CAPACITY: usize = 4 * BATCH;

/// A reply: its head, data that is sent from where it lies, and its sum.
#[derive(Debug)]
struct Reply {
    head: Box<[u8; HEAD_MAX]>,
    len: usize,
    body: Option<Body>,
    sum: Option<Sum>,
}

/// Replies in the order they were made. What a reply borrows stays untouched
/// until the kernel has taken it.
#[derive(Debug)]
pub struct Queue {
    slots: Vec<Reply>,
    first: usize,
    waiting: usize,
    /// Frames the kernel took.
    pub sent: u64,
    /// Frames it refused, or that found no room here.
    pub failed: u64,
}

/// How a flush ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Nothing waits.
    Empty,
    /// The socket's send buffer is full; the rest waits until it is writable.
    Blocked,
}

impl Queue {
    pub(super) fn new() -> Queue {
        let reply = || Reply {
            head: Box::new([0; HEAD_MAX]),
            len: 0,
            body: None,
            sum: None,
        };
        Queue {
            slots: std::iter::repeat_with(reply).take(CAPACITY).collect(),
            first: 0,
            waiting: 0,
            sent: 0,
            failed: 0,
        }
    }

    /// Room for the head of the next reply; `None` while the queue is full.
    pub fn head(&mut self) -> Option<&mut [u8]> {
        if self.waiting == CAPACITY {
            self.failed += 1;
            return None;
        }
        let slot = (self.first + self.waiting) % CAPACITY;
        Some(self.slots[slot].head.as_mut_slice())
    }

    /// Queues the reply whose first `len` bytes were written into
    /// [`head`](Queue::head), with `body` behind them, and its sum behind that.
    ///
    /// Without room the body comes back.
    pub fn push(
        &mut self,
        len: usize,
        body: Option<Body>,
        sum: Option<Sum>,
    ) -> Result<(), Option<Body>> {
        if self.waiting == CAPACITY {
            return Err(body);
        }
        let slot = (self.first + self.waiting) % CAPACITY;
        let reply = &mut self.slots[slot];
        reply.len = len.min(HEAD_MAX);
        reply.body = body;
        reply.sum = sum;
        self.waiting += 1;
        Ok(())
    }

    /// How many replies wait.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Sends what waits; bodies of replies that are gone go to `recycle`.
    ///
    /// A frame the kernel refuses for good is counted and left out: no reply
    /// may hold up those behind it, and none ends the process.
    pub(super) fn flush(
        &mut self,
        socket: &PacketSocket,
        mut recycle: impl FnMut(Option<Body>),
    ) -> Flushed {
        while self.waiting > 0 {
            let frames = (0..self.waiting.min(BATCH)).map(|n| {
                let reply = &self.slots[(self.first + n) % CAPACITY];
                [
                    &reply.head[..reply.len],
                    reply.body.as_deref().unwrap_or(&[]),
                    reply.sum.as_ref().map_or(&[], |sum| &sum[..]),
                ]
            });
            let done = match socket.send(frames) {
                Ok(sent) => {
                    self.sent += sent as u64;
                    sent
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Flushed::Blocked,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {
                    self.failed += 1;
                    1
                }
            };
            for _ in 0..done {
                if let body @ Some(_) = self.slots[self.first].body.take() {
                    recycle(body);
                }
                self.first = (self.first + 1) % CAPACITY;
                self.waiting -= 1;
            }
        }
        // From the beginning again: those heads are still in the processor's
        // cache.
        self.first = 0;
        Flushed::Empty
    }
}
