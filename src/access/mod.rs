//! Who may do what: MAC masks, the reservation, the config string, and the
//! rules by which frames change them.
//!
//! [`WireState`] is everything a frame can change for good. It is only ever
//! changed in a copy, a [`Draft`]; the copy becomes the state once it is on disk.
//! [`Policy`] is what the operator said on the command line, and no frame changes
//! it.

mod set;
mod text;

use std::borrow::Cow;

use crate::wire::config::{Query, STRING};
use crate::wire::extensions::Wish;
use crate::wire::mask::{Directive, Directives, LIST_MAX, MaskError};
use crate::wire::reserve::Order;
use crate::wire::{ErrorCode, MacAddr};

pub use set::{Full, MacSet};
pub use text::BadState;

/// What frames have made of an export, kept over restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireState {
    /// The Query/Config string, at most 1024 bytes.
    pub config: Vec<u8>,
    /// The wire's mask list, at most 255; empty lets everyone in.
    pub masks: Vec<MacAddr>,
    /// Who holds the reservation, at most 255; empty: nobody.
    pub reserved: Vec<MacAddr>,
    /// `false` in a state that aoede 0.1.0 saved with its write cache off, which
    /// then was off for every host. It stays so until the operator changes it.
    pub write_cache: bool,
    /// Hosts that have switched the write cache off for themselves (SET FEATURES
    /// 0x82).
    pub write_cache_off: MacSet,
    /// Hosts that have disabled SMART for themselves.
    pub smart_off: MacSet,
}

/// The state as a request would leave it. Copied with the first change: a request
/// that changes nothing copies nothing.
pub type Draft<'a> = Cow<'a, WireState>;

/// Returns the state that a draft holds, if it differs from `before`.
pub fn changed(draft: Draft<'_>, before: &WireState) -> Option<WireState> {
    match draft {
        Cow::Owned(state) if state != *before => Some(state),
        _ => None,
    }
}

impl Default for WireState {
    fn default() -> WireState {
        WireState {
            config: Vec::new(),
            masks: Vec::new(),
            reserved: Vec::new(),
            write_cache: true,
            write_cache_off: MacSet::default(),
            smart_off: MacSet::default(),
        }
    }
}

/// What the operator allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The outer wall (`-m`): no frame widens it; empty lets everyone in.
    pub masks: Vec<MacAddr>,
    /// Whether frames may not set the config string.
    pub deny_config: bool,
    /// Whether frames may not edit the masks.
    pub deny_mask: bool,
    /// Whether frames may not reserve or release.
    pub deny_reserve: bool,
    /// Whether frames may not switch the write cache or SMART.
    pub deny_features: bool,
}

/// What an ATA command switches for the host that sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// The write cache on or off.
    WriteCache(bool),
    /// SMART on or off.
    Smart(bool),
}

/// What to say to a request that may change the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Silence,
    /// The ordinary answer.
    Answer,
    /// An error.
    Refuse(ErrorCode),
}

/// Whether frames of this sender are heard: it must be on each list that is not
/// empty (AoEr11 2.5; the outer wall is ours).
pub fn admits(policy: &Policy, state: &WireState, source: MacAddr) -> bool {
    let on = |list: &[MacAddr]| list.is_empty() || list.contains(&source);
    on(&policy.masks) && (on(&state.masks) || shadow::fault!("mask-admits-all"))
}

/// Whether this sender may use the disk while there is a reservation.
pub fn may_use(state: &WireState, source: MacAddr) -> bool {
    state.reserved.is_empty()
        || state.reserved.contains(&source)
        || shadow::fault!("reservation-ignored")
}

/// `true` if this sender's writes are acknowledged only when they are on stable
/// storage, as far as frames have settled it.
pub fn is_write_cache_off(state: &WireState, source: MacAddr) -> bool {
    let off = &state.write_cache_off;
    let anyone = shadow::fault!("write-cache-off-for-all") && !off.as_slice().is_empty();
    !state.write_cache || off.contains(source) || anyone
}

/// Carries out a switch for one initiator alone.
pub fn switch(state: &mut Draft, switch: Switch, initiator: MacAddr) -> Result<(), Full> {
    let (off, on) = match switch {
        Switch::WriteCache(on) => (&state.write_cache_off, on),
        Switch::Smart(on) => (&state.smart_off, on),
    };
    if off.contains(initiator) != on {
        return Ok(());
    }
    if !on && !off.has_room_for(initiator) {
        return Err(Full);
    }
    let state = state.to_mut();
    let off = match switch {
        Switch::WriteCache(_) => &mut state.write_cache_off,
        Switch::Smart(_) => &mut state.smart_off,
    };
    if on {
        off.remove(initiator);
        Ok(())
    } else {
        off.insert(initiator)
    }
}

/// Carries out a Query/Config request. `longest` is the length of the longest
/// frame that any NIC of the export can send: a string that no reply could hold
/// is refused.
pub fn query(state: &mut Draft, policy: &Policy, query: &Query, longest: usize) -> Verdict {
    const BAD: Verdict = Verdict::Refuse(ErrorCode::BadArgument);
    let answer_if = |yes| {
        if yes {
            Verdict::Answer
        } else {
            Verdict::Silence
        }
    };
    let (new, may) = match *query {
        Query::Read => return Verdict::Answer,
        Query::Test(string) => return answer_if(string == Some(&state.config)),
        Query::Prefix(string) => {
            return answer_if(string.is_some_and(|s| state.config.starts_with(s)));
        }
        Query::Set(Some(new)) if state.config.is_empty() || state.config == new => {
            (new, Verdict::Answer)
        }
        Query::Set(Some(new)) => (new, Verdict::Refuse(ErrorCode::ConfigStringSet)),
        Query::ForceSet(Some(new)) => (new, Verdict::Answer),
        Query::Replace(Some((old, new))) => (new, answer_if(state.config == old)),
        Query::Set(None) | Query::ForceSet(None) | Query::Replace(None) | Query::Other => {
            return BAD;
        }
    };
    if policy.deny_config || STRING + new.len() > longest {
        return BAD;
    }
    if may == Verdict::Answer && state.config != new {
        state.to_mut().config = new.to_vec();
    }
    may
}

/// Carries out mask directives in order, up to the first bad one: its index and
/// what is wrong with it. `room` is the most entries a reply can list; what
/// concerns extensions goes to `extend`.
pub fn edit_masks(
    state: &mut Draft,
    policy: &Policy,
    directives: Directives,
    room: usize,
    mut extend: impl FnMut(Wish) -> Result<(), MaskError>,
) -> Result<(), (u8, MaskError)> {
    for (index, directive) in directives.iter().enumerate() {
        let list = &state.masks;
        let outcome = match directive {
            Directive::Nothing => Ok(()),
            Directive::Unknown | Directive::Extension(None) => Err(MaskError::BadDirective),
            Directive::Extension(Some(wish)) => extend(wish),
            Directive::Delete(mac) if !list.contains(&mac) => Ok(()),
            Directive::Delete(mac) => {
                state.to_mut().masks.retain(|other| *other != mac);
                Ok(())
            }
            Directive::Add(mac) if list.contains(&mac) => Ok(()),
            // A group address never sends, so it would only shut others out.
            Directive::Add(mac) if mac.is_group() => Err(MaskError::Unspecified),
            Directive::Add(mac) if !policy.masks.is_empty() && !policy.masks.contains(&mac) => {
                Err(MaskError::Unspecified)
            }
            Directive::Add(_) if list.len() >= room.min(LIST_MAX) => Err(MaskError::ListFull),
            Directive::Add(mac) => {
                state.to_mut().masks.push(mac);
                Ok(())
            }
        };
        outcome.map_err(|error| (index as u8, error))?;
    }
    Ok(())
}

/// Carries out a Reserve/Release request of `asker`.
pub fn reserve(state: &mut Draft, policy: &Policy, order: &Order, asker: MacAddr) -> Verdict {
    let macs = match *order {
        Order::Read => return Verdict::Answer,
        Order::Bad => return Verdict::Refuse(ErrorCode::BadArgument),
        Order::Set(_) | Order::ForceSet(_) if policy.deny_reserve => {
            return Verdict::Refuse(ErrorCode::BadArgument);
        }
        Order::Set(_) if !may_use(state, asker) => {
            return Verdict::Refuse(ErrorCode::TargetReserved);
        }
        Order::Set(macs) | Order::ForceSet(macs) => macs,
    };
    if !macs.iter().eq(state.reserved.iter().copied()) {
        state.to_mut().reserved = macs.iter().collect();
    }
    Verdict::Answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Command, Request};

    const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xA]);
    const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xB]);
    const C: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xC]);

    fn state(config: &[u8]) -> WireState {
        WireState {
            config: config.to_vec(),
            ..WireState::default()
        }
    }

    /// Does something to a state, and returns `true` with it if that needed a copy.
    fn through<T>(state: &mut WireState, act: impl FnOnce(&mut Draft) -> T) -> (T, bool) {
        let mut draft = Cow::Borrowed(&*state);
        let done = act(&mut draft);
        let owned = match draft {
            Cow::Borrowed(_) => None,
            Cow::Owned(new) => Some(new),
        };
        let copied = owned.is_some();
        if let Some(new) = owned {
            *state = new;
        }
        (done, copied)
    }

    /// The directives of a mask edit frame.
    fn edit(
        state: &mut WireState,
        policy: &Policy,
        dirs: &[(u8, MacAddr)],
        room: usize,
    ) -> Result<(), (u8, MaskError)> {
        let mut frame = vec![0; 28];
        frame[12..15].copy_from_slice(&[0x88, 0xA2, 0x10]);
        frame[19] = 2;
        frame[25] = 1;
        frame[27] = dirs.len() as u8;
        for (cmd, mac) in dirs {
            frame.extend_from_slice(&[0, *cmd]);
            frame.extend_from_slice(&mac.0);
        }
        let request = Request::parse(&frame).unwrap();
        let Command::Mask(crate::wire::mask::Edit::Edit(d)) = request.command else {
            panic!()
        };
        let before = state.clone();
        let (outcome, copied) = through(state, |state| {
            edit_masks(state, policy, d, room, |_| Ok(()))
        });
        assert!(copied || *state == before);
        outcome
    }

    #[test]
    fn what_changes_nothing_copies_nothing() {
        let free = Policy::default();
        let mut s = state(b"one");
        s.masks = vec![A];
        s.reserved = vec![A, B];
        s.smart_off.insert(A).unwrap();
        let kept = s.clone();
        let frame = |macs: &[MacAddr]| {
            let mut frame = vec![0; 26];
            frame[12..15].copy_from_slice(&[0x88, 0xA2, 0x10]);
            (frame[19], frame[24], frame[25]) = (3, 1, macs.len() as u8);
            frame.extend(macs.iter().flat_map(|mac| mac.0));
            frame
        };
        let same = frame(&[A, B]);
        let Command::Reserve(same) = Request::parse(&same).unwrap().command else {
            panic!()
        };
        let acts: [&dyn Fn(&mut Draft) -> bool; 11] = [
            &|s| query(s, &free, &Query::Read, 1514) == Verdict::Answer,
            &|s| query(s, &free, &Query::Set(Some(b"one")), 1514) == Verdict::Answer,
            &|s| query(s, &free, &Query::Set(Some(b"two")), 1514) != Verdict::Answer,
            &|s| query(s, &free, &Query::ForceSet(Some(b"one")), 1514) == Verdict::Answer,
            &|s| reserve(s, &free, &Order::Read, C) == Verdict::Answer,
            &|s| reserve(s, &free, &same, A) == Verdict::Answer,
            &|s| reserve(s, &free, &same, C) == Verdict::Refuse(ErrorCode::TargetReserved),
            &|s| switch(s, Switch::Smart(false), A).is_ok(),
            &|s| switch(s, Switch::Smart(true), B).is_ok(),
            &|s| switch(s, Switch::WriteCache(true), A).is_ok(),
            &|s| changed(s.clone(), &kept).is_none(),
        ];
        for (n, act) in acts.iter().enumerate() {
            assert_eq!(through(&mut s, act), (true, false), "{n}");
        }
        // Of masks: what is there is added, what is not there deleted.
        let before = s.clone();
        assert_eq!(edit(&mut s, &free, &[(1, A), (2, B)], 255), Ok(()));
        assert_eq!(s, before);
        // And what changes something does.
        let (outcome, copied) = through(&mut s, |s| switch(s, Switch::Smart(true), A));
        assert!(copied && outcome.is_ok() && s != kept);
    }

    #[test]
    fn config_subcommands_follow_the_table() {
        let free = Policy::default();
        let ask = |state: &mut WireState, q: Query| {
            through(state, |state| query(state, &free, &q, 1514)).0
        };
        let mut s = state(b"");
        assert_eq!(ask(&mut s, Query::Test(Some(b""))), Verdict::Answer);
        assert_eq!(ask(&mut s, Query::Set(Some(b"one"))), Verdict::Answer);
        assert_eq!(s.config, b"one");
        assert_eq!(ask(&mut s, Query::Set(Some(b"one"))), Verdict::Answer);
        let taken = Verdict::Refuse(ErrorCode::ConfigStringSet);
        assert_eq!(ask(&mut s, Query::Set(Some(b"two"))), taken);
        assert_eq!(s.config, b"one");
        assert_eq!(ask(&mut s, Query::Test(Some(b"on"))), Verdict::Silence);
        assert_eq!(ask(&mut s, Query::Test(None)), Verdict::Silence);
        assert_eq!(ask(&mut s, Query::Prefix(Some(b"on"))), Verdict::Answer);
        assert_eq!(ask(&mut s, Query::Prefix(Some(b""))), Verdict::Answer);
        assert_eq!(
            ask(&mut s, Query::Prefix(Some(b"one more"))),
            Verdict::Silence
        );
        assert_eq!(ask(&mut s, Query::Prefix(None)), Verdict::Silence);
        assert_eq!(
            ask(&mut s, Query::Replace(Some((b"no", b"x")))),
            Verdict::Silence
        );
        assert_eq!(
            ask(&mut s, Query::Replace(Some((b"one", b"two")))),
            Verdict::Answer
        );
        assert_eq!(s.config, b"two");
        assert_eq!(ask(&mut s, Query::ForceSet(Some(b""))), Verdict::Answer);
        assert_eq!(s.config, b"");
        let bad = Verdict::Refuse(ErrorCode::BadArgument);
        for q in [
            Query::Set(None),
            Query::ForceSet(None),
            Query::Replace(None),
            Query::Other,
        ] {
            assert_eq!(ask(&mut s, q), bad);
        }
    }

    #[test]
    fn a_string_that_no_reply_could_hold_is_not_set() {
        let (mut s, free) = (state(b""), Policy::default());
        let q = Query::ForceSet(Some(&[b'x'; 600]));
        let bad = Verdict::Refuse(ErrorCode::BadArgument);
        assert_eq!(through(&mut s, |s| query(s, &free, &q, 631)).0, bad);
        assert_eq!(s.config, b"");
        assert_eq!(
            through(&mut s, |s| query(s, &free, &q, 632)).0,
            Verdict::Answer
        );
    }

    #[test]
    fn masks_are_edited_up_to_the_first_bad_directive() {
        let free = Policy::default();
        let mut s = state(b"");
        assert_eq!(
            edit(&mut s, &free, &[(1, A), (1, B), (1, C), (1, A)], 255),
            Ok(())
        );
        assert_eq!(s.masks, [A, B, C]);
        // AoEde's third add overwrote the first, and a delete was its end.
        assert_eq!(edit(&mut s, &free, &[(2, B), (2, B), (0, B)], 255), Ok(()));
        assert_eq!(s.masks, [A, C]);
        let bad = Err((1, MaskError::BadDirective));
        assert_eq!(edit(&mut s, &free, &[(2, A), (9, A), (2, C)], 255), bad);
        assert_eq!(s.masks, [C]);
        let full = Err((1, MaskError::ListFull));
        assert_eq!(edit(&mut s, &free, &[(1, A), (1, B)], 2), full);
        let group = Err((0, MaskError::Unspecified));
        assert_eq!(edit(&mut s, &free, &[(1, MacAddr::BROADCAST)], 255), group);
    }

    #[test]
    fn the_operators_list_is_the_outer_wall() {
        let wall = Policy {
            masks: vec![A, B],
            ..Policy::default()
        };
        let mut s = state(b"");
        assert!(admits(&wall, &s, A) && admits(&wall, &s, B) && !admits(&wall, &s, C));
        assert_eq!(
            edit(&mut s, &wall, &[(1, C)], 255),
            Err((0, MaskError::Unspecified))
        );
        assert_eq!(edit(&mut s, &wall, &[(1, B)], 255), Ok(()));
        assert!(!admits(&wall, &s, A) && admits(&wall, &s, B) && !admits(&wall, &s, C));
    }

    #[test]
    fn a_reservation_is_kept_by_its_holders_and_broken_by_force() {
        fn order(code: u8, macs: &[MacAddr]) -> Vec<u8> {
            let mut frame = vec![0; 26];
            frame[12..15].copy_from_slice(&[0x88, 0xA2, 0x10]);
            frame[19] = 3;
            frame[24] = code;
            frame[25] = macs.len() as u8;
            macs.iter().for_each(|m| frame.extend_from_slice(&m.0));
            frame
        }
        let go = |s: &mut WireState, policy: &Policy, frame: Vec<u8>, asker| {
            let request = Request::parse(&frame).unwrap();
            let Command::Reserve(order) = request.command else {
                panic!()
            };
            through(s, |s| reserve(s, policy, &order, asker)).0
        };
        let free = Policy::default();
        let mut s = state(b"");
        assert_eq!(go(&mut s, &free, order(1, &[A, B]), A), Verdict::Answer);
        let held = Verdict::Refuse(ErrorCode::TargetReserved);
        assert_eq!(go(&mut s, &free, order(1, &[C]), C), held);
        assert_eq!(go(&mut s, &free, order(1, &[]), C), held);
        assert!(may_use(&s, A) && may_use(&s, B) && !may_use(&s, C));
        assert_eq!(go(&mut s, &free, order(2, &[C]), C), Verdict::Answer);
        assert_eq!(go(&mut s, &free, order(1, &[]), C), Verdict::Answer);
        assert_eq!(s.reserved, []);
        let deny = Policy {
            deny_reserve: true,
            ..Policy::default()
        };
        let bad = Verdict::Refuse(ErrorCode::BadArgument);
        assert_eq!(go(&mut s, &deny, order(2, &[C]), C), bad);
        assert_eq!(go(&mut s, &deny, order(0, &[]), C), Verdict::Answer);
    }
}
