//! Writes that are split where they fail, down to what the disk does not take.

use std::io;

use shadow::SECTOR;

use super::disk::{Backing, Segment};

/// Failed writes of a job after which the rest of it is taken for failed too: a
/// disk that takes nothing is not asked for each sector.
const FAILURES_MAX: usize = 16;

/// Bytes that were not written, and the first reason.
#[derive(Debug)]
pub(super) struct NotWritten {
    /// Offsets and lengths, in the order of the segments.
    pub parts: Vec<(u64, u64)>,
    /// The first reason.
    pub source: io::Error,
}

/// A job on its way.
struct Writer<'a> {
    backing: &'a dyn Backing,
    /// The least that the disk can be given.
    unit: usize,
    failures: usize,
    failed: Option<NotWritten>,
}

/// Writes all segments as far as the disk takes them.
pub(super) fn write(backing: &dyn Backing, segments: &[Segment]) -> Result<(), NotWritten> {
    let mut writer = Writer {
        backing,
        unit: backing.align().max(SECTOR as usize),
        failures: 0,
        failed: None,
    };
    for segment in segments {
        writer.segment(segment);
    }
    writer.failed.map_or(Ok(()), Err)
}

impl Writer<'_> {
    fn segment(&mut self, segment: &Segment) {
        let mut at = segment.at;
        let len: usize = segment.pieces.iter().map(|piece| piece.len()).sum();
        let backing = self.backing;
        let whole = || backing.write_pieces(&segment.pieces, at);
        if self.tries(
            at,
            len,
            segment.pieces.len() == 1 && len <= self.unit,
            whole,
        ) {
            return;
        }
        for piece in &segment.pieces {
            self.piece(at, piece);
            at += piece.len() as u64;
        }
    }

    fn piece(&mut self, at: u64, piece: &[u8]) {
        let backing = self.backing;
        let is_last = piece.len() <= self.unit;
        if self.tries(at, piece.len(), is_last, || backing.write_at(piece, at)) {
            return;
        }
        for (n, unit) in piece.chunks(self.unit).enumerate() {
            let at = at + (n * self.unit) as u64;
            self.tries(at, unit.len(), true, || backing.write_at(unit, at));
        }
    }

    /// Writes once; `false` if that failed and is to be split. What `is_last`
    /// cannot be.
    fn tries(
        &mut self,
        at: u64,
        len: usize,
        is_last: bool,
        write: impl FnOnce() -> io::Result<()>,
    ) -> bool {
        let gives_up = self.failures >= FAILURES_MAX;
        let error = match (gives_up, &mut self.failed) {
            (true, Some(failed)) => {
                failed.parts.push((at, len as u64));
                return true;
            }
            _ => write().err(),
        };
        let Some(source) = error else { return true };
        self.failures += 1;
        if !is_last && self.failures < FAILURES_MAX {
            return false;
        }
        let failed = self.failed.get_or_insert(NotWritten {
            parts: Vec::new(),
            source,
        });
        failed.parts.push((at, len as u64));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::buffer::Body;
    use parking_lot::Mutex;
    use shadow::{BlockFile, MemoryFile};

    /// A disk with bad sectors.
    struct Bad {
        file: MemoryFile,
        sectors: Vec<u64>,
        align: usize,
        failures: Mutex<usize>,
    }

    impl BlockFile for Bad {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            self.file.read_at(buf, offset)
        }
        fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            assert!(data.len() % self.align == 0 && offset % self.align as u64 == 0);
            let range = offset / 512..(offset + data.len() as u64) / 512;
            if self.sectors.iter().any(|sector| range.contains(sector)) {
                *self.failures.lock() += 1;
                return Err(io::Error::other("a bad sector"));
            }
            self.file.write_at(data, offset)
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Backing for Bad {
        fn align(&self) -> usize {
            self.align
        }
    }

    fn bad(sectors: Vec<u64>, align: usize) -> Bad {
        Bad {
            file: MemoryFile::new(vec![0; 1 << 20]),
            sectors,
            align,
            failures: Mutex::new(0),
        }
    }

    /// Of so many blocks, one behind the other.
    fn segment(at: u64, blocks: usize) -> Segment {
        let pieces = (0..blocks).map(|_| Body::Bytes(vec![7; 4096])).collect();
        Segment { at, pieces }
    }

    #[test]
    fn all_but_the_bad_sectors_is_written() {
        let disk = bad(vec![9, 10, 100], 512);
        let segments = [segment(0, 4), segment(40_960, 3)];
        let failed = write(&disk, &segments).unwrap_err();
        assert_eq!(
            failed.parts,
            [(9 * 512, 512), (10 * 512, 512), (51_200, 512)]
        );
        let bytes = disk.file.bytes();
        for sector in (0..32).chain(80..104) {
            let filled = !disk.sectors.contains(&sector);
            let expected = [if filled { 7 } else { 0 }; 512];
            assert_eq!(bytes[sector as usize * 512..][..512], expected, "{sector}");
        }
    }

    #[test]
    fn what_the_disk_takes_only_whole_fails_whole() {
        let disk = bad(vec![9], 4096);
        let failed = write(&disk, &[segment(0, 4)]).unwrap_err();
        assert_eq!(failed.parts, [(4096, 4096)]);
    }

    #[test]
    fn a_disk_that_takes_nothing_is_not_asked_for_each_sector() {
        let disk = bad((0..2048).collect(), 512);
        let segments: Vec<Segment> = (0..8).map(|n| segment(n * 65_536, 16)).collect();
        let failed = write(&disk, &segments).unwrap_err();
        assert!(*disk.failures.lock() <= FAILURES_MAX);
        let bytes: u64 = failed.parts.iter().map(|(_, len)| len).sum();
        assert_eq!(bytes, 8 * 65_536);
    }
}
