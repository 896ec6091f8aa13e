//! Changes that come without end, and a state directory that hangs: few saves,
//! few lines, little that waits, and everything else goes on. The time is ours.

use std::cell::RefCell;
use std::sync::Once;

use super::super::saves::{CHANGES_HEADROOM, CHANGES_MAX, SAVE_INTERVAL, SAVES_AT_ONCE};
use super::*;
use crate::wire::ADMIN_MAX;
use initiator::frame::{Ata, Directive, opcode};

/// Places that a host has which is alone.
const ALONE: usize = CHANGES_MAX - CHANGES_HEADROOM;

fn is_save(job: &Job) -> bool {
    matches!(job, Job::Save { .. })
}

fn cache(feature: u8) -> Ask {
    let registers = Ata {
        feature,
        opcode: opcode::SET_FEATURES,
        ..Ata::default()
    };
    Ask::ata(registers, &[])
}

fn smart(feature: u8) -> Ask {
    let registers = Ata {
        feature,
        opcode: opcode::SMART,
        lba: 0xC2_4F00,
        ..Ata::default()
    };
    Ask::ata(registers, &[])
}

/// Changes of every kind, a new one for each number.
fn change(n: u32) -> Ask {
    let mac = || host(n as u8 | 1);
    match n % 8 {
        0 | 1 => Ask::config(4, &n.to_be_bytes()),
        2 => Ask::reserve(2, &[mac(), host(ALICE)]),
        3 => Ask::reserve(2, &[]),
        4 => Ask::mask_edit(&[Directive::add(host(ALICE)), Directive::add(mac())]),
        5 => Ask::mask_edit(&[Directive::delete(mac())]),
        6 => cache([0x02, 0x82][(n / 8 % 2) as usize]),
        _ => smart([0xD8, 0xD9][(n / 8 % 2) as usize]),
    }
}

#[test]
fn however_many_changes_come_a_few_saves_take_them() {
    let mut bench = Bench::new();
    let (mut saves, mut answered, mut dropped) = (Vec::new(), 0, 0);
    for n in 0..10_000u32 {
        // In a burst, then one in each millisecond.
        if n > 200 {
            bench.now += Duration::from_millis(1);
        }
        let string = n.to_be_bytes();
        match bench.send(SMALL, ALICE, &Ask::config(4, &string)) {
            Got::Parked => {}
            Got::Dropped(Dropped::NoRoom) => dropped += 1,
            other => panic!("{other:?}"),
        }
        for (_, reply) in bench.pump() {
            // Saved is what the reply says, or what came after it.
            let told = reply.config().unwrap().string.to_vec();
            assert!(bench.saved().unwrap().config >= told);
            answered += 1;
        }
        let begun = bench.desk.borrow().saves as usize;
        saves.resize(begun, bench.now);
        assert!(begun <= 55, "{begun} saves");
        assert!(bench.asked.len() <= CHANGES_MAX);
    }
    for (first, begin) in saves.iter().enumerate() {
        for (n, end) in saves[first..].iter().enumerate() {
            let least = SAVE_INTERVAL * (n as u32 + 1).saturating_sub(SAVES_AT_ONCE);
            assert!(
                *end - *begin >= least,
                "{} saves in {:?}",
                n + 1,
                *end - *begin
            );
        }
    }
    assert!(saves.len() >= 30, "{} saves", saves.len());
    // Each save takes all that waits for it.
    assert!(answered > 40 * ALONE, "{answered}");
    while !bench.asked.is_empty() {
        answered += bench.wait().len();
    }
    assert_eq!(answered + dropped, 10_000);
    // A change alone does not wait.
    bench.now += SAVE_INTERVAL;
    let got = bench.send(SMALL, ALICE, &Ask::config(4, b"alone"));
    assert!(matches!(got, Got::Parked));
    assert_eq!(bench.pump().len(), 1);
    assert_eq!(bench.saved().unwrap().config, b"alone");
}

#[test]
fn while_the_state_directory_hangs_little_waits_and_the_rest_goes_on() {
    let mut bench = Bench::new();
    bench.write(0, &sectors(7, 1));
    bench.shut();
    let mut parked = 0;
    for n in 0..20_000u32 {
        let [_, two, one, zero] = n.to_be_bytes();
        // From new addresses all the time, on frames as long as can be.
        let ask = change(n).padded(9014);
        let bytes = bench.encode(JUMBO, ALICE, &ask);
        let bytes = [&bytes[..6], &[2, 8, 0, two, one, zero], &bytes[12..]].concat();
        match bench.hand(JUMBO, &bytes) {
            Got::Parked => parked += 1,
            Got::Dropped(Dropped::NoRoom) => {}
            // What is as it should be already.
            Got::Reply(_) => {}
            other => panic!("{other:?}"),
        }
        // The disk works; only saves end never.
        while bench.desk.borrow_mut().pass(|job| !is_save(job)) {}
        bench.target.advance(bench.now);
        while bench.desk.borrow_mut().pass(|job| !is_save(job)) {}
        bench.now += Duration::from_micros(500);
        let waiting = bench.asked.len();
        assert!(waiting <= CHANGES_MAX, "{waiting} changes wait");
        assert!(
            bench.desk.borrow().kept.len() <= 1,
            "saves are one at a time"
        );
        if n % 1000 == 999 {
            for ask in [Ask::config(0, b""), Ask::mask_read(), Ask::reserve(0, &[])] {
                let got = bench.send(SMALL, BOB, &ask);
                assert!(matches!(got, Got::Reply(_)), "{ask:?}: {got:?}");
            }
            let got = bench.send(SMALL, BOB, &Ask::read(0, 1));
            assert!(matches!(got, Got::Reply(_)), "{got:?}");
            let got = bench.send(SMALL, BOB, &Ask::write(0, &sectors(7, 1)));
            assert!(matches!(got, Got::Reply(_)), "{got:?}");
        }
    }
    assert!((ALONE..=CHANGES_MAX).contains(&parked), "{parked}");
    // Of long frames no more is kept than means something: written out, a byte is
    // three characters or four.
    let kept = format!("{:?}", bench.target.changes).len() / 3;
    let most = CHANGES_MAX * ADMIN_MAX * 4 / 3;
    assert!(kept < most, "{kept} bytes");
    // It works again: all that waits is answered, and there is room for more.
    bench.open();
    while !bench.asked.is_empty() {
        bench.wait();
    }
    assert!(bench.target.changes.is_empty());
    let reply = bench.ask_from(SMALL, ALICE, &Ask::config(4, b"x"));
    assert_eq!(reply.error(), None);
}

#[test]
fn orders_to_switch_off_have_their_places_before_the_flush() {
    let mut bench = Bench::new();
    bench.shut();
    let mut parked = 0;
    for n in 0..1000u32 {
        match bench.send(SMALL, 10 + (n % 200) as u8, &cache(0x82)) {
            Got::Parked => parked += 1,
            got => assert!(matches!(got, Got::Dropped(Dropped::NoRoom)), "{got:?}"),
        }
        bench.target.advance(bench.now);
    }
    assert!((ALONE..=CHANGES_MAX).contains(&parked), "{parked}");
    // A flush that fails gives the places back.
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    bench.open();
    while !bench.asked.is_empty() {
        for (_, reply) in bench.wait() {
            assert_eq!(registers(&reply), (0x61, 4, 0));
        }
    }
    assert!(bench.target.changes.is_empty());
    assert_eq!(bench.saved(), None);
    // So does a NIC that goes.
    bench.medium.sync_fails.store(false, Ordering::Relaxed);
    bench.settle();
    bench.shut();
    let got = bench.send(JUMBO, ALICE, &cache(0x82));
    assert!(matches!(got, Got::Parked));
    bench.target.set_nic(JUMBO, None);
    bench.open();
    bench.settle();
    assert!(bench.pump().is_empty() && bench.target.changes.is_empty());
}

#[test]
fn a_host_that_changes_without_end_leaves_places_to_others() {
    let mut bench = Bench::new();
    bench.shut();
    let flood = |bench: &mut Bench| {
        let sent = (0..1000u32).filter(|n| {
            let got = bench.send(SMALL, ALICE, &change(*n));
            matches!(got, Got::Parked)
        });
        sent.count()
    };
    assert_eq!(flood(&mut bench), ALONE);
    for from in [BOB, CAROL] {
        for ask in [Ask::config(4, &[from]), cache(0x82)] {
            let got = bench.send(SMALL, from, &ask);
            assert!(matches!(got, Got::Parked), "{got:?}");
        }
    }
    assert_eq!(flood(&mut bench), 0);
    bench.open();
    while !bench.asked.is_empty() {
        bench.wait();
    }
    assert!(bench.target.changes.is_empty());
}

#[test]
fn at_an_orderly_end_changes_do_not_wait_for_their_time() {
    let mut bench = Bench::new();
    for n in 0..20 {
        bench.send(SMALL, ALICE, &Ask::config(4, &[n]));
        bench.target.advance(bench.now);
        while bench.target.has_work() {
            bench.target.advance(bench.now);
        }
    }
    assert!(bench.desk.borrow().saves <= SAVES_AT_ONCE);
    assert!(!bench.target.is_idle());
    bench.target.drain();
    let end = bench.now;
    while !bench.asked.is_empty() {
        assert!(!bench.pump().is_empty(), "changes wait for their time");
    }
    assert_eq!(bench.now, end);
    assert_eq!(bench.saved().unwrap().config, [19]);
}

thread_local! {
    /// What this thread has logged.
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Keeps log lines by the thread, which is the test, that wrote them.
struct Keeper;

impl log::Log for Keeper {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        LINES.with_borrow_mut(|lines| lines.push(record.args().to_string()));
    }

    fn flush(&self) {}
}

/// The lines of this test since it asked last.
fn lines() -> Vec<String> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Keeper).unwrap();
        log::set_max_level(log::LevelFilter::Info);
    });
    LINES.take()
}

#[test]
fn changes_are_told_in_one_short_line_a_second() {
    let mut bench = Bench::new();
    lines();
    bench.ask(&Ask::config(4, &[b'x'; 1024]));
    bench.target.advance(bench.now);
    let said = lines();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].starts_with("e7.3: config string is now \"xxxx"),
        "{said:?}"
    );
    assert!(
        said[0].ends_with("; changed by 02:00:00:00:00:0a"),
        "{said:?}"
    );
    // A flood of them.
    let mut count = 0;
    for n in 0..1000u32 {
        bench.now += Duration::from_millis(10);
        let string = [&n.to_be_bytes()[..], &[b'y'; 1000]].concat();
        bench.send(SMALL, ALICE, &Ask::config(4, &string));
        bench.pump();
        let said = lines();
        assert!(said.iter().all(|line| line.len() < 300), "{said:?}");
        count += said.len();
    }
    assert!((8..=11).contains(&count), "{count} lines in 10 s");
    // How many they were is told, also when nothing more comes.
    while !bench.asked.is_empty() {
        bench.wait();
    }
    bench.settle();
    let said = lines();
    assert!(
        said.last().unwrap().contains(" changes, the last by "),
        "{said:?}"
    );
    bench.settle();
    assert_eq!(lines(), [""; 0]);
    // What cannot be saved is no change.
    let mut bench = Bench::forgetful(settings());
    bench.ask(&Ask::config(4, b"x"));
    bench.settle();
    let said = lines();
    assert!(
        said.iter().all(|line| !line.contains("config string")),
        "{said:?}"
    );
}
