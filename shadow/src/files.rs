//! Names of files and when they are on stable storage. A seam: the tests put a
//! disk there that loses its power ([`trial`](crate::trial)).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::file::BlockFile;

/// What the name of a file ends with that is to replace another.
const TEMPORARY: &str = ".tmp";

/// Files and their names. A change of a name is on stable storage after
/// [`sync_directory`](Files::sync_directory).
pub trait Files {
    /// An open file.
    type File: BlockFile;

    /// The paths in a directory.
    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;
    /// Makes a directory and those above it, where there is none.
    fn make_directory(&self, path: &Path) -> io::Result<()>;
    /// Makes a file that was not there, for its owner alone.
    fn create(&self, path: &Path) -> io::Result<Self::File>;
    /// The whole content of a text file.
    fn read_text(&self, path: &Path) -> io::Result<String>;
    /// Renames a file; what had the new name is gone.
    fn replace(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a name.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Brings the names in the directory of `path` to stable storage.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
}

/// Replaces what a text file holds, all or nothing, on stable storage when it
/// returns. One at a time for each path.
pub fn replace_text<F: Files>(files: &F, path: &Path, text: &str) -> io::Result<()> {
    let mut temporary = OsString::from(path);
    temporary.push(TEMPORARY);
    let temporary = PathBuf::from(temporary);
    // A process that was killed may have left one.
    match files.remove(&temporary) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let file = files.create(&temporary)?;
    // The name may only point to what is on the disk: first the content, then
    // the name, then the directory that holds the name.
    let mut written = file.write_at(text.as_bytes(), 0);
    if !crate::fault!("text-not-synced") {
        written = written.and_then(|()| file.sync());
    }
    let named = written.and_then(|()| files.replace(&temporary, path));
    named.inspect_err(|_| {
        // The first error is the one to tell.
        let _ = files.remove(&temporary);
    })?;
    if crate::fault!("name-of-text-not-synced") {
        return Ok(());
    }
    files.sync_directory(path)
}

/// The files of this machine.
#[derive(Clone, Copy, Debug)]
pub struct RealFiles;

impl Files for RealFiles {
    type File = File;

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(directory)?;
        entries.map(|entry| Ok(entry?.path())).collect()
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let mut how = OpenOptions::new();
        how.read(true).write(true).create_new(true).mode(0o600);
        how.open(path)
    }

    fn read_text(&self, path: &Path) -> io::Result<String> {
        fs::read_to_string(path)
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        crate::paths::sync_directory(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trial::{Disk, Fate};

    fn is_whole<F: Files>(files: &F, path: &Path) {
        replace_text(files, path, "one").unwrap();
        replace_text(files, path, "the second").unwrap();
        assert_eq!(files.read_text(path).unwrap(), "the second");
    }

    #[test]
    fn a_text_is_replaced_whole_on_every_kind_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        // What a process that was killed has left.
        fs::write(dir.path().join("text.tmp"), "hal").unwrap();
        is_whole(&RealFiles, &path);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        is_whole(&Disk::new(&[]), &path);
    }

    #[test]
    fn a_text_survives_a_cut_of_the_power_at_every_operation() {
        let path = Path::new("d/text");
        // How many of two have been done.
        let both = |disk: &Disk| {
            let texts = ["the first", "another one"].into_iter();
            texts
                .take_while(|text| replace_text(disk, path, text).is_ok())
                .count()
        };
        let whole = Disk::new(&[]);
        assert_eq!(both(&whole), 2);
        for cut in 0..=whole.operations() {
            let disk = Disk::new(&[]);
            disk.cut_at(cut);
            let done = both(&disk);
            for fate in (0..40).map(Fate::Torn).chain([Fate::Lost, Fate::Kept]) {
                let text = disk.restart(fate).read_text(path).ok();
                let may: &[Option<&str>] = match done {
                    0 => &[None, Some("the first")],
                    1 => &[Some("the first"), Some("another one")],
                    _ => &[Some("another one")],
                };
                let text = text.as_deref();
                assert!(may.contains(&text), "cut at {cut}, {fate:?}: {text:?}");
            }
        }
    }
}
