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
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

use super::{for_making, name, rename, unnamed};
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
