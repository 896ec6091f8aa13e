//! The process around an export: leaving the terminal, the pid file, and the
//! lines it says when it begins.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::config::{LogChoice, Options};
use crate::server::{Export, ServeError};
use crate::sys::process::{Detached, Terminal, detach};
use crate::sys::signals::Signals;

/// Why the process ends with an error.
#[derive(Debug)]
pub enum DaemonError {
    /// The export.
    Serve(ServeError),
    /// The pid file.
    PidFile(PathBuf, io::Error),
    /// A system call, and which.
    System(&'static str, io::Error),
    /// What the detached process said in the end.
    Child(String),
}

impl fmt::Display for DaemonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DaemonError::Serve(e) => write!(f, "{e}"),
            DaemonError::PidFile(path, e) => {
                write!(
                    f,
                    "pid file {}: {e}; name another --pid-file",
                    path.display()
                )
            }
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
    let pid_file = options.pid_file.as_deref().map(PidFile::open).transpose()?;
    let export = Export::open(options)?;
    let signals = Signals::install().map_err(|e| DaemonError::System("signal handlers", e))?;
    if let Some(pid_file) = &pid_file {
        pid_file.write()?;
    }
    let mut out = io::stdout().lock();
    for line in export.describe() {
        // Nobody may be listening; that is no reason not to serve.
        let _ = writeln!(out, "{line}");
    }
    let _ = out.flush();
    Ok((export, signals, pid_file))
}

/// A file with our process id, as long as we serve.
struct PidFile {
    path: PathBuf,
    file: File,
    /// Whether it was not there before.
    is_new: bool,
}

impl PidFile {
    /// Sees that it can be written, and leaves what it says as it is.
    fn open(path: &Path) -> Result<PidFile, DaemonError> {
        let mut how = File::options();
        let how = how.write(true);
        let (file, is_new) = match how.clone().create_new(true).open(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => (how.open(path), false),
            file => (file, true),
        };
        let file = file.map_err(|e| DaemonError::PidFile(path.to_owned(), e))?;
        Ok(PidFile {
            path: path.to_owned(),
            file,
            is_new,
        })
    }

    fn write(&self) -> Result<(), DaemonError> {
        let mut file = &self.file;
        self.file
            .set_len(0)
            .and_then(|()| file.write_all(own_id().as_bytes()))
            .map_err(|e| DaemonError::PidFile(self.path.clone(), e))
    }
}

fn own_id() -> String {
    format!("{}\n", std::process::id())
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Another process may have written itself into it since.
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        if text == own_id() || (self.is_new && text.is_empty()) {
            // Whoever took it away has saved us the work.
            let _ = fs::remove_file(&self.path);
        }
    }
}
