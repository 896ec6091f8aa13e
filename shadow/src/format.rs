//! The bytes of a shadow: headers and bitmap pages, to types and back. The
//! byte map is in the crate's documentation; the constants here are its
//! numbers, and nothing else in the crate knows one.

use std::sync::Arc;

use crc::{CRC_64_XZ, Crc, Table};

use crate::extent::{Extent, SECTOR};
use crate::identity::{Facts, Identity, Kind, WORDS as FACTS};

/// The checksum of everything, with tables large enough not to be felt when a
/// bitmap of many megabytes is opened.
pub(crate) static CRC: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_XZ);

/// Bytes of a copy of a header or of a bitmap page.
pub(crate) const PAGE: usize = 4096;
/// Bytes of both copies.
pub(crate) const PAIR: u64 = 2 * PAGE as u64;
/// Where the bitmap begins.
pub(crate) const BITMAP: u64 = PAIR;
/// Data begin at a multiple of this.
const DATA_ALIGN: u64 = 1 << 20;
/// What a header begins with.
const MAGIC: &[u8; 8] = b"AOEDESHD";
/// The version of the format that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Bytes of a header under its checksum, which follows them.
const SUMMED: usize = 504;
/// Where the facts about the image begin in a header.
const FACTS_AT: usize = 96;
/// Where the boot in which they were noted is.
const BOOT_AT: usize = FACTS_AT + 8 * FACTS;
/// Chunks of one bitmap page.
pub(crate) const PAGE_CHUNKS: u64 = 16320;
/// Words of 64 chunks in one of the two planes of a page.
pub(crate) const WORDS: usize = PAGE_CHUNKS as usize / 64;
/// Where the bits begin in a page.
const BITS: usize = 16;
/// No file lives to write a page that often; what is above is damage, and must
/// not wrap when it is counted on.
const SEQUENCE_MAX: u64 = 1 << 62;
/// The largest window in bytes: as many sectors as AoE can address.
const WINDOW_MAX: u64 = SECTOR << 48;

/// How far a freeze has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The image is still being brought to the instant of the freeze.
    Freezing,
    /// The image is still and whole; writes go to the shadow.
    Frozen,
    /// The shadow is being merged into the image.
    Thawing,
}

impl State {
    fn number(self) -> u32 {
        match self {
            State::Freezing => 1,
            State::Frozen => 2,
            State::Thawing => 3,
        }
    }

    fn of(number: u32) -> Option<State> {
        [State::Freezing, State::Frozen, State::Thawing]
            .into_iter()
            .find(|state| state.number() == number)
    }

    /// The word for it, as the tool and messages say it.
    pub fn name(self) -> &'static str {
        match self {
            State::Freezing => "freezing",
            State::Frozen => "frozen",
            State::Thawing => "thawing",
        }
    }
}

/// Where the content of a chunk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Chunk {
    /// In the image.
    #[default]
    Absent,
    /// In the shadow.
    Data,
    /// Nowhere: it is zeros.
    Zero,
}

/// Which part of an image a shadow covers, and where things lie in its file.
///
/// Chunks are counted from the first byte of the image, whatever the window: a
/// chunk number is a byte's offset in the image divided by the chunk size. All
/// arithmetic on one cannot wrap; `new` has seen to that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    shift: u32,
    start: u64,
    len: u64,
}

impl Geometry {
    /// A window of `len` bytes from byte `start` of the image, in chunks of so
    /// many bytes.
    ///
    /// `None` unless the chunk is a power of two from 4096 to 32768, start and
    /// length are multiples of 512, and the length is neither 0 nor more than
    /// AoE can address; or if the file could not be that long.
    pub fn new(chunk: u32, start: u64, len: u64) -> Option<Geometry> {
        let fits = chunk.is_power_of_two()
            && (4096..=32768).contains(&chunk)
            && start % SECTOR == 0
            && len % SECTOR == 0
            && (1..=WINDOW_MAX).contains(&len);
        let end = start.checked_add(len)?;
        // With some room below the largest offset of a file: the shadow is
        // longer than the window by its bitmap, 1/2040 of it at most.
        if !fits || end > i64::MAX as u64 - WINDOW_MAX {
            return None;
        }
        Some(Geometry {
            shift: chunk.trailing_zeros(),
            start,
            len,
        })
    }

    /// Bytes of a chunk.
    pub fn chunk(&self) -> u64 {
        1 << self.shift
    }

    /// The first byte of the window, counted in the image.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of the window, never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The byte behind the window, counted in the image.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The chunk with the first byte of the window.
    pub fn first_chunk(&self) -> u64 {
        self.start >> self.shift
    }

    /// How many chunks have a byte in the window.
    pub fn chunks(&self) -> u64 {
        self.chunk_of(self.end() - 1) - self.first_chunk() + 1
    }

    /// How many bitmap pages there are.
    pub fn pages(&self) -> u64 {
        self.chunks().div_ceil(PAGE_CHUNKS)
    }

    /// The chunk of a byte of the image.
    pub fn chunk_of(&self, byte: u64) -> u64 {
        byte >> self.shift
    }

    /// Where the data of the first chunk lie in the shadow.
    pub fn data_start(&self) -> u64 {
        (BITMAP + self.pages() * PAIR).next_multiple_of(DATA_ALIGN)
    }

    /// Where a byte of the image, in a chunk of the window, has its place in
    /// the shadow.
    pub fn data_offset(&self, byte: u64) -> u64 {
        self.data_start() + (byte - (self.first_chunk() << self.shift))
    }

    /// The length of a shadow without what is kept in reserve behind it.
    pub fn data_end(&self) -> u64 {
        self.data_start() + (self.chunks() << self.shift)
    }

    /// The part of a chunk that lies in the window: its first byte, counted in
    /// the image, and how many. Nothing, at the window's start, for a chunk
    /// outside of it.
    pub fn within(&self, chunk: u64) -> (u64, u64) {
        let first = chunk.saturating_mul(self.chunk()).max(self.start);
        let end = chunk
            .saturating_add(1)
            .saturating_mul(self.chunk())
            .min(self.end());
        if first < end {
            (first, end - first)
        } else {
            (self.start, 0)
        }
    }

    /// The chunks of a bitmap page: the first, and the one behind the last.
    pub(crate) fn chunks_of_page(&self, page: u64) -> (u64, u64) {
        let first = self.first_chunk() + page * PAGE_CHUNKS;
        let end = self.first_chunk() + self.chunks();
        (first, (first + PAGE_CHUNKS).min(end))
    }

    /// The sectors of the image, counted from its beginning, that a bitmap page
    /// speaks of.
    pub fn sectors_of_page(&self, page: u64) -> Extent {
        let (first, end) = self.chunks_of_page(page);
        let (from, _) = self.within(first);
        let (last, len) = self.within(end - 1);
        Extent::from_bytes(from, last + len - from)
    }
}

/// All that a header says which does not change while the shadow lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// A random number of this shadow; its pages are sealed with it, so that
    /// none of an older file is taken for one of this.
    pub uuid: [u8; 16],
    /// Which freeze of the image this is.
    pub generation: u64,
    /// The window and the chunks.
    pub geometry: Geometry,
    /// The image.
    pub identity: Identity,
}

impl Spec {
    /// Whether the window ends with or before the image.
    pub(crate) fn fits(&self) -> bool {
        self.geometry.end() <= self.identity.bytes
    }
}

/// Bytes to be written at a place of the shadow's file, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Where, in bytes.
    pub offset: u64,
    /// What; 4096 of them. Shared, so that a job can own them as well.
    pub bytes: Arc<[u8]>,
}

/// One of the two copies of a header or page, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Copied<T> {
    /// All zeros: it was never written.
    Never,
    /// It cannot be used, and why.
    Damaged(&'static str),
    /// A header of a format that is not known here.
    Version(u32),
    /// It is whole.
    Valid(T),
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) spec: Spec,
    pub(crate) state: State,
    pub(crate) sequence: u64,
}

/// The header with this state and sequence number, and its place: the even
/// numbers go to the first copy, the odd ones to the second. Numbers begin at
/// 1 and go up by one, so that a write that is torn hits the older copy.
pub fn header_page(spec: &Spec, state: State, sequence: u64) -> Page {
    let Spec {
        uuid,
        generation,
        geometry,
        identity,
    } = spec;
    let kind = match identity.kind {
        Kind::File => 1u32,
        Kind::Device => 2,
    };
    let mut bytes = [0; PAGE];
    bytes[0..8].copy_from_slice(MAGIC);
    put32(&mut bytes, 8, VERSION);
    put32(&mut bytes, 12, geometry.chunk() as u32);
    put64(&mut bytes, 16, sequence);
    bytes[24..40].copy_from_slice(uuid);
    put32(&mut bytes, 40, state.number());
    put32(&mut bytes, 44, kind);
    put64(&mut bytes, 48, *generation);
    put64(&mut bytes, 56, geometry.start());
    put64(&mut bytes, 64, geometry.len());
    put64(&mut bytes, 72, identity.a);
    put64(&mut bytes, 80, identity.b);
    put64(&mut bytes, 88, identity.bytes);
    for (index, word) in identity.facts.to_words().into_iter().enumerate() {
        put64(&mut bytes, FACTS_AT + 8 * index, word);
    }
    put64(&mut bytes, BOOT_AT, identity.boot[0]);
    put64(&mut bytes, BOOT_AT + 8, identity.boot[1]);
    let sum = CRC.checksum(&bytes[..SUMMED]);
    put64(&mut bytes, SUMMED, sum);
    Page {
        offset: (sequence & u64::from(!crate::fault!("header-over-itself"))) * PAGE as u64,
        bytes: Arc::new(bytes),
    }
}

impl Header {
    /// What is wrong with bytes that never were a header.
    pub(crate) const FOREIGN: &str = "no header of a shadow";

    /// Reads copy `copy` (0 or 1) of a header.
    pub(crate) fn read(bytes: &[u8; PAGE], copy: u64) -> Copied<Header> {
        if is_zero(bytes) {
            return Copied::Never;
        }
        if &bytes[0..8] != MAGIC {
            return Copied::Damaged(Header::FOREIGN);
        }
        if CRC.checksum(&bytes[..SUMMED]) != get64(bytes, SUMMED) {
            return Copied::Damaged("its checksum is wrong");
        }
        // Only now: a version is not believed before the sum is right.
        match get32(bytes, 8) {
            VERSION => {}
            other => return Copied::Version(other),
        }
        if !is_zero(&bytes[SUMMED + 8..]) {
            return Copied::Damaged("it is followed by bytes that are not zeros");
        }
        match Header::parse(bytes, copy) {
            Ok(header) => Copied::Valid(header),
            Err(why) => Copied::Damaged(why),
        }
    }

    fn parse(bytes: &[u8; PAGE], copy: u64) -> Result<Header, &'static str> {
        let sequence = get64(bytes, 16);
        if sequence == 0 || sequence > SEQUENCE_MAX || sequence & 1 != copy {
            return Err("its sequence number does not belong there");
        }
        let state = State::of(get32(bytes, 40)).ok_or("its state is none")?;
        let kind = match get32(bytes, 44) {
            1 => Kind::File,
            2 => Kind::Device,
            _ => return Err("its kind of image is none"),
        };
        let geometry = Geometry::new(get32(bytes, 12), get64(bytes, 56), get64(bytes, 64));
        let mut facts = [0; FACTS];
        for (index, word) in facts.iter_mut().enumerate() {
            *word = get64(bytes, FACTS_AT + 8 * index);
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[24..40]);
        let spec = Spec {
            uuid,
            generation: get64(bytes, 48),
            geometry: geometry.ok_or("its chunk or window is impossible")?,
            identity: Identity {
                kind,
                a: get64(bytes, 72),
                b: get64(bytes, 80),
                bytes: get64(bytes, 88),
                facts: Facts::from_words(facts).ok_or("its facts about the image are none")?,
                boot: [get64(bytes, BOOT_AT), get64(bytes, BOOT_AT + 8)],
            },
        };
        if !spec.fits() {
            return Err("its window leads past the image");
        }
        Ok(Header {
            spec,
            state,
            sequence,
        })
    }
}

/// The states of a page's chunks as two planes of bits; no chunk has a bit in
/// both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Planes {
    /// Chunks in the shadow.
    pub(crate) data: [u64; WORDS],
    /// Chunks that are zeros.
    pub(crate) zero: [u64; WORDS],
}

impl Planes {
    /// Gives chunks from this bit of the page on a state; they are all of the page.
    pub(crate) fn set(&mut self, first: u64, count: u64, state: Chunk) {
        let (mut bit, mut left) = (first, count);
        while left > 0 {
            let some = left.min(64 - bit % 64);
            let (word, mask) = ((bit / 64) as usize, (u64::MAX >> (64 - some)) << (bit % 64));
            self.data[word] &= !mask;
            self.zero[word] &= !mask;
            match state {
                Chunk::Absent => {}
                Chunk::Data => self.data[word] |= mask,
                Chunk::Zero => self.zero[word] |= mask,
            }
            bit += some;
            left -= some;
        }
    }
}

/// A page of the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BitmapPage {
    pub(crate) sequence: u64,
    pub(crate) planes: Planes,
}

fn page_sum(uuid: &[u8; 16], number: u64, bytes: &[u8]) -> u64 {
    let mut digest = CRC.digest();
    digest.update(uuid);
    digest.update(&number.to_le_bytes());
    digest.update(&bytes[0..8]);
    digest.update(&bytes[BITS..]);
    digest.finalize()
}

impl BitmapPage {
    /// Page `number`, and the place of the copy that this sequence number
    /// belongs to.
    pub(crate) fn write(&self, uuid: &[u8; 16], number: u64) -> Page {
        let mut bytes = [0; PAGE];
        put64(&mut bytes, 0, self.sequence);
        for (i, (data, zero)) in self.planes.data.iter().zip(&self.planes.zero).enumerate() {
            for half in 0..2 {
                let bits = |word: &u64| spread((word >> (32 * half)) as u32);
                let pairs = bits(data) | bits(zero) << 1;
                put64(&mut bytes, BITS + 16 * i + 8 * half, pairs);
            }
        }
        let sum = page_sum(uuid, number, &bytes);
        put64(&mut bytes, 8, sum);
        Page {
            offset: BITMAP + number * PAIR + (self.sequence & 1) * PAGE as u64,
            bytes: Arc::new(bytes),
        }
    }

    /// Reads copy `copy` (0 or 1) of page `number`.
    pub(crate) fn read(
        bytes: &[u8; PAGE],
        copy: u64,
        uuid: &[u8; 16],
        geometry: &Geometry,
        number: u64,
    ) -> Copied<Box<BitmapPage>> {
        if is_zero(bytes) {
            return Copied::Never;
        }
        if page_sum(uuid, number, bytes) != get64(bytes, 8) {
            return Copied::Damaged("its checksum is wrong");
        }
        let sequence = get64(bytes, 0);
        if sequence == 0 || sequence > SEQUENCE_MAX || sequence & 1 != copy {
            return Copied::Damaged("its sequence number does not belong there");
        }
        let mut planes = Planes {
            data: [0; WORDS],
            zero: [0; WORDS],
        };
        let (first, end) = geometry.chunks_of_page(number);
        for i in 0..WORDS {
            let mut word = (0, 0);
            for half in 0..2 {
                let pairs = get64(bytes, BITS + 16 * i + 8 * half);
                word.0 |= u64::from(gather(pairs)) << (32 * half);
                word.1 |= u64::from(gather(pairs >> 1)) << (32 * half);
            }
            let left = (end - first).saturating_sub(64 * i as u64);
            let there = if left < 64 { (1 << left) - 1 } else { !0 };
            if word.0 & word.1 != 0 {
                return Copied::Damaged("a chunk of it has no possible state");
            }
            if (word.0 | word.1) & !there != 0 {
                return Copied::Damaged("it speaks of chunks behind the end");
            }
            (planes.data[i], planes.zero[i]) = word;
        }
        Copied::Valid(Box::new(BitmapPage { sequence, planes }))
    }
}

/// Bit i of `word` at bit 2i.
fn spread(word: u32) -> u64 {
    let mut w = u64::from(word);
    w = (w | w << 16) & 0x0000_FFFF_0000_FFFF;
    w = (w | w << 8) & 0x00FF_00FF_00FF_00FF;
    w = (w | w << 4) & 0x0F0F_0F0F_0F0F_0F0F;
    w = (w | w << 2) & 0x3333_3333_3333_3333;
    (w | w << 1) & 0x5555_5555_5555_5555
}

/// Bit 2i of `word` at bit i; the odd ones do not count.
fn gather(word: u64) -> u32 {
    let mut w = word & 0x5555_5555_5555_5555;
    w = (w | w >> 1) & 0x3333_3333_3333_3333;
    w = (w | w >> 2) & 0x0F0F_0F0F_0F0F_0F0F;
    w = (w | w >> 4) & 0x00FF_00FF_00FF_00FF;
    w = (w | w >> 8) & 0x0000_FFFF_0000_FFFF;
    (w | w >> 16) as u32
}

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn put32(bytes: &mut [u8; PAGE], at: usize, number: u32) {
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

fn put64(bytes: &mut [u8; PAGE], at: usize, number: u64) {
    bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
}

fn get32(bytes: &[u8; PAGE], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn get64(bytes: &[u8; PAGE], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests;
