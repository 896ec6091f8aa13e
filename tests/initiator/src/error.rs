//! What can go wrong on the initiator's side, in words.

use std::fmt;
use std::io;
use std::time::Duration;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Its `Debug` is its `Display`, so that a test that unwraps
/// it prints a sentence.
pub enum Error {
    /// A system call, and what it was for.
    System(String, io::Error),
    /// Nothing came within the time given.
    Timeout(String, Duration),
    /// An answer came, and it was not the one asked for.
    Unexpected(String),
    /// A program ended badly; what it said is part of the text.
    Program(String),
}

impl Error {
    /// Wraps the error of a system call: `map_err(Error::system("bind"))`.
    pub fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
        let what = what.into();
        move |e| Error::System(what, e.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::System(what, e) => write!(f, "{what}: {e}"),
            Error::Timeout(what, after) => write!(f, "{what}: nothing after {after:?}"),
            Error::Unexpected(what) | Error::Program(what) => f.write_str(what),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::System(_, e) => Some(e),
            _ => None,
        }
    }
}
