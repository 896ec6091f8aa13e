//! What initiators have switched on for themselves, each on each NIC: AoEde's
//! extensions, and what they need to be remembered.
//!
//! What one initiator does here changes nothing for another. Only those with an
//! extension on are remembered, a bounded number of them; one that is not heard
//! for an hour is forgotten. When there is no place left, one that has never sent
//! an ATA request gives its place to a newcomer. For all others a frame costs one look whether there
//! is anybody at all.

mod pace;
mod tags;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::net::NicId;
use crate::wire::MacAddr;
use crate::wire::extensions::{Extension, Wish};

use pace::Pace;
use tags::History;

pub use tags::{Begun, Life};

/// The most initiators that are remembered; what more of them wish is not
/// granted.
pub const SESSIONS_MAX: usize = 1024;
/// An initiator that is silent for so long is forgotten.
pub const SILENCE_MAX: Duration = Duration::from_secs(3600);
/// How often it is written that an initiator's frames arrive damaged.
const DAMAGE_LOG_INTERVAL: Duration = Duration::from_secs(1);
/// How many lines about that there are in as long, whoever it is: who
/// negotiates anew is a new initiator each time.
const DAMAGE_LINES_MAX: u32 = 16;

/// What an initiator has on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// What its tags are.
    pub tags: Tags,
    /// Whether there may be several reads in one frame.
    pub coalesced_read: bool,
    /// Whether data has checksums.
    pub crc8x4: bool,
    /// Whether it has spoken of congestion.
    pub congestion: bool,
}

/// What an initiator's tags are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tags {
    /// Its own business.
    #[default]
    Opaque,
    /// Little endian numbers that count up.
    CountLe,
    /// Big endian numbers that count up.
    CountBe,
    /// Unique among requests under way.
    Unique,
}

/// An initiator that is remembered; good until the next wish of anyone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(u32);

type Key = (NicId, MacAddr);

#[derive(Debug)]
struct Session {
    key: Key,
    heard: Instant,
    /// `true` once it has sent an ATA request.
    is_used: bool,
    extensions: Extensions,
    history: History,
    pace: Pace,
    damage: Damage,
}

/// Frames that arrived damaged and were not written about yet.
#[derive(Debug, Default)]
struct Damage {
    frames: u64,
    logged: Option<Instant>,
}

/// All initiators that are remembered.
#[derive(Debug, Default)]
pub struct Sessions {
    by_key: HashMap<Key, SessionId>,
    slots: Vec<Option<Session>>,
    free: Vec<SessionId>,
    lives: u64,
    /// Where the next search for a place begins, so that those that give way do
    /// so in the order of their arrival.
    hand: usize,
    /// Since when lines about damage are counted, and how many there were.
    damage_since: Option<Instant>,
    damage_lines: u32,
}

impl Sessions {
    /// Takes note that an initiator was heard; who it is, if it is remembered.
    pub fn hear(&mut self, now: Instant, nic: NicId, mac: MacAddr) -> Option<SessionId> {
        let id = self.find(nic, mac)?;
        let session = self.slots[id.0 as usize].as_mut()?;
        if is_silent(session, now) {
            self.forget(id);
            return None;
        }
        session.heard = now;
        Some(id)
    }

    /// Takes note of an ATA request: its initiator keeps its place.
    pub fn uses(&mut self, id: SessionId) {
        if let Some(session) = self.get_mut(id) {
            session.is_used = true;
        }
    }

    fn find(&self, nic: NicId, mac: MacAddr) -> Option<SessionId> {
        if self.by_key.is_empty() {
            return None;
        }
        self.by_key.get(&(nic, mac)).copied()
    }

    fn get(&self, id: SessionId) -> Option<&Session> {
        self.slots.get(id.0 as usize)?.as_ref()
    }

    fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.slots.get_mut(id.0 as usize)?.as_mut()
    }

    /// What an initiator has on; nothing if it is not remembered.
    pub fn extensions(&self, nic: NicId, mac: MacAddr) -> Extensions {
        let session = self.find(nic, mac).and_then(|id| self.get(id));
        session.map_or(Extensions::default(), |session| session.extensions)
    }

    /// The same of one that is remembered.
    pub fn extensions_of(&self, id: SessionId) -> Extensions {
        self.get(id)
            .map_or(Extensions::default(), |session| session.extensions)
    }

    /// How many initiators are remembered.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Whether an initiator is remembered, or could be.
    pub fn has_room(&self, now: Instant, nic: NicId, mac: MacAddr) -> bool {
        self.by_key.len() < SESSIONS_MAX
            || self.by_key.contains_key(&(nic, mac))
            || self.gives_way(now).is_some()
    }

    /// One that loses its place to a newcomer: it is silent for too long, or has
    /// never sent an ATA request.
    fn gives_way(&self, now: Instant) -> Option<SessionId> {
        let (first, rest) = (self.hand..self.slots.len(), 0..self.hand);
        first
            .chain(rest)
            .find(|index| {
                let session = self.slots.get(*index).and_then(Option::as_ref);
                session.is_some_and(|session| {
                    let is_used = session.is_used || shadow::fault!("unused-sessions-stay");
                    !is_used || is_silent(session, now)
                })
            })
            .map(|index| SessionId(index as u32))
    }

    /// Carries a wish out for the initiator who has it; `false` if there is no
    /// room to remember one more.
    pub fn grant(&mut self, now: Instant, nic: NicId, mac: MacAddr, wish: Wish) -> bool {
        let id = match wish {
            Wish::Reset => {
                self.forget_asker(nic, mac);
                return true;
            }
            Wish::Off(_) => match self.find(nic, mac) {
                Some(id) => id,
                None => return true,
            },
            Wish::On(_) | Wish::Congestion(_) => match self.remember(now, nic, mac) {
                Some(id) => id,
                None => return false,
            },
        };
        let life = self.next_life();
        let Some(session) = self.get_mut(id) else {
            return false;
        };
        session.apply(now, wish, life);
        if session.extensions == Extensions::default() {
            self.forget(id);
        }
        true
    }

    /// All off for this initiator.
    pub fn forget_asker(&mut self, nic: NicId, mac: MacAddr) {
        if let Some(id) = self.find(nic, mac) {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: SessionId) {
        if let Some(session) = self.slots[id.0 as usize].take() {
            self.by_key.remove(&session.key);
            self.free.push(id);
        }
    }

    fn remember(&mut self, now: Instant, nic: NicId, mac: MacAddr) -> Option<SessionId> {
        if let known @ Some(_) = self.find(nic, mac) {
            return known;
        }
        if self.by_key.len() >= SESSIONS_MAX {
            let id = self.gives_way(now)?;
            self.forget(id);
            self.hand = id.0 as usize + 1;
        }
        let session = Session {
            key: (nic, mac),
            heard: now,
            is_used: false,
            extensions: Extensions::default(),
            history: History::default(),
            pace: Pace::new(now),
            damage: Damage::default(),
        };
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                self.slots.push(None);
                SessionId(self.slots.len() as u32 - 1)
            }
        };
        self.slots[id.0 as usize] = Some(session);
        self.by_key.insert((nic, mac), id);
        Some(id)
    }

    fn next_life(&mut self) -> Life {
        self.lives += 1;
        Life(self.lives)
    }
}

fn is_silent(session: &Session, now: Instant) -> bool {
    now.saturating_duration_since(session.heard) >= SILENCE_MAX
}

impl Session {
    fn apply(&mut self, now: Instant, wish: Wish, life: Life) {
        let (extension, on) = match wish {
            Wish::On(extension) => (extension, true),
            Wish::Off(extension) => (extension, false),
            Wish::Congestion(number) => {
                self.extensions.congestion = true;
                self.pace.congestion(now, number);
                return;
            }
            Wish::Reset => return,
        };
        let tags = match extension {
            Extension::CoalescedRead => {
                self.extensions.coalesced_read = on;
                return;
            }
            Extension::Crc8x4 => {
                self.extensions.crc8x4 = on;
                return;
            }
            Extension::TagIncLe => Tags::CountLe,
            Extension::TagIncBe => Tags::CountBe,
            Extension::TagRandom => Tags::Unique,
        };
        if on {
            self.extensions.tags = tags;
            self.history.begin_anew(tags, life);
        } else if self.extensions.tags == tags {
            self.extensions.tags = Tags::Opaque;
            self.history.begin_anew(Tags::Opaque, life);
        }
    }
}

/// Tags.
impl Sessions {
    /// An ATA request of an initiator with this tag; `writes` says whether it
    /// is one that must not be carried out twice.
    pub fn begin(&mut self, id: SessionId, tag: [u8; 4], writes: bool) -> Begun {
        let life = Life(self.lives + 1);
        let Some(session) = self.get_mut(id) else {
            return Begun::Untracked;
        };
        let tags = session.extensions.tags;
        let begun = session.history.begin(tags, tag, writes, life);
        if begun == Begun::Fresh(life) {
            self.lives += 1;
        }
        begun
    }

    /// A write with this tag was carried out at once.
    pub fn mark(&mut self, id: SessionId, tag: [u8; 4]) {
        if let Some(session) = self.get_mut(id) {
            session.history.mark(session.extensions.tags, tag);
        }
    }

    /// A request with this tag is in hand until [`end`](Sessions::end).
    pub fn hold(&mut self, id: SessionId, tag: [u8; 4]) {
        if let Some(session) = self.get_mut(id) {
            session.history.hold(tag);
        }
    }

    /// The same, if the initiator is remembered.
    pub fn hold_for(&mut self, nic: NicId, mac: MacAddr, tag: [u8; 4]) {
        if let Some(id) = self.find(nic, mac) {
            self.hold(id, tag);
        }
    }

    /// A request that was in hand has ended; `mark` says whether it was a write
    /// and was carried out.
    ///
    /// `false` if its initiator has begun counting anew since: to it the answer
    /// could be one to another request with the same tag.
    pub fn end(&mut self, nic: NicId, mac: MacAddr, life: Life, tag: [u8; 4], mark: bool) -> bool {
        let Some(session) = self.find(nic, mac).and_then(|id| self.get_mut(id)) else {
            return true;
        };
        let tags = session.extensions.tags;
        tags == Tags::Opaque || session.history.end(tags, life, tag, mark)
    }
}

/// Pace, and damage on the way.
impl Sessions {
    /// A reply of so many bytes is ready for an initiator: when it may leave,
    /// if that is not now.
    pub fn due(&mut self, now: Instant, id: SessionId, bytes: usize) -> Option<Instant> {
        self.get_mut(id)?.pace.due(now, bytes)
    }

    /// The same, if the initiator is remembered.
    pub fn due_to(
        &mut self,
        now: Instant,
        nic: NicId,
        mac: MacAddr,
        bytes: usize,
    ) -> Option<Instant> {
        self.due(now, self.find(nic, mac)?, bytes)
    }

    /// Replies may leave to everyone as fast as they can.
    pub fn hurry(&mut self) {
        for session in self.slots.iter_mut().flatten() {
            session.pace.free();
        }
    }

    /// A frame of an initiator arrived damaged; how many have since it was
    /// written about last, if it is time to do so again.
    pub fn damaged(&mut self, now: Instant, id: SessionId) -> Option<u64> {
        let is_over = |since: Option<Instant>| {
            since.is_none_or(|at| now.saturating_duration_since(at) >= DAMAGE_LOG_INTERVAL)
        };
        if is_over(self.damage_since) {
            (self.damage_since, self.damage_lines) = (Some(now), 0);
        }
        let may_tell = self.damage_lines < DAMAGE_LINES_MAX;
        let damage = &mut self.get_mut(id)?.damage;
        damage.frames += 1;
        if !may_tell || !is_over(damage.logged) {
            return None;
        }
        damage.logged = Some(now);
        let frames = std::mem::take(&mut damage.frames);
        self.damage_lines += 1;
        Some(frames)
    }
}

#[cfg(test)]
mod tests;
