//! Asking by broadcast whether our address is taken.
//!
//! Two targets with one address destroy a disk, since an initiator takes them
//! for two paths to it. So before anything is served, sockets of their own ask
//! for our shelf and slot, and whoever answers is a rival: we do not yet.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Nic, NicError, NicTrouble, filter};
use crate::sys::link::Link;
use crate::sys::mmsg::BatchReceiver;
use crate::sys::packet::PacketSocket;
use crate::wire::{Address, ETHERTYPE, MIN_FRAME, MacAddr, Request, config};

/// The question is asked so often in the time there is, since one may be lost.
const TIMES: u32 = 3;

/// Another target that answers under our address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rival {
    /// Its MAC.
    pub mac: MacAddr,
    /// The interface it was heard on.
    pub nic: String,
}

/// A socket that asks.
struct Asker<'a> {
    nic: &'a str,
    socket: PacketSocket,
    receiver: BatchReceiver,
    question: [u8; MIN_FRAME],
}

impl<'a> Asker<'a> {
    fn open(nic: &'a str, link: &Link, address: Address, tag: [u8; 4]) -> io::Result<Asker<'a>> {
        let socket = PacketSocket::open()?;
        socket.attach_filter(&filter::answers(address))?;
        socket.ignore_outgoing()?;
        let receiver = BatchReceiver::new(&socket, link.mtu)?;
        socket.bind(link.index, ETHERTYPE)?;
        let question = config::question(MacAddr(link.mac), address, tag);
        Ok(Asker {
            nic,
            socket,
            receiver,
            question,
        })
    }

    fn ask(&self) {
        // A link that is down takes no question, and holds no rival either.
        let _ = self
            .socket
            .send(std::iter::once([&self.question[..], &[], &[]]));
    }

    /// Who has answered, if someone has.
    fn hear(&mut self, tag: [u8; 4]) -> Option<MacAddr> {
        while self.receiver.refill(&self.socket).unwrap_or(false) {
            let frame = self.receiver.peek()?;
            let answer = Request::parse(frame.bytes).ok();
            let mac = answer.filter(|a| a.is_response && a.origin.tag == tag);
            let mac = mac.map(|a| a.origin.source);
            self.receiver.release();
            if mac.is_some() {
                return mac;
            }
        }
        None
    }
}

/// Asks on all NICs that have a link, for `time` in all; the first who answers.
pub fn rival(
    nics: &[Nic],
    address: Address,
    tag: [u8; 4],
    time: Duration,
) -> Result<Option<Rival>, NicError> {
    let mut askers = Vec::new();
    for nic in nics {
        let Some(link) = nic.link.filter(|link| link.running) else {
            continue;
        };
        let asker = Asker::open(&nic.name, &link, address, tag).map_err(|e| NicError {
            name: nic.name.clone(),
            why: NicTrouble::System("asking for our address", e),
        })?;
        askers.push(asker);
    }
    if askers.is_empty() {
        return Ok(None);
    }
    let start = Instant::now();
    for round in 1..=TIMES {
        askers.iter().for_each(Asker::ask);
        loop {
            let left = (time * round / TIMES).saturating_sub(start.elapsed());
            for asker in &mut askers {
                if let Some(mac) = asker.hear(tag) {
                    return Ok(Some(Rival {
                        mac,
                        nic: asker.nic.to_owned(),
                    }));
                }
            }
            if left.is_zero() {
                break;
            }
            let mut fds: Vec<PollFd> = askers
                .iter()
                .map(|a| PollFd::new(a.socket.as_fd(), PollFlags::POLLIN))
                .collect();
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1));
            // Interrupted or not: the sockets are looked at again.
            let _ = poll(&mut fds, timeout.unwrap_or(PollTimeout::MAX));
        }
    }
    Ok(None)
}
