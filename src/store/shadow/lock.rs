//! `PATH.lock`: the file that backups of an export lock (flock) against each
//! other, and by which they see that a process was started with `-f PATH`.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

/// Opens the lock file of a shadow, to be held as long as the export is served;
/// makes it if there is none. Nothing is written to it.
///
/// An export is served without it as well: only backups need it.
pub(super) fn open_lock(export: &str, shadow: &Path) -> Option<File> {
    let mut path = OsString::from(shadow);
    path.push(".lock");
    let path = PathBuf::from(path);
    let file = open(&path);
    file.inspect_err(|e| {
        log::warn!(
            "{export}: {}: {e}; aoede-backup does not work without this file: see what has the \
             name, and start again",
            path.display()
        );
    })
    .ok()
}

fn open(path: &Path) -> io::Result<File> {
    let mut how = OpenOptions::new();
    how.read(true).write(true).create(true).mode(0o600);
    // Neither through a link, nor waiting for the other end of a pipe.
    how.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = how.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("is no regular file")),
    }
}
