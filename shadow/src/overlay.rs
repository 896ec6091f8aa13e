//! A shadow over an image, one call at a time: for recovery, for the tool, and
//! as the model of who does the same with jobs of its own.

use std::collections::BTreeMap;
use std::io;

use crate::file::BlockFile;
use crate::format::{Chunk, Geometry, Spec, State, header_page};
use crate::identity::Identity;
use crate::map::Map;
use crate::open::{self, OpenError};

/// Bytes that a merge moves at once.
const PIECE: u64 = 1 << 20;

/// A shadow and what is known of it in memory.
///
/// Bytes are counted in the image throughout, and have to lie in the window;
/// what does not is refused with `InvalidInput`. Reads and writes may begin and
/// end anywhere.
///
/// A change is on stable storage when [`Shadow::sync`] has returned, and one
/// that was made while thawing also when the image is synced. After an error of
/// a write, what it was to write is old or new, sector by sector. After a sync
/// that failed it is not known what the disk has, and nobody here has kept the
/// data to write it again: everything but reading is refused from then on, until
/// the shadow is opened anew.
#[derive(Debug)]
pub struct Shadow<F: BlockFile> {
    file: F,
    spec: Spec,
    state: State,
    sequence: u64,
    map: Map,
    /// Chunks whose state has changed since the last sync.
    pending: BTreeMap<u64, Chunk>,
    /// Data was written since the last sync.
    unsynced: bool,
    /// A sync or a header failed.
    failed: bool,
}

/// What a merge has done, and what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes brought to the image by this call.
    pub merged: u64,
    /// Chunks whose content is not yet in the image.
    pub left_chunks: u64,
}

impl<F: BlockFile> Shadow<F> {
    /// Makes a shadow of a file of zeros of [`Geometry::data_end`] bytes: its
    /// header, in state Freezing, on stable storage.
    ///
    /// Fails with `InvalidInput` where the window leads past the image.
    pub fn create(file: F, spec: &Spec) -> io::Result<Shadow<F>> {
        if !spec.fits() {
            return Err(invalid("the window leads past the end of the image"));
        }
        let mut shadow = Shadow {
            file,
            spec: *spec,
            state: State::Freezing,
            sequence: 0,
            map: Map::new(spec.geometry, spec.uuid),
            pending: BTreeMap::new(),
            unsynced: false,
            failed: false,
        };
        // A crash before the sync leaves a file without a header, which
        // promises nothing: nobody takes a write for it before we return.
        shadow.set_state(State::Freezing)?;
        Ok(shadow)
    }

    /// Opens what [`Shadow::create`] has made, of a file of `file_len` bytes.
    /// Nothing is written.
    ///
    /// Copies that are damaged are passed over where the other one stands;
    /// otherwise the error says what is concerned.
    pub fn open(file: F, file_len: u64) -> Result<Shadow<F>, OpenError> {
        let (header, map) = open::read(&file, file_len)?;
        Ok(Shadow {
            file,
            spec: header.spec,
            state: header.state,
            sequence: header.sequence,
            map,
            pending: BTreeMap::new(),
            unsynced: false,
            failed: false,
        })
    }

    /// What its header says.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// How far its freeze has come.
    pub fn state(&self) -> State {
        self.state
    }

    /// The window and its chunks.
    pub fn geometry(&self) -> Geometry {
        self.spec.geometry
    }

    /// Where the content of each chunk is, as of the last sync.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The file.
    pub fn file(&self) -> &F {
        &self.file
    }

    /// Takes it apart: the file, what its header says, its state, the sequence
    /// number of the header, the map. What was not synced is not in the map.
    pub fn into_parts(self) -> (F, Spec, State, u64, Map) {
        (self.file, self.spec, self.state, self.sequence, self.map)
    }

    /// Writes header and bitmap again as they are, and syncs. For who goes on
    /// with a shadow that another process has left: if a sync of that one
    /// failed, what we have read may not be on the disk, and the next change of
    /// a page would overwrite the only copy that is.
    pub fn confirm(&mut self) -> io::Result<()> {
        self.usable()?;
        let header = header_page(&self.spec, self.state, self.sequence);
        // Bytes that are there are not changed by writing them again, so that
        // a crash can tear nothing that counts.
        let pages = std::iter::once(header).chain(self.map.pages_as_they_are());
        let mut written = Ok(());
        for page in pages {
            written = written.and_then(|()| self.file.write_at(&page.bytes, page.offset));
        }
        written
            .and_then(|()| self.file.sync())
            .inspect_err(|_| self.failed = true)
    }

    /// Says in the header, on stable storage, how far the freeze has come.
    pub fn set_state(&mut self, state: State) -> io::Result<()> {
        self.usable()?;
        let page = header_page(&self.spec, state, self.sequence + 1);
        // The copy that counts is not the one that is written, so a crash in
        // the middle leaves the state as it was. Until the sync both answers
        // are possible, which is why a failure is final here.
        let written = self
            .file
            .write_at(&page.bytes, page.offset)
            .and_then(|()| self.file.sync());
        written.inspect_err(|_| self.failed = true)?;
        self.state = state;
        self.sequence += 1;
        Ok(())
    }

    /// Says in the header, on stable storage, that the image is this one.
    pub fn set_identity(&mut self, identity: Identity) -> io::Result<()> {
        self.spec.identity = identity;
        self.set_state(self.state)
    }

    /// Reads what the image shows with the shadow over it, by runs of chunks
    /// that are in one place.
    pub fn read(&self, image: &dyn BlockFile, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = self.check(at, buf.len() as u64)?;
        let mut from = at;
        while from < end {
            let (state, to) = self.run(from, end);
            let piece = &mut buf[(from - at) as usize..(to - at) as usize];
            match state {
                Chunk::Absent => image.read_at(piece, from)?,
                Chunk::Data => self
                    .file
                    .read_at(piece, self.geometry().data_offset(from))?,
                Chunk::Zero => piece.fill(0),
            }
            from = to;
        }
        Ok(())
    }

    /// A write while the image is not to be touched. A chunk that was not in the
    /// shadow is completed, from the image or with zeros, so that it is whole
    /// there; the bits follow at [`Shadow::sync`].
    pub fn write(&mut self, image: &dyn BlockFile, at: u64, data: &[u8]) -> io::Result<()> {
        self.usable()?;
        self.not_thawing()?;
        self.check(at, data.len() as u64)?;
        self.write_shadow(image, at, data)
    }

    /// Makes a range zeros while the image is not to be touched: whole chunks by
    /// their bits, what is left at both ends as data.
    pub fn forget(&mut self, image: &dyn BlockFile, at: u64, len: u64) -> io::Result<()> {
        self.usable()?;
        self.not_thawing()?;
        let end = self.check(at, len)?;
        let mut from = at;
        while from < end {
            let chunk = self.geometry().chunk_of(from);
            let (first, len) = self.geometry().within(chunk);
            let to = end.min(first + len);
            if (from, to) == (first, first + len) {
                // Old data may stay in its place: nobody reads it there while
                // the chunk is zeros, and who writes to the chunk writes all
                // of it.
                self.pending.insert(chunk, Chunk::Zero);
            } else if self.state_of(chunk) != Chunk::Zero {
                let zeros = vec![0; (to - from) as usize];
                self.write_shadow(image, from, &zeros)?;
            }
            from = to;
        }
        Ok(())
    }

    /// A write while thawing: a chunk that is still to be merged is changed in
    /// the shadow, from where it comes to the image with the rest; one that is
    /// in the image is changed there, and the caller syncs the image as well.
    pub fn write_thawing(&mut self, image: &dyn BlockFile, at: u64, data: &[u8]) -> io::Result<()> {
        self.usable()?;
        self.thawing()?;
        let end = self.check(at, data.len() as u64)?;
        let mut from = at;
        while from < end {
            let (state, to) = self.run(from, end);
            let piece = &data[(from - at) as usize..(to - at) as usize];
            match state {
                Chunk::Absent => image.write_at(piece, from)?,
                Chunk::Data | Chunk::Zero => self.write_shadow(image, from, piece)?,
            }
            from = to;
        }
        Ok(())
    }

    /// Returns once all changes in the shadow are on stable storage.
    pub fn sync(&mut self) -> io::Result<()> {
        self.usable()?;
        self.commit_data()
    }

    /// Merges up to `budget` bytes, one chunk at least, in the order of their
    /// places, and says what is left. When nothing is, all is on stable storage
    /// in the image, and the shadow may be removed.
    ///
    /// After an error the same may be merged again; what was read through the
    /// shadow is the same all the time.
    pub fn merge(&mut self, image: &dyn BlockFile, budget: u64) -> io::Result<Progress> {
        self.usable()?;
        self.thawing()?;
        // The bits that say where the data is come first, so that only what
        // the map knows is merged.
        self.commit_data()?;
        let (merged, done) = self.copy_to_image(image, budget)?;
        if done.is_empty() {
            return Ok(self.progress(merged));
        }
        // A crash up to here leaves every bit: what the image has got, or half
        // of it, is hidden by the shadow, and is merged again.
        if !crate::fault!("merge-bits-before-image-sync") {
            image.sync().inspect_err(|_| self.failed = true)?;
        }
        // Only now, the content being safe in the image, the bits go. A crash
        // among the pages clears some chunks and not others; both places have
        // the same content.
        let cleared = done
            .iter()
            .flat_map(|(from, count)| *from..from + count)
            .map(|chunk| (chunk, Chunk::Absent));
        let commit = self.map.plan(cleared);
        self.write_commit(commit)?;
        Ok(self.progress(merged))
    }

    fn progress(&self, merged: u64) -> Progress {
        Progress {
            merged,
            left_chunks: self.map.present(),
        }
    }

    /// Copies from the first chunk on; says how many bytes, and which chunks
    /// (the first and how many).
    fn copy_to_image(
        &self,
        image: &dyn BlockFile,
        budget: u64,
    ) -> io::Result<(u64, Vec<(u64, u64)>)> {
        let geometry = self.geometry();
        let mut buf = Vec::new();
        let mut done = Vec::new();
        let mut merged = 0;
        let mut from = geometry.first_chunk();
        while let Some(chunk) = self.map.next_present(from) {
            let room = budget.saturating_sub(merged) / geometry.chunk();
            if room == 0 && merged > 0 {
                break;
            }
            let (state, count) = self.map.run(chunk, chunk.saturating_add(room.max(1)));
            let count = match state {
                Chunk::Data => count.min(PIECE / geometry.chunk()),
                // Zeros take no buffer.
                _ => count,
            };
            let (start, _) = geometry.within(chunk);
            let (last, len) = geometry.within(chunk + count - 1);
            let bytes = last + len - start;
            if state == Chunk::Zero {
                image.zero(start, bytes)?;
            } else {
                buf.resize(bytes as usize, 0);
                self.file.read_at(&mut buf, geometry.data_offset(start))?;
                image.write_at(&buf, start)?;
            }
            done.push((chunk, count));
            merged += bytes;
            from = chunk + count;
        }
        Ok((merged, done))
    }

    /// Data, sync, bits, sync.
    fn commit_data(&mut self) -> io::Result<()> {
        if self.unsynced {
            // A bit that reached the disk before the data it stands for would,
            // after a crash, show what was in that place before.
            self.file.sync().inspect_err(|_| self.failed = true)?;
            self.unsynced = false;
        }
        let changes = self.pending.iter().map(|(chunk, state)| (*chunk, *state));
        let commit = self.map.plan(changes);
        // A crash among the pages: each is old or new by itself, and a new one
        // has its data. Old bits show the chunk as it was, which is right for
        // a write nobody has been promised.
        self.write_commit(commit)?;
        self.pending.clear();
        Ok(())
    }

    fn write_commit(&mut self, commit: crate::map::Commit) -> io::Result<()> {
        if commit.pages.is_empty() {
            self.map.settle(commit, true);
            return Ok(());
        }
        let mut written = Ok(());
        for page in &commit.pages {
            written = written.and_then(|()| self.file.write_at(&page.bytes, page.offset));
        }
        if written.is_ok() {
            // Without this the next commit could overwrite the older copy while
            // the newer is not yet there.
            if crate::fault!("bits-not-synced") {
                self.map.settle(commit, true);
                return Ok(());
            }
            written = self.file.sync().inspect_err(|_| self.failed = true);
        }
        self.map.settle(commit, written.is_ok());
        written
    }

    /// Writes to the shadow, whatever is there, and whole chunks where nothing
    /// was.
    fn write_shadow(&mut self, image: &dyn BlockFile, at: u64, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let geometry = self.geometry();
        let end = at + data.len() as u64;
        let (first, last) = (geometry.chunk_of(at), geometry.chunk_of(end - 1));
        let is_data = |chunk| self.state_of(chunk) == Chunk::Data;
        let (last_start, last_len) = geometry.within(last);
        let from = if is_data(first) {
            at
        } else {
            geometry.within(first).0
        };
        let to = if is_data(last) {
            end
        } else {
            last_start + last_len
        };
        let mut whole;
        let bytes = if (from, to) == (at, end) {
            data
        } else {
            whole = vec![0; (to - from) as usize];
            let (head, rest) = whole.split_at_mut((at - from) as usize);
            let (body, tail) = rest.split_at_mut(data.len());
            self.read(image, from, head)?;
            body.copy_from_slice(data);
            self.read(image, end, tail)?;
            &whole
        };
        // A chunk that is data on disk is overwritten in its place, sector by
        // sector; one that is not has no bit there yet, so that a crash shows
        // what it was.
        self.unsynced = true;
        self.file.write_at(bytes, geometry.data_offset(from))?;
        for chunk in first..=last {
            if self.state_of(chunk) != Chunk::Data {
                self.pending.insert(chunk, Chunk::Data);
            }
        }
        Ok(())
    }

    /// The state of a chunk with the changes that are not yet synced.
    fn state_of(&self, chunk: u64) -> Chunk {
        let pending = self.pending.get(&chunk).copied();
        pending.unwrap_or_else(|| self.map.get(chunk))
    }

    /// The state at a byte, and the byte below `end` up to which it goes.
    fn run(&self, from: u64, end: u64) -> (Chunk, u64) {
        let geometry = self.geometry();
        let first = geometry.chunk_of(from);
        let last = geometry.chunk_of(end - 1);
        let state = self.state_of(first);
        let mut chunk = first;
        while chunk <= last {
            let (next, count) = match self.pending.range(chunk..=last).next() {
                Some((at, state)) if *at == chunk => (*state, 1),
                Some((at, _)) => self.map.run(chunk, *at),
                None => self.map.run(chunk, last + 1),
            };
            if next != state {
                break;
            }
            chunk += count;
        }
        (state, end.min(chunk * geometry.chunk()))
    }

    /// The end of a range, if it lies in the window.
    fn check(&self, at: u64, len: u64) -> io::Result<u64> {
        let end = at.checked_add(len);
        let fits = |end: &u64| at >= self.geometry().start() && *end <= self.geometry().end();
        end.filter(fits)
            .ok_or_else(|| invalid("outside of the window of the shadow"))
    }

    fn usable(&self) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other(
                "a sync failed before, so what the disk has is not known; open the shadow anew",
            ));
        }
        Ok(())
    }

    fn thawing(&self) -> io::Result<()> {
        match self.state {
            State::Thawing => Ok(()),
            _ => Err(invalid("the image is not to be written before a thaw")),
        }
    }

    fn not_thawing(&self) -> io::Result<()> {
        match self.state {
            // A chunk that is merged is the image's; once more in the shadow
            // it would hide later writes.
            State::Thawing => Err(invalid("the shadow takes no new chunk in a thaw")),
            _ => Ok(()),
        }
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests;
