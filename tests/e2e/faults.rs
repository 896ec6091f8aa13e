//! Disks that fail: calls that return errors, come back short, or late; a disk
//! that is full. Nothing acknowledged is lost, a flush tells the truth, and what
//! was given up comes back by itself.
//!
//! strace puts the failures in. It sees the calls of the thread engine, which
//! does everything the io_uring engine does but the calls themselves.

mod disks;
mod starts;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use initiator::client::{Client, Patience};
use initiator::engine::model::Initial;
use initiator::engine::{Block, Engine, Op, Plan, Report};
use initiator::frame::{Frame, Reply};
use initiator::lab::{self, Deadline, Need, Process, Spawn, wait_until};

use crate::devices::trim;
use crate::rig::{QUICK, SOON};
use crate::support::{AOEDE, Store, Wire, files, serve, stop};

pub use disks::Memory;

const TRACED: [Need; 2] = [Need::Network, Need::Program("strace")];
/// Errors of the disk itself, and what is written at once.
const THREADS: [&str; 4] = ["--set", "disk_engine=threads", "--set", "disk_threads=1"];
/// Sectors of the image, and those that a load is about.
const SECTORS: u64 = 4096;
const REGION: u64 = 1200;

/// A wire and an image.
struct Bed {
    wire: Wire,
    store: Store,
}

impl Bed {
    fn new() -> Bed {
        Bed {
            wire: Wire::new(9000),
            store: Store::new(SECTORS),
        }
    }

    fn options<'a>(extra: &[&'a str]) -> Vec<&'a str> {
        [&QUICK[..], &THREADS, &["--set", "cache_size=2M"], extra].concat()
    }

    /// A target as it should be.
    fn start(&self, extra: &[&str]) -> Process {
        serve(
            &self.wire.host,
            &self.store,
            &["tgt0"],
            &Bed::options(extra),
        )
    }

    /// A start with another image and run directory.
    fn start_on(&self, image: &str, run_dir: &Path, extra: &[&str]) -> Process {
        Spawn::new(AOEDE)
            .inside(&self.wire.host)
            .args(Bed::options(extra))
            .args(["1", "1", "tgt0", image, "--state-dir"])
            .arg(self.store.state())
            .arg("--run-dir")
            .arg(run_dir)
            .start()
            .unwrap()
    }

    /// A target of another image.
    fn serve_on(&self, image: &str, extra: &[&str]) -> Process {
        let mut target = self.start_on(image, self.store.run(), extra);
        target
            .wait_for_line(": e1.1, ", Deadline::seconds(30))
            .unwrap();
        target
    }

    /// A target under strace, which does this to its calls; what strace writes
    /// goes to `log`.
    fn trace(&self, log: &Path, trace: &[String], extra: &[&str]) -> Process {
        let mut target = Spawn::new("strace")
            .inside(&self.wire.host)
            // The target is our child, and strace ends with it.
            .args(["-D", "-f", "-qq", "-ttt", "--seccomp-bpf", "-o"])
            .arg(log)
            // The image's calls alone.
            .arg("-P")
            .arg(self.store.image())
            .args(trace.iter().flat_map(|t| ["-e", t.as_str()]))
            .arg(AOEDE)
            .arg("--state-dir")
            .arg(self.store.state())
            .arg("--run-dir")
            .arg(self.store.run())
            .args(Bed::options(extra))
            .args(["1", "1", "tgt0"])
            .arg(self.store.image())
            .start()
            .unwrap();
        target
            .wait_for_line(": e1.1, ", Deadline::seconds(30))
            .unwrap();
        target
    }

    /// The same of a start that must be refused; what it said.
    fn faulty_refused(&self, injections: &[&str], extra: &[&str]) -> String {
        let mut target = Spawn::new("strace")
            .inside(&self.wire.host)
            .args(["-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-P"])
            .arg(self.store.image())
            .args(["-e", "trace=pwrite64"])
            .args(injections.iter().map(|i| format!("--inject={i}")))
            .arg(AOEDE)
            .arg("--state-dir")
            .arg(self.store.state())
            .args(Bed::options(extra))
            .args(["1", "1", "tgt0"])
            .arg(self.store.image())
            .start()
            .unwrap();
        let status = target.wait(Deadline::seconds(30)).unwrap();
        let said = target.output().join("\n");
        assert_eq!(status.code(), Some(1), "{said}");
        said
    }

    /// A target whose calls fail so.
    fn faulty(&self, injections: &[&str], extra: &[&str]) -> Process {
        let mut trace = vec!["trace=pwritev,pwrite64,pread64,fdatasync".to_owned()];
        trace.extend(injections.iter().map(|i| format!("inject={i}")));
        self.trace(Path::new("/dev/null"), &trace, extra)
    }

    /// A load on it, verified; some requests may be answered with an error.
    fn load(&self, engine: &mut Engine, operations: u64) -> Report {
        let plan = Plan {
            op: Op::Mixed(30),
            block: Block::Bytes(1536),
            depth: 16,
            first: 3,
            sectors: REGION,
            duration: None,
            operations: Some(operations),
            verify: Some(Initial::Zeros),
            flush_every: Some(40),
            resend: Duration::from_secs(1),
            give_up: Duration::from_secs(30),
            new_tag: true,
            ..Plan::default()
        };
        engine.run(&plan).unwrap()
    }

    /// Everything that was acknowledged is there: read now, and on the image
    /// after an orderly stop.
    fn whole(&self, engine: &mut Engine, target: Process) -> Vec<String> {
        engine.verify_all().unwrap();
        let said = stop(target);
        let bytes = fs::read(self.store.image()).unwrap();
        engine.model().unwrap().check_now(0, &bytes).unwrap();
        assert!(bytes[..3 * 512].iter().all(|byte| *byte == 0));
        assert_eq!(files(&self.store.arenas(), ""), [] as [PathBuf; 0]);
        said
    }
}

/// Asks once and waits for the answer, whatever it is.
fn ask(client: &mut Client, frame: &Frame) -> Reply {
    client.call_with(frame, Patience::once(2 * SOON)).unwrap()
}

/// Status and error of an ATA answer.
fn outcome(reply: &Reply) -> (u8, u8) {
    let ata = reply.ata().unwrap();
    (ata.status, ata.error)
}

/// A failed command, as the drive says it.
const FAULT: (u8, u8) = (0x61, 4);
const GOOD: (u8, u8) = (0x40, 0);

/// Flushes until that succeeds.
fn flush_at_last(client: &mut Client) {
    wait_until("a flush that succeeds", Deadline::seconds(30), || {
        outcome(&ask(client, &Frame::flush())) == GOOD
    })
    .unwrap();
}

#[test]
fn a_call_that_fails_once_costs_nothing_but_time() {
    if !lab::require("failing calls", &TRACED) {
        return;
    }
    for call in [
        "fdatasync:error=EIO",
        "pwritev:error=EIO",
        "pwritev:error=ENOSPC",
        "pwritev:error=EINTR",
        "pwritev:retval=0",
        "pread64:error=EIO",
    ] {
        let bed = Bed::new();
        // The first calls, each alone; and two in a row.
        let injection: Vec<String> = match call {
            "fdatasync:error=EIO" => (1..=4).map(|n| format!("{call}:when={n}")).collect(),
            _ => ["1", "2..3"].map(|n| format!("{call}:when={n}")).to_vec(),
        };
        for injection in injection {
            fs::write(bed.store.image(), vec![0; SECTORS as usize * 512]).unwrap();
            let target = bed.faulty(&[&injection], &[]);
            let mut engine = Engine::new(bed.wire.client()).unwrap();
            let report = bed.load(&mut engine, 600);
            println!("{injection}: {report}");
            flush_at_last(&mut engine.client);
            let said = bed.whole(&mut engine, target).join("\n");
            assert!(!said.contains("does not take writes"), "{said}");
            // What is short or interrupted is gone on with, and a write that failed
            // is tried in parts at once.
            let silent = ["pwritev", "pread64"];
            let silent = silent.iter().any(|what| call.contains(what));
            assert!(silent || said.contains("error"), "{injection}: {said}");
        }
    }
}

#[test]
fn a_failing_sync_fails_the_flush_that_waits_for_it_and_no_later_one() {
    if !lab::require("failing syncs and FLUSH", &TRACED) {
        return;
    }
    let quiet = ["--set", "idle_flush=600000"];
    for n in 1..=5 {
        let bed = Bed::new();
        let target = bed.faulty(&[&format!("fdatasync:error=EIO:when={n}")], &quiet);
        let mut client = bed.wire.client();
        let mut failed = Vec::new();
        for flush in 1..=6 {
            client.write(flush * 8, &[flush as u8; 512]).unwrap();
            match outcome(&ask(&mut client, &Frame::flush())) {
                GOOD => {}
                FAULT => failed.push(flush),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(failed, [n]);
        for flush in 1..=6 {
            assert!(bed.store.sectors(flush * 8, 1) == [flush as u8; 512]);
        }
        stop(target);
    }
}

#[test]
fn after_a_failed_sync_everything_since_the_last_good_one_is_written_again() {
    if !lab::require("writing again after a failed sync", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let log = bed.store.path().join("log");
    let trace = [
        "trace=pwritev,fdatasync",
        "inject=fdatasync:error=EIO:when=2",
    ];
    let target = bed.trace(
        &log,
        &trace.map(str::to_owned),
        &["--set", "idle_flush=600000"],
    );
    let mut client = bed.wire.client();
    client.write(0, &[1; 512]).unwrap();
    client.flush().unwrap();
    client.write(100, &[2; 512]).unwrap();
    client.write(200, &[3; 512]).unwrap();
    assert_eq!(outcome(&ask(&mut client, &Frame::flush())), FAULT);
    client.flush().unwrap();
    stop(target);
    let text = fs::read_to_string(&log).unwrap();
    let writes = |offset: usize| {
        let end = format!(", {offset}) = ");
        text.lines().filter(|line| line.contains(&end)).count()
    };
    assert_eq!(
        (writes(0), writes(51_200), writes(102_400)),
        (1, 2, 2),
        "{text}"
    );
}

#[test]
fn a_slow_disk_loses_nothing_and_holds_up_no_acknowledgement() {
    if !lab::require("late calls", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let late = [
        "pwritev:delay_exit=30000",
        "pread64:delay_enter=10000",
        "fdatasync:delay_enter=100000",
    ];
    let target = bed.faulty(
        &late,
        &["--set", "disk_threads=4", "--set", "max_dirty_age=300"],
    );
    let mut engine = Engine::new(bed.wire.client()).unwrap();
    bed.load(&mut engine, 800).clean().unwrap();
    // While that is written back a write takes no longer than memory.
    let start = Instant::now();
    for n in 0..20 {
        engine.client.write(3000 + 8 * n, &[1; 512]).unwrap();
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "20 writes took {took:?}");
    bed.whole(&mut engine, target);
}

#[test]
fn a_disk_that_fails_again_and_again_is_given_up_and_comes_back() {
    if !lab::require("a degraded export", &TRACED) {
        return;
    }
    {
        let bed = Bed::new();
        // Three rounds, and the fourth is a probe that succeeds.
        let mut target = bed.faulty(&["fdatasync:error=EIO:when=1..3"], &[]);
        let mut client = bed.wire.client();
        let data = [7; 1024];
        client.write(10, &data).unwrap();
        target
            .wait_for_line("the disk does not take writes", Deadline::seconds(20))
            .unwrap();
        let refused = ask(&mut client, &Frame::write(500, &[8; 512]));
        assert_eq!(outcome(&refused), FAULT);
        assert_eq!(client.read(10, 2).unwrap(), data);
        assert_eq!(client.read(500, 1).unwrap(), [0; 512]);
        target
            .wait_for_line("the disk takes writes again", Deadline::seconds(20))
            .unwrap();
        client.write(500, &[9; 512]).unwrap();
        client.flush().unwrap();
        stop(target);
        assert!(bed.store.sectors(10, 2) == data);
        assert!(bed.store.sectors(500, 1) == [9; 512]);
    }
}

#[test]
fn a_durable_write_fails_when_patience_is_over() {
    if !lab::require("io_patience", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let options = ["-s", "--set", "io_patience=1"];
    let mut target = bed.faulty(&["fdatasync:error=EIO:when=1+"], &options);
    let mut client = bed.wire.client();
    let start = Instant::now();
    let reply = ask(&mut client, &Frame::write(10, &[7; 1024]));
    let took = start.elapsed();
    assert_eq!(outcome(&reply), FAULT);
    let patience = Duration::from_secs(1)..Duration::from_secs(8);
    assert!(patience.contains(&took), "after {took:?}");
    // Old or new.
    let read = client.read(10, 2).unwrap();
    assert!(read == [7; 1024] || read == [0; 1024]);
    target.kill().unwrap();
    stop(bed.start(&[]));
}

#[test]
fn a_stop_that_cannot_write_keeps_the_arena_and_says_where() {
    if !lab::require("TERM while the image cannot be written", &TRACED) {
        return;
    }
    for calls in [
        &["fdatasync:error=EIO:when=1+"][..],
        &["pwritev,pwrite64:error=ENOSPC:when=1+"],
    ] {
        let bed = Bed::new();
        let mut target = bed.faulty(calls, &["--set", "io_patience=1"]);
        let mut engine = Engine::new(bed.wire.client()).unwrap();
        let plan = Plan {
            op: Op::Write,
            block: Block::Bytes(2048),
            sectors: 400,
            first: 3,
            duration: None,
            operations: Some(100),
            verify: Some(Initial::Zeros),
            ..Plan::default()
        };
        // As many as it takes before it is given up are acknowledged.
        engine.run(&plan).unwrap();
        let arena = bed.store.arena();
        let start = Instant::now();
        let status = target.stop(Deadline::seconds(20)).unwrap();
        assert!(start.elapsed() >= Duration::from_secs(1));
        let said = target.output().join("\n");
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(&*arena.to_string_lossy()), "{said}");
        assert_eq!(bed.store.arena(), arena);
        engine.model_mut().unwrap().settle();
        let target = bed.start(&[]);
        engine.client.connect(1, 1).unwrap();
        assert!(target.output().join("\n").contains("acknowledged sectors"));
        bed.whole(&mut engine, target);
    }
}

#[test]
fn a_stop_waits_as_long_as_a_slow_disk_makes_progress() {
    if !lab::require("TERM on a slow disk", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let options = [
        "--set",
        "io_patience=2",
        "--set",
        "idle_flush=600000",
        "--set",
        "max_dirty_age=600000",
    ];
    // Scattered, so that each is a call of its own.
    let mut target = bed.faulty(&["pwritev:delay_enter=20000"], &options);
    let mut client = bed.wire.client();
    for n in 0..340 {
        client.write(n * 12, &[n as u8; 512]).unwrap();
    }
    let start = Instant::now();
    let status = target.stop(Deadline::seconds(60)).unwrap();
    let said = target.output().join("\n");
    assert!(status.success(), "{said}");
    // Longer than its patience, and than the log is silent.
    assert!(start.elapsed() > Duration::from_secs(6));
    assert!(said.contains("e1.1: stopping: "), "{said}");
    assert!(said.contains(" left to write to "), "{said}");
    for n in 0..340 {
        assert_eq!(bed.store.sectors(n as usize * 12, 1), [n as u8; 512]);
    }
    assert_eq!(files(&bed.store.arenas(), ""), [] as [PathBuf; 0]);
}

#[test]
fn what_a_long_sync_covers_goes_to_the_disk_in_slices_before_it() {
    if !lab::require("slices of a sync", &TRACED) {
        return;
    }
    const MIB: usize = 1 << 20;
    let bed = Bed::new();
    File::options()
        .write(true)
        .open(bed.store.image())
        .unwrap()
        .set_len(32 * MIB as u64)
        .unwrap();
    let log = bed.store.path().join("log");
    let options = [
        "--set",
        "cache_size=64M",
        "--set",
        "idle_flush=600000",
        "--set",
        "max_dirty_age=600000",
    ];
    let trace = ["trace=sync_file_range,fdatasync".to_owned()];
    let target = bed.trace(&log, &trace, &options);
    let mut client = bed.wire.client();
    for n in 0..30 {
        client
            .write_many((n * MIB / 512) as u64, &vec![n as u8; MIB])
            .unwrap();
    }
    stop(target);
    let text = fs::read_to_string(&log).unwrap();
    let lines = text
        .lines()
        .filter(|line| line.contains("sync_file_range("));
    let mut pushed = 0;
    for line in lines {
        assert!(line.ends_with(" = 0"), "{line}");
        let len: usize = line.split(", ").nth(2).unwrap().parse().unwrap();
        assert!((1..=8 * MIB).contains(&len), "{line}");
        pushed += len;
    }
    assert!(pushed >= 8 * MIB, "{text}");
    assert!(
        text.trim_end()
            .lines()
            .last()
            .unwrap()
            .contains("fdatasync("),
        "{text}"
    );
    let bytes = fs::read(bed.store.image()).unwrap();
    for n in 0..30 {
        assert!(bytes[n * MIB..][..MIB].iter().all(|byte| *byte == n as u8));
    }
}

#[test]
fn a_long_discard_is_done_in_calls_that_end_soon() {
    const MIB: usize = 1 << 20;
    if !lab::require("calls of a long TRIM", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let image = File::options().write(true).open(bed.store.image()).unwrap();
    image.set_len(512 * MIB as u64).unwrap();
    let log = bed.store.path().join("log");
    let target = bed.trace(&log, &["trace=fallocate".to_owned()], &[]);
    let mut client = bed.wire.client();
    let probes = fs::read_to_string(&log).unwrap().lines().count();
    // Ranges that join to one of 256 MiB, which begins inside a piece.
    let first = 10_000;
    let ranges: Vec<_> = (0..8).map(|n| (first + n * 65_535, 65_535)).collect();
    assert_eq!(outcome(&ask(&mut client, &trim(&ranges))), GOOD);
    let text = fs::read_to_string(&log).unwrap();
    stop(target);
    let mut at = first as usize * 512;
    for line in text.lines().skip(probes) {
        let numbers: Vec<usize> = line
            .split([',', ')'])
            .filter_map(|part| part.trim().parse().ok())
            .collect();
        let [offset, len] = numbers[..] else {
            panic!("{line}")
        };
        assert!(offset == at && len <= 64 * MIB, "{text}");
        at += len;
    }
    assert_eq!(at, (first + 8 * 65_535) as usize * 512, "{text}");
}

#[test]
fn under_a_load_what_is_dirty_is_synced_within_its_age() {
    const AGE: f64 = 0.6;
    if !lab::require("max_dirty_age", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let log = bed.store.path().join("log");
    let options = ["--set", "max_dirty_age=600", "--set", "idle_flush=600000"];
    let trace = ["trace=pwritev,fdatasync".to_owned()];
    let target = bed.trace(&log, &trace, &options);
    let mut engine = Engine::new(bed.wire.client()).unwrap();
    let plan = Plan {
        op: Op::Mixed(50),
        block: Block::Bytes(512),
        depth: 1,
        first: 3,
        sectors: 100,
        duration: Some(Duration::from_secs(3)),
        verify: Some(Initial::Zeros),
        ..Plan::default()
    };
    engine.run(&plan).unwrap().clean().unwrap();
    let text = fs::read_to_string(&log).unwrap();
    let syncs: Vec<f64> = text
        .lines()
        .filter(|line| line.contains("fdatasync("))
        .map(|line| line.split_whitespace().nth(1).unwrap().parse().unwrap())
        .collect();
    let longest = syncs.windows(2).map(|w| w[1] - w[0]).fold(0.0, f64::max);
    // Not much more often than it must be either.
    assert!(
        (4..20).contains(&syncs.len()),
        "{} syncs: {text}",
        syncs.len()
    );
    assert!(longest < AGE, "{longest} s between two syncs");
    assert!(text.contains("pwritev("), "{text}");
    bed.whole(&mut engine, target);
}

#[test]
fn what_is_dirty_goes_to_the_disk_when_nobody_asks() {
    if !lab::require("idle_flush", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let log = bed.store.path().join("log");
    let options = ["--set", "max_dirty_age=600000", "--set", "idle_flush=50"];
    let trace = ["trace=pwritev,fdatasync".to_owned()];
    let mut target = bed.trace(&log, &trace, &options);
    let mut client = bed.wire.client();
    client.write(9, &[5; 512]).unwrap();
    wait_until("the idle flush", Deadline::seconds(20), || {
        let text = fs::read_to_string(&log).unwrap();
        let write = text.find("pwritev(");
        write.is_some_and(|at| text[at..].contains("fdatasync(") && text.ends_with("= 0\n"))
    })
    .unwrap();
    assert!(bed.store.sectors(9, 1) == [5; 512]);
    // The kernel's answer is there before the target has taken it in.
    wait_until(
        "nothing to count in the arena",
        Deadline::seconds(20),
        || {
            let bytes = fs::read(bed.store.arena()).unwrap();
            let word = |n: usize| u64::from_le_bytes(bytes[n * 8..][..8].try_into().unwrap());
            (0..word(2) as usize).all(|slot| word(64 + 8 * slot) == 0)
        },
    )
    .unwrap();
    // So a death finds nothing to bring to the image.
    target.kill().unwrap();
    let said = stop(bed.start(&[])).join("\n");
    assert!(!said.contains("acknowledged"), "{said}");
}
