//! How what requests change is saved.
//!
//! A change is made in a copy of the state, a draft. If it differs, it is saved
//! before anyone sees it or any reply leaves; one save at a time, a few in a
//! second, and each takes all the changes that came before it. If saving fails
//! nothing has changed, and those who asked are told so.
//!
//! A change has a place from its request to its answer. There are few places,
//! shared equally by those who want them, and what waits in them is bounded, so
//! that a state directory that hangs costs no memory. Requests that change nothing
//! go on meanwhile.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::change_log::ChangeLog;
use super::{Action, Arrival, Dropped, NicId, Ready, SAVE, Target, What};
use crate::access::{self, Draft, Full, Switch, WireState};
use crate::drive;
use crate::store::{Queue, Shares};
use crate::wire::ata::Taskfile;
use crate::wire::extensions::Wish;
use crate::wire::{HEAD_MAX, MacAddr, Origin, Request};

/// Changes that may wait; more are dropped and asked again. Each keeps
/// [`ADMIN_MAX`](crate::wire::ADMIN_MAX) bytes of its request, or, once it is
/// being saved, two replies of [`HEAD_MAX`] bytes at most.
pub(super) const CHANGES_MAX: usize = 64;
/// How many of these places are kept for initiators below their share.
pub(super) const CHANGES_HEADROOM: usize = 8;
/// One save in so long, and so many at once after a time without any.
pub(super) const SAVE_INTERVAL: Duration = Duration::from_millis(200);
pub(super) const SAVES_AT_ONCE: u32 = 4;

/// Changes on their way, from request to answer.
#[derive(Debug)]
pub(super) struct Changes {
    /// Those that wait for a save to begin, in order.
    held: VecDeque<Held>,
    saving: Option<Saving>,
    /// Who has how many places: held, being saved, or waiting for the flush
    /// before the write cache goes off.
    places: Shares,
    /// Who has ordered the write cache off, for each order that is not saved yet:
    /// writes of that host are durable from the moment of its first.
    closing: Vec<MacAddr>,
    /// Until when the saves that began take up the intervals.
    paid: Option<Instant>,
    /// `true` if saves and lines do not wait for their time any more.
    hurries: bool,
    log: ChangeLog,
}

/// A change that waits for its turn.
#[derive(Debug)]
pub(super) struct Held {
    nic: NicId,
    from: MacAddr,
    change: Change,
}

#[derive(Debug)]
pub(super) enum Change {
    /// A Config, Mask or Reserve request, as much of it as means something.
    Frame(Vec<u8>),
    /// An ATA command that switches something.
    Switch(Origin, Taskfile, Switch),
}

/// A save that has begun, and the initiators that wait for it.
#[derive(Debug)]
struct Saving {
    next: WireState,
    waiting: Vec<Waiting>,
    /// How many changes it saves, and who made the last.
    changes: u64,
    last_by: MacAddr,
}

#[derive(Debug)]
struct Waiting {
    nic: NicId,
    from: MacAddr,
    /// The reply if it is saved, empty for silence, and if it is not.
    saved: Vec<u8>,
    failed: Vec<u8>,
    /// `true` if it switches the write cache off.
    closes: bool,
    /// What it does for its asker once it is saved.
    wishes: Wishes,
}

/// What a request does for its asker alone.
#[derive(Debug)]
pub(super) struct Wishes {
    pub asker: MacAddr,
    pub list: Vec<Wish>,
}

impl Wishes {
    fn none() -> Wishes {
        Wishes {
            asker: MacAddr::BROADCAST,
            list: Vec::new(),
        }
    }
}

impl Held {
    pub(super) fn frame(nic: NicId, request: &Request) -> Held {
        Held {
            nic,
            from: request.origin.source,
            change: Change::Frame(request.admin_bytes().to_vec()),
        }
    }

    pub(super) fn switch(nic: NicId, origin: Origin, taskfile: Taskfile, to: Switch) -> Held {
        Held {
            nic,
            from: origin.source,
            change: Change::Switch(origin, taskfile, to),
        }
    }

    /// `true` if it switches the write cache off.
    fn closes(&self) -> bool {
        matches!(self.change, Change::Switch(_, _, Switch::WriteCache(false)))
    }
}

impl Changes {
    pub fn new(state: WireState) -> Changes {
        Changes {
            held: VecDeque::new(),
            saving: None,
            places: Shares::new(CHANGES_MAX as u64, CHANGES_HEADROOM as u64),
            closing: Vec::new(),
            paid: None,
            hurries: false,
            log: ChangeLog::new(state),
        }
    }

    /// `true` if one more change of this host may wait.
    pub fn has_room(&self, from: MacAddr) -> bool {
        self.places.admits(Queue::of(from.0), 1) || shadow::fault!("changes-without-bound")
    }

    fn begin(&mut self, from: MacAddr) {
        self.places.take(Queue::of(from.0), 1);
    }

    /// `true` if no change is on its way.
    pub fn is_empty(&self) -> bool {
        self.places.total() == 0 && self.closing.is_empty()
    }

    /// `true` if changes wait that may yet be undone or done by one that comes
    /// now.
    pub fn are_waiting(&self) -> bool {
        self.saving.is_some() || !self.held.is_empty()
    }

    /// `true` if this host has ordered its write cache off.
    pub fn is_closing(&self, mac: MacAddr) -> bool {
        self.closing.contains(&mac)
    }

    /// Begins an order to switch this host's write cache off, which has a place
    /// from now on; there is room.
    pub fn close(&mut self, from: MacAddr) {
        self.begin(from);
        self.closing.push(from);
    }

    /// Ends a change, which gives its place back; `closes` says whether it was to
    /// switch the write cache off.
    pub fn end(&mut self, from: MacAddr, closes: bool) {
        self.places.release(Queue::of(from.0), 1);
        let at = self.closing.iter().position(|mac| *mac == from);
        if let Some(at) = at.filter(|_| closes) {
            self.closing.swap_remove(at);
        }
    }

    /// Lets nothing wait for its time any more.
    pub fn hurry(&mut self) {
        self.hurries = true;
    }

    /// When the next save may begin; `None` if one may at any time.
    fn save_due(&self) -> Option<Instant> {
        let paid = self.paid.filter(|_| !self.hurries)?;
        paid.checked_sub(SAVE_INTERVAL * (SAVES_AT_ONCE - 1))
    }

    /// A save begins.
    fn pay(&mut self, now: Instant) {
        self.paid = Some(self.paid.map_or(now, |paid| paid.max(now)) + SAVE_INTERVAL);
    }

    fn may_save(&self, now: Instant) -> bool {
        let due = self.save_due().is_none_or(|at| at <= now);
        self.saving.is_none() && (due || shadow::fault!("saves-without-pace"))
    }

    /// When there is something to do that waits for its time.
    pub fn deadline(&self) -> Option<Instant> {
        let waits = self.saving.is_none() && !self.held.is_empty();
        let save = self.save_due().filter(|_| waits);
        save.into_iter().chain(self.log.due()).min()
    }
}

impl Target {
    /// Makes a change, or holds it until it may be saved.
    pub(super) fn change(&mut self, now: Instant, held: Held, head: &mut [u8]) -> Action {
        if !self.changes.has_room(held.from) {
            return Action::Drop(Dropped::NoRoom);
        }
        self.changes.begin(held.from);
        let is_first = self.changes.held.is_empty();
        self.changes.held.push_back(held);
        if !is_first || !self.changes.may_save(now) {
            return Action::Parked;
        }
        let before = self.ready.len();
        self.save_held(now);
        // What turned out to change nothing has its reply at once.
        match self.ready.len() > before {
            true => match self.ready.pop_back() {
                Some(Ready {
                    what: What::Bytes(bytes),
                    ..
                }) => {
                    head[..bytes.len()].copy_from_slice(&bytes);
                    Action::plain(bytes.len())
                }
                _ => Action::Parked,
            },
            false => Action::Parked,
        }
    }

    /// Makes a change that has a place already.
    pub(super) fn change_later(&mut self, held: Held) {
        self.changes.held.push_back(held);
    }

    /// Does what has waited for its time: saves what is held, and tells the
    /// operator what has changed.
    pub(super) fn advance_changes(&mut self, now: Instant) {
        if !self.changes.held.is_empty() && self.changes.may_save(now) {
            self.save_held(now);
        }
        let hurries = self.changes.hurries;
        let due = self.changes.log.due();
        if due.is_some_and(|at| at <= now || hurries) {
            let line = self.changes.log.line(now, &self.state);
            log::info!("{}: {line}", self.settings.address);
        }
    }

    /// Makes all held changes in a draft of the state, and saves it if it
    /// differs.
    fn save_held(&mut self, now: Instant) {
        let mut next: Option<WireState> = None;
        let mut waiting = Vec::new();
        let (mut changes, mut last_by) = (0, MacAddr::BROADCAST);
        let mut head = vec![0; HEAD_MAX];
        while let Some(held) = self.changes.held.pop_front() {
            let closes = held.closes();
            let Some(&Some(info)) = self.nics.get(usize::from(held.nic.0)) else {
                // Nobody would hear the answer; who asked will ask again.
                self.changes.end(held.from, closes);
                continue;
            };
            let arrival = Arrival {
                now,
                nic: held.nic,
                info,
            };
            let mut wishes = Wishes::none();
            let before = next.as_ref().unwrap_or(&self.state);
            let mut draft = Draft::Borrowed(before);
            let failed_len = self.refuse_change(&arrival, &held.change, &mut head);
            let failed = head[..failed_len].to_vec();
            let len = match &held.change {
                Change::Frame(frame) => match Request::parse(frame) {
                    Ok(request) => {
                        let len;
                        (len, wishes) = self.apply_frame(&mut draft, &arrival, &request, &mut head);
                        len
                    }
                    Err(_) => 0,
                },
                Change::Switch(origin, taskfile, switch) => {
                    let outcome = match access::switch(&mut draft, *switch, origin.source) {
                        Ok(()) => drive::SUCCESS,
                        Err(Full) => drive::aborted(taskfile),
                    };
                    self.header(&mut head, &info, origin, None);
                    taskfile.reply(&mut head, outcome);
                    drive::pad_registers(&mut head, taskfile)
                }
            };
            if let Some(state) = access::changed(draft, before) {
                next = Some(state);
                changes += 1;
                last_by = held.from;
            }
            let saved = head[..len].to_vec();
            waiting.push(Waiting {
                nic: held.nic,
                from: held.from,
                saved,
                failed,
                closes,
                wishes,
            });
        }
        // Changes may undo each other.
        let Some(next) = next.filter(|next| *next != self.state) else {
            self.release(now, waiting, true);
            return;
        };
        self.changes.pay(now);
        self.volume
            .save(SAVE, Arc::clone(&self.state_file), next.to_text());
        self.changes.saving = Some(Saving {
            next,
            waiting,
            changes,
            last_by,
        });
    }

    /// The save has ended.
    pub(super) fn saved(&mut self, now: Instant, ok: bool) {
        let Some(saving) = self.changes.saving.take() else {
            return;
        };
        if ok {
            self.state = saving.next;
            self.changes.log.saved(now, saving.changes, saving.last_by);
        }
        self.release(now, saving.waiting, ok);
    }

    fn release(&mut self, now: Instant, waiting: Vec<Waiting>, ok: bool) {
        for one in waiting {
            self.changes.end(one.from, one.closes);
            // A place that was free when the answer was made may be taken now:
            // then there is none, and the asker asks again.
            let granted = !ok || self.grant(now, one.nic, one.wishes);
            let bytes = if ok { one.saved } else { one.failed };
            if granted && !bytes.is_empty() {
                self.ready.push_back(Ready {
                    nic: one.nic,
                    what: What::Bytes(bytes),
                });
            }
        }
    }
}
