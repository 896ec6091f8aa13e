//! A shadow that can take no more: at its limit, on a filesystem that is full.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use initiator::engine::model::Initial;
use initiator::engine::{Block, Engine, Op, Plan};
use initiator::frame::Frame;
use shadow::paths;

use super::*;
use crate::faults::Memory;
use crate::rig::SOON;
use crate::workshop::{assert_idle, trouble};

const LIMIT: u64 = 1 << 20;
const LARGE: u64 = 32_768;
/// No more dirty data than a shadow of a few MiB can be given room for.
const SMALL_CACHE: [&str; 2] = ["--set", "cache_size=1M"];

/// What the shadow took at most of its disk, looked at again and again.
struct Watched {
    most: AtomicU64,
    thawing: AtomicBool,
    over: AtomicBool,
}

impl Watched {
    fn look(&self, bed: &Bed) {
        for path in bed.shadows() {
            if let Ok(metadata) = fs::metadata(&path) {
                self.most
                    .fetch_max(metadata.blocks() * 512, Ordering::Relaxed);
            }
            // The marker is at PATH.
            if paths::read_marker(&bed.shadow()).is_ok_and(|uuid| uuid.is_some()) {
                self.thawing.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Runs something, and looks at the shadow meanwhile.
    fn during(bed: &Bed, work: impl FnOnce()) -> (u64, bool) {
        let watched = Watched {
            most: AtomicU64::new(0),
            thawing: AtomicBool::new(false),
            over: AtomicBool::new(false),
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                while !watched.over.load(Ordering::Relaxed) {
                    watched.look(bed);
                    thread::sleep(Duration::from_micros(200));
                }
            });
            let _ends = Ends(&watched.over);
            work();
        });
        (
            watched.most.load(Ordering::Relaxed),
            watched.thawing.load(Ordering::Relaxed),
        )
    }
}

/// Sets it also when a test fails, whose thread would be waited for.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn writes() -> Plan {
    Plan {
        op: Op::Mixed(10),
        block: Block::Bytes(4096),
        depth: 128,
        first: 3,
        sectors: LARGE - 8,
        duration: None,
        verify: Some(Initial::Zeros),
        new_tag: true,
        resend: Duration::from_millis(300),
        give_up: Duration::from_secs(30),
        last_answers: Duration::from_millis(50),
        ..Plan::default()
    }
}

fn said(target: &Process, pattern: &str) -> bool {
    target.output().iter().any(|line| line.contains(pattern))
}

/// All that was acknowledged is read, and in the image after a stop.
fn whole(bed: &Bed, mut engine: Engine, target: Process) {
    engine.verify_all().unwrap();
    stop(target);
    bed.nothing_left();
    let model = engine.take_model().unwrap();
    model.check_now(0, &bed.image()).unwrap();
}

#[test]
fn at_its_limit_a_shadow_is_merged_and_never_larger() {
    if !lab::require("a shadow's limit", &[Need::Network]) {
        return;
    }
    for extra in [&[][..], &["-s"]] {
        println!("with {extra:?}");
        let bed = Bed::with(9000, LARGE);
        let limited = format!("{},1", bed.shadow().display());
        let target = bed.start_with(&[&["-f", &limited][..], extra].concat());
        let mut engine = Engine::new(bed.client()).unwrap();
        let (most, thawing) = Watched::during(&bed, || {
            bed.freeze(&target);
            let deadline = soon();
            let report = engine.run_until(&writes(), || {
                assert!(!deadline.passed(), "{:?}", target.output());
                said(&target, "thawed")
            });
            println!("{}", report.unwrap().clean().unwrap());
        });
        assert!(said(&target, "reached its limit; thawing"));
        assert!(thawing, "PATH was not seen as the marker");
        println!("{most} bytes of {LIMIT}");
        assert!(most <= LIMIT, "{most} bytes of {LIMIT}");
        assert!(most > LIMIT / 4, "{most} bytes are far below {LIMIT}");
        if let Some(model) = engine.model_mut() {
            model.settle();
        }
        whole(&bed, engine, target);
    }
}

#[test]
fn at_its_limit_writes_are_held_where_that_is_wished() {
    if !lab::require("a shadow's limit, held", &[Need::Network]) {
        return;
    }
    for (end, hold_max) in [("order", 100), ("hold_max", 1), ("stop", 100)] {
        println!("ended by {end}");
        let bed = Bed::with(9000, LARGE);
        let limited = format!("{},1", bed.shadow().display());
        let hold = format!("hold_max={hold_max}");
        let mut target = bed.start_with(&[
            "-f",
            &limited,
            "--set",
            "shadow_full=hold",
            "--set",
            "on_stop=keep",
            "--set",
            &hold,
        ]);
        let mut engine = Engine::new(bed.client()).unwrap();
        let (most, _) = Watched::during(&bed, || {
            bed.freeze(&target);
            let still = bed.image();
            let deadline = soon();
            let report = engine.run_until(&writes(), || {
                assert!(!deadline.passed(), "{:?}", target.output());
                said(&target, "no write is answered")
            });
            report.unwrap().clean().unwrap();
            if let Some(model) = engine.model_mut() {
                // Whoever was not answered may have been heard: of none of them
                // anything is on its way after this.
                model.settle();
            }
            if end == "order" {
                assert!(bed.shadow().exists() && bed.image() == still);
                let mut client = bed.client();
                let write = Frame::write(LARGE - 2, &data(9, 2));
                client.expect_silence(&write, SOON).unwrap();
                client.identify().unwrap();
                engine.verify_all().unwrap();
                client.flush().unwrap();
                assert_idle(&target);
                assert!(bed.shadow().exists() && bed.image() == still);
                order(&target, 2);
            } else if end == "stop" {
                // Whoever waits is not answered, and sends again.
                target.signal(Signal::SIGTERM).unwrap();
                let status = target.wait(Deadline::seconds(20)).unwrap();
                assert!(status.success(), "{:?}", target.output());
                assert!(bed.shadow().exists() && bed.image() == still);
                target = bed.start_with(&["-f", &limited]);
                engine.client.connect(1, 1).unwrap();
                order(&target, 2);
            } else {
                target.wait_for_line("full for too long", soon()).unwrap();
            }
            target.wait_for_line("thawed: ", soon()).unwrap();
        });
        println!("{most} bytes of {LIMIT}");
        assert!(most <= LIMIT, "{most} bytes of {LIMIT}");
        let mut client = bed.client();
        client.write_many(LARGE - 2, &data(9, 2)).unwrap();
        whole(&bed, engine, target);
        let image = bed.image();
        assert!(image[(LARGE as usize - 2) * 512..] == data(9, 2));
    }
}

#[test]
fn a_full_filesystem_under_the_shadow_costs_no_acknowledged_write() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
    ];
    if !lab::require("a full filesystem under the shadow", &needs) {
        return;
    }
    for (policy, extra) in [("thaw", &[][..]), ("hold", &[]), ("thaw", &["-s"])] {
        println!("{policy} {extra:?}");
        let (mut bed, disk) = (Bed::with(9000, LARGE), Memory::new("4M"));
        bed.place = Some(disk.path().to_owned());
        let set = format!("shadow_full={policy}");
        let quick = ["--set", &set, "--set", "max_dirty_age=200"];
        let mut target = bed.start(&[&SMALL_CACHE[..], &quick, extra].concat());
        let mut engine = Engine::new(bed.client()).unwrap();
        bed.freeze(&target);
        let still = bed.image();
        let deadline = soon();
        let report = engine.run_until(&writes(), || {
            assert!(!deadline.passed(), "{:?}", target.output());
            said(&target, "its filesystem is full")
        });
        println!("{:?}", report.unwrap());
        if let Some(model) = engine.model_mut() {
            model.settle();
        }
        if policy == "hold" {
            assert!(bed.shadow().exists() && bed.image() == still);
            engine.verify_all().unwrap();
            let mut client = bed.client();
            let write = Frame::write(LARGE - 2, &data(9, 2));
            client.expect_silence(&write, SOON).unwrap();
            // What is acknowledged has its place.
            client.flush().unwrap();
            target.kill().unwrap();
            target = bed.start(&[&SMALL_CACHE[..], &quick].concat());
            engine.client.connect(1, 1).unwrap();
            engine.verify_all().unwrap();
            assert!(bed.shadow().exists() && bed.image() == still);
            order(&target, 2);
        }
        target.wait_for_line("thawed: ", soon()).unwrap();
        let mut client = bed.client();
        client.write_many(LARGE - 2, &data(9, 2)).unwrap();
        whole(&bed, engine, target);
        assert_eq!(bed.shadows(), [] as [PathBuf; 0]);
    }
}

/// Takes all that is left of a filesystem.
fn fill_up(disk: &Memory) {
    let mut filler = fs::File::create(disk.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
}

#[test]
fn what_was_acknowledged_before_a_death_has_its_place_on_a_full_filesystem() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
    ];
    if !lab::require("a death on a full filesystem", &needs) {
        return;
    }
    for policy in ["hold", "thaw"] {
        let (mut bed, disk) = (Bed::with(9000, LARGE), Memory::new("4M"));
        bed.place = Some(disk.path().to_owned());
        let set = format!("shadow_full={policy}");
        let quiet = ["--set", &set, "--set", "idle_flush=600000"];
        let options = [&SMALL_CACHE[..], &quiet].concat();
        let mut target = bed.start(&options);
        bed.client().write_many(0, &data(1, 64)).unwrap();
        bed.freeze(&target);
        fill_up(&disk);
        for n in 0..40 {
            bed.client().write_many(n * 100, &data(n as u8, 2)).unwrap();
        }
        target.kill().unwrap();
        let still = bed.image();
        let mut target = bed.start(&options);
        let seen = bed.client().read_many(0, 4000).unwrap();
        for n in 0..40 {
            assert!(seen[n * 51_200..][..1024] == data(n as u8, 2), "write {n}");
        }
        target
            .wait_for_line("its filesystem is full", soon())
            .unwrap();
        if policy == "hold" {
            assert!(bed.shadow().exists() && bed.image() == still);
            order(&target, 2);
        }
        target.wait_for_line("thawed: ", soon()).unwrap();
        stop(target);
        bed.nothing_left();
        assert!(bed.image()[..seen.len()] == seen);
    }
}

#[test]
fn a_thaw_waits_for_the_step_before_it() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
        Need::Program("strace"),
    ];
    if !lab::require("a slow step before a thaw", &needs) {
        return;
    }
    let (mut bed, disk) = (Bed::with(9000, LARGE), Memory::new("4M"));
    bed.place = Some(disk.path().to_owned());
    let hold = ["--set", "shadow_full=hold", "--set", "hold_max=1"];
    let mut target = bed.start(&[&SMALL_CACHE[..], &hold].concat());
    bed.freeze(&target);
    let (still, frozen) = (bed.image(), bed.inode());
    fill_up(&disk);
    let slow = "inject=ftruncate:delay_enter=2500000";
    let strace = trouble(&target, &["trace=ftruncate", slow]);
    let (_, thawing) = Watched::during(&bed, || {
        let mut client = bed.client();
        for n in 0..40 {
            client.write_many(n * 100, &data(n as u8, 2)).unwrap();
        }
        target.wait_for_line("full for too long", soon()).unwrap();
        until("the shadow vanishes", || {
            // Looked at first: the name may go while the image is read.
            let image = bed.image();
            assert!(bed.inode() != frozen || image == still);
            bed.shadows().is_empty()
        });
    });
    drop(strace);
    assert!(thawing, "PATH was not seen as the marker");
    stop(target);
    let image = bed.image();
    for n in 0..40 {
        assert!(image[n * 51_200..][..1024] == data(n as u8, 2), "write {n}");
    }
}

#[test]
fn a_freeze_for_which_there_is_no_room_is_not_done_and_changes_nothing() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
    ];
    if !lab::require("a freeze without room", &needs) {
        return;
    }
    let (mut bed, disk) = (Bed::new(), Memory::new("256K"));
    bed.place = Some(disk.path().to_owned());
    let mut target = bed.start(&[]);
    let mut client = bed.client();
    client.write_many(0, &data(1, 100)).unwrap();
    order(&target, 1);
    target.wait_for_line("not done", soon()).unwrap();
    bed.nothing_left();
    client.write_many(50, &data(2, 100)).unwrap();
    assert_eq!(client.read_many(50, 100).unwrap(), data(2, 100));
    // And again, when there is.
    drop(client);
    stop(target);
    let target = bed.start(&SMALL_CACHE);
    order(&target, 2);
    stop(target);
    assert!(bed.image()[50 * 512..150 * 512] == data(2, 100));
}
