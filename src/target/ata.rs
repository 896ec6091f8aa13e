//! ATA requests: from registers to the volume and back.

use std::time::Instant;

use super::admin::{Held, Switch};
use super::{Action, Dropped, NicId, NicInfo, Ready, Target, What};
use crate::access;
use crate::drive::{self, Health, Limits, Order, Page, Refusal, Smart};
use crate::store::{Read, Refused, Token, Volume, Write};
use crate::sys::buffer::Body;
use crate::wire::ata::{DATA, Outcome, Payload, Taskfile};
use crate::wire::{ErrorCode, Origin, Request, pad_to};

/// A request whose reply waits for the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parked {
    nic: NicId,
    origin: Origin,
    taskfile: Taskfile,
    what: Pending,
}

/// What it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Read,
    Verify,
    Write {
        /// Whether it ends only after a sync.
        durable: bool,
    },
    Flush,
    /// The flush before the write cache goes off.
    CacheOff,
}

/// How disk work began.
enum Begun {
    /// It is done, and with what data.
    Done(Option<Body>),
    /// It ends later.
    Under,
}

/// One reader, told from another: an initiator on a NIC.
fn reader(nic: NicId, origin: &Origin) -> u64 {
    let [a, b, c, d, e, f] = origin.source.0;
    u64::from_be_bytes([(nic.0 >> 8) as u8, nic.0 as u8, a, b, c, d, e, f])
}

/// A reply to an ATA request.
#[derive(Debug)]
pub(super) struct Answer {
    pub origin: Origin,
    pub taskfile: Taskfile,
    pub outcome: Outcome,
    pub body: Option<Body>,
}

/// Pads an answer of registers alone; returns its length.
pub(super) fn pad_registers(head: &mut [u8], taskfile: &Taskfile) -> usize {
    pad_to(head, DATA, drive::shortest_answer(taskfile))
}

impl Target {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn ata(
        &mut self,
        now: Instant,
        nic: NicId,
        info: &NicInfo,
        request: &Request,
        taskfile: Taskfile,
        payload: Payload,
        head: &mut [u8],
    ) -> Action {
        let origin = request.origin;
        if request.is_broadcast() && drive::changes_something(&taskfile) {
            return Action::Drop(Dropped::BroadcastChange);
        }
        let reserved = !access::may_use(&self.state, origin.source);
        if reserved && !drive::is_identify(&taskfile) {
            return self.refuse(head, info, &origin, &taskfile, ErrorCode::TargetReserved);
        }
        let limits = Limits {
            sectors: self.volume.sectors(),
            frame_sectors: Self::frame_sectors(info),
            read_only: self.settings.read_only,
            always_durable: self.settings.durable,
            trim: self.settings.identity.trim,
            smart: self.state.smart,
        };
        let order = match drive::decode(&taskfile, payload, &limits) {
            Ok(order) => order,
            Err(Refusal::Ata(outcome)) => {
                return self.reply(head, info, &origin, &taskfile, outcome);
            }
            Err(Refusal::Aoe(code)) => return self.refuse(head, info, &origin, &taskfile, code),
        };
        let parked = |what| Parked {
            nic,
            origin,
            taskfile,
            what,
        };
        let durable = self.is_durable();
        let begun = match order {
            Order::Read(extent) | Order::Verify(extent) if extent.is_empty() => {
                Ok(Begun::Done(None))
            }
            Order::Write(extent, _) if extent.is_empty() => Ok(Begun::Done(None)),
            Order::Read(extent) => {
                let who = reader(nic, &origin);
                let begun = self.park(parked(Pending::Read), |volume, token| {
                    Ok(match volume.read(now, token, who, extent)? {
                        Read::Ready(body) => Begun::Done(Some(body)),
                        Read::Parked => Begun::Under,
                    })
                });
                if begun.is_ok() {
                    self.counters.sectors_read += extent.count();
                }
                begun
            }
            Order::Verify(extent) => self.park(parked(Pending::Verify), |volume, token| {
                volume.verify(now, token, extent).map(|()| Begun::Under)
            }),
            Order::Write(extent, data) => {
                let begun = self.park(parked(Pending::Write { durable }), |volume, token| {
                    Ok(match volume.write(now, token, extent, data, durable)? {
                        Write::Done => Begun::Done(None),
                        Write::Parked => Begun::Under,
                    })
                });
                if begun.is_ok() {
                    self.counters.sectors_written += extent.count();
                }
                begun
            }
            Order::Trim(extents) => {
                self.park(parked(Pending::Write { durable }), |volume, token| {
                    volume
                        .discard(now, token, &extents, durable)
                        .map(|()| Begun::Under)
                })
            }
            Order::Flush => self.park(parked(Pending::Flush), |volume, token| {
                volume.flush(now, token).map(|()| Begun::Under)
            }),
            Order::WriteCache(false) => {
                let begun = self.park(parked(Pending::CacheOff), |volume, token| {
                    volume.flush(now, token).map(|()| Begun::Under)
                });
                // From now on, so that nothing acknowledged meanwhile is left
                // out of what was promised.
                self.closing += u32::from(begun.is_ok());
                begun
            }
            Order::WriteCache(true) => {
                let held = Held::switch(nic, origin, taskfile, Switch::WriteCache(true));
                return self.change(held, head);
            }
            Order::Smart(Smart::Enable(on)) => {
                return self.change(Held::switch(nic, origin, taskfile, Switch::Smart(on)), head);
            }
            Order::CheckPower => {
                return self.reply(head, info, &origin, &taskfile, drive::ACTIVE);
            }
            Order::Smart(Smart::ReturnStatus) => {
                let mut taskfile = taskfile;
                let good = self.health(now).is_good();
                let word = if good { drive::GOOD } else { drive::FAILING };
                taskfile.lba[1..3].copy_from_slice(&word);
                return self.reply(head, info, &origin, &taskfile, drive::SUCCESS);
            }
            Order::Smart(Smart::ReadData) => {
                let page = self.health(now).page();
                return self.page(head, info, &origin, &taskfile, &page);
            }
            Order::Identify => {
                let smart = self.state.smart;
                let page = self
                    .settings
                    .identity
                    .page(self.volume.sectors(), !durable, smart);
                return self.page(head, info, &origin, &taskfile, &page);
            }
        };
        match begun {
            Ok(Begun::Done(body)) => {
                let outcome = drive::SUCCESS;
                self.answer(
                    head,
                    info,
                    Answer {
                        origin,
                        taskfile,
                        outcome,
                        body,
                    },
                )
            }
            Ok(Begun::Under) => Action::Parked,
            Err(Refused::NoRoom) => Action::Drop(Dropped::NoRoom),
            Err(Refused::Degraded) => {
                self.reply(head, info, &origin, &taskfile, drive::fault(&taskfile))
            }
        }
    }

    /// Whether a write is acknowledged only when it is on stable storage.
    pub(super) fn is_durable(&self) -> bool {
        self.settings.durable || !self.state.write_cache || self.closing > 0
    }

    fn health(&self, now: Instant) -> Health {
        let failures = self.volume.failures();
        Health {
            reads_failed: failures.reads,
            writes_failed: failures.writes,
            syncs_failed: failures.syncs,
            hours: now.saturating_duration_since(self.started).as_secs() / 3600,
        }
    }

    /// Begins a request's disk work, which remembers the request if it does not
    /// end at once.
    fn park(
        &mut self,
        parked: Parked,
        begin: impl FnOnce(&mut Volume, &mut dyn FnMut() -> Option<Token>) -> Result<Begun, Refused>,
    ) -> Result<Begun, Refused> {
        let mut id = None;
        let slab = &mut self.parked;
        let begun = begin(&mut self.volume, &mut || {
            id = slab.insert(parked);
            id.map(Token)
        });
        match (&begun, id) {
            (Ok(Begun::Under), _) | (_, None) => {}
            (_, Some(id)) => drop(self.parked.remove(id)),
        }
        begun
    }

    /// A request's disk work has ended.
    pub(super) fn completed(&mut self, now: Instant, parked: Parked, data: Option<Body>, ok: bool) {
        let Parked {
            nic,
            origin,
            taskfile,
            what,
        } = parked;
        if what == Pending::CacheOff {
            if ok {
                let held = Held::switch(nic, origin, taskfile, Switch::WriteCache(false));
                self.change_later(held);
                return;
            }
            self.closing -= 1;
        }
        // A write that came while the write cache was on, and ends now that it
        // goes off: the sync before that may not have seen it, and nothing is
        // acknowledged any more that is not on stable storage.
        if ok && what == (Pending::Write { durable: false }) && self.is_durable() {
            let what = Pending::Write { durable: true };
            let begun = self.park(Parked { what, ..parked }, |volume, token| {
                volume.flush(now, token).map(|()| Begun::Under)
            });
            if begun.is_ok() {
                return;
            }
        }
        let outcome = match (ok, what) {
            (true, _) => drive::SUCCESS,
            (false, Pending::Read | Pending::Verify) => drive::unreadable(&taskfile),
            (false, _) => drive::fault(&taskfile),
        };
        let answer = Answer {
            origin,
            taskfile,
            outcome,
            body: data,
        };
        self.ready.push_back(Ready {
            nic,
            what: What::Ata(answer),
        });
    }

    /// A reply of registers, and perhaps data.
    pub(super) fn answer(&self, head: &mut [u8], info: &NicInfo, answer: Answer) -> Action {
        self.header(head, info, &answer.origin, None);
        answer.taskfile.reply(head, answer.outcome);
        let len = if answer.body.is_some() {
            DATA
        } else {
            pad_registers(head, &answer.taskfile)
        };
        Action::Reply {
            len,
            body: answer.body,
        }
    }

    fn reply(
        &self,
        head: &mut [u8],
        info: &NicInfo,
        origin: &Origin,
        taskfile: &Taskfile,
        outcome: Outcome,
    ) -> Action {
        let answer = Answer {
            origin: *origin,
            taskfile: *taskfile,
            outcome,
            body: None,
        };
        self.answer(head, info, answer)
    }

    /// An error of AoE, with registers that say so too, for initiators that
    /// look at nothing else.
    fn refuse(
        &self,
        head: &mut [u8],
        info: &NicInfo,
        origin: &Origin,
        taskfile: &Taskfile,
        code: ErrorCode,
    ) -> Action {
        self.header(head, info, origin, Some(code));
        taskfile.reply(head, drive::aborted(taskfile));
        Action::Reply {
            len: pad_registers(head, taskfile),
            body: None,
        }
    }

    /// A reply with 512 bytes that are made here.
    fn page(
        &self,
        head: &mut [u8],
        info: &NicInfo,
        origin: &Origin,
        taskfile: &Taskfile,
        page: &Page,
    ) -> Action {
        self.reply(head, info, origin, taskfile, drive::SUCCESS);
        let end = DATA + page.len();
        head[DATA..end].copy_from_slice(page);
        Action::Reply {
            len: end,
            body: None,
        }
    }
}
