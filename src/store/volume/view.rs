//! Where each sector's content is while there is a shadow: in the image, in the
//! shadow, or nowhere, being zeros.

use shadow::{Chunk, Extent, Geometry, Lba, Map, SECTOR};

use super::super::arena::runs;
use super::super::disk::{Origin, Part};

/// What is known of a shadow's content.
pub(super) struct View {
    pub geometry: Geometry,
    pub map: Map,
}

impl View {
    /// Whether everything is in the image.
    pub fn is_plain(&self) -> bool {
        self.map.present() == 0
    }

    /// What lies together from byte `at` of the image on, as far as `end`.
    pub fn run(&self, at: u64, end: u64) -> Part {
        let geometry = &self.geometry;
        let first = geometry.chunk_of(at);
        let last = geometry.chunk_of(end - 1) + 1;
        let (chunk, count) = self.map.run(first, last);
        let stop = ((first + count) * geometry.chunk()).min(end);
        let origin = match chunk {
            Chunk::Absent => Origin::Image(at),
            Chunk::Data => Origin::Shadow(geometry.data_offset(at)),
            Chunk::Zero => Origin::Zeros,
        };
        Part {
            origin,
            len: (stop - at) as usize,
        }
    }

    /// The places of an extent; `None` if all of it is in the image.
    pub fn parts(&self, extent: Extent) -> Option<Vec<Part>> {
        let (mut at, end) = (extent.byte_start(), extent.byte_start() + extent.byte_len());
        let first = self.run(at, end);
        if matches!(first.origin, Origin::Image(_)) && first.len as u64 == extent.byte_len() {
            return None;
        }
        let mut parts = Vec::new();
        while at < end {
            let part = self.run(at, end);
            at += part.len as u64;
            parts.push(part);
        }
        Some(parts)
    }

    /// The numbers of the chunks that have one of these sectors of a block.
    pub fn chunks(&self, first: u64, mask: u64) -> impl Iterator<Item = u64> + use<> {
        let geometry = self.geometry;
        runs(mask).flat_map(move |(bit, count)| {
            let start = first + u64::from(bit);
            let last = start + u64::from(count) - 1;
            geometry.chunk_of(start * SECTOR)..=geometry.chunk_of(last * SECTOR)
        })
    }

    /// The sectors of a block that must be written if those of `dirty` are: all
    /// that the window has of each chunk for which `whole` says so.
    pub fn shape(&self, first: u64, dirty: u64, whole: impl Fn(Chunk) -> bool) -> u64 {
        let mut mask = dirty;
        for chunk in self.chunks(first, dirty) {
            if whole(self.map.get(chunk)) {
                let (at, len) = self.geometry.within(chunk);
                let (bit, count) = (at / SECTOR - first, len / SECTOR);
                mask |= u64::MAX >> (64 - count) << bit;
            }
        }
        mask
    }

    /// The runs of chunks, of (first, count), that extents cover whole, as far as
    /// the window has them, and what is left at their ends.
    pub fn split(&self, extents: &[Extent]) -> (Vec<(u64, u64)>, Vec<Extent>) {
        let (mut whole, mut edges) = (Vec::new(), Vec::new());
        let mut edge = |at: u64, end: u64| {
            if at < end {
                edges.extend(Extent::new(Lba(at / SECTOR), (end - at) / SECTOR));
            }
        };
        for extent in extents.iter().filter(|extent| !extent.is_empty()) {
            let (at, end) = (extent.byte_start(), extent.byte_start() + extent.byte_len());
            let mut first = self.geometry.chunk_of(at);
            let mut last = self.geometry.chunk_of(end - 1);
            let (start, len) = self.geometry.within(first);
            if at > start || end < start + len {
                edge(at, end.min(start + len));
                first += 1;
            }
            let (start, len) = self.geometry.within(last);
            if last >= first && end < start + len {
                edge(start, end);
                last -= 1;
            }
            if last >= first {
                whole.push((first, last + 1 - first));
            }
        }
        (whole, edges)
    }

    /// What the window has of a run of chunks.
    pub fn extent(&self, first: u64, count: u64) -> Option<Extent> {
        let (start, _) = self.geometry.within(first);
        let (at, len) = self.geometry.within(first + count - 1);
        Extent::new(Lba(start / SECTOR), (at + len - start) / SECTOR)
    }
}
