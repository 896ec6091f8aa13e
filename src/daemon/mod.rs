//! The process around an export: leaving the terminal, the pid file, and the
//! lines it says when it begins.

mod pid_file;

use std::fmt;
use std::io::{self, Write};

use crate::config::{LogChoice, Options};
use crate::server::{Export, ServeError};
use crate::sys::process::{Detached, Terminal, detach};
use crate::sys::signals::Signals;
use pid_file::PidFile;

pub use pid_file::PidFileError;

/// Why the process ends with an error.
#[derive(Debug)]
pub enum DaemonError {
    /// The export.
    Serve(ServeError),
    /// The pid file.
    PidFile(PidFileError),
    /// A system call, and which.
    System(&'static str, io::Error),
    /// What the detached process said in the end.
    Child(String),
}

impl fmt::Display for DaemonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DaemonError::Serve(e) => write!(f, "{e}"),
            DaemonError::PidFile(e) => write!(f, "{e}"),
            DaemonError::System(what, e) => write!(f, "{what}: {e}"),
            DaemonError::Child(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for DaemonError {}

impl From<ServeError> for DaemonError {
    fn from(e: ServeError) -> DaemonError {
        DaemonError::Serve(e)
    }
}

impl From<PidFileError> for DaemonError {
    fn from(e: PidFileError) -> DaemonError {
        DaemonError::PidFile(e)
    }
}

/// Leaves the terminal: `None` in the process that was started and is done now,
/// the tie to it in the one that goes on.
pub fn leave_terminal() -> Result<Option<Terminal>, DaemonError> {
    match detach().map_err(|e| DaemonError::System("detaching", e))? {
        Detached::Child(terminal) => Ok(Some(terminal)),
        Detached::Parent(Ok(())) => Ok(None),
        Detached::Parent(Err(text)) => Err(DaemonError::Child(text)),
    }
}

/// Opens the export, says so, and serves until told to stop. With a terminal to
/// let go of, an error before that goes there.
pub fn run(options: &Options, terminal: Option<Terminal>) -> Result<(), DaemonError> {
    let begun = begin(options);
    let to_stderr = matches!(options.log, Some(LogChoice::Stderr | LogChoice::Journal));
    let (mut export, signals, _pid_file) = match (begun, terminal) {
        (Ok(begun), None) => begun,
        (Ok(begun), Some(terminal)) => {
            terminal
                .release(Ok(()), to_stderr)
                .map_err(|e| DaemonError::System("detaching", e))?;
            begun
        }
        (Err(e), None) => return Err(e),
        (Err(e), Some(terminal)) => {
            let said = terminal.release(Err(e.to_string()), to_stderr);
            return said
                .map_err(|e| DaemonError::System("detaching", e))
                .and(Err(e));
        }
    };
    let result = export.run(&signals);
    if result.is_err() {
        // Its threads may hang in the disk; letting it go would wait for them,
        // and the end of the process does not.
        std::mem::forget(export);
    }
    Ok(result?)
}

fn begin(options: &Options) -> Result<(Export, Signals, Option<PidFile>), DaemonError> {
    // Before the export, which may make an image: all that can be refused is
    // refused first.
    let mut pid_file = options.pid_file.as_deref().map(PidFile::open).transpose()?;
    let export = Export::open(options)?;
    let signals = Signals::install().map_err(|e| DaemonError::System("signal handlers", e))?;
    if let Some(pid_file) = &mut pid_file {
        pid_file.write()?;
    }
    log::info!("{}", export.introduce(options));
    let mut out = io::stdout().lock();
    for line in export.describe() {
        // Nobody may be listening; that is no reason not to serve.
        let _ = writeln!(out, "{line}");
    }
    let _ = out.flush();
    Ok((export, signals, pid_file))
}
