//! The ground floor of aoede: what a range of sectors is, what a file must be
//! able to do to hold them, and the shadow of a frozen image.
//!
//! While an export is frozen its image is still, and what clients write goes to
//! a sparse file beside it, the shadow. A thaw merges it back. This crate knows
//! nothing of ATA over Ethernet; both sides, image and shadow, are reached
//! through [`BlockFile`], so that tests can put a file in memory, or one that
//! fails, in their place.
//!
//! # The file
//!
//! Version 1, little endian. Chunks are counted from the first byte of the
//! image: chunk `c` is its bytes from `c * chunk` on. The shadow covers a window
//! of the image; of the first and the last chunk only the part in the window is
//! ever read or written, on both sides.
//!
//! ```text
//!          0  header, copy 0
//!       4096  header, copy 1
//!       8192  bitmap page p: copy 0 at 8192 + p * 8192, copy 1 4096 behind it
//! data_start  = 8192 + pages * 8192, rounded up to 1 MiB:
//!             chunk c at data_start + (c - first_chunk) * chunk
//!   data_end  = data_start + chunks * chunk: the least length of the file;
//!             what is behind it is room in reserve, and means nothing
//!
//! header, 4096 bytes
//!          0  "AOEDESHD"
//!          8  u32  version: 1
//!         12  u32  bytes of a chunk: a power of two, 4096 to 32768
//!         16  u64  sequence, from 1; copy = sequence & 1
//!         24       uuid, 16 bytes
//!         40  u32  state: 1 freezing, 2 frozen, 3 thawing
//!         44  u32  kind of image: 1 file, 2 block device
//!         48  u64  generation: which freeze of the image
//!         56  u64  first byte of the window in the image, a multiple of 512
//!         64  u64  bytes of the window, a multiple of 512, not 0
//!         72  u64  identity a: inode, or CRC-64/XZ of the device's name
//!         80  u64  identity b: birth of the file in ns, or 0
//!         88  u64  bytes of the whole image
//!         96       facts about the image, 11 u64: see [`Facts`]; zeros in files
//!                  of aoede 0.1.0
//!        184       the boot in which they were noted, 2 u64; zeros for unknown
//!        200       zeros
//!        504  u64  CRC-64/XZ of the bytes 0 to 504
//!        512       zeros
//!
//! bitmap page, 4096 bytes
//!          0  u64  sequence, from 1; copy = sequence & 1
//!          8  u64  CRC-64/XZ of uuid, page number (u64), sequence, bits
//!         16       two bits for each of 16320 chunks, lowest first:
//!                  0 absent (in the image), 1 data (in the shadow), 2 zeros
//! ```
//!
//! Header and pages are written in turn, so a write that is torn leaves the
//! other copy; of two whole copies the higher sequence counts. A copy of nothing
//! but zeros was never written, and such a page is all absent. A copy that is
//! damaged is passed over; where that leaves none, the shadow is refused and the
//! sectors concerned are named.
//!
//! # The order
//!
//! A write: data, sync, bits, sync. A merge: image, sync of the image, bits,
//! sync. So whatever a crash cuts off, a bit that is set has its data in the
//! shadow, and a bit that is cleared has it in the image.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod check;
mod extent;
pub mod faults;
mod file;
mod files;
mod format;
mod identity;
pub mod lock;
mod map;
mod open;
mod overlay;
pub mod paths;
pub mod stamp;
#[allow(unsafe_code)]
mod sys;
pub mod trial;

pub use check::{Finding, Other, Report, check};
pub use extent::{Extent, Lba, SECTOR};
pub use file::{BlockFile, MemoryFile};
pub use files::{Files, RealFiles, replace_text};
pub use format::{Chunk, Geometry, Page, Spec, State, VERSION, header_page};
pub use identity::{
    DeviceFacts, Difference, Facts, FileFacts, Identity, Kind, Verdict, WORDS as FACT_WORDS,
    boot_id,
};
pub use map::{Commit, Map};
pub use open::OpenError;
pub use overlay::{Progress, Shadow};
pub use paths::{Found, PathError, Paths, ShadowFile};
pub use sys::{LoopBacking, loop_backing};
