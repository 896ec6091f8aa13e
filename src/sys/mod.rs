//! What the kernel offers, made safe: the only room with `unsafe`.
//!
//! Each file wraps one thing and decides nothing: packet sockets with their
//! two ways of receiving, network links, files below what `std` knows,
//! signals, and leaving the terminal.

pub mod buffer;
pub mod file;
pub mod link;
pub mod lock;
pub mod mmsg;
pub mod packet;
pub mod process;
pub mod ring;
pub mod signals;
pub mod slots;
pub mod uring;

/// A frame as a receiver hands it out, valid until it is released.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The bytes, Ethernet header first.
    pub bytes: &'a [u8],
    /// When the kernel took it: nanoseconds of its real-time clock.
    pub stamp: u64,
    /// Whether all of it is here; a frame cut short means nothing.
    pub whole: bool,
    /// Whether the kernel marked it as meant for someone else: another MAC, or
    /// a VLAN that we are not in.
    pub other_host: bool,
}
