//! The engine on a ring whose operations end as the test says.

use super::*;
use shadow::{BlockFile, MemoryFile};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};

const LEN: usize = 16 * 512;

/// An image in memory that counts the syncs.
struct Counted {
    file: MemoryFile,
    syncs: AtomicU32,
}

impl BlockFile for Counted {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(data, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Backing for Counted {
    fn align(&self) -> usize {
        512
    }
}

/// Ends each operation as told, having done as much of it.
struct Script {
    image: Arc<Counted>,
    /// Bytes, or an errno, of the operations to come.
    results: VecDeque<Result<usize, i32>>,
    ended: VecDeque<Ended>,
    /// `true` if it takes no operation.
    full: bool,
}

impl Script {
    fn end(&mut self, id: u64, mut held: Held, offset: u64, len: usize) -> Result<(), Held> {
        if self.full {
            return Err(held);
        }
        let result = self.results.pop_front().unwrap_or(Ok(len));
        if let Ok(done) = result {
            match &mut held {
                Held::Read(buf) => self.image.read_at(&mut buf[..done], offset).unwrap(),
                Held::Write(pieces) => {
                    let bytes: Vec<u8> = pieces.iter().flat_map(|p| p.to_vec()).collect();
                    self.image.write_at(&bytes[..done], offset).unwrap();
                }
                Held::Sync => self.image.sync().unwrap(),
            }
        }
        let result = result.map_err(io::Error::from_raw_os_error);
        self.ended.push_back(Ended { id, held, result });
        Ok(())
    }
}

impl Ring for Script {
    fn read(&mut self, id: u64, buf: Buf, len: usize, offset: u64) -> Result<(), Held> {
        self.end(id, Held::Read(buf), offset, len)
    }
    fn write(&mut self, id: u64, pieces: Vec<Body>, offset: u64) -> Result<(), Held> {
        let len = pieces.iter().map(|piece| piece.len()).sum();
        self.end(id, Held::Write(pieces), offset, len)
    }
    fn sync(&mut self, id: u64) -> Result<(), Held> {
        self.end(id, Held::Sync, 0, 0)
    }
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn has_ended(&mut self) -> bool {
        !self.ended.is_empty()
    }
    fn reap(&mut self) -> Option<Ended> {
        self.ended.pop_front()
    }
}

/// An engine whose operations end so, and its image.
fn engine(result: Option<Result<usize, i32>>) -> (UringDisk<Script>, Arc<Counted>) {
    let image = Arc::new(Counted {
        file: MemoryFile::new((0..LEN).map(|n| (n / 512 + 1) as u8).collect()),
        syncs: AtomicU32::new(0),
    });
    let ring = Script {
        image: Arc::clone(&image),
        results: result.into_iter().collect(),
        ended: VecDeque::new(),
        full: false,
    };
    let event = Arc::new(Pool::event().unwrap());
    let backing: Arc<dyn Backing> = Arc::<Counted>::clone(&image);
    (UringDisk::with(ring, backing, true, event).unwrap(), image)
}

/// Does one job to its end.
fn done(disk: &mut UringDisk<Script>, job: Job) -> Done {
    disk.submit(JobId(7), job);
    disk.kick();
    let begun = std::time::Instant::now();
    loop {
        if let Some(done) = disk.reap() {
            assert_eq!(done.id, JobId(7));
            assert!(disk.reap().is_none(), "it ends once");
            return done;
        }
        assert!(begun.elapsed().as_secs() < 30, "it never ends");
        std::thread::yield_now();
    }
}

const AGAIN: [i32; 2] = [libc::EAGAIN, libc::EINTR];

/// Three pieces, of 1, 2 and 1 sectors.
fn write() -> (Job, Vec<u8>) {
    let pieces = [vec![0xA1; 512], vec![0xA2; 1024], vec![0xA3; 512]];
    let bytes = pieces.concat();
    let pieces = pieces.into_iter().map(Body::Bytes).collect();
    (Job::Write(vec![Segment { at: 1024, pieces }]), bytes)
}

#[test]
fn a_write_that_ends_in_part_is_written_whole() {
    let short = [0, 1, 511, 512, 700, 1536, 2047].map(Ok);
    let again = AGAIN.map(Err);
    for result in short.into_iter().chain(again).chain([Ok(2048)]) {
        let (mut disk, image) = engine(Some(result));
        let (job, bytes) = write();
        assert!(done(&mut disk, job).result.is_ok(), "{result:?}");
        assert_eq!(image.file.bytes()[1024..3072], bytes, "{result:?}");
    }
}

#[test]
fn a_read_that_ends_in_part_is_read_whole() {
    let short = [0, 511, 512, 1024].map(Ok);
    let again = AGAIN.map(Err);
    for result in short.into_iter().chain(again).chain([Ok(1536)]) {
        let (mut disk, _) = engine(Some(result));
        let buf = Buf::new(LEN).unwrap();
        // Not on a block's boundary: what is around it is read as well.
        let (at, len) = (600, 1000);
        let end = done(&mut disk, Job::Read { at, len, buf });
        assert!(end.result.is_ok(), "{result:?}");
        let expected: Vec<u8> = (600..1600).map(|n| (n / 512 + 1) as u8).collect();
        assert_eq!(*end.data.unwrap(), expected[..], "{result:?}");
    }
}

#[test]
fn an_error_is_told_with_its_place() {
    let buf = Buf::new(LEN).unwrap();
    let read = Job::Read {
        at: 512,
        len: 512,
        buf,
    };
    let cases = [
        (read, JobKind::Read, Some(512)),
        (Job::Sync, JobKind::Sync, None),
    ];
    for (job, kind, offset) in cases {
        let (mut disk, image) = engine(Some(Err(libc::EIO)));
        let before = image.file.bytes();
        let error = done(&mut disk, job).result.unwrap_err();
        assert_eq!((error.kind, error.offset), (kind, offset));
        assert_eq!(error.source.raw_os_error(), Some(libc::EIO));
        assert_eq!(image.file.bytes(), before);
        assert_eq!(image.syncs.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn a_write_that_failed_is_tried_in_parts_by_a_thread() {
    let (write, data) = write();
    let (mut disk, image) = engine(Some(Err(libc::EIO)));
    assert!(done(&mut disk, write).result.is_ok());
    assert_eq!(image.file.bytes()[1024..][..data.len()], data);
}

#[test]
fn a_sync_that_the_kernel_did_not_begin_is_done_all_the_same() {
    for errno in AGAIN {
        let (mut disk, image) = engine(Some(Err(errno)));
        assert!(done(&mut disk, Job::Sync).result.is_ok());
        assert_eq!(image.syncs.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn a_ring_without_room_leaves_the_work_to_a_thread() {
    let (write, bytes) = write();
    let buf = Buf::new(LEN).unwrap();
    for job in [
        write,
        Job::Read {
            at: 0,
            len: 512,
            buf,
        },
        Job::Sync,
    ] {
        let (is_write, is_read) = (
            matches!(job, Job::Write(_)),
            matches!(job, Job::Read { .. }),
        );
        let (mut disk, image) = engine(None);
        disk.ring.full = true;
        let end = done(&mut disk, job);
        assert!(end.result.is_ok());
        assert!(!is_read || *end.data.unwrap() == [1; 512]);
        assert!(!is_write || image.file.bytes()[1024..3072] == bytes);
        let syncs = u32::from(!is_write && !is_read);
        assert_eq!(image.syncs.load(Ordering::Relaxed), syncs);
    }
}
