//! The engine of threads: each takes a job, does it, and says so.
//!
//! Jobs that make data durable (write-back, discards, syncs, steps of a freeze,
//! state saves) have a lane of their own, with its own threads. Reads of any
//! number and length never stand before them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex};
use shadow::stamp::Stamp;

use super::disk::{Backing, Disk, Done, Job, JobId};

/// What the threads share. Both queues are bounded by the volume, which has
/// only so many jobs under way.
struct Shared {
    backing: Arc<dyn Backing>,
    reads: Lane,
    writes: Lane,
    done: Mutex<VecDeque<Done>>,
    /// Set before the eventfd is written, so that a loop that spins need not
    /// lock to look.
    has_done: AtomicBool,
    event: Arc<EventFd>,
}

/// Jobs in their order, and what wakes the threads that do them.
#[derive(Default)]
struct Lane {
    todo: Mutex<Todo>,
    wake: Condvar,
}

#[derive(Default)]
struct Todo {
    jobs: VecDeque<(JobId, Job)>,
    closed: bool,
}

impl Shared {
    fn lane(&self, writes: bool) -> &Lane {
        if writes { &self.writes } else { &self.reads }
    }
}

impl Lane {
    fn submit(&self, id: JobId, job: Job) {
        self.todo.lock().jobs.push_back((id, job));
        self.wake.notify_one();
    }

    /// Returns the next job, or `None` once the lane is closed and empty.
    fn next(&self) -> Option<(JobId, Job)> {
        let mut todo = self.todo.lock();
        loop {
            match todo.jobs.pop_front() {
                Some(job) => return Some(job),
                None if todo.closed => return None,
                None => self.wake.wait(&mut todo),
            }
        }
    }

    fn close(&self) {
        self.todo.lock().closed = true;
        self.wake.notify_all();
    }
}

/// A fixed number of threads in each lane, around one backing.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    reaped: VecDeque<Done>,
}

impl Pool {
    /// Starts `threads` threads in each lane, at least one.
    pub fn start(backing: Arc<dyn Backing>, threads: usize) -> io::Result<Pool> {
        Pool::start_with(backing, threads, Arc::new(Pool::event()?))
    }

    /// What an engine writes when jobs have ended. It is watched for edges, so
    /// it is never read.
    pub fn event() -> io::Result<EventFd> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(EventFd::from_value_and_flags(0, flags)?)
    }

    /// Starts threads that write this event, which others may write too.
    pub fn start_with(
        backing: Arc<dyn Backing>,
        threads: usize,
        event: Arc<EventFd>,
    ) -> io::Result<Pool> {
        let shared = Arc::new(Shared {
            backing,
            reads: Lane::default(),
            writes: Lane::default(),
            done: Mutex::new(VecDeque::new()),
            has_done: AtomicBool::new(false),
            event,
        });
        let mut pool = Pool {
            shared,
            threads: Vec::new(),
            reaped: VecDeque::new(),
        };
        for (writes, name) in [(false, "read"), (true, "write")] {
            for number in 0..threads.max(1) {
                let shared = Arc::clone(&pool.shared);
                let builder = std::thread::Builder::new().name(format!("{name}-{number}"));
                pool.threads
                    .push(builder.spawn(move || work(&shared, writes))?);
            }
        }
        Ok(pool)
    }
}

/// Does a lane's jobs until it is closed and empty.
fn work(shared: &Shared, writes: bool) {
    while let Some((id, job)) = shared.lane(writes).next() {
        let done = job.run(id, &*shared.backing);
        let mut list = shared.done.lock();
        let first = list.is_empty();
        list.push_back(done);
        shared.has_done.store(true, Ordering::Release);
        if first {
            // Fails only when the counter is full: never in our time.
            let _ = shared.event.write(1);
        }
    }
}

impl Disk for Pool {
    fn submit(&mut self, id: JobId, job: Job) {
        self.shared.lane(!job.is_read()).submit(id, job);
    }

    fn reap(&mut self) -> Option<Done> {
        if self.reaped.is_empty() && self.has_done() {
            let mut list = self.shared.done.lock();
            self.shared.has_done.store(false, Ordering::Relaxed);
            std::mem::swap(&mut *list, &mut self.reaped);
        }
        self.reaped.pop_front()
    }

    fn stamp(&self) -> Option<Stamp> {
        self.shared.backing.stamp()
    }

    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.shared.backing.read_now(buf, offset)
    }

    fn is_cached(&self, offset: u64, len: u64) -> bool {
        self.shared.backing.is_cached(offset, len)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.event.as_fd())
    }

    fn has_done(&mut self) -> bool {
        !self.reaped.is_empty() || self.shared.has_done.load(Ordering::Acquire)
    }
}

impl Drop for Pool {
    /// Lets the threads finish what was submitted, and waits for them.
    fn drop(&mut self) {
        self.shared.reads.close();
        self.shared.writes.close();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to finish.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::{Part, Step};
    use crate::store::state::StateFile;
    use crate::sys::buffer::Buf;
    use shadow::{BlockFile, MemoryFile};
    use std::time::{Duration, Instant};

    #[test]
    fn every_job_comes_back_once() {
        let file = Arc::new(MemoryFile::new(vec![5; 4096]));
        let mut pool = Pool::start(file, 3).unwrap();
        for id in 0..200 {
            let job = match id % 3 {
                0 => Job::Sync,
                1 => Job::Read {
                    at: 0,
                    len: 512,
                    buf: Buf::new(512).unwrap(),
                },
                _ => Job::Read {
                    at: 4000,
                    len: 512,
                    buf: Buf::new(512).unwrap(),
                },
            };
            pool.submit(JobId(id), job);
        }
        let mut seen = [false; 200];
        while seen.contains(&false) {
            let Some(done) = pool.reap() else {
                std::thread::yield_now();
                continue;
            };
            let id = done.id.0 as usize;
            assert!(!std::mem::replace(&mut seen[id], true));
            assert_eq!(done.result.is_ok(), id % 3 != 2);
            if id % 3 == 1 {
                assert_eq!(&*done.data.unwrap(), &[5; 512]);
            }
        }
    }

    /// A file whose reads hang until they are let go.
    struct Hanging {
        file: MemoryFile,
        open: Mutex<bool>,
        wake: Condvar,
    }

    impl BlockFile for Hanging {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let mut open = self.open.lock();
            while !*open {
                self.wake.wait(&mut open);
            }
            self.file.read_at(buf, offset)
        }
        fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            self.file.write_at(data, offset)
        }
        fn sync(&self) -> io::Result<()> {
            self.file.sync()
        }
    }

    impl Backing for Hanging {
        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.file.discard(offset, len)
        }
        fn prefetch(&self, offset: u64, len: u64) {
            let _ = self.read_at(&mut vec![0; len as usize], offset);
        }
        fn gather(&self, _: &[Part], buf: &mut [u8]) -> io::Result<()> {
            self.read_at(buf, 0)
        }
        fn step(&self, _: &Step) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn reads_that_hang_keep_no_write_sync_or_save_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let file = Arc::new(Hanging {
            file: MemoryFile::new(vec![5; 4096]),
            open: Mutex::new(false),
            wake: Condvar::new(),
        });
        let backing: Arc<dyn Backing> = Arc::<Hanging>::clone(&file);
        let mut pool = Pool::start(backing, 2).unwrap();
        let read = |n: u64| match n % 4 {
            0 => Job::Verify { at: 0, len: 512 },
            1 => Job::Prefetch { at: 0, len: 512 },
            2 => Job::Read {
                at: 0,
                len: 512,
                buf: Buf::new(512).unwrap(),
            },
            _ => Job::Gather {
                parts: Vec::new(),
                buf: Buf::new(512).unwrap(),
            },
        };
        for id in 0..100 {
            pool.submit(JobId(id), read(id));
        }
        let state = StateFile::new(dir.path(), "1.1", &dir.path().join("disk"));
        let writes = [
            Job::Write(Vec::new()),
            Job::Discard(vec![(0, 512)]),
            Job::Sync,
            Job::Commit {
                data_first: true,
                pages: Vec::new(),
            },
            Job::Step(Step::Appear),
            Job::Save {
                file: Arc::new(state),
                text: "state".into(),
            },
        ];
        for (id, job) in (100..).zip(writes) {
            pool.submit(JobId(id), job);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut ended = Vec::new();
        while ended.len() < 6 {
            assert!(Instant::now() < deadline, "only {ended:?} have ended");
            let Some(done) = pool.reap() else {
                std::thread::yield_now();
                continue;
            };
            assert!(done.result.is_ok(), "{done:?}");
            ended.push(done.id.0);
        }
        ended.sort_unstable();
        assert_eq!(ended, [100, 101, 102, 103, 104, 105]);
        *file.open.lock() = true;
        file.wake.notify_all();
    }
}
