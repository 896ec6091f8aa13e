//! Command 0, ATA: a taskfile, and data behind it.
//!
//! ```text
//! 24  aflags: write 0x01, async 0x02, device/head 0x10, LBA48 0x40   echoed
//! 25  feature                              reply: error register
//! 26  sector count                         reply: sectors not transferred
//! 27  ATA command                          reply: ATA status
//! 28  LBA0..LBA5, lowest first                                       echoed
//! 34  reserved (2)                                                   echoed
//! 36  data, 512 bytes a sector
//! ```

/// The command byte.
pub const COMMAND: u8 = 0;
/// Where the taskfile ends and data begins.
pub const DATA: usize = 36;
/// Bytes of a sector on the wire.
pub const SECTOR: usize = 512;

const TASKFILE: usize = 24;

/// The registers of a request as they came, meaning nothing yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taskfile {
    /// The AoE flags; never believed, only echoed.
    pub aflags: u8,
    /// The feature register.
    pub feature: u8,
    /// The sector count.
    pub count: u8,
    /// The ATA command, which alone decides what the rest means.
    pub opcode: u8,
    /// The LBA bytes, lowest first.
    pub lba: [u8; 6],
    reserved: [u8; 2],
}

impl Taskfile {
    /// The registers and what follows them, if the frame reaches that far.
    pub(super) fn parse(frame: &[u8]) -> Option<(Taskfile, Payload<'_>)> {
        let data = frame.get(DATA..)?;
        let t = &frame[TASKFILE..DATA];
        let taskfile = Taskfile {
            aflags: t[0],
            feature: t[1],
            count: t[2],
            opcode: t[3],
            lba: [t[4], t[5], t[6], t[7], t[8], t[9]],
            reserved: [t[10], t[11]],
        };
        Some((taskfile, Payload(data)))
    }

    /// The low 28 bits; what stands above them is junk (0xE0 from Linux).
    pub fn lba28(&self) -> u64 {
        let [a, b, c, d, ..] = self.lba;
        u64::from(u32::from_le_bytes([a, b, c, d & 0x0F]))
    }

    /// All 48 bits.
    pub fn lba48(&self) -> u64 {
        let [a, b, c, d, e, f] = self.lba;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// Writes the registers of the answer behind its header.
    ///
    /// `head` holds at least [`DATA`] bytes.
    pub fn reply(&self, head: &mut [u8], outcome: Outcome) {
        let t = &mut head[TASKFILE..DATA];
        t[0] = self.aflags;
        t[1] = outcome.error;
        t[2] = outcome.left;
        t[3] = outcome.status;
        t[4..10].copy_from_slice(&self.lba);
        t[10..12].copy_from_slice(&self.reserved);
    }
}

/// The bytes behind a taskfile, as many as the frame holds.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a>(&'a [u8]);

impl<'a> Payload<'a> {
    /// The data of `count` sectors, if it is all there; more is ignored.
    pub fn sectors(self, count: u8) -> Option<&'a [u8]> {
        self.0.get(..usize::from(count) * SECTOR)
    }
}

/// What the registers of an answer say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The ATA status register.
    pub status: u8,
    /// The ATA error register.
    pub error: u8,
    /// Sectors not transferred.
    pub left: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_and_echoed() {
        let mut frame = [0u8; 40];
        frame[24..36].copy_from_slice(&[0x41, 9, 2, 0x24, 1, 2, 3, 0xE4, 5, 6, 7, 8]);
        frame[36..40].copy_from_slice(b"data");
        let (t, payload) = Taskfile::parse(&frame).unwrap();
        assert_eq!((t.count, t.opcode, t.feature), (2, 0x24, 9));
        assert_eq!(t.lba28(), 0x0403_0201);
        assert_eq!(t.lba48(), 0x0605_E403_0201);
        assert_eq!(payload.sectors(1), None);
        assert_eq!(payload.sectors(0), Some(&[][..]));

        let mut head = [0xA5; DATA];
        t.reply(
            &mut head,
            Outcome {
                status: 0x41,
                error: 0x10,
                left: 2,
            },
        );
        assert_eq!(
            head[24..36],
            [0x41, 0x10, 2, 0x41, 1, 2, 3, 0xE4, 5, 6, 7, 8]
        );
    }
}
