//! The file with our process id: never taken from another process, never put in
//! the place of a file that holds anything else.

use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sys::lock::{self, Lock, Process, patiently};
use crate::sys::process::started;

/// The longest content: a process id of 10 digits and a line end.
const CONTENT_MAX: u64 = 11;
/// How much later than a file was written its process may seem to have begun,
/// since clocks are coarse.
const CLOCK_SLACK: Duration = Duration::from_secs(1);

/// A file with our process id, locked as long as we serve.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
    /// The file that the path named when we looked last.
    file: File,
    /// It was made by us.
    is_new: bool,
}

/// Why a pid file cannot be used.
#[derive(Debug)]
pub struct PidFileError {
    path: PathBuf,
    why: Trouble,
}

#[derive(Debug)]
enum Trouble {
    /// A directory, a device, a link.
    NotAFile,
    /// It holds something else than a process id.
    Foreign,
    /// Another process has it; `None` while that one is starting.
    Taken(Option<i32>),
    System(io::Error),
}

impl fmt::Display for PidFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid file {}: ", self.path.display())?;
        match &self.why {
            Trouble::NotAFile => f.write_str("is no regular file; name another --pid-file"),
            Trouble::Foreign => f.write_str(
                "holds something else than a process id, and is left as it is; name another \
                 --pid-file",
            ),
            Trouble::Taken(pid) => {
                match pid {
                    Some(pid) => write!(f, "is that of {}", Process(*pid))?,
                    None => f.write_str("another process that is starting has it")?,
                }
                f.write_str("; stop that one or name another --pid-file")
            }
            Trouble::System(e) => write!(f, "{e}; name another --pid-file"),
        }
    }
}

impl std::error::Error for PidFileError {}

impl From<io::Error> for Trouble {
    fn from(e: io::Error) -> Trouble {
        Trouble::System(e)
    }
}

/// What a file says, read as a pid file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Empty,
    Pid(i32),
    Other,
}

impl Content {
    fn of(mut file: &File) -> io::Result<Content> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.take(CONTENT_MAX + 1).read_to_end(&mut bytes)?;
        let digits = match bytes.split_last() {
            None => return Ok(Content::Empty),
            Some((b'\n', digits)) if digits.iter().all(u8::is_ascii_digit) => digits,
            Some(_) => return Ok(Content::Other),
        };
        let pid = std::str::from_utf8(digits)
            .ok()
            .and_then(|d| d.parse().ok());
        Ok(pid
            .filter(|pid| *pid > 0)
            .map_or(Content::Other, Content::Pid))
    }
}

impl PidFile {
    /// Locks the file, making an empty one if there is none, and leaves what it
    /// says as it is. One that another process has is asked for again for two
    /// seconds.
    pub fn open(path: &Path) -> Result<PidFile, PidFileError> {
        let is_taken = |why: &Trouble| matches!(why, Trouble::Taken(_));
        patiently(|| PidFile::try_open(path), is_taken).map_err(|why| PidFileError {
            path: path.to_owned(),
            why,
        })
    }

    /// The same at once; `Taken` also if the path changed meanwhile.
    fn try_open(path: &Path) -> Result<PidFile, Trouble> {
        let is_new = match fs::symlink_metadata(path) {
            // Looked at first: opening a device or a pipe may do something.
            Ok(metadata) if !metadata.is_file() => return Err(Trouble::NotAFile),
            Ok(_) => false,
            Err(e) if e.kind() == io::ErrorKind::NotFound => true,
            Err(e) => return Err(e.into()),
        };
        let mut how = OpenOptions::new();
        how.read(true).write(true).create_new(is_new);
        // Until it says something it is nobody else's to lock.
        how.mode(0o600);
        how.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = match how.open(path) {
            Ok(file) => file,
            Err(e) => match e.kind() {
                io::ErrorKind::AlreadyExists if is_new => return Err(Trouble::Taken(None)),
                io::ErrorKind::NotFound if !is_new => return Err(Trouble::Taken(None)),
                _ => return Err(e.into()),
            },
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Trouble::NotAFile);
        }
        let content = Content::of(&file)?;
        if content == Content::Other {
            return Err(Trouble::Foreign);
        }
        let pid = match content {
            Content::Pid(pid) => Some(pid),
            _ => None,
        };
        let locked = lock::set(&file, Lock::Exclusive, 0, 0);
        if locked.is_err() {
            match lock::holder(&file, Lock::Exclusive, 0, 0)? {
                // A process that may only read the file can hold such a one,
                // and does not serve.
                Some(holder) if holder.lock == Lock::Shared => {}
                Some(holder) => return Err(Trouble::Taken(pid.or(holder.pid))),
                None => return Err(Trouble::Taken(None)),
            }
        }
        let found = PidFile {
            path: path.to_owned(),
            file,
            is_new,
        };
        if !found.is_at_path() {
            return Err(Trouble::Taken(None));
        }
        // That of a process without such a lock: another program, or 0.1.0.
        let lives = |pid: &i32| {
            let written = metadata.modified().ok();
            let written = written.and_then(|at| at.checked_add(CLOCK_SLACK));
            *pid != own_id() && started(*pid).is_some_and(|at| written.is_none_or(|w| at <= w))
        };
        match pid.filter(lives) {
            Some(pid) => Err(Trouble::Taken(Some(pid))),
            None => Ok(found),
        }
    }

    /// Puts our process id into its place, all or nothing.
    pub fn write(&mut self) -> Result<(), PidFileError> {
        self.try_write().map_err(|why| PidFileError {
            path: self.path.clone(),
            why,
        })
    }

    fn try_write(&mut self) -> Result<(), Trouble> {
        if !self.is_at_path() {
            return Err(Trouble::Taken(None));
        }
        let text = format!("{}\n", own_id());
        let beside = self.path.parent().unwrap_or(Path::new("/"));
        let made = tempfile::Builder::new()
            .prefix(".aoede-pid-")
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(beside);
        match made {
            Ok(mut file) => {
                file.write_all(text.as_bytes())?;
                lock::set(file.as_file(), Lock::Exclusive, 0, 0)?;
                self.file = file.persist(&self.path).map_err(|e| e.error)?;
            }
            // A file of ours in a directory that is not: it is locked, and holds
            // a process id or nothing.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                self.file.set_len(0)?;
                self.file.seek(SeekFrom::Start(0))?;
                self.file.write_all(text.as_bytes())?;
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// `true` if the path still names the file that we have.
    fn is_at_path(&self) -> bool {
        let of = |m: fs::Metadata| (m.dev(), m.ino());
        let there = fs::symlink_metadata(&self.path).map(of);
        there.is_ok_and(|there| self.file.metadata().map(of).is_ok_and(|ours| ours == there))
    }
}

fn own_id() -> i32 {
    std::process::id() as i32
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let content = Content::of(&self.file).unwrap_or(Content::Other);
        let ours = match content {
            Content::Pid(pid) => pid == own_id(),
            Content::Empty => self.is_new,
            Content::Other => false,
        };
        if ours && self.is_at_path() {
            // If another process removed it, nothing is left to do.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    fn refusal(path: &Path) -> String {
        PidFile::open(path).unwrap_err().to_string()
    }

    #[test]
    fn it_is_empty_then_ours_then_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        drop(PidFile::open(&path).unwrap());
        assert!(!path.exists());
        let mut pid_file = PidFile::open(&path).unwrap();
        assert_eq!(text(&path), "");
        pid_file.write().unwrap();
        assert_eq!(text(&path), format!("{}\n", own_id()));
        let mode = fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o444, 0o444, "{mode:o}");
        drop(pid_file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_pid_file_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for content in [
            "x",
            "12",
            "12\n\n",
            "-1\n",
            "0\n",
            "\n",
            " 1\n",
            "99999999999\n",
        ] {
            fs::write(&path, content).unwrap();
            assert!(refusal(&path).contains("something else"), "{content:?}");
            assert_eq!(text(&path), content);
        }
        fs::write(&path, vec![b'1'; 1 << 20]).unwrap();
        assert!(refusal(&path).contains("something else"));
        assert_eq!(text(&path).len(), 1 << 20);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        for path in [&link, dir.path(), Path::new("/dev/null")] {
            assert!(refusal(path).contains("no regular file"), "{path:?}");
        }
        assert!(!dir.path().join("nowhere").exists());
    }

    #[test]
    fn a_stale_one_is_replaced_by_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        for content in [format!("{}\n", child.id()), String::new()] {
            fs::write(&path, &content).unwrap();
            let before = fs::metadata(&path).unwrap().ino();
            // A start that is refused leaves it.
            drop(PidFile::open(&path).unwrap());
            assert_eq!(text(&path), content);
            // A lock that needs no right to write keeps nobody out.
            let reader = File::open(&path).unwrap();
            lock::set(&reader, Lock::Shared, 0, 0).unwrap();
            let mut pid_file = PidFile::open(&path).unwrap();
            pid_file.write().unwrap();
            assert_ne!(fs::metadata(&path).unwrap().ino(), before);
            assert_eq!(text(&path), format!("{}\n", own_id()));
        }
        // Its process began after the file was written: the number is another's.
        fs::write(&path, "1\n").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let before = started(1).unwrap() - Duration::from_secs(60);
        file.set_modified(before).unwrap();
        PidFile::open(&path).unwrap();
    }

    #[test]
    fn that_of_a_process_that_lives_is_refused_with_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        // One without our lock.
        fs::write(&path, "1\n").unwrap();
        let line = refusal(&path);
        assert!(line.contains("process 1 ("), "{line}");
        assert_eq!(text(&path), "1\n");
        fs::remove_file(&path).unwrap();
        // One that is starting, then serving.
        let mut first = PidFile::open(&path).unwrap();
        let us = format!("process {} (", own_id());
        assert!(refusal(&path).contains(&us));
        first.write().unwrap();
        assert!(refusal(&path).contains(&us));
        // One that took the name from us keeps it.
        fs::remove_file(&path).unwrap();
        fs::write(&path, format!("{}\n", own_id())).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
