//! Orders: each signal counts, and what makes no sense now is reported and
//! changes nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use initiator::engine::{Block, Engine, Op, Plan};
use initiator::frame::Frame;
use initiator::lab::wait_until;

use super::*;
use crate::rig::SOON;
use crate::workshop::{Load, Temper, assert_idle, trouble};

const TRACED: [Need; 2] = [Need::Network, Need::Program("strace")];
const THREADS: [&str; 2] = ["--set", "disk_engine=threads"];

/// USR1 and USR2 with nothing between them.
fn back_to_back(target: &Process) {
    target.signal(Signal::SIGUSR1).unwrap();
    target.signal(Signal::SIGUSR2).unwrap();
}

fn count(target: &Process, pattern: &str) -> usize {
    let lines = target.output();
    lines.iter().filter(|line| line.contains(pattern)).count()
}

#[test]
fn each_of_a_thousand_orders_counts_however_busy_the_loop_is() {
    const ORDERS: usize = 1000;
    if !lab::require("a thousand orders under load", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let mut target = bed.start(&[]);
    thread::scope(|scope| {
        let loads: Vec<_> = (0..3)
            .map(|n| Load::start(scope, &bed.wire.peer, "ini0", n * 100, Temper::Strict))
            .collect();
        back_to_back(&target);
        target.wait_for_line("frozen: ", soon()).unwrap();
        for _ in 1..ORDERS {
            back_to_back(&target);
            target.wait_for_line("frozen already", soon()).unwrap();
        }
        for load in &loads {
            load.goes_on();
        }
        assert!(bed.shadow().exists());
        for counted in [0, 3, 5] {
            order(&target, counted);
            let line = format!("USR2 after {counted} USR1");
            target.wait_for_line(&line, soon()).unwrap();
        }
        assert!(bed.shadow().exists());
        bed.thaw(&target);
        for load in loads {
            load.end();
        }
    });
    // Each was one, and none of them anything else.
    assert_eq!(count(&target, "frozen already"), ORDERS - 1);
    assert_eq!(count(&target, "freeze: making"), 1);
    assert_eq!(count(&target, "USR2 after"), 3);
    assert_eq!(count(&target, "thaw:"), 1);
    // Nothing is frozen: the same of a thaw.
    for _ in 0..5 {
        order(&target, 2);
        target.wait_for_line("nothing is frozen", soon()).unwrap();
    }
    bed.nothing_left();
    stop(target);
}

#[test]
fn a_read_only_image_is_still_anyway() {
    if !lab::require("orders with -r", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let mut target = bed.start_with(&["-r"]);
    for orders in [1, 2] {
        order(&target, orders);
        target.wait_for_line("read-only", soon()).unwrap();
    }
    bed.nothing_left();
    bed.client().read_many(0, 8).unwrap();
    stop(target);
}

#[test]
fn a_thaw_while_freezing_withdraws_it_and_the_shadow_never_appears() {
    if !lab::require("a freeze that is withdrawn", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let mut target = bed.start(&[&THREADS[..], &["--set", "idle_flush=600000"]].concat());
    let mut client = bed.client();
    client.write_many(0, &data(1, 400)).unwrap();
    let slow = "inject=fdatasync:delay_enter=1500000";
    let strace = trouble(&target, &["trace=fdatasync", slow]);
    order(&target, 1);
    target.wait_for_line("freeze: making", soon()).unwrap();
    until("PATH.new", || !bed.shadows().is_empty());
    // Of the generation that comes.
    client.write_many(100, &data(2, 50)).unwrap();
    order(&target, 1);
    target.wait_for_line("frozen already", soon()).unwrap();
    order(&target, 2);
    target.wait_for_line("withdrawn", soon()).unwrap();
    until("the end of it", || {
        assert!(!bed.shadow().exists(), "it was withdrawn");
        bed.shadows().is_empty()
    });
    drop(strace);
    bed.nothing_left();
    assert_eq!(client.read_many(100, 50).unwrap(), data(2, 50));
    stop(target);
    assert!(bed.image()[100 * 512..150 * 512] == data(2, 50));
    assert!(bed.image()[..100 * 512] == data(1, 400)[..100 * 512]);
}

#[test]
fn while_it_thaws_orders_are_refused_and_a_hup_keeps_the_size() {
    if !lab::require("orders while thawing", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let mut target = bed.start(&THREADS);
    let mut client = bed.client();
    bed.freeze(&target);
    client.write_many(0, &data(1, 700)).unwrap();
    client.flush().unwrap();
    assert_idle(&target);
    // Longer than it was, which is not told before the thaw.
    let image = bed.store.image();
    let longer = fs::File::options().write(true).open(image).unwrap();
    longer.set_len((SECTORS + 8) * 512).unwrap();
    target.signal(Signal::SIGHUP).unwrap();
    target.wait_for_line("size kept", soon()).unwrap();
    assert_eq!(client.identify().unwrap().sectors(), SECTORS);
    let strace = trouble(
        &target,
        &[
            "trace=fdatasync",
            "inject=fdatasync:delay_enter=700000:when=1+",
        ],
    );
    order(&target, 2);
    target.wait_for_line("to merge", soon()).unwrap();
    order(&target, 1);
    target.wait_for_line("still being merged", soon()).unwrap();
    order(&target, 2);
    target
        .wait_for_line("it is thawing already", soon())
        .unwrap();
    target.signal(Signal::SIGHUP).unwrap();
    target.wait_for_line("size kept", soon()).unwrap();
    // It waits for the disk, and for nothing else.
    assert_idle(&target);
    drop(strace);
    until("the shadow vanishes", || bed.shadows().is_empty());
    target.wait_for_line("thawed: ", soon()).unwrap();
    target.signal(Signal::SIGHUP).unwrap();
    target.wait_for_line("4104 sectors", soon()).unwrap();
    assert_eq!(client.identify().unwrap().sectors(), SECTORS + 8);
    assert_eq!(client.read_many(0, 700).unwrap(), data(1, 700));
    bed.nothing_left();
    stop(target);
    assert!(bed.image()[..700 * 512] == data(1, 700));
}

/// A copy is good if PATH is the same inode before and after it: the order of a
/// second party, a stop or a limit must not move the image under that inode.
#[test]
fn path_is_another_inode_before_the_image_changes_whoever_thaws() {
    if !lab::require("what proves a copy", &TRACED) {
        return;
    }
    for (who, exchanges) in [
        ("an order", true),
        ("an order", false),
        ("a stop", true),
        ("a stop", false),
        ("the limit", true),
    ] {
        println!("thawed by {who}, exchange: {exchanges}");
        let bed = Bed::with(9000, 32_768);
        let limited = format!("{},1", bed.shadow().display());
        let path = if who == "the limit" {
            limited
        } else {
            bed.shadow().display().to_string()
        };
        let mut target = bed.start_with(&[&THREADS[..], &["-f", &path]].concat());
        bed.freeze(&target);
        let (still, frozen) = (bed.image(), bed.inode());
        // Every sync is slow enough to be looked at, and the names with it.
        let slow = "inject=fsync,fdatasync:delay_exit=50000";
        let mut expressions = vec!["trace=fsync,fdatasync,renameat2", slow];
        if !exchanges {
            expressions.push("inject=renameat2:error=EINVAL");
        }
        let strace = trouble(&target, &expressions);
        let write = || {
            let mut client = bed.client();
            for n in 0..60 {
                client.write_many(n * 50, &data(n as u8, 40)).unwrap();
            }
            // What is in the cache alone is no part of the merge.
            client.flush().unwrap();
        };
        let (mut changed, mut marked) = (false, false);
        let mut look = || {
            let before = bed.inode();
            let image = bed.image();
            let after = bed.inode();
            if before == frozen && after == frozen {
                assert!(image == still, "the image changes under the same inode");
            }
            changed |= image != still;
            let there = before.is_some() && after.is_some();
            marked |= changed && there && before != frozen;
            let whole = (0..60).all(|n| image[n * 25_600..][..20_480] == data(n as u8, 40));
            let between = !exchanges && image == still;
            assert!(
                before.is_some() || whole || between || who == "the limit",
                "PATH is gone before all is merged"
            );
            bed.shadows().is_empty()
        };
        thread::scope(|scope| {
            let writer = scope.spawn(write);
            if who == "the limit" {
                until("the end of the writes", || look() && writer.is_finished());
                return;
            }
            writer.join().unwrap();
            match who {
                "a stop" => target.signal(Signal::SIGTERM).unwrap(),
                _ => order(&target, 2),
            }
            until("the shadow vanishes", &mut look);
        });
        assert!(marked, "PATH was not there while the image changed");
        drop(strace);
        if who == "a stop" {
            let status = target.wait(Deadline::seconds(20)).unwrap();
            assert!(status.success(), "{:?}", target.output());
        } else {
            stop(target);
        }
        bed.nothing_left();
    }
}

#[test]
fn a_freeze_that_nobody_ends_ends_itself_when_told() {
    if !lab::require("freeze_max", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let target = bed.start(&["--set", "freeze_max=1"]);
    bed.freeze(&target);
    let frozen = std::time::Instant::now();
    bed.client().write_many(0, &data(1, 100)).unwrap();
    bed.client().flush().unwrap();
    until("the shadow vanishes", || bed.shadows().is_empty());
    assert!(frozen.elapsed() > Duration::from_millis(900));
    let path = bed.shadow().display().to_string();
    let said = stop(target).join("\n");
    for line in [
        format!("e1.1: {path}: frozen for 1 s (freeze_max)\n"),
        format!("e1.1: {path}: thaw: freeze_max is over: 0 MiB to merge\n"),
        format!("e1.1: {path}: thawed: "),
    ] {
        assert!(said.contains(&line), "{line} in {said}");
    }
    bed.nothing_left();
    assert!(bed.image()[..51_200] == data(1, 100));
}

#[test]
fn a_second_stop_keeps_the_shadow_and_a_third_ends_it_at_once() {
    if !lab::require("stops while thawing", &TRACED) {
        return;
    }
    for signals in [2, 3] {
        let bed = Bed::new();
        let mut target = bed.start(&[&THREADS[..], &["--set", "io_patience=60"]].concat());
        let mut client = bed.client();
        client.write_many(0, &data(1, 700)).unwrap();
        bed.freeze(&target);
        client.write_many(50, &data(2, 800)).unwrap();
        client.flush().unwrap();
        let (still, frozen) = (bed.image(), bed.inode());
        let delay = if signals == 2 { 300_000 } else { 2_000_000 };
        let inject = format!("inject=fdatasync:delay_enter={delay}");
        let strace = trouble(&target, &["trace=fdatasync", &inject]);
        target.signal(Signal::SIGTERM).unwrap();
        let line = "e1.1: ".to_owned() + bed.shadow().to_str().unwrap();
        let line = line + ": thaw before the stop: ";
        target.wait_for_line(&line, soon()).unwrap();
        target.signal(Signal::SIGTERM).unwrap();
        target.wait_for_line("is kept", soon()).unwrap();
        if signals == 3 {
            target.signal(Signal::SIGTERM).unwrap();
        }
        let status = target.wait(Deadline::seconds(20)).unwrap();
        drop(strace);
        let said = target.output().join("\n");
        assert_eq!(
            status.code(),
            Some(if signals == 2 { 0 } else { 1 }),
            "{said}"
        );
        assert!(!bed.shadows().is_empty(), "{said}");
        // Nobody may take the image for quiesced.
        assert!(bed.inode() != frozen || bed.image() == still);
        let target = bed.start(&[]);
        assert!(bed.seen()[50 * 512..850 * 512] == data(2, 800));
        until("the shadow vanishes", || {
            if bed.shadow().exists() {
                order(&target, 2);
            }
            bed.shadows().is_empty()
        });
        assert!(bed.seen()[..50 * 512] == data(1, 700)[..50 * 512]);
        bed.nothing_left();
        stop(target);
        assert!(bed.image()[50 * 512..850 * 512] == data(2, 800));
    }
}

#[test]
fn a_stop_in_each_phase_merges_or_keeps() {
    if !lab::require("TERM in each phase", &TRACED) {
        return;
    }
    for (on_stop, phase) in [
        ("merge", "freezing"),
        ("keep", "freezing"),
        ("merge", "frozen"),
        ("merge", "thawing"),
        ("keep", "thawing"),
    ] {
        println!("{on_stop} while {phase}");
        let bed = Bed::new();
        let set = format!("on_stop={on_stop}");
        let quiet = ["--set", "idle_flush=600000", "--set", &set];
        let mut target = bed.start(&[&THREADS[..], &quiet].concat());
        let mut client = bed.client();
        client.write_many(0, &data(1, 700)).unwrap();
        if phase != "freezing" {
            bed.freeze(&target);
            client.write_many(50, &data(2, 800)).unwrap();
            client.flush().unwrap();
        }
        let strace = trouble(
            &target,
            &["trace=fdatasync", "inject=fdatasync:delay_enter=250000"],
        );
        match phase {
            "freezing" => {
                order(&target, 1);
                target.wait_for_line("freeze: making", soon()).unwrap();
                until("PATH.new", || !bed.shadows().is_empty());
                client.write_many(50, &data(2, 800)).unwrap();
            }
            "thawing" => {
                order(&target, 2);
                target.wait_for_line("to merge", soon()).unwrap();
            }
            _ => {}
        }
        target.signal(Signal::SIGTERM).unwrap();
        let status = target.wait(Deadline::seconds(20)).unwrap();
        drop(strace);
        let said = target.output().join("\n");
        assert!(status.success(), "{status}: {said}");
        if on_stop == "merge" {
            bed.nothing_left();
        } else {
            assert!(!bed.shadows().is_empty(), "{said}");
            let target = bed.start(&[]);
            assert!(bed.seen()[50 * 512..850 * 512] == data(2, 800));
            stop(target);
            bed.nothing_left();
        }
        let image = bed.image();
        assert!(image[..50 * 512] == data(1, 700)[..50 * 512]);
        assert!(image[50 * 512..850 * 512] == data(2, 800));
    }
}

#[test]
fn held_writes_go_through_after_a_thaw_or_after_hold_max() {
    if !lab::require("writes that are held", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    for (end, hold_max) in [("thaw", 100), ("hold_max", 1), ("stop", 100)] {
        let hold = format!("hold_max={hold_max}");
        let options = [&QUICK[..], &["--set", &hold]].concat();
        let mut target = serve(&bed.wire.host, &bed.store, &["tgt0"], &options);
        let mut client = bed.client();
        client.write_many(0, &data(1, 64)).unwrap();
        order(&target, 1);
        target.wait_for_line("is quiesced", soon()).unwrap();
        if end != "hold_max" {
            client
                .expect_silence(&Frame::write(0, &data(2, 2)), SOON)
                .unwrap();
            assert_eq!(client.read_many(0, 64).unwrap(), data(1, 64));
            client.flush().unwrap();
            client.identify().unwrap();
            client.config_read().unwrap();
            order(&target, 1);
            target.wait_for_line("frozen already", soon()).unwrap();
            assert_idle(&target);
            assert!(bed.image()[..64 * 512] == data(1, 64));
        }
        // Sent again and again until it is answered.
        thread::scope(|scope| {
            let mut other = bed.client();
            let patience = initiator::client::Patience {
                deadline: SOON,
                resend: Some(Duration::from_millis(20)),
                new_tag: true,
            };
            let writer =
                scope.spawn(move || other.call_with(&Frame::write(64, &data(3, 2)), patience));
            match end {
                "thaw" => order(&target, 2),
                "stop" => {
                    target.signal(Signal::SIGTERM).unwrap();
                    let status = target.wait(soon()).unwrap();
                    assert!(status.success(), "{:?}", target.output());
                    target = serve(&bed.wire.host, &bed.store, &["tgt0"], &options);
                }
                _ => {
                    target.wait_for_line("hold_max is over", soon()).unwrap();
                }
            }
            assert_eq!(writer.join().unwrap().unwrap().error(), None);
        });
        wait_until("the written sectors", soon(), || {
            client.read_many(64, 2).is_ok_and(|read| read == data(3, 2))
        })
        .unwrap();
        stop(target);
        assert!(bed.image()[64 * 512..66 * 512] == data(3, 2));
        fs::write(bed.store.image(), vec![0; SECTORS as usize * 512]).unwrap();
    }
}

#[test]
fn without_a_shadow_nothing_moves_once_the_image_is_still() {
    if !lab::require("a held image under load", &[Need::Network]) {
        return;
    }
    // Much waits for a slot when the order comes.
    let small = [
        "--set",
        "cache_size=256K",
        "--set",
        "max_dirty_age=100",
        "--set",
        "idle_flush=100",
    ];
    let bed = Bed::with(9000, 32_768);
    for round in 0..6 {
        let options = [&QUICK[..], &small].concat();
        let mut target = serve(&bed.wire.host, &bed.store, &["tgt0"], &options);
        let mut engine = Engine::new(bed.client()).unwrap();
        let plan = Plan {
            op: Op::Write,
            block: Block::Bytes(8192),
            depth: 256,
            duration: None,
            seed: round,
            resend: Duration::from_secs(1),
            last_answers: Duration::from_millis(20),
            ..Plan::default()
        };
        let still = AtomicBool::new(false);
        thread::scope(|scope| {
            let load = scope.spawn(|| {
                let load = engine.run_until(&plan, || still.load(Ordering::Relaxed));
                load.map(|report| report.clean())
            });
            thread::sleep(Duration::from_millis(50));
            order(&target, 1);
            target.wait_for_line("is quiesced", soon()).unwrap();
            let image = bed.image();
            // Whatever is on its way has come after this.
            bed.client().flush().unwrap();
            thread::sleep(Duration::from_millis(150));
            assert!(bed.image() == image, "the image moves while it is held");
            still.store(true, Ordering::Relaxed);
            load.join().unwrap().unwrap().unwrap();
        });
        order(&target, 2);
        target.wait_for_line("answered again", soon()).unwrap();
        stop(target);
    }
}
