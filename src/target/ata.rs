//! ATA requests: from registers to the volume and back.

use std::time::Instant;

use super::saves::Held;
use super::{Action, Arrival, Dropped, NicId, NicInfo, Target};
use crate::access::{self, Switch};
use crate::drive::{self, Health, Limits, Order, Page, Refusal, Smart};
use crate::session::{Begun, Extensions, Life, SessionId, Tags};
use crate::store::{Initiator, Queue, Read, Refused, Token, Volume, Write};
use crate::sys::buffer::Body;
use crate::text::count;
use crate::wire::ata::{DATA, Outcome, Payload, Taskfile};
use crate::wire::crc::{self, Sum};
use crate::wire::{ErrorCode, MacAddr, Origin, Request};

/// An ATA request, and who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub arrival: Arrival,
    pub origin: Origin,
    pub taskfile: Taskfile,
    pub session: Option<SessionId>,
    pub extensions: Extensions,
}

/// A request whose reply waits for the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parked {
    nic: NicId,
    origin: Origin,
    taskfile: Taskfile,
    what: Pending,
    /// Where its tag is watched.
    life: Option<Life>,
}

impl Parked {
    /// Whose share of the places it has.
    pub fn queue(&self) -> Queue {
        Queue::of(self.origin.source.0)
    }
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
enum Work {
    /// It is done, and with what data.
    Done(Option<Body>),
    /// It ends later.
    Under,
}

/// What came of a request.
pub(super) enum Served {
    Answer(Answer),
    /// The answer comes when the disk is done.
    Parked,
    Dropped(Dropped),
    /// It changes what is saved.
    Change(Held),
}

/// A reply to an ATA request.
#[derive(Debug)]
pub(super) struct Answer {
    pub origin: Origin,
    taskfile: Taskfile,
    /// An error of AoE itself.
    code: Option<ErrorCode>,
    outcome: Outcome,
    pub body: Option<Body>,
    /// Where its tag is watched.
    pub life: Option<Life>,
}

impl Answer {
    /// Whom it is for.
    pub fn asker(&self) -> MacAddr {
        self.origin.source
    }

    /// How long the reply is before it is padded, with a sum or without.
    pub fn len(&self, summed: bool) -> usize {
        let sum = if summed { size_of::<Sum>() } else { 0 };
        DATA + self.body.as_ref().map_or(0, |body| body.len() + sum)
    }
}

impl Ask {
    /// An answer of registers alone.
    fn answer(&self, outcome: Outcome) -> Answer {
        Answer {
            origin: self.origin,
            taskfile: self.taskfile,
            code: None,
            outcome,
            body: None,
            life: None,
        }
    }

    /// An error of AoE, with registers that say so too, for initiators that
    /// look at nothing else.
    fn refuse(&self, code: ErrorCode) -> Served {
        Served::Answer(Answer {
            code: Some(code),
            ..self.answer(drive::aborted(&self.taskfile))
        })
    }

    /// An answer with 512 bytes that are made here.
    fn page(&self, page: &Page) -> Served {
        Served::Answer(Answer {
            body: Some(Body::Bytes(page.to_vec())),
            ..self.answer(drive::SUCCESS)
        })
    }
}

impl Target {
    /// A frame with an ATA request, or several reads.
    pub(super) fn ata(
        &mut self,
        ask: &Ask,
        request: &Request,
        payload: Payload,
        head: &mut [u8],
    ) -> Action {
        let taskfile = &ask.taskfile;
        if request.is_broadcast() && drive::changes_something(taskfile) {
            return Action::Drop(Dropped::BroadcastChange);
        }
        if ask.extensions.crc8x4
            && drive::is_write(taskfile)
            && crc::is_right(request.frame, taskfile.count) == Some(false)
            && !shadow::fault!("damaged-write-taken")
        {
            return self.damaged(ask);
        }
        let action = match self.serve(ask, payload) {
            Served::Answer(answer) => self.reply(head, ask, answer),
            Served::Parked => Action::Parked,
            Served::Dropped(why) => Action::Drop(why),
            Served::Change(held) => self.change(ask.arrival.now, held, head),
        };
        if ask.extensions.coalesced_read && drive::is_read(taskfile) {
            self.further_reads(ask, payload);
        }
        action
    }

    /// A write that is not what its initiator sent; it will send it again.
    fn damaged(&mut self, ask: &Ask) -> Action {
        let session = ask.session;
        let news = session.and_then(|id| self.sessions.damaged(ask.arrival.now, id));
        if let Some(frames) = news {
            let sectors = count(ask.taskfile.count.into(), "sector");
            let lba = drive::lba(&ask.taskfile);
            log::warn!(
                "{}: {}: a write frame arrived damaged (it says {sectors} at LBA {lba}) and was \
                 dropped, {frames} since this was said last; look at cable, NIC and switch",
                self.settings.address,
                ask.origin.source
            );
        }
        Action::Drop(Dropped::Damaged)
    }

    /// Carries a request out.
    pub(super) fn serve(&mut self, ask: &Ask, payload: Payload) -> Served {
        let Ask {
            arrival: Arrival { now, nic, info },
            origin,
            taskfile,
            ..
        } = *ask;
        if ask.extensions.congestion && self.is_beyond_pace(nic, origin.source) {
            return Served::Dropped(Dropped::Paced);
        }
        let mut life = None;
        if let Some(id) = ask.session.filter(|_| ask.extensions.tags != Tags::Opaque) {
            let writes = drive::is_write(&taskfile);
            match self.sessions.begin(id, origin.tag, writes) {
                Begun::Untracked => {}
                Begun::Fresh(fresh) => {
                    life = Some(fresh);
                    if writes && shadow::fault!("tag-marked-before-accepted") {
                        self.sessions.mark(id, origin.tag);
                    }
                }
                Begun::InHand => {
                    self.counters.duplicate_writes += u64::from(writes);
                    return Served::Dropped(Dropped::InHand);
                }
                // What its first copy got, whatever would become of it now.
                Begun::Done => {
                    self.counters.duplicate_writes += 1;
                    return Served::Answer(ask.answer(drive::SUCCESS));
                }
            }
        }
        let reserved = !access::may_use(&self.state, origin.source);
        if reserved && !drive::is_identify(&taskfile) {
            return ask.refuse(ErrorCode::TargetReserved);
        }
        let limits = Limits {
            sectors: self.volume.sectors(),
            frame_sectors: Self::frame_sectors(&info, ask.extensions.crc8x4),
            read_only: self.settings.read_only,
            always_durable: self.settings.durable || !self.state.write_cache,
            deny_features: self.settings.policy.deny_features,
            trim: self.settings.identity.trim,
            smart: !self.state.smart_off.contains(origin.source),
        };
        let order = match drive::decode(&taskfile, payload, &limits) {
            Ok(order) => order,
            Err(Refusal::Ata(outcome)) => return Served::Answer(ask.answer(outcome)),
            Err(Refusal::Aoe(code)) => return ask.refuse(code),
        };
        let parked = |what| Parked {
            nic,
            origin,
            taskfile,
            what,
            life,
        };
        let durable = self.is_durable(origin.source);
        // A write of no sectors marks no tag: a later write with that tag is
        // another one, and must be carried out.
        let marks = match &order {
            Order::Write(extent, _) => !extent.is_empty(),
            Order::Trim(extents) => !extents.is_empty(),
            _ => false,
        };
        let initiator = Initiator::new(nic.0, origin.source.0);
        let begun = match order {
            Order::Read(extent) | Order::Verify(extent) if extent.is_empty() => {
                Ok(Work::Done(None))
            }
            Order::Write(..) | Order::Trim(_) if !marks => Ok(Work::Done(None)),
            Order::Read(extent) => {
                let begun = self.park(parked(Pending::Read), |volume, token| {
                    Ok(match volume.read(now, token, initiator, extent)? {
                        Read::Ready(body) => Work::Done(Some(body)),
                        Read::Parked => Work::Under,
                    })
                });
                if begun.is_ok() {
                    self.counters.sectors_read += extent.count();
                }
                begun
            }
            Order::Verify(extent) => self.park(parked(Pending::Verify), |volume, token| {
                volume
                    .verify(now, token, initiator, extent)
                    .map(|()| Work::Under)
            }),
            Order::Write(extent, data) => {
                let begun = self.park(parked(Pending::Write { durable }), |volume, token| {
                    Ok(
                        match volume.write(now, token, initiator, extent, data, durable)? {
                            Write::Done => Work::Done(None),
                            Write::Parked => Work::Under,
                        },
                    )
                });
                if begun.is_ok() {
                    self.counters.sectors_written += extent.count();
                }
                begun
            }
            Order::Trim(extents) => {
                self.park(parked(Pending::Write { durable }), |volume, token| {
                    volume
                        .discard(now, token, initiator, &extents, durable)
                        .map(|()| Work::Under)
                })
            }
            Order::Flush => self.park(parked(Pending::Flush), |volume, token| {
                volume.flush(now, token).map(|()| Work::Under)
            }),
            Order::WriteCache(false) if !self.state.write_cache_off.has_room_for(origin.source) => {
                return Served::Answer(ask.answer(drive::aborted(&taskfile)));
            }
            Order::WriteCache(false) if !self.changes.has_room(origin.source) => {
                Err(Refused::NoRoom)
            }
            Order::WriteCache(false) => {
                let begun = self.park(parked(Pending::CacheOff), |volume, token| {
                    volume.flush(now, token).map(|()| Work::Under)
                });
                // From now on, so that nothing acknowledged meanwhile is left
                // out of what was promised.
                if begun.is_ok() {
                    self.changes.close(origin.source);
                }
                begun
            }
            Order::WriteCache(true) => {
                let switch = Switch::WriteCache(true);
                return Served::Change(Held::switch(nic, origin, taskfile, switch));
            }
            Order::Smart(Smart::Enable(on)) => {
                return Served::Change(Held::switch(nic, origin, taskfile, Switch::Smart(on)));
            }
            Order::CheckPower => return Served::Answer(ask.answer(drive::ACTIVE)),
            Order::Smart(Smart::ReturnStatus) => {
                let mut answer = ask.answer(drive::SUCCESS);
                let good = self.health(now).is_good();
                let word = if good { drive::GOOD } else { drive::FAILING };
                answer.taskfile.lba[1..3].copy_from_slice(&word);
                return Served::Answer(answer);
            }
            Order::Smart(Smart::ReadData) => return ask.page(&self.health(now).page()),
            Order::Identify => {
                let sectors = self.volume.sectors();
                let page = &self.settings.identity;
                let page = page.page(sectors, !durable, limits.smart);
                return ask.page(&page);
            }
        };
        match begun {
            Ok(Work::Done(body)) => {
                let marks = marks
                    || drive::is_write(&taskfile) && shadow::fault!("empty-write-marks-its-tag");
                if let (Some(id), Some(_), true) = (ask.session, life, marks) {
                    self.sessions.mark(id, origin.tag);
                }
                Served::Answer(Answer {
                    body,
                    life,
                    ..ask.answer(drive::SUCCESS)
                })
            }
            Ok(Work::Under) => {
                if let (Some(id), Some(_)) = (ask.session, life) {
                    self.sessions.hold(id, origin.tag);
                }
                Served::Parked
            }
            Err(Refused::NoRoom) => Served::Dropped(Dropped::NoRoom),
            Err(Refused::Degraded) => Served::Answer(ask.answer(drive::fault(&taskfile))),
        }
    }

    /// Whether a write of this initiator is acknowledged only when it is on
    /// stable storage.
    pub(super) fn is_durable(&self, source: MacAddr) -> bool {
        self.settings.durable
            || access::is_write_cache_off(&self.state, source)
            || self.changes.is_closing(source)
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
        begin: impl FnOnce(&mut Volume, &mut dyn FnMut() -> Option<Token>) -> Result<Work, Refused>,
    ) -> Result<Work, Refused> {
        let mut id = None;
        let (slab, places) = (&mut self.parked, &mut self.places);
        let begun = begin(&mut self.volume, &mut || {
            let queue = parked.queue();
            if places.admits(queue, 1) {
                id = slab.insert(parked);
                places.take(queue, u64::from(id.is_some()));
            }
            id.map(Token)
        });
        match (&begun, id) {
            (Ok(Work::Under), _) | (_, None) => {}
            (_, Some(id)) => drop(self.unpark(id)),
        }
        begun
    }

    /// Gives up a request's place.
    pub(super) fn unpark(&mut self, id: u32) -> Option<Parked> {
        let parked = self.parked.remove(id)?;
        self.places.release(parked.queue(), 1);
        Some(parked)
    }

    /// A request's disk work has ended.
    pub(super) fn completed(
        &mut self,
        now: Instant,
        parked: Parked,
        data: Option<Body>,
        mut ok: bool,
    ) {
        let Parked {
            nic,
            origin,
            taskfile,
            what,
            life,
        } = parked;
        // A write that came while its host's write cache was on, and ends now that
        // it goes off: the sync before that may not have seen it, and nothing is
        // acknowledged any more that is not on stable storage.
        if ok && what == (Pending::Write { durable: false }) && self.is_durable(origin.source) {
            let what = Pending::Write { durable: true };
            let begun = self.park(Parked { what, ..parked }, |volume, token| {
                volume.flush(now, token).map(|()| Work::Under)
            });
            if begun.is_ok() {
                return;
            }
            ok = false;
        }
        let written = ok && matches!(what, Pending::Write { .. });
        let heard = life.is_none_or(|life| {
            let asker = origin.source;
            self.sessions.end(nic, asker, life, origin.tag, written)
        });
        if what == Pending::CacheOff {
            if ok {
                let held = Held::switch(nic, origin, taskfile, Switch::WriteCache(false));
                self.change_later(held);
                return;
            }
            self.changes.end(origin.source, true);
        }
        if !heard {
            self.recycle(data);
            return;
        }
        let outcome = match (ok, what) {
            (true, _) => drive::SUCCESS,
            (false, Pending::Read | Pending::Verify) => drive::unreadable(&taskfile),
            (false, _) => drive::fault(&taskfile),
        };
        let answer = Answer {
            origin,
            taskfile,
            code: None,
            outcome,
            body: data,
            life,
        };
        self.ready_or_delayed(now, nic, answer);
    }

    /// A reply of registers, and perhaps data, and perhaps its sum.
    pub(super) fn answer(
        &self,
        head: &mut [u8],
        info: &NicInfo,
        answer: Answer,
        summed: bool,
    ) -> Action {
        self.header(head, info, &answer.origin, answer.code);
        answer.taskfile.reply(head, answer.outcome);
        let Some(body) = answer.body else {
            return Action::plain(drive::pad_registers(head, &answer.taskfile));
        };
        let summed = summed && drive::answers_with_sum(&answer.taskfile);
        let sum = summed.then(|| crc::of_reply(head, &body));
        Action::Reply {
            len: DATA,
            body: Some(body),
            sum,
        }
    }
}
