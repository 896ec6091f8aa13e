//! Bytes to types and back. Every length check of an incoming frame is made
//! here, and every byte layout of AoE is drawn here, once.
//!
//! Offsets count from the first byte of the Ethernet frame. Multi-byte header
//! fields are big endian, LBA bytes little endian (AoEr11).
//!
//! ```text
//!  0  destination MAC (6)      14  version (high nibble 1) | flags: R 8, E 4
//!  6  source MAC (6)           15  error code, with E only
//! 12  EtherType 0x88A2         16  shelf (2), 0xFFFF = every shelf
//!                              18  slot (1), 0xFF = every slot
//!                              19  command
//!                              20  tag (4), echoed byte for byte
//! ```
//!
//! A request becomes a [`Request`] that borrows the frame it came in; the room
//! of each command ([`ata`], [`config`], [`mask`], [`reserve`], [`extensions`])
//! draws what lies behind the 24 bytes. A reply is written by the same rooms,
//! header by [`Origin::reply_header`], and never takes a byte from anywhere but
//! the request and the answer.

pub mod ata;
pub mod config;
pub mod crc;
pub mod extensions;
pub mod mask;
pub mod reserve;

mod address;
mod request;

pub use address::{Address, MacAddr, Shelf, Slot};
pub use request::{Command, Malformed, Origin, Request, set_source};

/// The EtherType of AoE.
pub const ETHERTYPE: u16 = 0x88A2;
/// Bytes of the header that every AoE frame has.
pub const HEADER: usize = 24;
/// The least length of a frame we send: Ethernet's own, without the checksum.
pub const MIN_FRAME: usize = 60;
/// Bytes of an Ethernet header, which an MTU does not count.
pub const ETHERNET_HEADER: usize = 14;
/// The longest reply without sector data: a mask list of 255 entries.
pub const HEAD_MAX: usize = mask::DIRECTIVES + mask::DIRECTIVE * mask::LIST_MAX;
/// The most bytes of a Config, Mask or Reserve request that mean something: those
/// of a Config replace with its two longest strings, each with its length.
pub const ADMIN_MAX: usize = config::STRING + 2 + 2 * config::STRING_MAX;

/// The AoE version we speak, in place (high nibble).
const VERSION: u8 = 0x10;
const FLAG_RESPONSE: u8 = 0x08;
const FLAG_ERROR: u8 = 0x04;

/// What the error byte of a reply with E set may say (AoEr11 2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ErrorCode {
    /// The command byte is none of ours.
    UnknownCommand = 1,
    /// An argument is out of its range, or the frame shorter than it says.
    BadArgument = 2,
    /// The device cannot be reached.
    DeviceUnavailable = 3,
    /// A Config set met a string that is there and different.
    ConfigStringSet = 4,
    /// The version of the request is not 1.
    UnsupportedVersion = 5,
    /// Someone else holds the reservation.
    TargetReserved = 6,
}

/// The most sectors one frame may carry on a NIC with this MTU, at most 255:
/// the sector count is one byte. Zero if not even one fits.
pub fn sectors_per_frame(mtu: u32) -> u8 {
    let room = mtu.saturating_sub(ata::DATA as u32) / 512;
    room.min(255) as u8
}

/// The same with a checksum behind the data. Where one sector fits without it
/// one does with it, since the MTU does not count the Ethernet header.
pub fn sectors_per_summed_frame(mtu: u32) -> u8 {
    let with_sum = sectors_per_frame(mtu.saturating_sub(size_of::<crc::Sum>() as u32));
    with_sum.max(sectors_per_frame(mtu).min(1))
}

/// The longest frame a NIC with this MTU takes.
pub fn frame_max(mtu: u32) -> usize {
    mtu as usize + ETHERNET_HEADER
}

/// Zeros behind `len` up to the least frame length; returns the length to send.
pub fn pad(head: &mut [u8], len: usize) -> usize {
    pad_to(head, len, MIN_FRAME)
}

/// Zeros behind `len` up to `least`; returns the length to send.
pub fn pad_to(head: &mut [u8], len: usize, least: usize) -> usize {
    if len >= least {
        return len;
    }
    head[len..least].fill(0);
    least
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_follow_the_mtu_and_stop_at_255() {
        let table = [
            (0, 0),
            (500, 0),
            (547, 0),
            (548, 1),
            (1500, 2),
            (9000, 17),
            (65536, 127),
        ];
        for (mtu, sectors) in table {
            assert_eq!(sectors_per_frame(mtu), sectors, "MTU {mtu}");
        }
        // Beyond 28 KiB AoEde wrote over its heap; here the count stops.
        assert_eq!(sectors_per_frame(u32::MAX), 255);
        for (mtu, sectors) in table {
            assert!(ata::DATA + 512 * usize::from(sectors) <= frame_max(mtu).max(ata::DATA));
        }
    }

    #[test]
    fn a_sum_takes_four_bytes_of_a_frame_that_still_fits() {
        let table = [
            (547, 0),
            (548, 1),
            (1060, 1),
            (1063, 1),
            (1064, 2),
            (1500, 2),
        ];
        for (mtu, sectors) in table {
            assert_eq!(sectors_per_summed_frame(mtu), sectors, "MTU {mtu}");
        }
        assert_eq!(sectors_per_summed_frame(u32::MAX), 255);
        for mtu in 548..70_000 {
            let data = 512 * usize::from(sectors_per_summed_frame(mtu));
            assert!(
                data >= 512 && ata::DATA + data + 4 <= frame_max(mtu),
                "MTU {mtu}"
            );
        }
    }
}
