//! CRC8x4, bit by bit: slow, and plainly what protocol.md 6.3 says.

/// The polynomial 0x4D, reflected.
const POLYNOMIAL: u8 = 0xB2;

/// Four lanes of CRC-8; byte i goes to lane i mod 4.
pub fn crc8x4(bytes: &[u8]) -> [u8; 4] {
    let mut lanes = [0xFF; 4];
    for (index, byte) in bytes.iter().enumerate() {
        let lane = &mut lanes[index % 4];
        *lane = step(*lane, *byte);
    }
    lanes
}

fn step(crc: u8, byte: u8) -> u8 {
    (0..8).fold(crc ^ byte, |crc, _| (crc >> 1) ^ (POLYNOMIAL * (crc & 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_has_the_same_sum() {
        // The load generator uses the target's, which is fast.
        let bytes: Vec<u8> = (0..12 + 512 * 9).map(|i| (i * i / 7) as u8).collect();
        let mut registers = [0; 12];
        for at in 0..9 {
            registers.copy_from_slice(&bytes[at..at + 12]);
            for data in (0..9).map(|n| &bytes[at + 12..][..512 * n]) {
                let both = [&registers[..], data].concat();
                assert_eq!(aoede::wire::crc::crc8x4(&registers, data), crc8x4(&both));
            }
        }
    }

    #[test]
    fn the_vectors_of_the_protocol_hold() {
        assert_eq!(b"123456789".iter().fold(0xFF, |c, b| step(c, *b)), 0x27);
        assert_eq!(crc8x4(&[0; 12]), [0x19; 4]);
        let counting: Vec<u8> = (0..12).collect();
        assert_eq!(crc8x4(&counting), [0x23, 0x36, 0x09, 0x1C]);
        assert_eq!(crc8x4(&[0; 12 + 512]), [0xFC; 4]);
        let mut sector = vec![0; 12];
        sector.extend((0..512).map(|i| i as u8));
        assert_eq!(crc8x4(&sector), [0x7D, 0x8B, 0xF4, 0x02]);
    }
}
