//! Locks of open file descriptions, and the process that holds one.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use shadow::lock::request;

pub use shadow::lock::{Lock, is_held, patiently, set};

/// A lock of someone else that is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Kind of the lock.
    pub lock: Lock,
    /// The process, if /proc tells it.
    pub pid: Option<i32>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "{}", Process(pid)),
            None => f.write_str("another process"),
        }
    }
}

/// A process, which shows itself by its number and its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(pub i32);

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Process(pid) = self;
        match fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(command) => write!(f, "process {pid} ({})", command.trim_end()),
            Err(_) => write!(f, "process {pid}"),
        }
    }
}

/// Returns who keeps [`set`] from locking these bytes; `None` if nobody does.
pub fn holder(file: &File, lock: Lock, start: i64, len: i64) -> io::Result<Option<Holder>> {
    let mut answer = request(lock, start, len);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut answer))?;
    let lock = match i32::from(answer.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => Lock::Shared,
        _ => Lock::Exclusive,
    };
    let pid = match answer.l_pid {
        // Of an open file description; only its users can say that it is theirs.
        ..=0 => user_of(file, answer.l_start),
        pid => Some(pid),
    };
    Ok(Some(Holder { lock, pid }))
}

/// The process with a descriptor of this file that carries a lock from `start`
/// on.
fn user_of(file: &File, start: i64) -> Option<i32> {
    let metadata = file.metadata().ok()?;
    let same = |path: &Path| {
        let other = fs::metadata(path);
        other.is_ok_and(|o| (o.dev(), o.ino()) == (metadata.dev(), metadata.ino()))
    };
    let numbered = |entry: &fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = numbered(&process) else {
            continue;
        };
        let list = fs::read_dir(process.path().join("fdinfo"));
        for info in list.into_iter().flatten().flatten() {
            let text = fs::read_to_string(info.path()).unwrap_or_default();
            let mut locks = text.lines().filter_map(LockLine::parse);
            // Only then is the file itself looked at: that of another may hang.
            if locks.any(|lock| lock.inode == metadata.ino() && lock.start == start)
                && same(&process.path().join("fd").join(info.file_name()))
            {
                return Some(pid);
            }
        }
    }
    None
}

/// A line of /proc/PID/fdinfo/FD such as
/// `lock: 1: OFDLCK  ADVISORY  WRITE -1 fe:01:1835 0 EOF`.
struct LockLine {
    inode: u64,
    start: i64,
}

impl LockLine {
    fn parse(line: &str) -> Option<LockLine> {
        let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(5);
        let (file, start) = (words.next()?, words.next()?);
        Some(LockLine {
            inode: file.rsplit(':').next()?.parse().ok()?,
            start: start.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_told_by_its_range_and_kind() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path());
        let (ours, theirs, readers) = (open().unwrap(), open().unwrap(), open().unwrap());
        assert_eq!(holder(&ours, Lock::Exclusive, 0, 0).unwrap(), None);
        set(&theirs, Lock::Exclusive, 512, 512).unwrap();
        set(&readers, Lock::Shared, 4096, 0).unwrap();
        let us = std::process::id() as i32;
        assert_eq!(holder(&ours, Lock::Exclusive, 0, 512).unwrap(), None);
        assert_eq!(holder(&ours, Lock::Shared, 8192, 0).unwrap(), None);
        for (start, lock) in [(0, Lock::Exclusive), (1024, Lock::Shared)] {
            let found = holder(&ours, Lock::Exclusive, start, 0).unwrap().unwrap();
            assert_eq!(
                found,
                Holder {
                    lock,
                    pid: Some(us)
                }
            );
            assert!(set(&ours, Lock::Exclusive, start, 0).is_err());
        }
        let text = holder(&ours, Lock::Shared, 600, 1).unwrap().unwrap();
        let text = text.to_string();
        assert!(text.starts_with(&format!("process {} (", us)), "{text}");
        set(&theirs, Lock::None, 512, 512).unwrap();
        assert_eq!(holder(&ours, Lock::Exclusive, 0, 4096).unwrap(), None);
        assert_eq!(LockLine::parse("pos:\t0").map(|l| l.inode), None);
    }
}
