//! Requests about the export itself, and how what they change is saved.
//!
//! A change is made in a copy of the state. If the copy differs, it is saved
//! before anyone sees it or any reply leaves; one save at a time, and the next
//! takes all the changes that came meanwhile. If saving fails nothing has
//! changed, and those who asked are told so. What a request changes for its
//! asker alone (extensions) is not saved, and done when it is answered.

use std::sync::Arc;
use std::time::Instant;

use super::ata::pad_registers;
use super::{Action, Arrival, Dropped, NicId, NicInfo, Ready, SAVE, Target, What};
use crate::access::{self, Verdict, WireState};
use crate::drive;
use crate::wire::ata::Taskfile;
use crate::wire::config::{self, Query, Report};
use crate::wire::extensions::Wish;
use crate::wire::mask::{self, Edit, LIST_MAX, MaskError};
use crate::wire::reserve::{self, Order};
use crate::wire::{Command, ErrorCode, HEAD_MAX, MacAddr, Origin, Request, frame_max, pad};

/// Changes that may wait for a save; more are dropped and asked again.
const HELD_MAX: usize = 64;

/// A change that waits for its turn.
#[derive(Debug)]
pub(super) struct Held {
    nic: NicId,
    change: Change,
}

#[derive(Debug)]
enum Change {
    /// A Config, Mask or Reserve request, whole.
    Frame(Vec<u8>),
    /// An ATA command that switches something.
    Switch(Origin, Taskfile, Switch),
}

/// What ATA commands switch for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    WriteCache(bool),
    Smart(bool),
}

/// A save under way, and whom it makes wait.
#[derive(Debug)]
pub(super) struct Saving {
    next: WireState,
    waiting: Vec<Waiting>,
    /// What the operator is told once it is so.
    changes: Vec<String>,
}

#[derive(Debug)]
struct Waiting {
    nic: NicId,
    /// The reply if it is saved, empty for silence, and if it is not.
    saved: Vec<u8>,
    failed: Vec<u8>,
    closes_cache: bool,
    /// What it does for its asker once it is saved.
    wishes: Wishes,
}

/// What a request does for its asker alone.
#[derive(Debug)]
struct Wishes {
    asker: MacAddr,
    list: Vec<Wish>,
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
    pub(super) fn switch(nic: NicId, origin: Origin, taskfile: Taskfile, to: Switch) -> Held {
        Held {
            nic,
            change: Change::Switch(origin, taskfile, to),
        }
    }

    fn closes_cache(&self) -> bool {
        matches!(self.change, Change::Switch(_, _, Switch::WriteCache(false)))
    }

    fn asker(&self) -> Option<MacAddr> {
        match &self.change {
            Change::Frame(frame) => Request::parse(frame).ok().map(|r| r.origin.source),
            Change::Switch(origin, ..) => Some(origin.source),
        }
    }
}

impl Target {
    /// A Config, Mask or Reserve request.
    pub(super) fn administer(
        &mut self,
        arrival: &Arrival,
        request: &Request,
        head: &mut [u8],
    ) -> Action {
        // What changes nothing is answered now, even while a save is under
        // way; that is all of discovery.
        let mut next = self.state.clone();
        let (len, wishes) = self.apply_frame(&mut next, arrival, request, head);
        // An order is not answered past those before it, which it may undo.
        let must_wait = self.saving.is_some() && orders_change(&request.command);
        if next == self.state && !must_wait {
            return match len {
                _ if !self.grant(arrival.now, arrival.nic, wishes) => Action::Drop(Dropped::NoRoom),
                0 => Action::Drop(Dropped::Silence),
                len => Action::plain(len),
            };
        }
        self.change(
            arrival.now,
            Held {
                nic: arrival.nic,
                change: Change::Frame(request.frame.to_vec()),
            },
            head,
        )
    }

    /// Makes a change, or holds it while a save is under way.
    pub(super) fn change(&mut self, now: Instant, held: Held, head: &mut [u8]) -> Action {
        if self.held.len() >= HELD_MAX {
            return Action::Drop(Dropped::NoRoom);
        }
        self.held.push_back(held);
        if self.saving.is_some() {
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

    /// Makes a change whose asker already waits.
    pub(super) fn change_later(&mut self, now: Instant, held: Held) {
        self.held.push_back(held);
        if self.saving.is_none() {
            self.save_held(now);
        }
    }

    /// Makes all held changes in a copy of the state, and saves it if it
    /// differs.
    fn save_held(&mut self, now: Instant) {
        let mut next = self.state.clone();
        let (mut waiting, mut changes) = (Vec::new(), Vec::new());
        let mut head = vec![0; HEAD_MAX];
        while let Some(held) = self.held.pop_front() {
            let closes_cache = held.closes_cache();
            let Some(&Some(info)) = self.nics.get(usize::from(held.nic.0)) else {
                // Nobody would hear the answer; who asked will ask again.
                self.closing -= u32::from(closes_cache);
                continue;
            };
            let arrival = Arrival {
                now,
                nic: held.nic,
                info,
            };
            let mut wishes = Wishes::none();
            let before = next.clone();
            let failed_len = self.refuse_change(&arrival, &held.change, &mut head);
            let failed = head[..failed_len].to_vec();
            let len = match &held.change {
                Change::Frame(frame) => match Request::parse(frame) {
                    Ok(request) => {
                        let len;
                        (len, wishes) = self.apply_frame(&mut next, &arrival, &request, &mut head);
                        len
                    }
                    Err(_) => 0,
                },
                Change::Switch(origin, taskfile, switch) => {
                    match switch {
                        Switch::WriteCache(on) => next.write_cache = *on,
                        Switch::Smart(on) => next.smart = *on,
                    }
                    self.header(&mut head, &info, origin, None);
                    taskfile.reply(&mut head, drive::SUCCESS);
                    pad_registers(&mut head, taskfile)
                }
            };
            if let Some(asker) = held.asker().filter(|_| next != before) {
                changes.extend(describe_change(&before, &next, asker));
            }
            let saved = head[..len].to_vec();
            waiting.push(Waiting {
                nic: held.nic,
                saved,
                failed,
                closes_cache,
                wishes,
            });
        }
        if next == self.state {
            self.release(now, waiting, true);
            return;
        }
        self.volume
            .save(SAVE, Arc::clone(&self.state_file), next.to_text());
        self.saving = Some(Saving {
            next,
            waiting,
            changes,
        });
    }

    /// The save under way has ended.
    pub(super) fn saved(&mut self, now: Instant, ok: bool) {
        let Some(saving) = self.saving.take() else {
            return;
        };
        let Saving {
            next,
            waiting,
            changes,
        } = saving;
        if ok {
            self.state = next;
            changes.iter().for_each(|change| log::info!("{change}"));
        }
        self.release(now, waiting, ok);
        if !self.held.is_empty() {
            self.save_held(now);
        }
    }

    fn release(&mut self, now: Instant, waiting: Vec<Waiting>, ok: bool) {
        for one in waiting {
            self.closing -= u32::from(one.closes_cache);
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

    /// Does for an asker what it wishes; `false` if there is no room to
    /// remember it.
    fn grant(&mut self, now: Instant, nic: NicId, wishes: Wishes) -> bool {
        let Wishes { asker, list } = wishes;
        list.into_iter()
            .all(|wish| self.sessions.grant(now, nic, asker, wish))
    }

    /// Carries a request out on `state` and writes its answer; returns the
    /// length to send, 0 for silence, and what is to be done for its asker.
    fn apply_frame(
        &self,
        state: &mut WireState,
        arrival: &Arrival,
        request: &Request,
        head: &mut [u8],
    ) -> (usize, Wishes) {
        let policy = &self.settings.policy;
        let info = &arrival.info;
        let origin = &request.origin;
        let mut wishes = Wishes {
            asker: origin.source,
            list: Vec::new(),
        };
        let len = match request.command {
            Command::Config(query) => {
                let verdict = access::query(state, policy, &query, self.longest_frame());
                let sets = matches!(query, Query::Set(_) | Query::ForceSet(_));
                if sets && verdict == Verdict::Answer {
                    wishes.list.push(Wish::Reset);
                }
                // A set is answered as to one who has nothing on any more.
                let summed = wishes.list.is_empty()
                    && self.sessions.extensions(arrival.nic, origin.source).crc8x4;
                let (string, code) = match verdict {
                    Verdict::Silence => return (0, wishes),
                    Verdict::Answer => (&state.config[..], None),
                    Verdict::Refuse(code @ ErrorCode::ConfigStringSet) => {
                        (&state.config[..], Some(code))
                    }
                    Verdict::Refuse(code) => (&[][..], Some(code)),
                };
                self.report(head, info, request, summed, string, code)
            }
            Command::Mask(edit) => {
                let room = frame_max(info.mtu).saturating_sub(mask::DIRECTIVES) / mask::DIRECTIVE;
                let mcmd = mask::mcmd(request.frame);
                let before = state.masks.clone();
                let Arrival { now, nic, .. } = *arrival;
                let has_room = self.sessions.has_room(now, nic, origin.source);
                let extend = |wish| match wish {
                    Wish::On(_) if !has_room => Err(MaskError::ListFull),
                    wish => {
                        wishes.list.push(wish);
                        Ok(())
                    }
                };
                let outcome = match edit {
                    Edit::Read => Ok(()),
                    // Extensions are the asker's own and touch no list.
                    Edit::Edit(directives) if !policy.deny_mask || directives.are_extensions() => {
                        access::edit_masks(state, policy, directives, room, extend)
                    }
                    Edit::Edit(_) | Edit::Bad => {
                        return (self.refuse_mask(head, info, origin, mcmd), wishes);
                    }
                };
                match outcome {
                    Err((index, error)) => {
                        self.header(head, info, origin, None);
                        mask::emit_error(head, mcmd, error, index)
                    }
                    // Another NIC with longer frames made the list; here it
                    // cannot be told, and what is refused has no effect.
                    Ok(()) if state.masks.len() > room.min(LIST_MAX) => {
                        state.masks = before;
                        wishes.list.clear();
                        return (self.refuse_mask(head, info, origin, mcmd), wishes);
                    }
                    Ok(()) => {
                        self.header(head, info, origin, None);
                        mask::emit_list(head, mcmd, &state.masks)
                    }
                }
            }
            Command::Reserve(order) => {
                let error = match access::reserve(state, policy, &order, origin.source) {
                    Verdict::Refuse(code) => Some(code),
                    Verdict::Answer | Verdict::Silence => None,
                };
                let bad = error == Some(ErrorCode::BadArgument) || order == Order::Bad;
                let list = if bad { &[][..] } else { &state.reserved };
                self.holders(head, info, request, list, error)
            }
            _ => return (0, wishes),
        };
        (pad(head, len), wishes)
    }

    /// The answer to a change that could not be saved.
    fn refuse_change(&self, arrival: &Arrival, change: &Change, head: &mut [u8]) -> usize {
        let info = &arrival.info;
        let bad = Some(ErrorCode::BadArgument);
        let len = match change {
            Change::Switch(origin, taskfile, _) => {
                self.header(head, info, origin, None);
                taskfile.reply(head, drive::fault(taskfile));
                return pad_registers(head, taskfile);
            }
            Change::Frame(frame) => match Request::parse(frame) {
                Ok(request) => match request.command {
                    Command::Mask(_) => {
                        let mcmd = mask::mcmd(frame);
                        return self.refuse_mask(head, info, &request.origin, mcmd);
                    }
                    Command::Reserve(_) => self.holders(head, info, &request, &[], bad),
                    _ => {
                        let asker = request.origin.source;
                        let summed = self.sessions.extensions(arrival.nic, asker).crc8x4;
                        self.report(head, info, &request, summed, &[], bad)
                    }
                },
                Err(_) => return 0,
            },
        };
        pad(head, len)
    }

    /// A Config answer; one that would be longer than the NIC's frames is an
    /// error without a string.
    fn report(
        &self,
        head: &mut [u8],
        info: &NicInfo,
        request: &Request,
        summed: bool,
        string: &[u8],
        error: Option<ErrorCode>,
    ) -> usize {
        if config::STRING + string.len() > frame_max(info.mtu) {
            let bad = Some(ErrorCode::BadArgument);
            return self.report(head, info, request, summed, &[], bad);
        }
        self.header(head, info, &request.origin, error);
        let report = Report {
            buffers: self.settings.buffers,
            sectors: Self::frame_sectors(info, summed),
            sub: config::subcommand(request.frame),
            string,
        };
        report.emit(head)
    }

    fn refuse_mask(&self, head: &mut [u8], info: &NicInfo, origin: &Origin, mcmd: u8) -> usize {
        self.header(head, info, origin, Some(ErrorCode::BadArgument));
        let len = mask::emit_nothing(head, mcmd);
        pad(head, len)
    }

    /// A Reserve answer; one that would be longer than the NIC's frames is an
    /// error without a list.
    fn holders(
        &self,
        head: &mut [u8],
        info: &NicInfo,
        request: &Request,
        list: &[MacAddr],
        error: Option<ErrorCode>,
    ) -> usize {
        if reserve::length(list.len()) > frame_max(info.mtu) {
            return self.holders(head, info, request, &[], Some(ErrorCode::BadArgument));
        }
        self.header(head, info, &request.origin, error);
        reserve::emit(head, reserve::rcmd(request.frame), list)
    }
}

/// Whether a request may change something, in whatever state it is.
fn orders_change(command: &Command) -> bool {
    match command {
        Command::Config(Query::Set(_) | Query::ForceSet(_) | Query::Replace(_))
        | Command::Reserve(Order::Set(_) | Order::ForceSet(_)) => true,
        Command::Mask(Edit::Edit(directives)) => !directives.are_extensions(),
        _ => false,
    }
}

/// Who changed what, for the operator.
fn describe_change(before: &WireState, next: &WireState, asker: MacAddr) -> Vec<String> {
    let mut changes = Vec::new();
    if before.config != next.config {
        let string = String::from_utf8_lossy(&next.config);
        let string = string.escape_debug();
        changes.push(format!("config string set to \"{string}\" by {asker}"));
    }
    if before.masks != next.masks {
        changes.push(format!("mask list changed by {asker}: {:?}", next.masks));
    }
    if before.reserved != next.reserved {
        changes.push(format!(
            "reservation changed by {asker}: {:?}",
            next.reserved
        ));
    }
    if before.write_cache != next.write_cache {
        let now = if next.write_cache { "on" } else { "off" };
        changes.push(format!("write cache switched {now} by {asker}"));
    }
    if before.smart != next.smart {
        let now = if next.smart { "enabled" } else { "disabled" };
        changes.push(format!("SMART {now} by {asker}"));
    }
    changes
}
