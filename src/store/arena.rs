//! The cache's memory as a file that outlives the process.
//!
//! Little endian; words are 64 bits.
//!
//! ```text
//! word  0  magic "AOEDEARN"             word 64  slot headers, 8 words each:
//!       1  version | block size << 32            0  commit: sequence number, 0 = nothing
//!       2  number of slots                       1  block: byte offset in the backing / block size
//!       3  boot id (2 words)                     2  dirty: a bit for each sector of the block
//!       5  image: device, inode,                 3  generation: counts the freezes
//!          birth time, window start,             4  zero
//!          window length (5 words)      then, on the next page: the slots,
//!      10  checksum of words 0 to 9     block size bytes each
//!      11  alive: real time, ns
//! ```
//!
//! A slot counts while its commit word is not 0, and of several of one block
//! and generation the one with the highest. Publishing writes data and header first and the
//! commit word last; a slot that counts is never written again, only retired by
//! setting the commit word to 0. So a process that dies at any instruction
//! leaves each acknowledged sector in the arena or on a synced image.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use shadow::SECTOR;

use crate::sys::buffer::Body;
use crate::sys::slots::{Slots, file_len};

const MAGIC: u64 = u64::from_le_bytes(*b"AOEDEARN");
const VERSION: u64 = 1;
const HEADERS: usize = 64;
const HEADER: usize = 8;
const CHECKSUM: usize = 10;
const ALIVE: usize = 11;

/// Which image, and which part of it, an arena belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageId {
    /// Device number: of the filesystem, or of the block device itself.
    pub device: u64,
    /// Inode; 0 for a block device.
    pub inode: u64,
    /// Birth time in nanoseconds, where the filesystem keeps it.
    pub birth: u64,
    /// First byte of the window.
    pub start: u64,
    /// Bytes of the window; of one that follows the size of the image, more
    /// than any image has.
    pub len: u64,
}

impl ImageId {
    /// Whether both are the same file or device.
    pub fn is_same_image(&self, other: &ImageId) -> bool {
        (self.device, self.inode, self.birth) == (other.device, other.inode, other.birth)
    }

    /// Whether both windows share a byte.
    pub fn overlaps(&self, other: &ImageId) -> bool {
        self.start < other.start.saturating_add(other.len)
            && other.start < self.start.saturating_add(self.len)
    }
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
}

impl fmt::Display for ArenaTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArenaTrouble::System(e) => write!(f, "{e}"),
            ArenaTrouble::Damaged(what) => write!(f, "damaged: {what}"),
            ArenaTrouble::Version(version) => write!(f, "format {version} is not known here"),
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
    count: u32,
    block: usize,
    /// The file to take away at an orderly end, if it has a name.
    path: Option<PathBuf>,
}

fn words(slots: usize) -> usize {
    HEADERS + HEADER * slots
}

impl Arena {
    /// Makes an arena in a new file. All its room is allocated here, so that
    /// there is an error now rather than a SIGBUS later.
    pub fn create(
        path: &Path,
        boot: [u64; 2],
        image: &ImageId,
        block: usize,
        count: u32,
    ) -> io::Result<Arena> {
        // Under its own name only when it is whole: whoever is killed before
        // leaves nothing that looks like a damaged one.
        let making = path.with_extension("arena.new");
        match std::fs::remove_file(&making) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&making)?;
        let made = Arena::fill(&file, boot, image, block, count).and_then(|slots| {
            let flags = RenameFlags::RENAME_NOREPLACE;
            renameat2(AT_FDCWD, &making, AT_FDCWD, path, flags)?;
            Ok(slots)
        });
        let slots = made.inspect_err(|_| {
            // The first error is the one to tell.
            let _ = std::fs::remove_file(&making);
        })?;
        Ok(Arena {
            slots,
            count,
            block,
            path: Some(path.to_owned()),
        })
    }

    /// Memory of the same form that nobody finds again: for a read-only export,
    /// and for tests.
    pub fn anonymous(block: usize, count: u32) -> io::Result<Arena> {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(c"aoede-cache", flags)?);
        let image = ImageId {
            device: 0,
            inode: 0,
            birth: 0,
            start: 0,
            len: 0,
        };
        let slots = Arena::fill(&file, [0; 2], &image, block, count)?;
        Ok(Arena {
            slots,
            count,
            block,
            path: None,
        })
    }

    fn fill(
        file: &File,
        boot: [u64; 2],
        image: &ImageId,
        block: usize,
        count: u32,
    ) -> io::Result<Slots> {
        let words = words(count as usize);
        let len = file_len(words, block, count as usize);
        fallocate(file, FallocateFlags::empty(), 0, len as i64)?;
        let mut slots = Slots::map(file, words, block, count as usize)?;
        // Only helps: what is swapped out comes back.
        let _ = slots.lock();
        let head = [
            MAGIC,
            VERSION | (block as u64) << 32,
            u64::from(count),
            boot[0],
            boot[1],
            image.device,
            image.inode,
            image.birth,
            image.start,
            image.len,
        ];
        for (index, word) in head.into_iter().enumerate() {
            slots.set_word(index, word);
        }
        slots.set_word(CHECKSUM, checksum(&head));
        Ok(slots)
    }

    /// How many slots there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The file, if it has a name.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Notes that we live, and so may change the image, at this real time. It
    /// never goes back, even if the clock does: the image may bear a time from
    /// before.
    pub fn set_alive(&mut self, nanoseconds: u64) {
        let alive = self.slots.word(ALIVE).max(nanoseconds);
        self.slots.set_word(ALIVE, alive);
    }

    /// Writes into a slot that does not count.
    pub fn write(&mut self, slot: u32, at: usize, bytes: &[u8]) {
        let written = self.slots.write(slot, at, bytes);
        assert!(written, "slot {slot} written while it is lent");
    }

    /// Copies a part of a slot into one that does not count.
    pub fn copy(&mut self, from: u32, to: u32, at: usize, len: usize) {
        let copied = self.slots.copy(from, to, at, len);
        assert!(copied, "slot {to} written while it is lent");
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

/// The word of an arena's file in which those who may change the image note
/// that they live.
#[derive(Debug)]
pub struct Pulse(Slots);

impl Pulse {
    /// Finds it in a file that may be any.
    pub fn open(path: &Path) -> Result<Pulse, ArenaTrouble> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Pulse::of(&file)
    }

    fn of(file: &File) -> Result<Pulse, ArenaTrouble> {
        if file.metadata()?.len() < file_len(HEADERS, 0, 0) as u64 {
            return Err(ArenaTrouble::Damaged("shorter than its header"));
        }
        let head = Slots::map(file, HEADERS, 512, 0)?;
        if head.word(0) != MAGIC {
            return Err(ArenaTrouble::Damaged("no arena at all"));
        }
        match head.word(1) & 0xFFFF_FFFF {
            VERSION => Ok(Pulse(head)),
            version => Err(ArenaTrouble::Version(version)),
        }
    }

    /// Real time in nanoseconds.
    pub fn alive(&self) -> u64 {
        self.0.word(ALIVE)
    }

    /// The same, from now on.
    pub fn set_alive(&mut self, nanoseconds: u64) {
        self.0.set_word(ALIVE, nanoseconds);
    }
}

/// An arena that another process left.
#[derive(Debug)]
pub struct OldArena {
    slots: Slots,
    /// The boot it was made in.
    pub boot: [u64; 2],
    /// Whose it is.
    pub image: ImageId,
    /// When its process was last known to live, real time in nanoseconds.
    pub alive: u64,
    count: u32,
    block: usize,
    /// Of each block and generation the slot that counts, in this order:
    /// generation, block.
    dirty: Vec<Version>,
}

/// A block as one generation left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    generation: u64,
    block: u64,
    slot: u32,
    /// The sectors that may be nowhere else.
    bits: u64,
}

impl OldArena {
    /// Opens and checks what a file holds. Nothing in it is believed before it
    /// was checked.
    pub fn open(path: &Path) -> Result<OldArena, ArenaTrouble> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let Pulse(head) = Pulse::of(&file)?;
        let block = (head.word(1) >> 32) as usize;
        let fixed: Vec<u64> = (0..CHECKSUM).map(|index| head.word(index)).collect();
        if head.word(CHECKSUM) != checksum(&fixed) {
            return Err(ArenaTrouble::Damaged("its header fails its checksum"));
        }
        let count = u32::try_from(fixed[2]).map_err(|_| ArenaTrouble::Damaged("too many slots"))?;
        let sectors = block / SECTOR as usize;
        let whole = block % SECTOR as usize == 0 && (1..=64).contains(&sectors);
        if !whole || len != file_len(words(count as usize), block, count as usize) {
            return Err(ArenaTrouble::Damaged(
                "its length is not what its header says",
            ));
        }
        let slots = Slots::map(&file, words(count as usize), block, count as usize)?;
        let image = ImageId {
            device: fixed[5],
            inode: fixed[6],
            birth: fixed[7],
            start: fixed[8],
            len: fixed[9],
        };
        let dirty = newest(&slots, count, block, &image)?;
        let boot = [fixed[3], fixed[4]];
        Ok(OldArena {
            alive: slots.word(ALIVE),
            slots,
            boot,
            image,
            count,
            block,
            dirty,
        })
    }

    /// Makes nothing in it count any more: all of it is where it belongs.
    pub fn retire(&mut self) {
        self.dirty.clear();
        let header = |slot: u32| HEADERS + HEADER * slot as usize;
        let mut slots: Vec<_> = (0..self.count)
            .map(|slot| (self.slots.word(header(slot)), slot))
            .filter(|(commit, _)| *commit != 0)
            .collect();
        // The oldest first: whoever is killed in between must not bring an older
        // one over a newer one.
        if !shadow::fault!("old-arena-retired-by-slot") {
            slots.sort_unstable();
        }
        for (_, slot) in slots {
            self.slots.set_word(header(slot), 0);
        }
    }

    /// How many sectors it holds that may not be on the image.
    pub fn sectors(&self) -> u64 {
        self.dirty
            .iter()
            .map(|version| u64::from(version.bits.count_ones()))
            .sum()
    }

    /// The last byte of the backing that it would write, and one.
    pub fn end(&self) -> u64 {
        let end = |version: &Version| {
            version.block * self.block as u64
                + u64::from(64 - version.bits.leading_zeros()) * SECTOR
        };
        self.dirty.iter().map(end).max().unwrap_or(0)
    }

    /// Hands out each run of sectors that may not be where it belongs: its
    /// generation, the offset in the backing, the bytes. Older generations come
    /// first, and of each the sectors in the order of their places.
    pub fn replay<E>(
        &self,
        mut write: impl FnMut(u64, u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for version in &self.dirty {
            for (first, count) in runs(version.bits) {
                let at = first as usize * SECTOR as usize;
                let len = count as usize * SECTOR as usize;
                let bytes = self.slots.bytes(version.slot, at, len);
                let place = version.block * self.block as u64 + at as u64;
                write(version.generation, place, bytes)?;
            }
        }
        Ok(())
    }
}

/// Of each block and generation the slot with the highest commit word, sorted.
fn newest(
    slots: &Slots,
    count: u32,
    block: usize,
    image: &ImageId,
) -> Result<Vec<Version>, ArenaTrouble> {
    let sectors = block / SECTOR as usize;
    let mut newest: HashMap<(u64, u64), (u64, Version)> = HashMap::new();
    for slot in 0..count {
        let header = HEADERS + HEADER * slot as usize;
        let commit = slots.word(header);
        if commit == 0 {
            continue;
        }
        let [number, bits, generation] = [1, 2, 3].map(|word| slots.word(header + word));
        let within = number.checked_mul(block as u64).is_some_and(|at| {
            let end = image.start.saturating_add(image.len);
            at < end && at.saturating_add(block as u64) > image.start
        });
        let known = sectors == 64 || bits >> sectors == 0;
        if !within || !known || bits == 0 {
            return Err(ArenaTrouble::Damaged("a slot's header means nothing"));
        }
        let version = Version {
            generation,
            block: number,
            slot,
            bits,
        };
        let entry = newest
            .entry((generation, number))
            .or_insert((commit, version));
        if commit > entry.0 {
            *entry = (commit, version);
        }
    }
    let mut list: Vec<_> = newest.into_values().map(|(_, version)| version).collect();
    list.sort_unstable();
    Ok(list)
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
mod tests {
    use super::*;
    use crate::sys::slots::watch;
    use proptest::prelude::*;

    const IMAGE: ImageId = ImageId {
        device: 1,
        inode: 2,
        birth: 3,
        start: 4096,
        len: 1 << 20,
    };

    fn arena(dir: &Path) -> (PathBuf, Arena) {
        let path = dir.join("arena");
        let arena = Arena::create(&path, [7, 8], &IMAGE, 4096, 4).unwrap();
        (path, arena)
    }

    fn replayed(path: &Path) -> Vec<(u64, Vec<u8>)> {
        let mut list = Vec::new();
        let old = OldArena::open(path).unwrap();
        let take = |_, at, bytes: &[u8]| {
            list.push((at, bytes.to_vec()));
            Ok::<(), ()>(())
        };
        old.replay(take).unwrap();
        list
    }

    #[test]
    fn what_counts_is_found_again_and_the_newest_wins() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut arena) = arena(dir.path());
        arena.write(0, 512, &[1; 1024]);
        arena.publish(0, 5, 3, 0b110, 0);
        arena.write(1, 0, &[2; 512]);
        arena.publish(1, 4, 3, 0b1, 0);
        arena.write(2, 3584, &[3; 512]);
        arena.publish(2, 6, 2, 0x80, 0);
        arena.publish(3, 9, 8, 0xFF, 0);
        arena.retire(3);
        arena.set_alive(77);
        // A clock that is set back takes nothing back.
        arena.set_alive(76);
        drop(arena);
        let expected = [
            (2 * 4096 + 3584, vec![3; 512]),
            (3 * 4096 + 512, vec![1; 1024]),
        ];
        assert_eq!(replayed(&path), expected);
        let old = OldArena::open(&path).unwrap();
        assert_eq!((old.boot, old.image, old.alive), ([7, 8], IMAGE, 77));
        assert_eq!((old.sectors(), old.end()), (3, 3 * 4096 + 1536));
    }

    #[test]
    fn what_was_replayed_does_not_count_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut arena) = arena(dir.path());
        for (slot, sequence) in [(0, 7), (1, 5), (2, 6)] {
            arena.write(slot, 0, &[sequence; 512]);
            arena.publish(slot, sequence.into(), 3, 1, 0);
        }
        drop(arena);
        let mut old = OldArena::open(&path).unwrap();
        // Killed between any two stores: the newest version or none.
        let newest = [(3 * 4096, vec![7; 512])];
        let look = move || {
            let found = replayed(&path);
            assert!(found.is_empty() || found == newest, "{found:?}");
        };
        watch::each_store(look, || old.retire());
        assert_eq!(replayed(&dir.path().join("arena")), []);
    }

    #[test]
    fn each_generation_has_a_version_of_its_own_and_the_older_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut arena) = arena(dir.path());
        for (slot, generation, fill) in [(0, 8, 1), (1, 7, 2), (2, 7, 3)] {
            arena.write(slot, 0, &[fill; 512]);
            let sequence = [6, 4, 5][slot as usize];
            arena.publish(slot, sequence, 3, 1, generation);
        }
        drop(arena);
        let expected = [(3 * 4096, vec![3; 512]), (3 * 4096, vec![1; 512])];
        assert_eq!(replayed(&path), expected);
    }

    #[test]
    fn a_pulse_is_that_of_the_arena() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut arena) = arena(dir.path());
        arena.set_alive(5);
        let mut pulse = Pulse::open(&path).unwrap();
        assert_eq!(pulse.alive(), 5);
        pulse.set_alive(9);
        assert_eq!(OldArena::open(&path).unwrap().alive, 9);
        std::fs::write(&path, [0; 8192]).unwrap();
        assert!(Pulse::open(&path).is_err());
        std::fs::write(&path, "short").unwrap();
        assert!(Pulse::open(&path).is_err());
    }

    #[test]
    fn one_cannot_be_made_where_a_file_is() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _arena) = arena(dir.path());
        assert!(Arena::create(&path, [7, 8], &IMAGE, 4096, 4).is_err());
        assert!(path.exists());
    }

    #[test]
    fn damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut arena) = arena(dir.path());
        arena.publish(0, 1, 3, 1, 0);
        drop(arena);
        let good = std::fs::read(&path).unwrap();
        let open = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            OldArena::open(&path).map(drop).map_err(|e| e.to_string())
        };
        assert_eq!(open(&good), Ok(()));
        for at in 0..88 {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(open(&bad).is_err(), "byte {at}");
        }
        for len in [0, 100, 4096, good.len() - 1] {
            assert!(open(&good[..len]).is_err(), "{len} bytes");
        }
        let header = HEADERS * 8;
        for (word, value) in [(1, u64::MAX), (1, 0), (1, 5000), (2, 0), (2, 0x100)] {
            let mut bad = good.clone();
            bad[header + word * 8..][..8].copy_from_slice(&u64::to_le_bytes(value));
            assert!(open(&bad).is_err(), "word {word} {value}");
        }
        let mut bad = good;
        bad[8] = 2;
        assert_eq!(open(&bad).unwrap_err(), "format 2 is not known here");
    }

    proptest! {
        #[test]
        fn runs_are_the_bits(bits: u64) {
            let mut again = 0u64;
            for (first, count) in runs(bits) {
                for bit in first..first + count {
                    again |= 1 << bit;
                }
            }
            prop_assert_eq!(again, bits);
        }
    }
}
