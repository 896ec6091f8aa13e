//! The ground floor of aoede: what a range of sectors is, and what a file
//! must be able to do to hold them.
//!
//! This crate knows nothing of ATA over Ethernet. It will hold the shadow-file
//! format of a freeze (overlay, bitmap, merge); both sides of that format, the
//! image and the shadow, are reached through [`BlockFile`], so that tests can
//! put a file in memory, or one that fails, in their place.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod extent;
mod file;

pub use extent::{Extent, Lba, SECTOR};
pub use file::{BlockFile, MemoryFile};
