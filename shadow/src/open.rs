//! Reading the headers and the bitmap of a shadow, believing none of it.

use std::fmt;
use std::io;

use crate::extent::{Extent, InImage};
use crate::file::BlockFile;
use crate::format::{BITMAP, BitmapPage, Copied, Geometry, Header, PAGE, PAIR, Spec, VERSION};
use crate::map::Map;

/// Pages read at once.
const BATCH: u64 = 64;
/// Damaged ranges that a message names before it only counts.
const NAMED: usize = 8;

/// Why a file cannot be used as a shadow. The message ends with the remedy; the
/// caller puts the path in front.
#[derive(Debug)]
pub enum OpenError {
    /// It cannot be read: at which offset, and why.
    Io(u64, io::Error),
    /// No header was ever written: making it was cut short, or it is something
    /// else that begins with zeros. No write was ever kept in it.
    Blank,
    /// It is something else.
    NotAShadow,
    /// Made by a program that knows another version of the format.
    Version(u32),
    /// Both copies of the header are damaged, or one and the other was never
    /// written; what is wrong with it.
    Header(&'static str),
    /// The file is shorter than its header says: the bytes it needs, those it
    /// has.
    Short(u64, u64),
    /// Both copies of some bitmap pages are damaged. Of these sectors, counted
    /// from the beginning of the image, it is not known whether they are in the
    /// image or in the shadow.
    Pages(Vec<Extent>),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::Io(offset, e) => write!(
                f,
                "reading it at byte {offset}: {e}; copy what can be read of it to another disk \
                 and use the copy"
            ),
            OpenError::Blank => f.write_str(
                "has no header; if it is what a freeze that was cut short has left, it holds \
                 nothing and may be removed",
            ),
            OpenError::NotAShadow => {
                f.write_str("is no shadow of a frozen image; give another path or move it away")
            }
            OpenError::Version(version) => write!(
                f,
                "is of format {version}, and this program knows {VERSION}; use the one that made it"
            ),
            OpenError::Header(why) => write!(
                f,
                "both copies of its header are damaged ({why}); restore it, or discard the writes \
                 in it by removing it"
            ),
            OpenError::Short(needs, has) => write!(
                f,
                "is cut off: {has} bytes of {needs}; restore it, or discard the writes in it by \
                 removing it"
            ),
            OpenError::Pages(damage) => {
                f.write_str("both copies of its bitmap are damaged for ")?;
                let named = damage.iter().take(NAMED);
                for (i, extent) in named.enumerate() {
                    let comma = if i == 0 { "" } else { ", " };
                    write!(f, "{comma}{}", InImage(*extent))?;
                }
                if let Some(more) = damage.len().checked_sub(NAMED + 1) {
                    write!(f, " and {} other places", more + 1)?;
                }
                f.write_str("; restore it, or discard the writes in it by removing it")
            }
        }
    }
}

impl std::error::Error for OpenError {}

/// Both copies of the header.
pub(crate) fn read_headers(
    file: &dyn BlockFile,
    file_len: u64,
) -> Result<[Copied<Header>; 2], OpenError> {
    let mut bytes = [0; 2 * PAGE];
    // What is not there counts as zeros, as in a hole.
    let there = file_len.min(PAIR) as usize;
    file.read_at(&mut bytes[..there], 0)
        .map_err(|e| OpenError::Io(0, e))?;
    match halves(&bytes) {
        Some((first, second)) => Ok([Header::read(first, 0), Header::read(second, 1)]),
        None => Ok([Copied::Never, Copied::Never]),
    }
}

/// Both copies of a header or page.
fn halves(pair: &[u8]) -> Option<(&[u8; PAGE], &[u8; PAGE])> {
    let (first, rest) = pair.split_first_chunk()?;
    Some((first, rest.first_chunk()?))
}

/// The header that counts: the newer one of those that are whole.
pub(crate) fn choose_header(copies: [Copied<Header>; 2]) -> Result<Header, OpenError> {
    use Copied::{Damaged, Never, Valid, Version};
    match copies {
        [Valid(a), Valid(b)] => Ok(if a.sequence > b.sequence { a } else { b }),
        // A later program may have written the other one, and mean it.
        [Version(v), _] | [_, Version(v)] => Err(OpenError::Version(v)),
        [Valid(a), _] | [_, Valid(a)] => Ok(a),
        [Never, Never] => Err(OpenError::Blank),
        // A copy that begins as a header should speaks for a shadow.
        [Damaged(Header::FOREIGN), Damaged(why)]
        | [Damaged(why), Damaged(_)]
        | [Damaged(why), Never]
        | [Never, Damaged(why)] => Err(match why {
            Header::FOREIGN => OpenError::NotAShadow,
            why => OpenError::Header(why),
        }),
    }
}

/// Reads the bitmap, and tells of every page of which a copy was ever written,
/// or looks as if.
pub(crate) fn scan(
    file: &dyn BlockFile,
    spec: &Spec,
    mut tell: impl FnMut(u64, [Copied<Box<BitmapPage>>; 2]),
) -> Result<(), OpenError> {
    let geometry = spec.geometry;
    let pages = geometry.pages();
    let mut buf = vec![0; (BATCH * PAIR) as usize];
    let mut page = 0;
    while page < pages {
        let at = BITMAP + page * PAIR;
        let fail = |e| OpenError::Io(at, e);
        let Some(data) = file.next_data(at).map_err(fail)? else {
            break;
        };
        page += data.saturating_sub(at) / PAIR;
        let count = pages.saturating_sub(page).min(BATCH);
        let at = BITMAP + page * PAIR;
        let fail = |e| OpenError::Io(at, e);
        let buf = &mut buf[..(count * PAIR) as usize];
        if count > 0 {
            file.read_at(buf, at).map_err(fail)?;
        }
        let pairs = buf.chunks_exact(2 * PAGE).filter_map(halves);
        for ((first, second), number) in pairs.zip(page..) {
            let read = |bytes, copy| BitmapPage::read(bytes, copy, &spec.uuid, &geometry, number);
            let copies = [read(first, 0), read(second, 1)];
            if copies != [Copied::Never, Copied::Never] {
                tell(number, copies);
            }
        }
        page += count;
    }
    Ok(())
}

/// The copy of a page that counts: the newer one that is whole. `Ok(None)` is
/// nothing in the shadow: neither was written, or the first write to one was
/// torn.
pub(crate) fn choose_page(
    copies: [Copied<Box<BitmapPage>>; 2],
) -> Result<Option<Box<BitmapPage>>, &'static str> {
    use Copied::{Damaged, Valid};
    match copies {
        [Valid(a), Valid(b)] => Ok(Some(if a.sequence > b.sequence { a } else { b })),
        [Valid(a), _] | [_, Valid(a)] => Ok(Some(a)),
        [Damaged(why), Damaged(_)] => Err(why),
        _ => Ok(None),
    }
}

/// Reads all that an open shadow has in memory.
pub(crate) fn read(file: &dyn BlockFile, file_len: u64) -> Result<(Header, Map), OpenError> {
    let header = choose_header(read_headers(file, file_len)?)?;
    let spec = header.spec;
    // Before anything of a size that the header names is allocated or read.
    let needs = spec.geometry.data_end();
    if file_len < needs {
        return Err(OpenError::Short(needs, file_len));
    }
    let mut map = Map::new(spec.geometry, spec.uuid);
    let mut damage = Vec::new();
    scan(file, &spec, |number, copies| match choose_page(copies) {
        Ok(Some(page)) => map.load(number, &page),
        Ok(None) => {}
        Err(_) => add_damage(&mut damage, &spec.geometry, number),
    })?;
    if damage.is_empty() {
        Ok((header, map))
    } else {
        Err(OpenError::Pages(damage))
    }
}

/// Adds the sectors of a page to those that are damaged; neighbours are one.
pub(crate) fn add_damage(damage: &mut Vec<Extent>, geometry: &Geometry, page: u64) {
    let sectors = geometry.sectors_of_page(page);
    match damage.last_mut() {
        Some(last) if last.end() == sectors.start() => *last = last.hull(sectors),
        _ => damage.push(sectors),
    }
}
