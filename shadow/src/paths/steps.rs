//! The steps of a shadow from one name to the next, and what is on stable storage
//! between them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::{Paths, ShadowFile, make_marker, read_marker, remove_marker, rename, sync_directory};

/// The names in the directory of a shadow. A seam: the tests put one there that
/// loses its power.
pub(super) trait Names {
    /// Returns `true` if this is a name of the shadow.
    fn is_shadow(&self, path: &Path) -> io::Result<bool>;
    /// Returns the uuid that a marker of this name has.
    fn marker(&self, path: &Path) -> io::Result<Option<[u8; 16]>>;
    /// Makes a marker, unless it is there; replaces nothing else.
    fn make_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()>;
    /// Exchanges two names; `false` if the filesystem cannot.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<bool>;
    /// Renames and syncs; replaces nothing.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a name.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Brings the names to stable storage.
    fn sync(&self, path: &Path) -> io::Result<()>;

    /// Removes the marker of a shadow, and nothing else.
    fn remove_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
        match self.marker(path)? {
            Some(found) if found == *uuid => self.remove(path),
            _ => Ok(()),
        }
    }
}

/// The names of a shadow on this machine.
pub(super) struct Real<'a>(pub &'a ShadowFile);

impl Names for Real<'_> {
    fn is_shadow(&self, path: &Path) -> io::Result<bool> {
        let metadata = self.0.metadata()?;
        match fs::symlink_metadata(path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (metadata.dev(), metadata.ino())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn marker(&self, path: &Path) -> io::Result<Option<[u8; 16]>> {
        read_marker(path)
    }

    fn make_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
        make_marker(path, uuid)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<bool> {
        match renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::EINVAL | Errno::ENOSYS) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        sync_directory(path)
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Gives a shadow whose image is quiesced its name: PATH. The directory is
/// synced.
pub fn appear(paths: &Paths, file: &ShadowFile) -> io::Result<()> {
    let names = Real(file);
    settle(&names, paths)?;
    if names.is_shadow(&paths.new)? {
        names.rename(&paths.new, &paths.shadow)
    } else {
        names.sync(&paths.shadow)
    }
}

/// Leaves a shadow one name, where a link that replaced a rename was cut off.
/// The name of the earlier phase stays: nothing was done for the later one yet.
fn settle(names: &impl Names, paths: &Paths) -> io::Result<()> {
    for (stays, goes) in [
        (&paths.shadow, &paths.new),
        (&paths.shadow, &paths.thaw),
        (&paths.shadow, &paths.cut),
        (&paths.thaw, &paths.cut),
    ] {
        if names.is_shadow(stays)? && names.is_shadow(goes)? {
            names.remove(goes)?;
        }
    }
    Ok(())
}

/// Makes PATH another inode, before the image changes again: the shadow becomes
/// `PATH.thaw`, and PATH its marker. The directory is synced. A shadow that never
/// was PATH keeps its name.
///
/// May be repeated after an error, and after a crash at any point. Returns why
/// PATH is not the marker, if that could not be: the image may change all the
/// same, since PATH is not the shadow any more.
pub fn begin_thaw(
    paths: &Paths,
    file: &ShadowFile,
    uuid: &[u8; 16],
) -> io::Result<Option<io::Error>> {
    begin_thaw_among(&Real(file), paths, uuid)
}

pub(super) fn begin_thaw_among(
    names: &impl Names,
    paths: &Paths,
    uuid: &[u8; 16],
) -> io::Result<Option<io::Error>> {
    settle(names, paths)?;
    if names.is_shadow(&paths.shadow)? {
        let exchanged = match names.make_marker(&paths.thaw, uuid) {
            Ok(()) => names.exchange(&paths.shadow, &paths.thaw)?,
            // A thaw must not wait for room. The name alone will do.
            Err(e) if is_full(&e) => false,
            Err(e) => return Err(at(&paths.thaw, e)),
        };
        if !exchanged {
            // Killed before the rename it is frozen as before; behind it, the
            // name alone says that it is to be merged.
            names.remove_marker(&paths.thaw, uuid)?;
            names
                .rename(&paths.shadow, &paths.thaw)
                .map_err(|e| at(&paths.thaw, e))?;
        }
    } else if names.is_shadow(&paths.cut)? {
        names.remove_marker(&paths.thaw, uuid)?;
        names
            .rename(&paths.cut, &paths.thaw)
            .map_err(|e| at(&paths.thaw, e))?;
    }
    let mut unmarked = None;
    if names.is_shadow(&paths.thaw)? {
        match names.make_marker(&paths.shadow, uuid) {
            Ok(()) => {}
            // Someone else's file, which stays.
            Err(e) if is_full(&e) || e.kind() == io::ErrorKind::AlreadyExists => {
                unmarked = Some(e);
            }
            Err(e) => return Err(at(&paths.shadow, e)),
        }
    }
    if !crate::fault!("thaw-names-not-synced") {
        names.sync(&paths.shadow)?;
    }
    Ok(unmarked)
}

fn at(path: &Path, e: io::Error) -> io::Error {
    let remedy = match e.kind() {
        io::ErrorKind::AlreadyExists => "; move away what has that name",
        _ => "",
    };
    io::Error::new(e.kind(), format!("{}: {e}{remedy}", path.display()))
}

/// Removes what [`create`](super::create) has made, as far as that can be: after
/// an error, which is the one to tell.
pub fn abandon(paths: &Paths, uuid: &[u8; 16]) {
    let _ = remove_marker(&paths.thaw, uuid);
    let _ = fs::remove_file(&paths.new);
    let _ = sync_directory(&paths.new);
}

/// Removes a shadow and its marker; what else has their names stays.
///
/// The marker goes first, on stable storage: a shadow without one is merged to
/// its end, and is empty; a marker without a shadow would stop every start.
pub fn vanish(paths: &Paths, file: &ShadowFile, uuid: &[u8; 16]) -> io::Result<()> {
    vanish_among(&Real(file), paths, uuid)
}

pub(super) fn vanish_among(names: &impl Names, paths: &Paths, uuid: &[u8; 16]) -> io::Result<()> {
    for path in [&paths.shadow, &paths.thaw] {
        names.remove_marker(path, uuid)?;
    }
    if !crate::fault!("shadow-goes-before-its-marker") {
        names.sync(&paths.shadow)?;
    }
    for path in [&paths.shadow, &paths.new, &paths.thaw, &paths.cut] {
        if names.is_shadow(path)? {
            names.remove(path)?;
        }
    }
    names.sync(&paths.shadow)
}

#[cfg(test)]
mod tests;
