//! Signals as events of a loop.
//!
//! A handler counts and writes one byte into a pipe, no more. Two rules from
//! hard experience are kept here: each handler runs with all our signals
//! blocked, since with an empty mask the kernel runs USR2's handler before a
//! USR1 that is pending too; and USR1 is counted in the handler, since two of
//! them in quick succession would be one in any flag.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{SigSet, Signal};

use super::packet::check;

const OURS: [Signal; 6] = [
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
];
/// Marks the byte that USR2 writes; the rest of it is the count of USR1.
const ORDER: u8 = 0x80;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// TERM, INT or QUIT: stop in order.
    Stop,
    /// HUP: measure the image again.
    Measure,
    /// USR2, after so many USR1 (at most 127).
    Order(u8),
}

/// The handlers, and the end of the pipe that they write to.
#[derive(Debug)]
pub struct Signals(UnixStream);

impl Signals {
    /// Blocks our signals in this thread, and so in all that it starts. To be
    /// called before any other thread exists.
    pub fn block() -> io::Result<()> {
        Ok(ours().thread_block()?)
    }

    /// Installs the handlers and lets this thread alone run them.
    pub fn install() -> io::Result<Signals> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        let write = Arc::new(write);
        let count = Arc::new(AtomicU32::new(0));
        for signal in OURS {
            let (write, count) = (Arc::clone(&write), Arc::clone(&count));
            let handler = move || {
                let byte = match signal {
                    Signal::SIGUSR1 => {
                        count.fetch_add(1, Ordering::Relaxed);
                        return;
                    }
                    Signal::SIGUSR2 => {
                        let count = count.swap(0, Ordering::Relaxed);
                        ORDER | count.min(u32::from(!ORDER)) as u8
                    }
                    other => other as u8,
                };
                // A pipe that is full holds orders enough.
                let _ = (&*write).write(&[byte]);
            };
            // SAFETY: the handler uses an atomic and write(2) on a socket that
            // it keeps open: both are allowed in a signal handler, and neither
            // allocates, locks or panics.
            unsafe { signal_hook::low_level::register(signal as i32, handler) }?;
            mask_all(signal)?;
        }
        ours().thread_unblock()?;
        Ok(Signals(read))
    }

    /// The next event, if one waits.
    pub fn next(&self) -> Option<Event> {
        let mut byte = [0];
        match (&self.0).read(&mut byte) {
            Ok(1) if byte[0] & ORDER != 0 => Some(Event::Order(byte[0] & !ORDER)),
            Ok(1) if byte[0] == Signal::SIGHUP as u8 => Some(Event::Measure),
            Ok(1) => Some(Event::Stop),
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn ours() -> SigSet {
    OURS.into_iter().collect()
}

/// Adds all our signals to the mask under which this one's handler runs.
fn mask_all(signal: Signal) -> io::Result<()> {
    // SAFETY: sigaction is numbers and a function pointer that may be null.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: reads the present action into ours.
    check(unsafe { libc::sigaction(signal as i32, std::ptr::null(), &mut action) })?;
    for other in OURS {
        // SAFETY: changes a set that lives in `action`.
        check(unsafe { libc::sigaddset(&mut action.sa_mask, other as i32) })?;
    }
    // SAFETY: the action is the one installed, with a wider mask.
    check(unsafe { libc::sigaction(signal as i32, &action, std::ptr::null_mut()) }).map(drop)
}
