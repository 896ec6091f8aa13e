//! Sector addresses and ranges of them.

use std::fmt;

/// Bytes in a logical sector. AoE knows no other size.
pub const SECTOR: u64 = 512;

/// The address of a sector, counted from the first sector of the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LBA {}", self.0)
    }
}

/// A run of sectors whose end does not wrap: `start + count` fits a `u64`, and
/// so do both in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Extent {
    start: u64,
    count: u64,
}

impl Extent {
    /// The run of `count` sectors at `start`, or `None` if its end in bytes
    /// could not be counted in 64 bits.
    pub fn new(start: Lba, count: u64) -> Option<Extent> {
        let end = start.0.checked_add(count)?;
        end.checked_mul(SECTOR)?;
        Some(Extent {
            start: start.0,
            count,
        })
    }

    /// The sectors of `len` bytes from byte `at` on, both multiples of 512; of
    /// others, the sectors that lie in them.
    pub(crate) fn from_bytes(at: u64, len: u64) -> Extent {
        let start = at.div_ceil(SECTOR);
        let end = at.saturating_add(len) / SECTOR;
        Extent {
            start,
            count: end.saturating_sub(start),
        }
    }

    /// The first sector.
    pub fn start(self) -> Lba {
        Lba(self.start)
    }

    /// How many sectors.
    pub fn count(self) -> u64 {
        self.count
    }

    /// The sector behind the last one.
    pub fn end(self) -> Lba {
        Lba(self.start + self.count)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Whether all of it lies below `sectors`, the size of a device.
    pub fn fits(self, sectors: u64) -> bool {
        self.end().0 <= sectors
    }

    /// Whether the two share a sector.
    pub fn overlaps(self, other: Extent) -> bool {
        self.start < other.end().0
            && other.start < self.end().0
            && !self.is_empty()
            && !other.is_empty()
    }

    /// The smallest run that holds both; an empty one adds nothing.
    pub fn hull(self, other: Extent) -> Extent {
        if other.is_empty() {
            return self;
        }
        if self.is_empty() {
            return other;
        }
        let start = self.start.min(other.start);
        let end = self.end().0.max(other.end().0);
        Extent {
            start,
            count: end - start,
        }
    }

    /// The offset of the first byte.
    pub fn byte_start(self) -> u64 {
        self.start * SECTOR
    }

    /// The length in bytes.
    pub fn byte_len(self) -> u64 {
        self.count * SECTOR
    }
}

/// An extent that is counted from the beginning of the image, as messages write it.
pub(crate) struct InImage(pub Extent);

impl fmt::Display for InImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Extent { start, count } = self.0;
        match count {
            0 | 1 => write!(f, "image sector {start}"),
            _ => write!(f, "image sectors {start} to {}", start + count - 1),
        }
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors at {}", self.count, self.start())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(start: u64, count: u64) -> Extent {
        Extent::new(Lba(start), count).unwrap()
    }

    #[test]
    fn an_end_that_wraps_is_refused() {
        assert_eq!(Extent::new(Lba(u64::MAX), 1), None);
        assert_eq!(Extent::new(Lba(u64::MAX / SECTOR), 1), None);
        assert!(Extent::new(Lba((1 << 48) - 1), 255).is_some());
    }

    proptest! {
        #[test]
        fn overlap_and_hull_agree_with_sets(a in 0u64..40, n in 0u64..20, b in 0u64..40, m in 0u64..20) {
            let (x, y) = (extent(a, n), extent(b, m));
            let set = |e: Extent| (e.start().0..e.end().0).collect::<Vec<_>>();
            let shared = set(x).iter().any(|s| set(y).contains(s));
            prop_assert_eq!(x.overlaps(y), shared);
            prop_assert_eq!(y.overlaps(x), shared);
            let hull = x.hull(y);
            for s in set(x).into_iter().chain(set(y)) {
                prop_assert!(set(hull).contains(&s));
            }
        }
    }
}
