//! Ranges of sectors, and how many blocks of the cache they are of.

use std::collections::BTreeMap;

use shadow::{Extent, Lba};

/// The most ranges.
pub(super) const RANGES_MAX: usize = 1024;

/// Sectors in ranges that neither touch nor overlap.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// By the first sector of each: the sector behind it.
    map: BTreeMap<u64, u64>,
    /// Sectors of a block.
    block: u64,
    /// Blocks that have one of the sectors.
    blocks: u64,
}

impl Ranges {
    /// No ranges, in blocks of so many sectors.
    pub fn new(block: u64) -> Ranges {
        Ranges {
            block,
            ..Ranges::default()
        }
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// How many blocks have one of the sectors.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How many sectors there are.
    pub fn sectors(&self) -> u64 {
        self.map.iter().map(|(first, end)| end - first).sum()
    }

    /// The sectors among those of a block that begins at `first`, as a mask.
    pub fn mask(&self, first: u64) -> u64 {
        let end = first + self.block;
        let bits = self.reaching(first, end).map(|(start, stop)| {
            let (low, high) = (start.max(first) - first, stop.min(end) - first);
            u64::MAX >> (64 - (high - low)) << low
        });
        bits.fold(0, |mask, bits| mask | bits)
    }

    /// From the first of the sectors that an extent has to the last.
    pub fn hull_in(&self, extent: Extent) -> Option<Extent> {
        let (first, end) = (extent.start().0, extent.end().0);
        let mut ranges = self.reaching(first, end);
        let (start, stop) = ranges.next()?;
        let stop = ranges.last().map_or(stop, |(_, stop)| stop);
        let (start, stop) = (start.max(first), stop.min(end));
        Extent::new(Lba(start), stop - start)
    }

    /// The first sectors from `first` on that lie together in one block.
    pub fn next(&self, first: u64) -> Option<Extent> {
        let (start, end) = self.reaching(first, u64::MAX).next()?;
        let start = start.max(first);
        let end = end.min((start / self.block + 1) * self.block);
        Extent::new(Lba(start), end - start)
    }

    /// Adds sectors; `false` if there are too many ranges.
    pub fn add(&mut self, extent: Extent) -> bool {
        let (mut start, mut end) = (extent.start().0, extent.end().0);
        let touching = self.reaching(start.saturating_sub(1), end + 1);
        let touching: Vec<(u64, u64)> = touching.collect();
        if touching.is_empty() && self.map.len() >= RANGES_MAX {
            return false;
        }
        for (first, stop) in touching {
            self.map.remove(&first);
            (start, end) = (start.min(first), end.max(stop));
        }
        self.map.insert(start, end);
        self.count_blocks();
        true
    }

    /// Takes sectors out.
    pub fn clear(&mut self, extent: Extent) {
        let (start, end) = (extent.start().0, extent.end().0);
        let inside: Vec<(u64, u64)> = self.reaching(start, end).collect();
        for (first, stop) in inside {
            self.map.remove(&first);
            if first < start {
                self.map.insert(first, start);
            }
            if stop > end {
                self.map.insert(end, stop);
            }
        }
        self.count_blocks();
    }

    /// The ranges that have a sector of these.
    fn reaching(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        // They do not touch, so only the last that begins before can reach in.
        let before = self.map.range(..first).next_back();
        let before = before.filter(move |(_, stop)| **stop > first);
        let ranges = before.into_iter().chain(self.map.range(first..end));
        ranges.map(|(start, stop)| (*start, *stop))
    }

    fn count_blocks(&mut self) {
        let (mut blocks, mut next) = (0, 0);
        for (start, end) in &self.map {
            let first = (start / self.block).max(next);
            next = end.div_ceil(self.block);
            blocks += next.saturating_sub(first);
        }
        self.blocks = blocks;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(start: u64, count: u64) -> Extent {
        Extent::new(Lba(start), count).unwrap()
    }

    proptest! {
        #[test]
        fn ranges_behave_as_a_list_of_sectors(
            ops in proptest::collection::vec((any::<bool>(), 0u64..90, 1u64..20), 1..60)
        ) {
            let (mut ranges, mut model) = (Ranges::new(8), [false; 120]);
            for (adds, start, count) in ops {
                let sectors = start as usize..(start + count) as usize;
                if adds {
                    prop_assert!(ranges.add(extent(start, count)));
                } else {
                    ranges.clear(extent(start, count));
                }
                model[sectors.clone()].fill(adds);
                let all = (0..120).filter(|n| model[*n]);
                prop_assert_eq!(ranges.sectors(), all.clone().count() as u64);
                prop_assert_eq!(ranges.is_empty(), all.clone().count() == 0);
                let blocks = model.chunks(8).filter(|block| block.contains(&true));
                prop_assert_eq!(ranges.blocks(), blocks.count() as u64);
                for block in 0..15 {
                    let bits = (0..8).filter(|bit| model[block * 8 + bit]);
                    let mask = bits.fold(0, |mask, bit| mask | 1 << bit);
                    prop_assert_eq!(ranges.mask(block as u64 * 8), mask);
                }
                // What is found in the extent that was changed, and behind it.
                let first = sectors.clone().find(|n| model[*n]);
                let last = sectors.rev().find(|n| model[*n]);
                let hull = first.zip(last).map(|(a, b)| extent(a as u64, (b - a + 1) as u64));
                prop_assert_eq!(ranges.hull_in(extent(start, count)), hull);
                let next = (start as usize..120).find(|n| model[*n]).map(|first| {
                    let end = (first..120).find(|n| !model[*n] || (*n > first && n % 8 == 0));
                    extent(first as u64, (end.unwrap_or(120) - first) as u64)
                });
                prop_assert_eq!(ranges.next(start), next);
                // No two ranges touch.
                let list: Vec<_> = ranges.reaching(0, u64::MAX).collect();
                prop_assert!(list.windows(2).all(|two| two[0].1 < two[1].0));
            }
        }
    }

    #[test]
    fn there_are_so_many_ranges_and_no_more() {
        let mut ranges = Ranges::new(8);
        for n in 0..RANGES_MAX as u64 {
            assert!(ranges.add(extent(2 * n, 1)));
        }
        assert!(!ranges.add(extent(1 << 20, 1)));
        // What joins two is no other range.
        assert!(ranges.add(extent(1, 1)));
        assert!(ranges.add(extent(1 << 20, 1)));
    }
}
