//! A program under test: what it says, how it ends.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};

use super::namespace::Namespace;
use super::wait::{Deadline, wait_until};
use crate::error::{Error, Result};

/// How long what a process said last may take to be read after its end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A program to be started.
#[derive(Debug)]
pub struct Spawn {
    command: Command,
    name: String,
    namespace: Option<Namespace>,
    core: Option<usize>,
}

impl Spawn {
    /// This program, found by PATH.
    pub fn new(program: impl AsRef<OsStr>) -> Spawn {
        let name = program.as_ref().to_string_lossy().into_owned();
        Spawn {
            command: Command::new(program),
            name,
            namespace: None,
            core: None,
        }
    }

    /// With this argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Spawn {
        self.command.arg(argument);
        self
    }

    /// With these arguments.
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Spawn {
        self.command.args(arguments.into_iter().map(Into::into));
        self
    }

    /// With this in its environment.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Spawn {
        self.command.env(key, value);
        self
    }

    /// In this directory.
    pub fn dir(mut self, directory: impl AsRef<std::path::Path>) -> Spawn {
        self.command.current_dir(directory);
        self
    }

    /// In this network namespace. Its other namespaces, and so /sys, are ours.
    pub fn inside(mut self, namespace: &Namespace) -> Spawn {
        self.namespace = Some(namespace.clone());
        self
    }

    /// On this processor alone.
    pub fn on_core(mut self, core: usize) -> Spawn {
        self.core = Some(core);
        self
    }

    /// Starts it; standard input is empty.
    pub fn start(self) -> Result<Process> {
        let Spawn {
            mut command,
            name,
            namespace,
            core,
        } = self;
        // One pipe for both, so that lines stay in the order they were said in.
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("pipe"))?;
        let twin = writer.try_clone().map_err(Error::system("pipe"))?;
        command.stdin(Stdio::null()).stdout(writer).stderr(twin);
        // A child inherits namespace and processors of the thread that starts
        // it, so a thread that ends right after lends it both.
        let spawn = || -> Result<Child> {
            if let Some(core) = core {
                pin(Pid::from_raw(0), core)?;
            }
            command.spawn().map_err(Error::system(name.clone()))
        };
        let child = match &namespace {
            Some(namespace) => namespace.enter(spawn)??,
            None => thread::scope(|scope| scope.spawn(spawn).join())
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
        };
        // Our own ends for writing: with them the pipe would never end.
        drop(command);
        let said = Arc::new(Said::default());
        let listener = Arc::clone(&said);
        thread::spawn(move || listener.listen(File::from(reader)));
        Ok(Process {
            child,
            name,
            said,
            read: 0,
            _namespace: namespace,
        })
    }
}

/// What a process has said so far, standard output and error in one.
#[derive(Default)]
struct Said {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    all: Vec<String>,
    /// Whether all that had the pipe are gone.
    ended: bool,
}

impl Said {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, pipe: File) {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while matches!(pipe.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches('\n').to_owned();
            self.lock().all.push(text);
            self.changed.notify_all();
            line.clear();
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until `found` finds something, the pipe is at its end, or the
    /// deadline has passed.
    fn wait<T>(&self, deadline: Deadline, mut found: impl FnMut(&Lines) -> Option<T>) -> Option<T> {
        let mut lines = self.lock();
        loop {
            if let Some(value) = found(&lines) {
                return Some(value);
            }
            let left = deadline.left();
            if lines.ended || left.is_zero() {
                return None;
            }
            lines = self
                .changed
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A started program. Dropping it kills it and waits for its end.
pub struct Process {
    child: Child,
    name: String,
    said: Arc<Said>,
    /// Lines that [`wait_for_line`](Process::wait_for_line) has gone past.
    read: usize,
    /// Not taken away while the process is in it.
    _namespace: Option<Namespace>,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said so far, standard output and error in one.
    pub fn output(&self) -> Vec<String> {
        self.said.lock().all.clone()
    }

    /// Waits for a line that contains `pattern`, behind the one found last.
    pub fn wait_for_line(&mut self, pattern: &str, deadline: Deadline) -> Result<String> {
        let from = self.read;
        let found = self.said.wait(deadline, |lines| {
            let at = lines.all[from..].iter().position(|l| l.contains(pattern))?;
            Some((from + at, lines.all[from + at].clone()))
        });
        match found {
            Some((at, line)) => {
                self.read = at + 1;
                Ok(line)
            }
            None => Err(self.told(format!("{} never said '{pattern}'", self.name))),
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32);
        kill(pid, signal).map_err(Error::system(format!("{signal} to {}", self.name)))
    }

    /// How it ended, if it has.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .map_err(Error::system(self.name.clone()))
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Deadline) -> Result<ExitStatus> {
        let mut ended = None;
        let what = format!("{} to end", self.name);
        let waited = wait_until(&what, deadline, || {
            ended = self.exit_status().transpose();
            ended.is_some()
        });
        match ended {
            Some(status) => {
                // What it said at the very end is still on its way.
                self.said.wait::<()>(Deadline::after(LAST_WORDS), |_| None);
                status
            }
            None => Err(waited
                .err()
                .map_or_else(|| self.told(what), |e| self.told(e.to_string()))),
        }
    }

    /// Ends it with TERM and says how it ended; at the deadline with KILL, and
    /// that is an error.
    pub fn stop(&mut self, deadline: Deadline) -> Result<ExitStatus> {
        if let Some(status) = self.exit_status()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        if let Ok(status) = self.wait(deadline) {
            return Ok(status);
        }
        let what = format!("{} had to be killed: TERM did not end it", self.name);
        self.kill()?;
        Err(self.told(what))
    }

    /// Ends it with KILL and waits for that.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        let ended = self.child.kill().and_then(|()| self.child.wait());
        ended.map_err(Error::system(format!("killing {}", self.name)))
    }

    /// Processor time it has used so far, all threads together.
    pub fn cpu_time(&self) -> Result<Duration> {
        let tasks = format!("/proc/{}/task", self.child.id());
        let mut nanoseconds = 0;
        let entries = std::fs::read_dir(&tasks).map_err(Error::system(tasks))?;
        for entry in entries.flatten() {
            // A thread may end between being listed and being read.
            let text = std::fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
            let used = text.split_whitespace().next().map(str::parse::<u64>);
            nanoseconds += used.and_then(std::result::Result::ok).unwrap_or(0);
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// An error with the process's last lines behind it.
    fn told(&self, what: String) -> Error {
        let lines = self.output();
        let last = &lines[lines.len().saturating_sub(20)..];
        Error::Program(format!("{what}; it said:\n  {}", last.join("\n  ")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Nothing better can be done with an error here.
            let _ = self.kill();
        }
    }
}

/// Whether a process ended by this signal.
pub fn ended_by(status: ExitStatus, signal: Signal) -> bool {
    status.signal() == Some(signal as i32)
}

/// Binds a thread or process (0 is the calling thread) to one processor.
pub fn pin(pid: Pid, core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)
        .and_then(|()| sched_setaffinity(pid, &set))
        .map_err(Error::system(format!("binding to processor {core}")))
}
