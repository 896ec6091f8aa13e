//! A disk that is slow, or hangs, in virtual time.

use super::*;
use std::collections::VecDeque;

/// Blocks that the cache holds.
const BLOCKS: u64 = 16384;
/// Bytes a second.
const RATE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug)]
enum Work {
    Write(u64),
    Push(u64),
    Sync,
}

#[derive(Debug, Default)]
struct Clockwork {
    /// The first is at work.
    jobs: VecDeque<(JobId, Work)>,
    /// When it ends.
    until: Option<Instant>,
    done: VecDeque<JobId>,
    /// Bytes in the page cache.
    cached: u64,
    /// The bytes of each push.
    pushes: Vec<u64>,
    hangs: bool,
}

impl Clockwork {
    fn run(&mut self, now: Instant) {
        while let Some((id, work)) = self.jobs.front().copied() {
            if self.until.is_none() {
                let bytes = match work {
                    Work::Write(len) => {
                        self.cached += len;
                        0
                    }
                    Work::Push(len) => len.min(self.cached),
                    Work::Sync => self.cached,
                };
                self.cached -= bytes;
                self.until = Some(now + Duration::from_secs_f64(bytes as f64 / RATE as f64));
            }
            if self.hangs || self.until.is_some_and(|until| now < until) {
                return;
            }
            self.until = None;
            self.jobs.pop_front();
            self.done.push_back(id);
        }
    }
}

/// Does one job after the other: writes at once into a page cache, what is
/// pushed or synced at its rate.
struct Slow(Rc<RefCell<Clockwork>>);

impl Disk for Slow {
    fn submit(&mut self, id: JobId, job: Job) {
        let mut clockwork = self.0.borrow_mut();
        let work = match job {
            Job::Write(segments) => {
                let pieces = segments.iter().flat_map(|segment| &segment.pieces);
                Work::Write(pieces.map(|piece| piece.len() as u64).sum())
            }
            Job::Push { len, .. } => {
                clockwork.pushes.push(len);
                Work::Push(len)
            }
            Job::Sync => Work::Sync,
            other => panic!("{other:?}"),
        };
        clockwork.jobs.push_back((id, work));
    }
    fn reap(&mut self) -> Option<Done> {
        let id = self.0.borrow_mut().done.pop_front()?;
        Some(Done {
            id,
            data: None,
            result: Ok(()),
        })
    }
    fn try_now(&self, _: &mut [u8], _: u64) -> bool {
        false
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn has_done(&mut self) -> bool {
        !self.0.borrow().done.is_empty()
    }
}

struct Bench {
    volume: Volume,
    clockwork: Rc<RefCell<Clockwork>>,
    now: Instant,
    tokens: u32,
    ended: Vec<(Token, bool)>,
}

impl Bench {
    fn new(slots: u32) -> Bench {
        let clockwork = Rc::new(RefCell::new(Clockwork::default()));
        let now = Instant::now();
        let arena = Arena::anonymous(4096, slots).unwrap();
        let bounds = Bounds {
            start: 0,
            sectors: BLOCKS * 8,
        };
        let volume = Volume::new(
            now,
            Box::new(Slow(Rc::clone(&clockwork))),
            Cache::new(arena, 1, slots),
            bounds,
            options(false, 1),
        );
        Bench {
            volume,
            clockwork,
            now,
            tokens: 0,
            ended: Vec::new(),
        }
    }

    fn write(&mut self, block: u64, durable: bool) -> (Token, Write) {
        let (extent, data) = (Extent::new(Lba(block * 8), 8).unwrap(), [7; 4096]);
        let token = Token(self.tokens);
        self.tokens += 1;
        let write = self.volume.write(
            self.now,
            || Some(token),
            initiator(1),
            extent,
            &data,
            durable,
        );
        (token, write.unwrap())
    }

    /// Lets time pass, until nothing is due any more or this is true.
    fn pass(&mut self, mut stop: impl FnMut(&Bench) -> bool) {
        for _ in 0..1_000_000 {
            self.clockwork.borrow_mut().run(self.now);
            self.volume.advance(self.now);
            self.clockwork.borrow_mut().run(self.now);
            while let Some(done) = self.volume.next_completed() {
                self.ended.push((done.token, done.ok));
            }
            if stop(self) {
                return;
            }
            if !self.clockwork.borrow().done.is_empty() {
                continue;
            }
            let clockwork = self
                .clockwork
                .borrow()
                .until
                .filter(|_| !self.clockwork.borrow().hangs);
            let next = clockwork.into_iter().chain(self.volume.deadline()).min();
            match next {
                Some(next) => self.now = self.now.max(next),
                None => return,
            }
        }
        panic!("nothing changes any more");
    }
}

#[test]
fn a_durable_write_waits_as_long_as_a_slow_disk_makes_progress() {
    let mut bench = Bench::new(BLOCKS as u32);
    // More than the disk writes in its patience, and one that waits behind it.
    for block in 0..BLOCKS - 1 {
        assert_eq!(bench.write(block, false).1, Write::Done);
    }
    let (token, _) = bench.write(BLOCKS - 1, true);
    let began = bench.now;
    bench.pass(|bench| !bench.ended.is_empty());
    assert_eq!(bench.ended, [(token, true)]);
    assert!(bench.now - began > 2 * bench.volume.options.io_patience);
}

#[test]
fn the_clock_of_a_stop_begins_anew_with_each_slice_that_reached_the_disk() {
    // One slot is never dirty.
    let mut bench = Bench::new(BLOCKS as u32 + 1);
    for block in 0..BLOCKS {
        bench.write(block, false);
    }
    bench.volume.drain();
    let began = bench.now;
    let (mut silent, mut left) = (Duration::ZERO, vec![u64::MAX]);
    bench.pass(|bench| {
        silent = silent.max(bench.now - bench.volume.progress_at());
        left.push(bench.volume.left_bytes());
        bench.volume.is_idle()
    });
    assert!(bench.volume.is_idle());
    assert!(bench.now - began > 2 * bench.volume.options.io_patience);
    assert!(silent < bench.volume.options.io_patience, "{silent:?}");
    assert!(left.is_sorted_by(|a, b| a >= b), "{left:?}");
    let clockwork = bench.clockwork.borrow();
    let pushes = &clockwork.pushes;
    assert!(
        !pushes.is_empty() && pushes.iter().all(|len| *len <= 8 << 20),
        "{pushes:?}"
    );
}

#[test]
fn scattered_blocks_are_pushed_a_few_at_a_time() {
    let mut bench = Bench::new(BLOCKS as u32);
    for block in 0..BLOCKS / 2 {
        bench.write(2 * block, false);
    }
    bench.volume.drain();
    bench.pass(|bench| bench.volume.is_idle() || bench.clockwork.borrow().pushes.len() > 3);
    let clockwork = bench.clockwork.borrow();
    for len in &clockwork.pushes {
        assert!(*len <= 256 * 8192, "{len}");
    }
    assert!(clockwork.pushes.len() > 3);
}

#[test]
fn what_fits_in_one_slice_is_synced_and_not_pushed() {
    let mut bench = Bench::new(64);
    for block in 0..64 {
        bench.write(2 * block, false);
    }
    bench.volume.drain();
    bench.pass(|bench| bench.volume.is_idle());
    assert!(bench.clockwork.borrow().pushes.is_empty());
}

#[test]
fn a_write_that_waits_for_a_disk_that_hangs_ends_with_an_error() {
    let mut bench = Bench::new(64);
    bench.clockwork.borrow_mut().hangs = true;
    let mut tokens = Vec::new();
    for block in 0..70 {
        let (token, write) = bench.write(block, true);
        assert_eq!(write, Write::Parked);
        tokens.push(token);
    }
    assert!(bench.volume.write_bytes.total() > 0);
    let began = bench.now;
    bench.pass(|bench| bench.ended.len() == tokens.len());
    let took = bench.now - began;
    let patience = bench.volume.options.io_patience;
    assert!((patience..2 * patience).contains(&took), "{took:?}");
    assert!(bench.ended.iter().all(|(_, ok)| !ok));
    assert_eq!(
        (bench.volume.write_bytes.total(), bench.volume.writes.len()),
        (0, 0)
    );
    // It goes on: what was taken is written, and new writes are.
    bench.clockwork.borrow_mut().hangs = false;
    bench.ended.clear();
    let (token, _) = bench.write(3, true);
    bench.pass(|bench| !bench.ended.is_empty());
    assert_eq!(bench.ended, [(token, true)]);
}
