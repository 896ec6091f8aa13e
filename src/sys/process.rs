//! Leaving the terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};

use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};

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
