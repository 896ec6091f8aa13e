//! The lists of slots that are to be written back.
//!
//! Each initiator has its own: what one has written, be it much or slow to write,
//! lets nothing of another grow old behind it. A list runs through `previous` and
//! `next` of its slots.

use shadow::{Extent, Lba};

use super::index::NONE;
use super::{Cache, Reads, State};
use crate::store::fair;

/// Initiators, and the target itself.
const OWNERS: usize = fair::QUEUES + 1;
/// Slots taken into one plan.
const PLAN_MAX: usize = 1024;
/// The same of each initiator while several have any: soon it is the turn of what
/// comes now.
const PLAN_SHARED: usize = 256;
/// Slots at the head of a list that may be passed over since they wait for an
/// older version.
const SKIP_MAX: usize = 64;

/// Its ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    pub head: u32,
    tail: u32,
}

const EMPTY: List = List {
    head: NONE,
    tail: NONE,
};

/// All lists.
#[derive(Debug)]
pub(super) struct Lists {
    /// Of each owner: dirty slots of both generations, oldest first, and slots whose
    /// rest is wanted.
    all: Box<[[List; OWNERS]; 3]>,
    /// Whose wanted slot comes next.
    turn: usize,
}

/// Of `Lists::all`, the wanted.
const WANTED: usize = 2;

impl Lists {
    pub fn new() -> Lists {
        Lists {
            all: Box::new([[EMPTY; OWNERS]; 3]),
            turn: 0,
        }
    }
}

impl Cache {
    /// `true` if several initiators have dirty slots.
    pub fn has_several_owners(&self) -> bool {
        self.owned.is_shared()
    }

    /// The list in which a dirty slot stands, or is to stand; `None` while its rest
    /// is being read.
    fn list(&self, slot: u32) -> Option<(usize, usize)> {
        let meta = &self.meta[slot as usize];
        let kind = match meta.reads {
            Reads::No => usize::from(meta.line),
            Reads::Wanted => WANTED,
            Reads::Begun => return None,
        };
        Some((kind, meta.owner.index()))
    }

    pub(super) fn queue_back(&mut self, slot: u32) {
        let Some((kind, owner)) = self.list(slot) else {
            return;
        };
        let tail = self.lists.all[kind][owner].tail;
        self.link((kind, owner), tail, slot);
        self.link((kind, owner), slot, NONE);
    }

    pub(super) fn queue_front(&mut self, slot: u32) {
        let Some((kind, owner)) = self.list(slot) else {
            return;
        };
        let head = self.lists.all[kind][owner].head;
        self.link((kind, owner), slot, head);
        self.link((kind, owner), NONE, slot);
    }

    /// Puts a slot in the place of another; if it belongs to another list, at the
    /// head of that.
    pub(super) fn queue_replace(&mut self, old: u32, new: u32) {
        let list = self.list(old);
        match list.filter(|_| list == self.list(new)) {
            Some(list) => {
                let meta = self.meta[old as usize];
                self.link(list, meta.previous, new);
                self.link(list, new, meta.next);
            }
            None => {
                self.queue_remove(old);
                self.queue_front(new);
            }
        }
    }

    pub(super) fn queue_remove(&mut self, slot: u32) {
        if let Some(list) = self.list(slot) {
            let meta = self.meta[slot as usize];
            self.link(list, meta.previous, meta.next);
        }
    }

    /// Makes `b` follow `a` in a list, whose ends stand for [`NONE`].
    fn link(&mut self, (kind, owner): (usize, usize), a: u32, b: u32) {
        let list = &mut self.lists.all[kind][owner];
        match a {
            NONE => list.head = b,
            a => self.meta[a as usize].next = b,
        }
        match b {
            NONE => list.tail = a,
            b => self.meta[b as usize].previous = a,
        }
    }

    /// Takes the oldest of each initiator, and sorts them by place. They are not
    /// picked by their epoch: what failed, or inherited an older account, may
    /// stand behind what is newer.
    pub(super) fn make_plan(&mut self) {
        let line = usize::from(self.generations.line_at_hand());
        let lists = &self.lists.all[line];
        let most = match lists.iter().filter(|list| list.head != NONE).count() {
            0 | 1 => PLAN_MAX,
            several => PLAN_SHARED.min(PLAN_MAX / several),
        };
        for owner in 0..OWNERS {
            let mut slot = self.lists.all[line][owner].head;
            let (mut taken, mut skipped) = (0, 0);
            while slot != NONE && taken < most && skipped < SKIP_MAX {
                let meta = self.meta[slot as usize];
                if meta.waits {
                    skipped += 1;
                } else {
                    self.queue_remove(slot);
                    self.meta[slot as usize].state = State::Planned;
                    self.plan.push_back(meta.block);
                    taken += 1;
                }
                slot = meta.next;
            }
        }
        self.plan.make_contiguous().sort_unstable();
    }

    /// A planned slot cannot be written before the rest of these sectors is here.
    pub(super) fn want(&mut self, slot: u32, mask: u64) {
        let meta = &mut self.meta[slot as usize];
        meta.state = State::Dirty;
        meta.reads = Reads::Wanted;
        meta.unsent = mask;
        self.queue_back(slot);
    }

    /// Returns what must be read next before it can be written back, of each
    /// initiator in its turn. For each, [`not_completed`](Cache::not_completed)
    /// is to be called.
    pub fn take_wanted(&mut self) -> Option<Extent> {
        let turns = (self.lists.turn..OWNERS).chain(0..self.lists.turn);
        let owner = turns
            .into_iter()
            .find(|owner| self.lists.all[WANTED][*owner].head != NONE)?;
        self.lists.turn = (owner + 1) % OWNERS;
        let slot = self.lists.all[WANTED][owner].head;
        self.queue_remove(slot);
        let meta = &mut self.meta[slot as usize];
        meta.reads = Reads::Begun;
        // The groups alone, since the block may reach past the end of the disk.
        let mask = meta.unsent;
        let (first, end) = (mask.trailing_zeros(), 64 - mask.leading_zeros());
        let start = Lba(meta.block * self.sectors + u64::from(first));
        Extent::new(start, u64::from(end - first))
    }

    /// What was wanted was read, or could not be read now. What is still missing is
    /// wanted again in its turn.
    pub fn not_completed(&mut self, extent: Extent) {
        for piece in self.pieces(extent) {
            if let Some(slot) = self.at_hand(piece.block) {
                self.end_reads(slot);
            }
        }
    }

    /// A slot is to be written, whether its rest was read or not.
    pub(super) fn end_reads(&mut self, slot: u32) {
        let meta = &self.meta[slot as usize];
        if meta.state == State::Dirty && meta.reads != Reads::No {
            self.queue_remove(slot);
            self.meta[slot as usize].reads = Reads::No;
            self.meta[slot as usize].unsent = 0;
            self.queue_front(slot);
        }
    }
}

#[cfg(test)]
impl Cache {
    /// Checks that each slot stands in its list; returns how many there are.
    pub(super) fn audit_lists(&self) -> usize {
        let mut count = 0;
        for (kind, owners) in self.lists.all.iter().enumerate() {
            for (owner, list) in owners.iter().enumerate() {
                let mut slot = list.head;
                while slot != NONE {
                    let meta = &self.meta[slot as usize];
                    assert_eq!(meta.state, State::Dirty);
                    assert_eq!(self.list(slot), Some((kind, owner)), "{meta:?}");
                    (slot, count) = (meta.next, count + 1);
                }
            }
        }
        let begun = |meta: &&super::Meta| meta.reads == Reads::Begun;
        count + self.meta.iter().filter(begun).count()
    }
}
