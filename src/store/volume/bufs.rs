//! Buffers for data that is under way.

use crate::sys::buffer::Buf;

/// Buffers of one length, used again and again.
pub(super) struct Bufs {
    pub len: usize,
    pub free: Vec<Buf>,
    pub max: usize,
}

impl Bufs {
    pub fn take(&mut self) -> Option<Buf> {
        match self.free.pop() {
            Some(buf) => Some(buf),
            None => Buf::new(self.len).ok(),
        }
    }

    pub fn put(&mut self, buf: Buf) {
        if buf.len() >= self.len && self.free.len() < self.max {
            self.free.push(buf);
        }
    }

    /// Only grows: requests that are under way are as long as those before.
    pub fn resize(&mut self, len: usize) {
        if len > self.len {
            self.free.clear();
            self.len = len;
        }
    }
}
