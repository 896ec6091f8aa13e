//! Memory that any disk takes: page-aligned, so good for O_DIRECT as well.

use std::io;
use std::ops::{Deref, DerefMut, Range};

use memmap2::MmapMut;

/// Bytes aligned to a page, owned, handed from thread to thread without a copy.
#[derive(Debug)]
pub struct Buf(MmapMut);

impl Buf {
    /// `len` bytes of zeros; `len` is at least 1.
    pub fn new(len: usize) -> io::Result<Buf> {
        MmapMut::map_anon(len.max(1)).map(Buf)
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// A part of a buffer that travels with the whole of it.
#[derive(Debug)]
pub struct BufSlice {
    /// The whole.
    pub buf: Buf,
    /// Which bytes are meant.
    pub range: Range<usize>,
}

impl Deref for BufSlice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf[self.range.clone()]
    }
}

impl DerefMut for BufSlice {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buf[self.range.clone()]
    }
}
