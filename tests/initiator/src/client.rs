//! One initiator that asks one thing at a time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use aoede::wire::MacAddr;

use crate::error::{Error, Result};
use crate::frame::{
    CONFIG, Defaults, Directive, Frame, Identify, MaskReply, Reply, ReserveReply, SECTOR,
};
use crate::port::{Hear, Port, Receive};

/// Replies nobody asked for that are kept for [`Client::recv`].
const STRAYS: usize = 4096;

/// Tags of all clients of the process come from one count, so that no client
/// repeats the tag of an earlier one from the same address.
static NEXT_TAG: AtomicU32 = AtomicU32::new(0x8000_0001);

/// How long and how often to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// When to give up.
    pub deadline: Duration,
    /// When to send again; `None` is never.
    pub resend: Option<Duration>,
    /// Whether to send again under a new tag, as Linux does, or under the same,
    /// as iPXE does.
    pub new_tag: bool,
}

impl Patience {
    /// Asks once.
    pub fn once(deadline: Duration) -> Patience {
        Patience {
            deadline,
            resend: None,
            new_tag: false,
        }
    }
}

impl Default for Patience {
    /// Ten seconds, and the same tag again after each half second.
    fn default() -> Patience {
        Patience {
            deadline: Duration::from_secs(10),
            resend: Some(Duration::from_millis(500)),
            new_tag: false,
        }
    }
}

/// What a Config reply said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How many requests may be outstanding.
    pub buffers: u16,
    /// Firmware version.
    pub firmware: u16,
    /// Sectors per frame.
    pub sectors: u8,
    /// The string.
    pub string: Vec<u8>,
}

/// An initiator on one interface.
pub struct Client {
    pub(crate) port: Port,
    macs: Vec<MacAddr>,
    target: MacAddr,
    shelf: u16,
    slot: u8,
    sectors_per_frame: u8,
    strays: VecDeque<Reply>,
    strict: bool,
    /// How long and how often requests are sent, where a call does not say.
    pub patience: Patience,
    /// Frames sent again so far.
    pub resent: u64,
}

/// Opening, and whom it speaks with.
impl Client {
    /// Opens an interface of the calling thread's network namespace. Until
    /// [`connect`](Client::connect) it speaks to everyone.
    pub fn open(interface: &str) -> Result<Client> {
        Client::open_receiving(interface, Receive::Recvmmsg)
    }

    /// The same, receiving in a chosen way.
    pub fn open_receiving(interface: &str, receive: Receive) -> Result<Client> {
        let port = Port::open(interface, &Hear::Answers(Vec::new()), receive)?;
        let macs = vec![port.mac()];
        port.hear(&Hear::Answers(macs.clone()))?;
        Ok(Client {
            port,
            macs,
            target: MacAddr::BROADCAST,
            shelf: 0xFFFF,
            slot: 0xFF,
            sectors_per_frame: 2,
            strays: VecDeque::new(),
            strict: false,
            patience: Patience::default(),
            resent: 0,
        })
    }

    /// An initiator with an address of its own behind the interface's: several
    /// of them make several hosts.
    pub fn open_as(interface: &str, mac: MacAddr) -> Result<Client> {
        let mut client = Client::open(interface)?;
        client.macs = vec![mac];
        client.port.hear(&Hear::Answers(client.macs.clone()))?;
        Ok(client)
    }

    /// Opens the interface and waits until the target answers.
    pub fn connected(interface: &str, shelf: u16, slot: u8) -> Result<Client> {
        let mut client = Client::open(interface)?;
        client.connect(shelf, slot)?;
        Ok(client)
    }

    /// Finds the target by broadcast and speaks with it from now on. Asks until
    /// it answers or patience is over, so it may be starting yet.
    pub fn connect(&mut self, shelf: u16, slot: u8) -> Result<Config> {
        (self.shelf, self.slot) = (shelf, slot);
        let patience = Patience {
            resend: Some(Duration::from_millis(5)),
            ..self.patience
        };
        let ask = Frame::config(0, b"").to(MacAddr::BROADCAST);
        let reply = self.call_with(&ask, patience)?;
        let config = config(&reply)?;
        self.target = reply.source();
        self.sectors_per_frame = config.sectors;
        Ok(config)
    }

    /// Speaks with this target from now on, unasked.
    pub fn aim(&mut self, mac: MacAddr, shelf: u16, slot: u8) {
        (self.target, self.shelf, self.slot) = (mac, shelf, slot);
    }

    /// Takes every reply that breaks a rule of protocol.md 1 for an error
    /// ([`Reply::breaches`]); vblade, which does not pad, would fail.
    pub fn strict(&mut self, strict: bool) -> &mut Client {
        self.strict = strict;
        self
    }

    /// Its address.
    pub fn mac(&self) -> MacAddr {
        self.macs[0]
    }

    /// The target's address; broadcast before it is known.
    pub fn target_mac(&self) -> MacAddr {
        self.target
    }

    /// The MTU of its interface when it was opened.
    pub fn mtu(&self) -> u32 {
        self.port.mtu()
    }

    /// What the last [`connect`](Client::connect) said.
    pub fn sectors_per_frame(&self) -> u8 {
        self.sectors_per_frame
    }

    /// What a frame takes for the fields it leaves open, with a tag that no
    /// other frame has.
    pub fn defaults(&self) -> Defaults {
        Defaults {
            destination: self.target,
            source: self.macs[0],
            shelf: self.shelf,
            slot: self.slot,
            tag: next_tag(),
        }
    }
}

/// Frames out, frames in.
impl Client {
    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.port.send_one(bytes)
    }

    /// Sends a frame; returns its bytes. Answers to a source address of its own
    /// are heard from now on.
    pub fn send(&mut self, frame: &Frame) -> Result<Vec<u8>> {
        if let Some(mac) = frame.own_source().filter(|mac| !self.macs.contains(mac)) {
            self.macs.push(mac);
            self.port.hear(&Hear::Answers(self.macs.clone()))?;
        }
        let bytes = frame.encode(&self.defaults());
        self.port.send_one(&bytes)?;
        Ok(bytes)
    }

    /// The next frame that came in, one that no call waited for first;
    /// `None` once the deadline has passed.
    pub fn recv(&mut self, deadline: Instant) -> Result<Option<Reply>> {
        match self.strays.pop_front() {
            Some(reply) => Ok(Some(reply)),
            None => self.recv_new(deadline),
        }
    }

    /// The next such frame that is like this, as an advertisement; those before
    /// it are kept. `None` once the deadline has passed.
    pub fn recv_like(
        &mut self,
        deadline: Instant,
        like: impl Fn(&Reply) -> bool,
    ) -> Result<Option<Reply>> {
        if let Some(at) = self.strays.iter().position(&like) {
            return Ok(self.strays.remove(at));
        }
        while let Some(reply) = self.recv_new(deadline)? {
            if like(&reply) {
                return Ok(Some(reply));
            }
            self.keep(reply);
        }
        Ok(None)
    }

    /// All that came in and that no call waited for.
    pub fn drain(&mut self) -> Result<Vec<Reply>> {
        let mut all: Vec<Reply> = self.strays.drain(..).collect();
        while let Some(reply) = self.recv_new(Instant::now())? {
            all.push(reply);
        }
        Ok(all)
    }

    fn recv_new(&mut self, deadline: Instant) -> Result<Option<Reply>> {
        loop {
            if let Some(frame) = self.port.peek() {
                let (bytes, whole) = (frame.bytes.to_vec(), frame.whole);
                self.port.release();
                match Reply::parse(bytes) {
                    Ok(reply) if whole => return Ok(Some(reply)),
                    // A frame cut short means nothing, and one that is no AoE
                    // came in before the filter stood.
                    _ => continue,
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.port.wait(left)? && left.is_zero() {
                return Ok(None);
            }
        }
    }

    fn keep(&mut self, reply: Reply) {
        if self.strays.len() == STRAYS {
            self.strays.pop_front();
        }
        self.strays.push_back(reply);
    }

    /// Sends a frame until its answer comes, as [`patience`](Client::patience)
    /// says.
    pub fn call(&mut self, frame: &Frame) -> Result<Reply> {
        self.call_with(frame, self.patience)
    }

    /// Sends a frame until its answer comes. The answer has the command and a
    /// tag of the request; whatever else comes in is kept for
    /// [`recv`](Client::recv).
    pub fn call_with(&mut self, frame: &Frame, patience: Patience) -> Result<Reply> {
        let start = Instant::now();
        let end = start + patience.deadline;
        let mut sent = vec![self.send(frame)?];
        loop {
            let next = patience.resend.map_or(end, |r| end.min(Instant::now() + r));
            if let Some(reply) = self.recv_answer(&sent, next)? {
                return Ok(reply);
            }
            if Instant::now() >= end {
                let what = format!("no answer to {}", describe(&sent[0]));
                return Err(Error::Timeout(what, patience.deadline));
            }
            self.resent += 1;
            if patience.new_tag && frame.own_tag().is_none() {
                sent.push(self.send(frame)?);
            } else {
                self.port.send_one(&sent[0])?;
            }
        }
    }

    /// Waits for the answer to one of these requests.
    fn recv_answer(&mut self, sent: &[Vec<u8>], until: Instant) -> Result<Option<Reply>> {
        while let Some(reply) = self.recv_new(until)? {
            let Some(request) = sent.iter().find(|request| answers(&reply, request)) else {
                self.keep(reply);
                continue;
            };
            if self.strict {
                let breaches = reply.breaches(request, self.shelf, self.slot);
                if !breaches.is_empty() {
                    return Err(Error::Unexpected(breaches.join("\n")));
                }
            }
            return Ok(Some(reply));
        }
        Ok(None)
    }

    /// Sends a frame and proves that it gets no answer: a Config read sent
    /// after it is answered, and nothing came before or with that.
    pub fn expect_silence(&mut self, frame: &Frame, deadline: Duration) -> Result<()> {
        let bytes = self.send(frame)?;
        self.no_answer_to(&bytes, None, deadline)
    }

    /// The same for bytes as they are.
    pub fn expect_silence_raw(&mut self, bytes: &[u8], deadline: Duration) -> Result<()> {
        self.send_raw(bytes)?;
        self.no_answer_to(bytes, None, deadline)
    }

    /// The same where this initiator is not heard at all: another one on the
    /// same wire, who is, asks for Config.
    pub fn expect_silence_beside(
        &mut self,
        frame: &Frame,
        other: &mut Client,
        deadline: Duration,
    ) -> Result<()> {
        let bytes = self.send(frame)?;
        self.no_answer_to(&bytes, Some(other), deadline)
    }

    fn no_answer_to(
        &mut self,
        bytes: &[u8],
        mut other: Option<&mut Client>,
        deadline: Duration,
    ) -> Result<()> {
        let patience = Patience {
            deadline,
            resend: Some(deadline / 4),
            new_tag: true,
        };
        // Twice: an answer that left just behind the first fence is here when
        // the second one is.
        for _ in 0..2 {
            let fence = Frame::config(0, b"");
            match &mut other {
                Some(other) => other.call_with(&fence, patience)?,
                None => self.call_with(&fence, patience)?,
            };
        }
        while let Some(reply) = self.recv_new(Instant::now())? {
            self.keep(reply);
        }
        let spoke = self.strays.iter().position(|reply| answers(reply, bytes));
        match spoke.and_then(|at| self.strays.remove(at)) {
            Some(reply) => Err(Error::Unexpected(format!(
                "an answer where silence is due: to {} came {reply:?}",
                describe(bytes)
            ))),
            None => Ok(()),
        }
    }
}

/// What an initiator asks of a disk.
impl Client {
    /// IDENTIFY DEVICE.
    pub fn identify(&mut self) -> Result<Identify> {
        let reply = self.call(&Frame::identify())?;
        reply
            .sectors(1)
            .and_then(Identify::parse)
            .ok_or_else(|| refused("IDENTIFY", &reply))
    }

    /// Reads sectors, in one frame.
    pub fn read(&mut self, lba: u64, count: u8) -> Result<Vec<u8>> {
        let reply = self.call(&Frame::read(lba, count))?;
        match reply.sectors(count) {
            Some(data) => Ok(data.to_vec()),
            None => Err(refused(&format!("read of {count} at {lba}"), &reply)),
        }
    }

    /// Writes sectors, in one frame.
    pub fn write(&mut self, lba: u64, data: &[u8]) -> Result<()> {
        let reply = self.call(&Frame::write(lba, data))?;
        done(
            &format!("write of {} at {lba}", data.len() / SECTOR),
            &reply,
        )
    }

    /// Reads any number of sectors, in as many frames as it takes.
    pub fn read_many(&mut self, lba: u64, count: usize) -> Result<Vec<u8>> {
        let step = usize::from(self.sectors_per_frame.max(1));
        let mut data = Vec::with_capacity(count * SECTOR);
        for from in (0..count).step_by(step) {
            data.extend(self.read(lba + from as u64, step.min(count - from) as u8)?);
        }
        Ok(data)
    }

    /// Writes any number of sectors, in as many frames as it takes.
    pub fn write_many(&mut self, lba: u64, data: &[u8]) -> Result<()> {
        let step = usize::from(self.sectors_per_frame.max(1));
        for (index, part) in data.chunks(step * SECTOR).enumerate() {
            self.write(lba + (index * step) as u64, part)?;
        }
        Ok(())
    }

    /// FLUSH CACHE EXT.
    pub fn flush(&mut self) -> Result<()> {
        let reply = self.call(&Frame::flush())?;
        done("FLUSH", &reply)
    }

    /// Reads the config string and what comes with it.
    pub fn config_read(&mut self) -> Result<Config> {
        config(&self.call(&Frame::config(0, b""))?)
    }

    /// Asks anew how many sectors a frame carries, which the extensions change.
    pub fn ask_sectors_per_frame(&mut self) -> Result<()> {
        self.sectors_per_frame = self.config_read()?.sectors;
        Ok(())
    }

    /// Sets the config string where none is; `false` if another is there.
    pub fn config_set(&mut self, string: &[u8]) -> Result<bool> {
        let reply = self.call(&Frame::config(3, string))?;
        match reply.error() {
            Some(4) => Ok(false),
            _ => config(&reply).map(|_| true),
        }
    }

    /// Sets the config string whatever is there.
    pub fn config_force(&mut self, string: &[u8]) -> Result<Config> {
        config(&self.call(&Frame::config(4, string))?)
    }

    /// Reads the mask list.
    pub fn mask_read(&mut self) -> Result<MaskReply> {
        let reply = self.call(&Frame::mask_read())?;
        plain(&reply, "mask read", Reply::mask)
    }

    /// Edits the mask list.
    pub fn mask_edit(&mut self, directives: &[Directive]) -> Result<MaskReply> {
        let reply = self.call(&Frame::mask_edit(directives))?;
        plain(&reply, "mask edit", Reply::mask)
    }

    /// Reserve/Release: 0 read, 1 set, 2 force set. An AoE error is an error
    /// here; [`call`](Client::call) shows it.
    pub fn reserve(&mut self, rcmd: u8, list: &[MacAddr]) -> Result<ReserveReply> {
        let reply = self.call(&Frame::reserve(rcmd, list))?;
        plain(&reply, "reserve", Reply::reserve)
    }

    /// AoEde's Extensions; what is on comes back in upper case.
    pub fn extensions(&mut self, names: &[&str]) -> Result<Vec<String>> {
        let reply = self.call(&Frame::extensions(names))?;
        plain(&reply, "extensions", Reply::extensions)
    }
}

/// A tag that no client of this process has used.
pub fn next_tag() -> [u8; 4] {
    NEXT_TAG.fetch_add(1, Ordering::Relaxed).to_be_bytes()
}

/// Whether a reply has the command, the tag and the asker of a request.
fn answers(reply: &Reply, request: &[u8]) -> bool {
    reply.is_response()
        && request.len() >= 24
        && reply.command() == request[19]
        && reply.tag_bytes() == request[20..24]
        && (reply.destination().0 == request[6..12] || reply.destination() == MacAddr::BROADCAST)
}

fn config(reply: &Reply) -> Result<Config> {
    let parsed = reply
        .config()
        .filter(|c| reply.error().is_none() && c.string.len() == usize::from(c.length));
    match parsed {
        Some(c) => Ok(Config {
            buffers: c.buffers,
            firmware: c.firmware,
            sectors: c.sectors,
            string: c.string.to_vec(),
        }),
        None => Err(refused("Config", reply)),
    }
}

fn plain<T>(reply: &Reply, what: &str, read: impl Fn(&Reply) -> Option<T>) -> Result<T> {
    match read(reply) {
        Some(value) if reply.error().is_none() => Ok(value),
        _ => Err(refused(what, reply)),
    }
}

fn done(what: &str, reply: &Reply) -> Result<()> {
    match reply.ata() {
        Some(ata) if reply.error().is_none() && ata.is_success() => Ok(()),
        _ => Err(refused(what, reply)),
    }
}

fn refused(what: &str, reply: &Reply) -> Error {
    let why = match (reply.error(), reply.ata()) {
        (Some(code), _) => format!("AoE error {code}"),
        (None, Some(ata)) => format!(
            "ATA status {:#04x}, error {:#04x}, {} left, {} bytes of data",
            ata.status,
            ata.error,
            ata.count,
            ata.data.len()
        ),
        (None, None) => "an answer that says nothing".to_owned(),
    };
    Error::Unexpected(format!("{what}: {why}: {reply:?}"))
}

fn describe(request: &[u8]) -> String {
    match request.get(19) {
        Some(&CONFIG) => format!("Config {:02x?}", &request[request.len().min(24)..]),
        Some(command) => format!(
            "command {command:#x} ({} bytes) {:02x?}",
            request.len(),
            &request[request.len().min(24)..request.len().min(40)]
        ),
        None => format!("{} bytes {request:02x?}", request.len()),
    }
}
