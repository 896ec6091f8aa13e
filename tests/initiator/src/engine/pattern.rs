//! What a verified sector holds: who it is, and bytes that follow from that.
//!
//! ```text
//!  0  "AoEsect1"       16  generation (8)      32  numbers drawn from
//!  8  LBA (8)          24  seed (8)                seed, LBA, generation (480)
//! ```

use super::rng::{Rng, mix};
use crate::frame::SECTOR;

const MAGIC: &[u8; 8] = b"AoEsect1";
const BODY: usize = 32;

/// Fills a sector.
pub fn fill(sector: &mut [u8], seed: u64, lba: u64, generation: u64) {
    for (word, value) in sector.chunks_exact_mut(8).zip(words(seed, lba, generation)) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What a sector turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing but zeros.
    Zeros,
    /// The whole pattern of this LBA and generation.
    Pattern {
        /// The LBA it was written for.
        lba: u64,
        /// The generation.
        generation: u64,
    },
    /// The beginning of that pattern, and at this offset something else.
    Torn {
        /// The LBA its beginning was written for.
        lba: u64,
        /// The generation of its beginning.
        generation: u64,
        /// Where the pattern ends, a multiple of 8.
        offset: usize,
    },
    /// No pattern of this seed.
    Other,
}

/// Looks what a sector holds.
pub fn look(sector: &[u8], seed: u64) -> Seen {
    let word = |index: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&sector[8 * index..8 * index + 8]);
        u64::from_le_bytes(bytes)
    };
    if sector.len() != SECTOR {
        return Seen::Other;
    }
    if sector[..8] != *MAGIC || word(3) != seed {
        let zeros = sector.iter().all(|b| *b == 0);
        return if zeros { Seen::Zeros } else { Seen::Other };
    }
    let (lba, generation) = (word(1), word(2));
    let differs = words(seed, lba, generation)
        .zip(sector.chunks_exact(8))
        .position(|(expected, found)| expected.to_le_bytes() != found);
    match differs {
        None => Seen::Pattern { lba, generation },
        Some(index) => Seen::Torn {
            lba,
            generation,
            offset: 8 * index,
        },
    }
}

fn words(seed: u64, lba: u64, generation: u64) -> impl Iterator<Item = u64> {
    let mut rng = Rng::new(mix(seed) ^ mix(lba).rotate_left(17) ^ generation);
    [u64::from_le_bytes(*MAGIC), lba, generation, seed]
        .into_iter()
        .chain(std::iter::repeat_with(move || rng.draw()).take((SECTOR - BODY) / 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_known_again_and_any_flaw_seen() {
        let mut sector = [0; SECTOR];
        assert_eq!(look(&sector, 1), Seen::Zeros);
        fill(&mut sector, 1, 2, 3);
        let (lba, generation) = (2, 3);
        assert_eq!(look(&sector, 1), Seen::Pattern { lba, generation });
        assert_eq!(look(&sector, 2), Seen::Other);
        let whole = sector;
        for at in 32..SECTOR {
            sector[at] ^= 1;
            let offset = at / 8 * 8;
            assert_eq!(
                look(&sector, 1),
                Seen::Torn {
                    lba,
                    generation,
                    offset
                }
            );
            sector = whole;
        }
    }
}
