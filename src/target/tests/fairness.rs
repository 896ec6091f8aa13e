//! A polite initiator beside a hostile one: what it gets, against what it gets
//! while the same hostile frames go to another shelf.
//!
//! The target is the real one, with its loop's turns, a slow disk and a slow
//! processor of virtual time: every run gives the same numbers.

use std::collections::HashMap;

use super::*;
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

/// A disk that does one thing after the other, in the order in which it was told
/// so: what it has been given stands before what comes. As with the kernel's page
/// cache, to look for what is not there begins to read it.
struct Slow {
    line: Rc<RefCell<Line>>,
}

struct Line {
    engine: Inline,
    now: Instant,
    free_at: Instant,
    jobs: VecDeque<(Instant, JobId, Job)>,
    /// What an operation takes.
    each: Duration,
    /// Whether reads are answered from the page cache.
    warm: bool,
    /// Without a page cache.
    direct: bool,
    /// Pages of the page cache: when each is there, or was begun to be read for
    /// longer than this.
    pages: HashMap<u64, Instant>,
    /// When the sync in flight began, and when the last one that has ended did.
    sync_began: Option<Instant>,
    synced: Option<Instant>,
}

impl Line {
    fn takes(&self, job: &Job) -> Duration {
        let operations = match job {
            Job::Write(segments) => segments.len() as u32,
            Job::Prefetch { .. } | Job::Save { .. } => 0,
            _ => 1,
        };
        self.each * operations
    }
}

impl Line {
    /// Has the disk work for so long after all that it was told; returns when that
    /// ends.
    fn takes_until(&mut self, takes: Duration) -> Instant {
        self.free_at = self.free_at.max(self.now) + takes;
        self.free_at
    }
}

impl Disk for Slow {
    fn submit(&mut self, id: JobId, job: Job) {
        let mut line = self.line.borrow_mut();
        if matches!(job, Job::Sync) {
            line.sync_began = Some(line.now);
        }
        let begun = match &job {
            Job::Read { at, .. } => line.pages.get(&(at / 4096)).copied(),
            _ => None,
        };
        let ends = match begun {
            Some(there) => there.max(line.now),
            None => {
                let takes = line.takes(&job);
                line.takes_until(takes)
            }
        };
        let at = line.jobs.partition_point(|(before, ..)| *before <= ends);
        line.jobs.insert(at, (ends, id, job));
    }

    fn reap(&mut self) -> Option<Done> {
        let mut line = self.line.borrow_mut();
        let next = line.jobs.front();
        next.filter(|(ends, ..)| *ends <= line.now)?;
        let (_, id, job) = line.jobs.pop_front()?;
        if matches!(job, Job::Sync) {
            line.synced = line.sync_began;
        }
        line.engine.submit(id, job);
        line.engine.reap()
    }

    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        let mut line = self.line.borrow_mut();
        if line.direct {
            return false;
        }
        let page = offset / 4096;
        if !line.warm && !line.pages.contains_key(&page) {
            let each = line.each;
            let there = line.takes_until(each);
            line.pages.insert(page, there);
        }
        let there = line.pages.get(&page).is_none_or(|there| *there <= line.now);
        there && line.engine.try_now(buf, offset)
    }

    fn is_cached(&self, offset: u64, _: u64) -> bool {
        let line = self.line.borrow();
        line.warm || line.pages.contains_key(&(offset / 4096))
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn has_done(&mut self) -> bool {
        let line = self.line.borrow();
        line.jobs
            .front()
            .is_some_and(|(ends, ..)| *ends <= line.now)
    }
}

/// How a host asks.
enum Pace {
    /// So many requests at a time, each sent again until it is answered.
    Closed(usize),
    /// One after each such time, whatever comes of it.
    Open(Duration),
}

struct Host {
    mac: u8,
    shelf: u16,
    pace: Pace,
    load: Box<dyn FnMut(u64) -> Ask>,
    asked: u64,
    next: Instant,
    /// Tags that are not answered, and when they were sent.
    open: VecDeque<(u32, Instant, Ask)>,
    answered: u64,
    failed: u64,
}

impl Host {
    fn new(mac: u8, pace: Pace, load: impl FnMut(u64) -> Ask + 'static) -> Host {
        Host {
            mac,
            shelf: SHELF,
            pace,
            load: Box::new(load),
            asked: 0,
            next: Instant::now(),
            open: VecDeque::new(),
            answered: 0,
            failed: 0,
        }
    }
}

/// A target in its loop, and its hosts.
struct Hall {
    target: Target,
    line: Rc<RefCell<Line>>,
    hosts: Vec<Host>,
    ring: VecDeque<Vec<u8>>,
    now: Instant,
    tag: u32,
    _dir: TempDir,
}

/// How the hall's export is made.
#[derive(Clone, Copy)]
struct Plan {
    direct: bool,
    align: usize,
    durable: bool,
    slots: u32,
    each: Duration,
    warm: bool,
}

const PLAN: Plan = Plan {
    direct: false,
    align: 512,
    durable: false,
    slots: 4096,
    each: DISK,
    warm: false,
};

impl Hall {
    fn new(plan: Plan) -> Hall {
        let now = Instant::now();
        let line = Rc::new(RefCell::new(Line {
            engine: Inline::new(Arc::new(MemoryFile::new(vec![0; LARGE as usize * 512]))),
            now,
            free_at: now,
            jobs: VecDeque::new(),
            each: plan.each,
            warm: plan.warm,
            direct: plan.direct,
            pages: HashMap::new(),
            sync_began: None,
            synced: None,
        }));
        let disk = Box::new(Slow {
            line: Rc::clone(&line),
        });
        let arena = Arena::anonymous(4096, plan.slots).unwrap();
        let cache = Cache::new(arena, plan.align, plan.slots / 4 * 3);
        let bounds = Bounds {
            start: 0,
            sectors: LARGE,
        };
        let options = VolumeOptions {
            export: "e1.1".into(),
            image: "disk.img".into(),
            align: plan.align,
            direct: plan.direct,
            write_through: false,
            request_max: 9014,
            parked_max: 4 << 20,
            max_dirty_age: MAX_DIRTY_AGE,
            idle_flush: IDLE_FLUSH,
            io_patience: IO_PATIENCE,
            read_ahead: 0,
            write_depth: 32,
            merge_share: 25,
            shadow_full: crate::freeze::WhenFull::Thaw,
            hold_max: Duration::from_secs(120),
            freeze_max: Duration::ZERO,
        };
        let volume = Volume::new(now, disk, cache, bounds, options);
        let dir = tempfile::tempdir().unwrap();
        let address = Address::new(SHELF, SLOT).unwrap().to_string();
        let state = StateFile::new(dir.path(), &address, &dir.path().join("disk"));
        let settings = Settings {
            durable: plan.durable,
            ..settings()
        };
        let wire = WireState::default();
        let mut target = Target::new(now, settings, volume, wire, Arc::new(state));
        target.set_nic(SMALL, Some(nic(SMALL)));
        Hall {
            target,
            line,
            hosts: Vec::new(),
            ring: VecDeque::new(),
            now,
            tag: 0,
            _dir: dir,
        }
    }

    fn encode(&mut self, mac: u8, shelf: u16, ask: &Ask) -> (u32, Vec<u8>) {
        self.tag += 1;
        let bytes = ask.encode(&Defaults {
            destination: host(1),
            source: host(mac),
            shelf,
            slot: SLOT,
            tag: self.tag.to_be_bytes(),
        });
        (self.tag, bytes)
    }

    /// Has the hosts send what they may now.
    fn send(&mut self) {
        let mut hosts = std::mem::take(&mut self.hosts);
        for host in &mut hosts {
            loop {
                let late = host.open.front();
                let late = late.filter(|(_, sent, _)| self.now - *sent >= RESEND);
                let ask = match &host.pace {
                    Pace::Open(every) if host.next <= self.now => {
                        host.next += *every;
                        (host.load)(host.asked)
                    }
                    Pace::Closed(_) if late.is_some() => host.open.pop_front().unwrap().2,
                    Pace::Closed(depth) if host.open.len() < *depth => (host.load)(host.asked),
                    _ => break,
                };
                host.asked += 1;
                let (tag, bytes) = self.encode(host.mac, host.shelf, &ask);
                if let Pace::Closed(_) = host.pace {
                    host.open.push_back((tag, self.now, ask));
                }
                if self.ring.len() < RING {
                    self.ring.push_back(bytes);
                }
            }
        }
        self.hosts = hosts;
    }

    /// A reply reaches its host.
    fn arrive(&mut self, reply: &[u8]) {
        self.now += PER_REPLY;
        let tag = u32::from_be_bytes(reply[20..24].try_into().unwrap());
        for host in self.hosts.iter_mut().filter(|host| host.mac == reply[5]) {
            host.answered += 1;
            host.failed += u64::from(reply[14] & 4 != 0 || reply[27] & 1 != 0);
            host.open.retain(|(open, ..)| *open != tag);
        }
    }

    fn reply(&mut self, action: Action, head: &[u8]) {
        if let Action::Reply { len, body, .. } = action {
            self.target.recycle(body);
            self.arrive(&head[..len.min(60)]);
        }
    }

    /// A turn of the loop.
    fn turn(&mut self) {
        let began = self.now;
        self.send();
        let most = if self.target.is_reading() {
            TURN_READING
        } else {
            TURN
        };
        let mut head = vec![0; HEAD_MAX];
        for _ in 0..most {
            let Some(bytes) = self.ring.pop_front() else {
                break;
            };
            let frame = Frame {
                bytes: &bytes,
                stamp: 0,
                whole: true,
                other_host: false,
            };
            self.now += PER_FRAME;
            let action = self.target.handle(began, SMALL, frame, &mut head);
            self.reply(action, &head);
            self.send_ready(&mut head);
        }
        self.line.borrow_mut().now = self.now;
        self.target.advance(self.now);
        self.send_ready(&mut head);
        self.now = self.now.max(began + PER_TURN);
    }

    fn send_ready(&mut self, head: &mut [u8]) {
        while self.target.next_ready().is_some() {
            let action = self.target.emit(head);
            self.reply(action, head);
        }
    }

    /// Lets the hosts do their worst for so long; says how many requests of the
    /// first one were answered.
    fn run(&mut self, time: Duration) -> u64 {
        for host in &mut self.hosts {
            host.next = self.now;
        }
        let (until, before) = (self.now + time, self.hosts[0].answered);
        while self.now < until {
            self.turn();
        }
        assert_eq!(self.hosts[0].failed, 0);
        self.hosts[0].answered - before
    }
}

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
