//! Who is heard, and who is not, and why.

use super::*;
use initiator::frame::{Ata, Directive, opcode};

/// Asserts that a frame is dropped for this reason, counted once, without
/// effect.
#[track_caller]
fn expect_drop(bench: &mut Bench, nic: NicId, frame: Frame, why: Dropped) {
    let bytes = bench.bytes();
    let before = (bench.target.counters().drops(why), bytes);
    let requests = bench.target.counters().requests;
    match bench.hand_frame(nic, frame) {
        Got::Dropped(reason) => assert_eq!(reason, why),
        other => panic!("{other:?} where {why:?} is due"),
    }
    assert_eq!(bench.target.counters().drops(why), before.0 + 1);
    assert_eq!(bench.target.counters().requests, requests);
    same(&bench.bytes(), &before.1);
    assert!(bench.target.is_idle());
}

fn whole(bytes: &[u8]) -> Frame<'_> {
    Frame {
        bytes,
        stamp: 0,
        whole: true,
        other_host: false,
    }
}

/// A frame of each kind that has an effect or an answer.
fn kinds() -> Vec<Ask> {
    vec![
        Ask::config(0, b""),
        Ask::config(4, b"x"),
        Ask::mask_edit(&[Directive::add(host(ALICE))]),
        Ask::reserve(2, &[host(ALICE)]),
        Ask::identify(),
        Ask::read(0, 1),
        Ask::write(0, &sectors(0xEE, 1)),
        Ask::flush(),
        Ask::command(0xF0, vec![1, 2, 3]),
        Ask::config(0, b"").version_flags(0x20),
    ]
}

#[test]
fn what_is_not_for_us_is_dropped_counted_and_without_effect() {
    let mut bench = Bench::new();
    for kind in kinds() {
        let good = bench.encode(SMALL, ALICE, &kind);
        let mut go = |bytes: &[u8], why| expect_drop(&mut bench, SMALL, whole(bytes), why);
        let changed = |at: usize, bytes: &[u8]| {
            let mut frame = good.clone();
            frame[at..at + bytes.len()].copy_from_slice(bytes);
            frame
        };
        go(&changed(0, &[2, 0, 0, 0, 0, 9]), Dropped::OtherHost);
        // A multicast group is not broadcast, and the other NIC's address is
        // not this one's.
        go(&changed(0, &[1, 0, 0x5E, 0, 0, 1]), Dropped::OtherHost);
        go(&changed(0, &[2, 0, 0, 0, 0, 2]), Dropped::OtherHost);
        go(&changed(6, &[0xFF; 6]), Dropped::GroupSource);
        go(&changed(6, &[1, 0, 0x5E, 0, 0, 1]), Dropped::GroupSource);
        go(&changed(6, &[2, 0, 0, 0, 0, 1]), Dropped::OwnSource);
        go(&changed(12, &[0x88, 0xA3]), Dropped::NotAoe);
        go(&changed(12, &[0x81, 0x00]), Dropped::NotAoe);
        go(&changed(16, &[0, SHELF as u8 + 1]), Dropped::OtherAddress);
        go(&changed(18, &[SLOT + 1]), Dropped::OtherAddress);
        // One part broadcast does not excuse the other.
        go(&changed(16, &[0xFF, 0xFF, SLOT + 1]), Dropped::OtherAddress);
        let other_shelf = [0, SHELF as u8 + 1, 0xFF];
        go(&changed(16, &other_shelf), Dropped::OtherAddress);
        for len in 0..24 {
            go(&good[..len], Dropped::Short);
        }
        let bytes = &good[..];
        let cut = Frame {
            whole: false,
            ..whole(bytes)
        };
        expect_drop(&mut bench, SMALL, cut, Dropped::Cut);
        let other_host = Frame {
            other_host: true,
            ..whole(bytes)
        };
        expect_drop(&mut bench, SMALL, other_host, Dropped::OtherHost);
        expect_drop(&mut bench, NicId(9), whole(bytes), Dropped::NoLink);
    }
    bench.target.set_nic(JUMBO, None);
    for kind in kinds() {
        let bytes = bench.encode(JUMBO, ALICE, &kind);
        expect_drop(&mut bench, JUMBO, whole(&bytes), Dropped::NoLink);
    }
    assert_eq!(bench.saved(), None);
}

#[test]
fn a_frame_shorter_than_the_header_of_its_command_is_dropped() {
    let mut bench = Bench::new();
    for (kind, need) in [
        (Ask::identify(), 36),
        (Ask::write(0, &sectors(1, 1)), 36),
        (Ask::config(0, b""), 32),
        (Ask::mask_read(), 28),
        (Ask::reserve(0, &[]), 26),
    ] {
        let bytes = bench.encode(SMALL, ALICE, &kind);
        for len in 0..need {
            expect_drop(&mut bench, SMALL, whole(&bytes[..len]), Dropped::Short);
        }
        // With all of it there is an answer, an error perhaps.
        let got = bench.hand(SMALL, &bytes[..need]);
        assert!(matches!(got, Got::Reply(_)), "{need}: {got:?}");
    }
}

#[test]
fn an_answer_is_never_answered_and_one_in_our_name_is_a_conflict() {
    let mut bench = Bench::new();
    for kind in kinds() {
        for flags in [0x18, 0x1C, 0x1F, 0x08, 0x28] {
            let ask = kind.clone().version_flags(flags);
            let bytes = bench.encode(SMALL, ALICE, &ask.clone().slot(SLOT + 1));
            expect_drop(&mut bench, SMALL, whole(&bytes), Dropped::Response);
            let bytes = bench.encode(SMALL, ALICE, &ask.clone().everywhere());
            expect_drop(&mut bench, SMALL, whole(&bytes), Dropped::Response);
            // Our own advertisement, heard on our other NIC, is no other target's.
            let bytes = bench.encode(SMALL, 2, &ask.clone().to(broadcast()));
            expect_drop(&mut bench, SMALL, whole(&bytes), Dropped::Response);
            match bench.send(SMALL, ALICE, &ask.to(broadcast())) {
                Got::AddressConflict(mac) => assert_eq!(mac, host(ALICE)),
                other => panic!("{other:?}"),
            }
        }
    }
    let counted = bench.target.counters();
    assert_eq!(counted.requests, 0, "an answer is no request");
}

#[test]
fn loopback_hears_its_own_address() {
    let mut bench = Bench::new();
    let lo = NicInfo {
        mac: MacAddr([0; 6]),
        mtu: 65536,
        loopback: true,
    };
    bench.target.set_nic(SMALL, Some(lo));
    let zero = "00:00:00:00:00:00".parse().unwrap();
    let ask = Ask::config(0, b"").to(zero).from(zero);
    match bench.send(SMALL, ALICE, &ask) {
        Got::Reply(reply) => assert_eq!(reply.config().unwrap().sectors, 127),
        other => panic!("{other:?}"),
    }
}

#[test]
fn shelf_and_slot_are_each_broadcast_alone() {
    let mut bench = Bench::new();
    for (shelf, slot) in [(0xFFFF, SLOT), (SHELF, 0xFF), (0xFFFF, 0xFF)] {
        for to in [host(1), broadcast()] {
            // `check` sees that our own shelf and slot come back.
            for ask in [
                Ask::config(0, b""),
                Ask::identify(),
                Ask::read(0, 2),
                Ask::flush(),
                Ask::mask_read(),
                Ask::reserve(0, &[]),
                Ask::command(0x77, vec![]),
            ] {
                bench.ask(&ask.to(to).at(shelf, slot));
            }
        }
    }
    // Vblade's discovery of WinAoE: every shelf and slot, IDENTIFY.
    let reply = bench.ask(&Ask::identify().everywhere());
    assert!(reply.sectors(1).is_some());
}

#[test]
fn a_change_to_every_shelf_or_slot_is_dropped() {
    let mut bench = Bench::new();
    let mut changes = Vec::new();
    for op in [
        opcode::WRITE,
        opcode::WRITE_EXT,
        opcode::WRITE_DMA,
        opcode::WRITE_DMA_EXT,
    ] {
        let registers = Ata {
            count: 1,
            opcode: op,
            ..Ata::default()
        };
        changes.push(Ask::ata(registers, &sectors(0xEE, 1)));
    }
    let trim = Ata {
        feature: 1,
        count: 1,
        opcode: opcode::DATA_SET_MANAGEMENT,
        ..Ata::default()
    };
    changes.push(Ask::ata(trim, &sectors(1, 1)));
    for feature in [0x02, 0x82] {
        let registers = Ata {
            feature,
            opcode: opcode::SET_FEATURES,
            ..Ata::default()
        };
        changes.push(Ask::ata(registers, &[]));
    }
    for (shelf, slot) in [(0xFFFF, SLOT), (SHELF, 0xFF), (0xFFFF, 0xFF)] {
        for to in [host(1), broadcast()] {
            for ask in &changes {
                let ask = ask.clone().to(to).at(shelf, slot);
                let bytes = bench.encode(SMALL, ALICE, &ask);
                expect_drop(&mut bench, SMALL, whole(&bytes), Dropped::BroadcastChange);
            }
        }
    }
    // To our shelf and slot they are meant, whatever MAC they go to.
    let write = Ask::write(0, &sectors(0xEE, 1)).to(broadcast());
    assert_eq!(registers(&bench.ask(&write)), (0x40, 0, 0));
}

#[test]
fn a_masked_host_is_not_heard_by_any_command() {
    let wall = Settings {
        policy: Policy {
            masks: vec![host(ALICE), host(BOB)],
            ..Policy::default()
        },
        ..settings()
    };
    let mut bench = Bench::with(wall);
    for kind in kinds() {
        let bytes = bench.encode(SMALL, CAROL, &kind);
        expect_drop(&mut bench, SMALL, whole(&bytes), Dropped::Masked);
    }
    // The wire's list narrows the operator's and never widens it.
    let add = Ask::mask_edit(&[Directive::add(host(CAROL))]);
    let mask = bench.ask(&add).mask().unwrap();
    assert_eq!((mask.error, mask.count), (1, 0));
    let add = Ask::mask_edit(&[Directive::add(host(BOB))]);
    assert_eq!(bench.ask(&add).mask().unwrap().list, [host(BOB)]);
    for kind in kinds() {
        for from in [ALICE, CAROL] {
            let bytes = bench.encode(SMALL, from, &kind);
            expect_drop(&mut bench, SMALL, whole(&bytes), Dropped::Masked);
        }
    }
    bench.ask_from(SMALL, BOB, &Ask::read(0, 1));
    let delete = Ask::mask_edit(&[Directive::delete(host(BOB))]);
    bench.ask_from(SMALL, BOB, &delete);
    bench.ask_from(SMALL, ALICE, &Ask::read(0, 1));
}

#[test]
fn another_version_is_an_error_and_executes_nothing() {
    let mut bench = Bench::new();
    for version in (0..16).filter(|v| *v != 1) {
        for kind in kinds() {
            let reply = bench.ask(&kind.version_flags(version << 4));
            assert_eq!(reply.error(), Some(5));
        }
    }
    assert_eq!((bench.bytes(), bench.saved()), (sectors(0, 64), None));
}

#[test]
fn an_unknown_command_comes_back_with_its_body() {
    let mut bench = Bench::new();
    for command in [4, 0x22, 0x24, 0x7F, 0xF0, 0xFF] {
        for (nic, longest) in [(SMALL, 1490), (JUMBO, 8990)] {
            for len in [0, 1, 35, 36, 37, 1000, longest] {
                let body: Vec<u8> = (0..len).map(|i| i as u8 | 1).collect();
                let ask = Ask::command(command, body.clone());
                let reply = bench.ask_from(nic, ALICE, &ask);
                assert_eq!(reply.error(), Some(1));
                assert_eq!(reply.body()[..len], body);
            }
        }
    }
}

#[test]
fn a_reply_is_not_longer_than_the_frames_of_its_nic() {
    // The kernel lets frames in that are longer by a VLAN tag, and replies do
    // not leave if they are.
    let mut bench = Bench::new();
    for len in [1514, 1515, 1518] {
        for ask in [
            Ask::command(0xF0, vec![7; len - 24]),
            Ask::config(0, &vec![7; len - 32]),
            Ask::identify().length(len),
        ] {
            bench.ask(&ask);
        }
    }
}

#[test]
fn flags_error_byte_and_reserved_bits_are_not_echoed() {
    // AoEde sent E and the reserved bits back, and so an error without one.
    let mut bench = Bench::new();
    for kind in kinds().into_iter().take(8) {
        for flags in [0x11, 0x12, 0x13, 0x14, 0x17] {
            let ask = kind.clone().version_flags(flags).error(0x55);
            assert_eq!(bench.ask(&ask).flags(), 8, "{ask:?}");
        }
    }
    for tag in [0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF] {
        let reply = bench.ask(&Ask::config(0, b"").tag(tag));
        assert_eq!(reply.tag(), tag);
    }
}
