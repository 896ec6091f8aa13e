//! A packet socket with a filter of ours and one of two receivers.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use aoede::sys::link::{self, Link};
use aoede::sys::mmsg::BatchReceiver;
use aoede::sys::packet::{BATCH, PIECES, PacketSocket, sock_filter};
use aoede::sys::ring::Ring;
use aoede::wire::MacAddr;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::error::{Error, Result};
use crate::frame::{ETHERTYPE, FLAG_RESPONSE};

pub use aoede::sys::Frame;

/// How large a receive ring is, in bytes.
const RING: usize = 4 << 20;
/// What is asked of the kernel for the socket's own buffers, in bytes.
const SOCKET_BUFFER: usize = 16 << 20;
/// How long the kernel may refuse frames before sending counts as failed.
const SEND_PATIENCE: Duration = Duration::from_secs(2);

/// How frames are received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receive {
    /// A TPACKET_V2 ring.
    Ring,
    /// recvmmsg.
    Recvmmsg,
}

/// Which frames the kernel lets through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hear {
    /// Answers to one of these addresses or to broadcast.
    Answers(Vec<MacAddr>),
    /// Requests, to whomever they go.
    Requests,
}

enum Receiver {
    Ring(Ring),
    Batch(BatchReceiver),
}

/// An open interface.
pub struct Port {
    socket: PacketSocket,
    receiver: Receiver,
    link: Link,
}

impl Port {
    /// Opens an interface of the calling thread's network namespace.
    pub fn open(interface: &str, hear: &Hear, receive: Receive) -> Result<Port> {
        let step = |what: &str| Error::system::<io::Error>(format!("{interface}: {what}"));
        let link = link::query(interface)
            .map_err(step("looking it up"))?
            .ok_or_else(|| Error::Unexpected(format!("no interface {interface} here")))?;
        let socket = PacketSocket::open().map_err(step("packet socket"))?;
        socket
            .attach_filter(&program(hear))
            .map_err(step("filter"))?;
        socket
            .ignore_outgoing()
            .map_err(step("PACKET_IGNORE_OUTGOING"))?;
        socket.set_buffers(SOCKET_BUFFER);
        let receiver = match receive {
            Receive::Ring => Ring::new(&socket, link.mtu, RING).map(Receiver::Ring),
            Receive::Recvmmsg => BatchReceiver::new(&socket, link.mtu).map(Receiver::Batch),
        }
        .map_err(step("receive buffers"))?;
        socket.bind(link.index, ETHERTYPE).map_err(step("bind"))?;
        Ok(Port {
            socket,
            receiver,
            link,
        })
    }

    /// Hears something else from now on.
    pub fn hear(&self, hear: &Hear) -> Result<()> {
        self.socket
            .attach_filter(&program(hear))
            .map_err(Error::system("filter"))
    }

    /// The interface's address.
    pub fn mac(&self) -> MacAddr {
        MacAddr(self.link.mac)
    }

    /// The interface's MTU when it was opened.
    pub fn mtu(&self) -> u32 {
        self.link.mtu
    }

    /// The frame that came first, if one is here.
    pub fn peek(&self) -> Option<Frame<'_>> {
        match &self.receiver {
            Receiver::Ring(ring) => ring.peek(),
            Receiver::Batch(batch) => batch.peek(),
        }
    }

    /// Done with the frame that [`peek`](Port::peek) shows.
    pub fn release(&mut self) {
        match &mut self.receiver {
            Receiver::Ring(ring) => ring.release(),
            Receiver::Batch(batch) => batch.release(),
        }
    }

    /// Takes what the socket holds; says whether [`peek`](Port::peek) has
    /// something to show.
    pub fn refill(&mut self) -> bool {
        match &mut self.receiver {
            Receiver::Ring(ring) => ring.peek().is_some(),
            // A link that went down says so once; frames come again later.
            Receiver::Batch(batch) => batch.refill(&self.socket).unwrap_or(false),
        }
    }

    /// Waits until a frame is here or the time is over.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        if self.refill() {
            return Ok(true);
        }
        self.poll(PollFlags::POLLIN, timeout)?;
        Ok(self.refill())
    }

    /// Sends all frames, waiting for the kernel where it must; says how many it
    /// refused for good.
    pub fn send(&self, frames: &[[&[u8]; PIECES]]) -> Result<usize> {
        let (mut rest, mut refused) = (frames, 0);
        while !rest.is_empty() {
            match self.socket.send(rest.iter().take(BATCH).copied()) {
                Ok(sent) => rest = &rest[sent..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.poll(PollFlags::POLLOUT, SEND_PATIENCE)? {
                        return Err(Error::Timeout("sending".into(), SEND_PATIENCE));
                    }
                }
                // Too long for the link, or the link is down: a frame lost, as
                // frames are.
                Err(_) => {
                    refused += 1;
                    rest = &rest[1..];
                }
            }
        }
        Ok(refused)
    }

    /// Sends one frame; an error says why the kernel would not.
    pub fn send_one(&self, frame: &[u8]) -> Result<()> {
        let one = [[frame, &[][..], &[][..]]];
        loop {
            match self.socket.send(one.iter().copied()) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.poll(PollFlags::POLLOUT, SEND_PATIENCE)? {
                        return Err(Error::Timeout("sending".into(), SEND_PATIENCE));
                    }
                }
                Err(e) => return Err(Error::System("sending".into(), e)),
            }
        }
    }

    fn poll(&self, events: PollFlags, timeout: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(self.socket.as_fd(), events)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(timeout)), None) {
            Ok(0) | Err(nix::Error::EINTR) => Ok(false),
            Ok(_) => {
                let ready = fds[0].revents().unwrap_or(PollFlags::empty());
                if ready.contains(PollFlags::POLLERR) {
                    // ENETDOWN waits to be taken, else polling spins on it.
                    let _ = self.socket.take_error();
                }
                Ok(ready.intersects(events))
            }
            Err(e) => Err(Error::System("ppoll".into(), e.into())),
        }
    }
}

const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const IF_EQUAL: u16 = 0x15;
const IF_SET: u16 = 0x45;
const RETURN: u16 = 0x06;

/// The filter as a classic BPF program.
fn program(hear: &Hear) -> Vec<sock_filter> {
    let op = |code, k, jt, jf| sock_filter { code, jt, jf, k };
    let flags = u32::from(FLAG_RESPONSE);
    let mut code = vec![
        op(LOAD_HALF, 12, 0, 0),
        op(IF_EQUAL, u32::from(ETHERTYPE), 1, 0),
        op(RETURN, 0, 0, 0),
        op(LOAD_BYTE, 14, 0, 0),
    ];
    match hear {
        Hear::Requests => code.extend([
            op(IF_SET, flags, 0, 1),
            op(RETURN, 0, 0, 0),
            op(RETURN, u32::MAX, 0, 0),
        ]),
        Hear::Answers(macs) => {
            code.extend([op(IF_SET, flags, 1, 0), op(RETURN, 0, 0, 0)]);
            for mac in macs.iter().chain([&MacAddr::BROADCAST]) {
                let [a, b, c, d, e, f] = mac.0;
                code.extend([
                    op(LOAD_WORD, 0, 0, 0),
                    op(IF_EQUAL, u32::from_be_bytes([a, b, c, d]), 0, 3),
                    op(LOAD_HALF, 4, 0, 0),
                    op(IF_EQUAL, u32::from(u16::from_be_bytes([e, f])), 0, 1),
                    op(RETURN, u32::MAX, 0, 0),
                ]);
            }
            code.push(op(RETURN, 0, 0, 0));
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel does; a load past the end drops.
    fn accepts(program: &[sock_filter], frame: &[u8]) -> bool {
        let (mut at, mut a) = (0, 0u32);
        loop {
            let i = program[at];
            at += 1;
            let size = match i.code {
                LOAD_WORD => 4,
                LOAD_HALF => 2,
                LOAD_BYTE => 1,
                IF_EQUAL | IF_SET => {
                    let yes = match i.code {
                        IF_EQUAL => a == i.k,
                        _ => a & i.k != 0,
                    };
                    at += usize::from(if yes { i.jt } else { i.jf });
                    continue;
                }
                RETURN => return i.k != 0,
                other => panic!("{other:#x}"),
            };
            let k = i.k as usize;
            match frame.get(k..k + size) {
                Some(bytes) => a = bytes.iter().fold(0, |a, b| a << 8 | u32::from(*b)),
                None => return false,
            }
        }
    }

    fn frame(to: MacAddr, flags: u8) -> Vec<u8> {
        let mut frame = to.0.to_vec();
        frame.extend([2; 6]);
        frame.extend([0x88, 0xA2, 0x10 | flags]);
        frame.resize(24, 0);
        frame
    }

    #[test]
    fn answers_to_our_addresses_pass() {
        let (a, b) = (MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 1, 1]));
        let program = program(&Hear::Answers(vec![a, b]));
        for to in [a, b, MacAddr::BROADCAST] {
            assert!(accepts(&program, &frame(to, 8)), "{to}");
            assert!(!accepts(&program, &frame(to, 0)), "{to}");
        }
        assert!(!accepts(&program, &frame(MacAddr([2, 0, 0, 0, 0, 2]), 8)));
        let mut other = frame(a, 8);
        other[13] = 0;
        assert!(!accepts(&program, &other));
    }

    #[test]
    fn requests_pass_the_other_way() {
        let program = program(&Hear::Requests);
        assert!(accepts(&program, &frame(MacAddr([2; 6]), 4)));
        assert!(!accepts(&program, &frame(MacAddr([2; 6]), 0xC)));
    }
}
