//! Reads in flight that meet writes and discards.

use super::*;

impl World {
    /// Lets what is in flight end, as far as it may.
    fn run(&mut self) {
        for _ in 0..200 {
            self.advance();
        }
    }

    /// Writes so many sectors, or reads them, and waits.
    fn put(&mut self, start: u64, count: u64) {
        self.step(5, start, count);
        self.step(13, 0, 1);
        self.run();
    }

    fn look_at(&mut self, start: u64, count: u64) {
        self.step(0, start, count);
        self.run();
    }

    /// Drives a block out by writing others.
    fn drive_out(&mut self, block: Extent) {
        for n in 1..10 {
            self.put(block.start().0 + 8 * n, 8);
        }
        let block = self.volume.absolute(block);
        assert!(!self.volume.cache.covers(block), "it is there still");
    }

    fn hold_reads(&mut self, hold: bool) {
        self.fate.borrow_mut().hold_reads = hold;
    }
}

/// The first whole block of the window.
fn block() -> Extent {
    Extent::new(Lba(5), 8).unwrap()
}

/// Direct, so that reads fill the cache, which is small.
fn world() -> World {
    World::new(7, 6, true, 1, 0)
}

#[test]
fn a_read_in_flight_brings_back_nothing_that_a_write_has_replaced() {
    let mut world = world();
    world.hold_reads(true);
    world.look_at(5, 8);
    // Written, on stable storage and driven out, while the read is in flight.
    world.put(5, 8);
    world.drive_out(block());
    world.hold_reads(false);
    world.run();
    // The model knows what must be seen now.
    world.look_at(5, 8);
}

#[test]
fn a_discard_of_a_frozen_image_waits_for_the_reads_in_flight() {
    let mut world = world();
    world.put(5, 8);
    world.step(17, 0, 1);
    world.run();
    assert_eq!(world.volume.phase(), crate::freeze::Phase::Frozen);
    world.drive_out(block());
    world.hold_reads(true);
    world.look_at(5, 8);
    world.step(12, 5, 8);
    world.run();
    world.hold_reads(false);
    world.run();
    let (history, acked) = (&world.model.history[5], world.model.acked[5]);
    assert_eq!((history[acked], acked), (0, 2), "discarded");
    world.look_at(5, 8);
}
