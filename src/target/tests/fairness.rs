//! A polite initiator beside a hostile one: what it gets, against what it gets
//! while the same hostile frames go to another shelf.
//!
//! The target is the real one, with its loop's turns, a slow disk and a slow
//! processor of virtual time: every run gives the same numbers.

mod hall;

use super::*;
use hall::*;
use initiator::frame::{Ata, opcode};

/// What a frame that came in, and a reply, cost the processor.
const PER_FRAME: Duration = Duration::from_micros(1);
const PER_REPLY: Duration = Duration::from_micros(3);
/// The least time of a turn of the loop.
const PER_TURN: Duration = Duration::from_micros(20);
/// Frames taken in a turn, as many while reads wait for the disk, and those that
/// wait to be taken.
const TURN: usize = 64;
const TURN_READING: usize = 8;
const RING: usize = 2048;
/// After so long without a reply a request is sent again.
const RESEND: Duration = Duration::from_millis(100);
/// What of its control a polite initiator must have.
const LEAST: f64 = 0.4;
/// Sectors of the export: what is read cold is never read twice.
const LARGE: u64 = 1 << 17;

/// What the slow disk takes for an operation.
const DISK: Duration = Duration::from_millis(2);

/// What the polite host gets beside the hostile one, of what it gets beside the
/// same frames for another shelf.
fn ratio(plan: Plan, polite: fn() -> Host, hostile: fn() -> Host, time: Duration) -> f64 {
    let run = |shelf| {
        let mut hall = Hall::new(plan);
        let hostile = Host { shelf, ..hostile() };
        hall.hosts = vec![polite(), hostile];
        // Until what the hostile one does has filled what it can fill.
        hall.run(time / 2);
        hall.run(time) as f64
    };
    let (control, beside) = (run(SHELF + 1), run(SHELF));
    println!("{beside} beside, {control} alone: {:.2}", beside / control);
    assert!(control > 20.0, "the control itself gets nothing");
    beside / control
}

#[track_caller]
fn fair(plan: Plan, polite: fn() -> Host, hostile: fn() -> Host) {
    let ratio = ratio(plan, polite, hostile, Duration::from_secs(4));
    assert!(ratio >= LEAST, "{ratio:.2} of what it gets alone");
}

/// The n-th of places that are far from each other, in the first or the second
/// half of the export.
fn place(n: u64, half: u64) -> u64 {
    // A request may be some blocks long.
    let blocks = LARGE / 16 - 32;
    half * LARGE / 2 + (n * 4099 % blocks) * 8
}

fn verify(lba: u64, count: u8) -> Ask {
    let registers = Ata {
        lba,
        count,
        opcode: opcode::READ_VERIFY,
        ..Ata::default()
    };
    Ask::ata(registers, &[])
}

fn every(per_second: u32) -> Pace {
    Pace::Open(Duration::from_secs(1) / per_second)
}

fn polite_reads() -> Host {
    Host::new(ALICE, Pace::Closed(16), |n| Ask::read(place(n, 0), 1))
}

fn polite_writes() -> Host {
    Host::new(ALICE, Pace::Closed(16), |n| {
        Ask::write(place(n % 500, 0), &sectors(n as u8, 2))
    })
}

fn cold_reads() -> Host {
    Host::new(BOB, every(1000), |n| Ask::read(place(n, 1), 1))
}

fn durable_writes() -> Host {
    Host::new(BOB, every(1000), |n| {
        Ask::write(place(n, 1), &sectors(1, 2))
    })
}

fn verifies() -> Host {
    Host::new(BOB, every(1000), |n| verify(place(n, 1), 255))
}

const SYNCED: Plan = Plan {
    durable: true,
    ..PLAN
};

#[test]
fn cold_reads_of_one_leave_another_its_cold_reads() {
    fair(PLAN, polite_reads, cold_reads);
    let direct = Plan {
        direct: true,
        ..PLAN
    };
    fair(direct, polite_reads, cold_reads);
}

#[test]
fn cold_reads_of_one_leave_another_its_durable_writes() {
    fair(SYNCED, polite_writes, cold_reads);
}

#[test]
fn durable_writes_of_one_leave_another_its_cold_reads() {
    fair(SYNCED, polite_reads, durable_writes);
}

#[test]
fn verifies_of_one_leave_another_its_reads_and_durable_writes() {
    fair(PLAN, polite_reads, verifies);
    fair(SYNCED, polite_writes, verifies);
}

#[test]
fn under_verifies_without_end_a_write_reaches_the_image_in_its_time_and_a_flush_ends() {
    let mut hall = Hall::new(PLAN);
    // Each of them fills a place if it can.
    hall.hosts = vec![
        Host::new(BOB, every(2000), |n| verify(place(n, 1), 255)),
        Host::new(CAROL, Pace::Closed(1), |n| match n % 2 {
            0 => Ask::write(n, &sectors(7, 1)),
            _ => Ask::flush(),
        }),
    ];
    hall.run(Duration::from_secs(2));
    let (answered, began) = (hall.hosts[1].answered, hall.now);
    while hall.hosts[1].answered < answered + 20 {
        hall.turn();
        let took = hall.now - began;
        assert!(took < Duration::from_secs(2), "10 flushes take {took:?}");
    }
    // Without a flush age decides.
    hall.hosts[1] = Host::new(CAROL, Pace::Closed(1), |_| Ask::write(99, &sectors(9, 1)));
    let began = hall.now;
    let mut sector = [0; 512];
    while sector[0] != 9 {
        hall.turn();
        let took = hall.now - began;
        assert!(
            took < MAX_DIRTY_AGE,
            "a write is not on the image after {took:?}"
        );
        let line = hall.line.borrow();
        line.engine.try_now(&mut sector, 99 * 512);
    }
}

#[test]
fn one_that_takes_all_places_leaves_another_its_own() {
    let mut bench = Bench::new();
    bench.shut();
    let read = |n: usize| Ask::read(n as u64 % SECTORS, 1);
    let mut parked = 0;
    for n in 0..2 * PARKED_MAX {
        match bench.send(SMALL, BOB, &read(n)) {
            Got::Parked => parked += 1,
            Got::Dropped(Dropped::NoRoom) => assert!(n >= PARKED_MAX),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(parked, PARKED_MAX, "one alone may have all");
    for n in 0..PARKED_HEADROOM {
        let got = bench.send(SMALL, ALICE, &read(n));
        assert!(matches!(got, Got::Parked), "{n}: {got:?}");
    }
    bench.open();
    assert_eq!(bench.wait().len(), PARKED_MAX + PARKED_HEADROOM);
}

/// An extension request, and frames of 255 reads of what the cache has.
fn coalesced_reads() -> Host {
    Host::new(BOB, every(2000), |n| match n {
        0 => Ask::extensions(&["coalesced_read"]),
        _ => {
            let first = Ata {
                count: 1,
                opcode: opcode::READ,
                ..Ata::default()
            };
            Ask::coalesced_read(first, 255, &[([1; 4], 0, 1); 255])
        }
    })
}

fn warm_reads(depth: usize) -> Host {
    Host::new(ALICE, Pace::Closed(depth), |n| Ask::read(place(n, 0), 1))
}

#[test]
fn coalesced_reads_of_one_leave_another_its_replies() {
    let plan = Plan { warm: true, ..PLAN };
    let short = Duration::from_millis(300);
    for polite in [|| warm_reads(16), || warm_reads(64)] {
        let ratio = ratio(plan, polite, coalesced_reads, short);
        assert!(ratio >= LEAST, "{ratio:.2} of what it gets alone");
    }
}

fn trim(lba: u64, count: u64) -> Ask {
    let registers = Ata {
        feature: 1,
        count: 1,
        opcode: opcode::DATA_SET_MANAGEMENT,
        ..Ata::default()
    };
    let mut page = (lba | count << 48).to_le_bytes().to_vec();
    page.resize(512, 0);
    Ask::ata(registers, &page)
}

/// Trims of what was not written, one behind the other.
fn trims() -> Host {
    Host::new(BOB, every(1000), |n| {
        trim(LARGE / 2 + n * 8 % (LARGE / 2), 8)
    })
}

fn cached_writes() -> Host {
    Host::new(ALICE, Pace::Closed(8), |n| {
        Ask::write(place(n % 500, 0), &sectors(n as u8, 2))
    })
}

#[test]
fn trims_of_one_leave_another_its_cached_writes() {
    let ratio = ratio(PLAN, cached_writes, trims, Duration::from_millis(200));
    assert!(ratio >= LEAST, "{ratio:.2} of what it gets alone");
}

#[test]
fn trims_that_wait_become_one() {
    let mut hall = Hall::new(PLAN);
    hall.hosts = vec![trims()];
    hall.run(Duration::from_secs(2));
    let answered = hall.hosts[0].answered;
    assert!(
        answered > 1500,
        "{answered} of 2000 on a disk that does 500/s"
    );
}

/// Writes of half a block of the disk, whose other half must be read first.
fn half_blocks() -> Host {
    Host::new(BOB, every(1000), |n| {
        Ask::write(place(n, 1), &sectors(1, 1))
    })
}

#[test]
fn half_blocks_of_one_leave_another_its_cached_writes() {
    let plan = Plan {
        direct: true,
        align: 1024,
        slots: 256,
        ..PLAN
    };
    let polite = || {
        Host::new(ALICE, Pace::Closed(8), |n| {
            // Now and then other blocks, which need slots of their own.
            let block = n % 50 + n / 100_000 * 50;
            Ask::write(place(block, 0), &sectors(n as u8, 2))
        })
    };
    let ratio = ratio(plan, polite, half_blocks, Duration::from_secs(1));
    assert!(ratio >= LEAST, "{ratio:.2} of what it gets alone");
}

/// How long a write of one takes to be on stable storage while another writes.
fn age(plan: Plan, hostile: fn() -> Host, write: fn() -> Ask) -> Duration {
    let mut hall = Hall::new(plan);
    hall.hosts = vec![hostile()];
    // Until the hostile one has all that it can have.
    hall.run(Duration::from_secs(3));
    let before = hall.now;
    let once = Pace::Open(Duration::from_secs(3600));
    hall.hosts.push(Host::new(ALICE, once, move |_| write()));
    hall.hosts[1].next = before;
    let (mut sector, mut written) = ([0; 512], None);
    while hall.now - before < Duration::from_secs(30) {
        hall.turn();
        let line = hall.line.borrow();
        assert!(line.engine.try_now(&mut sector, 99 * 512));
        if sector[0] == 9 {
            let written = *written.get_or_insert(hall.now);
            if line.synced.is_some_and(|synced| synced >= written) {
                break;
            }
        }
    }
    hall.now - before
}

/// Writes of half blocks, or of whole blocks, of the disk, one far from the other.
fn flood_of_halves() -> Host {
    Host::new(BOB, every(8000), |n| {
        Ask::write(place(n, 1), &sectors(1, 1))
    })
}

fn flood_of_blocks() -> Host {
    Host::new(BOB, every(8000), |n| {
        Ask::write(place(n, 1), &sectors(1, 2))
    })
}

#[test]
fn a_flood_of_writes_of_one_leaves_another_s_writes_their_age() {
    let plan = Plan {
        direct: true,
        align: 1024,
        slots: 16384,
        ..PLAN
    };
    let whole = || Ask::write(98, &sectors(9, 2));
    let half = || Ask::write(99, &sectors(9, 1));
    let took = [
        age(plan, flood_of_halves, whole),
        age(plan, flood_of_halves, half),
        age(plan, flood_of_blocks, whole),
    ];
    // And one sync.
    let most = MAX_DIRTY_AGE + Duration::from_secs(1);
    assert!(took.iter().all(|took| *took < most), "{took:?}");
}
