//! The reads behind the first one of a coalesced frame.
//!
//! One small frame asks for up to 255 replies. They are made a few at a time,
//! in the turns of the loop, so that between them others are heard; what waits is
//! bounded, and each initiator has its share of it and its turn.

use std::time::Instant;

use super::ata::{Ask, Served};
use super::{Arrival, Dropped, Target};
use crate::net::NicId;
use crate::store::{FairQueue, Passed, Queue, Shares};
use crate::wire::Origin;
use crate::wire::ata::{Payload, Taskfile};

/// Bytes of replies made in a turn, and what a reply costs besides its data.
const TURN_BYTES: u64 = 16 << 10;
const REPLY: u64 = 1 << 10;
/// Reads that may wait, and how many of the places are kept for initiators that
/// have few: as many as are in one frame.
const WAITING_MAX: usize = 2048;
const HEADROOM: usize = 256;

/// A read that waits.
#[derive(Debug)]
struct Further {
    nic: NicId,
    origin: Origin,
    taskfile: Taskfile,
}

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Coalesced {
    waiting: FairQueue<Further>,
    places: Shares,
    /// Bytes that may still be answered in this turn.
    left: u64,
}

impl Coalesced {
    pub fn new() -> Coalesced {
        Coalesced {
            waiting: FairQueue::new(WAITING_MAX),
            places: Shares::new(WAITING_MAX as u64, HEADROOM as u64),
            left: TURN_BYTES,
        }
    }

    /// `true` if no read waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

fn cost(taskfile: &Taskfile) -> u64 {
    REPLY + u64::from(taskfile.count) * shadow::SECTOR
}

impl Target {
    /// Takes the reads behind the first one of a frame.
    pub(super) fn further_reads(&mut self, ask: &Ask, reads: Payload) {
        let queue = Queue::of(ask.origin.source.0);
        for (tag, taskfile) in reads.further_reads(ask.taskfile) {
            let origin = Origin { tag, ..ask.origin };
            if self.coalesced.left > 0 && self.coalesced.is_empty() {
                let ask = Ask {
                    origin,
                    taskfile,
                    ..*ask
                };
                self.serve_further(&ask);
                continue;
            }
            let further = Further {
                nic: ask.arrival.nic,
                origin,
                taskfile,
            };
            let Coalesced {
                waiting, places, ..
            } = &mut self.coalesced;
            let has_place = places.admits(queue, 1);
            if has_place && waiting.push(queue, cost(&taskfile), further).is_ok() {
                places.take(queue, 1);
            } else {
                self.counters.dropped(Dropped::NoRoom);
            }
        }
    }

    /// Answers reads that have waited, as many as a turn allows.
    pub(super) fn answer_further(&mut self, now: Instant) {
        self.coalesced.left = TURN_BYTES;
        while self.coalesced.left > 0 {
            let Some(queue) = self.coalesced.waiting.turn(Passed::default()) else {
                return;
            };
            let Some(further) = self.coalesced.waiting.pop(queue) else {
                return;
            };
            self.coalesced.places.release(queue, 1);
            let Further {
                nic,
                origin,
                taskfile,
            } = further;
            let Some(&Some(info)) = self.nics.get(usize::from(nic.0)) else {
                self.counters.dropped(Dropped::NoLink);
                continue;
            };
            // It may have been forgotten meanwhile.
            let session = self.sessions.hear(now, nic, origin.source);
            let extensions = session.map(|id| self.sessions.extensions_of(id));
            let extensions = extensions.unwrap_or_default();
            if !extensions.coalesced_read {
                self.counters.dropped(Dropped::Silence);
                continue;
            }
            self.serve_further(&Ask {
                arrival: Arrival { now, nic, info },
                origin,
                taskfile,
                session,
                extensions,
            });
        }
    }

    fn serve_further(&mut self, ask: &Ask) {
        let left = &mut self.coalesced.left;
        *left = left.saturating_sub(cost(&ask.taskfile));
        match self.serve(ask, Payload::NONE) {
            Served::Answer(answer) => {
                self.counters.requests += 1;
                self.ready_or_delayed(ask.arrival.now, ask.arrival.nic, answer);
            }
            Served::Parked => self.counters.requests += 1,
            Served::Dropped(why) => self.counters.dropped(why),
            Served::Change(_) => {}
        }
    }
}
