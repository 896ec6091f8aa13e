//! Locks of a whole file, of its open file description.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// How long a lock that someone still holds is asked for again: io_uring may
/// keep a dead target's file open for a moment.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(20);

/// Kinds of lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Several may hold it.
    Shared,
    /// One holds it.
    Exclusive,
}

/// Locks a file; `false` if someone else holds it for longer than we wait.
pub(crate) fn lock_patiently(file: &File, lock: Lock) -> io::Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    while !lock_now(file, lock)? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(RETRY);
    }
    Ok(true)
}

/// Locks a file; `false` if someone else holds it.
pub(crate) fn lock_now(file: &File, lock: Lock) -> io::Result<bool> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
