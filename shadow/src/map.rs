//! The bitmap in memory: where the content of each chunk is, and what has to
//! be written when that changes. No I/O.
//!
//! Two planes of bits, one for chunks with data and one for zeros, in pages as
//! they are on disk. A plane of one page that is empty or full takes no memory,
//! nor do pages that were never written, so a shadow of a large disk costs what
//! is mixed in it.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::{BitmapPage, Chunk, Geometry, PAGE_CHUNKS, Page, Planes, WORDS};

/// Pages that come and go together in the directory.
const GROUP: u64 = 512;

/// One plane of a page.
#[derive(Clone, Debug, Default)]
enum Plane {
    #[default]
    None,
    All,
    Mixed(Box<[u64; WORDS]>),
}

impl Plane {
    fn of(words: &[u64; WORDS]) -> Plane {
        if words.iter().all(|word| *word == 0) {
            Plane::None
        } else if words.iter().all(|word| *word == !0) {
            Plane::All
        } else {
            Plane::Mixed(Box::new(*words))
        }
    }

    fn word(&self, index: usize) -> u64 {
        match self {
            Plane::None => 0,
            Plane::All => !0,
            Plane::Mixed(words) => words[index],
        }
    }

    fn words(&self) -> [u64; WORDS] {
        match self {
            Plane::None => [0; WORDS],
            Plane::All => [!0; WORDS],
            Plane::Mixed(words) => **words,
        }
    }

    fn count(&self) -> u64 {
        match self {
            Plane::None => 0,
            Plane::All => PAGE_CHUNKS,
            Plane::Mixed(words) => words.iter().map(|w| u64::from(w.count_ones())).sum(),
        }
    }
}

/// A page as the disk has it.
#[derive(Clone, Debug, Default)]
struct Slot {
    /// Of the copy that counts; 0 if none was written.
    sequence: u64,
    data: Plane,
    zero: Plane,
}

impl Slot {
    fn of(page: &BitmapPage) -> Slot {
        Slot {
            sequence: page.sequence,
            data: Plane::of(&page.planes.data),
            zero: Plane::of(&page.planes.zero),
        }
    }

    /// The bits of 64 chunks: those with data, those that are zeros.
    fn word(&self, index: usize) -> (u64, u64) {
        (self.data.word(index), self.zero.word(index))
    }

    fn is_absent(&self) -> bool {
        matches!((&self.data, &self.zero), (Plane::None, Plane::None))
    }

    /// The first bit at or behind `from` in the words that `of` makes of both
    /// planes; [`PAGE_CHUNKS`] if there is none.
    fn find(&self, from: u64, of: impl Fn(u64, u64) -> u64) -> u64 {
        let first = (from / 64) as usize;
        let mut mask = !0 << (from % 64);
        for index in first..WORDS {
            let (data, zero) = self.word(index);
            let found = of(data, zero) & mask;
            if found != 0 {
                return 64 * index as u64 + u64::from(found.trailing_zeros());
            }
            mask = !0;
        }
        PAGE_CHUNKS
    }

    fn get(&self, bit: u64) -> Chunk {
        let (data, zero) = self.word((bit / 64) as usize);
        let bit = bit % 64;
        match (data >> bit & 1, zero >> bit & 1) {
            (0, 0) => Chunk::Absent,
            (1, _) => Chunk::Data,
            _ => Chunk::Zero,
        }
    }

    /// The first chunk at or behind `from` that is not in this state.
    fn end_of(&self, state: Chunk, from: u64) -> u64 {
        match state {
            Chunk::Absent => self.find(from, |data, zero| data | zero),
            Chunk::Data => self.find(from, |data, _| !data),
            Chunk::Zero => self.find(from, |_, zero| !zero),
        }
    }
}

/// The states of all chunks, as they are on stable storage.
///
/// Changes are made in two steps: [`Map::plan`] tells what has to be written,
/// and when that is on stable storage, [`Map::settle`] makes it the truth.
#[derive(Clone, Debug)]
pub struct Map {
    geometry: Geometry,
    uuid: [u8; 16],
    /// By page, in groups; a group with no page that was ever written is none.
    groups: Vec<Option<Box<[Slot]>>>,
    data: u64,
    zero: u64,
    /// Pages planned and not yet settled with success: which of two copies
    /// counts on disk is not known, so they are part of every plan.
    doubtful: BTreeSet<u64>,
    /// The number of the last plan.
    plan: u64,
}

/// What has to be written to change the map, and what it changes to.
///
/// Its pages may be written in any order, at once; they never touch the copy
/// that counts. When all are written and a sync that began after that has
/// succeeded, the commit is settled with success, and not before.
#[derive(Debug)]
#[must_use = "a commit is written, synced and settled"]
pub struct Commit {
    /// What to write, and where.
    pub pages: Vec<Page>,
    slots: Vec<(u64, Slot)>,
    plan: u64,
}

impl Map {
    /// A map of a window with nothing in the shadow.
    pub fn new(geometry: Geometry, uuid: [u8; 16]) -> Map {
        let groups = geometry.pages().div_ceil(GROUP);
        Map {
            geometry,
            uuid,
            // At most 64 MiB of address space, for the largest disk of all.
            groups: vec![None; groups as usize],
            data: 0,
            zero: 0,
            doubtful: BTreeSet::new(),
            plan: 0,
        }
    }

    /// The window and its chunks.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Page and bit of a chunk of the window.
    fn place(&self, chunk: u64) -> Option<(u64, u64)> {
        let index = chunk.checked_sub(self.geometry.first_chunk())?;
        (index < self.geometry.chunks()).then_some((index / PAGE_CHUNKS, index % PAGE_CHUNKS))
    }

    fn slot(&self, page: u64) -> Option<&Slot> {
        let group = self.groups.get((page / GROUP) as usize)?.as_ref()?;
        group.get((page % GROUP) as usize)
    }

    /// Where the content of a chunk is; outside of the window, in the image.
    #[inline]
    pub fn get(&self, chunk: u64) -> Chunk {
        let place = self.place(chunk);
        let slot = place.and_then(|(page, bit)| Some((self.slot(page)?, bit)));
        slot.map_or(Chunk::Absent, |(slot, bit)| slot.get(bit))
    }

    /// The state of `chunk`, and how many from there on, below `end`, have the
    /// same. 0 of them if `end` is not above `chunk`.
    pub fn run(&self, chunk: u64, end: u64) -> (Chunk, u64) {
        let state = self.get(chunk);
        if end <= chunk {
            return (state, 0);
        }
        let first = self.geometry.first_chunk();
        let behind = first + self.geometry.chunks();
        if state == Chunk::Absent {
            let next = self.next_present_below(chunk, end).unwrap_or(end);
            return (state, next - chunk);
        }
        // A state that is not absent is in the window.
        let mut at = chunk - first;
        let stop = end.min(behind) - first;
        while at < stop {
            let page = at / PAGE_CHUNKS;
            let Some(slot) = self.slot(page) else { break };
            let bit = slot.end_of(state, at % PAGE_CHUNKS);
            at = page * PAGE_CHUNKS + bit;
            if bit < PAGE_CHUNKS {
                break;
            }
        }
        (state, at.min(stop) - (chunk - first))
    }

    /// The first chunk at or behind `from` whose content is not in the image.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        self.next_present_below(from, u64::MAX)
    }

    fn next_present_below(&self, from: u64, end: u64) -> Option<u64> {
        let first = self.geometry.first_chunk();
        let stop = self.geometry.chunks().min(end.saturating_sub(first));
        let mut at = from.saturating_sub(first);
        while at < stop {
            let page = at / PAGE_CHUNKS;
            let Some(group) = self.groups.get((page / GROUP) as usize)?.as_ref() else {
                at = (page / GROUP + 1) * GROUP * PAGE_CHUNKS;
                continue;
            };
            let slot = group.get((page % GROUP) as usize)?;
            if !slot.is_absent() {
                let bit = slot.find(at % PAGE_CHUNKS, |data, zero| data | zero);
                if bit < PAGE_CHUNKS {
                    let chunk = first + page * PAGE_CHUNKS + bit;
                    return (chunk < end).then_some(chunk);
                }
            }
            at = (page + 1) * PAGE_CHUNKS;
        }
        None
    }

    /// How many chunks have their content not in the image: data and zeros.
    pub fn present(&self) -> u64 {
        self.data + self.zero
    }

    /// How many chunks have their content in the shadow.
    pub fn data_chunks(&self) -> u64 {
        self.data
    }

    /// Whether a commit was planned and not settled with success, so that what
    /// the disk says of its pages is not known. A sync that promises anything
    /// has to bring a plan to its end first, be it one without changes.
    pub fn is_doubtful(&self) -> bool {
        !self.doubtful.is_empty()
    }

    /// What has to be written to make these changes; nothing changes in the map
    /// until it is settled. The last change to a chunk counts; chunks outside of
    /// the window are passed over.
    ///
    /// Pages of an earlier commit that did not succeed are part of it: the disk
    /// may have them or not, and must not keep what the map has not. Nothing to
    /// write means that the disk says all this already.
    ///
    /// One commit at a time: a second plan makes the first one void.
    pub fn plan(&mut self, changes: impl IntoIterator<Item = (u64, Chunk)>) -> Commit {
        let changes = changes.into_iter();
        self.plan_runs(changes.map(|(chunk, state)| (chunk, 1, state)))
    }

    /// The same for runs of chunks, each with the first and their number.
    pub fn plan_runs(&mut self, changes: impl IntoIterator<Item = (u64, u64, Chunk)>) -> Commit {
        let mut pages: BTreeMap<u64, Planes> = BTreeMap::new();
        for page in &self.doubtful {
            pages.insert(*page, self.planes(*page));
        }
        let window = self.geometry.first_chunk();
        let behind = window + self.geometry.chunks();
        for (first, count, state) in changes {
            let (mut chunk, end) = (first.max(window), first.saturating_add(count).min(behind));
            while let Some((page, bit)) = self.place(chunk).filter(|_| chunk < end) {
                let stop = end.min(chunk - bit + PAGE_CHUNKS);
                let changed = pages.contains_key(&page) || {
                    let (now, same) = self.run(chunk, stop);
                    now != state || same < stop - chunk
                };
                if changed {
                    let planes = pages.entry(page).or_insert_with(|| self.planes(page));
                    planes.set(bit, stop - chunk, state);
                }
                chunk = stop;
            }
        }
        self.plan += 1;
        let mut commit = Commit {
            pages: Vec::with_capacity(pages.len()),
            slots: Vec::with_capacity(pages.len()),
            plan: self.plan,
        };
        for (number, planes) in pages {
            // From now on: whoever drops the commit has not settled it.
            self.doubtful.insert(number);
            let sequence = self.slot(number).map_or(0, |slot| slot.sequence) + 1;
            let page = BitmapPage { sequence, planes };
            commit.pages.push(page.write(&self.uuid, number));
            commit.slots.push((number, Slot::of(&page)));
        }
        commit
    }

    /// The pages as they are, each in the place that it came from.
    ///
    /// A process whose sync failed may have left pages that reads show and the
    /// disk does not have. Written again and synced, before any other change,
    /// they are there, whatever was.
    pub fn pages_as_they_are(&self) -> impl Iterator<Item = Page> + '_ {
        let groups = self.groups.iter().zip(0..).filter_map(|(group, number)| {
            let group = group.as_ref()?;
            Some(group.iter().zip(number * GROUP..))
        });
        let written = groups.flatten().filter(|(slot, _)| slot.sequence > 0);
        written.map(|(slot, number)| {
            let page = BitmapPage {
                sequence: slot.sequence,
                planes: self.planes(number),
            };
            page.write(&self.uuid, number)
        })
    }

    /// Ends a commit. With `ok`, all of its pages are on stable storage, and the
    /// map says what they say. Without, they may be there, torn or not: the map
    /// stays as it was, the other copies stand, and the next plan writes these
    /// again.
    pub fn settle(&mut self, commit: Commit, ok: bool) {
        // Pages of a later plan may lie over those of this one.
        if !ok || commit.plan != self.plan {
            return;
        }
        for (number, slot) in commit.slots {
            self.put(number, slot);
            self.doubtful.remove(&number);
        }
    }

    /// Takes over a page that was read.
    pub(crate) fn load(&mut self, number: u64, page: &BitmapPage) {
        self.put(number, Slot::of(page));
    }

    fn put(&mut self, number: u64, slot: Slot) {
        let pages = self.geometry.pages();
        let base = number / GROUP * GROUP;
        let Some(group) = self.groups.get_mut((number / GROUP) as usize) else {
            return;
        };
        let group = group.get_or_insert_with(|| {
            let len = (pages - base).min(GROUP) as usize;
            vec![Slot::default(); len].into_boxed_slice()
        });
        if let Some(place) = group.get_mut((number % GROUP) as usize) {
            self.data = self.data - place.data.count() + slot.data.count();
            self.zero = self.zero - place.zero.count() + slot.zero.count();
            *place = slot;
        }
    }

    fn planes(&self, page: u64) -> Planes {
        self.slot(page).map_or(
            Planes {
                data: [0; WORDS],
                zero: [0; WORDS],
            },
            |slot| Planes {
                data: slot.data.words(),
                zero: slot.zero.words(),
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UUID: [u8; 16] = [9; 16];
    const STATES: [Chunk; 3] = [Chunk::Absent, Chunk::Data, Chunk::Zero];

    /// A window of so many chunks that begins in the middle of chunk 5.
    fn map(chunks: u64) -> Map {
        let geometry = Geometry::new(4096, 5 * 4096 + 512, chunks * 4096 - 1024).unwrap();
        assert_eq!(geometry.chunks(), chunks);
        Map::new(geometry, UUID)
    }

    fn change(map: &mut Map, changes: &[(u64, Chunk)], ok: bool) -> usize {
        let commit = map.plan(changes.iter().copied());
        let pages = commit.pages.len();
        map.settle(commit, ok);
        pages
    }

    #[test]
    fn a_page_boundary_is_no_boundary_for_a_run() {
        let mut map = map(3 * PAGE_CHUNKS);
        let edge = 5 + PAGE_CHUNKS;
        let changes: Vec<_> = (edge - 70..edge + 70).map(|c| (c, Chunk::Data)).collect();
        assert_eq!(change(&mut map, &changes, true), 2);
        assert_eq!(map.run(edge - 70, u64::MAX), (Chunk::Data, 140));
        assert_eq!(map.run(edge - 1, edge + 1), (Chunk::Data, 2));
        assert_eq!(map.run(0, u64::MAX), (Chunk::Absent, edge - 70));
        assert_eq!(
            map.run(edge + 70, 100_000),
            (Chunk::Absent, 100_000 - edge - 70)
        );
        assert_eq!(map.next_present(0), Some(edge - 70));
        assert_eq!(map.next_present(edge), Some(edge));
        assert_eq!(map.next_present(edge + 70), None);
        assert_eq!(map.next_present(u64::MAX), None);
        assert_eq!(map.run(7, 7), (Chunk::Absent, 0));
        // Outside there is nothing, and nothing is changed there.
        assert_eq!(
            change(&mut map, &[(4, Chunk::Data), (u64::MAX, Chunk::Zero)], true),
            0
        );
    }

    #[test]
    fn a_run_is_changed_like_its_chunks() {
        let (mut runs, mut single) = (map(3 * PAGE_CHUNKS), map(3 * PAGE_CHUNKS));
        let edge = 5 + PAGE_CHUNKS;
        for (first, count, state) in [
            (edge - 70, 140, Chunk::Data),
            (0, 6, Chunk::Zero),
            (edge - 1, PAGE_CHUNKS + 2, Chunk::Zero),
            (edge, 64, Chunk::Absent),
            (edge + 2 * PAGE_CHUNKS - 3, u64::MAX, Chunk::Data),
            (7, 0, Chunk::Data),
        ] {
            let commit = runs.plan_runs([(first, count, state)]);
            let end = first.saturating_add(count).min(edge + 3 * PAGE_CHUNKS);
            let other = single.plan((first..end).map(|chunk| (chunk, state)));
            assert_eq!(commit.pages, other.pages);
            runs.settle(commit, true);
            single.settle(other, true);
        }
        // What is so already is no change, however large.
        let whole = [(0, u64::MAX, Chunk::Absent)];
        assert!(map(1 << 30).plan_runs(whole).pages.is_empty());
    }

    #[test]
    fn a_page_all_of_data_takes_no_memory() {
        let mut map = map(2 * PAGE_CHUNKS);
        let all: Vec<_> = (5..5 + 2 * PAGE_CHUNKS).map(|c| (c, Chunk::Data)).collect();
        change(&mut map, &all, true);
        assert!(matches!(map.slot(1).unwrap().data, Plane::All));
        assert_eq!(map.run(5, u64::MAX), (Chunk::Data, 2 * PAGE_CHUNKS));
        assert_eq!(
            (map.present(), map.data_chunks()),
            (2 * PAGE_CHUNKS, 2 * PAGE_CHUNKS)
        );
    }

    #[test]
    fn copies_take_turns_and_a_failed_one_is_written_again() {
        let mut map = map(2 * PAGE_CHUNKS);
        let first = map.plan([(5, Chunk::Data)]);
        assert_eq!(first.pages[0].offset, 8192 + 4096);
        map.settle(first, true);
        let second = map.plan([(6, Chunk::Data)]);
        assert_eq!(second.pages[0].offset, 8192);
        map.settle(second, false);
        assert_eq!((map.get(5), map.get(6)), (Chunk::Data, Chunk::Absent));
        assert!(map.is_doubtful());
        // The other page's change brings the doubtful one along, at the same
        // place.
        let third = map.plan([(5 + PAGE_CHUNKS, Chunk::Zero)]);
        let offsets: Vec<_> = third.pages.iter().map(|p| p.offset).collect();
        assert_eq!(offsets, [8192, 8192 + 8192 + 4096]);
        map.settle(third, true);
        assert!(!map.is_doubtful());
        assert_eq!(
            (map.get(6), map.get(5 + PAGE_CHUNKS)),
            (Chunk::Absent, Chunk::Zero)
        );
    }

    #[test]
    fn a_commit_that_was_dropped_or_overtaken_changes_nothing() {
        let mut map = map(100);
        drop(map.plan([(7, Chunk::Data)]));
        assert!(map.is_doubtful());
        let stale = map.plan([(8, Chunk::Data)]);
        let fresh = map.plan([(9, Chunk::Data)]);
        map.settle(stale, true);
        assert_eq!(map.present(), 0);
        map.settle(fresh, true);
        assert_eq!(
            (map.get(8), map.get(9), map.present()),
            (Chunk::Absent, Chunk::Data, 1)
        );
        assert!(!map.is_doubtful());
    }

    #[test]
    fn the_largest_disk_of_all_has_a_map() {
        let geometry = Geometry::new(4096, 0, 512 << 48).unwrap();
        let mut map = Map::new(geometry, UUID);
        let last = geometry.chunks() - 1;
        change(&mut map, &[(last, Chunk::Zero)], true);
        assert_eq!(map.next_present(0), Some(last));
        assert_eq!(map.run(0, u64::MAX), (Chunk::Absent, last));
    }

    proptest! {
        #[test]
        fn it_agrees_with_an_array(
            chunks in prop_oneof![Just(130), Just(PAGE_CHUNKS), Just(2 * PAGE_CHUNKS + 77)],
            steps in prop::collection::vec((0u64..1 << 20, 1u64..200, 0usize..3, prop::bool::weighted(0.8)), 1..12),
            near_edge: bool,
        ) {
            let mut map = map(chunks);
            let mut model = vec![Chunk::Absent; chunks as usize];
            for (at, count, state, ok) in steps {
                let at = if near_edge && chunks > PAGE_CHUNKS { PAGE_CHUNKS - 100 + at % 200 } else { at };
                let from = at % chunks;
                let range = from..(from + count).min(chunks);
                let changes: Vec<_> = range.clone().map(|c| (5 + c, STATES[state])).collect();
                change(&mut map, &changes, ok);
                if ok {
                    for c in range {
                        model[c as usize] = STATES[state];
                    }
                }
                for c in 0..chunks {
                    prop_assert_eq!(map.get(5 + c), model[c as usize]);
                }
                let present = model.iter().filter(|s| **s != Chunk::Absent).count();
                prop_assert_eq!(map.present(), present as u64);
                let mut c = 0;
                while c < chunks {
                    let (state, n) = map.run(5 + c, 5 + chunks);
                    let slice = &model[c as usize..(c + n) as usize];
                    prop_assert!(n > 0 && slice.iter().all(|s| *s == state));
                    let next = model.get((c + n) as usize);
                    prop_assert!(next != Some(&state));
                    let present = model[c as usize..].iter().position(|s| *s != Chunk::Absent);
                    prop_assert_eq!(map.next_present(5 + c), present.map(|p| 5 + c + p as u64));
                    c += n;
                }
            }
        }
    }
}
