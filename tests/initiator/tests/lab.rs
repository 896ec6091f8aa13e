//! Lab, client and engine against the target of bare memory, on a wire of
//! their own.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aoede::wire::MacAddr;
use initiator::answerer::{Answerer, Options};
use initiator::client::{Client, Patience};
use initiator::engine::faults::Rates;
use initiator::engine::model::{Initial, Model};
use initiator::engine::{Block, Engine, Op, Order, Plan};
use initiator::frame::{Ata, Frame, opcode};
use initiator::lab::{self, Deadline, Loop, Namespace, Need, Process, SlowDisk, Spawn, Tap, Veth};
use initiator::port::Receive;
use nix::sys::signal::Signal;

const SECTORS: usize = 4096;

/// A target of bare memory in a thread.
struct Memory {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Memory {
    fn start(namespace: &Namespace, receive: Receive, spin: Duration) -> Memory {
        let options = Options {
            shelf: 7,
            slot: 3,
            size: SECTORS * 512,
            receive,
            spin,
        };
        let opened = namespace.enter(|| Answerer::open("t0", &options));
        let mut answerer = opened.unwrap().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || answerer.run(&seen).unwrap());
        Memory {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Two namespaces with a wire between `i0` and `t0`, and the memory on `t0`.
fn on_a_wire(test: &str, mtu: u32, receive: Receive, run: impl FnOnce(&Namespace)) {
    if !lab::require(test, &[Need::Network]) {
        return;
    }
    let (ours, theirs) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    let _wire = Veth::new(("i0", &ours), ("t0", &theirs), mtu).unwrap();
    let _memory = Memory::start(&theirs, receive, Duration::ZERO);
    run(&ours);
}

fn connected(namespace: &Namespace, receive: Receive) -> Client {
    namespace
        .enter(|| {
            let mut client = Client::open_receiving("i0", receive)?;
            client.strict(true).connect(7, 3)?;
            Ok::<_, initiator::Error>(client)
        })
        .unwrap()
        .unwrap()
}

#[test]
fn a_client_reads_what_it_wrote() {
    on_a_wire("a client reads", 9000, Receive::Ring, |ours| {
        let mut client = connected(ours, Receive::Recvmmsg);
        assert_eq!(client.sectors_per_frame(), 17);
        let identify = client.identify().unwrap();
        assert_eq!(identify.sectors(), SECTORS as u64);
        assert_eq!(identify.model(), "memory");
        let data: Vec<u8> = (0..40 * 512).map(|i| (i / 7) as u8).collect();
        client.write_many(100, &data).unwrap();
        assert_eq!(client.read_many(100, 40).unwrap(), data);
        assert_eq!(client.read(101, 1).unwrap(), data[512..1024]);
        let beyond = client.read(SECTORS as u64 - 1, 2).unwrap_err();
        assert!(
            beyond.to_string().contains("error 0x10, 2 left"),
            "{beyond}"
        );
        // 28 bits: what stands above them is junk.
        let registers = Ata {
            count: 1,
            opcode: opcode::READ,
            lba: 0xE000_0065,
            ..Ata::default()
        };
        let reply = client.call(&Frame::ata(registers, &[])).unwrap();
        assert_eq!(reply.sectors(1), Some(&data[512..1024]));
        assert_eq!(client.resent, 0);
    });
}

#[test]
fn silence_is_proved_and_an_answer_disproves_it() {
    on_a_wire("silence", 1500, Receive::Recvmmsg, |ours| {
        let mut client = connected(ours, Receive::Recvmmsg);
        let soon = Duration::from_secs(5);
        let start = Instant::now();
        for silent in [
            Frame::config(1, b"nobody"),
            Frame::identify().at(7, 4),
            Frame::identify().version_flags(0x18),
            Frame::identify().length(20),
        ] {
            client.expect_silence(&silent, soon).unwrap();
        }
        client.expect_silence_raw(&[0xFF; 14], soon).unwrap();
        let spoken = client.expect_silence(&Frame::identify(), soon).unwrap_err();
        assert!(spoken.to_string().starts_with("an answer where silence"));
        assert!(
            start.elapsed() < soon,
            "none of this waits for time to pass"
        );
        let patience = Patience::once(Duration::from_millis(20));
        let nobody = Frame::config(0, b"").at(9, 9);
        let error = client.call_with(&nobody, patience).unwrap_err();
        assert!(error.to_string().starts_with("no answer to Config"));
    });
}

#[test]
fn several_hosts_share_an_interface() {
    on_a_wire("several hosts", 1500, Receive::Ring, |ours| {
        let other = MacAddr([2, 0, 0, 0, 0, 77]);
        let mut first = connected(ours, Receive::Recvmmsg);
        let opened = ours.enter(|| Client::open_as("i0", other));
        let mut second = opened.unwrap().unwrap();
        second.connect(7, 3).unwrap();
        assert_eq!(second.mac(), other);
        second.write(5, &[5; 512]).unwrap();
        assert_eq!(first.read(5, 1).unwrap(), [5; 512]);
        assert!(first.drain().unwrap().is_empty());
        // One frame in another's name, and its answer.
        let third = MacAddr([2, 0, 0, 0, 0, 78]);
        let reply = first.call(&Frame::read(5, 1).from(third)).unwrap();
        assert_eq!(reply.destination(), third);
        let silent = Frame::identify().at(9, 9);
        let soon = Duration::from_secs(5);
        second
            .expect_silence_beside(&silent, &mut first, soon)
            .unwrap();
    });
}

#[test]
fn every_sector_is_right_on_a_bad_wire() {
    let rates = Rates {
        lose: 20,
        duplicate: 20,
        reorder: 20,
    };
    for (mtu, receive, new_tag) in [
        (9000, Receive::Ring, false),
        (9000, Receive::Recvmmsg, true),
        (1500, Receive::Ring, true),
    ] {
        on_a_wire("a bad wire", mtu, receive, |ours| {
            let mut engine = Engine::new(connected(ours, receive)).unwrap();
            let plan = Plan {
                op: Op::Mixed(50),
                block: Block::Bytes(8192),
                depth: 16,
                sectors: 1000,
                duration: None,
                operations: Some(3000),
                verify: Some(Initial::Zeros),
                outgoing: rates,
                incoming: rates,
                resend: Duration::from_millis(10),
                new_tag,
                ..Plan::default()
            };
            let report = engine.run(&plan).unwrap().clean().unwrap();
            assert_eq!(report.operations, 3000);
            assert!(report.resent > 0 && report.outgoing.lost > 0, "{report}");
            assert!(report.bytes_read > 0 && report.bytes_written > 0);
            assert_eq!(report.latency.count(), 3000);
            engine.verify_all().unwrap();
        });
    }
}

#[test]
fn a_wrong_sector_is_found_and_named() {
    on_a_wire("a wrong sector", 9000, Receive::Ring, |ours| {
        let mut engine = Engine::new(connected(ours, Receive::Ring)).unwrap();
        let plan = Plan {
            op: Op::Write,
            order: Order::Sequential,
            block: Block::Jumbo,
            first: 64,
            sectors: 170,
            duration: None,
            operations: Some(10),
            verify: Some(Initial::Zeros),
            ..Plan::default()
        };
        engine.run(&plan).unwrap().clean().unwrap();
        engine.verify_all().unwrap();
        // An old state of a sector: acknowledged once, overwritten since.
        let old = engine.client.read(100, 1).unwrap();
        engine.run(&plan).unwrap().clean().unwrap();
        engine.verify_all().unwrap();
        engine.client.write(100, &old).unwrap();
        let wrong = engine.verify_all().unwrap_err().to_string();
        assert!(
            wrong.starts_with("sector 100: holds generation 3 of sector 100; allowed: 13;"),
            "{wrong}"
        );
        // The same seen without the engine.
        let image = engine.client.read_many(64, 170).unwrap();
        let model = engine.model().unwrap();
        assert_eq!(model.check_now(64, &image).unwrap_err().lba, 100);
    });
}

#[test]
fn an_image_made_beforehand_is_read_as_such() {
    on_a_wire("an image", 9000, Receive::Ring, |ours| {
        let mut engine = Engine::new(connected(ours, Receive::Ring)).unwrap();
        let mut image = vec![0; 512 * 512];
        Model::initial(9, 0, &mut image);
        engine.client.write_many(0, &image).unwrap();
        let plan = Plan {
            sectors: 512,
            seed: 9,
            duration: None,
            operations: Some(1000),
            verify: Some(Initial::Pattern),
            ..Plan::default()
        };
        engine.run(&plan).unwrap().clean().unwrap();
        engine.client.write(77, &[0; 512]).unwrap();
        let wrong = engine.verify_all().unwrap_err().to_string();
        assert!(wrong.starts_with("sector 77: holds zeros"), "{wrong}");
    });
}

#[test]
fn a_target_that_went_away_ends_the_run_and_what_was_known_stays() {
    if !lab::require("a target that went away", &[Need::Network]) {
        return;
    }
    let (ours, theirs) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    let _wire = Veth::new(("i0", &ours), ("t0", &theirs), 9000).unwrap();
    let memory = Memory::start(&theirs, Receive::Ring, Duration::ZERO);
    let mut engine = Engine::new(connected(&ours, Receive::Ring)).unwrap();
    let plan = Plan {
        op: Op::Mixed(50),
        sectors: 800,
        duration: None,
        operations: Some(500),
        verify: Some(Initial::Zeros),
        resend: Duration::from_millis(5),
        give_up: Duration::from_millis(50),
        ..Plan::default()
    };
    engine.run(&plan).unwrap().clean().unwrap();
    drop(memory);
    let gone = engine.run(&plan).unwrap_err().to_string();
    assert!(gone.starts_with("no answer to"), "{gone}");
    engine.model_mut().unwrap().settle();
    // The new one has forgotten everything, which is what must be noticed.
    let _memory = Memory::start(&theirs, Receive::Ring, Duration::ZERO);
    let wrong = engine.verify_all().unwrap_err().to_string();
    assert!(wrong.contains(": holds zeros; allowed: "), "{wrong}");
}

fn shell(script: &str) -> Spawn {
    Spawn::new("sh").args(["-c", script])
}

#[test]
fn processes_are_heard_and_ended() {
    let mut said = shell("echo one; echo two >&2; echo one more; exit 3")
        .start()
        .unwrap();
    let soon = Deadline::seconds(10);
    assert_eq!(said.wait_for_line("one", soon).unwrap(), "one");
    assert_eq!(said.wait_for_line("one", soon).unwrap(), "one more");
    assert_eq!(said.wait(soon).unwrap().code(), Some(3));
    assert_eq!(said.output(), ["one", "two", "one more"]);
    let never = said.wait_for_line("three", soon).unwrap_err().to_string();
    assert!(
        never.contains("never said 'three'; it said:\n  one"),
        "{never}"
    );

    let sleep = |trap: &str| -> Process {
        let script = format!("{trap} echo ready; while :; do sleep 0.05; done");
        let mut process = shell(&script).start().unwrap();
        process.wait_for_line("ready", soon).unwrap();
        process
    };
    let mut obedient = sleep("");
    let status = obedient.stop(soon).unwrap();
    assert!(lab::ended_by(status, Signal::SIGTERM));
    assert_eq!(obedient.exit_status().unwrap(), Some(status));
    let mut deaf = sleep("trap '' TERM;");
    let error = deaf.stop(Deadline::after(Duration::from_millis(100)));
    assert!(error.unwrap_err().to_string().contains("had to be killed"));
    let dropped = sleep("");
    let own = format!("/proc/{}", dropped.pid());
    assert!(Path::new(&own).exists());
    drop(dropped);
    assert!(!Path::new(&own).exists());
}

#[test]
fn namespaces_are_entered_and_taken_away() {
    let needs = [Need::Network, Need::Path("/dev/net/tun")];
    if !lab::require("namespaces", &needs) {
        return;
    }
    let namespace = Namespace::new().unwrap();
    let handle = Path::new("/run/netns").join(namespace.name());
    assert!(handle.exists());
    let tap = Tap::new("tap0", &namespace, 1500).unwrap();
    let inside = namespace.enter(|| aoede::sys::link::query(tap.name()).unwrap().unwrap().mtu);
    assert_eq!(inside.unwrap(), 1500);
    assert_eq!(aoede::sys::link::query("tap0").unwrap(), None);
    let mut process = Spawn::new("ip")
        .args(["-o", "link"])
        .inside(&namespace)
        .on_core(0)
        .start()
        .unwrap();
    process
        .wait_for_line("tap0", Deadline::seconds(10))
        .unwrap();
    let ipv6 = namespace.enter(|| std::fs::read("/proc/sys/net/ipv6/conf/tap0/disable_ipv6"));
    if let Ok(disabled) = ipv6.unwrap() {
        assert_eq!(disabled, b"1\n");
    }
    drop((tap, process));
    // A panic inside comes out, and takes the namespace with it.
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let namespace = namespace;
        let _ = namespace.enter(|| panic!("inside"));
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"inside"));
    assert!(!handle.exists());
}

#[test]
fn a_slow_disk_does_one_thing_after_the_other_and_keeps_what_it_gets() {
    use std::os::unix::fs::FileExt;
    let needs = [&Loop::NEEDS[..], &[SlowDisk::NEED]].concat();
    if !lab::require("a slow disk", &needs) {
        return;
    }
    const EACH: Duration = Duration::from_millis(20);
    let dir = tempfile::tempdir().unwrap();
    let image = tempfile::tempfile().unwrap();
    image.set_len(8 << 20).unwrap();
    let mount_point = dir.path().join("slow");
    let disk = SlowDisk::new(image.try_clone().unwrap(), &mount_point, 512).unwrap();
    assert!(!mount_point.exists());
    let options = std::fs::File::options()
        .read(true)
        .write(true)
        .open(disk.path());
    let device = options.unwrap();
    disk.set_pace(EACH);
    let (start, mut sector) = (Instant::now(), [0; 512]);
    for n in 0..5 {
        // Far enough from each other that nothing is read ahead.
        device.read_exact_at(&mut sector, n << 20).unwrap();
    }
    assert!(start.elapsed() >= 5 * EACH, "{:?}", start.elapsed());
    device.write_all_at(&[7; 512], 3 << 20).unwrap();
    let start = Instant::now();
    device.sync_all().unwrap();
    assert!(start.elapsed() >= 2 * EACH, "a write and a flush");
    image.read_exact_at(&mut sector, 3 << 20).unwrap();
    assert_eq!(sector, [7; 512]);
}
