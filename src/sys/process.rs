//! Leaving the terminal; when another process began.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::time::{Duration, SystemTime};

use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};

/// Units of time in /proc in a second, the same on every Linux of ours.
const USER_HZ: u64 = 100;

/// Returns when a process began; `None` if there is none, or /proc does not tell.
pub fn started(pid: i32) -> Option<SystemTime> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the command, which may hold anything, 20th of the rest (proc(5)).
    let ticks: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split(' ').next()?.parse().ok()?;
    let boot = SystemTime::now().checked_sub(Duration::try_from_secs_f64(uptime).ok()?)?;
    boot.checked_add(Duration::from_millis(ticks.saturating_mul(1000 / USER_HZ)))
}

/// In which of the two processes [`detach`] returned.
#[derive(Debug)]
pub enum Detached {
    /// The one that was started, with what the other said in the end: `Ok`, or
    /// why it could not begin.
    Parent(Result<(), String>),
    /// The one that goes on, in a session of its own.
    Child(Terminal),
}

/// The child's last tie to the terminal: the parent waits for its word.
#[derive(Debug)]
pub struct Terminal(File);

/// Goes on in a child process of a new session; the parent waits for its word.
///
/// To be called while no other thread runs: the child has only this one.
pub fn detach() -> io::Result<Detached> {
    let (read, write) = nix::unistd::pipe()?;
    // SAFETY: the caller has no other thread, so the child's copy of the
    // process is whole.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            drop(write);
            let mut word = String::new();
            let end = File::from(read).read_to_string(&mut word);
            Ok(Detached::Parent(match (end, word.strip_prefix('+')) {
                (Ok(_), Some(_)) => Ok(()),
                (Ok(_), None) if word.is_empty() => Err("it died at once; see its log".into()),
                (Ok(_), None) => Err(word),
                (Err(e), _) => Err(e.to_string()),
            }))
        }
        ForkResult::Child => {
            drop(read);
            setsid()?;
            Ok(Detached::Child(Terminal(File::from(write))))
        }
    }
}

impl Terminal {
    /// Lets go: standard streams to /dev/null, and `result` to the parent, who
    /// says it to the terminal. Goes to the root. Standard error stays if messages go there.
    pub fn release(mut self, result: Result<(), String>, keep_stderr: bool) -> io::Result<()> {
        // Without /dev/null (a bare initramfs) the streams stay.
        if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
            dup2_stdin(&null)?;
            dup2_stdout(&null)?;
            if !keep_stderr || result.is_err() {
                dup2_stderr(&null)?;
            }
        }
        // All paths are absolute; a directory in use could not be unmounted.
        nix::unistd::chdir("/")?;
        match &result {
            Ok(()) => self.0.write_all(b"+"),
            Err(why) => self.0.write_all(why.as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_began_before_now_and_one_that_is_gone_never() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let age = started(pid).unwrap().elapsed().unwrap_or_default();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(age < Duration::from_secs(10), "{age:?}");
        assert!(started(1).unwrap() < SystemTime::now());
        assert_eq!(started(pid), None);
    }
}
