//! The engine of threads: each takes a job, does it, and says so.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex};

use super::disk::{Backing, Disk, Done, Job, JobId};

/// What the threads share. Both queues are bounded by the volume, which has
/// only so many jobs under way.
struct Shared {
    backing: Arc<dyn Backing>,
    todo: Mutex<Todo>,
    wake: Condvar,
    done: Mutex<VecDeque<Done>>,
    /// Set before the eventfd is written, so that a loop that spins need not
    /// lock to look.
    has_done: AtomicBool,
    event: Arc<EventFd>,
}

#[derive(Default)]
struct Todo {
    jobs: VecDeque<(JobId, Job)>,
    closed: bool,
}

/// A fixed number of threads around one backing.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    reaped: VecDeque<Done>,
}

impl Pool {
    /// Starts `threads` threads, at least one.
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
            todo: Mutex::new(Todo::default()),
            wake: Condvar::new(),
            done: Mutex::new(VecDeque::new()),
            has_done: AtomicBool::new(false),
            event,
        });
        let mut pool = Pool {
            shared,
            threads: Vec::new(),
            reaped: VecDeque::new(),
        };
        for number in 0..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("disk-{number}"));
            pool.threads.push(builder.spawn(move || work(&shared))?);
        }
        Ok(pool)
    }
}

/// A thread's life: jobs until the pool is closed and none is left.
fn work(shared: &Shared) {
    loop {
        let mut todo = shared.todo.lock();
        let (id, job) = loop {
            match todo.jobs.pop_front() {
                Some(job) => break job,
                None if todo.closed => return,
                None => shared.wake.wait(&mut todo),
            }
        };
        drop(todo);
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
        self.shared.todo.lock().jobs.push_back((id, job));
        self.shared.wake.notify_one();
    }

    fn reap(&mut self) -> Option<Done> {
        if self.reaped.is_empty() && self.has_done() {
            let mut list = self.shared.done.lock();
            self.shared.has_done.store(false, Ordering::Relaxed);
            std::mem::swap(&mut *list, &mut self.reaped);
        }
        self.reaped.pop_front()
    }

    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.shared.backing.read_now(buf, offset)
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
        self.shared.todo.lock().closed = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to finish.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::buffer::Buf;
    use shadow::MemoryFile;

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
}
