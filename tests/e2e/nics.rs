//! Interfaces that go down, change, vanish and come back while we serve.

use std::thread;
use std::time::Duration;

use aoede::wire::MacAddr;
use initiator::client::Client;
use initiator::frame::{Frame, SECTOR};
use initiator::lab::{self, Deadline, Namespace, Need, Process, pin, wait_until};
use nix::unistd::Pid;

use crate::support::{Store, command, serve, stop};
use crate::workshop::{
    Frozen, Lab, Load, Temper, advertisement, assert_idle, find_advertisement, mac_of, sector,
    sectors_told, soon, timed, trouble,
};

const IMAGE: u64 = 4096;

fn engine(name: &str) -> [String; 2] {
    ["--set".into(), format!("receive={name}")]
}

fn serve_with(lab: &Lab, store: &Store, nics: &[&str], engine_name: &str) -> Process {
    let options = engine(engine_name);
    serve(&lab.host, store, nics, &[&options[0], &options[1]])
}

fn expected_sectors(mtu: u32) -> u8 {
    ((mtu - 36) / 512).min(255) as u8
}

/// Reads and writes full frames and a part of one, and sees that no reply is
/// longer than the MTU allows.
fn exercise(client: &mut Client, mtu: u32, lba: u64, mark: u8) {
    client.strict(true);
    client.connect(1, 1).unwrap();
    let most = client.sectors_per_frame();
    assert_eq!(most, expected_sectors(mtu));
    let count = usize::from(most) * 2 + 1;
    let data: Vec<u8> = (0..count * SECTOR)
        .map(|i| mark.wrapping_mul(31).wrapping_add((i / 3) as u8))
        .collect();
    client.write_many(lba, &data).unwrap();
    assert_eq!(client.read_many(lba, count).unwrap(), data);
    let full = client.call(&Frame::read(lba, most)).unwrap();
    assert_eq!(full.bytes().len(), 36 + usize::from(most) * SECTOR);
    assert!(full.bytes().len() <= mtu as usize + 14);
    if most < 255 {
        let beyond = client.call(&Frame::read(lba, most + 1)).unwrap();
        assert_eq!(beyond.error(), Some(2), "{beyond:?}");
    }
    assert_eq!(client.identify().unwrap().sectors(), IMAGE);
}

fn mtu_changes(engine_name: &str) {
    if !lab::require("MTU changes while serving", &[Need::Network]) {
        return;
    }
    // The initiator's side can always carry more than ours.
    let (lab, store) = (Lab::new(2, 65_535), Store::new(IMAGE));
    lab.host.set_mtu("tgt0", 1500).unwrap();
    lab.host.set_mtu("tgt1", 1500).unwrap();
    let target = serve_with(&lab, &store, &["tgt0", "tgt1"], engine_name);
    let mut client = lab.listener(0);
    thread::scope(|scope| {
        let load = Load::start(scope, &lab.peer, "ini1", 3000, Temper::Strict);
        exercise(&mut client, 1500, 0, 0);
        for (round, mtu) in (1..).zip([9000, 1500, 576, 65_535, 4000, 548, 1500]) {
            lab.host.set_mtu("tgt0", mtu).unwrap();
            let told = advertisement(&mut client, soon());
            assert_eq!(sectors_told(&told), expected_sectors(mtu), "MTU {mtu}");
            exercise(&mut client, mtu, 100 * u64::from(round), round);
            load.goes_on();
        }
        load.end();
    });
    stop(target);
}

#[test]
fn mtu_changes_are_followed_with_a_ring() {
    mtu_changes("ring");
}

#[test]
fn mtu_changes_are_followed_with_recvmmsg() {
    mtu_changes("recvmmsg");
}

#[test]
fn an_mtu_that_holds_no_sector_takes_the_nic_out_until_it_grows() {
    if !lab::require("an MTU below a sector", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    let mut client = lab.listener(0);
    let mut other = lab.client(1);
    lab.host.set_mtu("tgt0", 547).unwrap();
    let line = target.wait_for_line("tgt0: MTU 547", soon()).unwrap();
    assert!(line.contains("warning"), "{line}");
    other.write(7, &[7; SECTOR]).unwrap();
    lab.host.set_mtu("tgt0", 548).unwrap();
    assert_eq!(sectors_told(&advertisement(&mut client, soon())), 1);
    client.connect(1, 1).unwrap();
    assert_eq!(client.read(7, 1).unwrap(), [7; SECTOR]);
    stop(target);
}

#[test]
fn a_loopback_mtu_of_a_quarter_megabyte_is_used_up_to_255_sectors() {
    if !lab::require("a large MTU on lo", &[Need::Network]) {
        return;
    }
    let (host, store) = (Namespace::new().unwrap(), Store::new(IMAGE));
    for (mtu, name) in [(200_000, "ring"), (250_000, "recvmmsg")] {
        host.set_mtu("lo", mtu).unwrap();
        let [set, value] = engine(name);
        let target = serve(&host, &store, &["lo"], &[&set, &value]);
        let mut client = host
            .enter(|| Client::connected("lo", 1, 1))
            .unwrap()
            .unwrap();
        exercise(&mut client, mtu, 5, 9);
        // And down to what lo begins with. What came at the start is no news.
        client.drain().unwrap();
        host.set_mtu("lo", 65_536).unwrap();
        let told = advertisement(&mut client, soon());
        assert_eq!(sectors_told(&told), expected_sectors(65_536));
        exercise(&mut client, 65_536, 800, 10);
        stop(target);
    }
}

fn link_flaps(engine_name: &str) {
    if !lab::require("links that go down and up", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve_with(&lab, &store, &["tgt0", "tgt1"], engine_name);
    let mut client = lab.listener(0);
    let mut other = lab.client(1);
    for (round, (namespace, nic)) in [(&lab.host, "tgt0"), (&lab.peer, "ini0")]
        .into_iter()
        .cycle()
        .take(4)
        .enumerate()
    {
        namespace.set_up(nic, false).unwrap();
        target.wait_for_line("tgt0: link down", soon()).unwrap();
        let data = sector(round as u64, 1);
        other.write(round as u64, &data).unwrap();
        if round < 2 {
            assert_idle(&target);
        }
        namespace.set_up(nic, true).unwrap();
        target.wait_for_line("tgt0: link up", soon()).unwrap();
        advertisement(&mut client, soon());
        assert_eq!(client.read(round as u64, 1).unwrap(), data);
    }
    stop(target);
}

#[test]
fn a_link_that_goes_down_and_up_is_served_again_and_advertised_with_a_ring() {
    link_flaps("ring");
}

#[test]
fn a_link_that_goes_down_and_up_is_served_again_and_advertised_with_recvmmsg() {
    link_flaps("recvmmsg");
}

#[test]
fn another_mac_is_answered_from_at_once() {
    if !lab::require("a MAC change while serving", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let target = serve(&lab.host, &store, &["tgt0"], &[]);
    let mut client = lab.listener(0);
    client.strict(true);
    let old = mac_of(&lab.host, "tgt0");
    let new = MacAddr([2, 0xA0, 0xE0, 0xDE, 0, 1]);
    lab.host
        .ip(&["link", "set", "tgt0", "address", &new.to_string()])
        .unwrap();
    assert_eq!(advertisement(&mut client, soon()).source(), new);
    client.connect(1, 1).unwrap();
    assert_eq!(client.target_mac(), new);
    client.write(3, &[3; SECTOR]).unwrap();
    assert_eq!(client.read(3, 1).unwrap(), [3; SECTOR]);
    // The old one is another host's now.
    let mut other = lab.client(0);
    let stale = Frame::write(3, &[4; SECTOR]).to(old);
    client
        .expect_silence_beside(&stale, &mut other, Duration::from_secs(5))
        .unwrap();
    assert_eq!(client.read(3, 1).unwrap(), [3; SECTOR]);
    stop(target);
}

#[test]
fn a_nic_that_is_down_at_the_start_is_served_when_it_comes_up() {
    if !lab::require("a NIC that is down at the start", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    lab.host.set_up("tgt0", false).unwrap();
    let mut target = command(&lab.host, &store, &["tgt0", "tgt1"], &[])
        .start()
        .unwrap();
    target.wait_for_line("tgt0: ", soon()).unwrap();
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    assert!(
        target.output().iter().any(|l| l.contains("link down")),
        "{:?}",
        target.output()
    );
    let mut other = lab.client(1);
    other.write(1, &[5; SECTOR]).unwrap();
    assert_idle(&target);
    let mut client = lab.peer.enter(|| Client::open("ini0")).unwrap().unwrap();
    lab.host.set_up("tgt0", true).unwrap();
    advertisement(&mut client, soon());
    client.connect(1, 1).unwrap();
    assert_eq!(client.read(1, 1).unwrap(), [5; SECTOR]);
    stop(target);
}

/// Takes the wire away and makes it again, so that the initiator hears all that
/// is sent on the new one.
fn replace(lab: &Lab, target: &mut Process) -> Client {
    let before = lab.host.ip(&["-o", "link", "show", "tgt0"]).unwrap();
    lab.cut(0);
    target.wait_for_line("tgt0: there is none", soon()).unwrap();
    // Under another name first: so it is there when an initiator listens.
    let end = ["peer", "name", "ini0", "netns", lab.peer.name()];
    lab.host
        .ip(&[&["link", "add", "new0", "type", "veth"][..], &end].concat())
        .unwrap();
    lab.peer.set_up("ini0", true).unwrap();
    let client = lab.peer.enter(|| Client::open("ini0")).unwrap().unwrap();
    lab.host
        .ip(&["link", "set", "new0", "name", "tgt0"])
        .unwrap();
    lab.host.set_up("tgt0", true).unwrap();
    let after = lab.host.ip(&["-o", "link", "show", "tgt0"]).unwrap();
    let index = |line: &str| line.split(':').next().unwrap().to_owned();
    assert_ne!(index(&before), index(&after));
    client
}

fn removed_and_made_again(engine_name: &str) {
    if !lab::require("an interface made again", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve_with(&lab, &store, &["tgt0", "tgt1"], engine_name);
    let mut other = lab.client(1);
    for round in 0..3 {
        let mut client = replace(&lab, &mut target);
        other.write(round, &sector(round, 9)).unwrap();
        advertisement(&mut client, soon());
        client.connect(1, 1).unwrap();
        assert_eq!(client.read(round, 1).unwrap(), sector(round, 9));
        client.write(round, &sector(round, 10)).unwrap();
        assert_eq!(other.read(round, 1).unwrap(), sector(round, 10));
    }
    lab.cut(0);
    target.wait_for_line("tgt0: there is none", soon()).unwrap();
    assert_idle(&target);
    stop(target);
}

#[test]
fn an_interface_made_again_under_its_name_is_served_with_a_ring() {
    removed_and_made_again("ring");
}

#[test]
fn an_interface_made_again_under_its_name_is_served_with_recvmmsg() {
    removed_and_made_again("recvmmsg");
}

#[test]
fn the_last_interface_may_go_too_and_come_back() {
    if !lab::require("the only interface removed", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0"], &[]);
    lab.client(0).write(1, &[1; SECTOR]).unwrap();
    let mut client = replace(&lab, &mut target);
    advertisement(&mut client, soon());
    client.connect(1, 1).unwrap();
    assert_eq!(client.read(1, 1).unwrap(), [1; SECTOR]);
    lab.cut(0);
    target.wait_for_line("tgt0: there is none", soon()).unwrap();
    stop(target);
}

/// The kernel detaches a socket from an interface that goes, and does not say
/// later that it is another one, if number, MAC and MTU are the same again.
#[test]
fn an_interface_that_was_away_while_nobody_looked_is_heard_again() {
    if !lab::require("an interface away unseen", &[Need::Network]) {
        return;
    }
    for name in ["ring", "recvmmsg"] {
        let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
        let target = serve_with(&lab, &store, &["tgt0"], name);
        let mut client = lab.client(0);
        client.write(1, &[1; SECTOR]).unwrap();
        let before = lab.host.ip(&["-o", "link", "show", "tgt0"]).unwrap();
        let frozen = Frozen::new(&target);
        let elsewhere = Namespace::new().unwrap();
        lab.host
            .ip(&["link", "set", "tgt0", "netns", elsewhere.name()])
            .unwrap();
        elsewhere
            .ip(&["link", "set", "tgt0", "netns", lab.host.name()])
            .unwrap();
        lab.host.set_up("tgt0", true).unwrap();
        let after = lab.host.ip(&["-o", "link", "show", "tgt0"]).unwrap();
        let index = |line: &str| line.split(':').next().unwrap().to_owned();
        assert_eq!(index(&before), index(&after), "the test tests nothing");
        drop(frozen);
        advertisement(&mut client, soon());
        assert_eq!(client.read(1, 1).unwrap(), [1; SECTOR]);
        stop(target);
    }
}

#[test]
fn an_interface_that_is_renamed_away_and_back_is_served_by_its_name() {
    if !lab::require("an interface renamed", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0"], &[]);
    let mut client = lab.client(0);
    let rename = |from: &str, to: &str| {
        lab.host.set_up(from, false).unwrap();
        lab.host.ip(&["link", "set", from, "name", to]).unwrap();
        lab.host.set_up(to, true).unwrap();
    };
    rename("tgt0", "away0");
    target.wait_for_line("tgt0: there is none", soon()).unwrap();
    // The other wire's end takes the name: that is what is served then.
    rename("tgt1", "tgt0");
    let mut other = lab.listener(1);
    other.write(2, &[2; SECTOR]).unwrap();
    client.drain().unwrap();
    rename("tgt0", "tgt1");
    rename("away0", "tgt0");
    advertisement(&mut client, soon());
    assert_eq!(client.read(2, 1).unwrap(), [2; SECTOR]);
    stop(target);
}

fn everything_on_one_nic(engine_name: &str) {
    if !lab::require("a load beside a NIC in trouble", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 9000), Store::new(IMAGE));
    let mut target = serve_with(&lab, &store, &["tgt0", "tgt1"], engine_name);
    let pid = target.pid();
    let written = thread::scope(|scope| {
        let beside = Load::start(scope, &lab.peer, "ini1", 0, Temper::Strict);
        let through = Load::start(scope, &lab.peer, "ini0", 1000, Temper::Patient);
        let set = |what: &[&str]| {
            let all = [&["link", "set", "tgt0"][..], what].concat();
            lab.host.ip(&all).unwrap();
        };
        let both = || {
            beside.goes_on();
            through.goes_on();
        };
        both();
        for _ in 0..2 {
            set(&["down"]);
            target.wait_for_line("tgt0: link down", soon()).unwrap();
            beside.goes_on();
            set(&["up"]);
            both();
            lab.peer.set_up("ini0", false).unwrap();
            target.wait_for_line("tgt0: link down", soon()).unwrap();
            beside.goes_on();
            lab.peer.set_up("ini0", true).unwrap();
            both();
            set(&["mtu", "1500"]);
            both();
            set(&["mtu", "500"]);
            target.wait_for_line("tgt0: MTU 500", soon()).unwrap();
            beside.goes_on();
            set(&["mtu", "9000"]);
            both();
            set(&["address", "02:00:00:00:aa:01"]);
            both();
            lab.cut(0);
            target.wait_for_line("tgt0: there is none", soon()).unwrap();
            beside.goes_on();
            lab.wire(0, 3000);
            both();
            set(&["mtu", "9000"]);
            lab.peer.set_mtu("ini0", 9000).unwrap();
            both();
            // Faster than anyone can follow: what counts is how it is then.
            for _ in 0..5 {
                set(&["down"]);
                set(&["mtu", "1500"]);
                set(&["up"]);
                set(&["mtu", "9000"]);
            }
            both();
        }
        [beside.end(), through.end()]
    });
    assert_eq!((target.exit_status().unwrap(), target.pid()), (None, pid));
    stop(target);
    let image = std::fs::read(store.image()).unwrap();
    written.iter().for_each(|written| written.check(&image));
}

#[test]
fn a_load_beside_a_nic_in_every_trouble_misses_nothing_with_a_ring() {
    everything_on_one_nic("ring");
}

#[test]
fn a_load_beside_a_nic_in_every_trouble_misses_nothing_with_recvmmsg() {
    everything_on_one_nic("recvmmsg");
}

/// While the target stands still, writes and reads of one sector are sent now
/// on one NIC, now on the other. Each read must see the write before it, on
/// whichever NIC that came.
fn order_of_two_nics(engine_name: &str) {
    if !lab::require("the order of two NICs", &[Need::Network]) {
        return;
    }
    const FRAMES: u64 = 300;
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let target = serve_with(&lab, &store, &["tgt0", "tgt1"], engine_name);
    let clients = [lab.client(0), lab.client(1)];
    let sectors = [10u64, 11, 500];
    // On one processor, whose queue keeps the order in which frames are sent.
    let (mut clients, expected) = thread::scope(|scope| {
        let send = scope.spawn(|| {
            pin(Pid::from_raw(0), 0).unwrap();
            let mut clients = clients;
            let mut last = [0; 3];
            let mut expected = [vec![], vec![]];
            let frozen = Frozen::new(&target);
            for n in 1..=FRAMES {
                // Runs of one to four frames on a NIC.
                let nic = usize::from((n * n / 3) % 7 < 3);
                let which = (n % 3) as usize;
                let lba = sectors[which];
                if n % 4 == 3 {
                    let bytes = clients[nic].send(&Frame::read(lba, 1)).unwrap();
                    let tag: [u8; 4] = bytes[20..24].try_into().unwrap();
                    expected[nic].push((tag, lba, last[which]));
                } else {
                    clients[nic]
                        .send(&Frame::write(lba, &sector(lba, n)))
                        .unwrap();
                    last[which] = n;
                }
            }
            drop(frozen);
            (clients, expected)
        });
        send.join().unwrap()
    });
    for (client, mut expected) in clients.iter_mut().zip(expected) {
        let deadline = soon();
        while !expected.is_empty() {
            let reply = client.recv(deadline.instant()).unwrap();
            let reply = reply.unwrap_or_else(|| panic!("no answer to {expected:?}"));
            let Some(at) = expected.iter().position(|e| e.0 == reply.tag_bytes()) else {
                continue;
            };
            let (_, lba, generation) = expected.swap_remove(at);
            let wanted = match generation {
                0 => vec![0; SECTOR],
                generation => sector(lba, generation),
            };
            assert_eq!(reply.sectors(1).unwrap(), wanted, "sector {lba}");
        }
    }
    stop(target);
}

#[test]
fn frames_of_two_nics_are_taken_in_their_order_with_rings() {
    order_of_two_nics("ring");
}

#[test]
fn frames_of_two_nics_are_taken_in_their_order_with_recvmmsg() {
    order_of_two_nics("recvmmsg");
}

#[test]
fn each_nic_is_answered_through_itself_and_tells_its_own_mtu() {
    if !lab::require("two NICs with different MTUs", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    lab.peer.set_mtu("ini1", 9000).unwrap();
    lab.host.set_mtu("tgt1", 9000).unwrap();
    let target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    let (mut small, mut large) = (lab.listener(0), lab.listener(1));
    exercise(&mut small, 1500, 0, 1);
    exercise(&mut large, 9000, 100, 2);
    assert_eq!(small.target_mac(), mac_of(&lab.host, "tgt0"));
    assert_eq!(large.target_mac(), mac_of(&lab.host, "tgt1"));
    // A change on one is no news on the other.
    lab.host.set_mtu("tgt1", 4000).unwrap();
    assert_eq!(sectors_told(&advertisement(&mut large, soon())), 7);
    small.call(&Frame::identify()).unwrap();
    let unasked = find_advertisement(&mut small, Deadline::after(Duration::ZERO));
    assert!(unasked.is_none(), "{unasked:?}");
    stop(target);
}

#[test]
fn at_the_start_every_nic_hears_of_us_unasked() {
    if !lab::require("advertising at the start", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let open = |nic: &str| lab.peer.enter(|| Client::open(nic)).unwrap().unwrap();
    let (mut a, mut b) = (open("ini0"), open("ini1"));
    let target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    for (client, nic) in [(&mut a, "tgt0"), (&mut b, "tgt1")] {
        let told = advertisement(client, soon());
        assert_eq!(told.source(), mac_of(&lab.host, nic));
        assert_eq!(told.config().unwrap().buffers, 64);
    }
    stop(target);
}

#[test]
fn replies_that_wait_for_a_nic_that_goes_do_not_hold_up_the_end() {
    if !lab::require("stopping with a NIC down", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    let mut client = lab.client(0);
    let frozen = Frozen::new(&target);
    for lba in 0..100 {
        client.send(&Frame::write(lba, &[1; SECTOR])).unwrap();
        client.send(&Frame::read(lba, 1)).unwrap();
    }
    lab.cut(0);
    drop(frozen);
    let mut other = lab.client(1);
    wait_until("what was taken in to be done", soon(), || {
        other.call(&Frame::identify()).is_ok()
    })
    .unwrap();
    stop(target);
}

/// A ring whose blocks come to us by a timer (TPACKET_V3) takes a millisecond
/// for every single request.
#[test]
fn a_single_request_waits_for_no_timer() {
    if !lab::require("the time of single requests", &[Need::Network]) {
        return;
    }
    for name in ["ring", "recvmmsg"] {
        let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
        let target = serve_with(&lab, &store, &["tgt0", "tgt1"], name);
        let mut client = lab.client(0);
        client.write(5, &[5; SECTOR]).unwrap();
        let read = |_| timed(|| client.read(5, 1).unwrap()).1;
        let mut times: Vec<Duration> = (0..300).map(read).collect();
        times.sort();
        // The better ones, since the machine may be busy.
        assert!(times[30] < Duration::from_micros(700), "{:?}", &times[..40]);
        stop(target);
    }
}

#[test]
fn those_on_the_masks_and_nobody_else_hear_of_a_link_that_is_back() {
    if !lab::require("advertising to masks", &[Need::Network]) {
        return;
    }
    const HOSTS: u8 = 150;
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let macs: Vec<MacAddr> = (0..HOSTS).map(|n| MacAddr([2, 0, 0, 0, 5, n])).collect();
    let list: Vec<String> = macs.iter().map(MacAddr::to_string).collect();
    let mut target = serve(&lab.host, &store, &["tgt0"], &["-m", &list.join(",")]);
    let mut client = lab.peer.enter(|| Client::open_as("ini0", macs[0]));
    let client = client.as_mut().unwrap().as_mut().unwrap();
    client.connect(1, 1).unwrap();
    for mac in &macs {
        client.call(&Frame::config(0, b"").from(*mac)).unwrap();
    }
    client.drain().unwrap();
    lab.host.set_up("tgt0", false).unwrap();
    target.wait_for_line("tgt0: link down", soon()).unwrap();
    lab.host.set_up("tgt0", true).unwrap();
    let mut missing = macs;
    let deadline = soon();
    while !missing.is_empty() {
        let reply = client.recv(deadline.instant()).unwrap();
        let reply = reply.unwrap_or_else(|| panic!("not told: {missing:?}"));
        assert_eq!((reply.bytes()[14], reply.tag()), (0x18, 0), "{reply:?}");
        let at = missing.iter().position(|mac| *mac == reply.destination());
        missing.swap_remove(at.unwrap_or_else(|| panic!("told too often: {reply:?}")));
    }
    stop(target);
}

#[test]
fn twenty_nics_are_twenty_ways_to_one_disk() {
    if !lab::require("twenty NICs", &[Need::Network]) {
        return;
    }
    const NICS: usize = 20;
    let (lab, store) = (Lab::new(NICS, 1500), Store::new(IMAGE));
    let names: Vec<String> = (0..NICS).map(|n| format!("tgt{n}")).collect();
    let nics: Vec<&str> = names.iter().map(String::as_str).collect();
    let small_rings = ["--set", "ring_size=256K"];
    let target = serve(&lab.host, &store, &nics, &small_rings);
    let mut clients: Vec<Client> = (0..NICS).map(|n| lab.listener(n)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.write(n as u64, &sector(n as u64, 1)).unwrap();
    }
    for client in &mut clients {
        let all = client.read_many(0, NICS).unwrap();
        for (n, bytes) in all.chunks(SECTOR).enumerate() {
            assert_eq!(bytes, sector(n as u64, 1));
        }
    }
    // All change together.
    lab.host
        .enter(|| {
            thread::scope(|scope| {
                for name in &names {
                    scope.spawn(|| lab.host.set_mtu(name, 1400).unwrap());
                }
            });
        })
        .unwrap();
    for client in &mut clients {
        advertisement(client, soon());
        client.read(1, 1).unwrap();
    }
    stop(target);
}

/// What no link event announces must be found by looking again, however busy
/// the loop is with the other NICs.
#[test]
fn a_nic_that_could_not_be_opened_is_tried_again_in_the_middle_of_a_load() {
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("a NIC that cannot be opened", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(2, 9000), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    thread::scope(|scope| {
        let load = Load::start(scope, &lab.peer, "ini1", 0, Temper::Strict);
        load.goes_on();
        let failing = trouble(&target, &["trace=bind", "inject=bind:error=ENOBUFS"]);
        lab.host.set_mtu("tgt0", 1500).unwrap();
        let line = target.wait_for_line("tgt0: bind", soon()).unwrap();
        assert!(line.contains("warning"), "{line}");
        // Events of other links make it try again, in vain, and say no more.
        for up in [true, false, true] {
            lab.host.set_up("lo", up).unwrap();
            load.goes_on();
        }
        drop(failing);
        target.wait_for_line("tgt0: ", soon()).unwrap();
        let mut client = lab.client(0);
        client.read(0, 1).unwrap();
        load.goes_on();
        load.end();
    });
    let output = stop(target);
    let said = output.iter().filter(|l| l.contains("tgt0: bind")).count();
    assert_eq!(said, 1, "{output:?}");
}

#[test]
fn an_interface_that_cannot_be_served_is_told_of_once() {
    if !lab::require("an interface that goes", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(3, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0", "tgt1", "tgt2"], &[]);
    lab.cut(0);
    lab.host.set_mtu("tgt1", 100).unwrap();
    target.wait_for_line("tgt0: there is none", soon()).unwrap();
    wait_until("the other line", soon(), || {
        target.output().iter().any(|l| l.contains("tgt1: MTU 100"))
    })
    .unwrap();
    // Each of these lines is of a look at all of them.
    for up in [false, true, false, true] {
        lab.host.set_up("tgt2", up).unwrap();
        let line = if up { "link up" } else { "link down" };
        let line = target.wait_for_line(line, soon()).unwrap();
        assert!(line.contains("e1.1: tgt2: "), "{line}");
    }
    // Another reason is another line.
    lab.host.set_mtu("tgt1", 200).unwrap();
    target.wait_for_line("tgt1: MTU 200", soon()).unwrap();
    let output = stop(target);
    for (line, count) in [
        ("tgt0: there is none", 1),
        ("tgt1: MTU 100", 1),
        ("tgt1: MTU 200", 1),
    ] {
        let lines = output.iter().filter(|l| l.contains(line));
        assert_eq!(lines.count(), count, "'{line}' in {output:?}");
    }
}
