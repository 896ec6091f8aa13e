//! IDENTIFY DEVICE: 256 words in which the drive describes itself (ATA8-ACS
//! 7.16.7). Words are little endian; text has its bytes swapped in each word.

use super::{Page, TRIM_SECTORS};

/// What IDENTIFY says that is not the same for every export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Serial number, at most 20 characters are told.
    pub serial: String,
    /// Model, at most 40 characters are told.
    pub model: String,
    /// Firmware revision, at most 8 characters are told.
    pub firmware: String,
    /// World wide name, the same for one image on every NIC.
    pub wwn: u64,
    /// The backing's physical block is 2 to this power of sectors.
    pub physical_exponent: u8,
    /// At which sector of a physical block the export begins.
    pub alignment: u16,
    /// Whether TRIM works, and trimmed sectors read as zeros.
    pub trim: bool,
}

const HEADS: u64 = 16;
const SECTORS_PER_TRACK: u64 = 63;
const CYLINDERS_MAX: u64 = 16383;

impl Identity {
    /// The 512 bytes for a device of `sectors`, with write cache and SMART as
    /// they are for who asks.
    pub fn page(&self, sectors: u64, write_cache: bool, smart: bool) -> Page {
        let mut words = [0u16; 256];
        let low = |value: u64, word: usize| (value >> (16 * word)) as u16;
        let bit = |on: bool, bit: u16| u16::from(on) << bit;

        let cylinders = (sectors / (HEADS * SECTORS_PER_TRACK)).min(CYLINDERS_MAX);
        let chs = cylinders * HEADS * SECTORS_PER_TRACK;
        words[0] = 0x0040;
        words[1] = cylinders as u16;
        words[3] = HEADS as u16;
        words[6] = SECTORS_PER_TRACK as u16;
        text(&mut words[10..20], &self.serial);
        text(&mut words[23..27], &self.firmware);
        text(&mut words[27..47], &self.model);
        words[47] = 0x8000; // READ and WRITE MULTIPLE are not there
        words[49] = 0x0300; // LBA, DMA
        words[53] = 0x0001; // words 54 to 58 are valid
        words[54] = cylinders as u16;
        words[55] = HEADS as u16;
        words[56] = SECTORS_PER_TRACK as u16;
        words[57] = low(chs, 0);
        words[58] = low(chs, 1);
        words[59] = 0;
        let lba28 = sectors.min(0x0FFF_FFFF);
        words[60] = low(lba28, 0);
        words[61] = low(lba28, 1);
        words[80] = 0x01F0; // ATA/ATAPI-4 to ATA8-ACS
        words[82] = 1 << 5 | 1 << 0; // write cache, SMART
        words[83] = 1 << 14 | 1 << 13 | 1 << 12 | 1 << 10; // FLUSH EXT, FLUSH, LBA48
        words[84] = 1 << 14 | 1 << 8; // WWN
        words[85] = bit(write_cache, 5) | bit(smart, 0);
        words[86] = 1 << 13 | 1 << 12 | 1 << 10;
        words[87] = 1 << 14 | 1 << 8;
        words[93] = 0x4001; // hardware reset result: device 0, valid
        for word in 0..4 {
            words[100 + word] = low(sectors, word);
            // The name has its highest word first.
            words[108 + word] = low(self.wwn, 3 - word);
        }
        // Logical sectors are 512 bytes (bit 12 clear); bit 13 says that
        // several make a physical one.
        let exponent = u16::from(self.physical_exponent & 0x0F);
        words[106] = 1 << 14 | bit(exponent > 0, 13) | exponent;
        words[209] = 1 << 14 | (self.alignment & 0x3FFF);
        if self.trim {
            words[69] = 1 << 14 | 1 << 5; // trimmed sectors: always the same, zeros
            words[105] = u16::from(TRIM_SECTORS);
            words[169] = 1 << 0;
        }
        words[217] = 1; // nothing turns
        seal(&words)
    }
}

/// Text into words, padded with spaces; what ATA does not allow becomes '?'.
fn text(words: &mut [u16], text: &str) {
    let printable = |c: char| {
        if matches!(c, ' '..='~') {
            c as u8
        } else {
            b'?'
        }
    };
    let mut bytes = text.chars().map(printable).chain(std::iter::repeat(b' '));
    for word in words {
        let high = bytes.next().unwrap_or(b' ');
        let low = bytes.next().unwrap_or(b' ');
        *word = u16::from_be_bytes([high, low]);
    }
}

/// The words as bytes, the last with the signature 0xA5 and a checksum by which
/// all 512 bytes add up to 0.
fn seal(words: &[u16; 256]) -> Page {
    let mut page = [0; 512];
    for (bytes, word) in page.chunks_exact_mut(2).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    page[510] = 0xA5;
    let sum = page[..511]
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    page[511] = sum.wrapping_neg();
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            serial: "1.1:host".into(),
            model: "AoEde virtual blade".into(),
            firmware: "0.1".into(),
            wwn: 0x3123_4567_89AB_CDEF,
            physical_exponent: 3,
            alignment: 1,
            trim: true,
        }
    }

    fn word(page: &Page, word: usize) -> u16 {
        u16::from_le_bytes([page[2 * word], page[2 * word + 1]])
    }

    #[test]
    fn every_word_of_the_table_is_there() {
        let sectors = 0x0001_2345_6789;
        let page = identity().page(sectors, true, false);
        let expected = [
            (0, 0x0040),
            (1, 16383),
            (3, 16),
            (6, 63),
            (47, 0x8000),
            (49, 0x0300),
            (53, 1),
            (54, 16383),
            (55, 16),
            (56, 63),
            (57, 0xFC10),
            (58, 0x00FB),
            (59, 0),
            (60, 0xFFFF),
            (61, 0x0FFF),
            (69, 0x4020),
            (80, 0x01F0),
            (82, 0x0021),
            (83, 0x7400),
            (84, 0x4100),
            (85, 0x0020),
            (86, 0x3400),
            (87, 0x4100),
            (93, 0x4001),
            (100, 0x6789),
            (101, 0x2345),
            (102, 1),
            (103, 0),
            (105, 1),
            (106, 0x6003),
            (108, 0x3123),
            (109, 0x4567),
            (110, 0x89AB),
            (111, 0xCDEF),
            (117, 0),
            (118, 0),
            (169, 1),
            (209, 0x4001),
            (217, 1),
        ];
        for (at, value) in expected {
            assert_eq!(word(&page, at), value, "word {at}");
        }
        assert_eq!(&page[20..28], b".1:1ohts"); // "1.1:host", bytes swapped
        assert_eq!(&page[28..40], b"            ");
        assert_eq!(page[510], 0xA5);
        assert_eq!(page.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
    }

    #[test]
    fn a_small_plain_disk_says_so() {
        let plain = Identity {
            physical_exponent: 0,
            alignment: 0,
            trim: false,
            ..identity()
        };
        let page = plain.page(131_072, false, true);
        assert_eq!((word(&page, 60), word(&page, 61)), (0, 2));
        assert_eq!(
            (word(&page, 1), word(&page, 106), word(&page, 209)),
            (130, 0x4000, 0x4000)
        );
        assert_eq!(
            (word(&page, 69), word(&page, 105), word(&page, 169)),
            (0, 0, 0)
        );
        assert_eq!(word(&page, 85), 0x0001);
    }

    #[test]
    fn text_is_cut_padded_and_made_printable() {
        let mut words = [0; 4];
        text(&mut words, "ab\u{e9}\ncdefghij");
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        assert_eq!(bytes, b"ab??cdef");
    }
}
