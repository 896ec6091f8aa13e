//! What wakes the loop: one epoll set.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::net::Port;
use crate::sys::link::LinkWatch;
use crate::sys::signals::Signals;

const SIGNALS: u64 = u64::MAX;
const LINKS: u64 = u64::MAX - 1;
const DISK: u64 = u64::MAX - 2;
/// Events taken at once; what is left is reported the next time.
const EVENTS: usize = 16;

/// What woke the loop. Frames and finished disk work are not named: the loop
/// looks at both in every turn anyway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Woken {
    /// A signal came.
    pub signals: bool,
    /// A link changed, or a socket has an error, which means the same.
    pub links: bool,
}

/// The epoll set.
pub(super) struct Wait {
    epoll: Epoll,
    /// Of each NIC, whether its socket is watched for room to write.
    writable: Vec<bool>,
    /// What else its socket is watched for.
    frames: EpollFlags,
}

impl Wait {
    pub fn new(links: &LinkWatch, disk: Option<BorrowedFd>) -> io::Result<Wait> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(links, EpollEvent::new(EpollFlags::EPOLLIN, LINKS))?;
        if let Some(disk) = disk {
            // Each write to it is an edge; nobody has to read it.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(disk, EpollEvent::new(flags, DISK))?;
        }
        Ok(Wait {
            epoll,
            writable: Vec::new(),
            frames: EpollFlags::EPOLLIN,
        })
    }

    pub fn watch_signals(&self, signals: &Signals) -> io::Result<()> {
        Ok(self
            .epoll
            .add(signals, EpollEvent::new(EpollFlags::EPOLLIN, SIGNALS))?)
    }

    /// Watches a port that was opened; one closed before is forgotten by the
    /// kernel.
    pub fn watch_port(&mut self, index: usize, port: &Port) -> io::Result<()> {
        if self.writable.len() <= index {
            self.writable.resize(index + 1, false);
        }
        self.writable[index] = false;
        Ok(self
            .epoll
            .add(port, EpollEvent::new(self.frames, index as u64))?)
    }

    /// From now on frames do not wake the loop: nobody takes them any more, and
    /// those that stay would wake it again and again.
    pub fn ignore_frames<'a>(&mut self, ports: impl Iterator<Item = (usize, &'a Port)>) {
        self.frames = EpollFlags::empty();
        for (index, port) in ports {
            let has = self.writable.get(index).copied().unwrap_or(false);
            self.want_writable(index, port, !has);
            self.want_writable(index, port, has);
        }
    }

    /// Wakes or does not wake when the port can be written.
    pub fn want_writable(&mut self, index: usize, port: &Port, want: bool) {
        let Some(has) = self.writable.get_mut(index).filter(|has| **has != want) else {
            return;
        };
        let flags = if want {
            self.frames | EpollFlags::EPOLLOUT
        } else {
            self.frames
        };
        if self
            .epoll
            .modify(port, &mut EpollEvent::new(flags, index as u64))
            .is_ok()
        {
            *has = want;
        }
    }

    /// Sleeps until something happens, or for `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Woken> {
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            // Rounded up: a wait that ends too early would be begun again.
            Some(time) => {
                let millis = time.as_nanos().div_ceil(1_000_000);
                EpollTimeout::try_from(millis.min(i32::MAX as u128) as i32)
                    .unwrap_or(EpollTimeout::MAX)
            }
        };
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(nix::Error::EINTR) => return Ok(Woken::default()),
            Err(errno) => return Err(errno.into()),
        };
        let mut woken = Woken::default();
        for event in &events[..count] {
            match event.data() {
                SIGNALS => woken.signals = true,
                LINKS => woken.links = true,
                DISK => {}
                _ => {
                    woken.links |= event
                        .events()
                        .intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP)
                }
            }
        }
        Ok(woken)
    }
}
