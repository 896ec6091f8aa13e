//! Runs of sectors on their way to an image that may not take some of them.

use std::io;

use shadow::SECTOR;

use super::super::align;
use super::super::disk::Backing;

/// The most pieces that sectors may make which the image does not take.
const PIECES_MAX: usize = 1024;
/// Runs that are pushed to the disk together.
const SLICE: usize = 256;

/// Offset in the image, and bytes.
pub(super) type Piece = (u64, Vec<u8>);

/// Writes runs, and keeps those of their sectors that the image does not take.
/// What comes later counts.
pub(super) struct Writer<'a> {
    image: &'a dyn Backing,
    /// What the image does not take; no two pieces share a byte.
    kept: &'a mut Vec<Piece>,
    /// Bytes that may be kept.
    room: u64,
    /// Each write is brought to the disk before the next one.
    pushes: bool,
    /// Sectors that were kept.
    bad: u64,
}

impl<'a> Writer<'a> {
    /// Makes one that keeps `room` bytes at most.
    pub fn new(image: &'a dyn Backing, kept: &'a mut Vec<Piece>, room: u64) -> Writer<'a> {
        Writer {
            image,
            kept,
            room,
            pushes: false,
            bad: 0,
        }
    }

    /// Returns how many sectors were kept.
    pub fn bad(&self) -> u64 {
        self.bad
    }

    /// Returns how many sectors are kept, if they are more than may be.
    pub fn too_many(&self) -> Option<u64> {
        let bytes: u64 = self.kept.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let is_too_much = self.kept.len() > PIECES_MAX || bytes > self.room;
        is_too_much.then_some(bytes / SECTOR)
    }

    /// Writes a run of sectors; those that the disk does not take are kept. Fails
    /// when too many are, so that a dead disk is not asked for each of its sectors.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self.put(at, bytes) {
            Err(e) if is_bad_sector(&e) => {}
            written => {
                written?;
                self.drop_kept(at, bytes.len());
                return Ok(());
            }
        }
        for (n, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let at = at + n as u64 * SECTOR;
            let written = self.put(at, sector);
            self.drop_kept(at, sector.len());
            match written {
                Err(e) if is_bad_sector(&e) => self.keep(at, sector),
                written => written?,
            }
        }
        match self.too_many() {
            Some(_) => Err(io::ErrorKind::Other.into()),
            None => Ok(()),
        }
    }

    /// Writes all runs again after a sync has failed, which names no sector: each is
    /// brought to the disk before the next ones, so that an error has a place. What
    /// the disk has refused is clean in the page cache, and comes there no other
    /// way. `note` is called before each write.
    pub fn write_apart(
        &mut self,
        runs: &[(u64, &[u8])],
        mut note: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        self.pushes = true;
        self.bad = 0;
        for slice in runs.chunks(SLICE) {
            note()?;
            match self.put_together(slice) {
                Ok(()) => {
                    for (at, bytes) in slice {
                        self.drop_kept(*at, bytes.len());
                    }
                }
                Err(e) if is_bad_sector(&e) => {
                    for (at, bytes) in slice {
                        note()?;
                        self.write(*at, bytes)?;
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        align::put(self.image, bytes, at)?;
        match self.pushes {
            true => self.image.push(at, bytes.len() as u64),
            false => Ok(()),
        }
    }

    fn put_together(&self, runs: &[(u64, &[u8])]) -> io::Result<()> {
        for (at, bytes) in runs {
            align::put(self.image, bytes, *at)?;
        }
        let start = runs.iter().map(|(at, _)| *at).min().unwrap_or(0);
        let ends = runs.iter().map(|(at, bytes)| at + bytes.len() as u64);
        self.image.push(start, ends.max().unwrap_or(start) - start)
    }

    fn keep(&mut self, at: u64, sector: &[u8]) {
        self.bad += 1;
        match self.kept.last_mut() {
            Some((first, run)) if *first + run.len() as u64 == at => run.extend_from_slice(sector),
            _ => self.kept.push((at, sector.to_vec())),
        }
    }

    /// Drops what is kept of these bytes: something newer is there, or follows.
    fn drop_kept(&mut self, at: u64, len: usize) {
        let end = at + len as u64;
        let overlaps = |(first, bytes): &Piece| *first < end && at < first + bytes.len() as u64;
        if !self.kept.iter().any(overlaps) {
            return;
        }
        for (first, bytes) in std::mem::take(self.kept) {
            let cut = |to: u64| (to.saturating_sub(first) as usize).min(bytes.len());
            let (before, behind) = (&bytes[..cut(at)], &bytes[cut(end)..]);
            if !before.is_empty() {
                self.kept.push((first, before.to_vec()));
            }
            if !behind.is_empty() {
                self.kept.push((first + cut(end) as u64, behind.to_vec()));
            }
        }
    }
}

/// Whether an error concerns a place of the disk, and not all of it.
pub(super) fn is_bad_sector(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EIO | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO)
    )
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Mutex;

    use shadow::BlockFile;

    use super::*;

    const PAGE: u64 = 4096;
    const BYTES: usize = 64 << 10;

    /// A disk behind a page cache, as the kernel has it: a page that could not be
    /// written is clean, and its error is told once.
    struct Cached {
        state: Mutex<State>,
        /// How often each of these sectors cannot be written.
        bad: Mutex<BTreeMap<u64, u32>>,
    }

    struct State {
        disk: Vec<u8>,
        pages: Vec<u8>,
        dirty: BTreeSet<u64>,
    }

    impl Cached {
        fn new(bad: &[(u64, u32)]) -> Cached {
            Cached {
                state: Mutex::new(State {
                    disk: vec![0; BYTES],
                    pages: vec![0; BYTES],
                    dirty: BTreeSet::new(),
                }),
                bad: Mutex::new(bad.iter().copied().collect()),
            }
        }

        fn disk(&self) -> Vec<u8> {
            self.state.lock().unwrap().disk.clone()
        }
    }

    impl BlockFile for Cached {
        fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
            let state = self.state.lock().unwrap();
            buf.copy_from_slice(&state.pages[at as usize..][..buf.len()]);
            Ok(())
        }

        fn write_at(&self, data: &[u8], at: u64) -> io::Result<()> {
            let mut state = self.state.lock().unwrap();
            state.pages[at as usize..][..data.len()].copy_from_slice(data);
            let pages = at / PAGE..(at + data.len() as u64).div_ceil(PAGE);
            state.dirty.extend(pages);
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            self.push(0, BYTES as u64)
        }
    }

    impl Backing for Cached {
        fn push(&self, at: u64, len: u64) -> io::Result<()> {
            let mut state = self.state.lock().unwrap();
            let mut bad = self.bad.lock().unwrap();
            let mut failed = false;
            for page in at / PAGE..(at + len).div_ceil(PAGE) {
                if !state.dirty.remove(&page) {
                    continue;
                }
                let sectors = page * PAGE / SECTOR..(page + 1) * PAGE / SECTOR;
                if let Some((_, times)) = bad.range_mut(sectors).find(|(_, times)| **times > 0) {
                    *times -= 1;
                    failed = true;
                    continue;
                }
                let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
                let State { disk, pages, .. } = &mut *state;
                disk[range.clone()].copy_from_slice(&pages[range]);
            }
            match failed {
                true => Err(io::Error::from_raw_os_error(libc::EIO)),
                false => Ok(()),
            }
        }
    }

    /// Runs of 1024 bytes at these sectors, each filled with its number.
    fn runs(sectors: &[u64]) -> Vec<(u64, Vec<u8>)> {
        let runs = sectors.iter().zip(1..);
        let run = |(sector, fill): (&u64, u8)| (sector * SECTOR, vec![fill; 1024]);
        runs.map(run).collect()
    }

    fn refs(runs: &[Piece]) -> Vec<(u64, &[u8])> {
        runs.iter().map(|(at, bytes)| (*at, &bytes[..])).collect()
    }

    #[test]
    fn all_but_the_pages_of_bad_sectors_is_on_the_disk_and_these_are_kept() {
        let disk = Cached::new(&[(17, u32::MAX)]);
        let runs = runs(&[0, 16, 20, 24, 40]);
        let mut kept = Vec::new();
        let mut writer = Writer::new(&disk, &mut kept, 1 << 20);
        for (at, bytes) in &runs {
            writer.write(*at, bytes).unwrap();
        }
        assert_eq!(writer.bad(), 0);
        assert!(disk.sync().is_err() && disk.sync().is_ok());
        let mut writer = Writer::new(&disk, &mut kept, 1 << 20);
        writer.write_apart(&refs(&runs), || Ok(())).unwrap();
        assert_eq!(writer.bad(), 4);
        disk.sync().unwrap();
        assert_eq!(kept, runs[1..3]);
        let mut expected = vec![0; BYTES];
        for (at, bytes) in [&runs[0], &runs[3], &runs[4]] {
            expected[*at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        assert!(disk.disk() == expected);
    }

    #[test]
    fn an_older_version_is_not_kept_where_a_newer_one_landed() {
        // Slice, run and each of its two sectors fail; later it is well.
        let disk = Cached::new(&[(16, 4)]);
        let runs = runs(&[16, 17, 32]);
        let mut kept = vec![(30 * SECTOR, vec![9; 4 * SECTOR as usize])];
        let mut writer = Writer::new(&disk, &mut kept, 1 << 20);
        writer.write_apart(&refs(&runs), || Ok(())).unwrap();
        let [first, second, third] = &runs[..] else {
            unreachable!()
        };
        assert_eq!(
            kept,
            [
                (30 * SECTOR, vec![9; 1024]),
                (16 * SECTOR, first.1[..512].to_vec())
            ]
        );
        for (at, bytes) in [second, third] {
            assert!(disk.disk()[*at as usize..][..bytes.len()] == bytes[..]);
        }
    }

    #[test]
    fn a_disk_that_takes_nothing_is_not_asked_for_each_sector() {
        let disk = Cached::new(&(0..128).map(|n| (n, u32::MAX)).collect::<Vec<_>>());
        let runs = runs(&[0, 8, 16, 24, 32, 40, 48, 56]);
        let mut kept = Vec::new();
        let mut writer = Writer::new(&disk, &mut kept, 2048);
        assert!(writer.write_apart(&refs(&runs), || Ok(())).is_err());
        assert_eq!(writer.too_many(), Some(6));
    }
}
