//! An arena that another process left, or that a living one has. Nothing in it
//! is believed before it was checked.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use shadow::stamp::{self, ARENA_MAGIC, ARENA_VERSION, Clocks, OWN, Stamp, TOLD};
use shadow::{FACT_WORDS, Facts, SECTOR, Verdict};

use super::note::{NOTE, ShadowNote};
use super::{
    ArenaTrouble, BOOT, CHECKSUM, CLOCK, CONTENT, CONTENT_LEN, CREATED, FACTS, HEADER, HEADERS,
    HEARTBEAT, IN_FLIGHT, ImageId, RANGE, V1Id, checksum, content, runs,
};
use crate::store::run_dir::secure_file;
use crate::sys::slots::{Slots, file_len};

/// Words that are read of a header.
const HEAD: usize = 64;
/// Of version 1: where the checksum is, and where the slot headers begin.
const V1_CHECKSUM: usize = 10;
const V1_HEADERS: usize = 64;
/// The largest offset that a file can have.
const OFFSET_MAX: u64 = i64::MAX as u64;

/// By what an arena or a record names its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// As we do.
    Facts(Facts),
    /// As aoede 0.1.0 did.
    V1(V1Id),
}

impl Origin {
    /// Whether the image is this one. `same_boot` says that the arena was made in
    /// this boot.
    pub fn compare(&self, image: &ImageId, same_boot: bool) -> Verdict {
        match self {
            Origin::Facts(facts) => facts.compare(&image.facts, same_boot),
            Origin::V1(id) if *id == image.v1 => Verdict::Same,
            Origin::V1(_) => Verdict::Other,
        }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Facts(facts) => write!(f, "{facts}"),
            Origin::V1(V1Id {
                device,
                inode: 0,
                birth: _,
            }) => write!(f, "block device {}", number(*device)),
            Origin::V1(V1Id { device, inode, .. }) => {
                write!(
                    f,
                    "a file, inode {inode}, on filesystem {}",
                    number(*device)
                )
            }
        }
    }
}

fn number(device: u64) -> String {
    let (major, minor) = (libc::major(device), libc::minor(device));
    format!("{major}:{minor}")
}

/// What an arena's header says.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// The boot it was made in.
    pub boot: [u64; 2],
    /// Its image.
    pub origin: Origin,
    /// First byte of the exported range.
    pub start: u64,
    /// Bytes of the exported range.
    pub len: u64,
    /// When its process was last known to live, real time in nanoseconds.
    pub heartbeat: u64,
    /// Real time less time since the boot at the heartbeat, 0 for unknown; `None`
    /// of version 1, which does not keep it.
    pub clock: Option<u64>,
    /// Whether writes to the image were in flight; of version 1 that is not
    /// known, so they may have been.
    pub in_flight: bool,
    /// When it was made, in nanoseconds since the boot; 0 of version 1.
    pub created: u64,
    /// The shadow of the image, if that was frozen.
    pub shadow: Option<ShadowNote>,
    /// The later one of its stamps; `None` if it has none, as version 1.
    pub stamp: Option<Stamp>,
    content_len: u64,
    block: usize,
    count: u32,
    headers: usize,
}

impl Head {
    /// Reads and checks a header.
    pub fn read(path: &Path) -> Result<Head, ArenaTrouble> {
        Head::of(&open(path)?)
    }

    fn of(file: &File) -> Result<Head, ArenaTrouble> {
        let mut bytes = [0; HEAD * 8];
        match file.read_exact_at(&mut bytes, 0) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ArenaTrouble::Damaged("shorter than its header"));
            }
            read => read?,
        }
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| {
                word.iter()
                    .rev()
                    .fold(0, |n, byte| n << 8 | u64::from(*byte))
            })
            .collect();
        if words[0] != ARENA_MAGIC {
            return Err(ArenaTrouble::Damaged("no arena at all"));
        }
        let version = words[1] & 0xFFFF_FFFF;
        let sum = match version {
            1 => V1_CHECKSUM,
            ARENA_VERSION => CHECKSUM,
            other => return Err(ArenaTrouble::Version(other)),
        };
        if words[sum] != checksum(&words[..sum]) {
            return Err(ArenaTrouble::Damaged("its header fails its checksum"));
        }
        let count = u32::try_from(words[2]);
        let count = count.map_err(|_| ArenaTrouble::Damaged("too many slots"))?;
        let boot = [words[BOOT], words[BOOT + 1]];
        let block = (words[1] >> 32) as usize;
        let head = if version == 1 {
            Head {
                boot,
                origin: Origin::V1(V1Id {
                    device: words[5],
                    inode: words[6],
                    birth: words[7],
                }),
                start: words[8],
                len: words[9],
                heartbeat: words[stamp::V1_HEARTBEAT],
                clock: None,
                in_flight: true,
                created: 0,
                shadow: None,
                stamp: None,
                content_len: 0,
                block,
                count,
                headers: V1_HEADERS,
            }
        } else {
            let mut facts = [0; FACT_WORDS];
            facts.copy_from_slice(&words[FACTS..][..FACT_WORDS]);
            let facts = Facts::from_words(facts);
            let facts = facts.ok_or(ArenaTrouble::Damaged("its image is of no known kind"))?;
            let stamps =
                [OWN, TOLD].map(|at| Stamp::from_words([0, 1, 2, 3].map(|word| words[at + word])));
            Head {
                boot,
                origin: Origin::Facts(facts),
                start: words[RANGE],
                len: words[RANGE + 1],
                heartbeat: words[HEARTBEAT],
                clock: Some(words[CLOCK]),
                in_flight: words[IN_FLIGHT] != 0,
                created: words[CREATED],
                shadow: bytes[NOTE..].first_chunk().and_then(ShadowNote::of),
                stamp: latest(stamps),
                content_len: words[CONTENT_LEN],
                block,
                count,
                headers: HEADERS,
            }
        };
        if head
            .start
            .checked_add(head.len)
            .is_none_or(|end| end > OFFSET_MAX)
        {
            return Err(ArenaTrouble::Damaged("its range is longer than any image"));
        }
        Ok(head)
    }

    /// Whether a process that lives has it. Of version 1, whose processes lock
    /// nothing, that is not known: `false`.
    pub fn is_live(path: &Path) -> bool {
        let Ok(file) = open(path) else { return false };
        Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err()
    }
}

/// Of several stamps the one of the latest look.
pub(in crate::store) fn latest(stamps: impl IntoIterator<Item = Stamp>) -> Option<Stamp> {
    let looked = stamps.into_iter().filter(|stamp| stamp.looked > 0);
    looked.max_by_key(|stamp| stamp.looked)
}

/// Opens what may be an arena: a file of ours, and no link to another.
fn open(path: &Path) -> Result<File, ArenaTrouble> {
    if !secure_file(path)? {
        return Err(ArenaTrouble::OtherOwner);
    }
    let mut how = OpenOptions::new();
    how.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    Ok(how.open(path)?)
}

/// An arena that another process left.
#[derive(Debug)]
pub struct OldArena {
    /// What its header says.
    pub head: Head,
    slots: Slots,
    file: File,
    /// Held as long as this lives, unless it is only looked at.
    _lock: Option<Flock<File>>,
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
    /// Opens, locks and checks an arena.
    pub fn open(path: &Path) -> Result<OldArena, ArenaTrouble> {
        let file = open(path)?;
        let lock = Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, e)| match e {
            nix::errno::Errno::EWOULDBLOCK => ArenaTrouble::InUse,
            e => ArenaTrouble::System(e.into()),
        })?;
        OldArena::of(file, Some(lock))
    }

    /// Opens and checks an arena that another process may have.
    pub fn look(path: &Path) -> Result<OldArena, ArenaTrouble> {
        OldArena::of(open(path)?, None)
    }

    fn of(file: File, lock: Option<Flock<File>>) -> Result<OldArena, ArenaTrouble> {
        let head = Head::of(&file)?;
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let sectors = head.block / SECTOR as usize;
        let is_whole = head.block % SECTOR as usize == 0 && (1..=64).contains(&sectors);
        let words = head.headers + HEADER * head.count as usize;
        if !is_whole || len != file_len(words, head.block, head.count as usize) {
            return Err(ArenaTrouble::Damaged(
                "its length is not what its header says",
            ));
        }
        let slots = Slots::map(&file, words, head.block, head.count as usize)?;
        let dirty = newest(&slots, &head)?;
        Ok(OldArena {
            head,
            slots,
            file,
            _lock: lock,
            dirty,
        })
    }

    /// Makes nothing in it count any more: all of it is where it belongs.
    pub fn retire(&mut self) {
        self.dirty.clear();
        let header = |slot: u32| self.head.headers + HEADER * slot as usize;
        let mut slots: Vec<_> = (0..self.head.count)
            .map(|slot| (self.slots.word(header(slot)), slot))
            .filter(|(commit, _)| *commit != 0)
            .collect();
        // The oldest first: after a kill in between no older one may be brought
        // over a newer one.
        if !shadow::fault!("old-arena-retired-by-slot") {
            slots.sort_unstable();
        }
        for (_, slot) in slots {
            self.slots.set_word(header(slot), 0);
        }
    }

    /// Notes that we write to the image in the stead of its process, at this moment.
    pub fn note_replay(&self, now: Clocks) -> io::Result<()> {
        let put = |index: usize, word: u64| {
            self.file
                .write_all_at(&word.to_le_bytes(), index as u64 * 8)
        };
        match self.head.origin {
            Origin::V1(_) => put(stamp::V1_HEARTBEAT, now.real),
            Origin::Facts(_) => {
                // Killed in between, the offset is unknown, and a change is refused.
                put(CLOCK, 0)?;
                put(HEARTBEAT, now.real)?;
                put(CLOCK, now.offset)?;
                put(IN_FLIGHT, 1)
            }
        }
    }

    /// How many sectors it holds that may not be on the image.
    pub fn sectors(&self) -> u64 {
        self.dirty
            .iter()
            .map(|version| u64::from(version.bits.count_ones()))
            .sum()
    }

    /// The last byte of the image that it would write, and one.
    pub fn end(&self) -> u64 {
        let end = |version: &Version| {
            version.block * self.head.block as u64
                + u64::from(64 - version.bits.leading_zeros()) * SECTOR
        };
        self.dirty.iter().map(end).max().unwrap_or(0)
    }

    /// The pieces at both ends of a device that it knows and does not cover:
    /// offset in the image, bytes, checksum.
    pub fn content(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let block = self.head.block as u64;
        let covered: std::collections::HashSet<u64> =
            self.dirty.iter().map(|version| version.block).collect();
        content::pieces(self.head.start, self.head.content_len)
            .map(|(number, at)| (at, content::PIECE, self.slots.word(CONTENT + number)))
            .filter(move |(at, len, sum)| {
                let mut blocks = at / block..=(at + len - 1) / block;
                *sum != 0 && blocks.all(|block| !covered.contains(&block))
            })
    }

    /// Returns each run of sectors that may not be where it belongs: its
    /// generation, the offset in the image, the bytes. Older generations come
    /// first, and of each the sectors in the order of their places.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, &[u8])> {
        self.dirty.iter().flat_map(move |version| {
            runs(version.bits).map(move |(first, count)| {
                let at = first as usize * SECTOR as usize;
                let len = count as usize * SECTOR as usize;
                let bytes = self.slots.bytes(version.slot, at, len);
                let place = version.block * self.head.block as u64 + at as u64;
                (version.generation, place, bytes)
            })
        })
    }

    /// Hands out the same, until that fails.
    pub fn replay<E>(
        &self,
        mut write: impl FnMut(u64, u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.runs()
            .try_for_each(|(generation, at, bytes)| write(generation, at, bytes))
    }
}

/// Of each block and generation the slot with the highest commit word, sorted.
fn newest(slots: &Slots, head: &Head) -> Result<Vec<Version>, ArenaTrouble> {
    let sectors = head.block / SECTOR as usize;
    let block = head.block as u64;
    let end = head.start + head.len;
    let mut newest: HashMap<(u64, u64), (u64, Version)> = HashMap::new();
    for slot in 0..head.count {
        let header = head.headers + HEADER * slot as usize;
        let commit = slots.word(header);
        if commit == 0 {
            continue;
        }
        let [number, bits, generation] = [1, 2, 3].map(|word| slots.word(header + word));
        let within = number.checked_mul(block).is_some_and(|at| {
            at < end && at.checked_add(block).is_some_and(|end| end > head.start)
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
