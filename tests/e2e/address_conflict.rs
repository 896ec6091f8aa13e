//! Another target that has our address.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aoede::wire::MacAddr;
use initiator::answerer::{Answerer, Options};
use initiator::client::Client;
use initiator::frame::{Frame, SECTOR};
use initiator::lab::{self, Deadline, Namespace, Need, Process, Spawn};
use initiator::port::Receive;

use crate::support::{AOEDE, Store, command, files, serve, stop};
use crate::workshop::{Ended, Lab, mac_of, run, sector, soon, timed};

const IMAGE: u64 = 2048;

/// Our own target on the initiators' side of the wire.
fn other_target(lab: &Lab, store: &Store) -> Process {
    serve(&lab.peer, store, &["ini0"], &[])
}

fn vblade(namespace: &Namespace, nic: &str, slot: &str, image: &Path) -> Process {
    let mut process = Spawn::new("vblade")
        .inside(namespace)
        .args(["1", slot, nic])
        .arg(image)
        .start()
        .unwrap();
    // It says so before it hears anything, but after it is bound.
    process.wait_for_line("sectors", soon()).unwrap();
    process
}

/// Tries to serve an image that is not there yet as e1.1.
fn try_to_serve(namespace: &Namespace, nics: &[&str], options: &[&str]) -> Ended {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(AOEDE);
    command
        .current_dir(dir.path())
        .args(["1", "1"])
        .args(nics)
        .args(["new.img", "--create", "1M", "--state-dir", "state"])
        .args(["--pid-file", "pid"])
        .args(options);
    let ended = run(Some(namespace), command, Deadline::seconds(20));
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "made before refusing: {left:?}");
    assert_eq!(ended.out, "");
    ended
}

fn assert_refused(ended: &Ended, mac: MacAddr, nic: &str) {
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let line = ended.line();
    for part in ["e1.1", &mac.to_string(), nic, "--shared-address"] {
        assert!(line.contains(part), "no '{part}' in: {line}");
    }
}

#[test]
fn a_target_of_our_own_at_the_other_end_is_found_and_we_refuse() {
    if !lab::require("two of our own targets", &[Need::Network]) {
        return;
    }
    let (lab, theirs) = (Lab::new(2, 1500), Store::new(IMAGE));
    let other = other_target(&lab, &theirs);
    let mac = mac_of(&lab.peer, "ini0");
    assert_refused(&try_to_serve(&lab.host, &["tgt0"], &[]), mac, "tgt0");
    // On whichever of the NICs it is.
    assert_refused(
        &try_to_serve(&lab.host, &["tgt1", "tgt0"], &[]),
        mac,
        "tgt0",
    );
    assert_refused(
        &try_to_serve(&lab.host, &["tgt0"], &["--set", "receive=recvmmsg"]),
        mac,
        "tgt0",
    );
    // Another slot, and the same on another wire, are nobody's.
    let ours = Store::new(IMAGE);
    let mut elsewhere = Spawn::new(AOEDE)
        .inside(&lab.host)
        .args(["1", "2", "tgt0"])
        .arg(ours.image())
        .arg("--state-dir")
        .arg(ours.state())
        .arg("--run-dir")
        .arg(ours.run())
        .start()
        .unwrap();
    elsewhere.wait_for_line(": e1.2, ", soon()).unwrap();
    stop(elsewhere);
    stop(serve(&lab.host, &ours, &["tgt1"], &[]));
    stop(other);
    stop(serve(&lab.host, &ours, &["tgt0"], &[]));
}

#[test]
fn a_vblade_at_the_other_end_is_found_and_we_refuse() {
    let needs = [Need::Network, Need::Program("vblade")];
    if !lab::require("vblade under our address", &needs) {
        return;
    }
    let (lab, theirs) = (Lab::new(1, 1500), Store::new(IMAGE));
    let _vblade = vblade(&lab.peer, "ini0", "1", &theirs.image());
    let mac = mac_of(&lab.peer, "ini0");
    assert_refused(&try_to_serve(&lab.host, &["tgt0"], &[]), mac, "tgt0");
}

/// A host that answers whatever address is asked for, until it is dropped.
struct Liar {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Liar {
    fn start(namespace: &Namespace, nic: &str, shelf: u16, slot: u8) -> Liar {
        let options = Options {
            shelf,
            slot,
            size: 4096,
            receive: Receive::Recvmmsg,
            spin: Duration::ZERO,
        };
        let mut answerer = namespace
            .enter(|| Answerer::open(nic, &options))
            .unwrap()
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = Some(thread::spawn(move || answerer.run(&seen).unwrap()));
        Liar { stop, thread }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[test]
fn a_host_that_answers_for_every_address_keeps_nobody_from_starting() {
    if !lab::require("a host that answers every probe", &[Need::Network]) {
        return;
    }
    let (lab, ours) = (Lab::new(2, 1500), Store::new(IMAGE));
    let _liar = Liar::start(&lab.peer, "ini0", 0xFFFF, 0xFF);
    // Time enough for its answers on a busy machine.
    let slow = ["--set", "address_probe=2000"];
    let output = stop(serve(&lab.host, &ours, &["tgt0", "tgt1"], &slow));
    let line = output.iter().find(|l| l.contains("every address")).unwrap();
    let mac = mac_of(&lab.peer, "ini0");
    for part in ["warning", "e1.1", &mac.to_string(), "tgt0"] {
        assert!(line.contains(part), "no '{part}' in: {line}");
    }
    // Another target beside it is found, and so is one that -m excludes: hosts hear it.
    let theirs = Store::new(IMAGE);
    let other = serve(&lab.peer, &theirs, &["ini1"], &[]);
    let options = [&slow[..], &["-m", "020000000001"]].concat();
    let refused = try_to_serve(&lab.host, &["tgt0", "tgt1"], &options);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let mac = mac_of(&lab.peer, "ini1");
    let named = format!("{mac} answers under it on tgt1");
    assert!(refused.err.contains(&named), "{refused:?}");
    stop(other);
}

#[test]
fn an_answer_delays_nothing_that_a_dead_target_has_left() {
    if !lab::require("recovery before the question", &[Need::Network]) {
        return;
    }
    let (lab, ours) = (Lab::new(1, 1500), Store::new(IMAGE));
    let held = [
        "--set",
        "idle_flush=600000",
        "--set",
        "max_dirty_age=600000",
    ];
    let mut target = serve(&lab.host, &ours, &["tgt0"], &held);
    lab.client(0).write(7, &sector(7, 1)).unwrap();
    target.kill().unwrap();
    assert_eq!(ours.sectors(7, 1), [0; SECTOR]);
    let _other = Liar::start(&lab.peer, "ini0", 1, 1);
    let mut refused = command(&lab.host, &ours, &["tgt0"], &[]).start().unwrap();
    assert_eq!(refused.wait(soon()).unwrap().code(), Some(1));
    let output = refused.output();
    assert!(output.iter().any(|l| l.contains("is taken")), "{output:?}");
    assert_eq!(ours.sectors(7, 1), sector(7, 1), "{output:?}");
    // It leaves no arena, which would cost memory, and no record of one.
    assert_eq!(files(&ours.state(), ".arena.toml"), Vec::<PathBuf>::new());
    let shared = serve(&lab.host, &ours, &["tgt0"], &["--shared-address"]);
    stop(shared);
}

#[test]
fn on_lo_too() {
    let needs = [Need::Network, Need::Program("vblade")];
    if !lab::require("vblade under our address on lo", &needs) {
        return;
    }
    let (host, theirs) = (Namespace::new().unwrap(), Store::new(IMAGE));
    let other = vblade(&host, "lo", "1", &theirs.image());
    assert_refused(&try_to_serve(&host, &["lo"], &[]), MacAddr([0; 6]), "lo");
    drop(other);
    let ours = Store::new(IMAGE);
    let target = serve(&host, &ours, &["lo"], &[]);
    let mut client = host
        .enter(|| Client::connected("lo", 1, 1))
        .unwrap()
        .unwrap();
    client.write(1, &[1; SECTOR]).unwrap();
    stop(target);
}

#[test]
fn a_shared_address_is_served_and_nobody_is_asked() {
    if !lab::require("--shared-address", &[Need::Network]) {
        return;
    }
    let (lab, theirs, ours) = (Lab::new(1, 1500), Store::new(IMAGE), Store::new(IMAGE));
    let other = other_target(&lab, &theirs);
    let target = serve(&lab.host, &ours, &["tgt0"], &["--shared-address"]);
    // The other one answers the initiators of another host as well as we do.
    let second = Store::new(IMAGE);
    let beside = serve(&lab.host, &second, &["tgt0"], &["--shared-address"]);
    for process in [target, other, beside] {
        stop(process);
    }
}

#[test]
fn a_second_process_of_this_machine_on_the_same_nic_is_refused() {
    if !lab::require("two processes on one NIC", &[Need::Network]) {
        return;
    }
    let (lab, ours) = (Lab::new(2, 1500), Store::new(IMAGE));
    for nic in ["tgt0", "lo"] {
        let mut first = serve(&lab.host, &ours, &[nic], &[]);
        let refused = try_to_serve(&lab.host, &["tgt1", nic], &[]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let process = format!("process {} (aoede)", first.pid());
        for part in ["e1.1", nic, &process, "--shared-address"] {
            assert!(refused.line().contains(part), "{refused:?}");
        }
        // What held it frees it by its death, however that comes.
        first.kill().unwrap();
        let (again, time) = timed(|| serve(&lab.host, &ours, &[nic], &[]));
        assert!(time < Duration::from_secs(8), "{time:?}");
        stop(again);
    }
}

#[test]
fn a_name_that_any_user_can_hold_keeps_nobody_from_starting() {
    if !lab::require("a socket with the name of old", &[Need::Network]) {
        return;
    }
    let (lab, ours) = (Lab::new(1, 1500), Store::new(IMAGE));
    let bind = || {
        let name = SocketAddr::from_abstract_name("aoede/e1.1/tgt0").unwrap();
        UnixDatagram::bind_addr(&name).unwrap()
    };
    let _held = lab.host.enter(bind).unwrap();
    stop(serve(&lab.host, &ours, &["tgt0"], &[]));
    // What holds an address is in a directory that is closed to others.
    let claims = ["/run/aoede", "/dev/shm/aoede"].map(|dir| Path::new(dir).join("claims"));
    let mut claims = claims.iter().filter_map(|dir| std::fs::metadata(dir).ok());
    assert!(claims.any(|dir| dir.mode() & 0o7777 == 0o700));
}

#[test]
fn the_same_name_in_another_network_namespace_is_another_interface() {
    if !lab::require("two namespaces", &[Need::Network]) {
        return;
    }
    let (lab, a, b) = (Lab::new(0, 1500), Store::new(IMAGE), Store::new(IMAGE));
    let first = serve(&lab.host, &a, &["lo"], &[]);
    let second = serve(&lab.peer, &b, &["lo"], &[]);
    stop(first);
    stop(second);
}

#[test]
fn an_address_given_up_while_we_ask_is_taken() {
    if !lab::require("an address given up", &[Need::Network]) {
        return;
    }
    let (lab, ours) = (Lab::new(1, 1500), Store::new(IMAGE));
    let first = serve(&lab.host, &ours, &["tgt0"], &[]);
    let mut second = command(&lab.host, &ours, &["tgt0"], &[]).start().unwrap();
    stop(first);
    second.wait_for_line(": e1.1, ", soon()).unwrap();
    stop(second);
}

#[test]
fn a_target_that_comes_later_is_told_of_loudly_and_not_endlessly() {
    if !lab::require("a target that comes later", &[Need::Network]) {
        return;
    }
    let (lab, ours) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &ours, &["tgt0", "tgt1"], &[]);
    let mut client = lab.client(1);
    let claim = |client: &mut Client, shelf, slot| {
        let frame = Frame::config(0, b"")
            .to(MacAddr::BROADCAST)
            .version_flags(0x18)
            .tag(0)
            .at(shelf, slot);
        client.send(&frame).unwrap();
    };
    // Other targets say so too, of other addresses.
    for (shelf, slot) in [(1, 2), (2, 1), (0xFFFF, 0xFF), (1, 0xFF)] {
        claim(&mut client, shelf, slot);
    }
    client.call(&Frame::identify()).unwrap();
    assert!(
        !target.output().iter().any(|l| l.contains("another target")),
        "{:?}",
        target.output()
    );
    for _ in 0..50 {
        claim(&mut client, 1, 1);
    }
    let line = target.wait_for_line("another target", soon()).unwrap();
    let mac = client.mac().to_string();
    for part in ["error", &mac, "tgt1", "e1.1"] {
        assert!(line.contains(part), "no '{part}' in: {line}");
    }
    // Service goes on, and one line is enough for now.
    client.write(1, &[1; SECTOR]).unwrap();
    let output = stop(target);
    let lines = output.iter().filter(|l| l.contains("another target"));
    assert_eq!(lines.count(), 1, "{output:?}");
}

#[test]
fn a_vblade_started_later_is_told_of() {
    let needs = [Need::Network, Need::Program("vblade")];
    if !lab::require("vblade started later", &needs) {
        return;
    }
    let (lab, ours, theirs) = (Lab::new(1, 1500), Store::new(IMAGE), Store::new(IMAGE));
    let mut target = serve(&lab.host, &ours, &["tgt0"], &[]);
    let _vblade = vblade(&lab.peer, "ini0", "1", &theirs.image());
    let line = target.wait_for_line("another target", soon()).unwrap();
    let mac = mac_of(&lab.peer, "ini0").to_string();
    assert!(line.contains(&mac) && line.contains("error"), "{line}");
    stop(target);
}

#[test]
fn of_two_that_start_together_someone_says_so() {
    if !lab::require("two targets started together", &[Need::Network]) {
        return;
    }
    let (lab, a, b) = (Lab::new(1, 1500), Store::new(IMAGE), Store::new(IMAGE));
    let mut left = command(&lab.host, &a, &["tgt0"], &[]).start().unwrap();
    let mut right = command(&lab.peer, &b, &["ini0"], &[]).start().unwrap();
    let told = |process: &Process| {
        let words = ["is taken", "another target"];
        process
            .output()
            .iter()
            .any(|l| words.iter().any(|w| l.contains(w)))
    };
    lab::wait_until("one of them to say so", Deadline::seconds(15), || {
        told(&left) || told(&right)
    })
    .unwrap();
    for process in [&mut left, &mut right] {
        process.stop(soon()).unwrap();
    }
}

#[test]
fn two_nics_of_ours_on_one_wire_are_no_conflict() {
    if !lab::require("two NICs on one wire", &[Need::Network]) {
        return;
    }
    // Both ends of one cable: what one NIC sends the other hears.
    let (host, store) = (Namespace::new().unwrap(), Store::new(IMAGE));
    let _ = lab::Veth::new(("one", &host), ("two", &host), 1500).unwrap();
    let target = serve(&host, &store, &["one", "two"], &[]);
    target.signal(nix::sys::signal::Signal::SIGHUP).unwrap();
    host.set_up("one", false).unwrap();
    host.set_up("one", true).unwrap();
    let output = stop(target);
    assert!(
        !output.iter().any(|l| l.contains("another target")),
        "{output:?}"
    );
}

#[test]
fn the_shelf_that_linux_ignores_is_warned_about() {
    if !lab::require("shelf 4095", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = Spawn::new(AOEDE)
        .inside(&lab.host)
        .args(["4095", "1", "tgt0"])
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .start()
        .unwrap();
    target.wait_for_line(": e4095.1, ", soon()).unwrap();
    let output = stop(target);
    assert!(
        output
            .iter()
            .any(|l| l.contains("warning") && l.contains("4095")),
        "{output:?}"
    );
}
