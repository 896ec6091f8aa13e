//! What happens with a frame: one export's decisions, all of them, and nothing
//! else. No clock, no descriptor, no thread: the time is an argument, the disk
//! is behind a seam, and a reply is written where the caller says.
//!
//! The way of a frame through [`Target::handle`]:
//!
//! ```text
//! parse -> for us? -> admitted? -> Config | Mask | Reserve -> reply, or saved first
//!                               -> Extensions -> reply
//!                               -> ATA -> checksum -> tags -> reservation -> drive -> volume
//!                                      -> reply, or parked
//! ```
//!
//! What was parked comes back from the disk: [`Target::advance`] takes it in,
//! and [`Target::next_ready`] with [`Target::emit`] hands out the replies.

mod admin;
mod ata;
mod change_log;
mod coalesced;
mod counters;
mod extensions;
mod pace;
mod saves;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::access::{self, Policy, WireState};
use crate::drive::Identity;
use crate::net::{Frame, NicId, NicInfo};
use crate::session::Sessions;
use crate::store::{
    Bounds, Completed, Failures, PARKED_HEADROOM, PARKED_MAX, Shares, StateFile, Token, Volume,
};
use crate::sys::buffer::{Body, BufSlice};
use crate::wire::crc::Sum;
use crate::wire::{
    Address, Command, ErrorCode, HEADER, MacAddr, Malformed, Origin, Request, config, frame_max,
    pad, sectors_per_frame, sectors_per_summed_frame, set_source,
};

use ata::{Ask, Parked};
use coalesced::Coalesced;
use pace::Delayed;
use saves::Changes;

pub use counters::{Counters, Dropped};

/// The token of the one save that may be under way.
const SAVE: Token = Token(u32::MAX);
/// How often a failing disk is written about.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(1);
/// What an export is, apart from what frames make of it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Shelf and slot.
    pub address: Address,
    /// How many frames an initiator may have outstanding, 2 at least.
    pub buffers: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a write is acknowledged only when it is on stable storage.
    pub durable: bool,
    /// Who may speak, and change what.
    pub policy: Policy,
    /// What IDENTIFY says.
    pub identity: Identity,
}

/// What to do about a frame.
#[derive(Debug)]
pub enum Action {
    /// Nothing, and why.
    Drop(Dropped),
    /// Send the first `len` bytes of the head, the body behind them, and the
    /// body's sum behind that.
    Reply {
        /// Bytes of the head, 60 at least if there is no body.
        len: usize,
        /// Data that is sent from where it lies.
        body: Option<Body>,
        /// The checksum of registers and body, for those who want one.
        sum: Option<Sum>,
    },
    /// Nothing now; the reply comes when the disk is done.
    Parked,
    /// Another target answers under our address.
    AddressConflict(MacAddr),
}

impl Action {
    /// A reply of the head alone.
    fn plain(len: usize) -> Action {
        Action::Reply {
            len,
            body: None,
            sum: None,
        }
    }
}

/// A reply whose time has come.
#[derive(Debug)]
struct Ready {
    nic: NicId,
    what: What,
}

#[derive(Debug)]
enum What {
    Ata(ata::Answer),
    Bytes(Vec<u8>),
}

impl What {
    /// How long the reply is before it is padded; of a summed one with its sum.
    fn len(&self, summed: bool) -> usize {
        match self {
            What::Ata(answer) => answer.len(summed),
            What::Bytes(bytes) => bytes.len(),
        }
    }
}

/// When and where a request came in.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    now: Instant,
    nic: NicId,
    info: NicInfo,
}

/// One export. See the head of this file.
pub struct Target {
    settings: Settings,
    nics: Vec<Option<NicInfo>>,
    state: WireState,
    state_file: Arc<StateFile>,
    changes: Changes,
    volume: Volume,
    sessions: Sessions,
    parked: Slab<Parked>,
    /// Who has how many of them.
    places: Shares,
    ready: VecDeque<Ready>,
    coalesced: Coalesced,
    /// Replies to initiators that have spoken of congestion, by their time.
    delayed: VecDeque<Delayed>,
    counters: Counters,
    started: Instant,
    error_logged: Option<Instant>,
}

impl Target {
    /// An export on `volume`, with the state that was saved last.
    pub fn new(
        now: Instant,
        settings: Settings,
        volume: Volume,
        state: WireState,
        state_file: Arc<StateFile>,
    ) -> Target {
        Target {
            settings,
            nics: Vec::new(),
            changes: Changes::new(state.clone()),
            state,
            state_file,
            volume,
            sessions: Sessions::default(),
            parked: Slab::new(PARKED_MAX + PARKED_HEADROOM),
            places: Shares::new(
                (PARKED_MAX + PARKED_HEADROOM) as u64,
                PARKED_HEADROOM as u64,
            ),
            ready: VecDeque::new(),
            coalesced: Coalesced::new(),
            delayed: VecDeque::new(),
            counters: Counters::default(),
            started: now,
            error_logged: None,
        }
    }

    /// A NIC has this address and MTU now, or cannot be served.
    pub fn set_nic(&mut self, nic: NicId, info: Option<NicInfo>) {
        let index = usize::from(nic.0);
        if self.nics.len() <= index {
            self.nics.resize(index + 1, None);
        }
        self.nics[index] = info;
        let longest = self.longest_frame();
        self.volume.set_request_max(longest);
    }

    /// The longest frame that any of the NICs can send.
    fn longest_frame(&self) -> usize {
        self.nics
            .iter()
            .flatten()
            .map(|info| frame_max(info.mtu))
            .max()
            .unwrap_or(0)
    }

    /// The image has another size now; says whether that is news.
    pub fn resize(&mut self, now: Instant, bounds: Bounds) -> bool {
        let before = self.volume.sectors();
        self.volume.resize(now, bounds);
        before != bounds.sectors
    }

    /// How many sectors are exported.
    pub fn sectors(&self) -> u64 {
        self.volume.sectors()
    }

    /// What was counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What the disk below failed to do.
    pub fn failures(&self) -> Failures {
        self.volume.failures()
    }

    /// Decides about a frame. A reply's head is written into `head`, which
    /// holds [`HEAD_MAX`](crate::wire::HEAD_MAX) bytes.
    pub fn handle(&mut self, now: Instant, nic: NicId, frame: Frame, head: &mut [u8]) -> Action {
        let action = self.decide(now, nic, frame, head);
        match &action {
            Action::Drop(why) => self.counters.dropped(*why),
            Action::AddressConflict(_) => self.counters.dropped(Dropped::Response),
            _ => self.counters.requests += 1,
        }
        action
    }

    fn decide(&mut self, now: Instant, nic: NicId, frame: Frame, head: &mut [u8]) -> Action {
        let Some(&Some(info)) = self.nics.get(usize::from(nic.0)) else {
            return Action::Drop(Dropped::NoLink);
        };
        if !frame.whole {
            return Action::Drop(Dropped::Cut);
        }
        if frame.other_host {
            return Action::Drop(Dropped::OtherHost);
        }
        let request = match Request::parse(frame.bytes) {
            Ok(request) => request,
            Err(Malformed::Short) => return Action::Drop(Dropped::Short),
            Err(Malformed::NotAoe) => return Action::Drop(Dropped::NotAoe),
        };
        if let Err(action) = self.admit(&request, &info) {
            return action;
        }
        let arrival = Arrival { now, nic, info };
        let session = self.sessions.hear(now, nic, request.origin.source);
        match request.command {
            Command::Ata(taskfile, payload) => {
                if let Some(id) = session {
                    self.sessions.uses(id);
                }
                let ask = Ask {
                    arrival,
                    origin: request.origin,
                    taskfile,
                    session,
                    extensions: session
                        .map(|id| self.sessions.extensions_of(id))
                        .unwrap_or_default(),
                };
                self.ata(&ask, &request, payload, head)
            }
            Command::Config(_) | Command::Mask(_) | Command::Reserve(_) => {
                self.administer(&arrival, &request, head)
            }
            Command::Extensions(Some(strings)) => self.extend(&arrival, &request, strings, head),
            Command::Extensions(None) => Action::Drop(Dropped::Silence),
            Command::OtherVersion => {
                self.header(
                    head,
                    &info,
                    &request.origin,
                    Some(ErrorCode::UnsupportedVersion),
                );
                Action::plain(pad(head, HEADER))
            }
            Command::Unknown => self.unknown(&info, &request, head),
        }
    }

    /// Whether the frame is a request for us from someone who may ask.
    fn admit(&self, request: &Request, info: &NicInfo) -> Result<(), Action> {
        let drop = |why| Err(Action::Drop(why));
        let source = request.origin.source;
        if request.is_response {
            let ours = self.nics.iter().flatten().any(|nic| nic.mac == source);
            let claims_us = Address {
                shelf: request.shelf,
                slot: request.slot,
            };
            if !ours && claims_us == self.settings.address {
                return Err(Action::AddressConflict(source));
            }
            return drop(Dropped::Response);
        }
        if source.is_group() {
            return drop(Dropped::GroupSource);
        }
        if source == info.mac && !info.loopback {
            return drop(Dropped::OwnSource);
        }
        if request.destination != info.mac && request.destination != MacAddr::BROADCAST {
            return drop(Dropped::OtherHost);
        }
        if !request.addresses(self.settings.address) {
            return drop(Dropped::OtherAddress);
        }
        if !access::admits(&self.settings.policy, &self.state, source) {
            return drop(Dropped::Masked);
        }
        Ok(())
    }

    fn header(&self, head: &mut [u8], info: &NicInfo, origin: &Origin, error: Option<ErrorCode>) {
        origin.reply_header(head, info.mac, self.settings.address, error);
    }

    /// A command we do not know: an error, and the body as it came.
    fn unknown(&mut self, info: &NicInfo, request: &Request, head: &mut [u8]) -> Action {
        self.header(head, info, &request.origin, Some(ErrorCode::UnknownCommand));
        // The kernel lets frames in that are longer by a VLAN tag than those it
        // lets out.
        let end = request.frame.len().min(frame_max(info.mtu));
        let rest = &request.frame[HEADER..end];
        if let Some(room) = head.get_mut(HEADER..HEADER + rest.len()) {
            room.copy_from_slice(rest);
            return Action::plain(pad(head, end));
        }
        match self.volume.buffer() {
            Some(mut buf) if buf.len() >= rest.len() => {
                buf[..rest.len()].copy_from_slice(rest);
                let body = Some(Body::Buf(BufSlice {
                    buf,
                    range: 0..rest.len(),
                }));
                Action::Reply {
                    len: HEADER,
                    body,
                    sum: None,
                }
            }
            _ => Action::Drop(Dropped::NoRoom),
        }
    }

    /// Sectors per frame that we tell an asker on this NIC, whose data has
    /// checksums or not.
    fn frame_sectors(info: &NicInfo, summed: bool) -> u8 {
        if summed {
            sectors_per_summed_frame(info.mtu)
        } else {
            sectors_per_frame(info.mtu)
        }
    }

    /// Takes in what the disk has done since the last time.
    pub fn advance(&mut self, now: Instant) {
        self.volume.advance(now);
        while let Some(Completed { token, data, ok }) = self.volume.next_completed() {
            if token == SAVE {
                self.saved(now, ok);
            } else if let Some(parked) = self.unpark(token.0) {
                self.completed(now, parked, data, ok);
            }
        }
        self.advance_changes(now);
        self.release_delayed(now);
        self.answer_further(now);
        if let Some(error) = self.volume.take_error() {
            let due = self
                .error_logged
                .is_none_or(|last| now - last >= ERROR_LOG_INTERVAL);
            if due {
                self.error_logged = Some(now);
                log::error!("{}: {error}", self.settings.address);
            }
        }
    }

    /// Whether the disk has something for [`advance`](Target::advance).
    pub fn has_work(&mut self) -> bool {
        !self.coalesced.is_empty() || self.volume.has_done()
    }

    /// Whether the disk may be changing the image now.
    pub fn is_writing(&self) -> bool {
        self.volume.is_writing()
    }

    /// Whether reads wait for the disk.
    pub fn is_reading(&self) -> bool {
        self.volume.is_reading()
    }

    /// When [`advance`](Target::advance) is to be called even if nothing
    /// happens.
    pub fn deadline(&self) -> Option<Instant> {
        let delayed = self.delayed.front().map(|delayed| delayed.due);
        let times = [self.volume.deadline(), delayed, self.changes.deadline()];
        times.into_iter().flatten().min()
    }

    /// Whether nothing is under way, so that one may stop.
    pub fn is_idle(&self) -> bool {
        self.volume.is_idle()
            && self.ready.is_empty()
            && self.delayed.is_empty()
            && self.coalesced.is_empty()
            && self.changes.is_empty()
    }

    /// Brings all that was acknowledged to stable storage, as before an orderly
    /// end; under way until [`is_idle`](Target::is_idle) says it is not.
    pub fn drain(&mut self) {
        self.volume.drain();
        self.changes.hurry();
        self.hurry();
    }

    /// The disk below.
    pub fn volume(&mut self) -> &mut Volume {
        &mut self.volume
    }

    /// What to poll for finished disk work; `None` if it is done at once.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.volume.wake_fd()
    }

    /// The NIC of the next reply whose time has come.
    pub fn next_ready(&self) -> Option<NicId> {
        self.ready.front().map(|ready| ready.nic)
    }

    /// Writes the next reply's head and hands out its body; `head` is that of
    /// the NIC which [`next_ready`](Target::next_ready) named.
    pub fn emit(&mut self, head: &mut [u8]) -> Action {
        let Some(Ready { nic, what }) = self.ready.pop_front() else {
            return Action::Drop(Dropped::NoLink);
        };
        // The NIC may have gone, or have another address or shorter frames than
        // when the request came in.
        let summed = match &what {
            What::Ata(answer) => self.sessions.extensions(nic, answer.asker()).crc8x4,
            What::Bytes(_) => false,
        };
        match self.nics.get(usize::from(nic.0)) {
            Some(&Some(info)) if what.len(summed) <= frame_max(info.mtu) => match what {
                What::Ata(answer) => self.answer(head, &info, answer, summed),
                What::Bytes(bytes) => {
                    head[..bytes.len()].copy_from_slice(&bytes);
                    set_source(head, info.mac);
                    Action::plain(pad(head, bytes.len()))
                }
            },
            _ => {
                self.give_up(what);
                Action::Drop(Dropped::NoLink)
            }
        }
    }

    /// Forgets the next reply: its NIC is gone or takes no more. The initiator
    /// will ask again.
    pub fn skip(&mut self) {
        if let Some(ready) = self.ready.pop_front() {
            self.give_up(ready.what);
        }
    }

    fn give_up(&mut self, what: What) {
        if let What::Ata(answer) = what {
            self.recycle(answer.body);
        }
    }

    /// Takes back what went out with a reply.
    pub fn recycle(&mut self, body: Option<Body>) {
        if let Some(buf) = body.and_then(Body::into_buf) {
            self.volume.recycle(buf);
        }
    }

    /// Whom an advertisement is for: everyone, or those on the masks.
    pub fn audience(&self) -> Vec<MacAddr> {
        let (wall, wire) = (&self.settings.policy.masks, &self.state.masks);
        let list = if wire.is_empty() { wall } else { wire };
        if list.is_empty() {
            return vec![MacAddr::BROADCAST];
        }
        let admitted = |mac: &MacAddr| access::admits(&self.settings.policy, &self.state, *mac);
        list.iter().copied().filter(admitted).collect()
    }

    /// Writes the answer nobody asked for, to `to` through `nic`; `None` while
    /// the NIC cannot be served.
    pub fn advertise(&self, nic: NicId, to: MacAddr, head: &mut [u8]) -> Option<usize> {
        let info = (*self.nics.get(usize::from(nic.0))?)?;
        let fits = config::STRING + self.state.config.len() <= frame_max(info.mtu);
        let summed = self.sessions.extensions(nic, to).crc8x4;
        let report = config::Report {
            buffers: self.settings.buffers,
            sectors: Self::frame_sectors(&info, summed),
            sub: 0,
            string: if fits { &self.state.config } else { &[] },
        };
        let len = report.advertise(head, to, info.mac, self.settings.address);
        Some(pad(head, len))
    }
}

/// A bounded set of things, each under a number that stays its own.
struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    fn new(capacity: usize) -> Slab<T> {
        Slab {
            entries: std::iter::repeat_with(|| None).take(capacity).collect(),
            free: (0..capacity as u32).rev().collect(),
        }
    }

    fn insert(&mut self, value: T) -> Option<u32> {
        let id = self.free.pop()?;
        self.entries[id as usize] = Some(value);
        Some(id)
    }

    fn remove(&mut self, id: u32) -> Option<T> {
        let value = self.entries.get_mut(id as usize)?.take()?;
        self.free.push(id);
        Some(value)
    }
}

#[cfg(test)]
mod tests;
