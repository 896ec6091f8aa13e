//! Killed at any instant under a verified load, and started again, again and
//! again: nothing acknowledged is lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use initiator::engine::model::Initial;
use initiator::engine::rng::Rng;
use initiator::engine::{Block, Engine, Op, Plan};
use initiator::lab::{self, Need, Process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::rig::QUICK;
use crate::support::{Store, Wire, command, serve, stop, test_factor};

/// How long a sweep goes on, times AOEDE_TEST_FACTOR, unless AOEDE_KILLS says how
/// often.
const SWEEP: Duration = Duration::from_secs(7);
/// The longest a target lives.
const LIFE: u64 = 60_000;

/// How much of a sweep is done.
struct Sweep {
    kills: u64,
    wanted: Option<u64>,
    start: Instant,
}

impl Sweep {
    fn begin() -> Sweep {
        let wanted = std::env::var("AOEDE_KILLS").ok();
        Sweep {
            kills: 0,
            wanted: wanted.map(|n| n.parse().unwrap()),
            start: Instant::now(),
        }
    }

    fn goes_on(&self) -> bool {
        match self.wanted {
            Some(wanted) => self.kills < wanted,
            // On a busy machine a few kills take longer.
            None => self.kills < 10 || self.start.elapsed() < SWEEP * test_factor(),
        }
    }
}

/// Kills a target after so many microseconds of this load.
fn die(engine: &mut Engine, mut target: Process, plan: &Plan, after: u64) {
    let pid = Pid::from_raw(target.pid() as i32);
    let dead = AtomicBool::new(false);
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            // Not a wait for something: the instant is drawn by lot.
            thread::sleep(Duration::from_micros(after));
            kill(pid, Signal::SIGKILL).unwrap();
            dead.store(true, Ordering::Release);
        });
        engine.run_until(plan, || dead.load(Ordering::Acquire))
    });
    report.unwrap().clean().unwrap();
    target.kill().unwrap();
    if let Some(model) = engine.model_mut() {
        model.settle();
    }
}

/// A sweep: options of the target, sectors of the image, and which of them the
/// load is about.
fn sweep(name: &str, options: &[&str], image: u64, sectors: u64, block: usize) {
    if !lab::require(name, &[Need::Network]) {
        return;
    }
    let options = [&QUICK[..], options].concat();
    let (wire, store) = (Wire::new(9000), Store::new(image));
    let start = || serve(&wire.host, &store, &["tgt0"], &options);
    let seed = std::env::var("AOEDE_SEED").map_or(1, |n| n.parse().unwrap());
    println!("AOEDE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut target = start();
    let mut engine = Engine::new(wire.client()).unwrap();
    let mut sweep = Sweep::begin();
    while sweep.goes_on() {
        let plan = Plan {
            op: Op::Mixed(30),
            block: Block::Bytes(block),
            depth: 1 + rng.below(32) as usize,
            first: 5,
            sectors,
            duration: None,
            seed: seed + sweep.kills,
            verify: Some(Initial::Zeros),
            new_tag: true,
            flush_every: Some(1 + rng.below(200)),
            last_answers: Duration::from_millis(20),
            ..Plan::default()
        };
        die(&mut engine, target, &plan, rng.below(LIFE));
        sweep.kills += 1;
        // Some die again before they serve.
        while rng.below(4) == 0 {
            let mut early = command(&wire.host, &store, &["tgt0"], &options)
                .start()
                .unwrap();
            thread::sleep(Duration::from_micros(rng.below(LIFE)));
            early.kill().unwrap();
            sweep.kills += 1;
        }
        target = start();
        engine.client.connect(1, 1).unwrap();
        if let Err(e) = engine.verify_all() {
            panic!("after kill {}: {e}", sweep.kills);
        }
    }
    println!("{name}: {} kills", sweep.kills);
    assert!(sweep.kills >= 10, "only {} kills", sweep.kills);
    stop(target);
    let bytes = std::fs::read(store.image()).unwrap();
    let model = engine.take_model().unwrap();
    model.check_now(0, &bytes).unwrap();
    assert!(bytes[..5 * 512].iter().all(|byte| *byte == 0));
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    sweep("kill sweep", &[], 4096, 1000, 1536);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_with_threads() {
    let options = ["--set", "disk_engine=threads"];
    sweep("kill sweep, threads", &options, 4096, 1000, 4096);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_when_durable() {
    sweep("kill sweep, -s", &["-s"], 4096, 1000, 512);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_past_the_page_cache() {
    sweep("kill sweep, -d", &["-d"], 4096, 1000, 512);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_with_a_cache_far_too_small() {
    // 64 blocks of cache, 1 MiB in play, and dirty data always too old.
    let options = [
        "--set",
        "cache_size=256K",
        "--set",
        "max_dirty_age=100",
        "--set",
        "parked_size=256K",
    ];
    sweep("kill sweep, small cache", &options, 200_000, 2048, 12_288);
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9_without_memory_that_survives() {
    // No directory can be made there, so writes go through.
    let options = ["--run-dir", "/proc/aoede"];
    sweep("kill sweep, write-through", &options, 4096, 1000, 1536);
}
