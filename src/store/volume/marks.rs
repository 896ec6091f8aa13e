//! Where something waits, as a sketch: most questions whether two requests overlap
//! are answered without a look at all that waits.

use shadow::Extent;

/// Counters; a power of two. More than blocks wait as a rule, so that most are 0.
const COUNTERS: usize = 1 << 14;
/// Sectors of a block.
const BLOCK: u64 = 8;

/// By a hash of the block, how many waiting requests touch it.
#[derive(Debug)]
pub(super) struct Marks {
    counters: Box<[u16]>,
}

impl Marks {
    pub fn new() -> Marks {
        Marks {
            counters: vec![0; COUNTERS].into_boxed_slice(),
        }
    }

    /// A request waits.
    pub fn add(&mut self, extent: Extent) {
        for at in counters(extent) {
            self.counters[at] = self.counters[at].saturating_add(1);
        }
    }

    /// A request waits no more.
    pub fn remove(&mut self, extent: Extent) {
        for at in counters(extent) {
            debug_assert!(self.counters[at] > 0, "{extent:?} was not added");
            self.counters[at] = self.counters[at].saturating_sub(1);
        }
    }

    /// `false` if no request that waits overlaps an extent; of those that touch one
    /// block, so many do not count.
    pub fn may_overlap(&self, extent: Extent, own: u16) -> bool {
        counters(extent).any(|at| self.counters[at] > own)
    }
}

fn counters(extent: Extent) -> impl Iterator<Item = usize> {
    let blocks = extent.start().0 / BLOCK..extent.end().0.div_ceil(BLOCK);
    blocks.map(|block| {
        let hash = block.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (hash >> (64 - COUNTERS.ilog2())) as usize
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shadow::Lba;

    fn extent((start, count): (u64, u64)) -> Extent {
        Extent::new(Lba(start), count).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_overlaps_is_never_denied_and_nothing_is_left_behind(
            waiting in proptest::collection::vec((0u64..1 << 40, 1u64..256), 1..60),
            probe in (0u64..1 << 40, 1u64..256),
        ) {
            let mut marks = Marks::new();
            for one in &waiting {
                marks.add(extent(*one));
            }
            for one in &waiting {
                let near = extent((one.0 + one.1 - 1, 1));
                prop_assert!(marks.may_overlap(near, 0) && marks.may_overlap(extent(*one), 0));
            }
            // Of itself alone a request has one mark in each of its blocks, or more
            // where its own blocks share a counter.
            marks.add(extent(probe));
            let overlaps = waiting.iter().any(|one| extent(*one).overlaps(extent(probe)));
            prop_assert!(!overlaps || marks.may_overlap(extent(probe), 1));
            marks.remove(extent(probe));
            for one in &waiting {
                marks.remove(extent(*one));
            }
            prop_assert!(marks.counters.iter().all(|counter| *counter == 0));
        }
    }
}
