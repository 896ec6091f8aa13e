//! The stamp of an image: what the kernel said of the file when an aoede last
//! looked. A file that says something else now was changed by someone else.
//!
//! An arena keeps two stamps, each of four words, little endian:
//!
//! ```text
//! word 22  mtime, ns     as the arena's own process saw them
//!      23  ctime, ns
//!      24  bytes
//!      25  time of the look, ns since the boot; 0 for never
//!      26  the same four, as someone told it who changed the image and has
//!          no arena of it any more
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::libc;
use nix::time::{ClockId, clock_gettime};

use crate::lock::{Lock, lock_patiently};

/// What an arena's file begins with.
pub const ARENA_MAGIC: u64 = u64::from_le_bytes(*b"AOEDEARN");
/// The version of an arena with stamps. Version 1, of aoede 0.1.0, has only the
/// heartbeat.
pub const ARENA_VERSION: u64 = 2;
/// The word of an arena of version 1 with its heartbeat: real time, ns.
pub const V1_HEARTBEAT: usize = 11;
/// The first word of the arena's own stamp.
pub const OWN: usize = 22;
/// The first word of the stamp that others have told.
pub const TOLD: usize = 26;

/// What the kernel says of an image that is a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Last change of the content, in nanoseconds since 1970.
    pub mtime: u64,
    /// Last change of content or of what the kernel keeps about it.
    pub ctime: u64,
    /// Its bytes.
    pub size: u64,
    /// When this was asked, in nanoseconds since the boot: a clock that nobody
    /// sets. 0 for never.
    pub looked: u64,
}

impl Stamp {
    /// Asks the kernel; `None` of a device, which keeps no such times.
    pub fn of(file: &File) -> io::Result<Option<Stamp>> {
        // Before the answer, so that of two stamps the one with the later look
        // never is the older answer.
        let looked = since_boot()?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(None);
        }
        Ok(Some(Stamp {
            mtime: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            ctime: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            size: metadata.len(),
            looked,
        }))
    }

    /// The words, in their order.
    pub fn to_words(self) -> [u64; 4] {
        [self.mtime, self.ctime, self.size, self.looked]
    }

    /// The stamp that these words are.
    pub fn from_words([mtime, ctime, size, looked]: [u64; 4]) -> Stamp {
        Stamp {
            mtime,
            ctime,
            size,
            looked,
        }
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> u64 {
    // Before 1970, and after 2554: only equality matters, and wraps the same way.
    (seconds as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(rest as u64)
}

/// Nanoseconds since the boot: a clock that nobody sets.
pub fn since_boot() -> io::Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
    Ok(nanoseconds(time.tv_sec(), time.tv_nsec()))
}

/// The real-time clock in nanoseconds, by which files are stamped.
pub fn real_time() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds by which the real-time clock may move against the time since the
/// boot without having been set.
const CLOCK_STEP: u64 = 500_000_000;
/// Both clocks count as read together if no more nanoseconds passed meanwhile.
const CLOCKS_APART: u64 = 10_000_000;
/// How often they are read before that is given up.
const CLOCK_READS: usize = 5;

/// The real-time clock, and how it was set at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// Real time in nanoseconds.
    pub real: u64,
    /// Real time less the time since the boot: changes only when the clock is set.
    /// 0 for unknown.
    pub offset: u64,
}

impl Clocks {
    /// Reads both clocks.
    pub fn now() -> Clocks {
        for _ in 0..CLOCK_READS {
            let Ok(before) = since_boot() else { break };
            let real = real_time();
            let Ok(after) = since_boot() else { break };
            if after - before <= CLOCKS_APART {
                let offset = real.wrapping_sub(before);
                return Clocks { real, offset };
            }
        }
        Clocks {
            real: real_time(),
            offset: 0,
        }
    }

    /// The same, of a real time that was read just now.
    pub fn at(real: u64) -> Clocks {
        let offset = since_boot().map_or(0, |since| real.wrapping_sub(since));
        Clocks { real, offset }
    }

    /// `true` if the clock was not set between the moment of this offset and now.
    pub fn is_as_at(&self, offset: u64) -> bool {
        let is_known = self.offset != 0 && offset != 0;
        is_known && self.offset.abs_diff(offset) <= CLOCK_STEP
    }
}

/// Tells an arena of the same image that we have changed the image, and how it
/// looks now. The target that recovers the arena will not take our change for a
/// foreign one.
///
/// Several may tell it at once: the file is locked meanwhile (not with the `flock`
/// of its own process), and the later look stays. Fails where the file is no arena
/// (`InvalidData`), or stays locked (`WouldBlock`).
pub fn tell(arena: &Path, stamp: &Stamp) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(arena)?;
    if !lock_patiently(&file, Lock::Exclusive)? {
        return Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "another process holds a lock on it",
        ));
    }
    let word = |index: usize| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, index as u64 * 8)?;
        io::Result::Ok(u64::from_le_bytes(bytes))
    };
    let (magic, version) = (word(0)?, word(1)? & 0xFFFF_FFFF);
    let put =
        |index: usize, value: u64| file.write_all_at(&u64::to_le_bytes(value), index as u64 * 8);
    match (magic, version) {
        (ARENA_MAGIC, ARENA_VERSION) => {
            let last = TOLD + stamp.to_words().len() - 1;
            if word(last)? > stamp.looked {
                return Ok(());
            }
            for (index, value) in stamp.to_words().into_iter().enumerate() {
                put(TOLD + index, value)?;
            }
            Ok(())
        }
        (ARENA_MAGIC, 1) => put(V1_HEARTBEAT, word(V1_HEARTBEAT)?.max(real_time())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_a_stamp_and_each_change_another() {
        let mut file = tempfile::tempfile().unwrap();
        let first = Stamp::of(&file).unwrap().unwrap();
        assert!(first.looked > 0 && first.size == 0);
        io::Write::write_all(&mut file, b"12345").unwrap();
        let time = UNIX_EPOCH + std::time::Duration::new(1000, 5);
        file.set_modified(time).unwrap();
        let next = Stamp::of(&file).unwrap().unwrap();
        assert_eq!((next.mtime, next.size), (1_000_000_000_005, 5));
        assert!(next.looked >= first.looked && next.ctime >= first.ctime);
        assert_eq!(Stamp::from_words(next.to_words()), next);
        let none = Stamp::of(&File::open("/dev/null").unwrap()).unwrap();
        assert_eq!(none, None);
    }

    #[test]
    fn of_two_who_tell_an_arena_at_once_the_later_look_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("arena");
        let mut bytes = vec![0; 4096];
        bytes[..8].copy_from_slice(&ARENA_MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&ARENA_VERSION.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let told = || {
            let bytes = std::fs::read(&path).unwrap();
            let words: Vec<u64> = bytes[TOLD * 8..][..32]
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect();
            words
        };
        // All four words of one of them, in any order of arrival.
        std::thread::scope(|scope| {
            for n in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    for looked in (1..200).filter(|looked| looked % 4 == n) {
                        tell(path, &Stamp::from_words([looked; 4])).unwrap();
                    }
                });
            }
        });
        assert_eq!(told(), [199; 4]);
        tell(&path, &Stamp::from_words([7; 4])).unwrap();
        assert_eq!(told(), [199; 4]);
        // Its own process, which has the flock, is not in the way.
        let file = File::open(&path).unwrap();
        let _ours = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
        tell(&path, &Stamp::from_words([200; 4])).unwrap();
        assert_eq!(told(), [200; 4]);
        // Nobody waits for ever.
        let stuck = File::options().read(true).write(true).open(&path).unwrap();
        assert!(lock_patiently(&stuck, Lock::Exclusive).unwrap());
        let error = tell(&path, &Stamp::from_words([201; 4])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn an_arena_is_told_and_another_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("arena");
        let stamp = Stamp::from_words([1, 2, 3, 4]);
        let file = |version: u64| {
            let mut bytes = vec![0; 4096];
            bytes[..8].copy_from_slice(&ARENA_MAGIC.to_le_bytes());
            bytes[8..16].copy_from_slice(&version.to_le_bytes());
            bytes
        };
        std::fs::write(&path, file(ARENA_VERSION | 4096 << 32)).unwrap();
        tell(&path, &stamp).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let word = |bytes: &[u8], index: usize| {
            u64::from_le_bytes(bytes[index * 8..][..8].try_into().unwrap())
        };
        let told = [0, 1, 2, 3].map(|n| word(&bytes, TOLD + n));
        assert_eq!(told, [1, 2, 3, 4]);
        assert!(bytes[16..TOLD * 8].iter().all(|byte| *byte == 0));
        std::fs::write(&path, file(1)).unwrap();
        let before = real_time();
        tell(&path, &stamp).unwrap();
        assert!(word(&std::fs::read(&path).unwrap(), V1_HEARTBEAT) >= before);
        for other in [file(3), vec![7; 4096], vec![1]] {
            std::fs::write(&path, &other).unwrap();
            assert!(tell(&path, &stamp).is_err());
            assert_eq!(std::fs::read(&path).unwrap(), other);
        }
    }
}
