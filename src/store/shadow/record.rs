//! The record of where an image's shadow is, so that a start that was not given
//! it does not serve an image that is out of date.

use std::io;
use std::path::{Path, PathBuf};

use shadow::{Files, Identity, replace_text};
use toml::{Table, Value};

use super::ShadowError;

/// What the record's name ends with.
const RECORD: &str = ".shadow.toml";

/// The record of where an image's shadow is.
#[derive(Clone, Debug)]
pub(super) struct Record {
    path: PathBuf,
    shadow: PathBuf,
    identity: Identity,
    start: u64,
    len: u64,
}

impl Record {
    pub fn of(state_dir: &Path, shadow: &Path, identity: Identity, window: (u64, u64)) -> Record {
        let (start, len) = window;
        let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
        let mut digest = crc.digest();
        for number in [identity.a, identity.b, start] {
            digest.update(&number.to_le_bytes());
        }
        Record {
            path: state_dir.join(format!("{:016x}{RECORD}", digest.finalize())),
            shadow: shadow.to_owned(),
            identity,
            start,
            len,
        }
    }

    /// Puts it on stable storage; the window may have another length by now.
    pub fn write<F: Files>(&self, files: &F, len: u64) -> io::Result<()> {
        let mut table = Table::new();
        table.insert("version".into(), Value::Integer(1));
        let shadow = self
            .shadow
            .to_str()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "its path is not UTF-8"))?;
        table.insert("shadow".into(), Value::String(shadow.to_owned()));
        for (key, number) in [
            ("identity_a", self.identity.a),
            ("identity_b", self.identity.b),
            ("start", self.start),
            ("len", len),
        ] {
            table.insert(key.into(), Value::String(format!("{number:016x}")));
        }
        let directory = self.path.parent().unwrap_or(Path::new("."));
        files.make_directory(directory)?;
        replace_text(files, &self.path, &table.to_string())
    }

    pub fn remove<F: Files>(&self, files: &F) -> io::Result<()> {
        match files.remove(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        match files.sync_directory(&self.path) {
            // There never was one, nor a place for it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            synced => synced,
        }
    }

    /// Refuses a window that shares sectors with another one that is frozen:
    /// what was written to them is in that one's shadow.
    pub fn none_beside<F: Files>(&self, files: &F) -> Result<(), ShadowError> {
        let bad = |path: &Path, what: &str| ShadowError::Record(path.to_owned(), what.to_owned());
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let list = match files.list(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            list => list.map_err(|e| bad(directory, &e.to_string()))?,
        };
        for path in list {
            if path == self.path || !path.to_string_lossy().ends_with(RECORD) {
                continue;
            }
            let text = match files.read_text(&path) {
                // Thawed just now.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                text => text.map_err(|e| bad(&path, &e.to_string()))?,
            };
            let (shadow, [a, b, start, len]) = parse(&text)
                .ok_or_else(|| bad(&path, "it cannot be read; remove it to pass it over"))?;
            let apart = start >= self.start.saturating_add(self.len)
                || self.start >= start.saturating_add(len);
            if (a, b) == (self.identity.a, self.identity.b) && !apart {
                let (first, sectors) = (start / shadow::SECTOR, len / shadow::SECTOR);
                return Err(ShadowError::OtherWindow(shadow, first, sectors));
            }
        }
        Ok(())
    }

    /// The shadow that a record speaks of, if there is a record.
    pub fn read<F: Files>(&self, files: &F) -> Result<Option<PathBuf>, ShadowError> {
        let bad = |what: String| ShadowError::Record(self.path.clone(), what);
        let text = match files.read_text(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(bad(e.to_string())),
        };
        parse(&text).map(|(path, _)| Some(path)).ok_or_else(|| {
            bad("it cannot be read; mend it, or --discard-shadow gives the shadow up".into())
        })
    }
}

/// What a record says: the shadow; of the image what it is, and of the window
/// where it begins and how long it is.
fn parse(text: &str) -> Option<(PathBuf, [u64; 4])> {
    let table = text.parse::<Table>().ok()?;
    let number = |key: &str| u64::from_str_radix(table.get(key)?.as_str()?, 16).ok();
    let shadow = PathBuf::from(table.get("shadow")?.as_str()?);
    let [a, b, start, len] = ["identity_a", "identity_b", "start", "len"].map(number);
    Some((shadow, [a?, b?, start?, len?]))
}
