//! Checksums: behind which data they stand, and that no damaged write passes.

use super::tags::{COUNTING, OK};
use super::*;
use initiator::frame::{Ata, opcode};

#[test]
fn sums_stand_behind_data_and_nothing_else() {
    let mut bench = Bench::new();
    for nic in [SMALL, JUMBO] {
        bench.extend(nic, ALICE, &["crc8x4"]);
    }
    bench.write(0, &sectors(0xAB, 2));
    let len = |bench: &mut Bench, ask: &Ask| bench.ask(ask).bytes().len();
    // The bench holds every sum against the frame's own bytes.
    assert_eq!(len(&mut bench, &Ask::read(0, 2)), 36 + 1024 + 4);
    assert_eq!(len(&mut bench, &Ask::identify()), 36 + 512 + 4);
    assert_eq!(
        bench
            .ask_from(JUMBO, ALICE, &Ask::read(0, 17))
            .bytes()
            .len(),
        36 + 17 * 512 + 4
    );
    for ask in [
        Ask::read(0, 0),
        Ask::read(SECTORS, 1),
        Ask::read(0, 3),
        Ask::write(0, &sectors(1, 1)).with_crc(),
        Ask::config(0, b""),
        Ask::flush(),
    ] {
        assert_eq!(bench.ask_patiently(&ask).bytes().len(), 60, "{ask:?}");
    }
    // Nor behind what is no sectors' data.
    let smart = Ata {
        feature: 0xD0,
        count: 1,
        opcode: opcode::SMART,
        lba: 0xC2_4F00,
        ..Ata::default()
    };
    assert_eq!(len(&mut bench, &Ask::ata(smart, &[])), 36 + 512);
    // Others have none.
    let reply = bench.ask_from(SMALL, BOB, &Ask::read(0, 2));
    assert_eq!(reply.bytes().len(), 36 + 1024);
    // From the disk, in a while.
    bench.shut();
    bench.parked(9, &Ask::read(20, 2));
    bench.open();
    assert_eq!(bench.pump()[0].1.bytes().len(), 36 + 1024 + 4);
    bench.medium.read_fails.store(true, Ordering::Relaxed);
    assert_eq!(len(&mut bench, &Ask::read(40, 2)), 60);
}

#[test]
fn a_sum_that_fits_no_frame_any_more_is_not_sent_half() {
    for (mtu, replies) in [(1050, 1), (1049, 0), (1045, 0)] {
        let mut bench = Bench::new();
        bench.extend(SMALL, ALICE, &["crc8x4"]);
        bench.shut();
        let asked = bench.send(SMALL, ALICE, &Ask::read(20, 2));
        assert!(matches!(asked, Got::Parked));
        // 1064 bytes, and 14 of a frame are not of its MTU.
        let info = NicInfo { mtu, ..nic(SMALL) };
        bench.target.set_nic(SMALL, Some(info));
        bench.open();
        assert_eq!(bench.pump().len(), replies, "MTU {mtu}");
    }
}

#[test]
fn a_write_with_any_bit_wrong_is_not_accepted() {
    let mut bench = Bench::new();
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    let data: Vec<u8> = (0..512u32).map(|n| ((n * n) >> 3) as u8).collect();
    for ask in [
        Ask::write(3, &data).with_crc(),
        // The data's room is full of it, and more behind it means nothing.
        Ask::write(3, &data).with_crc().trailing(b"more"),
    ] {
        let good = bench.encode(SMALL, ALICE, &ask);
        for bit in 24 * 8..(36 + 512 + 4) * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match bench.hand(SMALL, &bad) {
                Got::Dropped(Dropped::Damaged) => {}
                // A count so large that the frame has no room for a sum is
                // refused for that; an opcode that is no write writes nothing.
                Got::Reply(reply) if reply.error() == Some(2) && bit / 8 == 26 => {}
                Got::Reply(reply) if bit / 8 == 27 => {
                    let ata = reply.ata().unwrap();
                    let is_read = bad[27] == opcode::READ_EXT;
                    assert!(is_read || (ata.status, ata.error) == (0x41, 4), "bit {bit}");
                }
                other => panic!("bit {bit}: {other:?}"),
            }
        }
        assert!(bench.bytes().iter().all(|byte| *byte == 0));
    }
    // Whatever of them came, the tags of none are marked.
    bench.extend(SMALL, ALICE, COUNTING);
    let good = bench.encode(SMALL, ALICE, &Ask::write(3, &data).with_crc().tag(100));
    let mut bad = good.clone();
    bad[100] ^= 0x10;
    assert!(matches!(
        bench.hand(SMALL, &bad),
        Got::Dropped(Dropped::Damaged)
    ));
    let Got::Reply(reply) = bench.hand(SMALL, &good) else {
        panic!()
    };
    assert_eq!(registers(&reply), OK);
    same(&bench.bytes()[3 * 512..4 * 512], &data);
    assert!(bench.target.counters().drops(Dropped::Damaged) > 8000);
}

#[test]
fn sums_are_asked_of_those_who_give_them() {
    let mut bench = Bench::new();
    let damaged = Ask::write(3, &sectors(5, 1)).trailing(&[1, 2, 3, 4]);
    assert_eq!(registers(&bench.ask(&damaged)), OK);
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    assert_eq!(bench.dropped(SMALL, ALICE, &damaged), Dropped::Damaged);
    assert_eq!(registers(&bench.ask_from(SMALL, BOB, &damaged)), OK);
    assert_eq!(registers(&bench.ask_from(JUMBO, ALICE, &damaged)), OK);
    // A frame without room for one has none; a write of nothing, padded, too.
    for extra in 0..4 {
        let ask = Ask::write(3, &sectors(5, 1)).trailing(&[9; 4][..extra]);
        assert_eq!(registers(&bench.ask(&ask)), OK);
    }
    assert_eq!(registers(&bench.ask(&Ask::write(3, b"").padded(60))), OK);
    // TRIM is a write in this, too.
    let trim = Ata {
        feature: 1,
        count: 1,
        opcode: opcode::DATA_SET_MANAGEMENT,
        ..Ata::default()
    };
    let trim = Ask::ata(trim, &sectors(0, 1));
    let right = bench.ask_patiently(&trim.clone().with_crc());
    assert_eq!(registers(&right), OK);
    let wrong = trim.trailing(&[1, 2, 3, 4]);
    assert_eq!(bench.dropped(SMALL, ALICE, &wrong), Dropped::Damaged);
    // A read's payload is ignored, as ever.
    bench.ask(&Ask::read(3, 1).trailing(&[0; 1024]));
}
