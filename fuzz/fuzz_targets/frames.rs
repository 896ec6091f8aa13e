//! Reads frames of two initiators, one after the other, and does with them what
//! a target does before it comes to its disk: parsing, checksums, tags,
//! extensions, masks, reservations, and what a taskfile orders.
//!
//! The input is a list of frames, each with a byte for its length in units of 8
//! before it, whose lowest bit says whose it is.

#![no_main]

use std::time::{Duration, Instant};

use aoede::access::{self, Draft, Policy, Switch, WireState};
use aoede::drive::{self, Limits, Order, Smart};
use aoede::net::NicId;
use aoede::session::{Begun, Sessions, Tags};
use aoede::wire::{Command, MacAddr, Request, crc, frame_max, mask::Edit};
use libfuzzer_sys::fuzz_target;

const NIC: NicId = NicId(0);
const LIMITS: Limits = Limits {
    sectors: 1000,
    frame_sectors: 2,
    read_only: false,
    always_durable: false,
    deny_features: false,
    trim: true,
    smart: true,
};

/// Everything that outlives a frame.
struct Export {
    policy: Policy,
    state: Draft<'static>,
    sessions: Sessions,
}

impl Export {
    fn hear(&mut self, now: Instant, frame: &[u8]) {
        let Ok(request) = Request::parse(frame) else {
            return;
        };
        let asker = request.origin.source;
        let session = self.sessions.hear(now, NIC, asker);
        match request.command {
            Command::Ata(taskfile, payload) => {
                let right = crc::is_right(frame, taskfile.count);
                let room = (frame.len() - 36) / 512;
                assert!(right.is_none() || usize::from(taskfile.count) <= room);
                let further = payload.further_reads(taskfile).count();
                assert!(further <= (frame.len() - 36) / 16);
                let order = drive::decode(&taskfile, payload, &LIMITS);
                let switch = match &order {
                    Ok(Order::WriteCache(on)) => Some(Switch::WriteCache(*on)),
                    Ok(Order::Smart(Smart::Enable(on))) => Some(Switch::Smart(*on)),
                    _ => None,
                };
                if let Some(switch) = switch {
                    // Two hosts are always fewer than may switch something off.
                    assert_eq!(access::switch(&mut self.state, switch, asker), Ok(()));
                }
                let Some(id) = session else { return };
                self.sessions.uses(id);
                let writes = drive::is_write(&taskfile);
                let begun = self.sessions.begin(id, request.origin.tag, writes);
                if let (Begun::Fresh(life), Ok(_)) = (begun, order) {
                    match taskfile.aflags & 2 {
                        0 => self.sessions.mark(id, request.origin.tag),
                        _ => {
                            self.sessions.hold(id, request.origin.tag);
                            self.sessions
                                .end(NIC, asker, life, request.origin.tag, writes);
                        }
                    }
                    let again = self.sessions.begin(id, request.origin.tag, true);
                    assert!(again == Begun::Done || again == begun);
                } else {
                    let off = self.sessions.extensions_of(id).tags == Tags::Opaque;
                    assert!(!off || begun == Begun::Untracked);
                }
                self.sessions.due(now, id, 1060);
            }
            Command::Extensions(Some(strings)) => {
                for (place, wish) in strings.iter() {
                    assert!(frame[place].iter().all(|byte| *byte != 0) || wish.is_some());
                    if let Some(wish) = wish {
                        assert!(self.sessions.grant(now, NIC, asker, wish));
                    }
                }
            }
            Command::Mask(Edit::Edit(directives)) => {
                let (state, sessions) = (&mut self.state, &mut self.sessions);
                let extend = |wish| {
                    assert!(sessions.grant(now, NIC, asker, wish));
                    Ok(())
                };
                let _ = access::edit_masks(state, &self.policy, directives, 255, extend);
                assert!(self.state.masks.len() <= 255);
            }
            Command::Config(query) => {
                access::query(&mut self.state, &self.policy, &query, frame_max(1500));
                assert!(self.state.config.len() <= 1024);
            }
            Command::Reserve(order) => {
                access::reserve(&mut self.state, &self.policy, &order, asker);
            }
            _ => {}
        }
        assert!(self.sessions.len() <= 2);
    }
}

fuzz_target!(|input: &[u8]| {
    let mut export = Export {
        policy: Policy::default(),
        state: Draft::Owned(WireState::default()),
        sessions: Sessions::default(),
    };
    let (mut rest, mut now) = (input, Instant::now());
    while let Some((lead, more)) = rest.split_first() {
        let len = usize::from(*lead & !1) * 4;
        let (body, next) = more.split_at(len.min(more.len()));
        // What no fuzzer should have to find: who it is for, and that it is AoE.
        let mut frame = [0; 18].to_vec();
        frame[6..12].copy_from_slice(&MacAddr([2, 0, 0, 0, 0, lead & 1]).0);
        frame[12..15].copy_from_slice(&[0x88, 0xA2, 0x10]);
        frame.extend_from_slice(body);
        export.hear(now, &frame);
        rest = next;
        now += Duration::from_millis(100);
    }
});
