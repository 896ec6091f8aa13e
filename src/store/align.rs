//! Bytes at any offset on a backing that takes only whole aligned blocks.
//!
//! Where the backing has no such wish (`align` 1) these are plain reads and
//! writes. The volume keeps writes that share a block apart, so reading a
//! block, changing a part and writing it back loses nobody's data.

use std::io;
use std::ops::Range;

use super::disk::Backing;
use crate::sys::buffer::{Buf, BufSlice};

/// The aligned bytes around `len` bytes at `at`: where they begin, and how many.
pub(super) fn around(at: u64, len: usize, align: usize) -> (u64, usize) {
    let before = (at % align as u64) as usize;
    (at - before as u64, (before + len).next_multiple_of(align))
}

/// Reads `len` bytes at `at` into `buf`; says where in it they lie.
pub(super) fn read(
    backing: &dyn Backing,
    at: u64,
    len: usize,
    buf: &mut Buf,
) -> io::Result<Range<usize>> {
    let (start, whole) = around(at, len, backing.align());
    let room = buf.get_mut(..whole).ok_or(io::ErrorKind::InvalidInput)?;
    backing.read_at(room, start)?;
    let offset = (at - start) as usize;
    Ok(offset..offset + len)
}

/// Writes `data` at `at`; what else is in its first and last block is read and
/// written with it.
pub(super) fn write(backing: &dyn Backing, at: u64, data: &mut BufSlice) -> io::Result<()> {
    let align = backing.align();
    let (start, whole) = around(at, data.range.len(), align);
    let before = (at - start) as usize;
    if whole == data.range.len() {
        return backing.write_at(data, at);
    }
    let end = before + data.range.len();
    if data.range.start != before || data.buf.len() < whole {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut block = Buf::new(align)?;
    if before > 0 {
        backing.read_at(&mut block[..align], start)?;
        data.buf[..before].copy_from_slice(&block[..before]);
    }
    if end < whole {
        let last = whole - align;
        backing.read_at(&mut block[..align], start + last as u64)?;
        data.buf[end..whole].copy_from_slice(&block[end - last..align]);
    }
    backing.write_at(&data.buf[..whole], start)
}

/// Writes bytes that are in no buffer of the disk's.
pub(super) fn put(backing: &dyn Backing, bytes: &[u8], at: u64) -> io::Result<()> {
    let align = backing.align();
    let start = (at % align as u64) as usize;
    let mut buf = Buf::new(bytes.len() + 2 * align)?;
    let range = start..start + bytes.len();
    buf[range.clone()].copy_from_slice(bytes);
    write(backing, at, &mut BufSlice { buf, range })
}

/// Reads and forgets.
pub(super) fn verify(backing: &dyn Backing, at: u64, len: usize) -> io::Result<()> {
    let (start, whole) = around(at, len, backing.align());
    let mut buf = Buf::new(whole)?;
    backing.read_at(&mut buf[..whole], start)
}

/// Discards, with zeros written to what is left of the blocks at both ends.
pub(super) fn discard(backing: &dyn Backing, at: u64, len: u64) -> io::Result<()> {
    let align = backing.discard_align() as u64;
    let first = at.next_multiple_of(align);
    let end = at + len;
    let last = end - end % align;
    if first >= last {
        return zero(backing, at, len);
    }
    zero(backing, at, first - at)?;
    backing.discard(first, last - first)?;
    zero(backing, last, end - last)
}

/// Writes zeros over less than two blocks.
fn zero(backing: &dyn Backing, at: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let (start, whole) = around(at, len as usize, backing.align());
    let offset = (at - start) as usize;
    let range = offset..offset + len as usize;
    write(
        backing,
        at,
        &mut BufSlice {
            buf: Buf::new(whole)?,
            range,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shadow::{BlockFile, MemoryFile};

    /// A disk that refuses what is not aligned to 4096, as a 4Kn one does.
    struct Strict(MemoryFile);

    const ALIGN: usize = 4096;

    fn strict(buf: &[u8], offset: u64) -> io::Result<()> {
        let ok = buf.len() % ALIGN == 0
            && offset % ALIGN as u64 == 0
            && buf.as_ptr() as usize % ALIGN == 0;
        if ok {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    impl BlockFile for Strict {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            strict(buf, offset)?;
            self.0.read_at(buf, offset)
        }
        fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            strict(data, offset)?;
            self.0.write_at(data, offset)
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Backing for Strict {
        fn align(&self) -> usize {
            ALIGN
        }
        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            if offset % ALIGN as u64 != 0 || len % ALIGN as u64 != 0 {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            self.0.write_at(&vec![0; len as usize], offset)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn a_strict_disk_behaves_as_an_array(
            ops in proptest::collection::vec((0u64..120, 0usize..9, 0u8..3, 1u8..), 1..30)
        ) {
            let sectors = 128;
            let disk = Strict(MemoryFile::new(vec![7; sectors * 512]));
            let mut model = vec![7u8; sectors * 512];
            for (sector, count, op, fill) in ops {
                let (at, len) = (sector * 512, count.min(sectors - sector as usize) * 512);
                let range = at as usize..at as usize + len;
                match op {
                    0 if len > 0 => {
                        let mut buf = Buf::new(len + 2 * ALIGN).unwrap();
                        let got = read(&disk, at, len, &mut buf).unwrap();
                        prop_assert_eq!(&buf[got], &model[range]);
                        verify(&disk, at, len).unwrap();
                    }
                    1 if len > 0 => {
                        let mut buf = Buf::new(len + 2 * ALIGN).unwrap();
                        let start = at as usize % ALIGN;
                        buf[start..start + len].fill(fill);
                        let mut data = BufSlice { buf, range: start..start + len };
                        write(&disk, at, &mut data).unwrap();
                        model[range].fill(fill);
                    }
                    2 => {
                        discard(&disk, at, len as u64).unwrap();
                        model[range].fill(0);
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(disk.0.bytes(), model);
        }
    }
}
