//! Disks that fail: calls that return errors, come back short, or late; a disk
//! that is full. Nothing acknowledged is lost, a flush tells the truth, and what
//! was given up comes back by itself.
//!
//! strace puts the failures in. It sees the calls of the thread engine, which
//! does everything the io_uring engine does but the calls themselves.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use initiator::client::{Client, Patience};
use initiator::engine::model::Initial;
use initiator::engine::{Block, Engine, Op, Plan, Report};
use initiator::frame::{Frame, Reply};
use initiator::lab::{self, Deadline, Need, Process, Spawn, wait_until};
use tempfile::TempDir;

use crate::devices::trim;
use crate::rig::{QUICK, SOON};
use crate::support::{AOEDE, Store, Wire, files, serve, stop};

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

/// A loop device; goes with this.
struct Loop(String);

impl Loop {
    fn new(file: &Path, sector: &str) -> Loop {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show", "--sector-size", sector])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detach = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
        if !detach.is_ok_and(|status| status.success()) {
            eprintln!("{} is left behind", self.0);
        }
    }
}

#[test]
fn a_device_of_4096_byte_sectors_takes_any_of_ours() {
    let needs = [
        Need::Network,
        Need::Program("losetup"),
        Need::Path("/dev/loop-control"),
    ];
    if !lab::require("4Kn loop device with -d", &needs) {
        return;
    }
    for engine in ["disk_engine=threads", "disk_engine=auto"] {
        let bed = Bed::new();
        let device = Loop::new(&bed.store.image(), "4096");
        let start = || {
            let mut target = Spawn::new(AOEDE)
                .inside(&bed.wire.host)
                .args(Bed::options(&["-d"]))
                .args(["--set", engine, "1", "1", "tgt0", &device.0])
                .arg("--state-dir")
                .arg(bed.store.state())
                .arg("--run-dir")
                .arg(bed.store.run())
                .start()
                .unwrap();
            target
                .wait_for_line(": e1.1, ", Deadline::seconds(20))
                .unwrap();
            target
        };
        let mut target = start();
        let mut engine = Engine::new(bed.wire.client()).unwrap();
        bed.load(&mut engine, 1500).clean().unwrap();
        // Parts of blocks that nobody has read.
        engine.client.write(2001, &[1; 512]).unwrap();
        target.kill().unwrap();
        engine.model_mut().unwrap().settle();
        let target = start();
        engine.client.connect(1, 1).unwrap();
        assert_eq!(engine.client.read(2001, 1).unwrap(), [1; 512]);
        engine.client.write(2003, &[2; 512]).unwrap();
        engine.client.flush().unwrap();
        bed.load(&mut engine, 500).clean().unwrap();
        engine.verify_all().unwrap();
        stop(target);
        drop(device);
        let bytes = fs::read(bed.store.image()).unwrap();
        engine.model().unwrap().check_now(0, &bytes).unwrap();
        assert!(
            bed.store.sectors(2000, 5)[512..] == [[1; 512], [0; 512], [2; 512], [0; 512]].concat()
        );
    }
}

#[test]
fn a_burst_larger_than_the_cache_is_taken_all_the_same() {
    if !lab::require("cache smaller than a burst", &[Need::Network]) {
        return;
    }
    for engine in ["disk_engine=threads", "disk_engine=auto"] {
        let bed = Bed::new();
        let small = [
            "--set",
            "cache_size=256K",
            "--set",
            "parked_size=256K",
            "--set",
            engine,
        ];
        let target = bed.start(&small);
        let mut engine = Engine::new(bed.wire.client()).unwrap();
        let plan = Plan {
            op: Op::Mixed(20),
            block: Block::Bytes(64 << 10),
            depth: 64,
            duration: None,
            operations: Some(1500),
            verify: Some(Initial::Zeros),
            give_up: Duration::from_secs(30),
            new_tag: true,
            ..Plan::default()
        };
        engine.run(&plan).unwrap().clean().unwrap();
        engine.verify_all().unwrap();
        stop(target);
        let bytes = fs::read(bed.store.image()).unwrap();
        engine.model().unwrap().check_now(0, &bytes).unwrap();
    }
}

/// A tmpfs of its own; goes with this.
pub struct Memory(TempDir);

impl Memory {
    pub fn new(size: &str) -> Memory {
        let dir = tempfile::tempdir().unwrap();
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "aoede-test"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        Memory(dir)
    }

    /// Leaves no room in it until the file `filler` is removed and closed.
    fn fill(&self) -> File {
        let mut filler = File::create(self.path().join("filler")).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        filler
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let umount = std::process::Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status();
        if !umount.is_ok_and(|status| status.success()) {
            eprintln!("{} is left mounted", self.0.path().display());
        }
    }
}

#[test]
fn a_full_filesystem_under_a_sparse_image_costs_no_acknowledged_write() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
    ];
    if !lab::require("a full filesystem under the image", &needs) {
        return;
    }
    let (bed, disk) = (Bed::new(), Memory::new("1M"));
    let image = disk.0.path().join("disk.img");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let mut filler = File::create(disk.0.path().join("filler")).unwrap();
    filler.write_all(&[1; 512 << 10]).unwrap();
    let spawn = || {
        Spawn::new(AOEDE)
            .inside(&bed.wire.host)
            .args(Bed::options(&["--set", "max_dirty_age=200"]))
            .args(["1", "1", "tgt0"])
            .arg(&image)
            .arg("--state-dir")
            .arg(bed.store.state())
            .arg("--run-dir")
            .arg(bed.store.run())
            .start()
            .unwrap()
    };
    let mut target = spawn();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    let mut engine = Engine::new(bed.wire.client()).unwrap();
    let plan = Plan {
        op: Op::Write,
        block: Block::Bytes(8192),
        depth: 4,
        sectors: 1800,
        duration: Some(Duration::from_secs(20)),
        verify: Some(Initial::Zeros),
        give_up: Duration::from_secs(30),
        new_tag: true,
        ..Plan::default()
    };
    // Until it is given up.
    let degraded = std::cell::Cell::new(false);
    let report = engine
        .run_until(&plan, || {
            let said = target.output().join("\n");
            degraded.set(said.contains("does not take writes"));
            degraded.get()
        })
        .unwrap();
    println!("{report}");
    assert!(degraded.get(), "never given up: {:?}", target.output());
    // Reads go on, and what was acknowledged is there.
    engine.verify_all().unwrap();
    let refused = ask(&mut engine.client, &Frame::write(2000, &[8; 512]));
    assert_eq!(outcome(&refused), FAULT);
    // There is room again.
    fs::remove_file(disk.0.path().join("filler")).unwrap();
    drop(filler);
    target
        .wait_for_line("the disk takes writes again", Deadline::seconds(20))
        .unwrap();
    wait_until("a write that is taken", Deadline::seconds(20), || {
        engine.client.write(2000, &[9; 512]).is_ok()
    })
    .unwrap();
    // What is kept for single sectors follows.
    flush_at_last(&mut engine.client);
    engine.verify_all().unwrap();

    // The same, and it is killed before there is: a start cannot bring to the
    // image what waits, and keeps it.
    let mut filler = File::create(disk.0.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    let hole = Plan {
        first: 4096,
        operations: Some(8),
        ..plan
    };
    let known = engine.take_model();
    engine.run(&hole).unwrap();
    target.kill().unwrap();
    engine.model_mut().unwrap().settle();
    let mut refused = spawn();
    let status = refused.wait(Deadline::seconds(20)).unwrap();
    let said = refused.output().join("\n");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("does not take what it holds"), "{said}");
    assert!(
        said.contains(&*bed.store.arena().to_string_lossy()),
        "{said}"
    );
    fs::remove_file(disk.0.path().join("filler")).unwrap();
    drop(filler);
    let mut target = spawn();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    engine.client.connect(1, 1).unwrap();
    engine.verify_all().unwrap();
    stop(target);
    let bytes = fs::read(&image).unwrap();
    engine.model().unwrap().check_now(0, &bytes).unwrap();
    known.unwrap().check_now(0, &bytes).unwrap();
    assert!(bytes[2000 * 512..][..512] == [9; 512]);
}

#[test]
fn what_the_disk_does_not_take_concerns_its_own_sectors_alone() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
    ];
    if !lab::require("sectors that cannot be written", &needs) {
        return;
    }
    // Of a sparse image on a full filesystem the holes cannot be written.
    let (bed, disk) = (Bed::new(), Memory::new("1M"));
    let image = disk.0.path().join("disk.img");
    fs::write(&image, vec![0; 256 << 10]).unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(8 << 20).unwrap();
    let mut filler = File::create(disk.0.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    let (good, hole) = (100, 8000);
    let mut target = Spawn::new(AOEDE)
        .inside(&bed.wire.host)
        .args(Bed::options(&["--set", "max_dirty_age=200"]))
        .args(["1", "1", "tgt0"])
        .arg(&image)
        .arg("--state-dir")
        .arg(bed.store.state())
        .arg("--run-dir")
        .arg(bed.store.run())
        .start()
        .unwrap();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    let mut client = bed.wire.client();
    client.write(hole, &[2; 512]).unwrap();
    let line = target
        .wait_for_line("write failed at LBA 8000: ", Deadline::seconds(20))
        .unwrap();
    for part in [
        "e1.1: ",
        "disk.img: ",
        "No space",
        "; 1 sector kept in the cache",
    ] {
        assert!(line.contains(part), "{line}");
    }
    // It is read, and a flush does not claim it.
    assert_eq!(client.read(hole, 1).unwrap(), [2; 512]);
    assert_eq!(outcome(&ask(&mut client, &Frame::flush())), FAULT);
    // Others are written as ever.
    client.write(good, &[1; 512]).unwrap();
    let at = good as usize * 512;
    wait_until("the write-back of others", Deadline::seconds(20), || {
        fs::read(&image).unwrap()[at..at + 512] == [1; 512]
    })
    .unwrap();
    // A write to it is tried at once, and told.
    let write = Frame::write(hole, &[3; 512]);
    assert_eq!(outcome(&ask(&mut client, &write)), FAULT);
    assert_eq!(client.read(hole, 1).unwrap(), [2; 512]);
    fs::remove_file(disk.0.path().join("filler")).unwrap();
    drop(filler);
    assert_eq!(outcome(&ask(&mut client, &write)), GOOD);
    assert_eq!(outcome(&ask(&mut client, &Frame::flush())), GOOD);
    target
        .wait_for_line("takes writes again", Deadline::seconds(20))
        .unwrap();
    stop(target);
    let bytes = fs::read(&image).unwrap();
    assert!(bytes[hole as usize * 512..][..512] == [3; 512]);
    assert!(bytes[at..at + 512] == [1; 512]);
}

#[test]
fn who_dies_while_a_slow_disk_writes_was_no_stranger() {
    if !lab::require("kill -9 during a long write-back", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let mut target = bed.faulty(&["pwritev:delay_enter=1500000"], &[]);
    let mut client = bed.wire.client();
    let block = vec![7; 512];
    for n in 0..8 {
        client.write_many(n * 64, &block).unwrap();
    }
    // Nobody asks for anything while one job writes one block after the other.
    let changed = || {
        let bytes = fs::read(bed.store.image()).unwrap();
        bytes[3 * 64 * 512] == 7
    };
    wait_until("the fourth block", Deadline::seconds(20), changed).unwrap();
    target.kill().unwrap();
    stop(bed.start(&[]));
    for n in 0..8 {
        assert_eq!(bed.store.sectors(n * 64, 1), block);
    }
}

/// What is dirty stays so until someone asks.
const HELD: [&str; 4] = [
    "--set",
    "idle_flush=600000",
    "--set",
    "max_dirty_age=600000",
];

/// A file and a loop device over it, of which only the first 256 KiB can be written
/// while its filesystem is full.
fn half_a_disk(disk: &Memory) -> (PathBuf, Loop) {
    let file = disk.path().join("disk.img");
    fs::write(&file, vec![0; 256 << 10]).unwrap();
    let sparse = File::options().write(true).open(&file).unwrap();
    sparse.set_len(8 << 20).unwrap();
    let device = Loop::new(&file, "512");
    (file, device)
}

#[test]
fn what_a_target_without_an_arena_left_is_synced_before_anything_is_served() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("losetup"),
        Need::Path("/dev/loop-control"),
    ];
    if !lab::require("unsynced writes at a start", &needs) {
        return;
    }
    let (good, bad) = (100, 8000);
    let nowhere = Path::new("/proc/aoede");
    for with_arena in [false, true] {
        let (bed, disk) = (Bed::new(), Memory::new("2M"));
        let (_, device) = half_a_disk(&disk);
        // So that the kernel keeps what it has of the device.
        let _open = File::open(&device.0).unwrap();
        let _filler = disk.fill();
        let mut target = bed.start_on(&device.0, nowhere, &HELD);
        target
            .wait_for_line(": e1.1, ", Deadline::seconds(20))
            .unwrap();
        let mut client = bed.wire.client();
        client.write(good, &[1; 512]).unwrap();
        client.write(bad, &[2; 512]).unwrap();
        target.kill().unwrap();
        let run = bed.store.run();
        let run_dir = if with_arena { run } else { nowhere };
        // The kernel says once that it could not write something.
        let mut refused = bed.start_on(&device.0, run_dir, &HELD);
        let status = refused.wait(Deadline::seconds(20)).unwrap();
        let said = refused.output().join("\n");
        assert_eq!(status.code(), Some(1), "{said}");
        let why = format!("image {}: what was written to it before", device.0);
        assert!(said.contains(&why), "{said}");
        let mut target = bed.start_on(&device.0, run_dir, &HELD);
        target
            .wait_for_line(": e1.1, ", Deadline::seconds(20))
            .unwrap();
        assert_eq!(bed.wire.client().read(good, 1).unwrap(), [1; 512]);
        target.kill().unwrap();
    }
}

#[test]
fn a_bad_sector_that_only_a_sync_shows_keeps_no_other_from_being_recovered() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("losetup"),
        Need::Path("/dev/loop-control"),
    ];
    if !lab::require("bad sectors behind the page cache", &needs) {
        return;
    }
    let (good, bad) = (100, 8000);
    let data = |fill: u8, sectors: usize| vec![fill; sectors * 512];
    let (bed, disk) = (Bed::new(), Memory::new("2M"));
    let (file, device) = half_a_disk(&disk);
    let mut target = bed.serve_on(&device.0, &HELD);
    let mut client = bed.wire.client();
    client.write_many(good, &data(1, 40)).unwrap();
    client.write_many(bad, &data(2, 8)).unwrap();
    client.write_many(good + 60, &data(3, 8)).unwrap();
    target.kill().unwrap();
    let filler = disk.fill();
    let mut target = bed.serve_on(&device.0, &HELD);
    let said = target.output().join("\n");
    for part in [
        "48 acknowledged sectors (24 KiB)",
        "8 sectors from image sector 8000 on",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let image = |first: u64, sectors: usize| {
        let mut bytes = vec![0; sectors * 512];
        let file = File::open(&file).unwrap();
        file.read_exact_at(&mut bytes, first * 512).unwrap();
        bytes
    };
    assert!(image(good, 40) == data(1, 40) && image(good + 60, 8) == data(3, 8));
    assert!(image(bad, 8) == data(0, 8));
    // They are dirty in the new cache, whatever the page cache says of them, and
    // are tried again once more.
    let mut client = bed.wire.client();
    assert!(client.read_many(bad, 8).unwrap() == data(2, 8));
    assert!(client.read_many(good, 40).unwrap() == data(1, 40));
    target.kill().unwrap();
    fs::remove_file(disk.path().join("filler")).unwrap();
    drop(filler);
    stop(bed.serve_on(&device.0, &[]));
    assert!(image(bad, 8) == data(2, 8));
    assert!(image(good, 40) == data(1, 40) && image(good + 60, 8) == data(3, 8));
    assert_eq!(files(&bed.store.arenas(), ""), [] as [PathBuf; 0]);
}

#[test]
fn a_bad_sector_keeps_no_other_from_being_recovered() {
    if !lab::require("bad sectors at a recovery", &TRACED) {
        return;
    }
    let data = |n: usize| -> Vec<u8> { (0..n * 512).map(|i| (i / 3) as u8 | 1).collect() };
    let bed = Bed::new();
    let mut target = bed.start(&HELD);
    bed.wire.client().write_many(1000, &data(40)).unwrap();
    target.kill().unwrap();
    // The first block of 8 sectors cannot be written, nor any of its sectors.
    let bad = ["pwrite64:error=EIO:when=1..9"];
    // Without an arena there is no place for them, and the old one stays.
    let nowhere = [&HELD[..], &["--run-dir", "/proc/aoede"]].concat();
    let said = bed.faulty_refused(&bad, &nowhere);
    assert!(said.contains("which only an arena can keep"), "{said}");
    assert_eq!(files(&bed.store.arenas(), ".arena").len(), 1);
    for round in 0..2 {
        let mut target = if round == 0 {
            bed.faulty(&bad, &HELD)
        } else {
            // It dies with them in its cache; the disk is well again.
            bed.start(&HELD)
        };
        let image = bed.store.sectors(1008, 32);
        assert!(
            image == data(40)[8 * 512..],
            "round {round}: not brought over"
        );
        let first = bed.store.sectors(1000, 8);
        if round == 0 {
            assert!(first.iter().all(|byte| *byte == 0));
            let said = target.output().join("\n");
            assert!(
                said.contains("8 sectors from image sector 1000 on"),
                "{said}"
            );
            assert!(said.contains("32 acknowledged sectors"), "{said}");
        } else {
            assert!(first == data(8), "lost on the way");
        }
        let seen = bed.wire.client().read_many(1000, 40).unwrap();
        assert!(
            seen == data(40),
            "round {round}: a host sees something else"
        );
        target.kill().unwrap();
    }
    stop(bed.start(&[]));
    assert_eq!(files(&bed.store.arenas(), ""), [] as [PathBuf; 0]);
}
