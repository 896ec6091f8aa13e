//! A target that is nothing but memory: what it does not reach, no target will.
//!
//! It answers Config read, IDENTIFY, READ and WRITE and drops the rest. One
//! thread, one interface; a read leaves from where its sectors lie.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aoede::sys::buffer::Buf;
use aoede::sys::packet::{BATCH, PIECES};
use aoede::wire::MacAddr;

use crate::error::{Error, Result};
use crate::frame::{ATA, BODY, CONFIG, DATA, FLAG_RESPONSE, SECTOR, opcode};
use crate::port::{Hear, Port, Receive};

/// The least length of a reply.
const LEAST: usize = 60;
/// Room for a reply's head.
const HEAD: usize = 64;
/// How long it may take to see that it is to stop.
const LOOK: Duration = Duration::from_millis(50);
const PAGE: usize = 4096;
const EVERY_SHELF: u16 = 0xFFFF;
const EVERY_SLOT: u8 = 0xFF;

/// What an [`Answerer`] is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Shelf; 0xFFFF answers for all of them, as no honest target does.
    pub shelf: u16,
    /// Slot; 0xFF answers for all of them.
    pub slot: u8,
    /// Bytes of memory, whole sectors of which are the disk.
    pub size: usize,
    /// How to receive.
    pub receive: Receive,
    /// How long to look for the next frame before sleeping.
    pub spin: Duration,
}

/// The target.
pub struct Answerer {
    port: Port,
    disk: Disk,
    replies: Replies,
    spin: Duration,
}

/// What answers are made from.
struct Disk {
    shelf: u16,
    slot: u8,
    mac: MacAddr,
    sectors_per_frame: u8,
    /// The disk, and behind it the sector that IDENTIFY sends.
    memory: Buf,
}

/// Replies that wait to be sent together.
struct Replies {
    heads: [[u8; HEAD]; BATCH],
    /// Length of the head, and which bytes of memory follow it.
    parts: [(usize, usize, usize); BATCH],
    count: usize,
}

impl Answerer {
    /// Opens an interface of the calling thread's network namespace.
    pub fn open(interface: &str, options: &Options) -> Result<Answerer> {
        let port = Port::open(interface, &Hear::Requests, options.receive)?;
        let size = options.size / SECTOR * SECTOR;
        let mut memory = Buf::new(size + SECTOR).map_err(Error::system("memory"))?;
        // Touched now, so that no page fault is measured later.
        memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 0);
        identify(&mut memory[size..], (size / SECTOR) as u64);
        let disk = Disk {
            shelf: options.shelf,
            slot: options.slot,
            mac: port.mac(),
            sectors_per_frame: (port.mtu().saturating_sub(DATA as u32) / SECTOR as u32).min(255)
                as u8,
            memory,
        };
        Ok(Answerer {
            port,
            disk,
            replies: Replies {
                heads: [[0; HEAD]; BATCH],
                parts: [(0, 0, 0); BATCH],
                count: 0,
            },
            spin: options.spin,
        })
    }

    /// Answers until it is told to stop; says how many frames it answered.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<u64> {
        let mut answered = 0;
        let mut last = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let before = answered;
            while let Some(frame) = self.port.peek() {
                if frame.whole && !frame.other_host {
                    answered += u64::from(self.disk.answer(frame.bytes, &mut self.replies));
                }
                self.port.release();
                if self.replies.count == BATCH {
                    self.replies.send(&self.port, &self.disk.memory)?;
                }
            }
            self.replies.send(&self.port, &self.disk.memory)?;
            if self.port.refill() {
                continue;
            }
            if self.spin.is_zero() {
                self.port.wait(LOOK)?;
            } else if answered != before {
                last = Instant::now();
            } else if last.elapsed() > self.spin {
                self.port.wait(LOOK)?;
                last = Instant::now();
            } else {
                std::hint::spin_loop();
            }
        }
        Ok(answered)
    }
}

impl Replies {
    fn send(&mut self, port: &Port, memory: &[u8]) -> Result<()> {
        let mut frames = [[&[][..]; PIECES]; BATCH];
        for (frame, (head, (len, from, to))) in
            frames.iter_mut().zip(self.heads.iter().zip(&self.parts))
        {
            *frame = [&head[..*len], &memory[*from..*to], &[]];
        }
        let count = std::mem::take(&mut self.count);
        port.send(&frames[..count]).map(drop)
    }
}

impl Disk {
    /// Queues the answer to a request; `false` if it gets none.
    fn answer(&mut self, request: &[u8], replies: &mut Replies) -> bool {
        if !self.is_for_us(request) {
            return false;
        }
        let head = &mut replies.heads[replies.count];
        head[..6].copy_from_slice(&request[6..12]);
        head[6..12].copy_from_slice(&self.mac.0);
        head[12..BODY].copy_from_slice(&request[12..BODY]);
        head[14] = 0x10 | FLAG_RESPONSE;
        head[15] = 0;
        // What stands there already is what was asked for.
        if self.shelf != EVERY_SHELF {
            head[16..18].copy_from_slice(&self.shelf.to_be_bytes());
        }
        if self.slot != EVERY_SLOT {
            head[18] = self.slot;
        }
        let part = match request[19] {
            ATA => self.ata(request, head),
            CONFIG => self.config(request, head),
            _ => None,
        };
        let Some(part) = part else {
            return false;
        };
        replies.parts[replies.count] = part;
        replies.count += 1;
        true
    }

    fn is_for_us(&self, request: &[u8]) -> bool {
        request.len() >= BODY
            && request[14] >> 4 == 1
            && (request[..6] == self.mac.0 || request[..6] == MacAddr::BROADCAST.0)
            && (self.shelf == EVERY_SHELF
                || request[16..18] == self.shelf.to_be_bytes()
                || request[16..18] == [0xFF; 2])
            && (self.slot == EVERY_SLOT || request[18] == self.slot || request[18] == EVERY_SLOT)
    }

    /// Registers and data; says how long the head is and what memory follows.
    fn ata(&mut self, request: &[u8], head: &mut [u8; HEAD]) -> Option<(usize, usize, usize)> {
        use opcode::*;
        let registers = request.get(BODY..DATA)?;
        head[BODY..DATA].copy_from_slice(registers);
        head[DATA..].fill(0);
        let (count, code) = (usize::from(registers[2]), registers[3]);
        let mut lba = [0; 8];
        lba[..6].copy_from_slice(&registers[4..10]);
        if matches!(code, READ | READ_DMA | WRITE | WRITE_DMA) {
            lba[3] &= 0x0F;
            lba[4..].fill(0);
        }
        let total = (self.disk_end() / SECTOR) as u64;
        let lba = u64::from_le_bytes(lba);
        let (error, left, status) = (25, 26, 27);
        head[error] = 0;
        head[left] = 0;
        head[status] = 0x40;
        let nothing = (LEAST, 0, 0);
        if code == IDENTIFY {
            return Some((DATA, self.disk_end(), self.memory.len()));
        }
        if lba + count as u64 > total {
            head[error] = 0x10;
            head[left] = registers[2];
            head[status] = 0x41;
            return Some(nothing);
        }
        let from = lba as usize * SECTOR;
        let to = from + count * SECTOR;
        match code {
            READ | READ_EXT | READ_DMA | READ_DMA_EXT if count > 0 => Some((DATA, from, to)),
            WRITE | WRITE_EXT | WRITE_DMA | WRITE_DMA_EXT => {
                let data = request.get(DATA..DATA + count * SECTOR)?;
                self.memory[from..to].copy_from_slice(data);
                Some(nothing)
            }
            _ => None,
        }
    }

    fn disk_end(&self) -> usize {
        self.memory.len() - SECTOR
    }

    fn config(&self, request: &[u8], head: &mut [u8; HEAD]) -> Option<(usize, usize, usize)> {
        if request.get(29)? & 0x0F != 0 {
            return None;
        }
        head[BODY..].fill(0);
        head[25] = BATCH as u8;
        head[28] = self.sectors_per_frame;
        head[29] = 0x10;
        Some((LEAST, 0, 0))
    }
}

/// The words of IDENTIFY that an initiator reads.
fn identify(page: &mut [u8], sectors: u64) {
    let mut word = |index: usize, value: u16| {
        page[2 * index..2 * index + 2].copy_from_slice(&value.to_le_bytes());
    };
    word(0, 0x0040);
    word(49, 0x0200);
    let small = sectors.min(0x0FFF_FFFF);
    word(60, small as u16);
    word(61, (small >> 16) as u16);
    // LBA48, supported and on.
    word(83, 0x4400);
    word(86, 0x0400);
    for index in 0..4 {
        word(100 + index, (sectors >> (16 * index)) as u16);
    }
    for (to, from) in (0..20).zip(b"memory                                  ".chunks(2)) {
        word(27 + to, u16::from_be_bytes([from[0], from[1]]));
    }
}
