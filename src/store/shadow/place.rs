//! Where a shadow and the record of it are, and the image under it. A seam: the
//! tests put a disk there that loses its power.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use shadow::paths::{self, Names};
use shadow::{BlockFile, Files, Identity, PathError, Paths, RealFiles, Shadow, ShadowFile, Spec};

use super::super::image::{Image, keep_no_access_time, write_pieces};
use super::super::volume::Bounds;
use super::ShadowError;
use crate::sys::buffer::Body;
use crate::sys::file::{is_cached, push, read_now};

/// The files of shadows and what they are called. The steps are those of
/// [`shadow::paths`].
pub trait Place: Send + Sync {
    /// A shadow's file.
    type File: BlockFile;
    /// Where the records are.
    type Records: Files;

    /// The files of the state directory.
    fn records(&self) -> &Self::Records;
    /// Checks that a shadow could be made here.
    fn probe(&self, path: &Path) -> Result<(), ShadowError>;
    /// Looks which names of a shadow are there.
    fn find(&self, paths: &Paths) -> io::Result<Names>;
    /// Makes a shadow as PATH.new, with its marker, on stable storage.
    fn create(&self, paths: &Paths, spec: &Spec) -> Result<Shadow<Self::File>, PathError>;
    /// Opens and locks a shadow.
    fn open(&self, path: &Path) -> Result<Shadow<Self::File>, PathError>;
    /// Gives a shadow the name that says that the image is quiesced.
    fn appear(&self, paths: &Paths, file: &Self::File) -> io::Result<()>;
    /// Makes PATH another inode; returns why it could not be the marker.
    fn begin_thaw(
        &self,
        paths: &Paths,
        file: &Self::File,
        uuid: &[u8; 16],
    ) -> io::Result<Option<io::Error>>;
    /// Makes a marker.
    fn make_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()>;
    /// Takes away what a creation that failed has made.
    fn abandon(&self, paths: &Paths, uuid: &[u8; 16]);
    /// Takes a shadow and its marker away.
    fn vanish(&self, paths: &Paths, file: &Self::File, uuid: &[u8; 16]) -> io::Result<()>;
    /// Bytes of the file.
    fn len(&self, file: &Self::File) -> io::Result<u64>;
    /// Allocates so many bytes behind `end`.
    fn take(&self, file: &Self::File, end: u64, bytes: u64) -> io::Result<()>;
    /// Gives back all behind `end`.
    fn give_back(&self, file: &Self::File, end: u64) -> io::Result<()>;
    /// Fills `buf` if that needs no waiting; `false` if it would.
    fn read_now(&self, file: &Self::File, buf: &mut [u8], offset: u64) -> bool;
    /// `true` if [`read_now`](Place::read_now) would find these bytes, or if that is
    /// not known. To ask begins no read.
    fn is_cached(&self, _file: &Self::File, _offset: u64, _len: u64) -> bool {
        true
    }
    /// Writes all of the pieces, one behind the other.
    fn write_pieces(&self, file: &Self::File, pieces: &[Body], offset: u64) -> io::Result<()>;
    /// Writes out what the page cache has of these bytes, and waits for it.
    fn push(&self, _file: &Self::File, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// The image under a shadow.
pub trait ShadowedImage: BlockFile {
    /// What a shadow of it knows it by.
    fn identity(&self) -> io::Result<Identity>;
    /// The first byte of the exported range and its length.
    fn window(&self) -> (u64, u64);
    /// What the export is now, or why it is none.
    fn bounds(&self) -> Result<Bounds, String>;
    /// `true` if it is never written.
    fn is_read_only(&self) -> bool;
    /// Where it is.
    fn path(&self) -> &Path;
}

impl ShadowedImage for Image {
    fn identity(&self) -> io::Result<Identity> {
        self.shadow_identity()
    }

    fn window(&self) -> (u64, u64) {
        (self.id().start, self.id().len)
    }

    fn bounds(&self) -> Result<Bounds, String> {
        Image::bounds(self).map_err(|e| e.to_string())
    }

    fn is_read_only(&self) -> bool {
        Image::is_read_only(self)
    }

    fn path(&self) -> &Path {
        Image::path(self)
    }
}

/// The files of this machine.
#[derive(Clone, Copy, Debug)]
pub struct RealPlace;

impl Place for RealPlace {
    type File = ShadowFile;
    type Records = RealFiles;

    fn records(&self) -> &RealFiles {
        &RealFiles
    }

    fn probe(&self, path: &Path) -> Result<(), ShadowError> {
        probe(path)
    }

    fn find(&self, paths: &Paths) -> io::Result<Names> {
        paths::find(paths)
    }

    fn create(&self, paths: &Paths, spec: &Spec) -> Result<Shadow<ShadowFile>, PathError> {
        let shadow = paths::create(paths, spec)?;
        keep_no_access_time(shadow.file().as_file());
        Ok(shadow)
    }

    fn open(&self, path: &Path) -> Result<Shadow<ShadowFile>, PathError> {
        let shadow = paths::open(path)?;
        keep_no_access_time(shadow.file().as_file());
        Ok(shadow)
    }

    fn appear(&self, paths: &Paths, file: &ShadowFile) -> io::Result<()> {
        paths::appear(paths, file)
    }

    fn begin_thaw(
        &self,
        paths: &Paths,
        file: &ShadowFile,
        uuid: &[u8; 16],
    ) -> io::Result<Option<io::Error>> {
        paths::begin_thaw(paths, file, uuid)
    }

    fn make_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
        paths::make_marker(path, uuid)
    }

    fn abandon(&self, paths: &Paths, uuid: &[u8; 16]) {
        paths::abandon(paths, uuid);
    }

    fn vanish(&self, paths: &Paths, file: &ShadowFile, uuid: &[u8; 16]) -> io::Result<()> {
        paths::vanish(paths, file, uuid)
    }

    fn len(&self, file: &ShadowFile) -> io::Result<u64> {
        Ok(file.metadata()?.len())
    }

    fn take(&self, file: &ShadowFile, end: u64, bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::empty();
        Ok(fallocate(file.as_fd(), flags, end as i64, bytes as i64)?)
    }

    fn give_back(&self, file: &ShadowFile, end: u64) -> io::Result<()> {
        Ok(nix::unistd::ftruncate(file.as_fd(), end as i64)?)
    }

    fn read_now(&self, file: &ShadowFile, buf: &mut [u8], offset: u64) -> bool {
        read_now(file.as_file(), buf, offset).unwrap_or(false)
    }

    fn is_cached(&self, file: &ShadowFile, offset: u64, len: u64) -> bool {
        is_cached(file.as_file(), offset, len)
    }

    fn write_pieces(&self, file: &ShadowFile, pieces: &[Body], offset: u64) -> io::Result<()> {
        write_pieces(file.as_file(), pieces, offset)
    }

    fn push(&self, file: &ShadowFile, offset: u64, len: u64) -> io::Result<()> {
        push(file.as_file(), offset, len)
    }
}

/// Whether a shadow could be made there: tried with a file of no name.
pub(super) fn probe(path: &Path) -> Result<(), ShadowError> {
    let fail = |what| move |e| ShadowError::Io(path.to_owned(), what, e);
    let paths = Paths::of(path);
    let directory = path.parent().unwrap_or(Path::new("/"));
    let file = tempfile::tempfile_in(directory).map_err(fail("making a file beside it"))?;
    if !paths::keeps_holes(&file).map_err(fail("giving a file a length"))? {
        return Err(ShadowError::Path(PathError {
            path: paths.shadow,
            why: paths::Trouble::NoHoles,
        }));
    }
    Ok(())
}
