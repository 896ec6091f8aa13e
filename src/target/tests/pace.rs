//! Replies at an initiator's own pace, once it has spoken of congestion.

use super::tags::COUNTING;
use super::*;

/// How many replies come within a time, at most 1 ms late.
fn within(bench: &mut Bench, time: Duration) -> usize {
    let end = bench.now + time;
    let mut replies = bench.pump().len();
    while let Some(at) = bench.target.deadline().filter(|at| *at <= end) {
        bench.now = bench.now.max(at);
        replies += bench.pump().len();
    }
    bench.now = end;
    replies
}

#[test]
fn congestion_delays_replies_to_its_sender_alone() {
    let mut bench = Bench::new();
    for number in 0..20 {
        let number = number.to_string();
        bench.extend(SMALL, ALICE, &["congestion", &number]);
    }
    // At 1 MB/s a reply of 1060 bytes takes about a millisecond.
    let read = Ask::read(0, 2);
    let mut parked = 0;
    for n in 0..50 {
        match bench.tagged(SMALL, ALICE, n, &read) {
            Got::Reply(_) => assert!(n < 3),
            Got::Parked => parked += 1,
            other => panic!("{other:?}"),
        }
        let beside = bench.send(SMALL, BOB, &read);
        assert!(matches!(beside, Got::Reply(_)));
        let beside = bench.send(JUMBO, ALICE, &read);
        assert!(matches!(beside, Got::Reply(_)));
    }
    assert!(parked >= 47);
    // Discovery does not wait.
    bench.ask(&Ask::config(0, b""));
    assert!(!bench.target.is_idle());
    let first = within(&mut bench, Duration::from_millis(20));
    assert!((17..21).contains(&first), "{first}");
    let rest = within(&mut bench, Duration::from_millis(40));
    assert_eq!(first + rest, parked);
    assert!(bench.target.is_idle());
}

#[test]
fn replies_that_come_from_the_disk_wait_for_nobody_elses_pace() {
    let mut bench = Bench::new();
    for number in 0..20 {
        let number = number.to_string();
        bench.extend(SMALL, ALICE, &["congestion", &number]);
    }
    for n in 0..20 {
        bench.tagged(SMALL, ALICE, n, &Ask::read(0, 2));
    }
    // Of these hosts nothing is remembered on that NIC.
    bench.shut();
    let others = [(SMALL, BOB), (JUMBO, ALICE), (JUMBO, CAROL)];
    for (nic, from) in others {
        let got = bench.send(nic, from, &Ask::read(32, 2));
        assert!(matches!(got, Got::Parked), "{got:?}");
    }
    bench.open();
    let replies = bench.pump();
    let told = |(nic, from)| {
        let answered = |(on, reply): &(NicId, Reply)| {
            *on == nic && reply.destination() == host(from) && reply.ata().unwrap().lba == 32
        };
        replies.iter().any(answered)
    };
    assert!(others.into_iter().all(told), "{replies:?}");
}

#[test]
fn beyond_the_bound_frames_are_dropped_and_come_again() {
    let mut bench = Bench::new();
    bench.extend(SMALL, ALICE, COUNTING);
    for number in 0..20 {
        let number = number.to_string();
        bench.extend(SMALL, ALICE, &["congestion", &number]);
    }
    let mut dropped = 0;
    for n in 1..200 {
        match bench.tagged(SMALL, ALICE, n, &Ask::read(0, 2)) {
            Got::Dropped(why) => {
                assert_eq!(why, Dropped::Paced);
                dropped += 1;
            }
            Got::Reply(_) | Got::Parked => {}
            other => panic!("{other:?}"),
        }
    }
    assert!((130..137).contains(&dropped), "{dropped}");
    // A read whose reply waits is in hand.
    within(&mut bench, Duration::from_millis(1));
    bench.twin(40, &Ask::read(0, 2));
    // Writes are dropped before anything is done, or done once.
    let write = |n: u32| Ask::write(u64::from(n % 64), &sectors(n as u8, 1));
    let mut left: Vec<u32> = (300..400).collect();
    for _ in 0..1000 {
        left.retain(|n| match bench.tagged(SMALL, ALICE, *n, &write(*n)) {
            Got::Dropped(Dropped::Paced) => true,
            Got::Reply(_) | Got::Parked | Got::Dropped(Dropped::InHand) => false,
            other => panic!("{other:?}"),
        });
        within(&mut bench, Duration::from_millis(10));
    }
    assert_eq!((left.len(), bench.duplicates()), (0, 0));
    assert_eq!(bench.target.counters().sectors_written, 100);
    // In the end there is no limit any more.
    bench.now += Duration::from_secs(20);
    for n in 500..800 {
        bench.answered(n, &Ask::read(0, 2));
    }
}

#[test]
fn replies_that_wait_borrow_nothing() {
    let mut bench = Bench::new();
    bench.write(0, &sectors(3, 2));
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    for number in 0..20 {
        let number = number.to_string();
        bench.extend(SMALL, ALICE, &["congestion", &number]);
    }
    for n in 1..40 {
        bench.tagged(SMALL, ALICE, n, &Ask::read(0, 2));
    }
    // What they show is what was there when they were asked.
    bench.ask_from(SMALL, BOB, &Ask::write(0, &sectors(4, 2)));
    let end = bench.now + Duration::from_secs(1);
    let mut replies = Vec::new();
    while let Some(at) = bench.target.deadline().filter(|at| *at <= end) {
        bench.now = bench.now.max(at);
        replies.extend(bench.pump());
    }
    assert!(replies.len() > 30);
    for (_, reply) in replies {
        same(reply.sectors(2).unwrap(), &sectors(3, 2));
        assert!(reply.crc_matches(2));
    }
}

#[test]
fn a_stop_waits_for_nobodys_pace() {
    let mut bench = Bench::new();
    bench.shut();
    let read = |lba: u64| Ask::read(lba, 2);
    for n in 1..30 {
        let got = bench.tagged(SMALL, ALICE, n, &read(u64::from(n)));
        assert!(matches!(got, Got::Parked));
    }
    for number in 0..20 {
        let number = number.to_string();
        bench.extend(SMALL, ALICE, &["congestion", &number]);
    }
    for n in 30..60 {
        bench.tagged(SMALL, ALICE, n, &Ask::identify());
    }
    assert!(!bench.target.is_idle());
    bench.target.drain();
    bench.open();
    // However slowly it wants its replies, they do not make the end late.
    let replies = bench.pump().len();
    assert!(replies > 50, "{replies}");
    assert!(bench.target.is_idle());
}
