//! The file that keeps what frames made of an export.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use shadow::{RealFiles, replace_text};

/// Where an export's state is kept: in the state directory, under a name made
/// of its address and its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFile {
    directory: PathBuf,
    path: PathBuf,
}

/// Why a state could not be read or written.
#[derive(Debug)]
pub struct StateError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "state file {}: {}", self.path.display(), self.source)
    }
}

impl std::error::Error for StateError {}

impl StateFile {
    /// The file for the export `address` of the image at `image`, an absolute
    /// path. Two images whose names are alike have different files, since the
    /// whole path is in the name as a checksum.
    pub fn new(directory: &Path, address: &str, image: &Path) -> StateFile {
        let sum =
            crc::Crc::<u64>::new(&crc::CRC_64_XZ).checksum(image.as_os_str().as_encoded_bytes());
        let name: String = image
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .chars()
            .take(40)
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '.' || c == '_' {
                    c
                } else {
                    '-'
                }
            })
            .collect();
        let path = directory.join(format!("{address}-{name}-{sum:016x}.toml"));
        StateFile {
            directory: directory.to_owned(),
            path,
        }
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file holds; `None` if there is none.
    pub fn load(&self) -> Result<Option<String>, StateError> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.error(source)),
        }
    }

    /// Replaces what the file holds, all or nothing, on stable storage when it
    /// returns. Makes the directory if there is none.
    pub fn save(&self, text: &str) -> Result<(), StateError> {
        self.write(text).map_err(|source| self.error(source))
    }

    fn write(&self, text: &str) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        replace_text(&RealFiles, &self.path, text)
    }

    fn error(&self, source: io::Error) -> StateError {
        StateError {
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_replaced_whole_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(
            &dir.path().join("a/b"),
            "e1.1",
            Path::new("/x/disk image.img"),
        );
        assert!(
            file.path()
                .to_string_lossy()
                .contains("e1.1-disk-image.img-")
        );
        assert_eq!(file.load().unwrap(), None);
        file.save("one").unwrap();
        file.save("two").unwrap();
        assert_eq!(file.load().unwrap().as_deref(), Some("two"));
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
        let other = StateFile::new(dir.path(), "e1.1", Path::new("/y/disk image.img"));
        assert_ne!(other.path().file_name(), file.path().file_name());
    }

    #[test]
    fn a_directory_that_cannot_be_is_an_error_that_names_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let state = StateFile::new(&file.path().join("sub"), "e1.1", Path::new("/i"));
        let error = state.save("x").unwrap_err().to_string();
        assert!(
            error.starts_with("state file ") && error.contains("e1.1-i-"),
            "{error}"
        );
    }
}
