//! The marker: a small file that stands for a shadow under its other name.
//!
//! A freeze makes it as `PATH.thaw`, while there is room for it. A thaw
//! exchanges the two, so that from then on PATH is another inode, and the shadow
//! is `PATH.thaw`.
//!
//! ```text
//! marker, 64 bytes, little endian
//!          0  "AOEDETHW"
//!          8  u32  version: 1
//!         12       zeros
//!         16       uuid of the shadow, 16 bytes
//!         32       zeros
//!         56  u64  CRC-64/XZ of the bytes 0 to 56
//! ```

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::libc;

use super::{Paths, ShadowFile, for_making, name, rename, sync_directory, unnamed};
use crate::format::CRC;

const MAGIC: &[u8; 8] = b"AOEDETHW";
const VERSION: u32 = 1;
const LEN: usize = 64;
const SUM: usize = 56;

/// Bytes of the marker of a shadow.
fn bytes(uuid: &[u8; 16]) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..32].copy_from_slice(uuid);
    let sum = CRC.checksum(&bytes[..SUM]);
    bytes[SUM..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Returns the uuid of the shadow that a marker stands for; `None` if the path
/// is anything but a marker.
pub fn read_marker(path: &Path) -> io::Result<Option<[u8; 16]>> {
    // Looked at before it is opened: opening something else may wait, or do
    // something.
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() == LEN as u64 => {}
        Ok(_) => return Ok(None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    }
    let mut how = OpenOptions::new();
    how.read(true).custom_flags(libc::O_NOFOLLOW);
    let mut file = match how.open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut found = [0; LEN];
    match file.read_exact(&mut found) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let uuid = found[16..].first_chunk::<16>();
    Ok(uuid.copied().filter(|uuid| found == bytes(uuid)))
}

/// Makes the marker of a shadow, unless it is there. Its content is on stable
/// storage then, its name with the next sync of the directory.
///
/// Whatever else has that name is left alone: `AlreadyExists`.
pub fn make_marker(path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
    match read_marker(path)? {
        Some(found) if found == *uuid => return Ok(()),
        Some(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        None => {}
    }
    let fill = |mut file: &File| {
        file.write_all(&bytes(uuid))?;
        file.sync_all()
    };
    if let Some(file) = unnamed(path) {
        fill(&file)?;
        match name(&file, path) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(e),
            // It cannot be named later: then at once.
            Err(_) => {}
        }
    }
    // Under a name of its own first: who dies before the end leaves no half
    // marker under a name that means something.
    let mut beside = OsString::from(path);
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    let file = for_making().create_new(true).open(&beside)?;
    let made = fill(&file).and_then(|()| rename(&beside, path));
    made.inspect_err(|_| {
        // The first error is the one to tell.
        let _ = fs::remove_file(&beside);
    })
}

/// Removes the marker of a shadow, and nothing else.
pub fn remove_marker(path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
    match read_marker(path)? {
        Some(found) if found == *uuid => fs::remove_file(path),
        _ => Ok(()),
    }
}

/// `true` if this is a name of the file.
fn is_at(file: &ShadowFile, path: &Path) -> io::Result<bool> {
    let metadata = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (metadata.dev(), metadata.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Exchanges two names; `false` if the filesystem cannot.
pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<bool> {
    match renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::EINVAL | Errno::ENOSYS) => Ok(false),
        Err(e) => Err(e.into()),
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
    settle(paths, file)?;
    if is_at(file, &paths.new)? {
        rename(&paths.new, &paths.shadow)
    } else {
        sync_directory(&paths.shadow)
    }
}

/// Leaves a shadow one name, where a link that replaced a rename was cut off.
/// The name of the earlier phase stays: nothing was done for the later one yet.
fn settle(paths: &Paths, file: &ShadowFile) -> io::Result<()> {
    for (stays, goes) in [
        (&paths.shadow, &paths.new),
        (&paths.shadow, &paths.thaw),
        (&paths.shadow, &paths.cut),
        (&paths.thaw, &paths.cut),
    ] {
        if is_at(file, stays)? && is_at(file, goes)? {
            fs::remove_file(goes)?;
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
    begin_thaw_by(exchange, paths, file, uuid)
}

/// The same with a given way to exchange two names.
pub(super) fn begin_thaw_by(
    exchange: impl Fn(&Path, &Path) -> io::Result<bool>,
    paths: &Paths,
    file: &ShadowFile,
    uuid: &[u8; 16],
) -> io::Result<Option<io::Error>> {
    settle(paths, file)?;
    if is_at(file, &paths.shadow)? {
        let exchanged = match make_marker(&paths.thaw, uuid) {
            Ok(()) => exchange(&paths.shadow, &paths.thaw)?,
            // A thaw must not wait for room. The name alone will do.
            Err(e) if is_full(&e) => false,
            Err(e) => return Err(at(&paths.thaw, e)),
        };
        if !exchanged {
            // Killed before the rename it is frozen as before; behind it, the
            // name alone says that it is to be merged.
            remove_marker(&paths.thaw, uuid)?;
            rename(&paths.shadow, &paths.thaw).map_err(|e| at(&paths.thaw, e))?;
        }
    } else if is_at(file, &paths.cut)? {
        remove_marker(&paths.thaw, uuid)?;
        rename(&paths.cut, &paths.thaw).map_err(|e| at(&paths.thaw, e))?;
    }
    let mut unmarked = None;
    if is_at(file, &paths.thaw)? {
        match make_marker(&paths.shadow, uuid) {
            Ok(()) => {}
            // Someone else's file, which stays.
            Err(e) if is_full(&e) || e.kind() == io::ErrorKind::AlreadyExists => {
                unmarked = Some(e);
            }
            Err(e) => return Err(at(&paths.shadow, e)),
        }
    }
    sync_directory(&paths.shadow)?;
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
    for path in [&paths.shadow, &paths.thaw] {
        remove_marker(path, uuid)?;
    }
    sync_directory(&paths.shadow)?;
    for path in [&paths.shadow, &paths.new, &paths.thaw, &paths.cut] {
        if is_at(file, path)? {
            fs::remove_file(path)?;
        }
    }
    sync_directory(&paths.shadow)
}
