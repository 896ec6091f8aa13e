//! SMART: health from our own error counters (ATA8-ACS 7.53).

use super::Page;
use crate::wire::ata::Taskfile;

const READ_DATA: u8 = 0xD0;
const ENABLE: u8 = 0xD8;
const DISABLE: u8 = 0xD9;
const RETURN_STATUS: u8 = 0xDA;

/// What LBA1 and LBA2 say in every SMART request, and in RETURN STATUS's answer
/// while all is well.
pub const GOOD: [u8; 2] = [0x4F, 0xC2];
/// What they say once the drive has failed.
pub const FAILING: [u8; 2] = [0xF4, 0x2C];

/// The SMART commands we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Smart {
    /// The attributes.
    ReadData,
    /// SMART on or off, for who asks.
    Enable(bool),
    /// Good or failing.
    ReturnStatus,
}

impl Smart {
    /// The command of a taskfile; while SMART is disabled only ENABLE is one.
    pub(super) fn decode(taskfile: &Taskfile, enabled: bool) -> Option<Smart> {
        if taskfile.lba[1..3] != GOOD {
            return None;
        }
        match taskfile.feature {
            ENABLE => Some(Smart::Enable(true)),
            _ if !enabled => None,
            READ_DATA => Some(Smart::ReadData),
            DISABLE => Some(Smart::Enable(false)),
            RETURN_STATUS => Some(Smart::ReturnStatus),
            _ => None,
        }
    }
}

/// What the export has counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Reads that the disk below failed.
    pub reads_failed: u64,
    /// Writes that it failed.
    pub writes_failed: u64,
    /// Syncs that it failed.
    pub syncs_failed: u64,
    /// Hours since the start.
    pub hours: u64,
}

impl Health {
    /// Whether RETURN STATUS says good: nothing written was ever lost below. A
    /// sector that cannot be read is counted, but makes no failing drive.
    pub fn is_good(&self) -> bool {
        self.writes_failed == 0 && self.syncs_failed == 0
    }

    /// The 512 bytes of READ DATA, little endian:
    ///
    /// ```text
    ///   0  revision (2)        362  off-line status and times, zero
    ///   2  30 attributes of    367  off-line capability, none
    ///      12 bytes            511  checksum: all bytes add up to 0
    ///
    /// an attribute: id, flags (2), value, worst, raw (6), reserved
    /// ```
    pub fn page(&self) -> Page {
        const REVISION: u16 = 0x10;
        let value = |bad: u64| 100 - bad.min(99) as u8;
        let attributes = [
            // Uncorrectable reads, power-on hours, write errors, sync errors
            // (the last as "end-to-end error": it reached us, not the disk).
            (187, value(self.reads_failed), self.reads_failed),
            (9, 100, self.hours),
            (200, value(self.writes_failed), self.writes_failed),
            (184, value(self.syncs_failed), self.syncs_failed),
        ];
        let mut page = [0; 512];
        page[0..2].copy_from_slice(&REVISION.to_le_bytes());
        for (slot, (id, value, raw)) in page[2..362].chunks_exact_mut(12).zip(attributes) {
            slot[0] = id;
            // Bit 1: updated while in service.
            slot[1] = 0x02;
            slot[3..5].fill(value);
            slot[5..11].copy_from_slice(&raw.to_le_bytes()[..6]);
        }
        let sum = page.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        page[511] = sum.wrapping_neg();
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_adds_up_and_carries_the_counters() {
        let health = Health {
            reads_failed: 3,
            writes_failed: 0x0102,
            syncs_failed: 0,
            hours: 9,
        };
        let page = health.page();
        assert_eq!(page.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        assert_eq!(page[2..14], [187, 2, 0, 97, 97, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[26..38], [200, 2, 0, 1, 1, 2, 1, 0, 0, 0, 0, 0]);
        assert!(!health.is_good() && Health::default().is_good());
    }
}
