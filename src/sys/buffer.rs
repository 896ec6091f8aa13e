//! Memory that any disk takes: page-aligned, so good for O_DIRECT as well.

use std::io;
use std::ops::{Deref, DerefMut, Range};

use memmap2::MmapMut;

use super::slots::Loan;

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

/// Data that a reply carries, sent from where it lies.
#[derive(Debug)]
pub enum Body {
    /// A buffer of its own.
    Buf(BufSlice),
    /// A part of a slot that is lent as long as this lives.
    Slot(Loan),
    /// Bytes made for this reply.
    Bytes(Vec<u8>),
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Body::Buf(slice) => slice,
            Body::Slot(loan) => loan,
            Body::Bytes(bytes) => bytes,
        }
    }
}

impl Body {
    /// The buffer to be used again, if it was one.
    pub fn into_buf(self) -> Option<Buf> {
        match self {
            Body::Buf(slice) => Some(slice.buf),
            Body::Slot(_) | Body::Bytes(_) => None,
        }
    }
}
