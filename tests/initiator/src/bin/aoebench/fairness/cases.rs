//! What the two initiators of a case do.

use initiator::engine::{Block, Op, Order, Plan};
use initiator::frame::{Ata, Frame, opcode};

/// Sectors of the device. One half is the polite initiator's, the other the
/// hostile one's.
pub(super) const SECTORS: u64 = 1 << 21;
const HALF: u64 = SECTORS / 2;
/// Sectors that the polite initiator writes and reads again and again.
const REGION: u64 = 8 << 11;
/// Sectors of a READ in the coalesced frames: what a frame of 9000 bytes carries.
const LONG: u8 = 17;

/// A polite initiator beside a hostile one.
pub(super) struct Case {
    pub(super) name: &'static str,
    /// The entry of the list of attacks that it repeats.
    pub(super) what: &'static str,
    /// Options of the target.
    pub(super) options: &'static [&'static str],
    /// Bytes of a sector of the device.
    pub(super) sector: usize,
    /// `true` if the disk is to be slow.
    pub(super) slow: bool,
    /// `true` if the polite initiator's region is in the cache.
    pub(super) warm: bool,
    pub(super) polite: fn() -> Plan,
    /// Hostile frames a second.
    pub(super) rate: u32,
    /// The hostile frame of this number; the first is sent once, before all
    /// others.
    pub(super) hostile: fn(u64) -> Frame,
}

/// All cases.
pub(super) static CASES: [Case; 9] = [
    Case {
        name: "verify:flush",
        what: "writes with a FLUSH in 16; 200 READ VERIFY/s of 255 sectors",
        options: &[],
        sector: 512,
        slow: true,
        warm: false,
        polite: flushed_writes,
        rate: 200,
        hostile: verify,
    },
    Case {
        name: "verify:durable",
        what: "writes with -s; 200 READ VERIFY/s of 255 sectors",
        options: &["-s"],
        sector: 512,
        slow: true,
        warm: false,
        polite: writes,
        rate: 200,
        hostile: verify,
    },
    Case {
        name: "cold:reads",
        what: "cold reads of 512 bytes; 1000 of them/s",
        options: &[],
        sector: 512,
        slow: true,
        warm: false,
        polite: cold_reads,
        rate: 1000,
        hostile: cold_read,
    },
    Case {
        name: "cold:direct",
        what: "cold reads with -d; 1000 of them/s",
        options: &["-d"],
        sector: 512,
        slow: true,
        warm: false,
        polite: cold_reads,
        rate: 1000,
        hostile: cold_read,
    },
    Case {
        name: "cold:durable",
        what: "writes with -s; 1000 cold reads/s of 512 bytes",
        options: &["-s"],
        sector: 512,
        slow: true,
        warm: false,
        polite: writes,
        rate: 1000,
        hostile: cold_read,
    },
    Case {
        name: "durable:cold",
        what: "cold reads of 512 bytes; 1000 writes/s with -s",
        options: &["-s"],
        sector: 512,
        slow: true,
        warm: false,
        polite: cold_reads,
        rate: 1000,
        hostile: durable_write,
    },
    Case {
        name: "unaligned",
        what: "cached writes with -d; 1000 writes/s of parts of blocks",
        options: &["-d", "--set", "cache_size=4M"],
        sector: 4096,
        slow: true,
        warm: false,
        polite: few_writes,
        rate: 1000,
        hostile: unaligned_write,
    },
    Case {
        name: "coalesced",
        what: "cached reads of 512 bytes; 2000 frames/s of 255 READs of 17 sectors",
        options: &[],
        sector: 512,
        slow: false,
        warm: true,
        polite: cached_reads,
        rate: 2000,
        hostile: coalesced_read,
    },
    Case {
        name: "trim",
        what: "cached writes; 1000 TRIMs/s of 8 sectors",
        options: &[],
        sector: 512,
        slow: true,
        warm: false,
        polite: writes,
        rate: 1000,
        hostile: trim,
    },
];

/// What all polite initiators have in common.
fn polite() -> Plan {
    Plan {
        block: Block::Bytes(4096),
        order: Order::Random,
        depth: 16,
        sectors: REGION,
        duration: None,
        resend: std::time::Duration::from_secs(1),
        give_up: std::time::Duration::from_secs(60),
        ..Plan::default()
    }
}

/// Brings all of the region into the cache.
pub(super) fn warm_up() -> Plan {
    Plan {
        op: Op::Read,
        order: Order::Sequential,
        operations: Some(REGION / 8),
        ..polite()
    }
}

fn writes() -> Plan {
    Plan {
        op: Op::Write,
        ..polite()
    }
}

/// To a quarter of what the cache of the case can hold.
fn few_writes() -> Plan {
    Plan {
        sectors: 1 << 11,
        ..writes()
    }
}

fn flushed_writes() -> Plan {
    Plan {
        flush_every: Some(16),
        ..writes()
    }
}

fn cold_reads() -> Plan {
    Plan {
        op: Op::Read,
        block: Block::Bytes(512),
        sectors: HALF,
        ..polite()
    }
}

fn cached_reads() -> Plan {
    Plan {
        op: Op::Read,
        block: Block::Bytes(512),
        ..polite()
    }
}

/// The first sector of one of the hostile initiator's blocks, each far from the
/// one before it and none twice for long.
fn place(n: u64) -> u64 {
    HALF + n * 4099 % (HALF / 8 - 32) * 8
}

fn registers(opcode: u8, lba: u64, count: u8) -> Ata {
    Ata {
        lba,
        count,
        opcode,
        aflags: 0x40,
        ..Ata::default()
    }
}

fn verify(n: u64) -> Frame {
    Frame::ata(registers(opcode::READ_VERIFY_EXT, place(n), 255), &[]).padded(60)
}

fn cold_read(n: u64) -> Frame {
    Frame::read(place(n), 1).padded(60)
}

fn durable_write(n: u64) -> Frame {
    Frame::write(place(n), &[n as u8; 4096])
}

fn unaligned_write(n: u64) -> Frame {
    Frame::write(place(n) + 3, &[n as u8; 512])
}

fn coalesced_read(n: u64) -> Frame {
    match n {
        0 => Frame::extensions(&["coalesced_read"]).padded(60),
        _ => Frame::coalesced_read(
            registers(opcode::READ_EXT, 0, LONG),
            255,
            &[([1; 4], 0, LONG); 255],
        ),
    }
}

fn trim(n: u64) -> Frame {
    let lba = HALF + n * 8 % HALF;
    let mut range = (lba | 8 << 48).to_le_bytes().to_vec();
    range.resize(512, 0);
    let registers = Ata {
        feature: 1,
        ..registers(opcode::DATA_SET_MANAGEMENT, 0, 1)
    };
    Frame::ata(registers, &range)
}
