//! Replies to initiators that have spoken of congestion: they wait for their
//! time in a list of their own, and no one else does.

use std::time::Instant;

use super::ata::{Answer, Ask};
use super::{Action, Arrival, NicId, Ready, Target, What};
use crate::sys::buffer::Body;
use crate::wire::{MIN_FRAME, MacAddr};

/// Replies to one initiator that may wait for its pace before its frames are
/// dropped.
const DELAYED_MAX: usize = 64;
/// The same for all initiators together.
const ALL_DELAYED_MAX: usize = 256;

/// A reply that waits for its initiator's pace.
#[derive(Debug)]
pub(super) struct Delayed {
    pub due: Instant,
    nic: NicId,
    answer: Answer,
}

impl Target {
    /// Writes an answer that is made at once, unless it waits for its
    /// initiator's pace.
    pub(super) fn reply(&mut self, head: &mut [u8], ask: &Ask, answer: Answer) -> Action {
        let Arrival { now, nic, info } = ask.arrival;
        let summed = ask.extensions.crc8x4;
        if let Some(id) = ask.session {
            let bytes = answer.len(summed).max(MIN_FRAME);
            if let Some(due) = self.sessions.due(now, id, bytes) {
                self.delay(due, nic, answer);
                return Action::Parked;
            }
        }
        self.answer(head, &info, answer, summed)
    }

    /// Has an answer sent as soon as its initiator's pace allows.
    pub(super) fn ready_or_delayed(&mut self, now: Instant, nic: NicId, answer: Answer) {
        let bytes = answer.len(false).max(MIN_FRAME);
        match self.sessions.due_to(now, nic, answer.asker(), bytes) {
            Some(due) => self.delay(due, nic, answer),
            None => self.ready.push_back(Ready {
                nic,
                what: What::Ata(answer),
            }),
        }
    }

    /// Keeps an answer until it is due. Its request is in hand until then.
    fn delay(&mut self, due: Instant, nic: NicId, mut answer: Answer) {
        // What it borrows others may need meanwhile.
        if let Some(body) = answer.body.take() {
            answer.body = Some(Body::Bytes(body.to_vec()));
            self.recycle(Some(body));
        }
        if answer.life.is_some() {
            self.sessions
                .hold_for(nic, answer.asker(), answer.origin.tag);
        }
        let at = self.delayed.partition_point(|other| other.due <= due);
        self.delayed.insert(at, Delayed { due, nic, answer });
    }

    /// Whether as many replies wait for an initiator's pace as may.
    pub(super) fn is_beyond_pace(&self, nic: NicId, asker: MacAddr) -> bool {
        let theirs = |delayed: &&Delayed| delayed.nic == nic && delayed.answer.asker() == asker;
        self.delayed.len() >= ALL_DELAYED_MAX
            || self.delayed.iter().filter(theirs).count() >= DELAYED_MAX
    }

    /// Lets all replies leave at once: an end waits for the disk, not for an
    /// initiator's pace.
    pub(super) fn hurry(&mut self) {
        self.sessions.hurry();
        for delayed in &mut self.delayed {
            delayed.due = self.started;
        }
    }

    /// Makes those replies ready that were kept until now.
    pub(super) fn release_delayed(&mut self, now: Instant) {
        while self
            .delayed
            .front()
            .is_some_and(|delayed| delayed.due <= now)
        {
            let Some(Delayed { nic, answer, .. }) = self.delayed.pop_front() else {
                return;
            };
            let heard = answer.life.is_none_or(|life| {
                let asker = answer.asker();
                self.sessions
                    .end(nic, asker, life, answer.origin.tag, false)
            });
            if heard {
                self.ready.push_back(Ready {
                    nic,
                    what: What::Ata(answer),
                });
            }
        }
    }
}
