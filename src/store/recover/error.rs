//! Why what was left cannot be brought to the image, and the remedy.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::super::arena::ArenaTrouble;

/// Why a start is refused.
#[derive(Debug)]
pub struct RecoverError {
    pub(super) path: PathBuf,
    pub(super) why: RecoverTrouble,
}

/// What stands in the way of bringing an arena to its image.
#[derive(Debug)]
pub enum RecoverTrouble {
    /// The record, or the directory of records, cannot be read.
    Record(String),
    /// The record names it, and it is not there.
    Gone,
    /// It cannot be used.
    Arena(ArenaTrouble),
    /// It belongs to another image.
    OtherImage,
    /// The image is smaller than what it holds.
    Shrunk,
    /// Someone changed the image after the arena's process had died.
    Changed,
    /// Another process serves a part of its window.
    InUse,
    /// The image does not take it.
    Replay(io::Error),
    /// Image and shadow do not take it.
    ReplayFrozen(io::Error),
}

impl fmt::Display for RecoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let give_up = "--discard-arena gives up the writes in it";
        match &self.why {
            RecoverTrouble::Record(what) => write!(f, "arena record {path}: {what}"),
            RecoverTrouble::Gone => write!(
                f,
                "arena {path} is not there, and holds writes that were acknowledged and may not be \
                 on the image; bring it back, or {give_up}"
            ),
            RecoverTrouble::Arena(e) => write!(f, "arena {path}: {e}; {give_up}"),
            RecoverTrouble::OtherImage => {
                write!(
                    f,
                    "arena {path} belongs to another image; name another --run-dir, or {give_up}"
                )
            }
            RecoverTrouble::Shrunk => write!(
                f,
                "arena {path} holds writes past the end of the image, which is smaller now; \
                 restore its size, or {give_up}"
            ),
            RecoverTrouble::Changed => write!(
                f,
                "arena {path}: the image was changed by someone else after the target died, and \
                 the writes in the arena would land over that; {give_up}"
            ),
            RecoverTrouble::InUse => write!(
                f,
                "arena {path}: another process serves a part of its window; stop that one first"
            ),
            RecoverTrouble::Replay(e) => {
                write!(
                    f,
                    "arena {path}: the image does not take what it holds: {e}; it is kept"
                )
            }
            RecoverTrouble::ReplayFrozen(e) => write!(
                f,
                "arena {path}: the image and its shadow do not take what it holds: {e}; it is kept"
            ),
        }
    }
}

impl std::error::Error for RecoverError {}
