//! Config string, masks, reservation: what they answer, and that nobody hears
//! of a change before it is saved.

use super::*;
use initiator::frame::Directive;

fn is_save(job: &Job) -> bool {
    matches!(job, Job::Save { .. })
}

fn config_of(reply: &Reply) -> (Option<u8>, u8, Vec<u8>) {
    let config = reply.config().unwrap();
    (reply.error(), config.sub, config.string.to_vec())
}

#[test]
fn config_answers_and_silences_follow_the_table() {
    let mut bench = Bench::new();
    let string = |text: &[u8]| text.to_vec();
    // A read's own length means nothing, and junk may follow.
    for ask in [
        Ask::config(0, b""),
        Ask::config_raw(0, 1024, &[0xED; 1024]),
        Ask::config_raw(0, 0xFFFF, b""),
    ] {
        assert_eq!(config_of(&bench.ask(&ask)), (None, 0, vec![]));
    }
    let reply = bench.ask(&Ask::config(0, b""));
    let told = reply.config().unwrap();
    assert_eq!((told.buffers, told.firmware, told.version), (64, 0x4017, 1));
    assert_eq!(told.sectors, 2);

    assert_eq!(
        config_of(&bench.ask(&Ask::config(3, b"one"))),
        (None, 3, string(b"one"))
    );
    assert_eq!(
        config_of(&bench.ask(&Ask::config(3, b"one"))),
        (None, 3, string(b"one"))
    );
    let taken = (Some(4), 3, string(b"one"));
    assert_eq!(config_of(&bench.ask(&Ask::config(3, b"two"))), taken);
    assert_eq!(config_of(&bench.ask(&Ask::config(3, b""))), taken);
    assert_eq!(config_of(&bench.ask(&Ask::config(1, b"one"))).2, b"one");
    for test in [&b""[..], b"on", b"one ", b"One"] {
        assert_eq!(
            bench.dropped(SMALL, ALICE, &Ask::config(1, test)),
            Dropped::Silence
        );
    }
    for prefix in [&b""[..], b"o", b"one"] {
        assert_eq!(
            config_of(&bench.ask(&Ask::config(2, prefix))),
            (None, 2, string(b"one"))
        );
    }
    for prefix in [&b"n"[..], b"one "] {
        assert_eq!(
            bench.dropped(SMALL, ALICE, &Ask::config(2, prefix)),
            Dropped::Silence
        );
    }
    let replace = Ask::config_replace(b"on", b"two");
    assert_eq!(bench.dropped(SMALL, ALICE, &replace), Dropped::Silence);
    let replace = Ask::config_replace(b"one", b"two");
    assert_eq!(config_of(&bench.ask(&replace)), (None, 5, string(b"two")));
    assert_eq!(
        config_of(&bench.ask(&Ask::config(4, b"three"))),
        (None, 4, string(b"three"))
    );
    assert_eq!(bench.saved().unwrap().config, b"three");
    for sub in 6..16 {
        assert_eq!(
            config_of(&bench.ask(&Ask::config(sub, b"x"))),
            (Some(2), sub, vec![])
        );
    }
    assert_eq!(
        config_of(&bench.ask(&Ask::config(4, b""))),
        (None, 4, vec![])
    );
    assert_eq!(
        config_of(&bench.ask(&Ask::config(1, b""))),
        (None, 1, vec![])
    );
    assert_eq!(bench.saved().unwrap().config, b"");
}

#[test]
fn a_config_length_past_the_frame_is_not_believed() {
    // AoEde took the header for part of the string: 32 bytes of other people's
    // data were stored, and sent to whoever asked.
    let mut bench = Bench::new();
    bench.ask(&Ask::config(4, b"mine"));
    for (length, held) in [
        (5u16, 4),
        (36, 4),
        (1024, 1023),
        (1025, 1100),
        (0xFFFF, 1400),
    ] {
        let bytes = vec![b'x'; held];
        for sub in [3, 4, 5] {
            let reply = bench.ask(&Ask::config_raw(sub, length, &bytes));
            assert_eq!(config_of(&reply), (Some(2), sub, vec![]), "{length}");
        }
        for sub in [1, 2] {
            let ask = Ask::config_raw(sub, length, &bytes);
            assert_eq!(bench.dropped(SMALL, ALICE, &ask), Dropped::Silence);
        }
    }
    // The second string of a replacement has a length of its own.
    let whole = [&b"mine"[..], b"\0\x05", b"hello"].concat();
    for cut in 0..whole.len() {
        let reply = bench.ask(&Ask::config_raw(5, 4, &whole[..cut]));
        assert_eq!(reply.error(), Some(2), "{cut}");
    }
    let long = [&b"mine"[..], &1025u16.to_be_bytes(), &[b'x'; 1025]].concat();
    assert_eq!(bench.ask(&Ask::config_raw(5, 4, &long)).error(), Some(2));
    assert_eq!(bench.saved().unwrap().config, b"mine");
    let longest = [b'y'; 1024];
    assert_eq!(config_of(&bench.ask(&Ask::config(4, &longest))).2, longest);
}

#[test]
fn a_string_that_no_nic_could_report_is_not_set() {
    let mut bench = Bench::new();
    let narrow = |id, mtu| Some(NicInfo { mtu, ..nic(id) });
    bench.target.set_nic(SMALL, narrow(SMALL, 600));
    bench.target.set_nic(JUMBO, narrow(JUMBO, 1000));
    let string = vec![b'x'; 982];
    let reply = bench.ask_from(JUMBO, ALICE, &Ask::config(4, &string));
    assert_eq!(config_of(&reply).2, string);
    // The other NIC has no room for it: no string rather than half of it.
    let reply = bench.ask(&Ask::config(0, b""));
    assert_eq!(config_of(&reply), (Some(2), 0, vec![]));
    let reply = bench.ask(&Ask::config(3, b"other"));
    assert_eq!(config_of(&reply), (Some(2), 3, vec![]));
    bench.target.set_nic(JUMBO, narrow(JUMBO, 981));
    let reply = bench.ask_from(JUMBO, ALICE, &Ask::config(4, &string));
    assert_eq!(reply.error(), Some(2));
    assert_eq!(bench.saved().unwrap().config, string);
}

#[test]
fn masks_are_edited_in_order_up_to_the_first_bad_directive() {
    // AoEde's third add overwrote the first, one delete was its end, and it
    // believed the count past the end of the frame.
    let mut bench = Bench::new();
    let everyone = [ALICE, BOB, CAROL].map(|h| Directive::add(host(h)));
    let mask = bench.ask(&Ask::mask_edit(&everyone)).mask().unwrap();
    assert_eq!((mask.mcmd, mask.error, mask.count), (1, 0, 3));
    assert_eq!(mask.list, [host(ALICE), host(BOB), host(CAROL)]);
    for _ in 0..2 {
        let mask = bench.ask(&Ask::mask_edit(&[Directive::delete(host(BOB))]));
        assert_eq!(mask.mask().unwrap().list, [host(ALICE), host(CAROL)]);
        let mask = bench.ask(&Ask::mask_edit(&[Directive::add(host(CAROL))]));
        assert_eq!(mask.mask().unwrap().count, 2);
    }
    let bad = Directive {
        dcmd: 9,
        argument: [0; 6],
    };
    let nothing = Directive {
        dcmd: 0,
        argument: [0xFF; 6],
    };
    let edit = [
        nothing,
        Directive::add(host(BOB)),
        bad,
        Directive::delete(host(ALICE)),
    ];
    let reply = bench.ask(&Ask::mask_edit(&edit));
    let mask = reply.mask().unwrap();
    assert_eq!((reply.error(), mask.error, mask.count), (None, 2, 2));
    let mask = bench.ask(&Ask::mask_read()).mask().unwrap();
    assert_eq!(mask.list, [host(ALICE), host(CAROL), host(BOB)]);
    assert_eq!(
        bench.saved().unwrap().masks,
        [host(ALICE), host(CAROL), host(BOB)]
    );
    // Counts past the end of the frame, and commands there are none of.
    let entry = [0, 2, 2, 0, 0, 0, 0, ALICE];
    for (mcmd, count, bytes) in [
        (1, 1, &entry[..7]),
        (1, 2, &entry[..]),
        (1, 255, &entry[..]),
        (0, 1, &[][..]),
        (2, 0, &[][..]),
        (255, 0, &[][..]),
    ] {
        let reply = bench.ask(&Ask::mask_raw(mcmd, count, bytes));
        let mask = reply.mask().unwrap();
        assert_eq!(
            (reply.error(), mask.mcmd, mask.error, mask.count),
            (Some(2), mcmd, 0, 0)
        );
    }
    assert_eq!(bench.saved().unwrap().masks.len(), 3);
}

#[test]
fn a_mask_list_is_as_long_as_a_reply_and_255_at_most() {
    let directives = |from: usize, to: usize| -> Vec<Directive> {
        (from..to)
            .map(|n| {
                let mac = format!("02:00:00:01:{:02x}:{:02x}", n >> 8, n & 255);
                Directive::add(mac.parse().unwrap())
            })
            .collect()
    };
    let mut bench = Bench::new();
    bench.ask(&Ask::mask_edit(&[Directive::add(host(ALICE))]));
    let mask = bench
        .ask(&Ask::mask_edit(&directives(0, 184)))
        .mask()
        .unwrap();
    assert_eq!((mask.error, mask.count), (0, 185));
    // 28 + 8 * 186 is more than 1514.
    let mask = bench
        .ask(&Ask::mask_edit(&directives(184, 186)))
        .mask()
        .unwrap();
    assert_eq!((mask.error, mask.count), (3, 0));
    let add = Ask::mask_edit(&directives(184, 255));
    let mask = bench.ask_from(JUMBO, ALICE, &add).mask().unwrap();
    assert_eq!((mask.error, mask.count), (3, 70));
    let mask = bench
        .ask_from(JUMBO, ALICE, &Ask::mask_read())
        .mask()
        .unwrap();
    assert_eq!((mask.count, mask.list.len()), (255, 255));
    // The small NIC cannot list them, and an edit that is refused so has none.
    let reply = bench.ask(&Ask::mask_read());
    assert_eq!((reply.error(), reply.mask().unwrap().count), (Some(2), 0));
    let reply = bench.ask(&Ask::mask_edit(&[Directive::delete(host(ALICE))]));
    assert_eq!(reply.error(), Some(2));
    assert_eq!(bench.saved().unwrap().masks.len(), 255);
}

#[test]
fn a_reservation_is_set_kept_broken_and_released() {
    let mut bench = Bench::new();
    let list = |reply: &Reply| reply.reserve().unwrap().list;
    let empty = bench.ask(&Ask::reserve(0, &[]));
    assert_eq!((empty.error(), list(&empty)), (None, vec![]));
    let reply = bench.ask(&Ask::reserve(1, &[host(ALICE), host(BOB)]));
    assert_eq!(
        (reply.error(), list(&reply)),
        (None, vec![host(ALICE), host(BOB)])
    );
    for order in [&[host(CAROL)][..], &[]] {
        let reply = bench.ask_from(SMALL, CAROL, &Ask::reserve(1, order));
        assert_eq!(
            (reply.error(), list(&reply)),
            (Some(6), vec![host(ALICE), host(BOB)])
        );
    }
    let reply = bench.ask_from(SMALL, BOB, &Ask::reserve(1, &[host(BOB)]));
    assert_eq!((reply.error(), list(&reply)), (None, vec![host(BOB)]));
    assert_eq!(bench.ask(&Ask::read(0, 1)).error(), Some(6));
    let reply = bench.ask_from(SMALL, CAROL, &Ask::reserve(2, &[host(CAROL)]));
    assert_eq!((reply.error(), list(&reply)), (None, vec![host(CAROL)]));
    assert_eq!(bench.saved().unwrap().reserved, [host(CAROL)]);
    for (rcmd, count, bytes) in [
        (3, 0, &[][..]),
        (255, 0, &[][..]),
        (0, 1, &[0; 5][..]),
        (1, 1, &[0; 5][..]),
        (2, 1, &[][..]),
        (2, 255, &[0; 255 * 6 - 1][..]),
    ] {
        let ask = Ask::reserve_raw(rcmd, count, bytes);
        let reply = bench.ask_from(JUMBO, CAROL, &ask);
        assert_eq!(
            (reply.error(), reply.reserve().unwrap().rcmd),
            (Some(2), rcmd)
        );
        assert_eq!(list(&reply), []);
    }
    let reply = bench.ask_from(SMALL, CAROL, &Ask::reserve(1, &[]));
    assert_eq!((reply.error(), list(&reply)), (None, vec![]));
    assert_eq!(bench.saved().unwrap().reserved, []);
    bench.ask(&Ask::read(0, 1)).sectors(1).unwrap();
    // 26 + 6 * 249 is more than 1514.
    let many: Vec<_> = (0..249).map(|_| host(ALICE)).collect();
    let reply = bench.ask_from(JUMBO, ALICE, &Ask::reserve(1, &many));
    assert_eq!(list(&reply).len(), 249);
    let reply = bench.ask(&Ask::reserve(0, &[]));
    assert_eq!((reply.error(), list(&reply)), (Some(2), vec![]));
}

#[test]
fn what_the_operator_denies_is_refused_and_reads_stay_open() {
    let policy = Policy {
        deny_config: true,
        deny_mask: true,
        deny_reserve: true,
        ..Policy::default()
    };
    let mut bench = Bench::with(Settings {
        policy,
        ..settings()
    });
    for ask in [
        Ask::config(3, b"x"),
        Ask::config(4, b"x"),
        Ask::config_replace(b"", b"x"),
        Ask::mask_edit(&[Directive::add(host(ALICE))]),
        Ask::reserve(1, &[host(ALICE)]),
        Ask::reserve(2, &[host(ALICE)]),
    ] {
        assert_eq!(bench.ask(&ask).error(), Some(2), "{ask:?}");
    }
    for ask in [
        Ask::config(0, b""),
        Ask::config(1, b""),
        Ask::config(2, b""),
        Ask::mask_read(),
        Ask::reserve(0, &[]),
    ] {
        assert_eq!(bench.ask(&ask).error(), None, "{ask:?}");
    }
    assert_eq!(bench.saved(), None);
}

/// One change of each kind, all of them of a state that is new.
fn changes() -> Vec<Ask> {
    vec![
        Ask::config(3, b"disk"),
        Ask::config(4, b"disk"),
        Ask::config_replace(b"", b"disk"),
        Ask::mask_edit(&[Directive::add(host(ALICE))]),
        Ask::reserve(1, &[host(ALICE)]),
        Ask::reserve(2, &[host(ALICE)]),
    ]
}

#[test]
fn no_change_is_heard_of_before_it_is_saved() {
    for ask in changes() {
        let mut bench = Bench::new();
        bench.shut();
        assert!(matches!(bench.send(SMALL, ALICE, &ask), Got::Parked));
        assert!(bench.pump().is_empty());
        assert_eq!((bench.saved(), bench.target.is_idle()), (None, false));
        // Discovery goes on, and sees what was before; so does everyone else.
        let got = bench.send(SMALL, BOB, &Ask::config(0, b""));
        assert!(matches!(got, Got::Reply(r) if r.config().unwrap().length == 0));
        assert!(matches!(
            bench.send(SMALL, BOB, &Ask::mask_read()),
            Got::Reply(_)
        ));
        let got = bench.send(SMALL, BOB, &Ask::reserve(0, &[]));
        assert!(matches!(got, Got::Reply(r) if r.reserve().unwrap().count == 0));
        assert!(matches!(
            bench.send(SMALL, BOB, &Ask::read(0, 1)),
            Got::Parked
        ));
        bench.pass(is_save);
        let replies = bench.pump();
        assert_eq!(replies.len(), 1, "{ask:?}");
        assert_eq!(replies[0].1.error(), None);
        assert_eq!(bench.saved().as_ref(), Some(&bench.target.state));
        assert_ne!(bench.target.state, WireState::default());
    }
}

#[test]
fn a_change_that_cannot_be_saved_is_refused_and_undone() {
    for ask in changes() {
        let mut bench = Bench::forgetful(settings());
        for _ in 0..2 {
            let reply = bench.ask(&ask);
            assert_eq!(reply.error(), Some(2), "{ask:?}");
            // Reads go on, and see nothing of it.
            assert_eq!(bench.target.state, WireState::default());
            let reply = bench.ask_from(SMALL, BOB, &Ask::config(0, b""));
            assert_eq!(config_of(&reply), (None, 0, vec![]));
            let reply = bench.ask_from(SMALL, BOB, &Ask::mask_read());
            assert_eq!(reply.mask().unwrap().list, []);
            let reply = bench.ask_from(SMALL, BOB, &Ask::reserve(0, &[]));
            assert_eq!(reply.reserve().unwrap().list, []);
            bench
                .ask_from(SMALL, BOB, &Ask::read(0, 1))
                .sectors(1)
                .unwrap();
        }
        let path = bench.state_directory();
        assert_eq!(std::fs::read(&path).unwrap(), b"in the way");
        // As soon as it can be saved, it is.
        std::fs::remove_file(&path).unwrap();
        assert_eq!(bench.ask(&ask).error(), None);
        assert_eq!(bench.saved().as_ref(), Some(&bench.target.state));
    }
}

#[test]
fn changes_that_come_during_a_save_are_taken_by_the_next_together() {
    let mut bench = Bench::new();
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::config(3, b"first"));
    bench.send(SMALL, BOB, &Ask::config(3, b"second"));
    bench.send(JUMBO, BOB, &Ask::reserve(1, &[host(BOB)]));
    bench.send(SMALL, CAROL, &Ask::reserve(1, &[host(CAROL)]));
    let add = Ask::mask_edit(&[Directive::add(host(ALICE))]);
    bench.send(SMALL, ALICE, &add);
    assert_eq!(bench.desk.borrow().kept.len(), 1, "saves are one at a time");
    bench.pass(is_save);
    let replies = bench.pump();
    assert_eq!(replies.len(), 1);
    assert_eq!(config_of(&replies[0].1), (None, 3, b"first".to_vec()));
    assert_eq!(bench.saved().unwrap().reserved, []);
    bench.pass(is_save);
    let replies = bench.pump();
    let said: Vec<_> = replies
        .iter()
        .map(|(nic, r)| (*nic, r.command(), r.error()))
        .collect();
    assert_eq!(
        said,
        [
            (SMALL, 1, Some(4)),
            (JUMBO, 3, None),
            (SMALL, 3, Some(6)),
            (SMALL, 2, None)
        ]
    );
    assert_eq!(config_of(&replies[0].1).2, b"first");
    assert_eq!(replies[2].1.reserve().unwrap().list, [host(BOB)]);
    let state = bench.saved().unwrap();
    assert_eq!(state.config, b"first");
    assert_eq!(
        (state.masks, state.reserved),
        (vec![host(ALICE)], vec![host(BOB)])
    );
    assert!(bench.desk.borrow().kept.is_empty() && bench.target.is_idle());
}

#[test]
fn the_last_change_stands_when_it_undoes_one_that_is_being_saved() {
    let mut bench = Bench::new();
    bench.ask(&Ask::config(4, b"old"));
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::config(4, b"new"));
    // Against the state of now this changes nothing; against that which will be
    // it does.
    bench.send(SMALL, ALICE, &Ask::config(4, b"old"));
    bench.send(SMALL, ALICE, &Ask::reserve(2, &[host(BOB)]));
    bench.send(SMALL, ALICE, &Ask::reserve(2, &[]));
    bench.open();
    while bench.target.has_work() {
        bench.pump();
    }
    let state = bench.saved().unwrap();
    assert_eq!((state.config, state.reserved), (b"old".to_vec(), vec![]));
    assert!(bench.asked.is_empty());
}

#[test]
fn a_failed_save_fails_those_it_was_for_and_the_next_is_tried() {
    let mut bench = Bench::forgetful(settings());
    bench.shut();
    bench.send(SMALL, ALICE, &Ask::config(3, b"first"));
    bench.send(SMALL, BOB, &Ask::config(3, b"second"));
    bench.pass(is_save);
    let replies = bench.pump();
    assert_eq!(config_of(&replies[0].1), (Some(2), 3, vec![]));
    std::fs::remove_file(bench.state_directory()).unwrap();
    bench.pass(is_save);
    let replies = bench.pump();
    assert_eq!(config_of(&replies[0].1), (None, 3, b"second".to_vec()));
    assert_eq!(bench.saved().unwrap().config, b"second");
}

#[test]
fn changes_without_end_are_dropped_not_collected() {
    let mut bench = Bench::new();
    bench.shut();
    let mut dropped = 0;
    for n in 0..200u32 {
        match bench.send(SMALL, ALICE, &Ask::config(4, &n.to_be_bytes())) {
            Got::Parked => {}
            Got::Dropped(Dropped::NoRoom) => dropped += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!((50..200).contains(&dropped), "{dropped}");
    bench.open();
    let mut answered = 0;
    while bench.target.has_work() {
        answered += bench.pump().len();
    }
    assert_eq!(answered + dropped, 200);
}

#[test]
fn a_state_is_found_again_by_the_next_target() {
    let mut bench = Bench::new();
    bench.ask(&Ask::config(3, &[0, 0xFF, b'"', b'\n']));
    bench.ask(&Ask::reserve(1, &[host(ALICE)]));
    let masks = [Directive::add(host(ALICE)), Directive::add(host(BOB))];
    bench.ask(&Ask::mask_edit(&masks));
    let state = bench.saved().unwrap();
    assert_eq!(state, bench.target.state);
    let mut next = Bench::new();
    next.target.state = state;
    assert_eq!(
        config_of(&next.ask(&Ask::config(0, b""))).2,
        [0, 0xFF, b'"', b'\n']
    );
    assert_eq!(next.ask_from(SMALL, BOB, &Ask::read(0, 1)).error(), Some(6));
    assert_eq!(
        next.dropped(SMALL, CAROL, &Ask::read(0, 1)),
        Dropped::Masked
    );
}
