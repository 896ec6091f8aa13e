//! Copies of requests, recognised by their tags: which are answered, which are
//! dropped, and none that is done twice, or acknowledged and never done.

use super::*;
use crate::freeze::Order;
use initiator::frame::{Ata, opcode};

pub(super) const COUNTING: &[&str] = &["tag_inc_be"];

impl Bench {
    /// Sends a request under this tag.
    pub(super) fn tagged(&mut self, nic: NicId, from: u8, tag: u32, ask: &Ask) -> Got {
        let bytes = self.encode(nic, from, &ask.clone().tag(tag));
        self.hand(nic, &bytes)
    }

    pub(super) fn answered(&mut self, tag: u32, ask: &Ask) -> Reply {
        match self.tagged(SMALL, ALICE, tag, ask) {
            Got::Reply(reply) => reply,
            other => panic!("{other:?} instead of a reply"),
        }
    }

    pub(super) fn twin(&mut self, tag: u32, ask: &Ask) {
        match self.tagged(SMALL, ALICE, tag, ask) {
            Got::Dropped(Dropped::InHand) => {}
            other => panic!("{other:?} of a request that is in hand"),
        }
    }

    pub(super) fn parked(&mut self, tag: u32, ask: &Ask) {
        match self.tagged(SMALL, ALICE, tag, ask) {
            Got::Parked => {}
            other => panic!("{other:?} instead of nothing yet"),
        }
    }

    pub(super) fn duplicates(&self) -> u64 {
        self.target.counters().duplicate_writes
    }
}

/// A bench where the same hosts may be heard through both NICs, and ALICE's
/// tags count up.
fn counting() -> Bench {
    let mut bench = Bench::new();
    bench.extend(SMALL, ALICE, COUNTING);
    bench
}

pub(super) const OK: (u8, u8, u8) = (0x40, 0, 0);

fn durable() -> Settings {
    Settings {
        durable: true,
        ..settings()
    }
}

#[test]
fn a_write_that_comes_again_is_answered_and_not_done() {
    let mut bench = counting();
    let [one, two] = [1, 2].map(|fill| Ask::write(3, &sectors(fill, 1)));
    assert_eq!(registers(&bench.answered(100, &one)), OK);
    assert_eq!(registers(&bench.answered(101, &two)), OK);
    // The first one was delayed on the way: it must not undo the second.
    assert_eq!(registers(&bench.answered(100, &one)), OK);
    assert_eq!(bench.duplicates(), 1);
    let bytes = bench.bytes();
    same(&bytes[3 * 512..4 * 512], &sectors(2, 1));
    // A read with a tag that was used is a read.
    let reply = bench.answered(100, &Ask::read(3, 1));
    same(reply.sectors(1).unwrap(), &sectors(2, 1));
    // Whatever would become of the copy now, the first was done.
    bench.ask_from(SMALL, BOB, &Ask::reserve(1, &[host(BOB)]));
    assert_eq!(registers(&bench.answered(101, &two)), OK);
    assert_eq!(bench.answered(102, &two).error(), Some(6));
    assert_eq!(bench.target.counters().sectors_written, 2);
}

#[test]
fn without_the_extension_a_write_is_done_each_time() {
    let mut bench = Bench::new();
    let [one, two] = [1, 2].map(|fill| Ask::write(3, &sectors(fill, 1)));
    for ask in [&one, &two, &one] {
        assert_eq!(registers(&bench.answered(100, ask)), OK);
    }
    assert_eq!(bench.duplicates(), 0);
    same(&bench.bytes()[3 * 512..4 * 512], &sectors(1, 1));
}

#[test]
fn what_was_refused_is_done_when_it_comes_again() {
    let mut bench = counting();
    let good = Ask::write(5, &sectors(7, 2));
    // AoEde marked the tag first: acknowledged, never written.
    let short = good.clone().length(36 + 700);
    assert_eq!(bench.answered(100, &short).error(), Some(2));
    let past_the_end = Ask::write(SECTORS, &sectors(7, 1));
    assert_eq!(registers(&bench.answered(101, &past_the_end)).1, 0x10);
    bench.ask_from(SMALL, BOB, &Ask::reserve(1, &[host(BOB)]));
    assert_eq!(bench.answered(102, &good).error(), Some(6));
    bench.ask_from(SMALL, BOB, &Ask::reserve(1, &[]));
    for (n, tag) in [100, 101, 102].into_iter().enumerate() {
        let fill = n as u8 + 1;
        let again = Ask::write(5 + 2 * n as u64, &sectors(fill, 2));
        assert_eq!(registers(&bench.answered(tag, &again)), OK);
    }
    assert_eq!(bench.duplicates(), 0);
    let expected = [sectors(1, 2), sectors(2, 2), sectors(3, 2)].concat();
    same(&bench.bytes()[5 * 512..11 * 512], &expected);
}

#[test]
fn equal_tags_of_two_initiators_are_two() {
    let mut bench = Bench::new();
    for (nic, from) in [(SMALL, ALICE), (SMALL, BOB), (JUMBO, ALICE)] {
        bench.extend(nic, from, COUNTING);
    }
    // AoEde acknowledged the second and dropped it.
    for (lba, (nic, from)) in [(SMALL, ALICE), (SMALL, BOB), (JUMBO, ALICE), (JUMBO, BOB)]
        .into_iter()
        .enumerate()
    {
        let ask = Ask::write(lba as u64, &sectors(9, 1));
        let Got::Reply(reply) = bench.tagged(nic, from, 500, &ask) else {
            panic!()
        };
        assert_eq!(registers(&reply), OK);
    }
    assert_eq!(bench.duplicates(), 0);
    same(&bench.bytes()[..4 * 512], &sectors(9, 4));
}

#[test]
fn an_initiator_that_was_started_again_writes() {
    let mut bench = counting();
    let write = |fill| Ask::write(3, &sectors(fill, 1));
    bench.answered(100, &write(1));
    // It negotiates, and its tags begin where they did before.
    for (fill, door) in [(2, 0), (3, 1), (4, 2)] {
        let reply = match door {
            0 => bench.ask(&Ask::extensions(&["reset", "tag_inc_be"])),
            1 => bench.ask(&Ask::extensions(COUNTING)),
            _ => {
                let on = initiator::frame::Directive::extension_on("tag-be");
                bench.ask(&Ask::mask_edit(&[on]))
            }
        };
        assert_eq!(reply.error(), None);
        assert_eq!(registers(&bench.answered(100, &write(fill))), OK);
        same(&bench.bytes()[3 * 512..4 * 512], &sectors(fill, 1));
    }
    // Or it does not, and they begin far away, with any command.
    bench.answered(0x4000_0000, &Ask::read(0, 1));
    bench.answered(100, &Ask::read(0, 1));
    assert_eq!(registers(&bench.answered(100, &write(5))), OK);
    same(&bench.bytes()[3 * 512..4 * 512], &sectors(5, 1));
    assert_eq!(bench.duplicates(), 0);
    // Setting the config string is all off.
    bench.ask(&Ask::config(4, b"x"));
    assert_eq!(registers(&bench.answered(100, &write(6))), OK);
    same(&bench.bytes()[3 * 512..4 * 512], &sectors(6, 1));
}

#[test]
fn a_write_that_waits_for_its_sync_is_neither_done_nor_answered_twice() {
    let mut bench = Bench::with(Settings {
        durable: true,
        ..settings()
    });
    bench.extend(SMALL, ALICE, COUNTING);
    bench.shut();
    let write = Ask::write(3, &sectors(1, 1));
    bench.parked(100, &write);
    bench.twin(100, &write);
    bench.target.advance(bench.now);
    bench.twin(100, &write);
    assert_eq!(bench.duplicates(), 2);
    assert!(bench.pump().is_empty());
    bench.open();
    let replies = bench.wait();
    assert_eq!(replies.len(), 1);
    assert_eq!(registers(&replies[0].1), OK);
    same(&bench.stable()[3 * 512..4 * 512], &sectors(1, 1));
    // Now it is answered, and at once.
    assert_eq!(registers(&bench.answered(100, &write)), OK);
    assert_eq!(bench.duplicates(), 3);
}

#[test]
fn a_write_that_failed_is_done_when_it_comes_again() {
    let mut bench = Bench::with(Settings {
        durable: true,
        ..settings()
    });
    bench.extend(SMALL, ALICE, COUNTING);
    bench.medium.write_fails.store(true, Ordering::Relaxed);
    let write = Ask::write(3, &sectors(1, 1));
    bench.parked(100, &write);
    let replies = bench.wait();
    assert_eq!(registers(&replies[0].1), (0x61, 4, 1));
    bench.medium.write_fails.store(false, Ordering::Relaxed);
    bench.settle();
    bench.parked(100, &write);
    let replies = bench.wait();
    assert_eq!(registers(&replies[0].1), OK);
    assert_eq!(registers(&bench.answered(100, &write)), OK);
    assert_eq!(bench.duplicates(), 1);
}

#[test]
fn a_write_that_waits_for_room_is_pending() {
    let room = Room {
        slots: 6,
        dirty_max: 4,
        ..Room::default()
    };
    let mut bench = Bench::with_room(settings(), room);
    bench.extend(SMALL, ALICE, COUNTING);
    bench.shut();
    let mut parked = None;
    for n in 0..8u32 {
        let write = Ask::write(8 * u64::from(n), &sectors(n as u8 + 1, 1));
        match bench.tagged(SMALL, ALICE, 100 + n, &write) {
            Got::Reply(reply) => assert_eq!(registers(&reply), OK),
            Got::Parked => {
                parked.get_or_insert((100 + n, write));
            }
            other => panic!("{other:?}"),
        }
    }
    let (tag, write) = parked.expect("there was room for all");
    bench.twin(tag, &write);
    bench.open();
    bench.settle();
    assert!(bench.pump().iter().any(|(_, reply)| reply.tag() == tag));
    assert_eq!(registers(&bench.answered(tag, &write)), OK);
    assert_eq!(bench.duplicates(), 2);
    for n in 0..8 {
        let at = 8 * n * 512;
        same(&bench.bytes()[at..at + 512], &sectors(n as u8 + 1, 1));
    }
}

#[test]
fn what_finds_no_room_is_done_when_it_comes_again() {
    let room = Room {
        slots: 6,
        dirty_max: 4,
        parked_max: 512,
        ..Room::default()
    };
    let mut bench = Bench::with_room(settings(), room);
    bench.extend(SMALL, ALICE, COUNTING);
    bench.shut();
    let write = |n: u32| Ask::write(8 * u64::from(n % 8), &sectors(n as u8 + 1, 1));
    let mut dropped = Vec::new();
    for n in 0..8 {
        if let Got::Dropped(why) = bench.tagged(SMALL, ALICE, 100 + n, &write(n)) {
            assert_eq!(why, Dropped::NoRoom);
            dropped.push(n);
        }
    }
    assert!(!dropped.is_empty());
    bench.open();
    bench.settle();
    bench.pump();
    for n in dropped {
        match bench.tagged(SMALL, ALICE, 100 + n, &write(n)) {
            Got::Reply(reply) => assert_eq!(registers(&reply), OK),
            Got::Parked => assert_eq!(bench.wait().len(), 1),
            other => panic!("{other:?}"),
        }
        bench.settle();
    }
    assert_eq!(bench.duplicates(), 0);
    for n in 0..8 {
        let at = 8 * n * 512;
        same(&bench.bytes()[at..at + 512], &sectors(n as u8 + 1, 1));
    }
}

#[test]
fn a_write_that_a_freeze_holds_is_done_after_the_thaw() {
    let mut bench = counting();
    let (one, two) = (Ask::write(3, &sectors(1, 1)), Ask::write(3, &sectors(2, 1)));
    assert_eq!(registers(&bench.answered(100, &one)), OK);
    let order = |bench: &mut Bench, order| {
        let now = bench.now;
        bench.target.volume().order(now, order, [0; 16]).unwrap();
    };
    order(&mut bench, Order::Freeze);
    for _ in 0..2 {
        // Not answered, and not marked either.
        let held = bench.tagged(SMALL, ALICE, 101, &two);
        assert!(matches!(held, Got::Dropped(Dropped::NoRoom)), "{held:?}");
    }
    // What was acknowledged before is so again; reads go on.
    assert_eq!(registers(&bench.answered(100, &one)), OK);
    let reply = bench.answered(102, &Ask::read(3, 1));
    same(reply.sectors(1).unwrap(), &sectors(1, 1));
    order(&mut bench, Order::Thaw);
    assert_eq!(registers(&bench.answered(101, &two)), OK);
    assert_eq!(registers(&bench.answered(101, &two)), OK);
    assert_eq!(bench.duplicates(), 2);
    same(&bench.bytes()[3 * 512..4 * 512], &sectors(2, 1));
}

#[test]
fn trim_is_a_write() {
    let mut bench = counting();
    bench.answered(99, &Ask::write(3, &sectors(1, 1)));
    let mut ranges = sectors(0, 1);
    ranges[..8].copy_from_slice(&(3u64 | 1 << 48).to_le_bytes());
    let trim = Ata {
        feature: 1,
        count: 1,
        opcode: opcode::DATA_SET_MANAGEMENT,
        ..Ata::default()
    };
    let trim = Ask::ata(trim, &ranges);
    bench.parked(100, &trim);
    bench.twin(100, &trim);
    bench.settle();
    assert_eq!(bench.pump().len(), 1);
    bench.answered(101, &Ask::write(3, &sectors(2, 1)));
    // Late, it must not take away what was written since.
    assert_eq!(registers(&bench.answered(100, &trim)), OK);
    same(&bench.bytes()[3 * 512..4 * 512], &sectors(2, 1));
    assert_eq!(bench.duplicates(), 2);
}

#[test]
fn a_write_of_no_sectors_marks_no_tag() {
    // A spoofed one made the write behind it acknowledged and not done.
    for settings in [settings(), durable()] {
        let mut bench = Bench::with(settings);
        bench.extend(SMALL, ALICE, COUNTING);
        let nothing = |opcode, feature, count| {
            let registers = Ata {
                feature,
                count,
                opcode,
                ..Ata::default()
            };
            Ask::ata(registers, &sectors(0, 1))
        };
        let writes = [
            opcode::WRITE,
            opcode::WRITE_EXT,
            opcode::WRITE_DMA,
            opcode::WRITE_DMA_EXT,
        ];
        let mut empty: Vec<Ask> = writes.iter().map(|op| nothing(*op, 0, 0)).collect();
        // A TRIM all of whose ranges are empty.
        empty.push(nothing(opcode::DATA_SET_MANAGEMENT, 1, 1));
        for (n, ask) in empty.into_iter().enumerate() {
            let (tag, fill) = (100 + n as u32, n as u8 + 1);
            assert_eq!(registers(&bench.answered(tag, &ask)), OK);
            let write = Ask::write(3, &sectors(fill, 1));
            match bench.tagged(SMALL, ALICE, tag, &write) {
                Got::Reply(reply) => assert_eq!(registers(&reply), OK),
                Got::Parked => assert_eq!(registers(&bench.wait()[0].1), OK),
                other => panic!("{other:?}"),
            }
            same(&bench.bytes()[3 * 512..4 * 512], &sectors(fill, 1));
            // After the write it is a copy like any other.
            assert_eq!(registers(&bench.answered(tag, &ask)), OK);
            assert_eq!(registers(&bench.answered(tag, &write)), OK);
        }
        assert_eq!(bench.target.counters().sectors_written, 5);
    }
}

#[test]
fn a_read_in_hand_is_not_read_twice() {
    for wish in ["tag_inc_be", "tag_random"] {
        let mut bench = Bench::new();
        bench.extend(SMALL, ALICE, &[wish]);
        bench.shut();
        let read = Ask::read(3, 1);
        for tag in [100, 7, 0x9999_9999] {
            if wish == "tag_random" || tag == 100 {
                bench.parked(tag, &read);
                bench.twin(tag, &read);
            }
        }
        // A flush as well.
        let tag = 101;
        bench.parked(tag, &Ask::flush());
        bench.twin(tag, &Ask::flush());
        bench.open();
        let answers = bench.wait();
        assert!(answers.iter().all(|(_, reply)| reply.tag() != 0));
        bench.settle();
        bench.pump();
        // After the answer it is read again.
        assert_eq!(registers(&bench.answered(100, &read)), OK);
        assert_eq!(bench.duplicates(), 0);
        assert!(bench.target.counters().drops(Dropped::InHand) >= 2);
    }
}

#[test]
fn unique_tags_are_known_only_while_in_hand() {
    let mut bench = Bench::with(Settings {
        durable: true,
        ..settings()
    });
    bench.extend(SMALL, ALICE, &["tag_random"]);
    for fill in 1..4 {
        let write = Ask::write(3, &sectors(fill, 1));
        bench.parked(77, &write);
        bench.twin(77, &write);
        assert_eq!(bench.wait().len(), 1);
        same(&bench.stable()[3 * 512..4 * 512], &sectors(fill, 1));
    }
}

#[test]
fn tag_zero_is_never_watched() {
    let mut bench = counting();
    for fill in 1..4 {
        let write = Ask::write(3, &sectors(fill, 1));
        assert_eq!(registers(&bench.answered(0, &write)), OK);
        same(&bench.bytes()[3 * 512..4 * 512], &sectors(fill, 1));
    }
    bench.shut();
    for _ in 0..2 {
        bench.parked(0, &Ask::read(9, 1));
    }
    bench.open();
    assert_eq!(bench.pump().len(), 2);
}

#[test]
fn answers_to_an_earlier_life_are_not_sent() {
    let mut bench = Bench::with(Settings {
        durable: true,
        ..settings()
    });
    bench.extend(SMALL, ALICE, COUNTING);
    bench.shut();
    bench.parked(0x4000_0000, &Ask::write(3, &sectors(1, 1)));
    bench.parked(0x4000_0001, &Ask::read(9, 1));
    // Started again; its tags come to where they were, which negotiating made
    // those of another life.
    bench.extend(SMALL, ALICE, COUNTING);
    let forgotten = std::mem::take(&mut bench.asked);
    bench.parked(0x4000_0000, &Ask::write(4, &sectors(2, 1)));
    bench.open();
    let replies = bench.wait();
    bench.settle();
    assert!(bench.pump().is_empty());
    assert_eq!((replies.len(), forgotten.len()), (1, 2));
    assert_eq!(replies[0].1.ata().unwrap().lba, 4);
    let bytes = bench.bytes();
    same(
        &bytes[3 * 512..5 * 512],
        &[sectors(1, 1), sectors(2, 1)].concat(),
    );
    assert!(bench.target.is_idle());
}
