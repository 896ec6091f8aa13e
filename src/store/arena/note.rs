//! The note of a freeze: an arena tells which shadow has writes to its image, so that
//! nobody takes what was written since the freeze for the image's own, also when the
//! record of the shadow is lost.
//!
//! ```text
//! word 32  uuid of the shadow, 2 words; zeros for none
//!      34  its path, 240 bytes with zeros behind; zeros only for a longer one
//! ```

use std::ffi::OsStr;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where the note begins in an arena, and its parts.
pub(super) const NOTE: usize = 32 * 8;
const UUID: usize = 16;
const PATH: usize = 240;
pub(super) const NOTE_LEN: usize = UUID + PATH;

/// Names the shadow of a frozen image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ShadowNote {
    /// The shadow's own number.
    pub uuid: [u8; UUID],
    path: [u8; PATH],
}

impl ShadowNote {
    /// The note of this shadow.
    pub fn new(uuid: [u8; UUID], path: &Path) -> ShadowNote {
        let mut note = ShadowNote {
            uuid,
            path: [0; PATH],
        };
        let bytes = path.as_os_str().as_bytes();
        if let Some(there) = note.path.get_mut(..bytes.len()) {
            there.copy_from_slice(bytes);
        }
        note
    }

    /// The note that is in these bytes.
    pub(super) fn of(bytes: &[u8; NOTE_LEN]) -> Option<ShadowNote> {
        let (uuid, path) = bytes.split_first_chunk::<UUID>()?;
        let path = *path.first_chunk::<PATH>()?;
        let note = ShadowNote { uuid: *uuid, path };
        (*uuid != [0; UUID]).then_some(note)
    }

    /// The path of the shadow, if it was not too long.
    pub fn path(&self) -> Option<PathBuf> {
        let len = self.path.iter().position(|byte| *byte == 0);
        let path = &self.path[..len.unwrap_or(PATH)];
        (!path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)))
    }
}

impl fmt::Debug for ShadowNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShadowNote({:x?}, {:?})", self.uuid, self.path())
    }
}

/// The place of the note in the arena of a process.
#[derive(Debug)]
pub struct NotePlace(File);

impl NotePlace {
    /// Opens an arena of ours.
    pub fn open(arena: &Path) -> io::Result<NotePlace> {
        let mut how = OpenOptions::new();
        how.write(true).custom_flags(libc::O_NOFOLLOW);
        Ok(NotePlace(how.open(arena)?))
    }

    /// Notes which shadow there is. Killed in between, there is none yet.
    pub fn set(&self, note: &ShadowNote) -> io::Result<()> {
        self.0.write_all_at(&note.path, (NOTE + UUID) as u64)?;
        self.0.write_all_at(&note.uuid, NOTE as u64)
    }

    /// Notes that there is none any more.
    pub fn clear(&self) -> io::Result<()> {
        self.0.write_all_at(&[0; UUID], NOTE as u64)
    }
}
