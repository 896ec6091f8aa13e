//! The ATA side: what a taskfile orders, and what the drive says of itself.
//!
//! [`decode`] is the only place that looks at bounds. The opcode alone decides
//! between 28 and 48 bits and about the direction of data; the AoE flags never
//! do, since initiators set them wrongly.

mod identify;
mod smart;

use shadow::{Extent, Lba};

use crate::wire::ata::{DATA, Outcome, Payload, SECTOR, Taskfile};
use crate::wire::{ErrorCode, MIN_FRAME, pad_to};

pub use identify::Identity;
pub use smart::{FAILING, GOOD, Health, Smart};

/// Opcodes, by their names in ATA8-ACS.
mod op {
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
    pub const FLUSH_CACHE: u8 = 0xE7;
    pub const FLUSH_CACHE_EXT: u8 = 0xEA;
    pub const IDENTIFY: u8 = 0xEC;
    pub const SET_FEATURES: u8 = 0xEF;
}

const WRITE_CACHE_ON: u8 = 0x02;
const WRITE_CACHE_OFF: u8 = 0x82;
const TRIM: u8 = 0x01;
/// TRIM ranges come in this many sectors at most (IDENTIFY word 105).
const TRIM_SECTORS: u8 = 1;

const DRDY: u8 = 0x40;
const ERR: u8 = 0x01;
/// Device fault.
const DF: u8 = 0x20;
const ABRT: u8 = 0x04;
const IDNF: u8 = 0x10;
const UNC: u8 = 0x40;
/// What CHECK POWER MODE answers: active or idle.
const POWER_ACTIVE: u8 = 0xFF;

/// Done, all of it.
pub const SUCCESS: Outcome = Outcome {
    status: DRDY,
    error: 0,
    left: 0,
};
/// The answer to CHECK POWER MODE.
pub const ACTIVE: Outcome = Outcome {
    status: DRDY,
    error: 0,
    left: POWER_ACTIVE,
};

/// Not done: no such command, or not allowed.
pub fn aborted(taskfile: &Taskfile) -> Outcome {
    Outcome {
        status: DRDY | ERR,
        error: ABRT,
        left: taskfile.count,
    }
}

/// Not done: past the end of the device.
fn not_found(taskfile: &Taskfile) -> Outcome {
    Outcome {
        status: DRDY | ERR,
        error: IDNF,
        left: taskfile.count,
    }
}

/// The disk below could not read.
pub fn unreadable(taskfile: &Taskfile) -> Outcome {
    Outcome {
        status: DRDY | ERR,
        error: UNC,
        left: taskfile.count,
    }
}

/// The disk below could not write or sync.
pub fn fault(taskfile: &Taskfile) -> Outcome {
    Outcome {
        status: DRDY | DF | ERR,
        error: ABRT,
        left: taskfile.count,
    }
}

/// What a taskfile orders, its arguments checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order<'a> {
    /// Data of these sectors, perhaps of none.
    Read(Extent),
    /// This data to these sectors, perhaps to none.
    Write(Extent, &'a [u8]),
    /// Whether these sectors can be read.
    Verify(Extent),
    /// These sectors are not needed any more and read as zeros.
    Trim(Vec<Extent>),
    /// Everything acknowledged to stable storage.
    Flush,
    /// The 512 bytes of IDENTIFY.
    Identify,
    /// The power mode.
    CheckPower,
    /// The write cache on or off, for who asks.
    WriteCache(bool),
    /// A SMART command.
    Smart(Smart),
}

/// Why a taskfile is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An ATA error in the registers.
    Ata(Outcome),
    /// An error of AoE itself.
    Aoe(ErrorCode),
}

/// What a taskfile is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sectors of the device.
    pub sectors: u64,
    /// Sectors one frame of this NIC may carry.
    pub frame_sectors: u8,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the operator said that the write cache stays off (`-s`).
    pub always_durable: bool,
    /// Whether the operator said that nobody switches anything
    /// (`--deny features`).
    pub deny_features: bool,
    /// Whether the backing can discard.
    pub trim: bool,
    /// Whether SMART is enabled for who asks.
    pub smart: bool,
}

/// Whether the command changes the disk or the drive, so that it must be meant
/// for this export alone.
pub fn changes_something(taskfile: &Taskfile) -> bool {
    is_write(taskfile) || taskfile.opcode == op::SET_FEATURES
}

/// Whether it changes sectors: a write, or a TRIM, which is one in every
/// respect.
pub fn is_write(taskfile: &Taskfile) -> bool {
    matches!(
        taskfile.opcode,
        op::WRITE | op::WRITE_EXT | op::WRITE_DMA | op::WRITE_DMA_EXT | op::DATA_SET_MANAGEMENT
    )
}

/// Whether it reads sectors.
pub fn is_read(taskfile: &Taskfile) -> bool {
    matches!(
        taskfile.opcode,
        op::READ | op::READ_EXT | op::READ_DMA | op::READ_DMA_EXT
    )
}

/// Whether the data of its answer has a checksum for those who want one.
pub fn answers_with_sum(taskfile: &Taskfile) -> bool {
    is_read(taskfile) || is_identify(taskfile)
}

/// The first sector it names, as its opcode reads it.
pub fn lba(taskfile: &Taskfile) -> u64 {
    match taskfile.opcode {
        op::READ | op::READ_DMA | op::READ_VERIFY | op::WRITE | op::WRITE_DMA => taskfile.lba28(),
        _ => taskfile.lba48(),
    }
}

/// Whether it is IDENTIFY, which a reservation does not refuse.
pub fn is_identify(taskfile: &Taskfile) -> bool {
    taskfile.opcode == op::IDENTIFY
}

/// How long an answer of registers alone must be at least. aoeping, which is
/// how one asks a target for SMART, takes every answer to a SMART command for
/// none that has no room for a sector.
fn shortest_answer(taskfile: &Taskfile) -> usize {
    match taskfile.opcode {
        op::SMART => DATA + SECTOR,
        _ => MIN_FRAME,
    }
}

/// Pads an answer of registers alone; returns its length.
pub fn pad_registers(head: &mut [u8], taskfile: &Taskfile) -> usize {
    pad_to(head, DATA, shortest_answer(taskfile))
}

/// What the taskfile orders, or the answer that refuses it.
pub fn decode<'a>(
    taskfile: &Taskfile,
    payload: Payload<'a>,
    limits: &Limits,
) -> Result<Order<'a>, Refusal> {
    const BAD: Refusal = Refusal::Aoe(ErrorCode::BadArgument);
    let abort = Refusal::Ata(aborted(taskfile));
    let within = |lba: u64| {
        Extent::new(Lba(lba), u64::from(taskfile.count))
            // Of no sector none can lie past the end.
            .filter(|extent| {
                let sectors = limits.sectors + u64::from(shadow::fault!("one-sector-past-the-end"));
                extent.is_empty() || extent.fits(sectors)
            })
            .ok_or(Refusal::Ata(not_found(taskfile)))
    };
    // A frame holds what we said it holds; more than that was never offered.
    let fits_a_frame = || {
        (taskfile.count <= limits.frame_sectors)
            .then_some(())
            .ok_or(BAD)
    };
    let writable = || (!limits.read_only).then_some(()).ok_or(abort);

    match taskfile.opcode {
        op::READ | op::READ_DMA | op::READ_EXT | op::READ_DMA_EXT => {
            fits_a_frame().and_then(|()| within(lba(taskfile)))
        }
        op::READ_VERIFY | op::READ_VERIFY_EXT => return within(lba(taskfile)).map(Order::Verify),
        op::WRITE | op::WRITE_DMA | op::WRITE_EXT | op::WRITE_DMA_EXT => {
            writable()?;
            fits_a_frame()?;
            let data = payload.sectors(taskfile.count).ok_or(BAD)?;
            return within(lba(taskfile)).map(|extent| Order::Write(extent, data));
        }
        op::DATA_SET_MANAGEMENT => {
            writable()?;
            if !limits.trim || taskfile.feature & TRIM == 0 || taskfile.count != TRIM_SECTORS {
                return Err(abort);
            }
            let data = payload.sectors(taskfile.count).ok_or(BAD)?;
            return trim_ranges(data, limits.sectors)
                .map(Order::Trim)
                .ok_or(Refusal::Ata(not_found(taskfile)));
        }
        op::IDENTIFY => return (taskfile.count == 1).then_some(Order::Identify).ok_or(BAD),
        op::FLUSH_CACHE | op::FLUSH_CACHE_EXT => return Ok(Order::Flush),
        op::CHECK_POWER_MODE => return Ok(Order::CheckPower),
        op::SET_FEATURES => {
            return match taskfile.feature {
                _ if limits.deny_features => Err(abort),
                WRITE_CACHE_OFF => Ok(Order::WriteCache(false)),
                WRITE_CACHE_ON if !limits.always_durable => Ok(Order::WriteCache(true)),
                _ => Err(abort),
            };
        }
        op::SMART => {
            return Smart::decode(taskfile, limits.smart)
                .filter(|order| !matches!(order, Smart::Enable(_)) || !limits.deny_features)
                .map(Order::Smart)
                .ok_or(abort);
        }
        _ => return Err(abort),
    }
    .map(Order::Read)
}

/// The ranges of a TRIM, empty ones left out; `None` if any leads past the end
/// of the device. Each is 8 bytes, little endian: LBA (6), count (2).
fn trim_ranges(data: &[u8], sectors: u64) -> Option<Vec<Extent>> {
    data.chunks_exact(8)
        .map(|entry| {
            let [lba @ .., low, high] = [
                entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7],
            ];
            let [a, b, c, d, e, f] = lba;
            let lba = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
            (lba, u64::from(u16::from_le_bytes([low, high])))
        })
        .filter(|(_, count)| *count > 0)
        .map(|(lba, count)| Extent::new(Lba(lba), count).filter(|extent| extent.fits(sectors)))
        .collect()
}

/// The bytes that IDENTIFY and SMART READ DATA return.
pub type Page = [u8; SECTOR];

#[cfg(test)]
mod tests;
