//! The cache's memory as a file that outlives the process.
//!
//! Version 2, little endian; words are 64 bits.
//!
//! ```text
//! word  0  magic "AOEDEARN"             word 64  content sums, 512 words, of a device: see `content`
//!       1  version | block size << 32       576  slot headers, 8 words each:
//!       2  number of slots                       0  commit: sequence number, 0 = nothing
//!       3  boot id (2 words)                     1  block: byte offset in the image / block size
//!       5  exported range:                       2  dirty: a bit for each sector of the block
//!          first byte, bytes                     3  generation: counts the freezes
//!       7  facts about the image,                4  zero
//!          11 words: see shadow::Facts      then, on the next page: the slots,
//!      18  checksum of words 0 to 17        block size bytes each
//!      19  1 while writes to the image are in flight
//!      20  heartbeat: real time, ns
//!      21  bytes of the exported range when the content sums were taken, 0 for never
//!      22  two stamps of the image, 4 words each: see shadow::stamp
//!      30  when it was made, ns since the boot
//!      31  real time less time since the boot at the heartbeat, ns; 0 for unknown
//!      32  the shadow of the image while that is frozen, 32 words: see `note`
//! ```
//!
//! Version 1, of aoede 0.1.0, is read as well:
//!
//! ```text
//! word  0  as above, to word 4          word 64  slot headers, as above
//!       5  image: device, inode, birth time; exported range: first byte, bytes (5 words)
//!      10  checksum of words 0 to 9
//!      11  heartbeat
//! ```
//!
//! A slot counts while its commit word is not 0, and of several of one block
//! and generation the one with the highest. Publishing writes data and header first and the
//! commit word last; a slot that counts is never written again, only retired by
//! setting the commit word to 0. So a process that dies at any instruction
//! leaves each acknowledged sector in the arena or on a synced image.
//!
//! The process holds `flock` on the file, so an arena without it is of one that
//! died. Room for slots is taken in steps, each before its first use: a full
//! filesystem is an error then, and not SIGBUS later.

pub(super) mod content;
mod note;
mod old;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, FallocateFlags, Flock, FlockArg, RenameFlags, fallocate, renameat2};
use shadow::stamp::{ARENA_MAGIC, ARENA_VERSION, Clocks, OWN, Stamp, since_boot};
use shadow::{FACT_WORDS, Facts};

use super::run_dir::PRIVATE_FILE;
use crate::sys::buffer::Body;
use crate::sys::slots::{Slots, file_len};

pub use note::{NotePlace, ShadowNote};
pub(super) use old::latest;
pub use old::{Head, OldArena, Origin};

const BOOT: usize = 3;
const RANGE: usize = 5;
const FACTS: usize = 7;
const CHECKSUM: usize = FACTS + FACT_WORDS;
const IN_FLIGHT: usize = 19;
const HEARTBEAT: usize = 20;
const CONTENT_LEN: usize = 21;
const CREATED: usize = 30;
const CLOCK: usize = 31;
const CONTENT: usize = 64;
const HEADERS: usize = CONTENT + content::SUMS;
const HEADER: usize = 8;
/// Room is taken for so many bytes of slots at once.
const STEP: usize = 4 << 20;

/// Which image, and which part of it, an arena belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageId {
    /// The image.
    pub facts: Facts,
    /// The same as aoede 0.1.0 named it.
    pub v1: V1Id,
    /// First byte of the exported range.
    pub start: u64,
    /// Bytes of the exported range; of one that follows the size of the image,
    /// more than any image has.
    pub len: u64,
}

/// An image as aoede 0.1.0 knew it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct V1Id {
    /// Device number: of the filesystem, or of the block device itself.
    pub device: u64,
    /// Inode; 0 for a block device.
    pub inode: u64,
    /// Birth time in nanoseconds, where the filesystem keeps it.
    pub birth: u64,
}

/// Why an arena cannot be used.
#[derive(Debug)]
pub enum ArenaTrouble {
    /// A system call.
    System(io::Error),
    /// It is not what its header should be.
    Damaged(&'static str),
    /// Made by a program that knows another format.
    Version(u64),
    /// The process that it belongs to lives.
    InUse,
    /// It belongs to another user.
    OtherOwner,
}

impl fmt::Display for ArenaTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArenaTrouble::System(e) => write!(f, "{e}"),
            ArenaTrouble::Damaged(what) => write!(f, "damaged: {what}"),
            ArenaTrouble::Version(version) => write!(f, "format {version} is not known here"),
            ArenaTrouble::InUse => f.write_str("its process is running"),
            ArenaTrouble::OtherOwner => f.write_str("it is not a file of the user we run as"),
        }
    }
}

impl std::error::Error for ArenaTrouble {}

impl From<io::Error> for ArenaTrouble {
    fn from(e: io::Error) -> ArenaTrouble {
        ArenaTrouble::System(e)
    }
}

/// The memory of a cache.
#[derive(Debug)]
pub struct Arena {
    slots: Slots,
    /// Locked as long as we live.
    file: Flock<File>,
    count: u32,
    block: usize,
    /// Slots of a step, and which steps have room.
    step: u32,
    has_room: Vec<bool>,
    /// No further step could be had.
    is_full: bool,
    is_writing: bool,
    /// The file to take away at an orderly end, if it has a name.
    path: Option<PathBuf>,
    /// Name of the export in log lines.
    export: String,
}

fn words(slots: usize) -> usize {
    HEADERS + HEADER * slots
}

impl Arena {
    /// Makes an arena in a new file, with room for the first step of slots.
    pub fn create(
        path: &Path,
        boot: [u64; 2],
        image: &ImageId,
        block: usize,
        count: u32,
    ) -> io::Result<Arena> {
        // Under its own name only when it is whole: a process that is killed
        // before leaves nothing that looks like a damaged one.
        let making = path.with_extension("arena.new");
        match std::fs::remove_file(&making) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(PRIVATE_FILE)
            .open(&making)?;
        let made = Arena::fill(file, boot, image, block, count).and_then(|arena| {
            let flags = RenameFlags::RENAME_NOREPLACE;
            renameat2(AT_FDCWD, &making, AT_FDCWD, path, flags)?;
            Ok(arena)
        });
        let mut arena = made.inspect_err(|_| {
            // The first error is the one to tell.
            let _ = std::fs::remove_file(&making);
        })?;
        arena.path = Some(path.to_owned());
        Ok(arena)
    }

    /// Memory of the same form that nobody finds again: for a read-only export,
    /// and for tests.
    pub fn anonymous(block: usize, count: u32) -> io::Result<Arena> {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(c"aoede-cache", flags)?);
        Arena::fill(file, [0; 2], &ImageId::default(), block, count)
    }

    fn fill(
        file: File,
        boot: [u64; 2],
        image: &ImageId,
        block: usize,
        count: u32,
    ) -> io::Result<Arena> {
        let words = words(count as usize);
        file.set_len(file_len(words, block, count as usize) as u64)?;
        let header = file_len(words, block, 0);
        fallocate(&file, FallocateFlags::empty(), 0, header as i64)?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)?;
        let mut slots = Slots::map(&file, words, block, count as usize)?;
        slots.keep_words();
        let [start, len] = [image.start, image.len];
        let head = [
            ARENA_MAGIC,
            ARENA_VERSION | (block as u64) << 32,
            u64::from(count),
            boot[0],
            boot[1],
            start,
            len,
        ];
        let head = head.into_iter().chain(image.facts.to_words());
        let head: Vec<u64> = head.collect();
        for (index, word) in head.iter().enumerate() {
            slots.set_word(index, *word);
        }
        slots.set_word(CHECKSUM, checksum(&head));
        slots.set_word(CREATED, since_boot()?);
        let step = ((STEP / block) as u32).clamp(1, count);
        let mut arena = Arena {
            slots,
            file,
            count,
            block,
            step,
            has_room: vec![false; count.div_ceil(step) as usize],
            is_full: false,
            is_writing: false,
            path: None,
            export: String::new(),
        };
        arena.take_room(0)?;
        Ok(arena)
    }

    /// Sets the name of the export in log lines.
    pub fn set_export(&mut self, export: &str) {
        export.clone_into(&mut self.export);
    }

    /// How many slots there are, with room or not yet.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many slots can be used: all, or those with room once no more was to be
    /// had.
    pub fn usable(&self) -> u32 {
        if self.is_full {
            let steps = self.steps().filter(|step| self.has_room[*step]);
            steps.map(|step| self.slots_of(step).len() as u32).sum()
        } else {
            self.count
        }
    }

    /// The slots of each step that has room.
    pub fn with_room(&self) -> impl DoubleEndedIterator<Item = std::ops::Range<u32>> + '_ {
        self.steps()
            .filter(|step| self.has_room[*step])
            .map(|step| self.slots_of(step))
    }

    /// Takes room for one more step: its slots, or `None` where there is no
    /// more.
    pub fn grow(&mut self) -> Option<std::ops::Range<u32>> {
        if self.is_full {
            return None;
        }
        let step = self.steps().find(|step| !self.has_room[*step])?;
        match self.take_room(step) {
            Ok(()) => Some(self.slots_of(step)),
            Err(e) => {
                self.is_full = true;
                let had = u64::from(self.usable()) * self.block as u64;
                let wanted = u64::from(self.count) * self.block as u64;
                let place = self.path.as_deref().and_then(Path::parent);
                log::warn!(
                    "{}: cache of {} MiB instead of {}: no more room in {}: {e}; make room there and \
                     start again, or lower cache_size",
                    self.export,
                    had >> 20,
                    wanted >> 20,
                    place.unwrap_or(Path::new("memory")).display(),
                );
                None
            }
        }
    }

    /// Gives the memory of a step back, of which no slot counts or is pinned. The
    /// first step stays.
    pub fn give_back(&mut self, step: usize) -> bool {
        let range = self.bytes_of(step);
        if step == 0 || !self.has_room[step] {
            return false;
        }
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punched = fallocate(&*self.file, how, range.start as i64, range.len() as i64);
        if punched.is_ok() {
            self.has_room[step] = false;
            // So there is space again, at least for this step.
            self.is_full = false;
        }
        punched.is_ok()
    }

    /// Whether the step of a slot has its space.
    pub fn has_space(&self, slot: u32) -> bool {
        self.has_room[(slot / self.step) as usize]
    }

    /// The numbers of the steps.
    pub fn steps(&self) -> std::ops::Range<usize> {
        0..self.has_room.len()
    }

    /// The slots of a step.
    pub fn slots_of(&self, step: usize) -> std::ops::Range<u32> {
        let first = step as u32 * self.step;
        first..(first + self.step).min(self.count)
    }

    fn bytes_of(&self, step: usize) -> std::ops::Range<usize> {
        let at = |slot: u32| file_len(words(self.count as usize), self.block, slot as usize);
        let slots = self.slots_of(step);
        at(slots.start)..at(slots.end)
    }

    fn take_room(&mut self, step: usize) -> io::Result<()> {
        let range = self.bytes_of(step);
        let (start, len) = (range.start as i64, range.len() as i64);
        fallocate(&*self.file, FallocateFlags::empty(), start, len)?;
        self.slots.keep_slots(self.slots_of(step));
        self.has_room[step] = true;
        Ok(())
    }

    /// Bytes of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The file, if it has a name.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Notes that we live, and so may change the image, at this real time in
    /// nanoseconds, which was read just now.
    pub fn set_heartbeat(&mut self, real: u64) {
        self.set_clocks(Clocks::at(real));
    }

    /// Goes back with the clock: a time that is ahead would let later changes by
    /// someone else pass for ours.
    fn set_clocks(&mut self, now: Clocks) {
        let was_set = !now.is_as_at(self.slots.word(CLOCK));
        // Killed in between, the offset is unknown, and a change is refused.
        if was_set {
            self.slots.set_word(CLOCK, 0);
        }
        self.slots.set_word(HEARTBEAT, now.real);
        // Always: what it drifted until now is not to be counted at the next start.
        self.slots.set_word(CLOCK, now.offset);
    }

    /// Notes that a write of `len` bytes at `at` of the image is about to begin:
    /// until [`writes_ended`](Arena::writes_ended) a change of the image is ours.
    pub fn write_begins(&mut self, at: u64, len: u64) {
        if !self.is_writing {
            self.is_writing = true;
            self.slots.set_word(IN_FLIGHT, 1);
        }
        self.forget_content(at, len);
    }

    /// Whether writes to the image are noted as in flight.
    pub fn is_writing(&self) -> bool {
        self.is_writing
    }

    /// Notes that no write is in flight any more, and how the image looks now.
    pub fn writes_ended(&mut self, stamp: Option<Stamp>) {
        self.set_stamp(stamp);
        self.is_writing = false;
        self.slots.set_word(IN_FLIGHT, 0);
    }

    /// Notes how the image looks now. A device has no stamp.
    pub fn set_stamp(&mut self, stamp: Option<Stamp>) {
        let Some(stamp) = stamp else { return };
        // The mtime last: killed in between, there is still the old one, which
        // with writes in flight stands for all that come after.
        for (index, word) in stamp.to_words().into_iter().enumerate().rev() {
            self.slots.set_word(OWN + index, word);
        }
    }

    /// Writes into a slot that does not count and is not pinned: the cache looks
    /// before it takes one, and hands out nothing of it before it is written.
    ///
    /// Ends the process otherwise: the slot would be published with its old bytes,
    /// and an acknowledged write would be lost. The arena outlives the process, and
    /// the next start brings what counts in it to the image.
    pub fn write(&mut self, slot: u32, at: usize, bytes: &[u8]) {
        let written = self.slots.write(slot, at, bytes);
        assert!(written, "slot {slot} written while it is pinned");
    }

    /// Copies a part of a slot into one that is as for [`write`](Arena::write),
    /// and ends the process otherwise.
    pub fn copy(&mut self, from: u32, to: u32, at: usize, len: usize) {
        let copied = self.slots.copy(from, to, at, len);
        assert!(copied, "slot {to} written while it is pinned");
    }

    /// A part of a slot, to look at now.
    pub fn bytes(&self, slot: u32, at: usize, len: usize) -> &[u8] {
        self.slots.bytes(slot, at, len)
    }

    /// A part of a slot, to be sent or written from.
    pub fn lend(&self, slot: u32, at: usize, len: usize) -> Option<Body> {
        self.slots.lend(slot, at, len).map(Body::Slot)
    }

    /// Whether a part of the slot is still being sent or written from.
    pub fn is_lent(&self, slot: u32) -> bool {
        self.slots.is_lent(slot)
    }

    /// Makes what was written into the slot count: from here on it survives us.
    pub fn publish(&mut self, slot: u32, sequence: u64, block: u64, dirty: u64, generation: u64) {
        let header = HEADERS + HEADER * slot as usize;
        if shadow::fault!("arena-commit-word-first") {
            self.slots.set_word(header, sequence);
        }
        for (word, value) in [(1, block), (2, dirty), (3, generation), (4, 0)] {
            self.slots.set_word(header + word, value);
        }
        self.slots.set_word(header, sequence);
    }

    /// Leaves a slot that counts only these dirty sectors, at least one of those
    /// that it had.
    pub fn narrow(&mut self, slot: u32, dirty: u64) {
        self.slots
            .set_word(HEADERS + HEADER * slot as usize + 2, dirty);
    }

    /// Makes the slot not count any more.
    pub fn retire(&mut self, slot: u32) {
        self.slots.set_word(HEADERS + HEADER * slot as usize, 0);
    }

    /// Takes the file away; only when nothing in it counts.
    pub fn remove(&mut self) -> io::Result<()> {
        match self.path.take() {
            Some(path) => std::fs::remove_file(path),
            None => Ok(()),
        }
    }
}

fn checksum(head: &[u64]) -> u64 {
    let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
    let mut digest = crc.digest();
    for word in head {
        digest.update(&word.to_le_bytes());
    }
    digest.finalize()
}

/// The runs of set bits, lowest first: first bit, how many.
pub(super) fn runs(mut bits: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let first = bits.trailing_zeros();
        let count = (bits >> first).trailing_ones();
        let mask = if count == 64 {
            u64::MAX
        } else {
            ((1u64 << count) - 1) << first
        };
        bits &= !mask;
        Some((first, count))
    })
}

#[cfg(test)]
mod tests;
