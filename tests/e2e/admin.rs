//! Config string, masks, reservation, over the wire and over restarts; what
//! the operator's word is worth; what is said unasked.

use std::fs;
use std::time::Duration;

use aoede::wire::MacAddr;
use initiator::client::Client;
use initiator::frame::{Ata, Directive, Frame, Reply, opcode};
use initiator::lab::{self, Deadline, Need, Veth};

use crate::rig::{QUICK, Rig, SOON, each_engine};
use crate::support::{Store, Wire, serve, stop};

const BOB: MacAddr = MacAddr([2, 0, 0, 0, 0xFE, 0xB]);
const CAROL: MacAddr = MacAddr([2, 0, 0, 0, 0xFE, 0xC]);

fn config(reply: &Reply) -> (Option<u8>, u8, Vec<u8>) {
    let config = reply.config().unwrap();
    (reply.error(), config.sub, config.string.to_vec())
}

#[test]
fn config_subcommands_follow_the_table() {
    each_engine("Query/Config", &["-b", "300"], |rig| {
        let read = rig.client.config_read().unwrap();
        assert_eq!(
            (read.buffers, read.firmware, read.sectors),
            (300, 0x4017, 2)
        );
        assert_eq!(read.string, b"");
        let text = |s: &[u8]| s.to_vec();
        assert_eq!(
            config(&rig.ask(&Frame::config(1, b""))),
            (None, 1, text(b""))
        );
        assert_eq!(
            config(&rig.ask(&Frame::config(3, b"one"))),
            (None, 3, text(b"one"))
        );
        assert_eq!(
            config(&rig.ask(&Frame::config(3, b"one"))),
            (None, 3, text(b"one"))
        );
        assert_eq!(
            config(&rig.ask(&Frame::config(3, b"two"))),
            (Some(4), 3, text(b"one"))
        );
        assert_eq!(
            config(&rig.ask(&Frame::config(1, b"one"))),
            (None, 1, text(b"one"))
        );
        assert_eq!(
            config(&rig.ask(&Frame::config(2, b"on"))),
            (None, 2, text(b"one"))
        );
        rig.silence(&Frame::config(1, b"on"));
        rig.silence(&Frame::config(2, b"two"));
        rig.silence(&Frame::config_replace(b"two", b"three"));
        let replaced = rig.ask(&Frame::config_replace(b"one", b"three"));
        assert_eq!(config(&replaced), (None, 5, text(b"three")));
        for sub in 6..16 {
            assert_eq!(
                config(&rig.ask(&Frame::config(sub, b"x"))),
                (Some(2), sub, vec![])
            );
        }
        let longest = vec![b'z'; 1024];
        assert_eq!(config(&rig.ask(&Frame::config(4, &longest))).2, longest);
        assert_eq!(
            config(&rig.ask(&Frame::config(4, b""))),
            (None, 4, text(b""))
        );
    });
}

#[test]
fn a_config_length_that_counts_the_header_stores_no_foreign_bytes() {
    // AoEde: 32 bytes of other people's disk data stored and sent out.
    each_engine("config lengths", &[], |rig| {
        rig.client.write(0, &[0xEE; 1024]).unwrap();
        rig.client.config_force(b"mine").unwrap();
        for (length, held) in [(36u16, 4), (5, 4), (1025, 1100), (0xFFFF, 4), (60, 28)] {
            for sub in [3, 4, 5] {
                let frame = Frame::config_raw(sub, length, &vec![b'x'; held]);
                assert_eq!(config(&rig.ask(&frame)), (Some(2), sub, vec![]), "{length}");
            }
            for sub in [1, 2] {
                rig.silence(&Frame::config_raw(sub, length, &vec![b'x'; held]));
            }
            // A read's length means nothing.
            let frame = Frame::config_raw(0, length, &vec![b'x'; held]);
            assert_eq!(config(&rig.ask(&frame)).2, b"mine");
        }
    });
}

#[test]
fn a_mask_delete_does_not_end_the_process_and_a_third_add_keeps_the_first() {
    each_engine("mask edits", &[], |rig| {
        let own = rig.client.mac();
        let mask = rig.client.mask_edit(&[Directive::delete(BOB)]).unwrap();
        assert_eq!((mask.error, mask.list), (0, vec![]));
        let everyone = [own, BOB, CAROL];
        for (n, mac) in everyone.into_iter().enumerate() {
            let mask = rig.client.mask_edit(&[Directive::add(mac)]).unwrap();
            assert_eq!((mask.error, &mask.list[..]), (0, &everyone[..=n]));
        }
        let bad = Directive {
            dcmd: 200,
            argument: [0; 6],
        };
        let edit = [Directive::delete(BOB), bad, Directive::delete(own)];
        let mask = rig.client.mask_edit(&edit).unwrap();
        assert_eq!((mask.error, mask.count, mask.list), (2, 1, vec![]));
        assert_eq!(rig.client.mask_read().unwrap().list, [own, CAROL]);
        let delete_own = [[0, 2].as_slice(), &own.0].concat();
        for (mcmd, count, bytes) in [
            (1, 1, &delete_own[..7]),
            (1, 255, &delete_own[..]),
            (0, 1, &[][..]),
            (2, 0, &[][..]),
        ] {
            let reply = rig.ask(&Frame::mask_raw(mcmd, count, bytes));
            assert_eq!((reply.error(), reply.mask().unwrap().error), (Some(2), 0));
        }
        // Behind the count anything may stand.
        let frame = Frame::mask_raw(1, 0, &[0xEE; 1400]);
        assert_eq!(rig.ask(&frame).mask().unwrap().list, [own, CAROL]);
        let edit = [Directive::delete(own), Directive::delete(CAROL)];
        assert_eq!(rig.client.mask_edit(&edit).unwrap().list, []);
    });
}

#[test]
fn wire_state_is_back_after_kill_9_and_after_a_restart() {
    // All of it was forgotten at a restart.
    each_engine("state over restarts", &[], |rig| {
        let own = rig.client.mac();
        let odd = [0, 0xFF, b'"', b'\\', b'\n', 0x80];
        rig.client.config_force(&odd).unwrap();
        rig.restart(&[]);
        rig.client.connect(1, 1).unwrap();
        assert_eq!(rig.client.config_read().unwrap().string, odd);
        let macs = [Directive::add(own), Directive::add(BOB)];
        rig.client.mask_edit(&macs).unwrap();
        rig.client.reserve(1, &[BOB]).unwrap();
        rig.restart(&[]);
        rig.client.connect(1, 1).unwrap();
        assert_eq!(rig.client.config_read().unwrap().string, odd);
        assert_eq!(rig.client.mask_read().unwrap().list, [own, BOB]);
        assert_eq!(rig.client.reserve(0, &[]).unwrap().list, [BOB]);
        assert_eq!(rig.ask(&Frame::read(0, 1)).error(), Some(6));
        rig.silence(&Frame::read(0, 1).from(CAROL));
        rig.client.reserve(2, &[]).unwrap();
        rig.client.config_force(b"").unwrap();
        rig.client.mask_edit(&[Directive::delete(BOB)]).unwrap();
        let status = rig.target.stop(Deadline::after(SOON)).unwrap();
        assert!(status.success());
        rig.restart(&[]);
        rig.client.connect(1, 1).unwrap();
        assert_eq!(rig.client.config_read().unwrap().string, b"");
        assert_eq!(rig.client.mask_read().unwrap().list, [own]);
        assert_eq!(rig.client.reserve(0, &[]).unwrap().list, []);
        rig.client.read(0, 2).unwrap();
    });
}

/// SET FEATURES: the write cache on or off.
fn cache(on: bool) -> Frame {
    let registers = Ata {
        feature: if on { 0x02 } else { 0x82 },
        opcode: opcode::SET_FEATURES,
        ..Ata::default()
    };
    Frame::ata(registers, &[])
}

/// SMART enabled or disabled.
fn smart(on: bool) -> Frame {
    let registers = Ata {
        feature: if on { 0xD8 } else { 0xD9 },
        opcode: opcode::SMART,
        lba: 0xC2_4F00,
        ..Ata::default()
    };
    Frame::ata(registers, &[])
}

/// What IDENTIFY says to this initiator: write cache on, SMART enabled.
fn switches(client: &mut Client) -> (bool, bool) {
    let word = client.identify().unwrap().word(85);
    (word & 1 << 5 != 0, word & 1 != 0)
}

/// Status and error of an ATA reply.
fn status(reply: &Reply) -> Option<(u8, u8)> {
    reply.ata().map(|ata| (ata.status, ata.error))
}

const DONE: Option<(u8, u8)> = Some((0x40, 0));
const ABORTED: Option<(u8, u8)> = Some((0x41, 4));

#[test]
fn a_write_cache_that_was_switched_off_stays_off() {
    each_engine("SET FEATURES over restarts", &[], |rig| {
        assert_eq!(switches(&mut rig.client), (true, true));
        assert_eq!(status(&rig.ask(&cache(false))), DONE);
        assert_eq!(status(&rig.ask(&smart(false))), DONE);
        assert_eq!(switches(&mut rig.client), (false, false));
        rig.restart(&[]);
        rig.client.connect(1, 1).unwrap();
        assert_eq!(switches(&mut rig.client), (false, false));
        rig.client.write(0, &[1; 512]).unwrap();
        // Another host has never had it off, before or after the restart.
        let bob = rig.wire.peer.enter(|| Client::open_as("ini0", BOB));
        let mut bob = bob.unwrap().unwrap();
        bob.connect(1, 1).unwrap();
        assert_eq!(switches(&mut bob), (true, true));
        assert_eq!(status(&bob.call(&cache(true)).unwrap()), DONE);
        assert_eq!(status(&bob.call(&smart(true)).unwrap()), DONE);
        assert_eq!(switches(&mut rig.client), (false, false));
        assert_eq!(status(&rig.ask(&cache(true))), DONE);
        assert_eq!(status(&rig.ask(&smart(true))), DONE);
        rig.restart(&["-s"]);
        rig.client.connect(1, 1).unwrap();
        assert_eq!(switches(&mut rig.client), (false, true));
        assert_eq!(status(&rig.ask(&cache(true))), ABORTED);
        rig.client.write(0, &[2; 512]).unwrap();
    });
}

#[test]
fn a_state_of_0_1_0_keeps_the_write_cache_off_until_the_operator_switches_it_on() {
    each_engine("a state of 0.1.0", &[], |rig| {
        rig.client.config_force(b"old").unwrap();
        let status_of_stop = rig.target.stop(Deadline::after(SOON)).unwrap();
        assert!(status_of_stop.success());
        let [state] = &rig.store.saved_states()[..] else {
            panic!("{:?}", rig.store.saved_states());
        };
        let text = "config = \"6f6c64\"\nmasks = []\nreserved = []\nsmart = false\n\
                    version = 1\nwrite_cache = false\n";
        fs::write(state, text).unwrap();
        rig.restart(&[]);
        rig.client.connect(1, 1).unwrap();
        let said = rig.target.output();
        let told = |line: &&String| line.contains("write_cache to true");
        assert!(said.iter().any(|line| told(&line)), "{said:?}");
        assert_eq!(rig.client.config_read().unwrap().string, b"old");
        assert_eq!(switches(&mut rig.client), (false, true));
        assert_eq!(status(&rig.ask(&cache(true))), ABORTED);
        rig.client.write(0, &[1; 512]).unwrap();
        // Whatever is saved meanwhile.
        rig.client.config_force(b"new").unwrap();
        rig.target.stop(Deadline::after(SOON)).unwrap();
        let text = fs::read_to_string(state).unwrap();
        let text = text.replace("write_cache = false", "write_cache = true");
        fs::write(state, text).unwrap();
        rig.restart(&[]);
        rig.client.connect(1, 1).unwrap();
        assert_eq!(switches(&mut rig.client), (true, true));
        assert_eq!(rig.client.config_read().unwrap().string, b"new");
    });
}

#[test]
fn no_frame_widens_the_operators_masks() {
    if !lab::require("-m", &[Need::Network]) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(64));
    let open = |mac| wire.peer.enter(|| Client::open_as("ini0", mac));
    let mut bob = open(BOB).unwrap().unwrap();
    let mut carol = open(CAROL).unwrap().unwrap();
    let masks = format!("{BOB},02000000fe0d");
    let options = [&QUICK[..], &["-m", &masks]].concat();
    let target = serve(&wire.host, &store, &["tgt0"], &options);
    bob.connect(1, 1).unwrap();
    carol.aim(bob.target_mac(), 1, 1);
    for frame in [
        Frame::config(0, b""),
        Frame::write(0, &[0xEE; 512]),
        Frame::mask_edit(&[Directive::add(CAROL)]),
        Frame::reserve(2, &[CAROL]),
        Frame::identify().everywhere(),
    ] {
        carol.expect_silence_beside(&frame, &mut bob, SOON).unwrap();
    }
    // The operator's list is not told, and not to be edited.
    assert_eq!(bob.mask_read().unwrap().list, []);
    let mask = bob.mask_edit(&[Directive::add(CAROL)]).unwrap();
    assert_eq!((mask.error, mask.count), (1, 0));
    let mask = bob.mask_edit(&[Directive::add(BOB)]).unwrap();
    assert_eq!((mask.error, mask.list), (0, vec![BOB]));
    let mask = bob.mask_edit(&[Directive::delete(BOB)]).unwrap();
    assert_eq!((mask.error, mask.list), (0, vec![]));
    let frame = Frame::config(0, b"");
    carol.expect_silence_beside(&frame, &mut bob, SOON).unwrap();
    stop(target);
    assert!(store.sectors(0, 64).iter().all(|b| *b == 0));
}

#[test]
fn what_is_denied_on_the_command_line_is_refused_on_the_wire() {
    each_engine(
        "--deny",
        &["--deny", "config,mask", "--deny", "reserve,features"],
        |rig| {
            let own = rig.client.mac();
            for frame in [
                Frame::config(3, b"x"),
                Frame::config(4, b"x"),
                Frame::config_replace(b"", b"x"),
                Frame::mask_edit(&[Directive::add(own)]),
                Frame::reserve(1, &[own]),
                Frame::reserve(2, &[own]),
            ] {
                assert_eq!(rig.ask(&frame).error(), Some(2), "{frame:?}");
            }
            for frame in [cache(false), cache(true), smart(false), smart(true)] {
                assert_eq!(status(&rig.ask(&frame)), ABORTED, "{frame:?}");
            }
            assert_eq!(switches(&mut rig.client), (true, true));
            assert_eq!(rig.client.config_read().unwrap().string, b"");
            assert_eq!(rig.client.mask_read().unwrap().list, []);
            assert_eq!(rig.client.reserve(0, &[]).unwrap().list, []);
            assert_eq!(config(&rig.ask(&Frame::config(1, b""))), (None, 1, vec![]));
            assert!(rig.store.saved_states().is_empty());
        },
    );
}

#[test]
fn what_cannot_be_saved_is_refused_and_all_else_goes_on() {
    each_engine("a state directory in the way", &[], |rig| {
        let own = rig.client.mac();
        // The directory is made when it is needed; now it cannot be.
        fs::remove_dir_all(rig.store.state()).unwrap();
        fs::write(rig.store.state(), "in the way").unwrap();
        let changes = [
            Frame::config(3, b"x"),
            Frame::config(4, b"x"),
            Frame::mask_edit(&[Directive::add(own)]),
            Frame::reserve(1, &[own]),
            Frame::reserve(2, &[own]),
        ];
        for frame in &changes {
            assert_eq!(rig.ask(frame).error(), Some(2), "{frame:?}");
        }
        assert_eq!(rig.client.config_read().unwrap().string, b"");
        assert_eq!(rig.client.mask_read().unwrap().list, []);
        assert_eq!(rig.client.reserve(0, &[]).unwrap().list, []);
        rig.client.write(0, &[1; 512]).unwrap();
        assert_eq!(rig.client.read(0, 1).unwrap(), [1; 512]);
        rig.ask(&Frame::identify().from(BOB));
        fs::remove_file(rig.store.state()).unwrap();
        for frame in &changes {
            assert_eq!(rig.ask(frame).error(), None, "{frame:?}");
        }
    });
}

#[test]
fn a_state_that_cannot_be_read_is_not_taken_for_an_empty_one() {
    // That would open a masked disk to everyone.
    if !lab::require("a damaged state", &[Need::Network]) {
        return;
    }
    let mut rig = Rig::new(1500, &[]);
    let own = rig.client.mac();
    rig.client.mask_edit(&[Directive::add(own)]).unwrap();
    assert!(rig.target.stop(Deadline::after(SOON)).unwrap().success());
    let mut files = fs::read_dir(rig.store.state()).unwrap();
    let file = files.next().unwrap().unwrap().path();
    assert!(files.next().is_none(), "something was left behind");
    let text = fs::read(&file).unwrap();
    fs::write(&file, &text[..text.len() / 2]).unwrap();
    let mut target = crate::support::command(&rig.wire.host, &rig.store, &["tgt0"], &QUICK)
        .start()
        .unwrap();
    let status = target.wait(Deadline::after(SOON)).unwrap();
    assert_eq!(status.code(), Some(1));
    let said = target.output().join("\n");
    assert!(said.contains(&*file.to_string_lossy()), "{said}");
}

/// The advertisements among what came in.
fn advertisements(client: &mut Client) -> Vec<Reply> {
    let mut all = client.drain().unwrap();
    all.retain(|reply| reply.tag() == 0 && reply.flags() & 4 == 0);
    all
}

#[test]
fn a_target_that_starts_says_so_on_every_nic() {
    // AoEde's advertisements carried version 0.
    if !lab::require("advertisements", &[Need::Network]) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(64));
    Veth::new(("tgt1", &wire.host), ("ini1", &wire.peer), 9000).unwrap();
    let open = |name| wire.peer.enter(|| Client::open(name));
    let mut clients = [
        open("ini0").unwrap().unwrap(),
        open("ini1").unwrap().unwrap(),
    ];
    let target = serve(&wire.host, &store, &["tgt0", "tgt1"], &QUICK);
    for (client, sectors) in clients.iter_mut().zip([2, 17]) {
        let deadline = Deadline::after(SOON).instant();
        let reply = client.recv(deadline).unwrap().expect("no advertisement");
        assert_eq!(reply.destination(), MacAddr::BROADCAST);
        assert_eq!(
            reply.bytes()[12..24],
            [0x88, 0xA2, 0x18, 0, 0, 1, 1, 1, 0, 0, 0, 0]
        );
        assert_eq!(reply.bytes().len(), 60);
        let config = reply.config().unwrap();
        assert_eq!(
            (config.buffers, config.sectors, config.sub),
            (64, sectors, 0)
        );
        assert_eq!(reply.bytes()[32..], [0; 28]);
        client.connect(1, 1).unwrap();
        assert_eq!(reply.source(), client.target_mac());
        assert_eq!(advertisements(client).len(), 0, "more than one");
    }
    let [client, _] = &mut clients;
    client.config_force(b"named").unwrap();
    stop(target);
    let target = serve(&wire.host, &store, &["tgt0", "tgt1"], &QUICK);
    for client in &mut clients {
        let deadline = Deadline::after(SOON).instant();
        let reply = client.recv(deadline).unwrap().expect("no advertisement");
        assert_eq!(reply.config().unwrap().string, b"named");
    }
    stop(target);
}

#[test]
fn a_masked_target_says_so_to_those_on_the_list_alone() {
    if !lab::require("masked advertisements", &[Need::Network]) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(64));
    let open = |mac| wire.peer.enter(|| Client::open_as("ini0", mac));
    let [mut bob, mut carol] = [BOB, CAROL].map(|mac| open(mac).unwrap().unwrap());
    let masks = format!("{BOB},02:00:00:00:fe:0d");
    let options = [&QUICK[..], &["-m", &masks]].concat();
    let target = serve(&wire.host, &store, &["tgt0"], &options);
    let deadline = Deadline::after(SOON).instant();
    let reply = bob.recv(deadline).unwrap().expect("no advertisement");
    assert_eq!((reply.destination(), reply.tag()), (BOB, 0));
    bob.connect(1, 1).unwrap();
    // What was sent before Bob's answers is here.
    assert_eq!(carol.drain().unwrap(), []);
    assert_eq!(advertisements(&mut bob), []);
    stop(target);
}

#[test]
fn a_string_that_no_nic_could_report_is_not_set() {
    if !lab::require("long config strings", &[Need::Network]) {
        return;
    }
    for engine in ["receive=ring", "receive=recvmmsg"] {
        let mut rig = Rig::new(1000, &["--set", engine]);
        let fits = vec![b'x'; 1014 - 32];
        assert_eq!(config(&rig.ask(&Frame::config(4, &fits))), (None, 4, fits));
        // The kernel lets frames in that are longer by a VLAN tag; from a host
        // with a larger MTU they come.
        rig.wire.peer.set_mtu("ini0", 1500).unwrap();
        rig.client = rig.wire.client();
        for more in [1, 2, 4] {
            let long = vec![b'y'; 1014 - 32 + more];
            for sub in [3, 4] {
                assert_eq!(
                    config(&rig.ask(&Frame::config(sub, &long))),
                    (Some(2), sub, vec![])
                );
            }
        }
        assert_eq!(rig.client.config_read().unwrap().string.len(), 982);
        rig.finish();
    }
}

#[test]
fn a_mask_list_holds_255_and_no_more_than_a_reply_can_tell() {
    if !lab::require("long mask lists", &[Need::Network]) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(64));
    Veth::new(("tgt1", &wire.host), ("ini1", &wire.peer), 9000).unwrap();
    let target = serve(&wire.host, &store, &["tgt0", "tgt1"], &QUICK);
    let open = |name| wire.peer.enter(|| Client::connected(name, 1, 1));
    let mut standard = open("ini0").unwrap().unwrap();
    let mut jumbo = open("ini1").unwrap().unwrap();
    let own = [standard.mac(), jumbo.mac()].map(Directive::add);
    let many = |range: std::ops::Range<u8>| -> Vec<Directive> {
        range
            .map(|n| Directive::add(MacAddr([2, 0, 0, 1, 0, n])))
            .collect()
    };
    assert_eq!(jumbo.mask_edit(&own).unwrap().count, 2);
    assert_eq!(standard.mask_edit(&many(0..183)).unwrap().count, 185);
    let full = standard.mask_edit(&many(183..184)).unwrap();
    assert_eq!((full.error, full.count), (3, 0));
    let full = jumbo.mask_edit(&many(183..255)).unwrap();
    assert_eq!((full.error, full.count), (3, 70));
    let all = jumbo.mask_read().unwrap();
    assert_eq!((all.error, all.list.len()), (0, 255));
    assert_eq!(standard.call(&Frame::mask_read()).unwrap().error(), Some(2));
    stop(target);
    let target = serve(&wire.host, &store, &["tgt0", "tgt1"], &QUICK);
    jumbo.connect(1, 1).unwrap();
    assert_eq!(jumbo.mask_read().unwrap().list, all.list);
    let half: Vec<Directive> = all.list[100..]
        .iter()
        .map(|mac| Directive::delete(*mac))
        .collect();
    assert_eq!(jumbo.mask_edit(&half).unwrap().count, 100);
    standard.connect(1, 1).unwrap();
    assert_eq!(standard.mask_read().unwrap().list, all.list[..100]);
    stop(target);
}

#[test]
fn a_reservation_passes_from_hand_to_hand() {
    each_engine("Reserve/Release", &[], |rig| {
        let own = rig.client.mac();
        let list = |reply: Reply| (reply.error(), reply.reserve().unwrap().list);
        assert_eq!(
            list(rig.ask(&Frame::reserve(1, &[own, BOB]))),
            (None, vec![own, BOB])
        );
        let carols = Frame::reserve(1, &[CAROL]).from(CAROL);
        assert_eq!(list(rig.ask(&carols)), (Some(6), vec![own, BOB]));
        let bobs = Frame::reserve(1, &[BOB]).from(BOB);
        assert_eq!(list(rig.ask(&bobs)), (None, vec![BOB]));
        assert_eq!(list(rig.ask(&Frame::reserve(1, &[]))), (Some(6), vec![BOB]));
        assert_eq!(
            list(rig.ask(&Frame::reserve(2, &[CAROL]))),
            (None, vec![CAROL])
        );
        for frame in [
            Frame::reserve_raw(3, 0, &[]),
            Frame::reserve_raw(1, 1, &own.0[..5]),
            Frame::reserve_raw(2, 255, &[0; 60]),
            Frame::reserve_raw(0, 1, &[]),
        ] {
            assert_eq!(list(rig.ask(&frame.from(CAROL))), (Some(2), vec![]));
        }
        let release = Frame::reserve(1, &[]).from(CAROL);
        assert_eq!(list(rig.ask(&release)), (None, vec![]));
        rig.client.read(0, 1).unwrap();
    });
}

#[test]
fn changes_of_many_hosts_at_once_are_all_answered() {
    each_engine("changes at once", &[], |rig| {
        let mut sent = Vec::new();
        for n in 0..40u8 {
            let from = MacAddr([2, 0, 0, 0, 0xFD, n % 8]);
            let frame = match n % 2 {
                0 => Frame::config(4, &[n]),
                _ => Frame::reserve(2, &[rig.client.mac(), from]),
            };
            sent.push(rig.client.send(&frame.from(from)).unwrap());
        }
        let deadline = Deadline::after(Duration::from_secs(20)).instant();
        while !sent.is_empty() {
            // The advertisement of the start may stand among the answers.
            let asked = |reply: &Reply| sent.iter().position(|r| r[20..24] == reply.tag_bytes());
            let reply = rig
                .client
                .recv_like(deadline, |reply| asked(reply).is_some())
                .unwrap()
                .expect("an answer is missing");
            let request = sent.remove(asked(&reply).unwrap());
            assert_eq!(reply.breaches(&request, 1, 1), Vec::<String>::new());
            assert_eq!(reply.error(), None);
        }
        assert_eq!(rig.client.config_read().unwrap().string, [38]);
        assert_eq!(rig.client.reserve(0, &[]).unwrap().list[1].0[5], 7);
    });
}
