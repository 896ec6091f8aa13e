//! What came back.

use std::fmt;

use aoede::wire::MacAddr;

use super::{
    ATA, BODY, CONFIG, DATA, ETHERTYPE, EXTENSIONS, FLAG_ERROR, FLAG_RESPONSE, MASK, RESERVE,
    SECTOR, crc8x4,
};

/// A frame that came back. Accessors of a command say `None` where the frame is
/// another command's or too short.
#[derive(Clone, PartialEq, Eq)]
pub struct Reply {
    bytes: Vec<u8>,
}

/// The registers of an ATA reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtaReply<'a> {
    /// AoE flags, as the request had them.
    pub aflags: u8,
    /// ATA error register.
    pub error: u8,
    /// Sectors not transferred.
    pub count: u8,
    /// ATA status register.
    pub status: u8,
    /// 48 bits, as the request had them.
    pub lba: u64,
    /// The two bytes behind the LBA.
    pub reserved: [u8; 2],
    /// All that follows, padding and CRC too.
    pub data: &'a [u8],
}

impl AtaReply<'_> {
    /// Whether the command was carried out.
    pub fn is_success(&self) -> bool {
        self.status & 0x01 == 0
    }
}

/// The fields of a Query/Config reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigReply<'a> {
    /// How many requests may be outstanding.
    pub buffers: u16,
    /// Firmware version.
    pub firmware: u16,
    /// Sectors per frame.
    pub sectors: u8,
    /// Version of the command; 1.
    pub version: u8,
    /// Subcommand.
    pub sub: u8,
    /// What the length field says.
    pub length: u16,
    /// The string, as much of it as the frame holds.
    pub string: &'a [u8],
}

/// The fields of a Mask reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskReply {
    /// MCmd.
    pub mcmd: u8,
    /// MError; 0 is success.
    pub error: u8,
    /// Entries of the list, or the directive at which it went wrong.
    pub count: u8,
    /// The list, as much of it as the frame holds; empty where `error` is set.
    pub list: Vec<MacAddr>,
}

/// The fields of a Reserve reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReserveReply {
    /// RCmd.
    pub rcmd: u8,
    /// Entries of the list.
    pub count: u8,
    /// The list, as much of it as the frame holds.
    pub list: Vec<MacAddr>,
}

impl Reply {
    /// A frame with an AoE header; anything else is handed back.
    pub fn parse(bytes: Vec<u8>) -> std::result::Result<Reply, Vec<u8>> {
        match bytes.get(..BODY) {
            Some(header) if header[12..14] == ETHERTYPE.to_be_bytes() => Ok(Reply { bytes }),
            _ => Err(bytes),
        }
    }

    /// All bytes, Ethernet header first.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whom it is for.
    pub fn destination(&self) -> MacAddr {
        self.mac(0)
    }

    /// Who sent it.
    pub fn source(&self) -> MacAddr {
        self.mac(6)
    }

    /// AoE version.
    pub fn version(&self) -> u8 {
        self.bytes[14] >> 4
    }

    /// The four flag bits.
    pub fn flags(&self) -> u8 {
        self.bytes[14] & 0x0F
    }

    /// Whether R is set.
    pub fn is_response(&self) -> bool {
        self.flags() & FLAG_RESPONSE != 0
    }

    /// The AoE error: its code if E is set.
    pub fn error(&self) -> Option<u8> {
        (self.flags() & FLAG_ERROR != 0).then_some(self.bytes[15])
    }

    /// The error byte, E set or not.
    pub fn error_byte(&self) -> u8 {
        self.bytes[15]
    }

    /// Shelf.
    pub fn shelf(&self) -> u16 {
        u16::from_be_bytes([self.bytes[16], self.bytes[17]])
    }

    /// Slot.
    pub fn slot(&self) -> u8 {
        self.bytes[18]
    }

    /// Command byte.
    pub fn command(&self) -> u8 {
        self.bytes[19]
    }

    /// The tag, big endian.
    pub fn tag(&self) -> u32 {
        u32::from_be_bytes(self.tag_bytes())
    }

    /// The tag, byte for byte.
    pub fn tag_bytes(&self) -> [u8; 4] {
        [
            self.bytes[20],
            self.bytes[21],
            self.bytes[22],
            self.bytes[23],
        ]
    }

    /// What follows the header.
    pub fn body(&self) -> &[u8] {
        &self.bytes[BODY..]
    }

    /// Reads it as ATA.
    pub fn ata(&self) -> Option<AtaReply<'_>> {
        let data = self.bytes.get(DATA..).filter(|_| self.command() == ATA)?;
        let r = &self.bytes[BODY..DATA];
        Some(AtaReply {
            aflags: r[0],
            error: r[1],
            count: r[2],
            status: r[3],
            lba: u64::from_le_bytes([r[4], r[5], r[6], r[7], r[8], r[9], 0, 0]),
            reserved: [r[10], r[11]],
            data,
        })
    }

    /// The data of `count` sectors, if it is a successful ATA reply that holds
    /// them.
    pub fn sectors(&self, count: u8) -> Option<&[u8]> {
        let ata = self.ata().filter(|_| self.error().is_none())?;
        let data = ata.data.get(..usize::from(count) * SECTOR)?;
        ata.is_success().then_some(data)
    }

    /// Whether CRC8x4 stands behind the data of `count` sectors and is right.
    pub fn crc_matches(&self, count: u8) -> bool {
        let end = DATA + usize::from(count) * SECTOR;
        match (self.bytes.get(BODY..end), self.bytes.get(end..end + 4)) {
            (Some(covered), Some(crc)) => crc8x4(covered) == crc,
            _ => false,
        }
    }

    /// Reads it as Query/Config.
    pub fn config(&self) -> Option<ConfigReply<'_>> {
        let rest = self.bytes.get(32..).filter(|_| self.command() == CONFIG)?;
        let b = &self.bytes[BODY..32];
        let length = u16::from_be_bytes([b[6], b[7]]);
        Some(ConfigReply {
            buffers: u16::from_be_bytes([b[0], b[1]]),
            firmware: u16::from_be_bytes([b[2], b[3]]),
            sectors: b[4],
            version: b[5] >> 4,
            sub: b[5] & 0x0F,
            length,
            string: &rest[..rest.len().min(usize::from(length))],
        })
    }

    /// Reads it as Mask.
    pub fn mask(&self) -> Option<MaskReply> {
        let rest = self.bytes.get(28..).filter(|_| self.command() == MASK)?;
        let (error, count) = (self.bytes[26], self.bytes[27]);
        let listed = if error == 0 { usize::from(count) } else { 0 };
        Some(MaskReply {
            mcmd: self.bytes[25],
            error,
            count,
            list: rest
                .chunks_exact(8)
                .take(listed)
                .map(|entry| mac(&entry[2..]))
                .collect(),
        })
    }

    /// Reads it as Reserve/Release.
    pub fn reserve(&self) -> Option<ReserveReply> {
        let rest = self.bytes.get(26..).filter(|_| self.command() == RESERVE)?;
        let count = self.bytes[25];
        Some(ReserveReply {
            rcmd: self.bytes[24],
            count,
            list: rest
                .chunks_exact(6)
                .take(usize::from(count))
                .map(mac)
                .collect(),
        })
    }

    /// Reads it as Extensions: the strings, without the empty one at the end.
    pub fn extensions(&self) -> Option<Vec<String>> {
        let rest = self
            .bytes
            .get(26..)
            .filter(|_| self.command() == EXTENSIONS)?;
        let length = u16::from_le_bytes([self.bytes[24], self.bytes[25]]);
        let strings = rest.get(..usize::from(length))?;
        Some(
            strings
                .split(|b| *b == 0)
                .filter(|s| !s.is_empty())
                .map(|s| String::from_utf8_lossy(s).into_owned())
                .collect(),
        )
    }

    /// What breaks the rules that hold for every reply to this request
    /// (protocol.md 1): empty if nothing does.
    pub fn breaches(&self, request: &[u8], shelf: u16, slot: u8) -> Vec<String> {
        let mut found = Vec::new();
        let mut rule = |kept: bool, what: &str| {
            if !kept {
                found.push(format!("{what}: {self:?}"));
            }
        };
        if request.len() < BODY {
            rule(false, "an answer to less than a header");
            return found;
        }
        rule(
            self.bytes[..6] == request[6..12],
            "not addressed to the asker",
        );
        rule(!self.source().is_group(), "from a group address");
        rule(self.version() == 1, "version is not 1");
        rule(
            self.flags() & 0x0B == FLAG_RESPONSE,
            "flags are not R, or R and E",
        );
        rule(
            self.error().is_some() || self.error_byte() == 0,
            "an error code without E",
        );
        rule(
            self.error().is_none_or(|code| (1..=6).contains(&code)),
            "an error code that AoE has not",
        );
        rule(
            (self.shelf(), self.slot()) == (shelf, slot),
            "another shelf or slot",
        );
        rule(self.command() == request[19], "another command");
        rule(self.bytes[20..24] == request[20..24], "another tag");
        rule(self.bytes.len() >= 60, "shorter than 60 bytes");
        found
    }

    fn mac(&self, at: usize) -> MacAddr {
        mac(&self.bytes[at..])
    }
}

/// Prints the fields and at most the first bytes of the body.
impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes from {} to {}, e{}.{} version {} flags {:#x} error {} command {:#x} tag {:#010x} body {:02x?}",
            self.bytes.len(),
            self.source(),
            self.destination(),
            self.shelf(),
            self.slot(),
            self.version(),
            self.flags(),
            self.error_byte(),
            self.command(),
            self.tag(),
            &self.body()[..self.body().len().min(20)]
        )
    }
}

fn mac(bytes: &[u8]) -> MacAddr {
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(bytes) {
        *to = *from;
    }
    MacAddr(mac)
}

/// The 256 words of an IDENTIFY answer.
#[derive(Clone, PartialEq, Eq)]
pub struct Identify(Vec<u8>);

impl Identify {
    /// The words in `data`, if there are 256.
    pub fn parse(data: &[u8]) -> Option<Identify> {
        data.get(..SECTOR).map(|words| Identify(words.to_vec()))
    }

    /// The bytes as they came.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// One word; 0 past the last.
    pub fn word(&self, index: usize) -> u16 {
        match self.0.get(2 * index..2 * index + 2) {
            Some(w) => u16::from_le_bytes([w[0], w[1]]),
            None => 0,
        }
    }

    /// Sectors by LBA48, words 100 to 103.
    pub fn sectors(&self) -> u64 {
        (0..4).fold(0, |n, i| n | u64::from(self.word(100 + i)) << (16 * i))
    }

    /// Sectors by LBA28, words 60 and 61.
    pub fn sectors28(&self) -> u32 {
        u32::from(self.word(60)) | u32::from(self.word(61)) << 16
    }

    /// Serial number, words 10 to 19.
    pub fn serial(&self) -> String {
        self.text(10, 10)
    }

    /// Firmware revision, words 23 to 26.
    pub fn firmware(&self) -> String {
        self.text(23, 4)
    }

    /// Model, words 27 to 46.
    pub fn model(&self) -> String {
        self.text(27, 20)
    }

    /// Whether word 255 is 0xA5 and the checksum that makes the sum of all
    /// bytes 0.
    pub fn is_intact(&self) -> bool {
        self.0[510] == 0xA5 && self.0.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)) == 0
    }

    /// Byte-swapped ASCII without the spaces round it.
    fn text(&self, first: usize, words: usize) -> String {
        let bytes: Vec<u8> = (first..first + words)
            .flat_map(|i| self.word(i).to_be_bytes())
            .collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

impl fmt::Debug for Identify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IDENTIFY of {} sectors, model '{}', serial '{}', firmware '{}'",
            self.sectors(),
            self.model(),
            self.serial(),
            self.firmware()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(command: u8, flags: u8, body: &[u8]) -> Reply {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xA2, flags, 0];
        bytes.extend([0, 7, 9, command, 0x80, 1, 2, 3]);
        bytes.extend(body);
        Reply::parse(bytes).unwrap()
    }

    #[test]
    fn the_header_is_read() {
        let mut r = reply(0, 0x1C, &[]);
        r.bytes[15] = 6;
        assert_eq!(
            (r.version(), r.flags(), r.error(), r.shelf(), r.slot()),
            (1, 0xC, Some(6), 7, 9)
        );
        assert_eq!((r.tag(), r.command()), (0x8001_0203, 0));
        assert_eq!(r.destination(), MacAddr([2, 0, 0, 0, 0, 1]));
        assert_eq!(r.source(), MacAddr([2, 0, 0, 0, 0, 2]));
        assert!(r.ata().is_none() && r.config().is_none());
        assert!(Reply::parse(r.bytes[..23].to_vec()).is_err());
        r.bytes[12] = 8;
        assert!(Reply::parse(r.bytes).is_err());
    }

    #[test]
    fn registers_are_read() {
        let mut body = vec![0x41, 4, 8, 0x41, 1, 2, 3, 4, 5, 6, 7, 8];
        body.extend([9; 512]);
        let r = reply(0, 0x18, &body);
        let ata = r.ata().unwrap();
        assert_eq!((ata.aflags, ata.error, ata.count), (0x41, 4, 8));
        assert_eq!((ata.lba, ata.reserved), (0x0605_0403_0201, [7, 8]));
        assert!(!ata.is_success() && r.sectors(1).is_none());
        body[3] = 0x40;
        let r = reply(0, 0x18, &body);
        assert_eq!(r.sectors(1), Some(&[9; 512][..]));
        assert_eq!(r.sectors(2), None);
        assert!(!r.crc_matches(1));
        let crc = crc8x4(&body);
        body.extend(crc);
        assert!(reply(0, 0x18, &body).crc_matches(1));
    }

    #[test]
    fn config_strings_end_where_the_frame_does() {
        let r = reply(1, 0x18, b"\0\x40\x40\x17\x11\x13\0\x04disk\0\0\0");
        let c = r.config().unwrap();
        assert_eq!((c.buffers, c.firmware, c.sectors), (64, 0x4017, 17));
        assert_eq!((c.version, c.sub, c.length), (1, 3, 4));
        assert_eq!(c.string, b"disk");
        let r = reply(1, 0x18, b"\0\x40\x40\x17\x11\x13\0\x09disk");
        assert_eq!(r.config().unwrap().string, b"disk");
    }

    #[test]
    fn lists_are_read() {
        let r = reply(2, 0x18, b"\0\x01\0\x01\0\0\x01\x02\x03\x04\x05\x06\0\0");
        let mac = MacAddr([1, 2, 3, 4, 5, 6]);
        assert_eq!(r.mask().unwrap().list, [mac]);
        let r = reply(2, 0x18, b"\0\x01\x03\x01\0\0\x01\x02\x03\x04\x05\x06");
        let mask = r.mask().unwrap();
        assert_eq!((mask.error, mask.count, mask.list.len()), (3, 1, 0));
        let r = reply(3, 0x18, b"\x01\x02\x01\x02\x03\x04\x05\x06");
        let reserve = r.reserve().unwrap();
        assert_eq!((reserve.rcmd, reserve.count), (1, 2));
        assert_eq!(reserve.list, [mac]);
        let r = reply(0x23, 0x18, b"\x0c\0RESET\0foo\0\0");
        assert!(r.extensions().is_none(), "the length is past the end");
        let r = reply(0x23, 0x18, b"\x0b\0RESET\0foo\0\0");
        assert_eq!(r.extensions().unwrap(), ["RESET", "foo"]);
    }

    #[test]
    fn breaches_are_named() {
        let mut request = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xA2, 0x10, 0];
        request.extend([0, 7, 9, 1, 0x80, 1, 2, 3]);
        let mut good = reply(1, 0x18, &[0; 36]);
        assert_eq!(good.breaches(&request, 7, 9), Vec::<String>::new());
        assert_eq!(good.breaches(&request, 8, 9).len(), 1);
        good.bytes[14] = 0x1B;
        good.bytes[15] = 1;
        assert_eq!(good.breaches(&request, 7, 9).len(), 2);
        assert_eq!(reply(1, 0x18, &[]).breaches(&request, 7, 9).len(), 1);
    }

    #[test]
    fn identify_words_are_read() {
        let mut data = vec![0; 512];
        data[120..124].copy_from_slice(&[1, 2, 3, 4]);
        data[200..208].copy_from_slice(&[1, 2, 3, 4, 5, 6, 0, 0]);
        data[54..94].copy_from_slice(b"oMed l                                  ");
        data[510] = 0xA5;
        let sum = data.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        data[511] = sum.wrapping_neg();
        let id = Identify::parse(&data).unwrap();
        assert_eq!(id.sectors28(), 0x0403_0201);
        assert_eq!(id.sectors(), 0x0605_0403_0201);
        assert_eq!(id.model(), "Model");
        assert!(id.is_intact() && Identify::parse(&data[1..]).is_none());
    }
}
