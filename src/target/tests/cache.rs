//! When a write is acknowledged: the write cache, `-s`, FLUSH, and room.

use super::*;
use initiator::frame::{Ata, Identify, opcode};

fn durable() -> Settings {
    Settings {
        durable: true,
        ..settings()
    }
}

fn set_features(feature: u8) -> Ask {
    let registers = Ata {
        feature,
        opcode: opcode::SET_FEATURES,
        ..Ata::default()
    };
    Ask::ata(registers, &[])
}

const OFF: u8 = 0x82;
const ON: u8 = 0x02;

fn cache_is_on(bench: &mut Bench) -> bool {
    let reply = bench.ask(&Ask::identify());
    let id = Identify::parse(reply.sectors(1).unwrap()).unwrap();
    id.word(85) & 1 << 5 != 0
}

#[test]
fn a_durable_write_is_acknowledged_after_the_sync_and_one_sync_serves_all() {
    let mut bench = Bench::with(durable());
    bench.shut();
    for n in 0..16 {
        let got = bench.send(SMALL, ALICE, &Ask::write(2 * n, &sectors(n as u8 + 1, 2)));
        assert!(matches!(got, Got::Parked));
    }
    for _ in 0..16 {
        bench.pass(|job| matches!(job, Job::Write { .. }));
    }
    assert!(bench.pump().is_empty(), "acknowledged before the sync");
    let mut acknowledged = 0;
    while bench.desk.borrow_mut().pass(|job| matches!(job, Job::Sync)) {
        for (_, reply) in bench.pump() {
            assert_eq!(registers(&reply), (0x40, 0, 0));
            let at = reply.ata().unwrap().lba as usize * 512;
            same(
                &bench.stable()[at..at + 1024],
                &bench.bytes()[at..at + 1024],
            );
            acknowledged += 1;
        }
    }
    let syncs = bench.medium.syncs.load(Ordering::Relaxed);
    assert_eq!(acknowledged, 16);
    assert!(syncs <= 2, "{syncs} syncs");
    same(&bench.stable(), &bench.bytes());
}

#[test]
fn a_durable_trim_is_synced_too() {
    let mut bench = Bench::with(durable());
    bench.write(4, &sectors(9, 2));
    let registers = Ata {
        feature: 1,
        count: 1,
        opcode: opcode::DATA_SET_MANAGEMENT,
        ..Ata::default()
    };
    let mut ranges = sectors(0, 1);
    ranges[..8].copy_from_slice(&[4, 0, 0, 0, 0, 0, 1, 0]);
    let reply = bench.ask(&Ask::ata(registers, &ranges));
    assert_eq!(super::registers(&reply), (0x40, 0, 0));
    assert_eq!(
        bench.stable()[4 * 512..6 * 512],
        [sectors(0, 1), sectors(9, 1)].concat()
    );
}

#[test]
fn a_durable_write_whose_sync_fails_is_a_failed_write() {
    let mut bench = Bench::with(durable());
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    let reply = bench.ask(&Ask::write(0, &sectors(1, 2)));
    assert_eq!(registers(&reply), (0x61, 4, 2));
}

#[test]
fn a_flush_covers_all_that_was_acknowledged_before_it() {
    // AoEde answered at once and synced nothing.
    let mut bench = Bench::new();
    bench.write(0, &sectors(1, 2));
    same(&bench.stable(), &sectors(0, 64));
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::flush());
    assert!(bench.pump().is_empty(), "answered before the sync");
    // While the first sync is under way another write is acknowledged: the next
    // flush is not served by that sync.
    bench.send(SMALL, ALICE, &Ask::write(2, &sectors(2, 2)));
    bench.pass(|job| matches!(job, Job::Write { .. }));
    assert_eq!(bench.pump().len(), 1);
    bench.send(SMALL, BOB, &Ask::flush());
    bench.pass(|job| matches!(job, Job::Sync));
    let replies = bench.pump();
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].1.destination(), host(ALICE));
    bench.pass(|job| matches!(job, Job::Sync));
    assert_eq!(bench.pump().len(), 1);
    assert_eq!(
        bench.stable()[..2048],
        [sectors(1, 2), sectors(2, 2)].concat()
    );
}

#[test]
fn the_write_cache_goes_off_and_on_and_stays_so() {
    let mut bench = Bench::new();
    assert!(cache_is_on(&mut bench));
    bench.write(0, &sectors(1, 2));
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    assert_eq!(
        bench.stable()[..1024],
        sectors(1, 2),
        "not made durable first"
    );
    assert!(!cache_is_on(&mut bench));
    assert_eq!(bench.saved().map(|s| s.write_cache), Some(false));
    bench.write(2, &sectors(2, 2));
    same(&bench.stable()[1024..2048], &sectors(2, 2));
    // Again, which changes nothing and is answered all the same.
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    assert_eq!(registers(&bench.ask(&set_features(ON))), (0x40, 0, 0));
    assert!(cache_is_on(&mut bench));
    assert_eq!(bench.saved().map(|s| s.write_cache), Some(true));
    bench.write(4, &sectors(3, 2));
    same(&bench.stable()[2048..3072], &sectors(0, 2));
    for feature in (0..=255).filter(|f| ![ON, OFF].contains(f)) {
        assert_eq!(registers(&bench.ask(&set_features(feature))), (0x41, 4, 0));
    }
    assert_eq!(bench.target.closing, 0);
}

#[test]
fn the_operators_word_stands_above_set_features() {
    let mut bench = Bench::with(durable());
    assert!(!cache_is_on(&mut bench));
    assert_eq!(registers(&bench.ask(&set_features(ON))), (0x41, 4, 0));
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    assert!(!cache_is_on(&mut bench));
}

#[test]
fn writes_under_way_when_the_cache_goes_off_are_not_acknowledged_unsynced() {
    let mut bench = Bench::new();
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::write(0, &sectors(1, 2)));
    bench.send(SMALL, BOB, &set_features(OFF));
    // The sync begins and ends while the write still runs.
    bench.pass(|job| matches!(job, Job::Sync));
    bench.pump();
    bench.pass(|job| matches!(job, Job::Write { .. }));
    let mut off = false;
    loop {
        for (_, reply) in bench.pump() {
            match reply.ata().unwrap().lba {
                _ if reply.destination() == host(BOB) => off = true,
                _ => assert_eq!(
                    bench.stable()[..1024],
                    sectors(1, 2),
                    "acknowledged too early"
                ),
            }
        }
        let mut desk = bench.desk.borrow_mut();
        if !desk.pass(|_| true) {
            break;
        }
    }
    assert!(off && bench.asked.is_empty(), "{:?}", bench.asked);
    assert!(bench.target.is_idle());
}

#[test]
fn a_cache_that_cannot_go_off_says_so_and_stays_on() {
    let mut bench = Bench::new();
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x61, 4, 0));
    bench.medium.sync_fails.store(false, Ordering::Relaxed);
    assert!(cache_is_on(&mut bench));
    let mut bench = Bench::forgetful(settings());
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x61, 4, 0));
    assert!(cache_is_on(&mut bench));
    assert_eq!(bench.target.closing, 0);
    bench.write(0, &sectors(1, 2));
    same(&bench.stable()[..1024], &sectors(0, 2));
}

#[test]
fn without_room_a_write_is_dropped_and_the_next_attempt_succeeds() {
    let mut bench = Bench::with_room(settings(), 4096);
    bench.shut();
    for n in 0..4 {
        let got = bench.send(SMALL, ALICE, &Ask::write(4 * n, &sectors(1, 2)));
        assert!(matches!(got, Got::Parked));
    }
    let write = Ask::write(32, &sectors(2, 2));
    assert_eq!(bench.dropped(SMALL, BOB, &write), Dropped::NoRoom);
    assert_eq!(bench.target.counters().drops(Dropped::NoRoom), 1);
    // Receiving goes on: what needs no room is answered.
    for ask in [Ask::config(0, b""), Ask::identify(), Ask::mask_read()] {
        assert!(matches!(bench.send(SMALL, BOB, &ask), Got::Reply(_)));
    }
    bench.pass(|job| matches!(job, Job::Write { .. }));
    assert_eq!(bench.pump().len(), 1);
    assert!(matches!(bench.send(SMALL, BOB, &write), Got::Parked));
    bench.open();
    assert_eq!(bench.pump().len(), 4);
    same(&bench.bytes()[32 * 512..34 * 512], &sectors(2, 2));
    let written = bench.target.counters().sectors_written;
    assert_eq!(written, 10, "a dropped write was counted");
}

#[test]
fn so_many_requests_may_wait_and_no_more() {
    let mut bench = Bench::with_room(settings(), 64 << 20);
    bench.shut();
    for n in 0..JOBS_MAX {
        let got = match n % 3 {
            0 => bench.send(SMALL, ALICE, &Ask::read(0, 1)),
            1 => bench.send(SMALL, ALICE, &Ask::write(9, &sectors(n as u8, 1))),
            _ => bench.send(SMALL, ALICE, &Ask::flush()),
        };
        assert!(matches!(got, Got::Parked), "{n}: {got:?}");
    }
    for ask in [
        Ask::read(0, 1),
        Ask::write(0, &sectors(1, 1)),
        Ask::flush(),
        set_features(OFF),
    ] {
        assert_eq!(bench.dropped(SMALL, ALICE, &ask), Dropped::NoRoom);
    }
    assert_eq!(bench.target.closing, 0);
    bench.open();
    assert_eq!(bench.pump().len(), JOBS_MAX);
    assert!(bench.target.is_idle());
    bench.write(0, &sectors(7, 1));
}
