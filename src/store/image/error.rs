//! What is wrong with an image, and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::ALIGN_MAX;
use super::in_use::User;
use crate::sys::lock::Holder;
use crate::text::count;

/// Why an image cannot be served.
#[derive(Debug)]
pub struct ImageError {
    /// The image.
    pub path: PathBuf,
    /// Why.
    pub why: ImageTrouble,
}

/// What is wrong with an image.
#[derive(Debug)]
pub enum ImageTrouble {
    /// It is not there.
    Missing,
    /// It is a link to something that is not there.
    Dangling(PathBuf),
    /// It is neither a file nor a block device.
    NotADisk,
    /// Not one sector.
    Empty,
    /// The exported range begins at its end or behind; how many sectors it has.
    StartPastEnd(u64),
    /// The exported range leads past its end; how many sectors it has.
    WindowPastEnd(u64),
    /// Its bounds are not those direct I/O needs, in bytes.
    Unaligned(u64),
    /// Its blocks for direct I/O are larger than the cache's can be, in bytes.
    LargeBlocks(u32),
    /// Its filesystem knows no direct I/O.
    NoDirect,
    /// Another process has it locked, and which, once that was asked.
    Locked(Option<Holder>),
    /// The block device is in use; the user, if it is known.
    Busy(Option<User>),
    /// The block device takes no writes.
    ReadOnlyDevice,
    /// A system call failed, and which.
    System(&'static str, io::Error),
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}: {}", self.path.display(), self.why)
    }
}

impl fmt::Display for ImageTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageTrouble::Missing => {
                f.write_str("there is none; correct the path or make one with --create SIZE")
            }
            ImageTrouble::Dangling(to) => write!(
                f,
                "is a link to {}, which does not exist; correct the link or the path",
                to.display()
            ),
            ImageTrouble::NotADisk => {
                f.write_str("is neither a regular file nor a block device; give one of these")
            }
            ImageTrouble::Empty => {
                f.write_str("holds no sector; give it a size, as with 'truncate -s 1G'")
            }
            ImageTrouble::StartPastEnd(sectors) => write!(
                f,
                "-o begins at or behind its end, it has {}; lower -o",
                count(*sectors, "sector")
            ),
            ImageTrouble::WindowPastEnd(sectors) => write!(
                f,
                "-o and -l lead past its end, it has {}; lower them",
                count(*sectors, "sector")
            ),
            ImageTrouble::Unaligned(align) => write!(
                f,
                "direct I/O here needs start and end at multiples of {align} bytes; \
                 change -o and -l or the size, or leave out -d"
            ),
            ImageTrouble::LargeBlocks(bytes) => write!(
                f,
                "direct I/O here takes whole blocks of {bytes} bytes, and {ALIGN_MAX} is the most \
                 that aoede knows; leave out -d"
            ),
            ImageTrouble::NoDirect => {
                f.write_str("its filesystem cannot do direct I/O; leave out -d")
            }
            ImageTrouble::Locked(holder) => {
                match holder {
                    Some(holder) => write!(f, "{holder} ")?,
                    None => f.write_str("another process ")?,
                }
                f.write_str(
                    "serves it or a part of this range; stop that one, or give another range \
                     with -o and -l",
                )
            }
            ImageTrouble::Busy(user) => {
                match user {
                    Some(user) => write!(f, "{user}")?,
                    None => f.write_str("is in use (mounted, or by another program)")?,
                }
                f.write_str("; free it first (--force serves it all the same)")
            }
            ImageTrouble::ReadOnlyDevice => {
                f.write_str("the device takes no writes; serve it with -r")
            }
            ImageTrouble::System(what, e) => {
                write!(f, "{what}: {e}")?;
                match e.kind() {
                    io::ErrorKind::ReadOnlyFilesystem => f.write_str("; serve it with -r"),
                    io::ErrorKind::PermissionDenied => {
                        f.write_str("; run as who may write it, or with -r as who may read it")
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for ImageError {}
