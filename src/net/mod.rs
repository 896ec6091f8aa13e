//! Network interfaces: frames in, in the order the kernel took them, and
//! frames out; links that come, go and change.
//!
//! A [`Nic`] is a name on the command line. While there is an Ethernet
//! interface of that name it has a [`Port`]: a socket that hears only what may
//! be for us, a receiver (ring or batch) and a queue of replies. When MTU, MAC
//! or the interface itself changes the port is closed and opened anew: frames
//! may be lost by that, but none is received twice.

mod filter;
pub mod probe;
mod queue;
mod receiver;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::sys::buffer::Body;
use crate::sys::link::{self, Link, LinkKind};
use crate::sys::packet::PacketSocket;
use crate::wire::{Address, ETHERTYPE, MacAddr, sectors_per_frame};

pub use crate::sys::Frame;
pub use queue::{Flushed, Queue};
pub use receiver::{EngineChoice, Receiver};

/// Which of an export's NICs, counted from 0 in the order of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NicId(pub u16);

/// What an export must know of a NIC to answer through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicInfo {
    /// Its address, the source of our replies.
    pub mac: MacAddr,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is the loopback interface, where we hear our own address.
    pub loopback: bool,
}

impl From<Link> for NicInfo {
    fn from(link: Link) -> NicInfo {
        NicInfo {
            mac: MacAddr(link.mac),
            mtu: link.mtu,
            loopback: link.kind == LinkKind::Loopback,
        }
    }
}

/// How ports are opened.
#[derive(Clone, Copy, Debug)]
pub struct PortOptions {
    /// Whose frames the kernel lets through.
    pub address: Address,
    /// How to receive.
    pub engine: EngineChoice,
    /// Size of a receive ring, in bytes.
    pub ring_bytes: usize,
    /// Size asked of the kernel for a socket's own buffers, in bytes.
    pub socket_buffer: usize,
    /// Whether replies pass by the interface's queueing discipline.
    pub qdisc_bypass: bool,
}

/// Why a NIC cannot be served.
#[derive(Debug)]
pub struct NicError {
    /// The interface.
    pub name: String,
    /// What is in the way.
    pub why: NicTrouble,
}

/// What is in the way of serving a NIC.
#[derive(Debug)]
pub enum NicTrouble {
    /// There is no interface of that name.
    Unknown,
    /// It is no Ethernet; the number is the kernel's ARPHRD_*.
    NotEthernet(u16),
    /// It is another one of those named, under another name.
    Same(String),
    /// Not one sector fits a frame of its MTU.
    MtuTooSmall(u32),
    /// A system call failed, and which.
    System(&'static str, io::Error),
}

impl NicError {
    /// `true` if there is no interface of the name, and there may be one later.
    pub fn may_come(&self) -> bool {
        matches!(self.why, NicTrouble::Unknown) && link::is_name(&self.name)
    }
}

impl fmt::Display for NicError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interface {}: ", self.name)?;
        match &self.why {
            NicTrouble::Unknown => f.write_str("there is none; 'ip link' lists those that are"),
            NicTrouble::NotEthernet(kind) => {
                write!(
                    f,
                    "is not Ethernet (type {kind}); AoE needs an Ethernet interface, or lo"
                )
            }
            NicTrouble::Same(other) => {
                write!(f, "is {other} under another name; name it once")
            }
            NicTrouble::MtuTooSmall(mtu) => {
                write!(
                    f,
                    "MTU {mtu} holds no sector; set it to 548 or more, best 9000"
                )
            }
            NicTrouble::System(what, e) if e.kind() == io::ErrorKind::PermissionDenied => {
                write!(f, "{what}: {e}; run as root or with CAP_NET_RAW")
            }
            NicTrouble::System(what, e) => write!(f, "{what}: {e}"),
        }
    }
}

impl std::error::Error for NicError {}

/// The open side of a NIC.
#[derive(Debug)]
pub struct Port {
    socket: PacketSocket,
    /// Where its frames come in.
    pub receiver: Receiver,
    /// Where its replies go out.
    pub queue: Queue,
}

impl Port {
    /// Opens a socket on the link. The order matters: it hears nothing until
    /// filter and receiver are in place.
    fn open(link: &Link, options: &PortOptions) -> Result<Port, NicTrouble> {
        let step = |what| move |e| NicTrouble::System(what, e);
        let socket = PacketSocket::open().map_err(step("packet socket"))?;
        socket
            .attach_filter(&filter::requests(options.address, link.index))
            .map_err(step("filter"))?;
        socket
            .ignore_outgoing()
            .map_err(step("PACKET_IGNORE_OUTGOING (Linux 4.20)"))?;
        if options.qdisc_bypass {
            socket.bypass_qdisc().map_err(step("PACKET_QDISC_BYPASS"))?;
        }
        socket.set_buffers(options.socket_buffer);
        let receiver =
            Receiver::open(&socket, link.mtu, options).map_err(step("receive buffers"))?;
        socket.bind(link.index, ETHERTYPE).map_err(step("bind"))?;
        Ok(Port {
            socket,
            receiver,
            queue: Queue::new(),
        })
    }

    /// Sends what is queued, as far as the kernel takes it.
    pub fn flush(&mut self, recycle: impl FnMut(Option<Body>)) -> Flushed {
        self.queue.flush(&self.socket, recycle)
    }

    /// Takes an error off the socket, as after a link went down.
    pub fn clear_error(&self) {
        // What it says, the link itself says as well and better.
        let _ = self.socket.take_error();
    }

    /// Reads a batch from the socket if the receiver works by batches and has
    /// used up the last one.
    pub fn refill(&mut self) {
        self.receiver.refill(&self.socket);
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One interface name of the command line.
#[derive(Debug)]
pub struct Nic {
    /// The name, which outlives the interface.
    pub name: String,
    /// The interface as last seen.
    pub link: Option<Link>,
    /// Its open side, while it can be served.
    pub port: Option<Port>,
    /// Why it is lost, as it was told last.
    told: Option<String>,
}

/// What became of a NIC when it was looked at again.
#[derive(Debug)]
pub enum Change {
    /// Nothing that matters here.
    None,
    /// There is no such interface any more, or none that can be served.
    Lost(NicError),
    /// It lost its carrier or was set down.
    Down,
    /// It came up; its port is as it was.
    Up,
    /// Its port was opened anew: another MTU, MAC, or interface.
    Reopened,
}

impl Nic {
    /// Looks the interface up and opens a port on it, down or up.
    pub fn open(name: &str, options: &PortOptions) -> Result<Nic, NicError> {
        let mut nic = Nic {
            name: name.to_owned(),
            link: None,
            port: None,
            told: None,
        };
        match nic.refresh(options) {
            Change::Lost(e) => Err(e),
            _ => Ok(nic),
        }
    }

    /// A NIC that is not there yet, as this error has told.
    pub fn absent(e: &NicError) -> Nic {
        Nic {
            name: e.name.clone(),
            link: None,
            port: None,
            told: Some(e.to_string()),
        }
    }

    /// What the export must know of it; `None` while it cannot be served.
    pub fn info(&self) -> Option<NicInfo> {
        self.port.as_ref().and(self.link).map(NicInfo::from)
    }

    /// Looks at the interface again and follows what changed.
    pub fn refresh(&mut self, options: &PortOptions) -> Change {
        let link = match self.look() {
            Ok(link) => link,
            Err(why) => {
                self.link = None;
                return self.lose(why);
            }
        };
        let before = self.link.replace(link);
        let same =
            before.is_some_and(|b| (b.index, b.mtu, b.mac) == (link.index, link.mtu, link.mac));
        // An interface that was away while nobody looked may be back with all
        // its numbers, but its old socket is deaf.
        let bound = |port: &Port| port.socket.is_bound_to(link.index);
        if same && self.port.as_ref().is_some_and(bound) {
            return match (before.is_some_and(|b| b.running), link.running) {
                (false, true) => Change::Up,
                (true, false) => Change::Down,
                _ => Change::None,
            };
        }
        // Closed before the next is opened, so that no frame comes in twice.
        self.port = None;
        match Port::open(&link, options) {
            Ok(port) => {
                self.port = Some(port);
                self.told = None;
                Change::Reopened
            }
            Err(why) => self.lose(why),
        }
    }

    /// Notes that it cannot be served; told once for each reason, not at every
    /// look.
    fn lose(&mut self, why: NicTrouble) -> Change {
        self.port = None;
        let name = self.name.clone();
        let lost = NicError { name, why };
        let text = lost.to_string();
        if self.told.as_ref() == Some(&text) {
            return Change::None;
        }
        self.told = Some(text);
        Change::Lost(lost)
    }

    fn look(&self) -> Result<Link, NicTrouble> {
        let link = link::query(&self.name)
            .map_err(|e| NicTrouble::System("looking it up", e))?
            .ok_or(NicTrouble::Unknown)?;
        if let LinkKind::Other(kind) = link.kind {
            return Err(NicTrouble::NotEthernet(kind));
        }
        if sectors_per_frame(link.mtu) == 0 {
            return Err(NicTrouble::MtuTooSmall(link.mtu));
        }
        Ok(link)
    }
}

/// The NIC whose next frame the kernel took first.
///
/// Frames of several NICs are answered in this order, so that a host's late
/// first copy on one NIC does not land after its resend and its successor on
/// another. `horizon` is the kernel's time when the receivers were last
/// refilled: a later frame waits, since an earlier one may have come in on a
/// NIC that was looked at before. The first frame of a pass passes whatever its
/// stamp, so a clock that was set back stops nothing.
pub fn earliest(nics: &mut [Nic], horizon: Option<u64>) -> Option<NicId> {
    if let [nic] = nics {
        let port = nic.port.as_mut()?;
        port.refill_if_used_up();
        return port.receiver.peek().map(|_| NicId(0));
    }
    let mut first: Option<(u64, NicId)> = None;
    // Twice, since a frame may appear on the first NIC while the last is
    // looked at; with rings a look is one load from memory.
    for _ in 0..2 {
        for (index, nic) in nics.iter_mut().enumerate() {
            let Some(port) = nic.port.as_mut() else {
                continue;
            };
            port.refill_if_used_up();
            let Some(frame) = port.receiver.peek() else {
                continue;
            };
            if first.is_none_or(|(stamp, _)| frame.stamp < stamp) {
                first = Some((frame.stamp, NicId(index as u16)));
            }
        }
    }
    first
        .filter(|(stamp, _)| horizon.is_none_or(|h| *stamp <= h))
        .map(|(_, id)| id)
}

impl Port {
    /// A batch that was full may have left earlier frames in the socket than
    /// another NIC's next one.
    fn refill_if_used_up(&mut self) {
        if self.receiver.was_full_and_is_empty() {
            self.refill();
        }
    }
}
