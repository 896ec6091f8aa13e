//! A TPACKET_V2 receive ring: frames appear in memory shared with the kernel.
//!
//! The ring is blocks of slots. A slot begins with a status word that says who
//! owns it: the kernel (0) or us (bit 0). The rest of its header, from
//! `linux/if_packet.h`:
//!
//! ```text
//!  0 status   8 snaplen   14 net (2)   20 nanoseconds   32 sockaddr_ll,
//!  4 len     12 mac (2)   16 seconds   24 VLAN          its packet type at 42
//! ```

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use super::Frame;
use super::packet::PacketSocket;

/// What stands before the network header of a frame: 52 bytes of ring header,
/// and an Ethernet header placed so that what follows is 16-byte aligned.
const SLOT_HEADER: usize = 80;
const SLOT_ALIGN: usize = 16;
/// A block holds several slots where they are small, so that little is wasted
/// by rounding it up to pages.
const BLOCK: usize = 64 << 10;
const PAGE: usize = 4096;
/// The least number of slots, however large a frame may be.
const SLOTS_MIN: usize = 64;

const LEN: usize = 4;
const SNAPLEN: usize = 8;
const MAC: usize = 12;
const SECONDS: usize = 16;
const NANOSECONDS: usize = 20;
const PACKET_TYPE: usize = 42;

/// How a ring is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    slot: usize,
    block: usize,
    slots_per_block: usize,
    blocks: usize,
}

impl Geometry {
    /// Slots for frames of this MTU, as many as fit `bytes`, 64 at least.
    fn new(mtu: u32, bytes: usize) -> Geometry {
        let slot = (SLOT_HEADER + mtu as usize).next_multiple_of(SLOT_ALIGN);
        let slots_per_block = (BLOCK / slot).max(1);
        let block = (slot * slots_per_block).next_multiple_of(PAGE);
        let blocks = (bytes / block).max(SLOTS_MIN.div_ceil(slots_per_block));
        Geometry {
            slot,
            block,
            slots_per_block,
            blocks,
        }
    }

    fn slots(&self) -> usize {
        self.blocks * self.slots_per_block
    }

    /// Where slot `index` begins.
    fn offset(&self, index: usize) -> usize {
        (index / self.slots_per_block) * self.block + (index % self.slots_per_block) * self.slot
    }
}

/// The mapped ring of one socket.
#[derive(Debug)]
pub struct Ring {
    memory: MmapRaw,
    geometry: Geometry,
    head: usize,
}

impl Ring {
    /// Sets up and maps a ring of about `bytes` on a socket that is not bound
    /// yet.
    pub fn new(socket: &PacketSocket, mtu: u32, bytes: usize) -> io::Result<Ring> {
        let geometry = Geometry::new(mtu, bytes);
        socket.set(
            libc::SOL_PACKET,
            libc::PACKET_VERSION,
            &libc::tpacket_versions::TPACKET_V2,
        )?;
        let request = libc::tpacket_req {
            tp_block_size: geometry.block as u32,
            tp_block_nr: geometry.blocks as u32,
            tp_frame_size: geometry.slot as u32,
            tp_frame_nr: geometry.slots() as u32,
        };
        socket.set(libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        // With the length given, memmap2 asks nothing of the descriptor and
        // the kernel maps the ring.
        let length = geometry.block * geometry.blocks;
        let memory = MmapOptions::new().len(length).map_raw(socket.raw())?;
        Ok(Ring {
            memory,
            geometry,
            head: 0,
        })
    }

    /// The frame at the head, if the kernel has put one there.
    pub fn peek(&self) -> Option<Frame<'_>> {
        let slot = self.slot();
        if self.status().load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return None;
        }
        let word = |at: usize| {
            // SAFETY: `at` lies in the slot's header, which `slot()` places
            // inside the mapping, aligned to 16; the status word, loaded with
            // acquire, says that the kernel writes here no more.
            unsafe { slot.add(at).cast::<u32>().read() }
        };
        let (len, snaplen) = (word(LEN) as usize, word(SNAPLEN) as usize);
        let mac = (word(MAC) & 0xFFFF) as usize;
        // A length that leads out of the slot cannot come from a sane kernel;
        // the frame is then cut at the slot's end and so not whole.
        let held = snaplen.min(self.geometry.slot.saturating_sub(mac));
        let offset = mac.min(self.geometry.slot);
        // SAFETY: offset + held lies within the slot, which is ours until
        // `release`, and that needs &mut self: not while this slice lives.
        let bytes = unsafe { std::slice::from_raw_parts(slot.add(offset), held) };
        // SAFETY: as for the words above.
        let packet_type = unsafe { slot.add(PACKET_TYPE).read() };
        Some(Frame {
            bytes,
            stamp: u64::from(word(SECONDS)) * 1_000_000_000 + u64::from(word(NANOSECONDS)),
            whole: held == len,
            other_host: packet_type == libc::PACKET_OTHERHOST,
        })
    }

    /// Gives the slot at the head back to the kernel and goes on to the next.
    pub fn release(&mut self) {
        if self.status().load(Ordering::Relaxed) & libc::TP_STATUS_USER == 0 {
            return;
        }
        self.status()
            .store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.head = (self.head + 1) % self.geometry.slots();
    }

    fn slot(&self) -> *mut u8 {
        // SAFETY: `head` is below slots(), so the slot lies in the mapping.
        unsafe {
            self.memory
                .as_mut_ptr()
                .add(self.geometry.offset(self.head))
        }
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: a slot begins 16-byte aligned with its status word; the
        // kernel and we change it only by whole-word stores; the mapping lives
        // as long as self.
        unsafe { AtomicU32::from_ptr(self.slot().cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_fill_the_ring() {
        for mtu in [576, 1500, 9000, 65536, 200_000] {
            let g = Geometry::new(mtu, 4 << 20);
            assert!(g.slots() >= SLOTS_MIN, "{g:?}");
            assert_eq!((g.slot % SLOT_ALIGN, g.block % PAGE), (0, 0));
            assert!(g.slot >= SLOT_HEADER + mtu as usize);
            let mut end = 0;
            for index in 0..g.slots() {
                assert!(g.offset(index) >= end);
                end = g.offset(index) + g.slot;
            }
            assert!(end <= g.block * g.blocks);
            assert!(
                g.block * g.blocks <= (4 << 20).max(SLOTS_MIN * (g.block)),
                "{g:?}"
            );
        }
    }
}
