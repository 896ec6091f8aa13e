//! The cache alone: its accounts counted anew after every step, and its arena
//! looked at while the writer stands still, wherever that is.

mod stops;

use super::writeback::Run;
use super::*;
use crate::store::arena::ImageId;
use proptest::prelude::*;
use std::cell::RefCell;
use std::time::Duration;

const SECTORS: u64 = 64;
const BLOCK: usize = 4096;
/// Nothing more than is dirty must be written.
const PLAIN: super::writeback::Shape = &|_, dirty| dirty;

/// A number that is the same for the same arguments and like no other.
fn draw(seed: u64, n: u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ n.wrapping_mul(0xD1B5_4A32_D192_ED03);
    for _ in 0..3 {
        x = (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    }
    x ^ x >> 32
}

fn extent(start: u64, count: u64) -> Extent {
    Extent::new(Lba(start), count).unwrap()
}

/// The extent of the write with this number.
fn nth(seed: u64, n: u64) -> Extent {
    let start = draw(seed, n) % SECTORS;
    extent(start, 1 + draw(seed, !n) % 20.min(SECTORS - start))
}

/// Sectors full of this number.
fn fill(n: u64, extent: Extent) -> Vec<u8> {
    n.to_le_bytes().repeat(64 * extent.count() as usize)
}

/// The bytes of a run.
fn bytes(run: &Run) -> Vec<u8> {
    run.pieces.iter().flat_map(|piece| piece.to_vec()).collect()
}

/// A cache with a disk under it whose jobs end when and how it is drawn.
struct Bench<'a> {
    cache: Cache,
    disk: &'a dyn Fn(&mut Vec<u8>, u64, bool),
    /// Runs under way, each with the bytes it was lent.
    writing: Vec<(Run, Vec<u8>)>,
    syncing: Option<Vec<Record>>,
    lent: Vec<(Body, Vec<u8>)>,
    now: Instant,
    /// While a generation is drained: its last epoch, and what it leaves.
    cut: Option<(Epoch, Vec<u8>)>,
    /// Where the disk ends.
    end: u64,
}

impl<'a> Bench<'a> {
    /// `disk` reads into or writes from a buffer at an offset.
    fn new(cache: Cache, disk: &'a dyn Fn(&mut Vec<u8>, u64, bool)) -> Bench<'a> {
        Bench {
            cache,
            disk,
            writing: Vec::new(),
            syncing: None,
            lent: Vec::new(),
            now: Instant::now(),
            cut: None,
            end: SECTORS,
        }
    }

    /// Begins a generation, unless one is being drained; `medium` is what the
    /// disk must hold when that ends, and nothing newer.
    fn begin_generation(&mut self, medium: &[u8]) {
        if self.cut.is_none() {
            self.cut = Some((self.cache.begin_generation(), medium.to_vec()));
        }
    }

    fn end_drain(&mut self) {
        let cache = &self.cache;
        if let Some((_, image)) = self.cut.take_if(|(last, _)| cache.is_synced(*last)) {
            let mut medium = vec![0; image.len()];
            (self.disk)(&mut medium, 0, false);
            assert!(medium == image, "what a freeze leaves still");
            self.cache.end_drain();
        }
    }

    fn begin_write(&mut self) {
        let until = self.cache.epoch();
        let Some(run) = self.cache.next_run(until, 4, PLAIN) else {
            return;
        };
        assert!(run.extent.end().0 <= self.end, "{run:?} behind the end");
        let data = bytes(&run);
        assert_eq!(data.len() as u64, run.extent.byte_len());
        for (other, _) in &self.writing {
            assert!(
                !other.extent.overlaps(run.extent),
                "two writes of one sector"
            );
        }
        self.writing.push((run, data));
    }

    fn end_write(&mut self, which: usize, ok: bool) {
        if self.writing.is_empty() {
            return;
        }
        let which = which % self.writing.len();
        let (run, mut data) = self.writing.swap_remove(which);
        assert_eq!(data, bytes(&run), "what is lent has changed");
        if !ok {
            data.truncate(512);
        }
        (self.disk)(&mut data, run.extent.byte_start(), true);
        drop(run.pieces);
        for slot in run.slots {
            self.cache.write_ended(slot, ok, self.now);
        }
    }

    fn begin_sync(&mut self) {
        if self.syncing.is_none() {
            self.syncing = Some(self.cache.begin_sync());
        }
    }

    fn end_sync(&mut self, ok: bool) {
        if let Some(records) = self.syncing.take() {
            self.cache.sync_ended(records, ok, self.now);
        }
    }

    /// Reads what is wanted to complete blocks.
    fn complete(&mut self) {
        while let Some(span) = self.cache.take_wanted() {
            let mut data = vec![0; span.byte_len() as usize];
            (self.disk)(&mut data, span.byte_start(), false);
            self.cache.complete(span, &data, self.now);
            self.cache.not_completed(span);
        }
    }

    /// One thing that happens between two requests.
    fn step(&mut self, lot: u64) {
        let which = (lot >> 16) as usize;
        let fails = lot >> 8 & 7 == 0;
        match lot & 7 {
            0 | 1 => self.begin_write(),
            2 => self.end_write(which, !fails),
            3 if lot >> 8 & 1 == 0 => self.begin_sync(),
            3 => self.end_sync(!fails),
            4 => self.complete(),
            5 => {
                let start = which as u64 % SECTORS;
                let body = self.cache.hit(extent(start, 1));
                self.lent.extend(body.map(|body| {
                    let bytes = body.to_vec();
                    (body, bytes)
                }));
            }
            6 if !self.lent.is_empty() => {
                let (body, bytes) = self.lent.swap_remove(which % self.lent.len());
                assert_eq!(&*body, &bytes[..], "a reply changed while it waited");
            }
            _ => {
                // A clean block comes in, and drives others out.
                let block = self.cache.blocks_around(extent(which as u64 % SECTORS, 1));
                let mut data = vec![0; block.byte_len() as usize];
                (self.disk)(&mut data, block.byte_start(), false);
                if self.cache.find(block.start().0 / 8).is_none() {
                    self.cache.keep(block, &data);
                }
            }
        }
    }

    /// Takes a write, as soon as there is room for it.
    fn write(&mut self, extent: Extent, data: &[u8]) {
        let mut tries = 0;
        let owner = fair::Queue::of([2, 0, 0, 0, 0, data[1] % 3]);
        while self.cache.write_for(owner, extent, data, self.now).is_err() {
            tries += 1;
            assert!(tries < 100, "there is never room");
            self.lent.clear();
            self.write_back();
        }
    }

    /// All that is dirty to the disk.
    fn write_back(&mut self) {
        for _ in 0..100 {
            self.begin_write();
            self.complete();
            self.end_write(0, true);
            if self.writing.is_empty() {
                self.end_sync(true);
                self.begin_sync();
                self.end_sync(true);
                self.end_drain();
            }
        }
    }

    /// Counts what the accounts should be, and holds them against that.
    fn audit(&self) {
        let cache = &self.cache;
        let unwritten = |epoch: Epoch| {
            let states = [State::Dirty, State::Planned, State::Writing];
            let counts = |meta: &&Meta| states.contains(&meta.state) && meta.epoch == epoch;
            cache.meta.iter().filter(counts).count()
        };
        let records = cache.written.iter().chain(&cache.undone);
        let records = records.chain(self.syncing.iter().flatten());
        let epochs: Vec<Epoch> = records.map(|record| cache.epoch_of(record)).collect();
        for meta in cache.meta.iter().filter(|meta| meta.state != State::Free) {
            let account = cache.epochs.counts(meta.epoch);
            let owed = !matches!(meta.state, State::Clean | State::Kept);
            assert!(!owed || account.is_some(), "{meta:?} is on no account");
        }
        for epoch in cache.epochs.open() {
            let (written, synced) = cache.epochs.counts(epoch).unwrap();
            assert_eq!(written as usize, unwritten(epoch), "unwritten in {epoch:?}");
            let awaited = epochs.iter().filter(|e| **e == epoch).count();
            assert_eq!(synced as usize, unwritten(epoch) + awaited, "in {epoch:?}");
        }
        let dirty = |meta: &&Meta| !matches!(meta.state, State::Free | State::Clean);
        let dirty = cache.meta.iter().filter(dirty).count();
        assert_eq!(cache.dirty as usize, dirty, "dirty slots");
        let kept = cache.meta.iter().filter(|meta| meta.state == State::Kept);
        assert_eq!(cache.kept as usize, kept.count(), "kept slots");
        let owned = cache.owned.total();
        assert_eq!(owned, u64::from(cache.dirty - cache.kept), "owned slots");
        // Each slot is in one place.
        let mut seen = vec![0; cache.meta.len()];
        for slot in cache.free.iter().chain(&cache.pinned) {
            seen[*slot as usize] += 1;
            assert_eq!(cache.meta[*slot as usize].state, State::Free);
        }
        let queued = cache.audit_lists();
        let all = cache.meta.iter().filter(|meta| meta.state == State::Dirty);
        assert_eq!(queued, all.count(), "dirty slots in the queue");
        for (slot, meta) in cache.meta.iter().enumerate() {
            assert_eq!(meta.holds, 0);
            let free = usize::from(meta.state == State::Free);
            assert_eq!(seen[slot], free, "slot {slot}: {meta:?}");
            let below = cache.generations.below.get(&meta.block) == Some(&(slot as u32));
            let found = cache.find(meta.block) == Some(slot as u32);
            assert_eq!(found || below, meta.present);
            assert!(!(found && below));
        }
    }
}

fn cache(arena: Arena, align: usize, dirty_max: u32) -> Cache {
    Cache::new(arena, align, dirty_max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn accounts_queue_and_slots_agree_and_reads_see_the_newest(
        seed: u64, slots in 8u32..20, align in 0usize..3, steps in 20u64..300
    ) {
        let align = [1, 1024, 4096][align];
        let medium = RefCell::new(vec![0; SECTORS as usize * 512]);
        let disk = |data: &mut Vec<u8>, at: u64, write: bool| {
            let (mut medium, at) = (medium.borrow_mut(), at as usize);
            if write {
                medium[at..at + data.len()].copy_from_slice(data);
            } else {
                let len = data.len();
                data.copy_from_slice(&medium[at..at + len]);
            }
        };
        let arena = Arena::anonymous(BLOCK, slots).unwrap();
        let mut bench = Bench::new(cache(arena, align, slots * 3 / 4), &disk);
        let mut model = vec![0; SECTORS as usize * 512];
        for n in 1..steps {
            if draw(seed ^ 2, n) % 20 == 0 {
                bench.begin_generation(&model);
            } else if draw(seed, n) % 3 == 0 {
                let (extent, data) = (nth(seed, n), fill(n, nth(seed, n)));
                bench.write(extent, &data);
                let at = extent.byte_start() as usize;
                model[at..at + data.len()].copy_from_slice(&data);
            } else {
                bench.step(draw(seed ^ 1, n));
            }
            bench.audit();
            let whole = extent(0, SECTORS);
            let mut seen = medium.borrow().clone();
            bench.cache.overlay(whole, &mut seen);
            prop_assert!(seen == model, "what is read after step {n}");
            bench.end_drain();
            bench.audit();
        }
        bench.lent.clear();
        let closed = bench.cache.close_epoch();
        bench.write_back();
        bench.audit();
        prop_assert!(bench.cache.is_synced(closed) && !bench.cache.has_unsynced());
        prop_assert!(*medium.borrow() == model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn nothing_is_written_behind_the_end_of_a_disk_that_became_smaller(
        seed: u64, slots in 8u32..20, align in 0usize..3, steps in 20u64..300
    ) {
        let align = [1, 1024, 4096][align];
        let medium = RefCell::new(vec![0; SECTORS as usize * 512]);
        let disk = |data: &mut Vec<u8>, at: u64, write: bool| {
            let (mut medium, at) = (medium.borrow_mut(), at as usize);
            if write {
                medium[at..at + data.len()].copy_from_slice(data);
            } else {
                let len = data.len();
                data.copy_from_slice(&medium[at..at + len]);
            }
        };
        let arena = Arena::anonymous(BLOCK, slots).unwrap();
        let mut bench = Bench::new(cache(arena, align, slots * 3 / 4), &disk);
        let mut model = vec![0; SECTORS as usize * 512];
        for n in 1..steps {
            match draw(seed, n) % 3 {
                0 if draw(seed ^ 2, n) % 12 == 0 && bench.end > 8 => {
                    let group = align.max(512) as u64 / 512;
                    bench.end = (1 + draw(seed ^ 3, n) % bench.end).next_multiple_of(group);
                    bench.cache.cut(Lba(bench.end), bench.now);
                    model.truncate(bench.end as usize * 512);
                }
                0 => {
                    let extent = nth(seed, n);
                    let count = extent.count().min(bench.end.saturating_sub(extent.start().0));
                    if let Some(extent) = Extent::new(extent.start(), count).filter(|e| !e.is_empty()) {
                        let (at, data) = (extent.byte_start() as usize, fill(n, extent));
                        bench.write(extent, &data);
                        model[at..at + data.len()].copy_from_slice(&data);
                    }
                }
                _ => bench.step(draw(seed ^ 1, n)),
            }
            bench.audit();
            let mut seen = medium.borrow()[..model.len()].to_vec();
            bench.cache.overlay(extent(0, bench.end), &mut seen);
            prop_assert!(seen == model, "what is read after step {n}");
        }
        bench.lent.clear();
        let closed = bench.cache.close_epoch();
        bench.write_back();
        bench.audit();
        prop_assert!(bench.cache.is_synced(closed) && !bench.cache.has_unsynced());
        prop_assert!(medium.borrow()[..model.len()] == model);
    }
}

/// A cache of so many blocks that begins empty.
fn empty(slots: u32) -> Cache {
    cache(Arena::anonymous(BLOCK, slots).unwrap(), 1, slots)
}

#[test]
fn a_version_that_takes_over_from_a_failed_one_keeps_the_flush_waiting() {
    // The elder's account closed before the younger was on it, and the flush
    // was answered.
    let (mut cache, now) = (empty(8), Instant::now());
    cache.write(extent(0, 1), &[1; 512], now).unwrap();
    let run = cache.next_run(cache.epoch(), 8, PLAIN).unwrap();
    let flush = cache.close_epoch();
    cache.write(extent(0, 1), &[2; 512], now).unwrap();
    cache.write_ended(run.slots[0], false, now);
    assert!(!cache.is_written(flush) && !cache.is_synced(flush));
    let run = cache
        .next_run(flush, 8, PLAIN)
        .expect("asked for, and not written");
    cache.write_ended(run.slots[0], true, now);
    assert!(cache.is_written(flush) && !cache.is_synced(flush));
    // The same when it is the sync that fails, and a third version is there.
    let records = cache.begin_sync();
    cache.write(extent(0, 1), &[3; 512], now).unwrap();
    cache.sync_ended(records, false, now);
    assert!(!cache.is_written(flush) && !cache.is_synced(flush));
    let run = cache
        .next_run(flush, 8, PLAIN)
        .expect("asked for, and not written");
    cache.write_ended(run.slots[0], true, now);
    let records = cache.begin_sync();
    cache.sync_ended(records, true, now);
    assert!(cache.is_synced(flush) && !cache.has_unsynced());
}

#[test]
fn what_came_back_to_the_queue_does_not_stand_before_its_elders() {
    let (mut cache, now) = (empty(8), Instant::now());
    cache.write(extent(0, 1), &[1; 512], now).unwrap();
    let first = cache.close_epoch();
    cache.write(extent(16, 1), &[2; 512], now).unwrap();
    let both = cache.epoch();
    let runs = [
        cache.next_run(both, 1, PLAIN).unwrap(),
        cache.next_run(both, 1, PLAIN).unwrap(),
    ];
    // The younger one last, so before the elder.
    for run in &runs {
        cache.write_ended(run.slots[0], false, now);
    }
    let run = cache
        .next_run(first, 1, PLAIN)
        .expect("the elder is asked for");
    assert_eq!(run.extent, extent(0, 1));
}

#[test]
fn a_dirty_block_never_gives_way_and_a_lent_slot_is_not_used_again() {
    let (mut cache, now) = (empty(8), Instant::now());
    for n in 0..4 {
        cache
            .write(extent(8 * n, 8), &fill(n, extent(0, 8)), now)
            .unwrap();
    }
    let lent: Vec<Body> = (0..4)
        .map(|n| cache.hit(extent(8 * n, 8)).unwrap())
        .collect();
    // New versions, whose elders are still being sent.
    for n in 0..4 {
        cache
            .write(extent(8 * n, 8), &fill(n + 10, extent(0, 8)), now)
            .unwrap();
    }
    for n in 4..100 {
        cache.keep(extent(8 * n, 8), &fill(n, extent(0, 8)));
    }
    let full = cache.write(extent(800, 1), &[0; 512], now);
    assert_eq!(full, Err(Full), "every slot is dirty or lent");
    for (n, body) in lent.iter().enumerate() {
        assert_eq!(**body, fill(n as u64, extent(0, 8)));
    }
    drop(lent);
    cache.write(extent(800, 1), &[0; 512], now).unwrap();
    for n in 0..4 {
        let body = cache.hit(extent(8 * n, 8)).unwrap();
        assert_eq!(*body, fill(n + 10, extent(0, 8)));
    }
}

#[test]
fn a_pinned_slot_is_not_written_even_where_the_list_calls_it_free() {
    let (mut cache, now) = (empty(4), Instant::now());
    cache.write(extent(0, 8), &[1; BLOCK], now).unwrap();
    let read = cache.hit(extent(0, 8)).unwrap();
    let slot = cache.find(0).unwrap();
    cache.free.push(slot);
    cache.write(extent(8, 8), &[2; BLOCK], now).unwrap();
    assert_eq!(read[..], [1; BLOCK]);
    assert_ne!(cache.find(1), Some(slot));
    assert_eq!(cache.hit(extent(8, 8)).unwrap()[..], [2; BLOCK]);
}

#[test]
fn what_is_forgotten_while_it_is_held_does_not_take_the_hold_along() {
    let (mut cache, now) = (empty(4), Instant::now());
    cache.keep(extent(0, 8), &fill(1, extent(0, 8)));
    let held = cache.hold(extent(0, 1));
    cache.forget(&[extent(0, 8)]);
    assert!(cache.hit(extent(0, 1)).is_none());
    // The block comes back while it is held.
    cache.write(extent(4, 1), &[2; 512], now).unwrap();
    cache.unhold(&held);
    let run = cache.next_run(cache.epoch(), 8, PLAIN).unwrap();
    cache.write_ended(run.slots[0], true, now);
    drop(run);
    let records = cache.begin_sync();
    cache.sync_ended(records, true, now);
    // And every slot can be used again.
    for n in 1..20 {
        cache.keep(extent(8 * n, 8), &fill(n, extent(0, 8)));
    }
    for n in 16..20 {
        assert!(cache.hit(extent(8 * n, 8)).is_some());
    }
}

/// A discard may be of all of a large disk.
#[test]
fn a_large_extent_costs_no_more_than_the_slots() {
    let (mut cache, now) = (empty(4), Instant::now());
    let all = extent(0, 1 << 54);
    cache.keep(extent(0, 8), &fill(1, extent(0, 8)));
    cache.write(extent(800, 1), &[2; 512], now).unwrap();
    assert_eq!(cache.unsynced_in(&[all]), Some(extent(800, 8)));
    let around = [extent(0, 800), extent(808, 1 << 53)];
    assert_eq!(cache.unsynced_in(&around), None);
    cache.forget(&around);
    assert!(cache.hit(extent(0, 1)).is_none());
    assert!(cache.hit(extent(800, 1)).is_some());
    assert_eq!(cache.dirty_extents(), [extent(800, 1)]);
    cache.forget_clean(&[all]);
    assert!(cache.hit(extent(800, 1)).is_some());
}

#[test]
fn a_disk_of_whole_groups_gets_whole_groups() {
    let (arena, now) = (Arena::anonymous(BLOCK, 8).unwrap(), Instant::now());
    let mut cache = cache(arena, 2048, 8);
    cache.write(extent(1, 1), &[1; 512], now).unwrap();
    cache
        .write(extent(8, 4), &fill(2, extent(0, 4)), now)
        .unwrap();
    // The first waits for what is beside it; the second is whole.
    let run = cache.next_run(cache.epoch(), 8, PLAIN).unwrap();
    assert_eq!(run.extent, extent(8, 4));
    let wanted = cache.take_wanted().unwrap();
    assert_eq!(wanted, extent(0, 4), "more may be past the end");
    // Something newer comes before it does.
    cache.write(extent(2, 1), &[3; 512], now).unwrap();
    cache.complete(wanted, &[9; 2048], now);
    cache.not_completed(wanted);
    let run = cache.next_run(cache.epoch(), 8, PLAIN).unwrap();
    assert_eq!(run.extent, extent(0, 4));
    let expected = [[9; 512], [1; 512], [3; 512], [9; 512]].concat();
    assert_eq!(bytes(&run), expected);
}

#[test]
fn what_was_to_be_completed_across_a_new_end_is_asked_for_again() {
    let (mut cache, now) = (
        cache(Arena::anonymous(BLOCK, 8).unwrap(), 1024, 8),
        Instant::now(),
    );
    // Two groups, each of which needs its other sector.
    cache.write(extent(0, 1), &[1; 512], now).unwrap();
    cache.write(extent(5, 1), &[2; 512], now).unwrap();
    assert!(cache.next_run(cache.epoch(), 8, PLAIN).is_none());
    assert_eq!(cache.cut(Lba(2), now), 1);
    assert!(cache.next_run(cache.epoch(), 8, PLAIN).is_none());
    assert_eq!(cache.take_wanted(), Some(extent(0, 2)));
    assert_eq!(cache.take_wanted(), None);
}

#[test]
fn room_is_taken_as_it_is_needed_and_idle_room_is_given_back() {
    let block = |n: u64| Extent::new(Lba(n * 8), 8).unwrap();
    let room = |cache: &mut Cache| cache.arena().with_room().count();
    let mut cache = Cache::new(Arena::anonymous(4096, 3 * 1024).unwrap(), 1, 2000);
    let mut now = Instant::now();
    let minute = Duration::from_secs(60);
    assert!(room(&mut cache) == 1 && cache.release_at(now).is_none());
    for n in 0..2500 {
        cache.keep(block(n), &[n as u8; 4096]);
    }
    assert!(room(&mut cache) == 3);
    assert_eq!(cache.release_at(now), Some(now + minute));
    let dirty = [7; 4096];
    cache.write(block(9000), &dirty, now).unwrap();
    let pinned = cache.hit(block(1500)).unwrap();
    let last_request = now;
    now += minute;
    cache.release_idle(now);
    // What is dirty stays, and what someone is sending; all else may go, but for
    // the first step.
    assert_eq!(room(&mut cache), 3);
    // Not for ever: it is tried again, and not without a pause.
    assert_eq!(cache.release_at(last_request), Some(now + minute));
    drop(pinned);
    now += minute;
    cache.release_idle(now);
    assert_eq!(room(&mut cache), 2);
    assert_eq!(cache.release_at(last_request), Some(now + minute));
    assert!(cache.covers(block(0)) && cache.covers(block(9000)));
    assert!(!cache.covers(block(1500)), "it was in what was given back");
    for n in 0..2500 {
        cache.keep(block(n), &[n as u8; 4096]);
    }
    assert_eq!(room(&mut cache), 3);
    for n in [0, 1500, 2499] {
        assert_eq!(&*cache.hit(block(n)).unwrap(), &[n as u8; 4096]);
    }
    assert_eq!(&*cache.hit(block(9000)).unwrap(), &dirty);
}

#[test]
fn idle_space_is_given_back_some_steps_at_a_time() {
    let block = |n: u64| Extent::new(Lba(n * 8), 8).unwrap();
    let mut cache = Cache::new(Arena::anonymous(4096, 20 * 1024).unwrap(), 1, 2000);
    for n in 0..20 * 1024 {
        cache.keep(block(n), &[1; 4096]);
    }
    let last_request = Instant::now();
    let now = last_request + Duration::from_secs(60);
    for left in [4, 1] {
        assert_eq!(cache.release_at(last_request), Some(now));
        cache.release_idle(now);
        assert_eq!(cache.arena().with_room().count(), left);
    }
    assert_eq!(cache.release_at(last_request), None);
    assert!(cache.free.len() <= 1024);
}
