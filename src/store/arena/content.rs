//! What a device held at its ends when it was opened. A device keeps no time of
//! its last change; another disk under its name, or a copy that was restored
//! over it, mostly differs in the first or the last MiB of what was exported.
//!
//! Of each 4 KiB there the arena keeps a checksum, until the first write to
//! them: what was never written must be as it was.

use super::{Arena, CONTENT, CONTENT_LEN};

/// Bytes under one checksum.
pub(in crate::store) const PIECE: u64 = 4096;
/// Pieces at each end.
const EDGE: u64 = 256;
/// Checksums of both ends.
pub(super) const SUMS: usize = 2 * EDGE as usize;

/// The checksum of a piece, never 0, which stands for unknown.
pub(in crate::store) fn sum(bytes: &[u8]) -> u64 {
    crc::Crc::<u64>::new(&crc::CRC_64_XZ).checksum(bytes).max(1)
}

/// The pieces of a range of so many bytes from `start`: number, and offset in
/// the image.
pub(in crate::store) fn pieces(start: u64, len: u64) -> impl Iterator<Item = (usize, u64)> {
    let whole = len / PIECE;
    let first = whole.min(EDGE);
    let last = (whole - first).min(EDGE);
    let front = (0..first).map(move |n| (n as usize, start + n * PIECE));
    let back = (0..last).map(move |n| {
        let at = start + (whole - last + n) * PIECE;
        ((EDGE + n) as usize, at)
    });
    front.chain(back)
}

impl Arena {
    /// Notes what the range of `len` bytes holds at its ends, as `sums` names it:
    /// number of the piece, checksum.
    pub fn set_content(&mut self, len: u64, sums: impl Iterator<Item = (usize, u64)>) {
        for (number, sum) in sums {
            self.slots.set_word(CONTENT + number, sum);
        }
        self.slots.set_word(CONTENT_LEN, len);
    }

    /// From now on nothing is known of these bytes of the image.
    pub(super) fn forget_content(&mut self, at: u64, len: u64) {
        let range = self.slots.word(CONTENT_LEN);
        if range == 0 {
            return;
        }
        let start = self.slots.word(super::RANGE);
        let edge = EDGE * PIECE;
        // Most writes are at neither end.
        let inner = (start + edge, (start + range).saturating_sub(edge + PIECE));
        if at >= inner.0 && at + len <= inner.1 {
            return;
        }
        for (number, piece) in pieces(start, range) {
            if piece < at + len && at < piece + PIECE {
                self.slots.set_word(CONTENT + number, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_both_ends_and_none_twice() {
        for len in [
            0,
            4095,
            4096,
            1 << 20,
            (1 << 20) + 5000,
            3 << 20,
            (9 << 20) + 512,
        ] {
            let all: Vec<_> = pieces(512, len).collect();
            let expected = (len / PIECE).min(SUMS as u64);
            assert_eq!(all.len() as u64, expected, "{len}");
            for pair in all.windows(2) {
                assert!(pair[0].0 < pair[1].0 && pair[0].1 + PIECE <= pair[1].1);
            }
            assert!(
                all.iter()
                    .all(|(n, at)| *n < SUMS && at + PIECE <= 512 + len)
            );
        }
    }
}
