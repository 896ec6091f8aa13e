//! CRC8x4, AoEde's checksum of data: four CRC-8, one for every fourth byte.
//!
//! ```text
//! 24  registers (12)     both covered: byte i goes to lane i mod 4
//! 36  data (512 x count)
//! ..  the four lanes
//! ```
//!
//! Each lane is CRC-8 with the polynomial 0x4D, reflected (0xB2), begun with
//! 0xFF, without a last exclusive or; check ("123456789") is 0x27.
//!
//! Modulo that polynomial x has the order 255, so x^256 is x: a byte of a lane
//! that moves on by 32 bytes of its lane (128 of the frame, 256 bits) is
//! multiplied by x, which is a shift. So data is folded 128 bytes at a time
//! into 128 bytes that have the same sum, all of them in parallel.

use super::ata::{DATA, SECTOR};

/// The polynomial, reflected: what x^8 is.
const POLYNOMIAL: u8 = 0xB2;
/// What a lane begins with.
const START: u8 = 0xFF;
/// Bytes that a fold moves on by: 256 bits of each lane.
const STRIDE: usize = 128;
/// Parts of the folded bytes that are summed side by side, since each byte of a
/// lane waits for the one before.
const PARTS: usize = 4;
const PART: usize = STRIDE / PARTS;
const LANES: usize = 4;
const REGISTERS: usize = 24;

/// The four lanes, as they stand in a frame.
pub type Sum = [u8; LANES];

const fn times_x(value: u8) -> u8 {
    (value >> 1) ^ (POLYNOMIAL * (value & 1))
}

/// What each byte is, multiplied by a power of x.
const fn times_x_to(power: usize) -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < table.len() {
        let mut value = byte as u8;
        let mut n = 0;
        while n < power {
            value = times_x(value);
            n += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
}

/// One byte further in a lane.
static BYTE: [u8; 256] = times_x_to(8);
/// One part further.
static FURTHER: [u8; 256] = times_x_to(8 * PART / LANES);

/// The sum of the 12 bytes of registers and the data behind them.
pub fn crc8x4(registers: &[u8; DATA - REGISTERS], data: &[u8]) -> Sum {
    // Zeros in front of all change nothing; what the lanes begin with is the
    // same as bytes added to the first of each lane.
    let mut folded = [0; STRIDE];
    let first = STRIDE - registers.len();
    folded[first..].copy_from_slice(registers);
    for byte in &mut folded[first..first + LANES] {
        *byte ^= START;
    }
    let mut strides = data.chunks_exact(STRIDE);
    for stride in &mut strides {
        for (byte, next) in folded.iter_mut().zip(stride) {
            // Without a branch or a table, so that it becomes vector code.
            *byte = (*byte >> 1) ^ ((*byte & 1).wrapping_neg() & POLYNOMIAL) ^ *next;
        }
    }
    let mut lanes = sum(&folded);
    for (index, byte) in strides.remainder().iter().enumerate() {
        let lane = &mut lanes[index % LANES];
        *lane = BYTE[usize::from(*lane ^ *byte)];
    }
    lanes
}

/// The sum of folded bytes, of lanes that begin with 0.
fn sum(folded: &[u8; STRIDE]) -> Sum {
    let mut parts = [[0; LANES]; PARTS];
    for at in (0..PART).step_by(LANES) {
        for (index, part) in parts.iter_mut().enumerate() {
            for (offset, lane) in part.iter_mut().enumerate() {
                let byte = folded[PART * index + at + offset];
                *lane = BYTE[usize::from(*lane ^ byte)];
            }
        }
    }
    parts.into_iter().fold([0; LANES], |mut lanes, part| {
        for (lane, byte) in lanes.iter_mut().zip(part) {
            *lane = FURTHER[usize::from(*lane)] ^ byte;
        }
        lanes
    })
}

/// The sum of a reply: its registers, in a head of [`DATA`] bytes at least, and
/// its data.
pub fn of_reply(head: &[u8], data: &[u8]) -> Sum {
    let mut registers = [0; DATA - REGISTERS];
    registers.copy_from_slice(&head[REGISTERS..DATA]);
    crc8x4(&registers, data)
}

/// Whether the sum behind the data of `count` sectors is right; `None` if the
/// frame is too short to carry one.
///
/// A frame of no sector that is not longer than Ethernet's least carries none
/// either: what stands there is padding.
pub fn is_right(frame: &[u8], count: u8) -> Option<bool> {
    let end = DATA + usize::from(count) * SECTOR;
    let sum = frame.get(end..end + LANES)?;
    let padded = count == 0 && frame.len() <= super::MIN_FRAME;
    (!padded).then(|| of_reply(frame, &frame[DATA..end]) == sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crc::{Algorithm, Crc, Table};
    use proptest::prelude::*;

    /// CRC-8/KOOP without the inversion at the end.
    const ALGORITHM: Algorithm<u8> = Algorithm {
        width: 8,
        poly: 0x4D,
        init: 0xFF,
        refin: true,
        refout: true,
        xorout: 0,
        check: 0x27,
        residue: 0,
    };
    const REFERENCE: Crc<u8, Table<1>> = Crc::<u8, Table<1>>::new(&ALGORITHM);

    fn reference(registers: &[u8], data: &[u8]) -> Sum {
        let all: Vec<u8> = registers.iter().chain(data).copied().collect();
        let lane =
            |first: usize| -> Vec<u8> { all.iter().skip(first).step_by(4).copied().collect() };
        [0, 1, 2, 3].map(|first| REFERENCE.checksum(&lane(first)))
    }

    fn bytes(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        let draw = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len).map(draw).collect()
    }

    #[test]
    fn the_vectors_of_the_protocol_hold() {
        assert_eq!(REFERENCE.checksum(b"123456789"), ALGORITHM.check);
        let counting = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        let sector: Vec<u8> = (0..512).map(|i| (i & 255) as u8).collect();
        assert_eq!(crc8x4(&[0; 12], &[]), [0x19; 4]);
        assert_eq!(crc8x4(&counting, &[]), [0x23, 0x36, 0x09, 0x1C]);
        assert_eq!(crc8x4(&[0; 12], &[0; 512]), [0xFC; 4]);
        assert_eq!(crc8x4(&[0; 12], &sector), [0x7D, 0x8B, 0xF4, 0x02]);
    }

    #[test]
    fn folding_is_the_reference_at_every_length_of_a_frame() {
        let bytes = bytes(12 + 255 * 512 + 64);
        for n in 0..=255 {
            // Another start for each, so that few are aligned.
            let at = n * 7 % 53;
            let registers: [u8; 12] = bytes[at..at + 12].try_into().unwrap();
            let data = &bytes[at + 12..at + 12 + 512 * n];
            assert_eq!(crc8x4(&registers, data), reference(&registers, data), "{n}");
        }
    }

    #[test]
    fn folding_is_the_reference_at_every_start() {
        let bytes = bytes(1024 + 128);
        for at in 0..128 {
            let registers: [u8; 12] = bytes[at..at + 12].try_into().unwrap();
            let data = &bytes[at + 1..at + 1 + 512];
            assert_eq!(
                crc8x4(&registers, data),
                reference(&registers, data),
                "{at}"
            );
        }
    }

    #[test]
    fn a_frame_carries_a_sum_where_it_is_long_enough() {
        for count in [0u8, 1, 2] {
            let end = 36 + 512 * usize::from(count);
            let mut frame = bytes(end);
            assert_eq!(is_right(&frame, count), None);
            let sum = of_reply(&frame, &frame[36..]);
            frame.extend_from_slice(&sum[..3]);
            assert_eq!(is_right(&frame, count), None);
            frame.push(sum[3]);
            frame.resize(frame.len().max(61), 0);
            assert_eq!(is_right(&frame, count), Some(true));
            // More behind it means nothing.
            frame.push(9);
            assert_eq!(is_right(&frame, count), Some(true));
            frame[end] ^= 1;
            assert_eq!(is_right(&frame, count), Some(false));
        }
        // Padding is no sum.
        assert_eq!(is_right(&[0; 60], 0), None);
        assert_eq!(is_right(&[0; 30], 0), None);
        assert_eq!(is_right(&[], 255), None);
    }

    proptest! {
        #[test]
        fn folding_is_the_reference(registers: [u8; 12], data in proptest::collection::vec(any::<u8>(), 0..1300)) {
            prop_assert_eq!(crc8x4(&registers, &data), reference(&registers, &data));
        }
    }
}
