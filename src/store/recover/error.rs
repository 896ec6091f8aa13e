//! Why what was left cannot be brought to the image, and the remedy.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::super::arena::ArenaTrouble;
use super::super::run_dir::RunDirError;

/// Why a start is refused.
#[derive(Debug)]
pub struct RecoverError {
    pub(super) path: PathBuf,
    pub(super) why: RecoverTrouble,
}

/// What stands in the way of bringing an arena to its image.
#[derive(Debug)]
pub enum RecoverTrouble {
    /// The run directory must not be trusted.
    RunDir(RunDirError),
    /// The record, or the directory of records, cannot be read.
    Record(String),
    /// The record names it, and it is not there.
    Gone,
    /// It cannot be used.
    Arena(ArenaTrouble),
    /// It belongs to another image.
    OtherImage,
    /// It may belong to this image, or others may; both sides in words.
    Doubt {
        /// Of each arena its path, why that is not certain, and the image that it is
        /// of.
        then: Vec<String>,
        /// Arenas that are certainly of this image.
        others: Vec<PathBuf>,
        /// The image that is to be served.
        now: String,
    },
    /// The image is smaller than what it holds.
    Shrunk,
    /// Someone changed the image after the arena's process had died.
    Changed,
    /// The image was frozen, and its shadow, which was here, was not given.
    Frozen(Option<PathBuf>),
    /// The process that it is of lives, or another one serves a part of its
    /// exported range.
    InUse,
    /// The image is open for reading only.
    ReadOnly,
    /// The image does not take it.
    Replay(io::Error),
    /// Image and shadow do not take it.
    ReplayFrozen(io::Error),
    /// The image does not take so many sectors.
    TooManyBad(u64),
    /// The image does not take some of its sectors, and no new arena can be made to
    /// keep them; why.
    NoArena(String),
    /// What was written to the image before this start does not reach the disk.
    Unsynced(io::Error),
    /// Nothing in it is needed any more, and it cannot be removed.
    Remove(io::Error),
}

/// What `--discard-arena` does about an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Discarded {
    /// It is no remedy.
    Not,
    /// It cannot be used, and is removed.
    Removed,
    /// It could be used; it is kept under another name.
    SetAside,
}

impl RecoverTrouble {
    /// Returns what `--discard-arena` does about it.
    pub(super) fn discarded(&self) -> Discarded {
        match self {
            RecoverTrouble::Gone | RecoverTrouble::Arena(_) => Discarded::Removed,
            RecoverTrouble::OtherImage
            | RecoverTrouble::Doubt { .. }
            | RecoverTrouble::Shrunk
            | RecoverTrouble::Changed
            | RecoverTrouble::ReadOnly
            | RecoverTrouble::Replay(_)
            | RecoverTrouble::ReplayFrozen(_)
            | RecoverTrouble::TooManyBad(_) => Discarded::SetAside,
            RecoverTrouble::RunDir(_)
            | RecoverTrouble::Record(_)
            | RecoverTrouble::Frozen(_)
            | RecoverTrouble::InUse
            | RecoverTrouble::NoArena(_)
            | RecoverTrouble::Unsynced(_)
            | RecoverTrouble::Remove(_) => Discarded::Not,
        }
    }
}

impl fmt::Display for RecoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let discard = "--discard-arena discards the writes in it";
        let aside = "--discard-arena sets it aside and starts without its writes";
        match &self.why {
            RecoverTrouble::RunDir(e) => write!(f, "{e}"),
            RecoverTrouble::Record(what) => write!(f, "arena record {path}: {what}"),
            RecoverTrouble::Gone => write!(
                f,
                "arena {path} is not there, and holds writes that were acknowledged and may not be \
                 on the image; bring it back, or {discard}"
            ),
            RecoverTrouble::Arena(e) => write!(f, "arena {path}: {e}; {discard}"),
            RecoverTrouble::OtherImage => {
                write!(
                    f,
                    "arena {path} belongs to another image; name another --run-dir, or {aside}"
                )
            }
            RecoverTrouble::Doubt { then, others, now } => {
                write!(
                    f,
                    "arena {path} holds acknowledged writes, and it is not certain that they belong \
                     to this image: "
                )?;
                match &then[..] {
                    [one] if others.is_empty() => {
                        let why = one.strip_prefix(&format!("{path}: ")).unwrap_or(one);
                        write!(
                            f,
                            "{why}; this is {now}; --replay-arena says that it is the right image, \
                             {aside}"
                        )
                    }
                    all => {
                        for one in all {
                            write!(f, "{one}; ")?;
                        }
                        for other in others {
                            write!(f, "{} is certainly of this image; ", other.display())?;
                        }
                        write!(
                            f,
                            "this is {now}; --replay-arena=PATH names the one of this image, \
                             --discard-arena=PATH sets one aside and starts without its writes"
                        )
                    }
                }
            }
            RecoverTrouble::Shrunk => write!(
                f,
                "arena {path} holds writes past the end of the image, which is smaller now; \
                 restore its size, or {aside}"
            ),
            RecoverTrouble::Changed => write!(
                f,
                "arena {path}: the image was changed by someone else after the target died (or the \
                 clock was set, so that this is not certain), and \
                 the writes in the arena would land over that; --replay-arena says that the image \
                 is the right one, {aside}"
            ),
            RecoverTrouble::Frozen(shadow) => {
                let shadow = match shadow {
                    Some(shadow) => shadow.display().to_string(),
                    None => "PATH".into(),
                };
                write!(
                    f,
                    "arena {path}: the image is frozen, and what was written since is in shadow \
                     {shadow}; start with -f {shadow}; -f {shadow} --discard-shadow discards those \
                     writes"
                )
            }
            RecoverTrouble::InUse => write!(
                f,
                "arena {path}: another process serves a part of its exported range; stop that one first"
            ),
            RecoverTrouble::ReadOnly => write!(
                f,
                "arena {path}: the image does not take what it holds: it is open read-only; start \
                 it once without -r; it is kept; {aside}"
            ),
            RecoverTrouble::Replay(e) => {
                write!(
                    f,
                    "arena {path}: the image does not take what it holds: {e}; it is kept; {aside}"
                )
            }
            RecoverTrouble::ReplayFrozen(e) if e.kind() == io::ErrorKind::StorageFull => write!(
                f,
                "arena {path}: image or shadow do not take what it holds: {e}; it is kept; make \
                 space on their filesystems, and start again; or {aside}"
            ),
            RecoverTrouble::ReplayFrozen(e) => write!(
                f,
                "arena {path}: image or shadow do not take what it holds: {e}; it is kept; replace \
                 the disk; {aside}"
            ),
            RecoverTrouble::TooManyBad(sectors) => write!(
                f,
                "arena {path}: the image does not take {sectors} of its sectors, which is more than \
                 the cache may hold back; it is kept; replace the disk; {aside}"
            ),
            RecoverTrouble::NoArena(why) => write!(
                f,
                "arena {path}: the image does not take some of its sectors, which only an arena can \
                 keep: {why}; make room for one, or name another --run-dir"
            ),
            RecoverTrouble::Unsynced(e) => write!(
                f,
                "image {path}: what was written to it before this start cannot be brought to \
                 the disk: {e}; acknowledged writes of a target without an arena may be lost; \
                 check the disk, and start again to serve what it holds (with -r, if it takes no \
                 writes)"
            ),
            RecoverTrouble::Remove(e) => write!(
                f,
                "arena {path}: nothing in it is needed any more, and removing it fails: {e}; remove \
                 it and its record"
            ),
        }
    }
}

impl std::error::Error for RecoverError {}
