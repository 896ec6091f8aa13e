//! What is remembered of an initiator's tags: which requests are in hand, and
//! which writes were carried out.

use super::Tags;
use crate::dedup::{Seen, Window};

/// A count of tags from its beginning on. Tags of two lives are strangers, even
/// if they are equal: the initiator was started again in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Life(pub(super) u64);

/// How a request stands to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// Nothing is known of its tag, and nothing is to be remembered.
    Untracked,
    /// It is new.
    Fresh(Life),
    /// A request with its tag is in hand and will be answered.
    InHand,
    /// It is a write that was carried out.
    Done,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct History {
    life: Life,
    /// Tags of requests that wait for the disk: as many as may wait in the
    /// whole export at most, few as a rule.
    in_hand: Vec<[u8; 4]>,
    window: Option<Window>,
}

/// Tag 0 is never tracked.
const UNTRACKED: [u8; 4] = [0; 4];

impl History {
    /// Forgets all; tags are this from now on.
    pub fn begin_anew(&mut self, tags: Tags, life: Life) {
        self.life = life;
        self.in_hand.clear();
        match (tags, &mut self.window) {
            (Tags::Opaque | Tags::Unique, window) => *window = None,
            (_, Some(window)) => window.clear(),
            (_, window) => *window = Some(Window::new()),
        }
    }

    /// A request; `next` is the life that begins if counting does.
    pub fn begin(&mut self, tags: Tags, tag: [u8; 4], writes: bool, next: Life) -> Begun {
        if tags == Tags::Opaque || tag == UNTRACKED {
            return Begun::Untracked;
        }
        if let Some(window) = &mut self.window {
            if window.see(number(tags, tag)) == Seen::Restarted {
                self.life = next;
                self.in_hand.clear();
            }
        }
        if self.in_hand.contains(&tag) {
            return Begun::InHand;
        }
        match &self.window {
            Some(window) if writes && window.is_marked(number(tags, tag)) => Begun::Done,
            _ => Begun::Fresh(self.life),
        }
    }

    pub fn mark(&mut self, tags: Tags, tag: [u8; 4]) {
        if let Some(window) = &mut self.window {
            window.mark(number(tags, tag));
        }
    }

    pub fn hold(&mut self, tag: [u8; 4]) {
        self.in_hand.push(tag);
    }

    /// A request of that life has ended; `false` if that life has too.
    pub fn end(&mut self, tags: Tags, life: Life, tag: [u8; 4], mark: bool) -> bool {
        if life != self.life {
            return false;
        }
        if let Some(at) = self.in_hand.iter().position(|held| *held == tag) {
            self.in_hand.swap_remove(at);
        }
        if mark {
            self.mark(tags, tag);
        }
        true
    }
}

fn number(tags: Tags, tag: [u8; 4]) -> u32 {
    match tags {
        Tags::CountLe => u32::from_le_bytes(tag),
        _ => u32::from_be_bytes(tag),
    }
}
