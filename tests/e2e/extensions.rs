//! AoEde's extensions over the wire: both doors, copies of writes on a bad
//! wire, checksums, several reads in one frame, an initiator's own pace.

use std::time::{Duration, Instant};

use aoede::wire::MacAddr;
use initiator::client::Client;
use initiator::engine::faults::Rates;
use initiator::engine::model::Initial;
use initiator::engine::{Block, Engine, Op, Plan, Report, Tags};
use initiator::frame::{ATA, Ata, Directive, Frame, Reply, opcode};
use initiator::lab::{self, Need};
use nix::sys::signal::Signal;

use crate::rig::{QUICK, Rig, SOON, each_engine};
use crate::support::{Store, Wire, serve, stop};
use crate::workshop::ata_replies;

const ALL: [&str; 6] = [
    "reset",
    "tag_inc_le",
    "tag_inc_be",
    "tag_random",
    "coalesced_read",
    "crc8x4",
];

/// Status, error and count of an ATA answer that is no AoE error.
fn outcome(reply: &Reply) -> (u8, u8, u8) {
    assert_eq!(reply.error(), None, "{reply:?}");
    let ata = reply.ata().unwrap();
    (ata.status, ata.error, ata.count)
}

const OK: (u8, u8, u8) = (0x40, 0, 0);

/// Asks for extensions; all of them must be granted.
fn extend(client: &mut Client, names: &[&str]) {
    let said = client.extensions(names).unwrap();
    let upper: Vec<String> = names.iter().map(|name| name.to_uppercase()).collect();
    assert_eq!(said, upper);
}

/// The duplicate writes of which a target speaks when it ends.
fn duplicates(output: &[String]) -> u64 {
    let last = output.iter().rfind(|line| line.contains("stopped: "));
    let last = last.unwrap_or_else(|| panic!("no last words in {output:?}"));
    let words: Vec<&str> = last.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "duplicate");
    at.map_or(0, |at| words[at - 1].parse().unwrap())
}

#[test]
fn both_doors_open() {
    each_engine("the doors to extensions", &[], |rig| {
        let said = rig.client.extensions(&["crc8x4", "turbo", "CRC8X4"]);
        assert_eq!(said.unwrap(), ["CRC8X4", "turbo", "CRC8X4"]);
        rig.client.write(0, &[7; 1024]).unwrap();
        assert!(rig.ask(&Frame::read(0, 2)).crc_matches(2));
        assert!(rig.ask(&Frame::identify()).crc_matches(1));
        let mut other = rig
            .wire
            .peer
            .enter(|| Client::open_as("ini0", MacAddr([2, 0, 0, 0, 0xFE, 1])))
            .unwrap()
            .unwrap();
        other.connect(1, 1).unwrap();
        let reply = other.call(&Frame::read(0, 2)).unwrap();
        assert_eq!(reply.bytes().len(), 36 + 1024);
        // Off by the other door, and on again.
        let off = Directive::extension_off("crc8x4");
        let mask = rig.client.mask_edit(&[off]).unwrap();
        assert_eq!((mask.error, mask.list), (0, vec![]));
        assert_eq!(rig.ask(&Frame::read(0, 2)).bytes().len(), 36 + 1024);
        let on = ["crc8x4", "nobody"].map(Directive::extension_on);
        let mask = rig.client.mask_edit(&on).unwrap();
        assert_eq!((mask.error, mask.count), (2, 1));
        assert!(rig.ask(&Frame::read(0, 2)).crc_matches(2));
        // Setting the config string is all off.
        rig.client.config_force(b"x").unwrap();
        assert_eq!(rig.ask(&Frame::read(0, 2)).bytes().len(), 36 + 1024);
        extend(&mut rig.client, &ALL);
        extend(&mut rig.client, &["reset"]);
    });
}

#[test]
fn frames_at_the_door_may_be_wrong() {
    each_engine("wrong extension frames", &[], |rig| {
        for length in [0, 1, 5, 7, 0x0800, 0xFFFF] {
            rig.silence(&Frame::extensions_raw(length, b"crc8x4\0\0"));
        }
        for bad in [&b"crc8x4\0"[..], b"crc8x4", b"crc8x4\0x", b"\0", b""] {
            let frame = Frame::extensions_raw(bad.len() as u16, bad);
            // The padding that Ethernet adds is no end of a list either.
            rig.silence(&frame);
        }
        let room = 1514 - 26;
        rig.silence(&Frame::extensions_raw(room as u16, &vec![b'x'; room]));
        let mut strings: Vec<u8> = b"crc8x4\0".iter().copied().cycle().take(room - 2).collect();
        strings.extend([0, 0]);
        let reply = rig.ask(&Frame::extensions_raw(room as u16, &strings));
        assert_eq!(reply.bytes().len(), 1514);
        extend(&mut rig.client, &["reset"]);
    });
}

#[test]
fn masks_that_may_not_be_edited_leave_extensions_open() {
    each_engine("--deny mask and extensions", &["--deny", "mask"], |rig| {
        let mask = rig.client.mask_edit(&[Directive::extension_on("crc8x4")]);
        assert_eq!(mask.unwrap().error, 0);
        assert!(rig.ask(&Frame::read(0, 2)).crc_matches(2));
        let mixed = [
            Directive::extension_off("crc8x4"),
            Directive::add(rig.client.mac()),
        ];
        assert_eq!(rig.ask(&Frame::mask_edit(&mixed)).error(), Some(2));
        assert!(rig.ask(&Frame::read(0, 2)).crc_matches(2));
        extend(&mut rig.client, &["reset"]);
    });
}

#[test]
fn each_host_is_told_its_own_sectors_per_frame() {
    if !lab::require("sectors per frame with checksums", &[Need::Network]) {
        return;
    }
    // Two sectors fill its frames, but for 4 bytes less.
    let mut rig = Rig::new(1060, &[]);
    assert_eq!(rig.client.config_read().unwrap().sectors, 2);
    extend(&mut rig.client, &["crc8x4"]);
    assert_eq!(rig.client.config_read().unwrap().sectors, 1);
    for frame in [Frame::read(0, 2), Frame::write(0, &[1; 1024])] {
        assert_eq!(rig.ask(&frame).error(), Some(2));
    }
    assert!(rig.ask(&Frame::read(0, 1)).crc_matches(1));
    // A target that was started anew has forgotten, and announces itself.
    rig.restart(&[]);
    assert_eq!(rig.client.config_read().unwrap().sectors, 2);
    assert_eq!(rig.ask(&Frame::read(0, 2)).bytes().len(), 1060);
    rig.finish();
}

#[test]
fn equal_tags_of_two_hosts_are_two_writes() {
    each_engine("equal tags", &[], |rig| {
        let host = |last| MacAddr([2, 0, 0, 0, 0xFE, last]);
        let open = |mac| {
            let client = rig.wire.peer.enter(|| Client::open_as("ini0", mac));
            let mut client = client.unwrap().unwrap();
            client.connect(1, 1).unwrap();
            extend(&mut client, &["tag_inc_be"]);
            client
        };
        let (mut one, mut two) = (open(host(1)), open(host(2)));
        let write = |lba, fill| Frame::write(lba, &[fill; 512]).tag(0x1000);
        // AoEde acknowledged the second and dropped it.
        assert_eq!(outcome(&one.call(&write(0, 1)).unwrap()), OK);
        assert_eq!(outcome(&two.call(&write(1, 2)).unwrap()), OK);
        // A copy is answered, and changes nothing.
        assert_eq!(outcome(&one.call(&write(1, 9)).unwrap()), OK);
        assert_eq!(one.read(0, 2).unwrap(), [[1; 512], [2; 512]].concat());
        // Started again, it begins with the same tags.
        extend(&mut one, &["reset", "tag_inc_be"]);
        assert_eq!(outcome(&one.call(&write(0, 3)).unwrap()), OK);
        assert_eq!(two.read(0, 1).unwrap(), [3; 512]);
    });
}

#[test]
fn a_write_of_no_sectors_takes_nothing_from_the_next() {
    each_engine("tags of writes of no sectors", &[], |rig| {
        extend(&mut rig.client, &["tag_inc_be"]);
        // From someone else under this address: the write behind it was
        // acknowledged and not done.
        for (n, op) in [opcode::WRITE_EXT, opcode::WRITE_DMA]
            .into_iter()
            .enumerate()
        {
            let tag = 0x1000 + n as u32;
            let registers = Ata {
                opcode: op,
                ..Ata::default()
            };
            let nothing = Frame::ata(registers, &[]).tag(tag);
            assert_eq!(outcome(&rig.ask(&nothing)), OK);
            let write = Frame::write(3, &[n as u8 + 1; 512]).tag(tag);
            assert_eq!(outcome(&rig.ask(&write)), OK);
            assert_eq!(rig.client.read(3, 1).unwrap(), [n as u8 + 1; 512]);
        }
        extend(&mut rig.client, &["reset"]);
    });
}

#[test]
fn random_addresses_keep_no_newcomer_out() {
    each_engine("extensions of random addresses", &[], |rig| {
        let flood = |rig: &mut Rig| {
            for n in 0..1100u16 {
                let [high, low] = n.to_be_bytes();
                let mac = MacAddr([2, 7, 0, 0, high, low]);
                let frame = Frame::extensions(&["crc8x4"]).from(mac);
                let bytes = frame.encode(&rig.client.defaults());
                rig.client.send_raw(&bytes).unwrap();
                if n % 100 == 99 {
                    rig.client.config_read().unwrap();
                }
            }
        };
        flood(rig);
        // Granted, and kept since it is used.
        extend(&mut rig.client, &["crc8x4"]);
        assert!(rig.ask(&Frame::read(0, 2)).crc_matches(2));
        flood(rig);
        assert!(rig.ask(&Frame::read(0, 2)).crc_matches(2));
        extend(&mut rig.client, &["reset"]);
    });
}

/// A load on a wire that loses and doubles frames; the options are those of the
/// target.
fn on_a_bad_wire(name: &str, options: &[&str], plan: Plan) {
    if !lab::require(name, &[Need::Network]) {
        return;
    }
    let rates = Rates {
        lose: 50,
        duplicate: 50,
        reorder: 20,
    };
    let plan = Plan {
        op: Op::Mixed(40),
        block: Block::Bytes(6144),
        depth: 16,
        sectors: 1000,
        duration: None,
        verify: Some(Initial::Zeros),
        outgoing: rates,
        incoming: rates,
        resend: Duration::from_millis(20),
        ..plan
    };
    for mtu in [1500, 9000] {
        let (wire, store) = (Wire::new(mtu), Store::new(2000));
        let options = [&QUICK[..], options].concat();
        let target = serve(&wire.host, &store, &["tgt0"], &options);
        let mut engine = Engine::new(wire.client()).unwrap();
        let report: Report = engine.run(&plan).unwrap().clean().unwrap();
        assert!(report.outgoing.duplicated > 0 && report.resent > 0);
        let again = engine.verify_all().unwrap();
        assert!(again.bytes_read > 0);
        // All that was sent before it has been looked at when it is answered.
        engine.client.config_read().unwrap();
        let said = stop(target);
        // Every copy of a write that arrived, but for one of each, was not done.
        assert!(report.write_copies > report.write_frames, "{report}");
        if plan.tags != Tags::Unique {
            let expected = report.write_copies - report.write_frames;
            assert_eq!(duplicates(&said), expected, "{report}\n{said:?}");
        }
        let bytes = std::fs::read(store.image()).unwrap();
        engine.model().unwrap().check_now(0, &bytes).unwrap();
    }
}

#[test]
fn each_copy_of_a_write_on_a_bad_wire_is_suppressed() {
    let plan = Plan {
        tags: Tags::CountBe,
        operations: Some(3000),
        ..Plan::default()
    };
    on_a_bad_wire("copies of writes", &[], plan);
    let plan = Plan {
        tags: Tags::CountLe,
        ..plan
    };
    on_a_bad_wire("copies of writes, little endian", &[], plan);
}

#[test]
fn copies_of_writes_that_wait_for_their_sync_are_suppressed() {
    let plan = Plan {
        tags: Tags::CountBe,
        operations: Some(1000),
        flush_every: Some(50),
        ..Plan::default()
    };
    on_a_bad_wire("copies of durable writes", &["-s"], plan);
}

#[test]
fn all_extensions_together_on_a_bad_wire() {
    let plan = Plan {
        tags: Tags::CountBe,
        crc: true,
        coalesce: 6,
        operations: Some(2000),
        ..Plan::default()
    };
    on_a_bad_wire("all extensions", &[], plan);
    let plan = Plan {
        tags: Tags::Unique,
        ..plan
    };
    on_a_bad_wire("unique tags", &["--set", "receive=recvmmsg"], plan);
}

#[test]
fn a_write_with_any_bit_wrong_is_not_accepted() {
    each_engine("damaged writes", &[], |rig| {
        extend(&mut rig.client, &["crc8x4"]);
        let data: Vec<u8> = (0..512u32).map(|n| ((n * n) >> 3) as u8).collect();
        let good = Frame::write(3, &data).with_crc();
        let good = good.encode(&rig.client.defaults());
        let mut sent = 0;
        for bit in 24 * 8..good.len() * 8 {
            // That is no write then, and writes nothing.
            if bit / 8 == 27 && good[27] ^ 1 << (bit % 8) == opcode::READ_EXT {
                continue;
            }
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            rig.client.send_raw(&bad).unwrap();
            sent += 1;
            if sent % 100 == 0 {
                rig.client.config_read().unwrap();
            }
        }
        rig.client.config_read().unwrap();
        // A count that the frame does not hold, and an opcode that is none, are
        // answered as such; nothing else is answered at all.
        let strays = rig.client.drain().unwrap();
        for reply in strays.iter().filter(|reply| reply.command() == ATA) {
            let refused = reply.error() == Some(2);
            let unknown = reply.ata().is_some_and(|ata| ata.status == 0x41);
            assert!(refused || unknown, "{reply:?}");
        }
        assert_eq!(rig.client.read(3, 1).unwrap(), [0; 512]);
        rig.client.send_raw(&good).unwrap();
        let replies = ata_replies(&mut rig.client, 1);
        assert_eq!(outcome(&replies[0]), OK);
        assert_eq!(rig.client.read(3, 1).unwrap(), data);
        // Said, and not ten thousand times.
        let lines = rig.target.output();
        let lines: Vec<&String> = lines.iter().filter(|l| l.contains("damaged")).collect();
        let mac = rig.client.mac().to_string();
        assert!(!lines.is_empty() && lines.len() < 100, "{lines:?}");
        assert!(
            lines[0].contains(&mac) && lines[0].contains(" at "),
            "{lines:?}"
        );
        extend(&mut rig.client, &["reset"]);
        rig.client.write(3, &[0; 512]).unwrap();
    });
}

#[test]
fn several_reads_come_in_one_frame() {
    each_engine("coalesced reads", &[], |rig| {
        for lba in 0..20 {
            rig.client.write(lba, &[lba as u8 + 1; 512]).unwrap();
        }
        extend(&mut rig.client, &["coalesced_read", "crc8x4"]);
        let first = Ata {
            aflags: 0x40,
            count: 2,
            opcode: opcode::READ_EXT,
            ..Ata::default()
        };
        let entries: Vec<_> = (1..16u8).map(|n| ([9, 9, 9, n], u64::from(n), 1)).collect();
        let frame = Frame::coalesced_read(first, 15, &entries);
        rig.client.send(&frame.tag_bytes([9, 9, 9, 0])).unwrap();
        let mut replies = ata_replies(&mut rig.client, 16);
        replies.sort_by_key(Reply::tag);
        assert!(replies[0].crc_matches(2));
        assert_eq!(
            replies[0].sectors(2).unwrap(),
            [[1; 512], [2; 512]].concat()
        );
        for (n, reply) in replies.iter().enumerate().skip(1) {
            assert_eq!(reply.tag_bytes(), [9, 9, 9, n as u8]);
            assert!(reply.crc_matches(1), "{reply:?}");
            assert_eq!(reply.sectors(1).unwrap(), [n as u8 + 1; 512]);
        }
        extend(&mut rig.client, &["reset"]);
        // To one who has not asked for it the rest is a payload like any other.
        let frame = Frame::coalesced_read(first, 15, &entries);
        rig.ask(&frame);
        rig.nothing_else(None);
    });
}

#[test]
fn many_frames_with_many_reads_are_answered_at_once() {
    each_engine("coalesced reads at once", &[], |rig| {
        extend(&mut rig.client, &["coalesced_read"]);
        let first = Ata {
            aflags: 0x40,
            count: 1,
            opcode: opcode::READ_EXT,
            ..Ata::default()
        };
        // So that it finds all of them when it looks.
        rig.target.signal(Signal::SIGSTOP).unwrap();
        for frame in 0..12u8 {
            let tag = |n| [7, 7, frame, n];
            let entries: Vec<_> = (1..=90u8).map(|n| (tag(n), u64::from(n) % 60, 1)).collect();
            let frame = Frame::coalesced_read(first, 90, &entries);
            rig.client.send(&frame.tag_bytes(tag(0))).unwrap();
        }
        rig.target.signal(Signal::SIGCONT).unwrap();
        let mut tags: Vec<_> = ata_replies(&mut rig.client, 12 * 91)
            .iter()
            .map(Reply::tag_bytes)
            .collect();
        tags.sort_unstable();
        tags.dedup();
        assert_eq!(tags.len(), 12 * 91);
        extend(&mut rig.client, &["reset"]);
    });
}

#[test]
fn congestion_slows_the_one_who_speaks_of_it() {
    each_engine("congestion", &[], |rig| {
        let mut other = rig
            .wire
            .peer
            .enter(|| Client::open_as("ini0", MacAddr([2, 0, 0, 0, 0xFE, 1])))
            .unwrap()
            .unwrap();
        other.connect(1, 1).unwrap();
        for number in 0..20 {
            let number = number.to_string();
            extend(&mut rig.client, &["congestion", &number]);
        }
        let start = Instant::now();
        for _ in 0..40 {
            rig.client.send(&Frame::read(0, 2)).unwrap();
        }
        // Others are served before the last of these are.
        other.read(0, 2).unwrap();
        ata_replies(&mut rig.client, 40);
        // 42 KB; at 1 MB/s, which doubles twice a second, never in less.
        assert!(start.elapsed() > Duration::from_millis(20));
        assert!(start.elapsed() < SOON);
        extend(&mut rig.client, &["reset"]);
    });
}
