//! How what requests change is saved.
//!
//! A change is made in a copy of the state. If the copy differs, it is saved
//! before anyone sees it or any reply leaves; one save at a time, and the next
//! takes all the changes that came meanwhile. If saving fails nothing has
//! changed, and those who asked are told so.

use std::sync::Arc;
use std::time::Instant;

use super::ata::pad_registers;
use super::{Action, Arrival, Dropped, NicId, Ready, SAVE, Target, What};
use crate::access::{self, Full, Switch, WireState};
use crate::drive;
use crate::wire::ata::Taskfile;
use crate::wire::extensions::Wish;
use crate::wire::{HEAD_MAX, MacAddr, Origin, Request};

/// Changes that may wait for a save; more are dropped and asked again.
const HELD_MAX: usize = 64;

/// A change that waits for its turn.
#[derive(Debug)]
pub(super) struct Held {
    nic: NicId,
    change: Change,
}

#[derive(Debug)]
pub(super) enum Change {
    /// A Config, Mask or Reserve request, whole.
    Frame(Vec<u8>),
    /// An ATA command that switches something.
    Switch(Origin, Taskfile, Switch),
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
    /// Whose write cache it switches off.
    closes: Option<MacAddr>,
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
    pub(super) fn frame(nic: NicId, frame: &[u8]) -> Held {
        Held {
            nic,
            change: Change::Frame(frame.to_vec()),
        }
    }

    pub(super) fn switch(nic: NicId, origin: Origin, taskfile: Taskfile, to: Switch) -> Held {
        Held {
            nic,
            change: Change::Switch(origin, taskfile, to),
        }
    }

    /// Whose write cache it switches off.
    fn closes(&self) -> Option<MacAddr> {
        match self.change {
            Change::Switch(origin, _, Switch::WriteCache(false)) => Some(origin.source),
            _ => None,
        }
    }

    fn asker(&self) -> Option<MacAddr> {
        match &self.change {
            Change::Frame(frame) => Request::parse(frame).ok().map(|r| r.origin.source),
            Change::Switch(origin, ..) => Some(origin.source),
        }
    }
}

impl Target {
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
            let closes = held.closes();
            let Some(&Some(info)) = self.nics.get(usize::from(held.nic.0)) else {
                // Nobody would hear the answer; who asked will ask again.
                closes.inspect(|mac| self.closed(*mac));
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
                    let outcome = match access::switch(&mut next, *switch, origin.source) {
                        Ok(()) => drive::SUCCESS,
                        Err(Full) => drive::aborted(taskfile),
                    };
                    self.header(&mut head, &info, origin, None);
                    taskfile.reply(&mut head, outcome);
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
                closes,
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
            one.closes.inspect(|mac| self.closed(*mac));
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
    if before.write_cache_off != next.write_cache_off {
        let now = if next.write_cache_off.contains(asker) {
            "off"
        } else {
            "on"
        };
        changes.push(format!("write cache switched {now} for {asker} by itself"));
    }
    if before.smart_off != next.smart_off {
        let now = if next.smart_off.contains(asker) {
            "disabled"
        } else {
            "enabled"
        };
        changes.push(format!("SMART {now} for {asker} by itself"));
    }
    changes
}
