//! NICs that come, go and change, and what is said unasked.

use super::*;
use initiator::frame::Directive;

fn advertisement(bench: &Bench, nic: NicId, to: MacAddr) -> Option<Reply> {
    let mut head = vec![0xA5; HEAD_MAX];
    let len = bench.target.advertise(nic, to, &mut head)?;
    Some(Reply::parse(head[..len].to_vec()).unwrap())
}

#[test]
fn replies_leave_by_the_nic_of_their_request() {
    let mut bench = Bench::new();
    bench.shut();
    for n in 0..6 {
        let nic = if n % 3 == 0 { JUMBO } else { SMALL };
        bench.send(nic, ALICE, &Ask::read(n, 1));
    }
    bench.open();
    // `check` holds each reply against the NIC its request came in on.
    let nics: Vec<NicId> = bench.pump().iter().map(|(nic, _)| *nic).collect();
    assert_eq!(nics, [JUMBO, SMALL, SMALL, JUMBO, SMALL, SMALL]);
}

#[test]
fn a_nic_that_goes_takes_its_replies_with_it_and_nothing_else() {
    let mut bench = Bench::with(Settings {
        durable: true,
        ..settings()
    });
    bench.shut();
    bench.send(JUMBO, ALICE, &Ask::write(0, &sectors(1, 17)));
    bench.send(JUMBO, ALICE, &Ask::read(30, 17));
    bench.send(JUMBO, ALICE, &Ask::config(3, b"kept"));
    bench.send(JUMBO, ALICE, &Ask::flush());
    bench.send(SMALL, BOB, &Ask::read(50, 2));
    bench.send(JUMBO, ALICE, &Ask::reserve(1, &[host(ALICE)]));
    bench.target.set_nic(JUMBO, None);
    bench.open();
    let replies = bench.pump();
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].1.sectors(2).unwrap(), sectors(0, 2));
    assert!(bench.target.is_idle());
    // What was under way was done; what had not begun was not.
    same(&bench.stable()[..17 * 512], &sectors(1, 17));
    assert_eq!(bench.saved().unwrap().config, b"kept");
    assert_eq!(bench.saved().unwrap().reserved, []);
    bench.asked.clear();
    bench.target.set_nic(JUMBO, Some(nic(JUMBO)));
    let reply = bench.ask_from(JUMBO, ALICE, &Ask::read(0, 17));
    assert_eq!(reply.sectors(17).unwrap(), sectors(1, 17));
}

#[test]
fn replies_can_be_skipped_and_their_room_comes_back() {
    let mut bench = Bench::new();
    for _ in 0..2 * PARKED_MAX {
        bench.shut();
        bench.send(SMALL, ALICE, &Ask::read(0, 2));
        bench.open();
        bench.target.advance(bench.now);
        assert_eq!(bench.target.next_ready(), Some(SMALL));
        bench.target.skip();
        assert!(bench.target.is_idle() && bench.target.next_ready().is_none());
    }
}

#[test]
fn a_reply_that_waited_follows_what_became_of_its_nic() {
    let mut bench = Bench::new();
    bench.shut();
    bench.send(JUMBO, ALICE, &Ask::read(0, 17));
    bench.send(JUMBO, ALICE, &Ask::read(0, 2));
    bench.send(JUMBO, ALICE, &Ask::config(3, b"name"));
    let changed = NicInfo {
        mac: host(0x77),
        mtu: 1500,
        loopback: false,
    };
    bench.target.set_nic(JUMBO, Some(changed));
    bench.open();
    // From the new address; what is too long for the new frames does not leave.
    let replies = bench.pump();
    assert_eq!(replies.len(), 2, "{replies:?}");
    assert!(replies[0].1.sectors(2).is_some());
    assert!(bench.target.is_idle());
}

#[test]
fn an_advertisement_is_a_config_answer_to_nobody() {
    let mut bench = Bench::new();
    let reply = advertisement(&bench, JUMBO, broadcast()).unwrap();
    assert_eq!(bench.target.audience(), [MacAddr::BROADCAST]);
    assert_eq!(
        reply.bytes()[14..24],
        [0x18, 0, 0, SHELF as u8, SLOT, 1, 0, 0, 0, 0]
    );
    assert_eq!(
        (reply.destination(), reply.source()),
        (broadcast(), host(2))
    );
    let config = reply.config().unwrap();
    assert_eq!((config.sectors, config.buffers), (17, 64));
    assert_eq!(
        (config.firmware, config.version, config.sub),
        (0x4017, 1, 0)
    );
    assert_eq!(reply.bytes()[32..], [0; 28], "stale bytes");
    bench.ask(&Ask::config(3, b"name"));
    let reply = advertisement(&bench, SMALL, host(ALICE)).unwrap();
    assert_eq!(reply.config().unwrap().string, b"name");
    assert_eq!(
        (reply.destination(), reply.bytes().len()),
        (host(ALICE), 60)
    );
    bench.target.set_nic(SMALL, None);
    assert!(advertisement(&bench, SMALL, broadcast()).is_none());
    assert!(advertisement(&bench, NicId(5), broadcast()).is_none());
    let narrow = NicInfo {
        mtu: 548,
        ..nic(SMALL)
    };
    bench.ask_from(JUMBO, ALICE, &Ask::config(4, &[b'x'; 1024]));
    bench.target.set_nic(SMALL, Some(narrow));
    let reply = advertisement(&bench, SMALL, broadcast()).unwrap();
    assert!(reply.bytes().len() <= 562, "{reply:?}");
}

#[test]
fn an_advertisement_is_for_those_on_every_mask() {
    let walled = |masks: Vec<MacAddr>| Settings {
        policy: Policy {
            masks,
            ..Policy::default()
        },
        ..settings()
    };
    let mut bench = Bench::with(walled(vec![host(ALICE), host(BOB)]));
    assert_eq!(bench.target.audience(), [host(ALICE), host(BOB)]);
    bench.ask(&Ask::mask_edit(&[Directive::add(host(BOB))]));
    assert_eq!(bench.target.audience(), [host(BOB)]);
    // A wall that was built around other hosts than the wire's list names.
    let mut other = Bench::with(walled(vec![host(CAROL)]));
    other.target.state = bench.target.state.clone();
    assert_eq!(other.target.audience(), []);
    let mut open = Bench::new();
    open.ask(&Ask::mask_edit(&[Directive::add(host(ALICE))]));
    assert_eq!(open.target.audience(), [host(ALICE)]);
}

#[test]
fn another_size_is_news_once() {
    let mut bench = Bench::new();
    let bounds = |sectors| Bounds {
        start: START as u64,
        sectors,
    };
    assert!(!bench.target.resize(Instant::now(), bounds(SECTORS)));
    assert!(bench.target.resize(Instant::now(), bounds(10)));
    assert!(!bench.target.resize(Instant::now(), bounds(10)));
    assert_eq!(registers(&bench.ask(&Ask::read(10, 1))), (0x41, 0x10, 1));
    assert!(bench.ask(&Ask::read(9, 1)).sectors(1).is_some());
}

#[test]
fn reads_under_way_outlive_the_nics_with_long_frames() {
    let mut bench = Bench::new();
    bench.shut();
    // A frame and its resends, which wait for what the first brings.
    for _ in 0..4 {
        bench.send(JUMBO, ALICE, &Ask::read(0, 17));
    }
    bench.target.set_nic(JUMBO, None);
    bench.target.set_nic(SMALL, None);
    bench.open();
    bench.target.advance(bench.now);
    assert!(bench.target.next_ready().is_some());
}
