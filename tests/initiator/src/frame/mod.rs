//! Requests to bytes, replies from bytes.
//!
//! A [`Frame`] is a request that is not bytes yet: what it leaves open (MACs,
//! shelf, slot, tag) the sender fills in from its [`Defaults`]. Every field can
//! be given a value that no honest initiator would give it, and
//! [`edit`](Frame::edit), [`length`](Frame::length) and
//! [`trailing`](Frame::trailing) reach what has no name.

mod crc;
mod reply;

use aoede::wire::MacAddr;

pub use crc::crc8x4;
pub use reply::{AtaReply, ConfigReply, Identify, MaskReply, Reply, ReserveReply};

/// The EtherType of AoE.
pub const ETHERTYPE: u16 = 0x88A2;
/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Where sector data begins.
pub const DATA: usize = 36;
/// Where the registers or arguments of a command begin.
pub const BODY: usize = 24;

/// Command byte of ATA.
pub const ATA: u8 = 0;
/// Command byte of Query/Config.
pub const CONFIG: u8 = 1;
/// Command byte of MAC Mask.
pub const MASK: u8 = 2;
/// Command byte of Reserve/Release.
pub const RESERVE: u8 = 3;
/// Command byte of AoEde's Extensions.
pub const EXTENSIONS: u8 = 0x23;

/// Response flag.
pub const FLAG_RESPONSE: u8 = 0x08;
/// Error flag.
pub const FLAG_ERROR: u8 = 0x04;

/// ATA opcodes with the names the standard gives them.
pub mod opcode {
    #![allow(missing_docs)]
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub const READ: u8 = 0x20;
    pub const READ_EXT: u8 = 0x24;
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const WRITE: u8 = 0x30;
    pub const WRITE_EXT: u8 = 0x34;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const READ_VERIFY: u8 = 0x40;
    pub const READ_VERIFY_EXT: u8 = 0x42;
    pub const SMART: u8 = 0xB0;
    pub const READ_DMA: u8 = 0xC8;
    pub const WRITE_DMA: u8 = 0xCA;
    pub const CHECK_POWER_MODE: u8 = 0xE5;
    pub const FLUSH: u8 = 0xE7;
    pub const FLUSH_EXT: u8 = 0xEA;
    pub const IDENTIFY: u8 = 0xEC;
    pub const SET_FEATURES: u8 = 0xEF;
}

/// The registers of an ATA request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ata {
    /// AoE flags: 0x01 write, 0x02 async, 0x10 device/head, 0x40 LBA48.
    pub aflags: u8,
    /// Feature register.
    pub feature: u8,
    /// Sector count.
    pub count: u8,
    /// ATA command.
    pub opcode: u8,
    /// 48 bits, sent lowest byte first; what stands above is not sent.
    pub lba: u64,
    /// The two bytes behind the LBA.
    pub reserved: [u8; 2],
}

/// One directive of a Mask edit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directive {
    /// 0 nothing, 1 add, 2 delete, 3 extension on, 4 extension off.
    pub dcmd: u8,
    /// A MAC, or the name of an extension padded with NUL.
    pub argument: [u8; 6],
}

impl Directive {
    /// Adds a MAC.
    pub fn add(mac: MacAddr) -> Directive {
        Directive {
            dcmd: 1,
            argument: mac.0,
        }
    }

    /// Deletes a MAC.
    pub fn delete(mac: MacAddr) -> Directive {
        Directive {
            dcmd: 2,
            argument: mac.0,
        }
    }

    /// Turns an extension on (protocol.md 7); of a name longer than six bytes
    /// only the first six are sent.
    pub fn extension_on(name: &str) -> Directive {
        Directive::named(3, name)
    }

    /// Turns an extension off.
    pub fn extension_off(name: &str) -> Directive {
        Directive::named(4, name)
    }

    fn named(dcmd: u8, name: &str) -> Directive {
        let mut argument = [0; 6];
        for (to, from) in argument.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Directive { dcmd, argument }
    }
}

/// What a [`Frame`] takes for the fields that it leaves open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// The target's MAC, or broadcast.
    pub destination: MacAddr,
    /// The sender's MAC.
    pub source: MacAddr,
    /// The target's shelf.
    pub shelf: u16,
    /// The target's slot.
    pub slot: u8,
    /// The tag.
    pub tag: [u8; 4],
}

/// A request that is not bytes yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    destination: Option<MacAddr>,
    source: Option<MacAddr>,
    ethertype: u16,
    version_flags: u8,
    error: u8,
    shelf: Option<u16>,
    slot: Option<u8>,
    command: u8,
    tag: Option<[u8; 4]>,
    body: Vec<u8>,
    crc: bool,
    trailing: Vec<u8>,
    edits: Vec<(usize, Vec<u8>)>,
    length: Option<usize>,
    at_least: usize,
}

/// What a frame is about.
impl Frame {
    /// Any command with these bytes behind the 24 of the header.
    pub fn command(command: u8, body: impl Into<Vec<u8>>) -> Frame {
        Frame {
            destination: None,
            source: None,
            ethertype: ETHERTYPE,
            version_flags: 0x10,
            error: 0,
            shelf: None,
            slot: None,
            command,
            tag: None,
            body: body.into(),
            crc: false,
            trailing: Vec::new(),
            edits: Vec::new(),
            length: None,
            at_least: 0,
        }
    }

    /// An ATA command with data behind its registers; the two need not agree.
    pub fn ata(registers: Ata, payload: &[u8]) -> Frame {
        let mut body = Vec::with_capacity(12 + payload.len());
        body.extend([
            registers.aflags,
            registers.feature,
            registers.count,
            registers.opcode,
        ]);
        body.extend(&registers.lba.to_le_bytes()[..6]);
        body.extend(registers.reserved);
        body.extend(payload);
        Frame::command(ATA, body)
    }

    /// READ SECTORS EXT.
    pub fn read(lba: u64, count: u8) -> Frame {
        let registers = Ata {
            aflags: 0x40,
            count,
            opcode: opcode::READ_EXT,
            lba,
            ..Ata::default()
        };
        Frame::ata(registers, &[])
    }

    /// WRITE SECTORS EXT of all of `data`: the count is its length in sectors,
    /// cut to a byte.
    pub fn write(lba: u64, data: &[u8]) -> Frame {
        let registers = Ata {
            aflags: 0x41,
            count: (data.len() / SECTOR) as u8,
            opcode: opcode::WRITE_EXT,
            lba,
            ..Ata::default()
        };
        Frame::ata(registers, data)
    }

    /// IDENTIFY DEVICE.
    pub fn identify() -> Frame {
        let registers = Ata {
            count: 1,
            opcode: opcode::IDENTIFY,
            ..Ata::default()
        };
        Frame::ata(registers, &[])
    }

    /// FLUSH CACHE EXT.
    pub fn flush() -> Frame {
        let registers = Ata {
            aflags: 0x40,
            opcode: opcode::FLUSH_EXT,
            ..Ata::default()
        };
        Frame::ata(registers, &[])
    }

    /// A READ with further reads behind it (extension `coalesced_read`), each
    /// of them a tag, an LBA and a count. `n` is what the count byte says.
    pub fn coalesced_read(first: Ata, n: u8, entries: &[([u8; 4], u64, u8)]) -> Frame {
        let mut payload = vec![n];
        for (tag, lba, count) in entries {
            payload.extend(tag);
            payload.extend(&lba.to_le_bytes()[..6]);
            payload.extend([0; 5]);
            payload.push(*count);
        }
        Frame::ata(first, &payload)
    }

    /// Query/Config with a string; its true length, cut to 16 bits, before it.
    pub fn config(sub: u8, string: &[u8]) -> Frame {
        Frame::config_raw(sub, string.len() as u16, string)
    }

    /// Query/Config with any length and any bytes behind it.
    pub fn config_raw(sub: u8, length: u16, bytes: &[u8]) -> Frame {
        let mut body = vec![0, 0, 0, 0, 0, 0x10 | (sub & 0x0F)];
        body.extend(length.to_be_bytes());
        body.extend(bytes);
        Frame::command(CONFIG, body)
    }

    /// Query/Config 5: if the string is `old`, it shall be `new`.
    pub fn config_replace(old: &[u8], new: &[u8]) -> Frame {
        let mut bytes = old.to_vec();
        bytes.extend((new.len() as u16).to_be_bytes());
        bytes.extend(new);
        Frame::config_raw(5, old.len() as u16, &bytes)
    }

    /// Reads the mask list.
    pub fn mask_read() -> Frame {
        Frame::mask_raw(0, 0, &[])
    }

    /// Edits the mask list.
    pub fn mask_edit(directives: &[Directive]) -> Frame {
        let bytes: Vec<u8> = directives
            .iter()
            .flat_map(|d| [&[0, d.dcmd][..], &d.argument].concat())
            .collect();
        Frame::mask_raw(1, directives.len() as u8, &bytes)
    }

    /// A Mask request with any MCmd, any count and any bytes behind it.
    pub fn mask_raw(mcmd: u8, count: u8, bytes: &[u8]) -> Frame {
        let mut body = vec![0, mcmd, 0, count];
        body.extend(bytes);
        Frame::command(MASK, body)
    }

    /// Reserve/Release: 0 read, 1 set, 2 force set.
    pub fn reserve(rcmd: u8, list: &[MacAddr]) -> Frame {
        let bytes: Vec<u8> = list.iter().flat_map(|mac| mac.0).collect();
        Frame::reserve_raw(rcmd, list.len() as u8, &bytes)
    }

    /// A Reserve request with any count and any bytes behind it.
    pub fn reserve_raw(rcmd: u8, count: u8, bytes: &[u8]) -> Frame {
        let mut body = vec![rcmd, count];
        body.extend(bytes);
        Frame::command(RESERVE, body)
    }

    /// AoEde's Extensions: these strings, ended as they must be.
    pub fn extensions(names: &[&str]) -> Frame {
        let mut bytes = Vec::new();
        for name in names {
            bytes.extend(name.bytes());
            bytes.push(0);
        }
        if names.is_empty() {
            bytes.push(0);
        }
        bytes.push(0);
        Frame::extensions_raw(bytes.len() as u16, &bytes)
    }

    /// Extensions with any length and any bytes behind it.
    pub fn extensions_raw(length: u16, bytes: &[u8]) -> Frame {
        let mut body = length.to_le_bytes().to_vec();
        body.extend(bytes);
        Frame::command(EXTENSIONS, body)
    }
}

/// What a frame may be told besides.
impl Frame {
    /// To this MAC.
    pub fn to(mut self, mac: MacAddr) -> Frame {
        self.destination = Some(mac);
        self
    }

    /// From this MAC, whosoever it is.
    pub fn from(mut self, mac: MacAddr) -> Frame {
        self.source = Some(mac);
        self
    }

    /// To this shelf and slot.
    pub fn at(self, shelf: u16, slot: u8) -> Frame {
        self.shelf(shelf).slot(slot)
    }

    /// To this shelf.
    pub fn shelf(mut self, shelf: u16) -> Frame {
        self.shelf = Some(shelf);
        self
    }

    /// To this slot.
    pub fn slot(mut self, slot: u8) -> Frame {
        self.slot = Some(slot);
        self
    }

    /// To every shelf and slot and to the broadcast MAC.
    pub fn everywhere(self) -> Frame {
        self.to(MacAddr::BROADCAST).at(0xFFFF, 0xFF)
    }

    /// With this tag, big endian.
    pub fn tag(self, tag: u32) -> Frame {
        self.tag_bytes(tag.to_be_bytes())
    }

    /// With this tag, byte for byte.
    pub fn tag_bytes(mut self, tag: [u8; 4]) -> Frame {
        self.tag = Some(tag);
        self
    }

    /// With this EtherType.
    pub fn ethertype(mut self, ethertype: u16) -> Frame {
        self.ethertype = ethertype;
        self
    }

    /// With this byte for version (high nibble) and flags (low nibble).
    pub fn version_flags(mut self, byte: u8) -> Frame {
        self.version_flags = byte;
        self
    }

    /// With this error byte.
    pub fn error(mut self, byte: u8) -> Frame {
        self.error = byte;
        self
    }

    /// With these bytes behind everything else.
    pub fn trailing(mut self, bytes: &[u8]) -> Frame {
        self.trailing = bytes.to_vec();
        self
    }

    /// With CRC8x4 of what stands from offset 24 on, behind it and before
    /// [`trailing`](Frame::trailing).
    pub fn with_crc(mut self) -> Frame {
        self.crc = true;
        self
    }

    /// These bytes over whatever else stands at this offset; what lies past the
    /// end of the frame is left out. Done after the CRC was taken.
    pub fn edit(mut self, offset: usize, bytes: &[u8]) -> Frame {
        self.edits.push((offset, bytes.to_vec()));
        self
    }

    /// Cut to this length, or filled up to it with zeros.
    pub fn length(mut self, length: usize) -> Frame {
        self.length = Some(length);
        self
    }

    /// Filled up with zeros to at least this length, as Ethernet does to 60.
    pub fn padded(mut self, length: usize) -> Frame {
        self.at_least = length;
        self
    }
}

/// What a frame says of itself.
impl Frame {
    /// The command byte.
    pub fn command_byte(&self) -> u8 {
        self.command
    }

    /// The tag, if it has one of its own.
    pub fn own_tag(&self) -> Option<[u8; 4]> {
        self.tag
    }

    /// The source MAC, if it has one of its own.
    pub fn own_source(&self) -> Option<MacAddr> {
        self.source
    }

    /// The bytes.
    pub fn encode(&self, defaults: &Defaults) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BODY + self.body.len() + self.trailing.len() + 4);
        bytes.extend(self.destination.unwrap_or(defaults.destination).0);
        bytes.extend(self.source.unwrap_or(defaults.source).0);
        bytes.extend(self.ethertype.to_be_bytes());
        bytes.extend([self.version_flags, self.error]);
        bytes.extend(self.shelf.unwrap_or(defaults.shelf).to_be_bytes());
        bytes.push(self.slot.unwrap_or(defaults.slot));
        bytes.push(self.command);
        bytes.extend(self.tag.unwrap_or(defaults.tag));
        bytes.extend(&self.body);
        if self.crc {
            let crc = crc8x4(&self.body);
            bytes.extend(crc);
        }
        bytes.extend(&self.trailing);
        if bytes.len() < self.at_least {
            bytes.resize(self.at_least, 0);
        }
        if let Some(length) = self.length {
            bytes.resize(length, 0);
        }
        for (offset, edit) in &self.edits {
            for (to, from) in bytes.iter_mut().skip(*offset).zip(edit) {
                *to = *from;
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults = Defaults {
        destination: MacAddr([2, 0, 0, 0, 0, 1]),
        source: MacAddr([2, 0, 0, 0, 0, 2]),
        shelf: 0x0102,
        slot: 3,
        tag: [0x80, 0, 0, 9],
    };

    fn bytes(frame: &Frame) -> Vec<u8> {
        frame.encode(&DEFAULTS)
    }

    #[test]
    fn a_read_is_laid_out() {
        let expected = [
            2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xA2, 0x10, 0, 1, 2, 3, 0, 0x80, 0, 0,
            9, // header
            0x40, 0, 8, 0x24, 6, 5, 4, 3, 2, 1, 0, 0,
        ];
        assert_eq!(bytes(&Frame::read(0x0102_0304_0506, 8)), expected);
    }

    #[test]
    fn a_write_counts_its_sectors() {
        let frame = bytes(&Frame::write(1, &[7; 1024]));
        assert_eq!(frame.len(), 36 + 1024);
        assert_eq!(frame[24..36], [0x41, 0, 2, 0x34, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert!(frame[36..].iter().all(|b| *b == 7));
    }

    #[test]
    fn config_frames_carry_true_and_false_lengths() {
        let frame = bytes(&Frame::config(3, b"disk"));
        assert_eq!(frame[19], 1);
        assert_eq!(frame[24..], *b"\0\0\0\0\0\x13\0\x04disk");
        let frame = bytes(&Frame::config_raw(4, 0xFFFE, b"d"));
        assert_eq!(frame[24..], *b"\0\0\0\0\0\x14\xFF\xFEd");
        let frame = bytes(&Frame::config_replace(b"old", b"newer"));
        assert_eq!(frame[24..], *b"\0\0\0\0\0\x15\0\x03old\0\x05newer");
    }

    #[test]
    fn lists_are_laid_out() {
        let mac = MacAddr([1, 2, 3, 4, 5, 6]);
        let frame = bytes(&Frame::mask_edit(&[
            Directive::add(mac),
            Directive::delete(mac),
            Directive::extension_on("crc8x4"),
            Directive::extension_off("reset"),
        ]));
        assert_eq!(
            frame[24..],
            *b"\0\x01\0\x04\0\x01\x01\x02\x03\x04\x05\x06\0\x02\x01\x02\x03\x04\x05\x06\0\x03crc8x4\0\x04reset\0"
        );
        let frame = bytes(&Frame::reserve(1, &[mac, mac]));
        assert_eq!(frame[24..], [1, 2, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn extensions_end_with_an_empty_string() {
        let frame = bytes(&Frame::extensions(&["reset", "crc8x4"]));
        assert_eq!(frame[19], 0x23);
        assert_eq!(frame[24..], *b"\x0e\0reset\0crc8x4\0\0");
        assert_eq!(bytes(&Frame::extensions(&[]))[24..], *b"\x02\0\0\0");
    }

    #[test]
    fn coalesced_reads_are_laid_out() {
        let first = Ata {
            count: 1,
            opcode: opcode::READ_EXT,
            ..Ata::default()
        };
        let frame = bytes(&Frame::coalesced_read(first, 1, &[([1, 2, 3, 4], 5, 6)]));
        assert_eq!(
            frame[36..],
            [1, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6]
        );
    }

    #[test]
    fn frames_can_be_wrong_on_purpose() {
        let frame = Frame::identify()
            .to(MacAddr([9; 6]))
            .from(MacAddr::BROADCAST)
            .at(5, 6)
            .tag(0x0A0B_0C0D)
            .ethertype(0x0800)
            .version_flags(0x2F)
            .error(0xEE)
            .edit(26, &[200])
            .trailing(b"x")
            .length(38);
        let out = bytes(&frame);
        assert_eq!(
            out[..24],
            [
                9, 9, 9, 9, 9, 9, 255, 255, 255, 255, 255, 255, 8, 0, 0x2F, 0xEE, 0, 5, 6, 0, 0xA,
                0xB, 0xC, 0xD
            ]
        );
        assert_eq!((out[26], out[36], out[37], out.len()), (200, b'x', 0, 38));
        assert_eq!(bytes(&Frame::identify().length(7)).len(), 7);
        assert_eq!(bytes(&Frame::identify().padded(60)).len(), 60);
        // An edit past the end changes nothing.
        assert_eq!(bytes(&Frame::identify().edit(35, &[1, 2])).len(), 36);
    }

    #[test]
    fn a_crc_covers_registers_and_data() {
        let frame = bytes(&Frame::write(0, &[0; 512]).with_crc().trailing(b"t"));
        assert_eq!(frame.len(), 36 + 512 + 4 + 1);
        assert_eq!(frame[548..552], crc8x4(&frame[24..548]));
    }
}
