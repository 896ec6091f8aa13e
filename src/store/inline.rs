//! The engine that does each job at once, on the caller's thread: for tests
//! and trials, where the order of things must be the same every time.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::disk::{Backing, Disk, Done, Job, JobId};

/// Jobs done in `submit`, handed out by `reap`; or held until told to go on.
pub struct Inline {
    backing: Arc<dyn Backing>,
    held: Option<VecDeque<(JobId, Job)>>,
    done: VecDeque<Done>,
}

impl Inline {
    /// An engine that does jobs at once.
    pub fn new(backing: Arc<dyn Backing>) -> Inline {
        Inline {
            backing,
            held: None,
            done: VecDeque::new(),
        }
    }

    /// An engine that does one job each time it is reaped, as a slow disk
    /// would, and answers no read from memory.
    pub fn slow(backing: Arc<dyn Backing>) -> Inline {
        Inline {
            backing,
            held: Some(VecDeque::new()),
            done: VecDeque::new(),
        }
    }
}

impl Disk for Inline {
    fn submit(&mut self, id: JobId, job: Job) {
        match &mut self.held {
            Some(held) => held.push_back((id, job)),
            None => self.done.push_back(job.run(id, &*self.backing)),
        }
    }

    fn reap(&mut self) -> Option<Done> {
        if let Some((id, job)) = self.held.as_mut().and_then(VecDeque::pop_front) {
            self.done.push_back(job.run(id, &*self.backing));
        }
        self.done.pop_front()
    }

    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.held.is_none() && self.backing.read_now(buf, offset)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn has_done(&mut self) -> bool {
        !self.done.is_empty() || self.held.as_ref().is_some_and(|held| !held.is_empty())
    }
}
