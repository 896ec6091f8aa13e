//! Discards, and what a failed sync makes of them.

use super::*;
use crate::freeze::Phase;

impl World {
    fn discard(&mut self, start: u64, count: u64, durable: bool) -> Token {
        let extents = [Extent::new(Lba(start), count).unwrap()];
        let (token, _) = self.model.write(&extents, true, durable);
        let who = initiator(1);
        let taken = self
            .volume
            .discard(self.now, || Some(token), who, &extents, durable);
        taken.unwrap();
        token
    }

    fn fail_next_sync(&mut self) {
        self.fate.borrow_mut().sync_fails = true;
    }
}

#[test]
fn a_discard_that_a_failed_sync_took_back_is_done_again() {
    let mut lost = false;
    for (direct, align) in [(false, 1), (true, 1), (true, 4096)] {
        let mut world = World::new(7, 40, direct, align, 0);
        assert!(world.write(8, 16, true));
        let token = world.discard(8, 8, false);
        assert!(world.outcome(token));
        // One sector is written again before the sync that fails.
        assert!(world.write(10, 1, false));
        world.fail_next_sync();
        assert!(!world.flush());
        lost |= world.durable(8) != 0 || world.durable(15) != 0;
        world.pass(Duration::from_secs(1));
        assert!(world.flush());
        assert_eq!([8, 9, 11, 15].map(|n| world.durable(n)), [0; 4]);
        assert_eq!(world.durable(10), world.last(10));
        assert_eq!(world.durable(16), world.last(16));
        world.settle();
        assert_eq!(world.left_in_arena(), 0);
    }
    assert!(lost, "no failed sync took a discard back");
}

#[test]
fn a_durable_discard_waits_until_it_is_done_again_and_synced() {
    let mut world = World::new(7, 40, true, 1, 0);
    assert!(world.write(8, 16, true));
    world.fail_next_sync();
    let token = world.discard(8, 8, true);
    // Written over it before the disk has the discard.
    world.step(5, 9, 1);
    world.pass(Duration::from_secs(2));
    assert!(world.model.asked[token.0 as usize].is_none());
    assert_eq!([world.durable(8), world.durable(15)], [0, 0]);
    assert_eq!(world.durable(9), world.last(9));
}

#[test]
fn a_freeze_waits_for_what_is_done_again() {
    for seed in 0..8 {
        let mut world = World::new(seed, 40, true, 1, 0);
        assert!(world.write(8, 16, true));
        let token = world.discard(8, 8, false);
        assert!(world.outcome(token));
        world.fail_next_sync();
        world.step(17, 0, 1);
        world.step(5, 8, 2);
        world.pass(Duration::from_secs(2));
        assert_eq!(world.volume.phase(), Phase::Frozen);
        assert_eq!([world.durable(10), world.durable(15)], [0, 0]);
        world.settle();
    }
}

/// One sync of a shadow is of its data and of its bits: one that fails for the
/// bits of a discard has lost the data, too.
#[test]
fn what_a_frozen_image_has_written_is_not_lost_with_the_bits_of_a_discard() {
    for seed in 0..40 {
        let mut world = World::new(seed, 40, true, 1, 0);
        world.step(17, 0, 1);
        world.pass(Duration::from_secs(1));
        assert_eq!(world.volume.phase(), Phase::Frozen);
        world.fail_next_sync();
        world.discard(5, 8, false);
        world.volume.advance(world.now);
        assert!(world.write(21, 8, true));
        for sector in 21..29 {
            assert_eq!(world.model.flushed[sector], world.model.acked[sector]);
        }
        world.check_cut();
        world.settle();
        world.check_cut();
    }
}

/// A part of a chunk is made zeros through the cache; if these sectors go bad
/// when the thaw is over, the discard has failed like a write.
#[test]
fn a_discard_is_not_acknowledged_by_a_range_that_is_bad() {
    for seed in 0..40 {
        let build = Build {
            slots: 40,
            direct: true,
            align: 1,
            write_through: true,
        };
        let mut world = World::of(build, seed, 0);
        assert!(world.write(6, 1, true));
        world.step(17, 0, 1);
        world.pass(Duration::from_secs(1));
        assert!(world.write(40, 8, true));
        world.step(18, 0, 1);
        while !matches!(world.volume.freezing.stage, freeze::Stage::Thawing) {
            world.advance();
        }
        world.discard(6, 1, false);
        world.advance();
        world.damage(6, 1, true);
        world.pass(Duration::from_secs(20));
        world.check_kill();
        world.settle();
    }
}

/// While a write to a bad range is tried, more of its sectors may go bad.
#[test]
fn a_write_of_two_bad_ranges_lands_in_both() {
    for seed in 0..40 {
        let build = Build {
            slots: 40,
            direct: true,
            align: 4096,
            write_through: true,
        };
        let mut world = World::of(build, seed, 0);
        world.damage(8, 1, true);
        assert!(!world.write(8, 8, false));
        world.repair();
        // In the cache, on its way to a place that is bad now.
        world.damage(0, 1, true);
        world.step(5, 0, 8);
        world.write(0, 16, false);
        world.check_kill();
        world.settle();
    }
}

/// Else the worker would look again and again until the disk is through.
#[test]
fn nothing_is_due_while_the_disk_does_discards_again() {
    let mut world = World::new(7, 40, true, 1, 0);
    assert!(world.write(8, 16, true));
    let token = world.discard(8, 8, false);
    assert!(world.outcome(token));
    world.fail_next_sync();
    world.fate.borrow_mut().held = |job| matches!(job, Job::Discard(_));
    assert!(!world.flush());
    world.pass(Duration::from_secs(1));
    assert!(world.volume.redo.is_in_flight());
    let due = world.volume.deadline();
    assert!(due.is_none_or(|due| due > world.now));
    world.fate.borrow_mut().held = |_| false;
    world.settle();
}
