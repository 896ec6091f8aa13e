//! When a write is acknowledged, and when it is on stable storage: the write
//! cache, `-s`, memory that does not survive, FLUSH, age, room, a disk that fails.

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

fn is_write(job: &Job) -> bool {
    matches!(job, Job::Write(_))
}

fn is_save(job: &Job) -> bool {
    matches!(job, Job::Save { .. })
}

fn is_sync(job: &Job) -> bool {
    matches!(job, Job::Sync)
}

/// A bench whose cache holds this many dirty blocks and little besides.
fn small(dirty_max: u32, parked_max: usize) -> Bench {
    let room = Room {
        slots: dirty_max + 2,
        dirty_max,
        parked_max,
        ..Room::default()
    };
    Bench::with_room(settings(), room)
}

#[test]
fn a_write_is_acknowledged_at_once_and_reaches_the_disk_when_it_is_idle_or_old() {
    let mut bench = Bench::new();
    let got = bench.send(SMALL, ALICE, &Ask::write(0, &sectors(1, 2)));
    assert!(matches!(got, Got::Reply(_)), "{got:?}");
    assert!(bench.pump().is_empty());
    same(&bench.on_disk(), &sectors(0, 64));
    bench.pass_time(IDLE_FLUSH - Duration::from_millis(1));
    same(&bench.on_disk(), &sectors(0, 64));
    bench.pass_time(Duration::from_millis(1));
    same(&bench.stable()[..1024], &sectors(1, 2));

    // Under a load that never pauses age decides.
    bench.write(8, &sectors(2, 2));
    let written = bench.now;
    while bench.stable()[8 * 512..10 * 512] != sectors(2, 2) {
        let age = bench.now - written;
        assert!(age < MAX_DIRTY_AGE, "not on stable storage after {age:?}");
        bench.pass_time(Duration::from_millis(100));
        bench.write(40, &sectors(3, 2));
    }
    let age = bench.now - written;
    assert!(age >= MAX_DIRTY_AGE / 4, "written back after {age:?} alone");
    assert_eq!(bench.bytes()[40 * 512..42 * 512], sectors(3, 2));
}

#[test]
fn what_is_written_again_and_again_does_not_stay_young() {
    let mut bench = Bench::new();
    let start = bench.now;
    while bench.stable()[..512] == sectors(0, 1) {
        assert!(bench.now - start < MAX_DIRTY_AGE);
        bench.write(0, &sectors(1, 1));
        bench.pass_time(Duration::from_millis(50));
    }
}

#[test]
fn memory_that_does_not_survive_is_not_enough_for_an_acknowledgement() {
    let mut bench = Bench::writing_through();
    bench.shut();
    for n in 0..4 {
        let got = bench.send(SMALL, ALICE, &Ask::write(16 * n, &sectors(1, 2)));
        assert!(matches!(got, Got::Parked), "{got:?}");
    }
    assert!(
        bench.pump().is_empty(),
        "acknowledged before the disk has it"
    );
    // Whoever reads sees them all the same.
    let got = bench.send(SMALL, BOB, &Ask::read(16, 2));
    assert!(matches!(got, Got::Reply(r) if r.sectors(2) == Some(&sectors(1, 2))));
    let mut acknowledged = 0;
    while acknowledged < 4 {
        bench.pass(is_write);
        for (_, reply) in bench.pump() {
            assert_eq!(registers(&reply), (0x40, 0, 0));
            let at = reply.ata().unwrap().lba as usize * 512;
            same(&bench.on_disk()[at..at + 1024], &sectors(1, 2));
            acknowledged += 1;
        }
    }
    assert_eq!(
        bench.medium.syncs.load(Ordering::Relaxed),
        0,
        "no sync asked"
    );
    bench.open();
    assert_eq!(registers(&bench.ask(&Ask::flush())), (0x40, 0, 0));
    same(&bench.stable(), &bench.on_disk());
}

#[test]
fn a_durable_write_is_acknowledged_after_the_sync_and_one_sync_serves_all() {
    let mut bench = Bench::with(durable());
    bench.shut();
    for n in 0..16 {
        let got = bench.send(SMALL, ALICE, &Ask::write(2 * n, &sectors(n as u8 + 1, 2)));
        assert!(matches!(got, Got::Parked));
    }
    assert!(bench.pump().is_empty());
    // Neighbours go together.
    bench.pass(is_write);
    assert!(bench.pump().is_empty(), "acknowledged before the sync");
    assert!(!bench.desk.borrow_mut().pass(is_write), "in pieces");
    let mut acknowledged = 0;
    while bench.desk.borrow_mut().pass(is_sync) {
        for (_, reply) in bench.pump() {
            assert_eq!(registers(&reply), (0x40, 0, 0));
            let at = reply.ata().unwrap().lba as usize * 512;
            same(
                &bench.stable()[at..at + 1024],
                &sectors(reply.ata().unwrap().lba as u8 / 2 + 1, 2),
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
fn a_durable_write_that_comes_during_a_sync_waits_for_the_next() {
    let mut bench = Bench::with(durable());
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::write(0, &sectors(1, 2)));
    bench.pump();
    bench.pass(is_write);
    bench.pump();
    // Its sync is under way.
    bench.send(SMALL, BOB, &Ask::write(32, &sectors(2, 2)));
    bench.pump();
    bench.pass(is_write);
    bench.pump();
    bench.pass(is_sync);
    let replies = bench.pump();
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].1.destination(), host(ALICE));
    bench.pass(is_sync);
    assert_eq!(bench.pump().len(), 1);
    same(&bench.stable()[32 * 512..34 * 512], &sectors(2, 2));
}

fn trim(lba: u8, count: u8) -> Ask {
    let registers = Ata {
        feature: 1,
        count: 1,
        opcode: opcode::DATA_SET_MANAGEMENT,
        ..Ata::default()
    };
    let mut ranges = sectors(0, 1);
    ranges[..8].copy_from_slice(&[lba, 0, 0, 0, 0, 0, count, 0]);
    Ask::ata(registers, &ranges)
}

#[test]
fn a_durable_trim_is_synced_too() {
    let mut bench = Bench::with(durable());
    bench.write(4, &sectors(9, 2));
    let reply = bench.ask(&trim(4, 1));
    assert_eq!(registers(&reply), (0x40, 0, 0));
    assert_eq!(
        bench.stable()[4 * 512..6 * 512],
        [sectors(0, 1), sectors(9, 1)].concat()
    );
}

#[test]
fn a_durable_write_waits_while_the_disk_fails_and_no_longer_than_patience() {
    let mut bench = Bench::with(durable());
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    let start = bench.now;
    let reply = bench.ask_patiently(&Ask::write(0, &sectors(1, 2)));
    assert_eq!(registers(&reply), (0x61, 4, 2));
    // Each write that the disk took before it was given up was progress.
    let most = IO_PATIENCE + Duration::from_secs(2);
    assert!((IO_PATIENCE..most).contains(&(bench.now - start)));

    // A failure that passes costs the write nothing but time.
    let mut bench = Bench::with(durable());
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    let got = bench.send(SMALL, ALICE, &Ask::write(0, &sectors(1, 2)));
    assert!(matches!(got, Got::Parked));
    assert!(bench.pump().is_empty());
    bench.medium.sync_fails.store(false, Ordering::Relaxed);
    let replies = bench.wait();
    assert_eq!(registers(&replies[0].1), (0x40, 0, 0));
    same(&bench.stable()[..1024], &sectors(1, 2));
    assert!(!bench.target.volume().is_degraded());
}

#[test]
fn after_a_failed_sync_all_since_the_last_good_one_is_written_again() {
    let mut bench = Bench::new();
    bench.write(0, &sectors(1, 2));
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    assert_eq!(registers(&bench.ask(&Ask::flush())), (0x61, 4, 0));
    // The kernel has dropped what it could not write, and reports that once.
    bench
        .medium
        .file
        .write_at(&sectors(0, 2), START as u64)
        .unwrap();
    bench.medium.sync_fails.store(false, Ordering::Relaxed);
    let reply = bench.ask_patiently(&Ask::flush());
    assert_eq!(registers(&reply), (0x40, 0, 0));
    same(&bench.stable()[..1024], &sectors(1, 2));
}

#[test]
fn a_disk_that_takes_no_writes_is_left_to_readers_and_comes_back_by_itself() {
    for (writes, syncs) in [(true, false), (false, true)] {
        let mut bench = Bench::new();
        bench.write(0, &sectors(1, 2));
        let broken = |bench: &Bench, is: bool| {
            bench
                .medium
                .write_fails
                .store(is && writes, Ordering::Relaxed);
            bench
                .medium
                .sync_fails
                .store(is && syncs, Ordering::Relaxed);
        };
        broken(&bench, true);
        let mut rounds = 0;
        while !bench.target.volume().is_degraded() {
            // Until then writes are taken, and flushes told the truth. Failed
            // writes are a matter of their sectors, up to a part of the cache.
            let lba = if writes {
                [8, 16, 24][rounds.min(2)]
            } else {
                8
            };
            bench.write(lba, &sectors(rounds as u8, 2));
            assert_eq!(registers(&bench.ask_patiently(&Ask::flush())), (0x61, 4, 0));
            rounds += 1;
            assert!(rounds <= 3, "not given up");
        }
        assert_eq!(rounds, 3);
        for ask in [
            Ask::write(0, &sectors(7, 2)),
            Ask::write(32, &sectors(7, 2)),
        ] {
            let got = bench.send(SMALL, BOB, &ask);
            assert!(
                matches!(&got, Got::Reply(r) if registers(r) == (0x61, 4, 2)),
                "{got:?}"
            );
        }
        assert_eq!(registers(&bench.ask(&trim(4, 1))), (0x61, 4, 1));
        let read = bench.ask(&Ask::read(0, 2));
        assert_eq!(read.sectors(2).unwrap(), sectors(1, 2));
        let read = bench.ask(&Ask::read(32, 2));
        assert_eq!(read.sectors(2).unwrap(), sectors(0, 2));
        assert_eq!(registers(&bench.ask_patiently(&Ask::flush())), (0x61, 4, 0));

        broken(&bench, false);
        let before = bench.now;
        bench.settle();
        assert!(!bench.target.volume().is_degraded());
        assert!(bench.now - before <= Duration::from_secs(5));
        assert_eq!(bench.stable()[..1024], sectors(1, 2));
        let last = if writes { 24 } else { 8 };
        assert_eq!(bench.stable()[last * 512..(last + 2) * 512], sectors(2, 2));
        bench.write(32, &sectors(7, 2));
        assert_eq!(registers(&bench.ask(&Ask::flush())), (0x40, 0, 0));
        assert_eq!(bench.stable()[32 * 512..34 * 512], sectors(7, 2));
    }
}

#[test]
fn a_flush_covers_all_that_was_acknowledged_before_it() {
    // AoEde answered at once and synced nothing.
    let mut bench = Bench::new();
    bench.write(0, &sectors(1, 2));
    same(&bench.stable(), &sectors(0, 64));
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::flush());
    assert!(
        bench.pump().is_empty(),
        "answered before anything was written"
    );
    // While that is written back the same sectors and others are written anew.
    bench.write(0, &sectors(2, 1));
    bench.pass(is_write);
    assert!(bench.pump().is_empty(), "answered before the sync");
    // While the first sync is under way another write is acknowledged: the next
    // flush is not served by that sync.
    bench.write(8, &sectors(3, 2));
    bench.send(SMALL, BOB, &Ask::flush());
    bench.pass(is_sync);
    let replies = bench.pump();
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].1.destination(), host(ALICE));
    same(&bench.stable()[..1024], &sectors(1, 2));
    let mut replies = Vec::new();
    while bench.desk.borrow_mut().pass(|_| true) {
        replies.extend(bench.pump());
    }
    assert_eq!(replies.len(), 1);
    assert_eq!(registers(&replies[0].1), (0x40, 0, 0));
    let first = [sectors(2, 1), sectors(1, 1)].concat();
    assert_eq!(bench.stable()[..1024], first);
    assert_eq!(bench.stable()[8 * 512..10 * 512], sectors(3, 2));
}

#[test]
fn a_flush_does_not_wait_for_what_comes_after_it() {
    let mut bench = Bench::new();
    bench.write(0, &sectors(1, 2));
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::flush());
    bench.pump();
    for n in 0..50 {
        // A load that never ends, also on the same sectors.
        bench.write(0, &sectors(n, 2));
        bench.write(16, &sectors(n, 2));
        bench.desk.borrow_mut().pass(|_| true);
        if !bench.pump().is_empty() {
            return;
        }
    }
    panic!("the flush starves");
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
    assert_eq!(bench.switched_off(), [host(ALICE)]);
    bench.write(2, &sectors(2, 2));
    same(&bench.stable()[1024..2048], &sectors(2, 2));
    // Again, which changes nothing and is answered all the same.
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    assert_eq!(registers(&bench.ask(&set_features(ON))), (0x40, 0, 0));
    assert!(cache_is_on(&mut bench));
    assert_eq!(bench.switched_off(), []);
    bench.write(4, &sectors(3, 2));
    same(&bench.stable()[2048..3072], &sectors(0, 2));
    for feature in (0..=255).filter(|f| ![ON, OFF].contains(f)) {
        assert_eq!(registers(&bench.ask(&set_features(feature))), (0x41, 4, 0));
    }
    assert!(bench.target.changes.is_empty());
}

impl Bench {
    /// Whose write cache is off, as the state's file says.
    fn switched_off(&self) -> Vec<MacAddr> {
        let saved = self.saved().unwrap_or_default();
        saved.write_cache_off.as_slice().to_vec()
    }

    /// Sends a request from this address and waits for its reply.
    fn ask_as(&mut self, source: MacAddr, ask: &Ask) -> (u8, u8, u8) {
        let bytes = self.encode(SMALL, ALICE, ask);
        let bytes = [&bytes[..6], &source.0, &bytes[12..]].concat();
        match self.hand(SMALL, &bytes) {
            Got::Reply(reply) => registers(&reply),
            Got::Parked => registers(&self.wait()[0].1),
            other => panic!("{other:?} instead of a reply"),
        }
    }

    /// Whether a write of this host is on stable storage when it is acknowledged.
    fn is_durable_for(&mut self, nic: NicId, from: u8, fill: u8) -> bool {
        self.settle();
        let reply = self.ask_from(nic, from, &Ask::write(8, &sectors(fill, 1)));
        assert_eq!(registers(&reply), (0x40, 0, 0));
        let stable = self.stable()[8 * 512..9 * 512] == sectors(fill, 1);
        let page = self.ask_from(nic, from, &Ask::identify());
        let page = Identify::parse(page.sectors(1).unwrap()).unwrap();
        assert_eq!(
            page.word(85) & 1 << 5 == 0,
            stable,
            "IDENTIFY says the other"
        );
        stable
    }
}

#[test]
fn a_host_switches_the_write_cache_off_for_itself_alone() {
    // One frame of anyone made everyone's writes 30 times slower.
    let mut bench = Bench::new();
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    assert!(bench.is_durable_for(SMALL, ALICE, 1));
    assert!(bench.is_durable_for(JUMBO, ALICE, 2));
    assert!(!bench.is_durable_for(SMALL, BOB, 3));
    assert!(!bench.is_durable_for(JUMBO, CAROL, 4));
    // Nobody else switches it on again.
    for feature in [ON, OFF, ON] {
        let reply = bench.ask_from(SMALL, BOB, &set_features(feature));
        assert_eq!(registers(&reply), (0x40, 0, 0));
        assert!(bench.is_durable_for(SMALL, ALICE, feature));
    }
    assert!(!bench.is_durable_for(SMALL, BOB, 5));
    assert_eq!(bench.switched_off(), [host(ALICE)]);
    // The same for a TRIM, which is a write.
    bench.shut();
    let got = bench.send(SMALL, ALICE, &trim(8, 1));
    assert!(matches!(got, Got::Parked));
    bench.open();
    bench.wait();
    assert_eq!(bench.stable()[8 * 512..9 * 512], sectors(0, 1));
}

#[test]
fn an_order_to_switch_off_makes_nobody_else_wait() {
    let mut bench = Bench::new();
    bench.shut();
    let got = bench.send(SMALL, ALICE, &set_features(OFF));
    assert!(matches!(got, Got::Parked));
    // While it waits for its sync, and while it waits to be saved.
    for fill in 1..3 {
        let got = bench.send(SMALL, BOB, &Ask::write(0, &sectors(fill, 1)));
        assert!(matches!(got, Got::Reply(_)), "{got:?}");
        let got = bench.send(SMALL, ALICE, &Ask::write(8, &sectors(fill, 1)));
        assert!(matches!(got, Got::Parked), "{got:?}");
        loop {
            bench.target.advance(bench.now);
            if !bench.desk.borrow_mut().pass(|job| !is_save(job)) {
                break;
            }
        }
    }
    bench.pass(is_save);
    bench.open();
    while !bench.asked.is_empty() {
        bench.wait();
    }
    assert!(bench.target.changes.is_empty());
}

#[test]
fn the_write_cache_is_off_for_64_hosts_and_no_more() {
    let mut bench = Bench::new();
    let mac = |n: u8| MacAddr([2, 9, 0, 0, 0, n]);
    for n in 0..63 {
        assert_eq!(bench.ask_as(mac(n), &set_features(OFF)), (0x40, 0, 0));
    }
    // Two come for the last place at the same time.
    bench.shut();
    for from in [ALICE, BOB] {
        let got = bench.send(SMALL, from, &set_features(OFF));
        assert!(matches!(got, Got::Parked));
    }
    bench.open();
    let mut replies = Vec::new();
    while !bench.asked.is_empty() {
        replies.extend(bench.wait());
    }
    let said: Vec<_> = replies.iter().map(|(_, reply)| registers(reply)).collect();
    assert_eq!(said, [(0x40, 0, 0), (0x41, 4, 0)]);
    assert!(bench.target.changes.is_empty());
    assert_eq!(bench.switched_off().len(), 64);
    assert!(bench.is_durable_for(SMALL, ALICE, 1));
    assert!(!bench.is_durable_for(SMALL, BOB, 2));
    // Refused, and no sync for it.
    let syncs = bench.medium.syncs.load(Ordering::Relaxed);
    let reply = bench.ask_from(SMALL, BOB, &set_features(OFF));
    assert_eq!(registers(&reply), (0x41, 4, 0));
    assert_eq!(bench.medium.syncs.load(Ordering::Relaxed), syncs);
    // Who has a place keeps it, until it gives it back.
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    assert_eq!(bench.ask_as(mac(7), &set_features(ON)), (0x40, 0, 0));
    let reply = bench.ask_from(SMALL, BOB, &set_features(OFF));
    assert_eq!(registers(&reply), (0x40, 0, 0));
    assert!(bench.is_durable_for(SMALL, BOB, 3));
}

#[test]
fn features_that_the_operator_denies_stay_as_they_are() {
    let mut bench = Bench::new();
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    let state = bench.saved().unwrap();
    let mut settings = settings();
    settings.policy.deny_features = true;
    let mut bench = Bench::with(settings);
    bench.target.state = state.clone();
    for from in [ALICE, BOB] {
        for feature in 0..=255 {
            let reply = bench.ask_from(SMALL, from, &set_features(feature));
            assert_eq!(registers(&reply), (0x41, 4, 0), "{feature:#x}");
        }
    }
    assert_eq!((&bench.target.state, bench.saved()), (&state, None));
    // What was promised before holds.
    assert!(bench.is_durable_for(SMALL, ALICE, 1));
    assert!(!bench.is_durable_for(SMALL, BOB, 2));
}

#[test]
fn a_cache_that_0_1_0_saved_as_off_is_off_for_everyone() {
    let mut bench = Bench::new();
    bench.target.state.write_cache = false;
    for (from, fill) in [(ALICE, 1), (BOB, 2)] {
        let reply = bench.ask_from(SMALL, from, &set_features(ON));
        assert_eq!(registers(&reply), (0x41, 4, 0));
        assert!(bench.is_durable_for(SMALL, from, fill));
    }
    // Who wants it off still has it when the operator switches it on.
    assert_eq!(registers(&bench.ask(&set_features(OFF))), (0x40, 0, 0));
    let saved = bench.saved().unwrap();
    assert!(!saved.write_cache);
    bench.target.state = WireState {
        write_cache: true,
        ..saved
    };
    assert!(bench.is_durable_for(SMALL, ALICE, 3));
    assert!(!bench.is_durable_for(SMALL, BOB, 4));
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
    // One waits for a slot, or for the disk since memory does not survive.
    for mut bench in [small(1, 4096), Bench::writing_through()] {
        bench.shut();
        let first = Ask::write(32, &sectors(9, 2));
        let at_once = matches!(bench.send(SMALL, ALICE, &first), Got::Reply(_));
        let got = bench.send(SMALL, ALICE, &Ask::write(0, &sectors(1, 2)));
        assert!(matches!(got, Got::Parked));
        // Through another NIC it is the same host.
        bench.send(JUMBO, ALICE, &set_features(OFF));
        // And one comes when the order is known and not carried out.
        let got = bench.send(SMALL, ALICE, &Ask::write(16, &sectors(2, 2)));
        assert!(matches!(got, Got::Parked));
        let (mut off, mut written) = (false, 0);
        loop {
            for (nic, reply) in bench.pump() {
                let lba = reply.ata().unwrap().lba as usize;
                let holds =
                    |lba: usize, fill| bench.stable()[lba * 512..][..1024] == sectors(fill, 2);
                if nic == JUMBO {
                    assert!(!at_once || holds(32, 9), "off, and not durable");
                    off = true;
                } else {
                    let fill = [(0, 1), (16, 2), (32, 9)].into_iter().find(|f| f.0 == lba);
                    assert!(holds(lba, fill.unwrap().1), "{lba} acknowledged too early");
                    written += 1;
                }
            }
            if !bench.desk.borrow_mut().pass(|_| true) {
                break;
            }
        }
        assert!(off && bench.asked.is_empty(), "{:?}", bench.asked);
        assert_eq!(written, if at_once { 2 } else { 3 });
        assert!(bench.target.is_idle());
        assert!(bench.target.changes.is_empty());
    }
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
    assert!(bench.target.changes.is_empty());
    bench.write(0, &sectors(1, 2));
    same(&bench.stable()[..1024], &sectors(0, 2));
}

#[test]
fn without_room_a_write_is_dropped_and_the_next_attempt_succeeds() {
    let mut bench = small(4, 4096);
    bench.shut();
    for n in 0..4 {
        let got = bench.send(SMALL, ALICE, &Ask::write(8 * n, &sectors(1, 2)));
        assert!(matches!(got, Got::Reply(_)), "{got:?}");
    }
    for n in 4..8 {
        let got = bench.send(SMALL, ALICE, &Ask::write(8 * n - 1, &sectors(2, 2)));
        assert!(matches!(got, Got::Parked), "{got:?}");
    }
    // Nothing passes what its own host has waiting, not even what would have a
    // place.
    for (host, lba) in [(ALICE, 0), (ALICE, 60), (BOB, 60)] {
        let write = Ask::write(lba, &sectors(3, 2));
        assert_eq!(bench.dropped(SMALL, host, &write), Dropped::NoRoom);
    }
    assert_eq!(bench.target.counters().drops(Dropped::NoRoom), 3);
    let got = bench.send(SMALL, BOB, &Ask::write(2, &sectors(4, 2)));
    assert!(matches!(got, Got::Reply(_)), "{got:?}");
    // Receiving goes on: what needs no room is answered.
    for ask in [
        Ask::config(0, b""),
        Ask::identify(),
        Ask::mask_read(),
        Ask::read(0, 2),
    ] {
        assert!(matches!(bench.send(SMALL, BOB, &ask), Got::Reply(_)));
    }
    let mut replies = bench.pump();
    while replies.is_empty() {
        bench.pass(|_| true);
        replies = bench.pump();
    }
    let write = Ask::write(60, &sectors(3, 2));
    assert!(matches!(
        bench.send(SMALL, BOB, &write),
        Got::Parked | Got::Reply(_)
    ));
    bench.open();
    bench.settle();
    bench.pump();
    assert!(bench.asked.is_empty(), "{:?}", bench.asked);
    let bytes = bench.bytes();
    same(&bytes[60 * 512..62 * 512], &sectors(3, 2));
    same(&bytes[..1024], &sectors(1, 2));
    same(&bytes[55 * 512..57 * 512], &sectors(2, 2));
    let written = bench.target.counters().sectors_written;
    assert_eq!(written, 20, "a dropped write was counted");
}

#[test]
fn what_waits_for_room_is_told_when_the_disk_fails() {
    for settings in [settings(), durable()] {
        let room = Room {
            slots: 3,
            dirty_max: 1,
            ..Room::default()
        };
        let mut bench = Bench::with_room(settings, room);
        bench.medium.sync_fails.store(true, Ordering::Relaxed);
        bench.send(SMALL, ALICE, &Ask::write(0, &sectors(1, 2)));
        bench.pump();
        let start = bench.now;
        for ask in [
            Ask::write(16, &sectors(2, 2)),
            trim(0, 2),
            Ask::write(0, &sectors(3, 2)),
        ] {
            assert!(matches!(bench.send(SMALL, BOB, &ask), Got::Parked));
        }
        while !bench.asked.is_empty() {
            for (_, reply) in bench.wait() {
                assert_eq!(registers(&reply).0, 0x61);
            }
        }
        let most = IO_PATIENCE + Duration::from_secs(2);
        assert!((IO_PATIENCE..most).contains(&(bench.now - start)));
        bench.medium.sync_fails.store(false, Ordering::Relaxed);
        let bytes = bench.bytes();
        assert_eq!(bytes[..1024], sectors(1, 2));
        assert_eq!(bytes[16 * 512..18 * 512], sectors(0, 2));
        bench.write(16, &sectors(2, 2));
    }
}

#[test]
fn so_many_requests_may_wait_and_no_more() {
    let room = Room {
        parked_max: 64 << 20,
        ..Room::default()
    };
    let mut bench = Bench::with_room(durable(), room);
    bench.shut();
    for n in 0..PARKED_MAX {
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
        trim(0, 1),
    ] {
        assert_eq!(bench.dropped(SMALL, ALICE, &ask), Dropped::NoRoom);
    }
    assert!(bench.target.changes.is_empty());
    bench.open();
    assert_eq!(bench.pump().len(), PARKED_MAX);
    assert!(bench.target.is_idle());
    bench.write(0, &sectors(7, 1));
}

#[test]
fn at_the_end_all_that_was_acknowledged_is_on_stable_storage() {
    for mut bench in [Bench::new(), Bench::writing_through(), small(2, 1 << 20)] {
        for n in 0..8 {
            bench.write(8 * n, &sectors(n as u8 + 1, 2));
        }
        bench.target.drain();
        bench.settle();
        assert!(bench.target.is_idle());
        for n in 0..8 {
            same(
                &bench.stable()[n * 4096..][..1024],
                &sectors(n as u8 + 1, 2),
            );
        }
    }
    // And it does not end while that cannot be.
    let mut bench = Bench::new();
    bench.write(0, &sectors(1, 2));
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    bench.target.drain();
    for _ in 0..20 {
        bench.pass_time(Duration::from_secs(1));
        assert!(!bench.target.is_idle());
    }
}

#[test]
fn what_a_flush_could_not_write_is_written_though_nobody_asks_again() {
    let mut bench = Bench::new();
    bench.settle();
    bench.write(0, &sectors(1, 2));
    bench.medium.write_fails.store(true, Ordering::Relaxed);
    assert_eq!(registers(&bench.ask(&Ask::flush())), (0x61, 4, 0));
    bench.medium.write_fails.store(false, Ordering::Relaxed);
    // Not idle yet when the disk is tried again, and no one is waiting.
    bench.pass_time(IDLE_FLUSH / 2);
    bench.ask(&Ask::read(8, 2));
    bench.settle();
    same(&bench.stable()[..1024], &sectors(1, 2));
}

#[test]
fn a_discard_does_not_wait_for_those_who_only_verify() {
    let mut bench = Bench::new();
    bench.settle();
    bench.shut();
    let verify = Ata {
        count: 2,
        opcode: 0x42,
        ..Ata::default()
    };
    bench.send(SMALL, ALICE, &Ask::ata(verify, &[]));
    bench.send(SMALL, BOB, &trim(0, 2));
    bench.pump();
    bench.pass(|job| matches!(job, Job::Discard(_)));
    assert_eq!(bench.pump().len(), 1);
}

#[test]
fn a_discard_takes_no_block_out_that_a_read_holds() {
    let mut bench = Bench::new();
    bench.write(0, &sectors(1, 2));
    bench.settle();
    bench.shut();
    bench.send(SMALL, ALICE, &trim(0, 2));
    bench.pump();
    // Other sectors of the same block, while the discard is under way.
    bench.send(SMALL, BOB, &Ask::read(2, 2));
    bench.pass(|job| matches!(job, Job::Discard(_)));
    bench.pump();
    // The slot goes to another block, and the block gets another slot.
    bench.write(40, &sectors(2, 2));
    bench.write(0, &sectors(3, 2));
    bench.open();
    bench.pump();
    assert!(bench.asked.is_empty(), "{:?}", bench.asked);
    same(&bench.bytes()[..1024], &sectors(3, 2));
}

#[test]
fn what_was_cut_off_the_disk_is_not_remembered_when_it_grows_again() {
    let mut bench = Bench::new();
    bench.write(32, &sectors(1, 2));
    bench.write(42, &sectors(1, 2));
    bench.settle();
    let bounds = |sectors| Bounds {
        start: START as u64,
        sectors,
    };
    bench.target.resize(Instant::now(), bounds(33));
    let rest = START + 33 * 512..START + SECTORS as usize * 512;
    let zeros = vec![0; rest.len()];
    bench.medium.write_at(&zeros, rest.start as u64).unwrap();
    bench.target.resize(Instant::now(), bounds(SECTORS));
    let read = bench.ask(&Ask::read(32, 2));
    let expected = [sectors(1, 1), sectors(0, 1)].concat();
    assert_eq!(read.sectors(2).unwrap(), expected);
    let read = bench.ask(&Ask::read(42, 2));
    assert_eq!(read.sectors(2).unwrap(), sectors(0, 2));
}
