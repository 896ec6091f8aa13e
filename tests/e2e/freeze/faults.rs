//! Calls that fail, and deaths at each of them: the phase goes on when the
//! trouble is over, or at the next start, and nothing is lost.

use initiator::client::Patience;
use initiator::engine::model::Initial;
use initiator::engine::{Block, Engine, Op, Plan};

use super::*;
use crate::workshop::{assert_idle, trouble};

const TRACED: [Need; 2] = [Need::Network, Need::Program("strace")];
/// strace sees the calls of threads alone.
const THREADS: [&str; 4] = ["--set", "disk_engine=threads", "--set", "disk_threads=1"];

/// Who gives up soon, for the target may be dead.
fn hasty(bed: &Bed) -> Client {
    let mut client = bed.client();
    client.patience = Patience {
        deadline: Duration::from_millis(300),
        resend: Some(Duration::from_millis(50)),
        new_tag: true,
    };
    client
}

fn is_dead(target: &mut Process) -> bool {
    target.exit_status().unwrap().is_some()
}

/// Waits for something, or for the target's end.
#[track_caller]
fn until_dead_or(target: &mut Process, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = soon();
    while !is_dead(target) && !done() {
        let said = || target.output().join("\n");
        assert!(
            !deadline.passed(),
            "waited for too long: {what}: {}",
            said()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A whole freeze, in which the n-th of these calls is the target's last; says
/// whether it was. `others` changes other calls.
fn die_at(call: &str, n: u32, others: &[&str]) -> bool {
    println!("{call} {n} {others:?}");
    let bed = Bed::with(1500, 256);
    let quiet = ["--set", "idle_flush=600000"];
    let options = [&THREADS[..], &quiet].concat();
    let mut target = bed.start(&options);
    let mut client = hasty(&bed);
    client.write_many(0, &data(1, 40)).unwrap();
    let trace = format!("trace={call},renameat2");
    let deadly = format!("inject={call}:signal=SIGKILL:when={n}");
    let strace = trouble(&target, &[&[&*trace, &*deadly], others].concat());
    let _ = try_order(&target, 1);
    until_dead_or(&mut target, "the shadow appears", || bed.shadow().exists());
    let frozen = bed.shadow().exists();
    if frozen {
        assert!(bed.image()[..40 * 512] == data(1, 40));
    }
    let (still, inode) = (bed.image(), bed.inode());
    let acknowledged = client.write_many(20, &data(2, 40)).is_ok();
    let _ = client.flush();
    let mut ordered = false;
    if !is_dead(&mut target) {
        assert!(bed.image() == still, "the image moves while it is frozen");
        ordered = true;
        let _ = try_order(&target, 2);
        until_dead_or(&mut target, "the shadow vanishes", || {
            bed.shadows().is_empty()
        });
    }
    // The last calls may come after the name is gone.
    if !is_dead(&mut target) && target.wait_for_line("thawed", soon()).is_err() {
        target.wait(soon()).unwrap();
    }
    let died = is_dead(&mut target);
    drop(strace);
    if died {
        if frozen && !ordered {
            assert!(bed.shadow().exists() && bed.image() == still);
        }
        target = bed.start(&options);
        // Ordered or not.
        if frozen && bed.inode() == inode {
            assert!(bed.image() == still, "the image moves while it is frozen");
        }
    }
    let seen = bed.client().read_many(0, 256).unwrap();
    assert!(seen[..20 * 512] == data(1, 40)[..20 * 512]);
    if acknowledged {
        assert!(seen[20 * 512..60 * 512] == data(2, 40));
    }
    until("the shadow vanishes", || {
        if bed.shadow().exists() {
            order(&target, 2);
        }
        bed.shadows().is_empty()
    });
    // And once more, as if nothing had been.
    bed.freeze(&target);
    bed.thaw(&target);
    bed.nothing_left();
    stop(target);
    assert!(bed.image() == seen);
    died
}

/// Dies at the first of these calls, the second, and so on until there is none
/// more.
fn die_at_each(call: &str, others: &[&str]) {
    if !lab::require("deaths at each call", &TRACED) {
        return;
    }
    const MOST: u32 = 30;
    let deaths = (1..MOST).take_while(|n| die_at(call, *n, others)).count();
    println!("{deaths} deaths at {call}");
    assert!((1..MOST as usize - 1).contains(&deaths));
}

#[test]
fn dying_at_any_name_or_length_loses_nothing() {
    for call in [
        "/^rename(at)?$",
        "renameat2",
        "unlink",
        "linkat",
        "ftruncate",
        "fallocate",
        "fsync",
    ] {
        die_at_each(call, &[]);
    }
}

#[test]
fn dying_at_any_write_or_sync_loses_nothing() {
    for call in ["pwrite64", "fdatasync", "pwritev"] {
        die_at_each(call, &[]);
    }
}

/// A filesystem that knows neither RENAME_EXCHANGE nor RENAME_NOREPLACE.
#[test]
fn dying_at_any_name_without_an_exchange_loses_nothing() {
    let others = ["inject=renameat2:error=EINVAL"];
    for call in ["linkat", "unlink", "fsync"] {
        die_at_each(call, &others);
    }
}

/// A load during which some requests may fail.
fn load(engine: &mut Engine, operations: u64) {
    let plan = Plan {
        op: Op::Mixed(30),
        block: Block::Bytes(1536),
        depth: 8,
        first: 3,
        sectors: 1200,
        duration: None,
        operations: Some(operations),
        seed: operations,
        verify: Some(Initial::Zeros),
        flush_every: Some(40),
        resend: Duration::from_secs(1),
        give_up: Duration::from_secs(30),
        new_tag: true,
        ..Plan::default()
    };
    engine.run(&plan).unwrap();
}

#[test]
fn a_phase_goes_on_when_its_disk_does() {
    if !lab::require("failing disks in each phase", &TRACED) {
        return;
    }
    let cases = [
        // Where it happens; the call and how it fails; what is said then.
        ("making", "fallocate:error=ENOSPC", "not done"),
        ("making", "fsync:error=EIO", "not done"),
        ("making", "/^rename:error=EIO", "not done"),
        ("freezing", "pwritev:error=EIO", "error"),
        ("appearing", "renameat2:error=EIO", "withdrawn"),
        ("frozen", "pwritev:error=EIO", "error"),
        ("frozen", "pwrite64:error=EIO", "error"),
        ("frozen", "fdatasync:error=EIO", "error"),
        ("thawing", "ftruncate:error=EIO", "error"),
        ("thawing", "pwrite64:error=ENOSPC", "error"),
        ("thawing", "fdatasync:error=EIO", "error"),
        ("thawing", "pread64:error=EIO", "error"),
        ("thawing", "pwritev:error=EIO", "error"),
        ("thawing", "/^unlink:error=EIO", "error"),
        ("thawing", "renameat2:error=EIO", "error"),
    ];
    for (phase, fault, says) in cases {
        println!("{phase}: {fault}");
        let bed = Bed::with(9000, 4096);
        let mut target = bed.start(&THREADS);
        let mut engine = Engine::new(bed.client()).unwrap();
        load(&mut engine, 100);
        let begin = |target: &mut Process| {
            let (call, _) = fault.split_once(':').unwrap();
            let expressions = [format!("trace={call}"), format!("inject={fault}")];
            trouble(target, &[&expressions[0], &expressions[1]])
        };
        let mut still = None;
        if matches!(phase, "frozen" | "thawing") {
            bed.freeze(&target);
            still = Some(bed.image());
            load(&mut engine, 100);
            engine.client.flush().unwrap();
        }
        if phase == "freezing" {
            load(&mut engine, 20);
        }
        let strace = begin(&mut target);
        match phase {
            "frozen" => {}
            "thawing" => order(&target, 2),
            _ => order(&target, 1),
        }
        load(&mut engine, 60);
        target.wait_for_line(says, soon()).unwrap();
        assert_idle(&target);
        if let Some(still) = still.filter(|_| phase == "frozen") {
            assert!(bed.shadow().exists());
            assert!(bed.image() == still, "the image moves while it is frozen");
        }
        drop(strace);
        // Whatever was given up comes back by itself.
        until("a flush that succeeds", || engine.client.flush().is_ok());
        match phase {
            "making" | "appearing" => {
                until("the end of it", || bed.shadows().is_empty());
                bed.freeze(&target);
                bed.thaw(&target);
            }
            "thawing" => until("the shadow vanishes", || bed.shadows().is_empty()),
            _ => {
                until("the shadow appears", || bed.shadow().exists());
                bed.thaw(&target);
            }
        }
        load(&mut engine, 50);
        engine.verify_all().unwrap();
        stop(target);
        bed.nothing_left();
        let bytes = bed.image();
        engine.model().unwrap().check_now(0, &bytes).unwrap();
    }
}
