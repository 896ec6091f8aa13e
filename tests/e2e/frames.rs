//! What broke in the targets before us, frame by frame.

use aoede::wire::MacAddr;
use initiator::client::Client;
use initiator::frame::{Ata, Directive, Frame, Reply, opcode};
use initiator::lab::{self, Deadline, Need, Spawn, Veth};
use nix::sys::signal::Signal;

use crate::rig::{QUICK, Rig, SOON, each_engine};
use crate::support::{AOEDE, Store, Wire, serve, stop};
use crate::workshop::{ata_replies, trouble};

/// A host that exists only as an address.
const NOBODY: MacAddr = MacAddr([2, 0, 0, 0, 0xFE, 1]);
const GROUP: MacAddr = MacAddr([1, 0, 0x5E, 0, 0, 1]);

fn registers(opcode: u8, lba: u64, count: u8) -> Ata {
    Ata {
        opcode,
        lba,
        count,
        ..Ata::default()
    }
}

/// Status, error and count of an ATA answer that is no AoE error.
fn outcome(reply: &Reply) -> (u8, u8, u8) {
    assert_eq!(reply.error(), None, "{reply:?}");
    let ata = reply.ata().unwrap();
    (ata.status, ata.error, ata.count)
}

#[test]
fn padding_is_zeros_and_no_stale_memory() {
    each_engine("zero padding", &[], |rig| {
        rig.client.write(0, &[0xEE; 1024]).unwrap();
        // Every buffer a reply may be made in has held other bytes before.
        for _ in 0..300 {
            rig.ask(&Frame::command(0xF7, vec![0xEE; 1490]));
            rig.client.read(0, 2).unwrap();
        }
        for (frame, end) in [
            (Frame::config(0, b""), 32),
            (Frame::config(0, b"").length(1056), 32),
            (Frame::mask_read(), 28),
            (Frame::mask_edit(&[]), 28),
            (Frame::mask_raw(9, 9, &[]), 28),
            (Frame::reserve(0, &[]), 26),
            (Frame::reserve_raw(9, 9, &[]), 26),
            (Frame::write(0, &[0xEE; 1024]), 36),
            (Frame::read(0, 0), 36),
            (Frame::read(64, 1), 36),
            (Frame::read(0, 3), 36),
            (Frame::flush(), 36),
            (Frame::command(0xF7, vec![0xEE; 3]), 27),
            (Frame::config(0, b"").version_flags(0x30), 24),
        ] {
            let reply = rig.ask(&frame);
            assert_eq!(reply.bytes().len(), 60, "{frame:?}");
            let padding = &reply.bytes()[end..];
            assert!(padding.iter().all(|b| *b == 0), "{reply:?}");
        }
    });
}

#[test]
fn error_and_reserved_bits_do_not_come_back() {
    each_engine("flags from scratch", &[], |rig| {
        for frame in [
            Frame::config(0, b""),
            Frame::identify(),
            Frame::read(0, 1),
            Frame::mask_read(),
            Frame::reserve(0, &[]),
        ] {
            for flags in [0x11, 0x12, 0x13, 0x14, 0x17] {
                let reply = rig.ask(&frame.clone().version_flags(flags).error(0xEE));
                assert_eq!((reply.flags(), reply.error_byte()), (8, 0), "{reply:?}");
            }
        }
        for version in [0, 2, 15] {
            let reply = rig.ask(&Frame::write(0, &[1; 512]).version_flags(version << 4));
            assert_eq!((reply.error(), reply.version()), (Some(5), 1));
        }
        for command in [4, 0x22, 0xF0, 0xFF] {
            let reply = rig.ask(&Frame::command(command, vec![7; 100]));
            assert_eq!((reply.error(), reply.body()), (Some(1), &[7; 100][..]));
        }
        assert!(rig.image().iter().all(|b| *b == 0));
    });
}

#[test]
fn tags_come_back_byte_for_byte() {
    each_engine("tags", &[], |rig| {
        for tag in [0, 1, 0x0A0B_0C0D, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF] {
            for frame in [Frame::config(0, b""), Frame::identify(), Frame::read(0, 2)] {
                assert_eq!(rig.ask(&frame.tag(tag)).tag(), tag);
            }
        }
    });
}

#[test]
fn unknown_commands_with_huge_counts_do_not_end_the_process() {
    // With AoEde: a reply of 130 KB, a failing send, exit. And CHECK POWER MODE
    // with count 1: a negative length, silence.
    each_engine("unknown ATA commands", &[], |rig| {
        for op in [
            0x00, 0x08, 0x10, 0x22, 0x29, 0x39, 0x90, 0xA1, 0xC4, 0xF5, 0xFF,
        ] {
            for count in [0, 1, 2, 255] {
                let reply = rig.ask(&Frame::ata(registers(op, 0, count), &[0xEE; 1024]));
                assert_eq!(outcome(&reply), (0x41, 4, count), "{op:#x}");
            }
        }
        for count in [0, 1, 255] {
            for aflags in [0, 1, 0x41] {
                let check = Ata {
                    aflags,
                    ..registers(opcode::CHECK_POWER_MODE, 0, count)
                };
                let reply = rig.ask(&Frame::ata(check, &[]));
                assert_eq!(outcome(&reply), (0x40, 0, 0xFF));
            }
        }
    });
}

#[test]
fn a_reply_that_the_kernel_refuses_is_left_out_and_holds_up_no_other() {
    // A failed send ended the process.
    let program = Need::Program("strace");
    if !lab::require("replies that cannot be sent", &[program]) {
        return;
    }
    each_engine("replies that cannot be sent", &[], |rig| {
        for lba in 0..2 {
            rig.client.write(lba, &[lba as u8 + 1; 512]).unwrap();
        }
        for error in ["EMSGSIZE", "ENOBUFS", "ENETDOWN", "EIO"] {
            let once = format!("inject=sendmmsg:error={error}:when=1");
            let failing = trouble(&rig.target, &["trace=sendmmsg", &once]);
            // Both are found at once, so both are sent at once.
            rig.target.signal(Signal::SIGSTOP).unwrap();
            for lba in 0..2 {
                rig.client.send(&Frame::read(lba, 1)).unwrap();
            }
            rig.target.signal(Signal::SIGCONT).unwrap();
            let replies = ata_replies(&mut rig.client, 1);
            assert_eq!(replies[0].sectors(1).unwrap(), [2; 512], "{error}");
            rig.client.config_read().unwrap();
            rig.nothing_else(None);
            drop(failing);
            assert_eq!(rig.client.read(0, 1).unwrap(), [1; 512], "{error}");
        }
    });
}

#[test]
fn the_first_frame_of_a_stranger_to_a_reservation_does_not_end_the_process() {
    each_engine("reservation", &[], |rig| {
        rig.client.write(0, &[1; 512]).unwrap();
        rig.client.reserve(1, &[NOBODY]).unwrap();
        for frame in [
            Frame::read(0, 1),
            Frame::write(0, &[0xEE; 512]),
            Frame::flush(),
            Frame::ata(registers(0x99, 0, 255), &[]),
        ] {
            assert_eq!(rig.ask(&frame).error(), Some(6));
        }
        rig.client.identify().unwrap();
        assert_eq!(rig.ask(&Frame::reserve(1, &[])).error(), Some(6));
        assert_eq!(
            rig.ask(&Frame::read(0, 1).from(NOBODY)).sectors(1).unwrap(),
            [1; 512]
        );
        rig.client.reserve(2, &[]).unwrap();
        assert_eq!(rig.client.read(0, 1).unwrap(), [1; 512]);
    });
}

#[test]
fn the_opcode_decides_about_direction_and_width() {
    // A READ with the write flag returned nothing, a WRITE without it memory.
    each_engine("opcodes", &[], |rig| {
        for (at, aflags) in [0x00, 0x01, 0x40, 0x41, 0xFF].into_iter().enumerate() {
            for (n, (write, read, junk)) in [
                (opcode::WRITE, opcode::READ, 0x5566_E000_0000),
                (opcode::WRITE_DMA, opcode::READ_DMA, 0x5566_E000_0000),
                (opcode::WRITE_EXT, opcode::READ_EXT, 0),
                (opcode::WRITE_DMA_EXT, opcode::READ_DMA_EXT, 0),
            ]
            .into_iter()
            .enumerate()
            {
                let data = [(16 * at + n + 1) as u8; 1024];
                let with = |opcode| Ata {
                    aflags,
                    ..registers(opcode, (at * 8 + n * 2) as u64 | junk, 2)
                };
                let reply = rig.ask(&Frame::ata(with(write), &data));
                assert_eq!((outcome(&reply), reply.bytes().len()), ((0x40, 0, 0), 60));
                let reply = rig.ask(&Frame::ata(with(read), &[]));
                assert_eq!(reply.sectors(2).unwrap(), data);
                assert_eq!(reply.ata().unwrap().lba, with(read).lba);
            }
        }
    });
}

#[test]
fn a_write_with_fewer_bytes_than_its_count_puts_no_memory_on_the_disk() {
    each_engine("short writes", &[], |rig| {
        for len in [0, 1, 23, 24, 511, 512, 513, 1023] {
            for op in [opcode::WRITE, opcode::WRITE_EXT, opcode::WRITE_DMA_EXT] {
                let short = Frame::ata(registers(op, 0, 2), &vec![0xEE; len]);
                assert_eq!(rig.ask(&short).error(), Some(2), "{len}");
            }
        }
        for (lba, count) in [(64, 1), (63, 2), ((1 << 48) - 1, 2)] {
            let past = Frame::ata(registers(opcode::WRITE_EXT, lba, count), &[0xEE; 1024]);
            assert_eq!(outcome(&rig.ask(&past)), (0x41, 0x10, count));
        }
        for count in [3, 128, 255] {
            let many = Frame::ata(registers(opcode::WRITE_EXT, 0, count), &[0xEE; 1024]);
            assert_eq!(rig.ask(&many).error(), Some(2));
        }
        let image = rig.image();
        assert!(image.len() == 64 * 512 && image.iter().all(|b| *b == 0));
    });
}

#[test]
fn zeros_behind_a_read_are_no_coalesced_reads() {
    // Linux may send a full frame of zeros with a READ.
    each_engine("zeros behind a READ", &[], |rig| {
        for fill in [0, 1, 0xFF] {
            let read = Frame::read(0, 1).trailing(&[fill; 1400]);
            rig.ask(&read);
            // Another answer to it would be here before this one.
            rig.client.config_read().unwrap();
            rig.client.config_read().unwrap();
            rig.nothing_else(None);
        }
    });
}

#[test]
fn what_is_not_meant_for_us_is_neither_answered_nor_executed() {
    // AoEde executed WRITEs to foreign MACs, from broadcast sources and inside
    // VLAN 5.
    each_engine("frames for others", &[], |rig| {
        let ours = rig.client.target_mac();
        let write = Frame::write(0, &[0xEE; 512]);
        for frame in [
            write.clone().to(NOBODY),
            write.clone().to(GROUP),
            write.clone().from(MacAddr::BROADCAST),
            write.clone().from(GROUP),
            write.clone().from(ours),
            write.clone().version_flags(0x18),
            write.clone().version_flags(0x1C),
            write.clone().at(2, 1),
            write.clone().at(1, 2),
            write.clone().at(0xFFFF, 2),
            write.clone().at(2, 0xFF),
            write.clone().length(35),
            write.clone().length(24),
            Frame::config(0, b"").to(NOBODY),
            Frame::config(0, b"").from(GROUP),
            Frame::identify().from(ours),
            Frame::config(0, b"").length(31),
            Frame::config(0, b"").version_flags(0x18),
        ] {
            rig.silence(&frame);
        }
        for length in [14, 15, 17, 18, 23] {
            rig.silence(&write.clone().length(length));
        }
        assert!(rig.image().iter().all(|b| *b == 0), "it was executed");
    });
}

/// A frame inside a VLAN, whose tag stands before the EtherType; and its AoE
/// tag.
fn tagged(client: &Client, frame: &Frame, tci: u16) -> (Vec<u8>, [u8; 4]) {
    let mut bytes = frame.encode(&client.defaults());
    let tag = [bytes[20], bytes[21], bytes[22], bytes[23]];
    let [high, low] = tci.to_be_bytes();
    bytes.splice(12..12, [0x81, 0x00, high, low]);
    (bytes, tag)
}

#[test]
fn frames_inside_a_vlan_are_dropped_and_priority_tags_are_not() {
    each_engine("VLAN tags", &[], |rig| {
        let write = Frame::write(0, &[0xEE; 512]);
        for tci in [5, 1, 0x0FFF, 0xE005] {
            for frame in [
                &write,
                &Frame::config(0, b""),
                &Frame::identify().everywhere(),
            ] {
                let (bytes, tag) = tagged(&rig.client, frame, tci);
                rig.silence_raw(&bytes, tag);
            }
        }
        assert!(rig.image().iter().all(|b| *b == 0), "it was executed");
        for tci in [0x0000, 0xE000] {
            for frame in [Frame::config(0, b""), Frame::read(0, 2), Frame::identify()] {
                let (bytes, tag) = tagged(&rig.client, &frame, tci);
                rig.client.send_raw(&bytes).unwrap();
                let deadline = Deadline::after(SOON).instant();
                let answer = rig
                    .client
                    .recv_like(deadline, |reply| reply.tag_bytes() == tag)
                    .unwrap();
                assert!(answer.is_some(), "no answer to a priority tag");
            }
        }
    });
}

#[test]
fn frames_for_an_interface_on_top_of_ours_are_not_ours() {
    // With an interface for VLAN 5 on top of it the kernel no longer marks the
    // frames of VLAN 5 as another host's, and a socket bound to the interface
    // below hears them all the same. Where there are no such interfaces a
    // macvlan that passes everything on is the same to the socket.
    each_engine("interfaces on top of ours", &[], |rig| {
        let host = &rig.wire.host;
        let link = ["link", "add", "link", "tgt0", "name", "top0", "type"];
        let vlan = host.ip(&[&link[..], &["vlan", "id", "5"]].concat()).is_ok();
        if !vlan {
            host.ip(&[&link[..], &["macvlan", "mode", "passthru"]].concat())
                .unwrap();
        }
        host.set_up("top0", true).unwrap();
        // By broadcast one still finds us.
        let ours = rig.client.target_mac();
        rig.client.aim(MacAddr::BROADCAST, 1, 1);
        for frame in [Frame::write(0, &[0xEE; 512]), Frame::config(0, b"")] {
            let frame = frame.to(ours);
            if vlan {
                let (bytes, tag) = tagged(&rig.client, &frame, 5);
                rig.silence_raw(&bytes, tag);
            } else {
                rig.silence(&frame);
            }
        }
        assert!(rig.image().iter().all(|b| *b == 0), "it was executed");
        rig.wire.host.ip(&["link", "del", "top0"]).unwrap();
        rig.client.aim(ours, 1, 1);
    });
}

#[test]
fn shelf_and_slot_are_each_broadcast_alone_but_not_for_changes() {
    each_engine("broadcast", &[], |rig| {
        for (shelf, slot) in [(0xFFFF, 1), (1, 0xFF), (0xFFFF, 0xFF)] {
            for to in [rig.client.target_mac(), MacAddr::BROADCAST] {
                for frame in [
                    Frame::config(0, b""),
                    Frame::identify(),
                    Frame::read(0, 2),
                    Frame::flush(),
                    Frame::mask_read(),
                    Frame::reserve(0, &[]),
                    Frame::command(0xF1, vec![]),
                ] {
                    // Our own shelf and slot come back: the client is strict.
                    rig.ask(&frame.to(to).at(shelf, slot));
                }
                let off = Ata {
                    feature: 0x82,
                    ..registers(opcode::SET_FEATURES, 0, 0)
                };
                let trim = Ata {
                    feature: 1,
                    ..registers(opcode::DATA_SET_MANAGEMENT, 0, 1)
                };
                for frame in [
                    Frame::write(0, &[0xEE; 512]),
                    Frame::ata(registers(opcode::WRITE_DMA, 0, 1), &[0xEE; 512]),
                    Frame::ata(off, &[]),
                    Frame::ata(trim, &[1; 512]),
                ] {
                    rig.silence(&frame.to(to).at(shelf, slot));
                }
            }
        }
        assert!(rig.image().iter().all(|b| *b == 0), "it was executed");
        assert_ne!(rig.client.identify().unwrap().word(85) & 1 << 5, 0);
        let all = Frame::write(0, &[0x11; 512]).to(MacAddr::BROADCAST);
        assert_eq!(outcome(&rig.ask(&all)), (0x40, 0, 0));
    });
}

#[test]
fn a_read_only_disk_refuses_writes_instead_of_forgetting_them() {
    each_engine_read_only(|rig| {
        for op in [0x30, 0x34, 0xCA, 0x35, 0x06] {
            for count in [0, 1, 255] {
                let write = Ata {
                    feature: 1,
                    ..registers(op, 1 << 40, count)
                };
                let reply = rig.ask(&Frame::ata(write, &[0xEE; 512]));
                assert_eq!(outcome(&reply), (0x41, 4, count), "{op:#x}");
            }
        }
        rig.client.read(0, 2).unwrap();
        rig.client.flush().unwrap();
    });
}

fn each_engine_read_only(run: impl Fn(&mut Rig)) {
    if !lab::require("a read-only disk", &[Need::Network]) {
        return;
    }
    for engine in ["receive=ring", "receive=recvmmsg"] {
        let mut rig = Rig::new(1500, &["--set", engine, "-r"]);
        run(&mut rig);
        assert!(rig.image().iter().all(|b| *b == 0));
        stop(rig.target);
    }
}

#[test]
fn numbers_past_their_range_are_refused_and_not_wrapped() {
    // "70000 300" was served as 4464.44, and a mask entry that was refused
    // left the disk open to all.
    let store = Store::new(8);
    let refused = |arguments: &[&str]| {
        let mut process = Spawn::new(AOEDE)
            .args(arguments.iter().copied())
            .arg(store.image())
            .arg("--state-dir")
            .arg(store.state())
            .arg("--run-dir")
            .arg(store.run())
            .start()
            .unwrap();
        let status = process.wait(Deadline::seconds(20)).unwrap();
        assert_eq!(
            status.code(),
            Some(2),
            "{arguments:?}: {:?}",
            process.output()
        );
    };
    for (shelf, slot) in [
        ("70000", "300"),
        ("65535", "1"),
        ("1", "255"),
        ("-1", "1"),
        ("0x1", "1"),
        ("1.1.1", "1"),
    ] {
        refused(&[shelf, slot, "lo"]);
    }
    for masks in [
        "",
        "00:11:22:33:44",
        "00:11:22:33:44:55,",
        "00:11:22:33:44:55,nonsense",
        "00:11:22:33:44:5g",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
    ] {
        refused(&["-m", masks, "1", "1", "lo"]);
    }
    assert!(!store.state().exists());
}

#[test]
fn jumbo_and_standard_hosts_share_one_disk_over_two_nics() {
    if !lab::require("two NICs", &[Need::Network]) {
        return;
    }
    for engine in ["receive=ring", "receive=recvmmsg"] {
        let (wire, store) = (Wire::new(1500), Store::new(256));
        Veth::new(("tgt1", &wire.host), ("ini1", &wire.peer), 9000).unwrap();
        let options = [&QUICK[..], &["--set", engine]].concat();
        let target = serve(&wire.host, &store, &["tgt0", "tgt1"], &options);
        let open = |name| wire.peer.enter(|| Client::connected(name, 1, 1));
        let mut standard = open("ini0").unwrap().unwrap();
        let mut jumbo = open("ini1").unwrap().unwrap();
        standard.strict(true);
        jumbo.strict(true);
        assert_eq!(
            (standard.sectors_per_frame(), jumbo.sectors_per_frame()),
            (2, 17)
        );
        assert_ne!(standard.target_mac(), jumbo.target_mac());
        assert_eq!(
            standard.identify().unwrap().bytes(),
            jumbo.identify().unwrap().bytes(),
            "one disk on both paths"
        );
        for round in 0..8u8 {
            let data: Vec<u8> = (0..34 * 512)
                .map(|i| (i / 512) as u8 ^ round << 4)
                .collect();
            jumbo.write_many(u64::from(round), &data).unwrap();
            assert_eq!(standard.read_many(u64::from(round), 34).unwrap(), data);
            let data: Vec<u8> = data.iter().map(|b| !b).collect();
            standard.write_many(u64::from(round), &data).unwrap();
            assert_eq!(jumbo.read_many(u64::from(round), 34).unwrap(), data);
        }
        // What is too much on one NIC is not on the other.
        assert_eq!(standard.call(&Frame::read(0, 3)).unwrap().error(), Some(2));
        assert_eq!(jumbo.call(&Frame::read(0, 18)).unwrap().error(), Some(2));
        assert!(
            jumbo
                .call(&Frame::read(0, 17))
                .unwrap()
                .sectors(17)
                .is_some()
        );
        // The other NIC's address is not this one's.
        let crossed = Frame::write(0, &[0xEE; 512]).to(jumbo.target_mac());
        standard.expect_silence(&crossed, SOON).unwrap();
        assert_ne!(jumbo.read(0, 1).unwrap(), [0xEE; 512]);
        // What one NIC is told, the other tells.
        standard.config_force(b"both").unwrap();
        assert_eq!(jumbo.config_read().unwrap().string, b"both");
        jumbo.reserve(1, &[jumbo.mac()]).unwrap();
        assert_eq!(standard.call(&Frame::read(0, 1)).unwrap().error(), Some(6));
        stop(target);
    }
}

#[test]
fn a_second_initiator_with_the_same_tag_is_not_taken_for_the_first() {
    // Its write was acknowledged and dropped.
    each_engine("equal tags", &[], |rig| {
        for n in 0..20u8 {
            for (from, lba) in [(NOBODY, 0), (rig.client.mac(), 2)] {
                let write = Frame::write(lba, &[n + lba as u8; 512]).from(from).tag(7);
                assert_eq!(outcome(&rig.ask(&write)), (0x40, 0, 0));
            }
        }
        assert_eq!(rig.client.read(0, 1).unwrap(), [19; 512]);
        assert_eq!(rig.client.read(2, 1).unwrap(), [21; 512]);
    });
}

#[test]
fn a_host_on_the_mask_list_is_heard_and_no_other() {
    each_engine("masks", &[], |rig| {
        let own = rig.client.mac();
        rig.client.mask_edit(&[Directive::add(own)]).unwrap();
        for frame in [
            Frame::config(0, b"").from(NOBODY),
            Frame::write(0, &[0xEE; 512]).from(NOBODY),
            Frame::mask_edit(&[Directive::add(NOBODY)]).from(NOBODY),
            Frame::command(0xF0, vec![]).from(NOBODY),
            Frame::config(0, b"").version_flags(0).from(NOBODY),
        ] {
            rig.silence(&frame);
        }
        rig.client.mask_edit(&[Directive::add(NOBODY)]).unwrap();
        rig.ask(&Frame::identify().from(NOBODY));
    });
}
