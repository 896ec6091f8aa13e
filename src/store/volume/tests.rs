use super::*;
use crate::store::{Backing, Inline};
use proptest::prelude::*;
use shadow::{BlockFile, Lba, MemoryFile};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const SECTORS: u64 = 64;
const START: u64 = 1024;

fn extent(start: u64, count: u64) -> Extent {
    Extent::new(Lba(start), count).unwrap()
}

fn memory() -> Arc<MemoryFile> {
    Arc::new(MemoryFile::new(vec![0; (START + SECTORS * 512) as usize]))
}

fn volume(disk: Inline, parked_max: usize) -> Volume {
    Volume::new(
        Box::new(disk),
        Bounds {
            start: START,
            sectors: SECTORS,
        },
        1,
        8 * 512,
        parked_max,
    )
}

/// A disk that ends the jobs under way in an order drawn by lot.
struct Shuffled {
    file: Arc<MemoryFile>,
    jobs: Vec<(JobId, Job)>,
    seed: u64,
}

impl Disk for Shuffled {
    fn submit(&mut self, id: JobId, job: Job) {
        self.jobs.push((id, job));
    }
    fn reap(&mut self) -> Option<Done> {
        self.seed = self
            .seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        // Sometimes nothing has ended yet.
        if self.jobs.is_empty() || self.seed >> 62 == 0 {
            return None;
        }
        let (id, job) = self
            .jobs
            .remove((self.seed >> 33) as usize % self.jobs.len());
        Some(job.run(id, &*self.file))
    }
    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.seed >> 63 == 0 && self.file.read_now(buf, offset)
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn has_done(&self) -> bool {
        !self.jobs.is_empty()
    }
}

proptest! {
    /// Whatever the order in which a disk ends what it has, every read returns
    /// what the writes before it in the order of requests made of the sectors.
    #[test]
    fn requests_act_as_if_done_in_their_order(
        ops in proptest::collection::vec((0u64..SECTORS, 1u64..9, 0u8..8, 1u8..), 1..120),
        seed: u64, durable: bool,
    ) {
        let file = memory();
        let disk = Shuffled { file: Arc::clone(&file), jobs: Vec::new(), seed };
        let bounds = Bounds { start: START, sectors: SECTORS };
        let mut volume = Volume::new(Box::new(disk), bounds, 1, 8 * 512, 1 << 20);
        let mut model = vec![0u8; (SECTORS * 512) as usize];
        let mut expected: Vec<Option<Vec<u8>>> = Vec::new();
        let mut ended = 0;
        let check = |expected: &[Option<Vec<u8>>], done: Completed| {
            assert!(done.ok);
            if let Some(data) = done.data {
                assert_eq!(Some(&data[..]), expected[done.token.0 as usize].as_deref());
            }
        };
        for (start, count, op, fill) in ops {
            let e = extent(start, count.min(SECTORS - start));
            let range = e.byte_start() as usize..(e.byte_start() + e.byte_len()) as usize;
            let token = Token(expected.len() as u32);
            match op {
                0..3 => {
                    expected.push(Some(model[range.clone()].to_vec()));
                    match volume.read(token, e).unwrap() {
                        Read::Ready(data) => {
                            ended += 1;
                            prop_assert_eq!(&data[..], &model[range]);
                        }
                        Read::Parked => {}
                    }
                }
                3..6 => {
                    expected.push(None);
                    volume.write(token, e, &vec![fill; range.len()], durable).unwrap();
                    model[range].fill(fill);
                }
                6 => {
                    expected.push(None);
                    volume.discard(token, &[e], durable).unwrap();
                    model[range].fill(0);
                }
                _ => {
                    expected.push(None);
                    volume.flush(token);
                }
            }
            if fill % 3 == 0 {
                while let Some(done) = volume.next_completed() {
                    ended += 1;
                    check(&expected, done);
                }
            }
        }
        while !volume.is_idle() {
            if let Some(done) = volume.next_completed() {
                ended += 1;
                check(&expected, done);
            }
        }
        prop_assert_eq!(ended, expected.len());
        let bytes = file.bytes();
        prop_assert_eq!(&bytes[START as usize..], &model[..]);
        prop_assert!(bytes[..START as usize].iter().all(|b| *b == 0), "below the window");
    }
}

#[test]
fn what_is_under_way_is_bounded_and_room_comes_back() {
    let mut volume = volume(Inline::slow(memory()), 2048);
    let data = [1; 1024];
    volume.write(Token(0), extent(0, 2), &data, false).unwrap();
    volume.write(Token(1), extent(4, 2), &data, false).unwrap();
    assert_eq!(
        volume.write(Token(2), extent(8, 2), &data, false),
        Err(NoRoom)
    );
    assert!(matches!(volume.read(Token(2), extent(8, 1)), Err(NoRoom)));
    assert_eq!(volume.next_completed().unwrap().token, Token(0));
    volume.write(Token(2), extent(8, 2), &data, false).unwrap();
    for _ in 0..2 {
        assert!(volume.next_completed().unwrap().ok);
    }
    assert!(volume.is_idle());
    // One request larger than the limit still passes when it is alone.
    let small = Inline::slow(memory());
    let mut volume = super::tests::volume(small, 100);
    volume.write(Token(0), extent(0, 2), &data, false).unwrap();
}

/// A memory that counts syncs and can fail.
#[derive(Default)]
struct Faulty {
    file: Option<Arc<MemoryFile>>,
    syncs: AtomicUsize,
    fail: AtomicBool,
}

impl Faulty {
    fn check(&self) -> io::Result<()> {
        if self.fail.load(Ordering::Relaxed) {
            Err(io::Error::other("broken"))
        } else {
            Ok(())
        }
    }
}

impl BlockFile for Faulty {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check()?;
        self.file.as_ref().unwrap().read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check()?;
        self.file.as_ref().unwrap().write_at(data, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.check()
    }
}

impl Backing for Faulty {}

#[test]
fn one_sync_serves_all_that_wait_for_it() {
    let backing = Arc::new(Faulty {
        file: Some(memory()),
        ..Faulty::default()
    });
    let mut volume = volume(Inline::slow(backing.clone()), 1 << 20);
    for n in 0..16 {
        volume
            .write(Token(n), extent(u64::from(n), 1), &[1; 512], true)
            .unwrap();
    }
    let mut ended = Vec::new();
    while !volume.is_idle() {
        ended.extend(volume.next_completed().map(|done| done.token.0));
    }
    ended.sort_unstable();
    assert_eq!(ended, (0..16).collect::<Vec<_>>());
    let syncs = backing.syncs.load(Ordering::Relaxed);
    assert!(syncs <= 3, "{syncs} syncs for 16 writes");
}

#[test]
fn a_flush_that_comes_during_a_sync_waits_for_the_next() {
    let backing = Arc::new(Faulty {
        file: Some(memory()),
        ..Faulty::default()
    });
    let mut volume = volume(Inline::slow(backing.clone()), 1 << 20);
    volume.flush(Token(0));
    volume.flush(Token(1));
    assert_eq!(volume.next_completed().unwrap().token, Token(0));
    assert_eq!(backing.syncs.load(Ordering::Relaxed), 1);
    assert_eq!(volume.next_completed().unwrap().token, Token(1));
    assert_eq!(backing.syncs.load(Ordering::Relaxed), 2);
}

#[test]
fn every_failure_is_reported_and_counted() {
    let backing = Arc::new(Faulty {
        file: Some(memory()),
        ..Faulty::default()
    });
    backing.fail.store(true, Ordering::Relaxed);
    let mut volume = volume(Inline::new(backing.clone()), 1 << 20);
    assert!(matches!(
        volume.read(Token(0), extent(0, 1)),
        Ok(Read::Parked)
    ));
    volume
        .write(Token(1), extent(1, 1), &[0; 512], true)
        .unwrap();
    volume.flush(Token(2));
    volume.verify(Token(3), extent(3, 1)).unwrap();
    for _ in 0..4 {
        assert!(!volume.next_completed().unwrap().ok);
    }
    assert_eq!(
        volume.failures(),
        Failures {
            reads: 2,
            writes: 1,
            syncs: 1
        }
    );
    let error = volume.take_error().unwrap().to_string();
    assert_eq!(error, "reading memory at byte 2560: broken");
}
