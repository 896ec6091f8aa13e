//! Locks of open file descriptions, and how long one that is held is asked for.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// How long a lock that a process holds is asked for again, as after a restart:
/// io_uring may keep a dead process's file open for a moment.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(20);

/// Kinds of lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Several may hold it; needs only a file open for reading.
    Shared,
    /// One holds it; needs a file open for writing.
    Exclusive,
    /// Gives the bytes up.
    None,
}

/// Locks bytes of a file without waiting; a length of 0 is to the end, wherever
/// that will be. The lock belongs to the open file description and goes with it.
pub fn set(file: &File, lock: Lock, start: i64, len: i64) -> io::Result<()> {
    let request = request(lock, start, len);
    Ok(fcntl(file, FcntlArg::F_OFD_SETLK(&request)).map(drop)?)
}

/// Returns what the kernel is asked for with such a lock.
pub fn request(lock: Lock, start: i64, len: i64) -> libc::flock {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
        Lock::None => libc::F_UNLCK,
    };
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// `true` if [`set`] failed because another process holds such a lock.
pub fn is_held(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Does something again for two seconds while it fails because a process holds what
/// it needs.
pub fn patiently<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    is_held: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(e) if is_held(&e) && Instant::now() < deadline => std::thread::sleep(RETRY),
            result => return result,
        }
    }
}

/// Locks a file as a whole; `false` if another process holds it for longer than we
/// wait.
pub(crate) fn lock_patiently(file: &File, lock: Lock) -> io::Result<bool> {
    is_ours(patiently(|| set(file, lock, 0, 0), is_held))
}

/// The same without waiting.
pub(crate) fn lock_now(file: &File, lock: Lock) -> io::Result<bool> {
    is_ours(set(file, lock, 0, 0))
}

fn is_ours(locked: io::Result<()>) -> io::Result<bool> {
    match locked {
        Err(e) if is_held(&e) => Ok(false),
        locked => locked.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_asked_for_again_and_what_fails_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path());
        let (ours, theirs) = (open().unwrap(), open().unwrap());
        set(&theirs, Lock::Exclusive, 0, 0).unwrap();
        let mut attempts = 0;
        let attempt = || {
            attempts += 1;
            if attempts == 3 {
                set(&theirs, Lock::None, 0, 0).unwrap();
            }
            set(&ours, Lock::Exclusive, 0, 0)
        };
        patiently(attempt, is_held).unwrap();
        assert_eq!(attempts, 3);
        let start = Instant::now();
        let attempt = || Err::<(), _>(io::Error::from_raw_os_error(libc::EIO));
        patiently(attempt, is_held).unwrap_err();
        assert!(start.elapsed() < PATIENCE);
    }
}
