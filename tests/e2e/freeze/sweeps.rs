//! Under a verified load: copies that are of one instant, and deaths at any
//! instant of any phase.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use initiator::engine::model::Initial;
use initiator::engine::rng::Rng;
use initiator::engine::{Block, Engine, Op, Plan};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use shadow::paths;

use super::*;
use crate::support::test_factor;
use crate::workshop::{Load, Temper, Written, generation};

/// How long a sweep goes on, times AOEDE_TEST_FACTOR, unless AOEDE_KILLS says how
/// often.
const SWEEP: Duration = Duration::from_secs(5);

/// Holds a copy of the image against one initiator's writes, which came one
/// after the other: it has all up to one of them, and none behind. That one is
/// neither older than what was acknowledged before the order nor newer than
/// what had been sent when the copy began.
fn is_of_one_instant(copy: &[u8], before: &Written, after: &Written) {
    let places: Vec<u64> = after.sent.keys().copied().collect();
    let bytes = |lba: u64| &copy[lba as usize * 512..][..512];
    let newest = places.iter().map(|lba| generation(*lba, bytes(*lba)));
    let newest = newest.max().unwrap();
    let mut expected = BTreeMap::new();
    for (n, (lba, count)) in (1..=newest).zip(&after.history) {
        expected.extend((*lba..lba + count).map(|lba| (lba, n)));
    }
    let least = before.acknowledged.values().max().unwrap();
    let most = after.history.len() as u64;
    assert!(
        (*least..=most).contains(&newest),
        "of {newest}, acknowledged were {least}, sent {most}"
    );
    for lba in places {
        let found = generation(lba, bytes(lba));
        let wanted = expected.get(&lba).copied().unwrap_or(0);
        assert_eq!(found, wanted, "sector {lba} of a copy of {newest}");
    }
}

#[test]
fn each_copy_is_the_image_of_one_instant() {
    if !lab::require("copies under load", &[Need::Network]) {
        return;
    }
    for extra in [&[][..], &["-s"], &["-d"]] {
        println!("with {extra:?}");
        let bed = Bed::new();
        let target = bed.start(extra);
        thread::scope(|scope| {
            let loads: Vec<_> = (0..3)
                .map(|n| Load::start(scope, &bed.wire.peer, "ini0", 7 + n * 300, Temper::Strict))
                .collect();
            for _ in 0..4 {
                for load in &loads {
                    load.goes_on();
                }
                let before: Vec<Written> = loads.iter().map(Load::written).collect();
                bed.freeze(&target);
                let after: Vec<Written> = loads.iter().map(Load::written).collect();
                let copy = bed.image();
                for load in &loads {
                    load.goes_on();
                }
                assert!(bed.image() == copy, "the image moves while it is frozen");
                assert!(bed.shadow().exists());
                for (before, after) in before.iter().zip(&after) {
                    is_of_one_instant(&copy, before, after);
                }
                bed.thaw(&target);
            }
            let written: Vec<Written> = loads.into_iter().map(Load::end).collect();
            stop(target);
            let image = bed.image();
            for written in written {
                written.check(&image);
            }
        });
        bed.nothing_left();
    }
}

/// What was seen of the image while PATH was one inode.
#[derive(Default)]
struct Watch {
    still: Option<(u64, Vec<u8>)>,
    frozen: u32,
}

impl Watch {
    fn look(&mut self, bed: &Bed) {
        let before = bed.inode();
        let image = bed.image();
        let Some(inode) = before.filter(|_| bed.inode() == before) else {
            self.still = None;
            return;
        };
        if paths::read_marker(&bed.shadow()).unwrap().is_some() {
            self.still = None;
            return;
        }
        self.frozen += 1;
        self.still.take_if(|(known, _)| *known != inode);
        let (_, still) = self.still.get_or_insert_with(|| (inode, image.clone()));
        assert!(*still == image, "the image moves while it is frozen");
    }
}

struct Sweep {
    bed: Bed,
    options: Vec<&'static str>,
    engine: Engine,
    rng: Rng,
    watch: Watch,
    kills: u64,
}

impl Sweep {
    /// A load, an order in the middle of it, death.
    fn live(&mut self, mut target: Process, plan: &Plan) {
        let pid = Pid::from_raw(target.pid() as i32);
        let (first, second) = (self.rng.below(25_000), self.rng.below(40_000));
        let order = match self.rng.below(8) {
            // Mostly what makes sense.
            0..=4 if self.bed.shadows().is_empty() => 1,
            0..=2 | 7 => 2,
            6 => 1,
            _ => 0,
        };
        let dead = AtomicBool::new(false);
        let report = thread::scope(|scope| {
            scope.spawn(|| {
                // Not a wait for something: the instants are drawn by lot.
                thread::sleep(Duration::from_micros(first));
                for n in 0..order {
                    if n > 0 {
                        thread::sleep(Duration::from_millis(10));
                    }
                    kill(pid, Signal::SIGUSR1).unwrap();
                }
                if order > 0 {
                    kill(pid, Signal::SIGUSR2).unwrap();
                }
                thread::sleep(Duration::from_micros(second));
                kill(pid, Signal::SIGKILL).unwrap();
                dead.store(true, Ordering::Release);
            });
            self.engine.run_until(plan, || dead.load(Ordering::Acquire))
        });
        report.unwrap().clean().unwrap();
        target.kill().unwrap();
        self.kills += 1;
        if let Some(model) = self.engine.model_mut() {
            model.settle();
        }
        self.watch.look(&self.bed);
    }

    /// Some die again before they serve; then one that does.
    fn again(&mut self) -> Process {
        let options = self.bed.options(&self.options);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        while self.rng.below(4) == 0 {
            let early = command(&self.bed.wire.host, &self.bed.store, &["tgt0"], &options);
            let mut early = early.start().unwrap();
            thread::sleep(Duration::from_micros(self.rng.below(40_000)));
            early.kill().unwrap();
            self.kills += 1;
            self.watch.look(&self.bed);
        }
        let target = self.bed.start(&self.options);
        self.watch.look(&self.bed);
        self.engine.client.connect(1, 1).unwrap();
        if let Err(e) = self.engine.verify_all() {
            panic!("after kill {}: {e}; {:?}", self.kills, target.output());
        }
        self.watch.look(&self.bed);
        target
    }
}

fn sweep(name: &str, extra: &[&'static str], sectors: u64, block: usize) {
    if !lab::require(name, &[Need::Network]) {
        return;
    }
    let seed = std::env::var("AOEDE_SEED").map_or(1, |n| n.parse().unwrap());
    let wanted: Option<u64> = std::env::var("AOEDE_KILLS")
        .ok()
        .map(|n| n.parse().unwrap());
    println!("AOEDE_SEED={seed}");
    let bed = Bed::with(9000, SECTORS);
    let mut target = bed.start(extra);
    let engine = Engine::new(bed.client()).unwrap();
    let mut sweep = Sweep {
        bed,
        options: extra.to_vec(),
        engine,
        rng: Rng::new(seed),
        watch: Watch::default(),
        kills: 0,
    };
    let start = Instant::now();
    // On a busy machine a few kills take longer.
    let goes_on = |sweep: &Sweep| match wanted {
        Some(wanted) => sweep.kills < wanted,
        None => {
            let few = sweep.kills < 10 || sweep.watch.frozen == 0;
            few || start.elapsed() < SWEEP * test_factor()
        }
    };
    while goes_on(&sweep) {
        let plan = Plan {
            op: Op::Mixed(30),
            block: Block::Bytes(block),
            depth: 1 + sweep.rng.below(32) as usize,
            first: 5,
            sectors,
            duration: None,
            seed: seed + sweep.kills,
            verify: Some(Initial::Zeros),
            new_tag: true,
            flush_every: Some(1 + sweep.rng.below(200)),
            last_answers: Duration::from_millis(20),
            ..Plan::default()
        };
        sweep.live(target, &plan);
        target = sweep.again();
    }
    let frozen = sweep.watch.frozen;
    println!("{name}: {} kills, frozen at {frozen} looks", sweep.kills);
    assert!(sweep.kills >= 10 && frozen > 0);
    // The last order may have been a thaw.
    let deadline = soon();
    while !sweep.bed.shadows().is_empty() {
        assert!(!deadline.passed(), "{:?}", target.output());
        if sweep.bed.shadow().exists() {
            order(&target, 2);
        }
        thread::sleep(Duration::from_millis(20));
    }
    sweep.engine.verify_all().unwrap();
    stop(target);
    sweep.bed.nothing_left();
    let bytes = sweep.bed.image();
    let model = sweep.engine.take_model().unwrap();
    model.check_now(0, &bytes).unwrap();
    assert!(bytes[..5 * 512].iter().all(|byte| *byte == 0));
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_in_any_phase() {
    sweep("frozen kill sweep", &[], 1000, 1536);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_in_any_phase_when_durable() {
    sweep("frozen kill sweep, -s", &["-s"], 1000, 512);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_in_any_phase_past_the_page_cache() {
    sweep("frozen kill sweep, -d", &["-d"], 3000, 4096);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_in_any_phase_of_a_small_cache() {
    let options = [
        "--set",
        "cache_size=256K",
        "--set",
        "parked_size=256K",
        "--set",
        "max_dirty_age=100",
        "--set",
        "disk_engine=threads",
    ];
    sweep("frozen kill sweep, small cache", &options, 3000, 6144);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_in_any_phase_without_an_arena() {
    // No directory can be made there, so writes go through.
    let options = ["--run-dir", "/proc/aoede"];
    sweep("frozen kill sweep, write-through", &options, 1000, 1536);
}
