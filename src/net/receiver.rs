//! The seam between the two ways of receiving.

use std::io;
use std::str::FromStr;

use super::PortOptions;
use crate::sys::Frame;
use crate::sys::mmsg::BatchReceiver;
use crate::sys::packet::PacketSocket;
use crate::sys::ring::Ring;

/// Which way of receiving is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// The ring; recvmmsg where a ring cannot be had.
    Auto,
    /// The ring or nothing.
    Ring,
    /// recvmmsg.
    Recvmmsg,
}

impl FromStr for EngineChoice {
    type Err = ();

    fn from_str(text: &str) -> Result<EngineChoice, ()> {
        match text {
            "auto" => Ok(EngineChoice::Auto),
            "ring" => Ok(EngineChoice::Ring),
            "recvmmsg" => Ok(EngineChoice::Recvmmsg),
            _ => Err(()),
        }
    }
}

/// Frames of one socket, looked at in place and then released.
#[derive(Debug)]
pub enum Receiver {
    /// A ring shared with the kernel.
    Ring(Ring),
    /// Batches copied by recvmmsg.
    Batch(BatchReceiver),
}

impl Receiver {
    /// Sets up a receiver on a socket that is not bound yet.
    pub(super) fn open(
        socket: &PacketSocket,
        mtu: u32,
        options: &PortOptions,
    ) -> io::Result<Receiver> {
        let ring_bytes = options.ring_bytes;
        let ring = match options.engine {
            EngineChoice::Recvmmsg => None,
            EngineChoice::Ring => Some(Ring::new(socket, mtu, ring_bytes)?),
            EngineChoice::Auto => Ring::new(socket, mtu, ring_bytes)
                .inspect_err(|e| {
                    let export = options.address;
                    log::warn!("{export}: no receive ring ({e}); receiving with recvmmsg");
                })
                .ok(),
        };
        match ring {
            Some(ring) => Ok(Receiver::Ring(ring)),
            None => BatchReceiver::new(socket, mtu).map(Receiver::Batch),
        }
    }

    /// Whether frames appear without asking the kernel.
    pub fn is_ring(&self) -> bool {
        matches!(self, Receiver::Ring(_))
    }

    /// The next frame, if one is here.
    pub fn peek(&self) -> Option<Frame<'_>> {
        match self {
            Receiver::Ring(ring) => ring.peek(),
            Receiver::Batch(batch) => batch.peek(),
        }
    }

    /// Done with the frame that [`peek`](Receiver::peek) shows.
    pub fn release(&mut self) {
        match self {
            Receiver::Ring(ring) => ring.release(),
            Receiver::Batch(batch) => batch.release(),
        }
    }

    pub(super) fn refill(&mut self, socket: &PacketSocket) {
        if let Receiver::Batch(batch) = self {
            // A failing receive is a link in trouble; the link itself tells.
            let _ = batch.refill(socket);
        }
    }

    pub(super) fn was_full_and_is_empty(&self) -> bool {
        matches!(self, Receiver::Batch(batch) if batch.was_full_and_is_empty())
    }
}
