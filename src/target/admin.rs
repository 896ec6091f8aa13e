//! Requests about the export itself: Config, Mask and Reserve.
//!
//! What they change for good is saved first (see [`saves`](super::saves)). What
//! a request changes for its asker alone (extensions) is not saved, and done
//! when it is answered.

use std::time::Instant;

use super::saves::{Change, Held, Wishes};
use super::{Action, Arrival, Dropped, NicId, NicInfo, Target};
use crate::access::{self, Draft, Verdict};
use crate::drive;
use crate::wire::config::{self, Query, Report};
use crate::wire::extensions::Wish;
use crate::wire::mask::{self, Edit, LIST_MAX, MaskError};
use crate::wire::reserve::{self, Order};
use crate::wire::{Command, ErrorCode, MacAddr, Origin, Request, frame_max, pad};

impl Target {
    /// A Config, Mask or Reserve request.
    pub(super) fn administer(
        &mut self,
        arrival: &Arrival,
        request: &Request,
        head: &mut [u8],
    ) -> Action {
        // What changes nothing is answered now, even during a save; that is all
        // of discovery.
        let mut draft = Draft::Borrowed(&self.state);
        let (len, wishes) = self.apply_frame(&mut draft, arrival, request, head);
        let changes = access::changed(draft, &self.state).is_some();
        // An order is not answered past those before it, which it may undo.
        let must_wait = self.changes.are_waiting() && orders_change(&request.command);
        if !changes && !must_wait {
            return match len {
                _ if !self.grant(arrival.now, arrival.nic, wishes) => Action::Drop(Dropped::NoRoom),
                0 => Action::Drop(Dropped::Silence),
                len => Action::plain(len),
            };
        }
        self.change(arrival.now, Held::frame(arrival.nic, request), head)
    }

    /// Does for an asker what it wishes; `false` if there is no room to
    /// remember it.
    pub(super) fn grant(&mut self, now: Instant, nic: NicId, wishes: Wishes) -> bool {
        let Wishes { asker, list } = wishes;
        list.into_iter()
            .all(|wish| self.sessions.grant(now, nic, asker, wish))
    }

    /// Carries a request out on `state` and writes its answer; returns the
    /// length to send, 0 for silence, and what is to be done for its asker.
    pub(super) fn apply_frame(
        &self,
        state: &mut Draft,
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
                let before = state.clone();
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
                        *state = before;
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
    pub(super) fn refuse_change(
        &self,
        arrival: &Arrival,
        change: &Change,
        head: &mut [u8],
    ) -> usize {
        let info = &arrival.info;
        let bad = Some(ErrorCode::BadArgument);
        let len = match change {
            Change::Switch(origin, taskfile, _) => {
                self.header(head, info, origin, None);
                taskfile.reply(head, drive::fault(taskfile));
                return drive::pad_registers(head, taskfile);
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
