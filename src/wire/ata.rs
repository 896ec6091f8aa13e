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
//!
//! Where several reads come in one frame (AoEde), each with an answer of its
//! own, there stands behind the registers of a READ:
//!
//! ```text
//! 36  count of further reads, 16 bytes each:
//!         0 tag (4)   4 LBA, lowest first (6)   10 reserved (5)   15 sector count
//! ```

/// The command byte.
pub const COMMAND: u8 = 0;
/// Where the taskfile ends and data begins.
pub const DATA: usize = 36;
/// Bytes of a sector on the wire.
pub const SECTOR: usize = 512;

const TASKFILE: usize = 24;
/// Bytes of a further read in one frame.
const FURTHER_READ: usize = 16;

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
    /// No bytes.
    pub const NONE: Payload<'static> = Payload(&[]);

    /// The data of `count` sectors, if it is all there; more is ignored.
    pub fn sectors(self, count: u8) -> Option<&'a [u8]> {
        self.0.get(..usize::from(count) * SECTOR)
    }

    /// The further reads behind those registers: their tags, and registers of
    /// their own. Those beyond the frame are left out, and so is padding.
    pub fn further_reads(self, first: Taskfile) -> impl Iterator<Item = ([u8; 4], Taskfile)> + 'a {
        let (count, entries) = self.0.split_first().unwrap_or((&0, &[]));
        entries
            .chunks_exact(FURTHER_READ)
            .take(usize::from(*count))
            .filter(|e| e.iter().any(|byte| *byte != 0))
            .map(move |e| {
                let taskfile = Taskfile {
                    count: e[15],
                    lba: [e[4], e[5], e[6], e[7], e[8], e[9]],
                    reserved: [0; 2],
                    ..first
                };
                ([e[0], e[1], e[2], e[3]], taskfile)
            })
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
        assert_eq!(payload.further_reads(t).count(), 0);
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

    #[test]
    fn further_reads_are_those_in_the_frame() {
        let mut frame = vec![0u8; 36];
        frame[24..36].copy_from_slice(&[0x40, 7, 2, 0x24, 1, 0, 0, 0, 0, 0, 8, 9]);
        frame.push(3);
        frame.extend_from_slice(&[1, 2, 3, 4, 9, 8, 7, 6, 5, 4, 0xEE, 0, 0, 0, 0xEE, 2]);
        frame.extend_from_slice(&[0; 16]);
        frame.extend_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend_from_slice(&[5; 16]);
        let list = |frame: &[u8]| -> Vec<_> {
            let (first, payload) = Taskfile::parse(frame).unwrap();
            payload.further_reads(first).collect()
        };
        // The second is padding, the fourth not counted.
        let got = list(&frame);
        assert_eq!(got.len(), 2);
        let (tag, taskfile) = got[0];
        assert_eq!((tag, taskfile.count), ([1, 2, 3, 4], 2));
        assert_eq!((taskfile.aflags, taskfile.opcode), (0x40, 0x24));
        assert_eq!(taskfile.lba48(), 0x0405_0607_0809);
        assert_eq!((got[1].0, got[1].1.count), ([0; 4], 0));
        // Of a count past the frame those inside it are taken.
        frame[36] = 255;
        assert_eq!(list(&frame).len(), 3);
        frame[36] = 4;
        for len in 36..frame.len() {
            assert!(list(&frame[..len]).len() <= (len - 36) / 16, "{len}");
        }
        frame[36] = 0;
        assert_eq!(list(&frame), []);
    }
}
