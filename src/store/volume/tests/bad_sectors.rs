//! A disk with bad sectors.

use super::*;
use crate::freeze::Phase;

impl World {
    /// Lets so much time pass.
    pub fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            for _ in 0..50 {
                self.advance();
            }
            self.now += Duration::from_millis(100);
        }
    }

    pub fn flush(&mut self) -> bool {
        let acked = self.model.acked.clone();
        let token = self.model.token(Asked::Flush(acked));
        self.volume.flush(self.now, || Some(token)).unwrap();
        self.outcome(token)
    }

    /// Writes sectors; says how that ended.
    pub fn write(&mut self, start: u64, count: u64, durable: bool) -> bool {
        let extent = Extent::new(Lba(start), count).unwrap();
        let (token, data) = self.model.write(&[extent], false, durable);
        let write = self.volume.write(
            self.now,
            || Some(token),
            initiator(1),
            extent,
            &data,
            durable,
        );
        match write.unwrap() {
            Write::Done => {
                self.model.ended(token, None, true);
                true
            }
            Write::Parked => self.outcome(token),
        }
    }

    /// Advances, and leaves what was completed.
    fn look_on(&mut self) {
        let (acked, flushed) = (self.model.acked.clone(), self.model.flushed.clone());
        self.volume.advance(self.now);
        self.check_look(&acked, &flushed);
    }

    pub fn outcome(&mut self, token: Token) -> bool {
        for _ in 0..1000 {
            self.look_on();
            while let Some(done) = self.volume.next_completed() {
                self.model.ended(done.token, done.data.as_deref(), done.ok);
                if done.token == token {
                    return done.ok;
                }
            }
        }
        panic!("not answered: {token:?}");
    }

    pub fn read(&mut self, sector: u64) -> u64 {
        let extent = Extent::new(Lba(sector), 1).unwrap();
        let who = initiator(1);
        match self.volume.read(self.now, || Some(Token(0)), who, extent) {
            Ok(Read::Ready(body)) => return value_of(&body),
            other => assert!(matches!(other, Ok(Read::Parked))),
        }
        loop {
            self.look_on();
            if let Some(done) = self.volume.next_completed() {
                return value_of(&done.data.unwrap());
            }
        }
    }

    pub fn last(&self, sector: u64) -> u64 {
        self.model.history[sector as usize][self.model.acked[sector as usize]]
    }

    pub fn durable(&self, sector: u64) -> u64 {
        let at = (self.start + sector * 512) as usize;
        value_of(&self.medium.file.stable_bytes()[at..at + 512])
    }
}

#[test]
fn a_bad_sector_concerns_itself_alone() {
    for direct in [false, true] {
        let mut world = World::new(7, 40, direct, 1, 0);
        world.damage(10, 1, true);
        // Its neighbours are of the same block, and of the same write.
        assert!(world.write(9, 3, false) && world.write(60, 1, false));
        world.pass(world.volume.options.max_dirty_age);
        assert!(!world.volume.is_degraded());
        for good in [9, 11, 60] {
            assert_eq!(world.durable(good), world.last(good));
        }
        // What was acknowledged is read, and a flush does not claim it.
        assert_eq!(world.read(10), world.last(10));
        world.check_kill();
        assert!(!world.flush());
        // Others are written and synced as ever.
        assert!(world.write(9, 1, true) && world.write(61, 2, true));
        assert_eq!(world.durable(9), world.last(9));
        // A write to it is tried, and told.
        let before = world.read(10);
        assert!(!world.write(10, 1, false));
        assert_eq!(world.read(10), before);
        // The disk has remapped it.
        world.repair();
        assert!(world.write(10, 1, false));
        assert!(world.flush());
        assert_eq!(world.durable(10), world.last(10));
        assert!(world.volume.is_well());
        world.settle();
        assert_eq!(world.left_in_arena(), 0);
    }
}

#[test]
fn what_is_kept_is_tried_again_by_itself() {
    let mut world = World::new(7, 40, true, 1, 0);
    world.damage(10, 3, true);
    assert!(world.write(8, 8, false));
    world.pass(world.volume.options.max_dirty_age);
    assert!(!world.volume.is_well());
    world.repair();
    world.pass(Duration::from_secs(11));
    assert!(world.volume.is_well());
    assert!(world.flush());
    assert_eq!(world.durable(11), world.last(11));
}

#[test]
fn a_sector_that_cannot_be_read_is_repaired_by_a_write_of_its_block() {
    for align in [1, 4096] {
        let mut world = World::new(7, 40, true, align, 0);
        let first = 16 - world.start / 512 % 8;
        world.damage(first + 2, 1, false);
        // A part of the block, which needs the rest.
        assert!(world.write(first + 2, 1, false));
        world.pass(world.volume.options.max_dirty_age);
        assert!(!world.volume.is_well() && !world.volume.is_degraded());
        assert!(!world.write(first + 1, 2, false));
        assert!(world.write(first, 8, false), "align {align}");
        assert!(world.flush());
        assert_eq!(world.durable(first + 2), world.last(first + 2));
        world.settle();
    }
}

#[test]
fn a_durable_write_of_a_bad_sector_fails_and_others_do_not_wait_for_it() {
    let mut world = World::new(7, 40, true, 1, 0);
    world.damage(10, 1, true);
    assert!(!world.write(10, 1, true));
    assert!(world.write(11, 1, true));
    assert!(!world.write(10, 1, true));
    world.repair();
    assert!(world.write(10, 1, true));
    assert_eq!(world.durable(10), world.last(10));
}

#[test]
fn a_discard_of_a_bad_range_clears_it() {
    let mut world = World::new(7, 40, true, 1, 0);
    world.damage(10, 2, false);
    assert!(world.write(10, 2, false));
    world.pass(world.volume.options.max_dirty_age);
    assert!(!world.volume.is_well());
    world.step(12, 8, 6);
    world.pass(Duration::from_secs(1));
    assert!(world.volume.is_well());
    assert!(world.flush());
    assert_eq!([world.read(10), world.durable(10)], [0, 0]);
    world.settle();
    assert_eq!(world.left_in_arena(), 0);
}

#[test]
fn too_many_bad_ranges_are_a_matter_of_the_whole_image() {
    let mut world = World::new(7, 40, true, 1, 0);
    for sector in (0..SECTORS).step_by(8) {
        world.damage(sector, 1, true);
        assert!(world.write(sector, 1, false));
    }
    world.pass(world.volume.options.max_dirty_age);
    assert!(world.volume.is_degraded());
    assert_eq!(world.read(16), world.last(16));
    world.repair();
    world.pass(Duration::from_secs(11));
    assert!(!world.volume.is_degraded());
    assert!(world.flush());
}

#[test]
fn no_freeze_begins_while_something_is_kept() {
    let mut world = World::new(7, 40, true, 1, 0);
    world.damage(10, 1, true);
    assert!(world.write(10, 1, false));
    world.pass(world.volume.options.max_dirty_age);
    world.step(17, 0, 1);
    assert_eq!(world.volume.phase(), Phase::Running);
    world.settle();
}

#[test]
fn a_freeze_is_withdrawn_when_a_sector_goes_bad_while_it_is_made() {
    for thaw in [false, true] {
        withdraw(thaw);
    }
}

/// Waits for the disk, as long as a write does; or until a thaw is ordered.
fn withdraw(thaw: bool) {
    let mut world = World::new(7, 40, true, 1, 0);
    world.damage(10, 1, true);
    assert!(world.write(10, 1, false));
    world.fate.borrow_mut().held = |job| matches!(job, Job::Step(_));
    world.step(17, 0, 1);
    world.pass(world.volume.options.max_dirty_age);
    assert!(!world.volume.is_well());
    assert_eq!(world.volume.phase(), Phase::Freezing);
    world.fate.borrow_mut().held = |_| false;
    world.pass(Duration::from_secs(1));
    assert_eq!(world.volume.phase(), Phase::Freezing);
    if thaw {
        world.step(18, 0, 1);
        world.pass(Duration::from_secs(1));
    } else {
        world.pass(world.volume.options.io_patience);
    }
    assert_eq!(world.volume.phase(), Phase::Running);
    assert!(world.is_thawed());
    world.settle();
}

#[test]
fn a_stop_keeps_the_arena_of_what_the_disk_does_not_take() {
    let mut world = World::new(7, 40, true, 1, 0);
    world.damage(10, 1, true);
    assert!(world.write(10, 1, false));
    world.volume.drain();
    let patience = world.volume.options.io_patience;
    world.pass(2 * patience);
    assert!(!world.volume.is_idle());
    assert!(world.now - world.volume.progress_at() >= patience);
    world.volume.remove_arena().unwrap();
    world.check_kill();
}

/// A write to a bad range is tried with what the cache has around it: that must
/// not bring back what another one has replaced.
#[test]
fn writes_to_bad_sectors_of_one_block_are_tried_one_after_the_other() {
    let mut world = World::new(7, 40, true, 1, 0);
    for sector in [5, 8] {
        world.damage(sector, 1, true);
    }
    // The first sectors of a block, which are kept or clean then.
    assert!(world.write(5, 6, false));
    world.pass(world.volume.options.max_dirty_age);
    world.repair();
    // The second is tried with the sectors before it.
    let is_long = |job: &Job| matches!(job, Job::Try { data, .. } if data.len() > 512);
    world.fate.borrow_mut().held = is_long;
    for sector in [5, 8] {
        world.step(5, sector, 1);
    }
    world.pass(world.volume.options.max_dirty_age);
    assert_eq!(world.model.acked[5], 2);
    assert_eq!(world.durable(5), world.last(5));
    world.fate.borrow_mut().held = |_| false;
    world.pass(Duration::from_secs(1));
    assert_eq!(world.model.acked[8], 2);
    world.check_kill();
    world.settle();
    assert_eq!(
        [5, 8].map(|n| world.durable(n)),
        [5, 8].map(|n| world.last(n))
    );
}
