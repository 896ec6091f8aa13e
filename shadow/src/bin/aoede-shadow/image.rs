//! The image, opened so that no target serves it meanwhile.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use shadow::lock::{self, Lock, patiently};
use shadow::{Geometry, Identity};

/// Why an image cannot be used.
#[derive(Debug)]
pub struct ImageError {
    path: PathBuf,
    why: Why,
}

#[derive(Debug)]
enum Why {
    NotADisk,
    IsTheShadow,
    Locked,
    Busy,
    Other(String),
    Short(u64),
    System(&'static str, io::Error),
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}: ", self.path.display())?;
        match &self.why {
            Why::NotADisk => f.write_str("is neither a regular file nor a block device; give one"),
            Why::IsTheShadow => f.write_str("is the shadow itself; give the image that it is of"),
            Why::Locked => {
                f.write_str("a target serves it or a part of this window; stop it first")
            }
            Why::Busy => {
                f.write_str("the device is in use (served, mounted, or part of another); free it")
            }
            Why::Other(difference) => write!(
                f,
                "is not the one that the shadow was made for: {difference}; give that one, or \
                 --other-image if this is it, or a copy of it"
            ),
            Why::Short(needs) => write!(
                f,
                "ends before the shadow's window, which needs {needs} bytes; give an image that \
                 is as large as the one it was made for"
            ),
            Why::System(what, e) => {
                write!(f, "{what}: {e}")?;
                match e.kind() {
                    io::ErrorKind::NotFound => f.write_str("; correct the path"),
                    io::ErrorKind::PermissionDenied => f.write_str("; run as who may write it"),
                    _ => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for ImageError {}

/// An image.
#[derive(Debug)]
pub struct Image {
    /// For reading and writing at places.
    pub file: File,
    /// What it is.
    pub identity: Identity,
    /// What the kernel says of it.
    pub metadata: Metadata,
    path: PathBuf,
}

impl Image {
    /// Opens an image to read it.
    pub fn look(path: &Path) -> Result<Image, ImageError> {
        Image::open_as(path, false).map_err(at(path))
    }

    /// Opens an image to write the window of a shadow, and locks it as a target
    /// does: a device exclusively, and the bytes of the window. `shadow` is
    /// what the kernel says of the shadow's file.
    pub fn open(path: &Path, window: &Geometry, shadow: &Metadata) -> Result<Image, ImageError> {
        let image = Image::open_as(path, true).map_err(at(path))?;
        image.is_not(shadow)?;
        patiently(|| lock(&image.file, window.start(), window.len()), is_held).map_err(at(path))?;
        Ok(image)
    }

    /// Whether a target that lives has these bytes of it; if none has, they are
    /// ours from now on.
    pub fn is_served(&self, start: u64, len: u64) -> Result<bool, ImageError> {
        match patiently(|| lock(&self.file, start, len), is_held) {
            Ok(()) => Ok(false),
            Err(Why::Locked) => Ok(true),
            Err(why) => Err(at(&self.path)(why)),
        }
    }

    fn open_as(path: &Path, write: bool) -> Result<Image, Why> {
        // Looked at before it is opened: opening something else may wait, or do
        // something.
        let metadata = std::fs::metadata(path).map_err(|e| Why::System("looking at it", e))?;
        let is_device = metadata.file_type().is_block_device();
        if !metadata.is_file() && !is_device {
            return Err(Why::NotADisk);
        }
        let mut how = OpenOptions::new();
        how.read(true).write(write);
        if is_device && write {
            // For a block device, without O_CREAT: fails while it is mounted,
            // or a target has it.
            how.custom_flags(libc::O_EXCL);
        }
        let open = || {
            how.open(path).map_err(|e| match e.raw_os_error() {
                Some(libc::EBUSY) => Why::Busy,
                _ => Why::System("opening it", e),
            })
        };
        let file = patiently(open, is_held)?;
        let metadata = file
            .metadata()
            .map_err(|e| Why::System("looking at it", e))?;
        let identity = Identity::of(&file).map_err(|e| Why::System("measuring it", e))?;
        Ok(Image {
            file,
            identity,
            metadata,
            path: path.to_owned(),
        })
    }

    /// Refuses an image that is the file of the shadow.
    pub fn is_not(&self, shadow: &Metadata) -> Result<(), ImageError> {
        let place = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        match place(&self.metadata) == place(shadow) {
            true => Err(at(&self.path)(Why::IsTheShadow)),
            false => Ok(()),
        }
    }

    /// Refuses an image that is not the one a shadow was made for; with `other`,
    /// only one that has no room for its window.
    pub fn belongs(
        &self,
        made_for: &Identity,
        window: &Geometry,
        other: bool,
    ) -> Result<(), ImageError> {
        match made_for.difference(&self.identity) {
            Some(difference) if !other => Err(at(&self.path)(Why::Other(difference.to_string()))),
            _ if self.identity.bytes < window.end() => {
                Err(at(&self.path)(Why::Short(window.end())))
            }
            _ => Ok(()),
        }
    }
}

fn at(path: &Path) -> impl Fn(Why) -> ImageError + '_ {
    |why| ImageError {
        path: path.to_owned(),
        why,
    }
}

/// `true` if a process holds what we need.
fn is_held(why: &Why) -> bool {
    matches!(why, Why::Locked | Why::Busy)
}

fn lock(file: &File, start: u64, len: u64) -> Result<(), Why> {
    let offset = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let start = offset(start);
    let len = offset(len).min(i64::MAX - start);
    lock::set(file, Lock::Exclusive, start, len).map_err(|e| match lock::is_held(&e) {
        true => Why::Locked,
        false => Why::System("locking it", e),
    })
}
